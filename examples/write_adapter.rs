//! Writes a DoRA adapter that Python's `peft` loads, over the model of tests/data/peft/text-dora, and what the adapted
//! model computes, for `examples/load_in_peft.py` to compare.
//!
//! ```sh
//! cargo run --release --example write_adapter -- OUT_DIR
//! python examples/load_in_peft.py OUT_DIR
//! ```

use ndarray::{Array2, ArrayD, Axis, IxDyn};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use woracle::operators::{Conv1d, ConvSettings, Embedding, Input, Linear, Operator};
use woracle::oracle::Dtype;
use woracle::peft::{AdapterConfig, Model, save};
use woracle::wora::{Base, Config, Layer, LoraInit, Method, scaling};
use woracle::{Error, Result};

const RANK: usize = 4;
const LORA_ALPHA: f64 = 8.0;

/// A layer of the model with a fresh DoRA adapter that has moved from its start.
fn layer<O: Operator>(model: &Model, module: &str, settings: O::Settings, rng: &mut Pcg64) -> Result<Layer<O, f64>> {
    let read = |name: String| model.tensor(&name).and_then(|(file, _)| file.values(&name));
    let weight = read(format!("{module}.weight"))?.0;
    let bias = read(format!("{module}.bias")).ok().map(|(bias, _)| bias);
    let operator = O::from_weight_shape(settings, weight.shape())?;
    let config = Config::new(Method::Dora, scaling(LORA_ALPHA, RANK, false)?);
    let base = Base { weight: weight.into(), bias };
    let mut layer = Layer::init(operator, config, base, RANK, LoraInit::KaimingUniform, rng)?;
    for (_, mut values) in layer.adapter_mut() {
        // To the nearest f32, as it will be stored.
        values.mapv_inplace(|value| f64::from((value + rng.random_range(-0.2..0.2)) as f32));
    }
    Ok(layer)
}

fn main() -> Result<()> {
    let out = PathBuf::from(std::env::args().nth(1).expect("OUT_DIR"));
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/text-dora/model.safetensors");
    let (model, mut rng) = (Model::open(&data)?, Pcg64::seed_from_u64(1));
    let padded: ConvSettings = serde_json::from_str(r#"{"padding": 1}"#).expect("settings");
    let embed = layer::<Embedding>(&model, "embed", Default::default(), &mut rng)?;
    let conv = layer::<Conv1d>(&model, "conv", padded, &mut rng)?;
    let fc1 = layer::<Linear>(&model, "fc1", Default::default(), &mut rng)?;
    let fc2 = layer::<Linear>(&model, "fc2", Default::default(), &mut rng)?;

    let relu = |values: ArrayD<f64>| values.mapv(|value| value.max(0.0));
    let ids: Array2<i64> = Array2::from_shape_simple_fn((6, 9), || rng.random_range(0..23));
    let x = <_ as Input<f64>>::from_ids(ids.clone().into_dyn()).expect("ids");
    let embedded = embed.forward(x, None)?.0.permuted_axes(IxDyn(&[0, 2, 1])).as_standard_layout().into_owned();
    let pooled = relu(conv.forward(embedded.into(), None)?.0).mean_axis(Axis(2)).expect("positions");
    let y = fc2.forward(relu(fc1.forward(pooled.into(), None)?.0).into(), None)?.0;

    let modules = BTreeMap::from([
        ("embed".to_string(), (embed.adapter().clone(), true)),
        ("conv".to_string(), (conv.adapter().clone(), false)),
        ("fc1".to_string(), (fc1.adapter().clone(), false)),
        ("fc2".to_string(), (fc2.adapter().clone(), false)),
    ]);
    let config = AdapterConfig::new(Method::Dora, RANK, LORA_ALPHA, &["embed", "conv", "fc1", "fc2"])?;
    save(&out.join("adapter"), &config, &modules, Dtype::F32)?;

    let failed = |error: std::io::Error| Error::io(&out, &error);
    let bytes = |values: Vec<[u8; 8]>| values.into_iter().flatten().collect::<Vec<u8>>();
    let x = bytes(ids.iter().map(|id| id.to_le_bytes()).collect());
    let y_bytes = bytes(y.iter().map(|y| y.to_le_bytes()).collect());
    let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data).expect("as many bytes");
    let views = [
        ("x", view(safetensors::Dtype::I64, ids.shape(), &x)),
        ("y", view(safetensors::Dtype::F64, y.shape(), &y_bytes)),
    ];
    std::fs::write(out.join("io.safetensors"), safetensors::serialize(views, None).expect("two tensors"))
        .map_err(failed)?;
    std::fs::copy(&data, out.join("model.safetensors")).map_err(failed)?;
    println!("an adapter, its base and its outputs in {}", out.display());
    Ok(())
}
