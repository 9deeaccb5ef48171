//! The run of `examples/digits-cnn.toml` through the library, every line of the loop in sight: a small network learns
//! upright digits, is frozen, and is adapted to digits turned by a quarter.
//!
//! ```sh
//! cargo run --release --example digits_cnn
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use woracle::Result;
use woracle::modules::{Named, Pass};
use woracle::train::data::{DataConfig, Source, Split, Transform, load, shuffled, split};
use woracle::train::{AdapterTable, Decay, Evaluation, Model, Optimiser, OptimiserTable, Prepared, Schedule};

/// Conv, conv, pool, two linear layers: as in the configuration, but for names.
const MODULES: &str = r#"[
    {"name": "conv1", "type": "conv2d", "in_channels": 1, "out_channels": 16, "kernel_size": 3, "padding": 1},
    {"type": "relu"},
    {"name": "conv2", "type": "conv2d", "in_channels": 16, "out_channels": 32, "kernel_size": 3, "padding": 1},
    {"type": "relu"},
    {"type": "max_pool2d", "kernel_size": 2},
    {"type": "flatten"},
    {"name": "fc", "type": "linear", "in_features": 512, "out_features": 64},
    {"type": "relu"},
    {"name": "head", "type": "linear", "in_features": 64, "out_features": 10}
]"#;

const BATCH: usize = 64;

/// Trains whatever of the model is not frozen.
fn train(model: &mut Model<f32>, data: &Prepared<f32>, samples: &[usize], epochs: usize, rate: f64) -> Result<()> {
    let adamw = format!(r#"{{"type": "adamw", "learning_rate": {rate}}}"#);
    let table: OptimiserTable = serde_json::from_str(&adamw).expect("a table");
    let mut optimiser = Optimiser::new(table);
    let schedule = Schedule { warmup: 10, decay: Decay::Cosine, floor: 0.0 };
    let steps = epochs * samples.len().div_ceil(BATCH);
    let mut step = 0;
    for epoch in 0..epochs {
        for batch in shuffled(samples, 0, epoch as u64).chunks(BATCH) {
            let (x, targets) = data.batch(batch);
            let (scores, backward) = model.forward(x, &Pass::training(step as u64))?;
            let (_loss, dscores) = data.loss().evaluate(scores, &targets)?;
            let gradients: BTreeMap<_, _> = backward(dscores)?.parameters.into_iter().collect();
            optimiser.step(model.parameters_mut(), &gradients, schedule.factor(step, steps))?;
            step += 1;
        }
    }
    Ok(())
}

fn digits(transform: Vec<Transform>) -> Result<(Prepared<f32>, Split)> {
    let config = DataConfig { scale: 0.0625, transform, ..Source::Digits.into() };
    let digits = load(&config, Path::new("."), None)?;
    let parts = split(&digits, 0.0, 0.25, 0)?;
    Ok((Prepared::new(digits, None)?, parts))
}

fn main() -> Result<()> {
    let modules: Vec<Named> = serde_json::from_str(MODULES).expect("modules");
    let (upright, parts) = digits(vec![])?;
    let (turned, _) = digits(vec![Transform::Rotate90])?;

    let mut model = Model::<f32>::new(&modules, 0)?;
    train(&mut model, &upright, &parts.train, 12, 3e-3)?;
    println!("upright digits: {}", Evaluation::of(&model, &upright, &parts.test)?);
    println!("turned digits:  {}", Evaluation::of(&model, &turned, &parts.test)?);

    let table =
        r#"{"method": "wora", "rank": 4, "lora_alpha": 8.0, "target_modules": ["conv1", "conv2", "fc", "head"]}"#;
    let table: AdapterTable = serde_json::from_str(table).expect("a table");
    let layers = model.adapt(&table, 0)?;
    println!("{layers} layers adapted, {} numbers trained", model.count_trained());
    train(&mut model, &turned, &parts.train, 40, 1e-2)?;
    let adapted = Evaluation::of(&model, &turned, &parts.test)?;
    println!("turned digits:  {adapted}");
    for (module, (adapter, _)) in model.adapters() {
        let scalar = |values: Option<ndarray::ArrayD<f64>>| values.map_or(1.0, |values| values[[]]);
        println!("{module}: alpha {:.3}, beta {:.3}", scalar(adapter.alpha), scalar(adapter.beta));
    }
    assert!(adapted.accuracy.is_some_and(|accuracy| accuracy > 0.9), "the adapter has not learned");
    Ok(())
}
