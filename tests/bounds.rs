//! The rounding errors of drawn cases of every layer are what they were when tests/rounding.rs, which takes minutes, found
//! them right: a formula that changes shows here at once. After a change that is meant: `WORA_KEEP=1 cargo test --test bounds`.

mod any_case;

use any_case::{Choices, any_case};
use ndarray::ArrayD;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use std::collections::BTreeMap;
use woracle::case::{Case, Tensor};
use woracle::registry::{Precision, Subject};
use woracle::wora::Storage;

const KEPT: &str = "tests/bounds.json";

/// No type is like this one, in which no term of any formula is lost beside the others.
const STORAGE: Storage = Storage { smallest_normal: 0.5, chain: 3, total_chain: 7 };

/// A case and what every tensor's errors come to.
type Bounds = BTreeMap<String, BTreeMap<String, f64>>;

/// One number, in which every element counts by where it is, however small it is.
fn total(errors: &ArrayD<f64>) -> f64 {
    let of = |(i, error): (usize, &f64)| error.max(f64::MIN_POSITIVE).ln() * (1.0 + (i as f64 * 0.618).fract());
    errors.iter().enumerate().map(of).sum::<f64>() / errors.len().max(1) as f64
}

fn bounds(layer: &dyn Subject, mut case: Case, storage: Storage) -> BTreeMap<String, f64> {
    let results = layer.evaluate(&case, Precision::F64).expect("results");
    case.extend(results);
    let (_, errors) = layer.expect(&case, &[storage]).expect("errors");
    errors[0].iter().map(|(name, errors)| (name.clone(), total(errors))).collect()
}

/// Values of very different sizes: up to `2^most`, and down to `2^(most - spread)`.
struct Sizes {
    tensors: &'static [&'static str],
    most: i32,
    spread: i32,
}

/// What lies at the edges of what products in f32 can hold, and beyond.
const SIZES: &[Sizes] = &[
    Sizes { tensors: &["x"], most: 30, spread: 80 },
    Sizes { tensors: &["x"], most: -30, spread: 80 },
    Sizes { tensors: &["grad.y"], most: 30, spread: 80 },
    Sizes { tensors: &["grad.y"], most: -30, spread: 80 },
    Sizes { tensors: &["x", "grad.y"], most: 0, spread: 48 },
    Sizes { tensors: &["x", "base.weight", "lora_B", "lora_embedding_B"], most: 0, spread: 48 },
    Sizes { tensors: &["grad.y", "base.weight", "lora_B", "lora_embedding_B"], most: 0, spread: 48 },
    Sizes { tensors: &["base.weight", "lora_B", "lora_embedding_B"], most: -100, spread: 0 },
    Sizes { tensors: &["base.weight", "lora_B", "lora_embedding_B"], most: 100, spread: 0 },
];

fn sized(mut case: Case, sizes: &Sizes) -> Case {
    for name in sizes.tensors {
        let Some(Tensor::Float(values)) = case.tensors.get_mut(*name) else { continue };
        let mut exponents = (0..5).map(|step| sizes.most - sizes.spread * step / 4).cycle();
        *values = values.mapv(|value| value * 2f64.powi(exponents.next().expect("one more"))).into();
    }
    case
}

fn drawn() -> Bounds {
    let mut rng = Pcg64::seed_from_u64(0);
    let mut all = Bounds::new();
    for number in 0..240 {
        let mut bytes: Vec<u8> = (0..64).map(|_| rng.random()).collect();
        // Half of them plain, some large enough for several threads: linear layers and embeddings.
        let sizes = SIZES.get(number % (2 * SIZES.len()));
        let is_large = number % 20 == 19;
        if is_large {
            bytes[0] = (number / 20 % 2) as u8;
        }
        let mut choices = Choices::new(&bytes).larger(if is_large { 60 } else { 1 });
        let Some((layer, mut case)) = any_case(&mut choices) else { continue };
        if case.tensors["x"].shape().contains(&0) {
            continue;
        }
        let mut storage = STORAGE;
        if let Some(sizes) = sizes {
            case = sized(case, sizes);
            storage.smallest_normal = 0.0;
        }
        all.insert(format!("{number:03} {}", layer.name()), bounds(layer, case, storage));
    }
    all
}

#[test]
fn errors_are_what_they_were_found_to_be() {
    let found = drawn();
    if std::env::var_os("WORA_KEEP").is_some() {
        std::fs::write(KEPT, serde_json::to_string_pretty(&found).expect("JSON") + "\n").expect(KEPT);
    }
    let kept: Bounds = serde_json::from_str(&std::fs::read_to_string(KEPT).expect(KEPT)).expect(KEPT);
    assert!(kept.len() > 100 && kept.keys().eq(found.keys()), "{:?}", found.keys());
    for (case, kept) in kept {
        assert!(kept.keys().eq(found[&case].keys()), "{case}: {:?}", found[&case].keys());
        for (tensor, kept) in kept {
            let found = found[&case][&tensor];
            // Large sums are in f32.
            assert!((found - kept).abs() <= 3e-6, "{case}: {tensor}: {found}, and was {kept}");
        }
    }
}
