//! The rounding errors of drawn cases of every layer are what they were when tests/rounding.rs, which takes minutes, found
//! them right: a formula that changes shows here at once. After a change that is meant: `WORA_KEEP=1 cargo test --test bounds`.

mod any_case;

use any_case::{Choices, any_case};
use ndarray::ArrayD;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use std::collections::BTreeMap;
use woracle::case::{Case, Tensor};
use woracle::registry::Subject;
use woracle::wora::Storage;

const KEPT: &str = "tests/bounds.json";

/// No type is like this one, in which no term of any formula is lost beside the others.
const STORAGE: Storage = Storage { smallest_normal: 0.5, chain: 3, total_chain: 7 };

/// A case and what every tensor's errors come to.
type Bounds = BTreeMap<String, BTreeMap<String, f64>>;

/// One number, in which every element counts by where it is.
fn total(errors: &ArrayD<f64>) -> f64 {
    errors.iter().enumerate().map(|(i, error)| error * (1.0 + (i as f64 * 0.618).fract())).sum()
}

fn bounds(layer: &dyn Subject, mut case: Case) -> BTreeMap<String, f64> {
    let results = layer.define(&case).expect("results");
    case.extend(results);
    let (_, errors) = layer.expect(&case, &[STORAGE]).expect("errors");
    errors[0].iter().map(|(name, errors)| (name.clone(), total(errors))).collect()
}

/// What the base weight of a case is multiplied by, and B with it.
fn scaled(mut case: Case, factor: f64) -> Case {
    for (name, tensor) in &mut case.tensors {
        if let (true, Tensor::Float(values)) = (name == "base.weight" || name.ends_with("_B"), tensor) {
            *values = (values.to_owned().into_owned() * factor).into();
        }
    }
    case
}

fn drawn() -> Bounds {
    let mut rng = Pcg64::seed_from_u64(0);
    let mut all = Bounds::new();
    for number in 0..160 {
        let bytes: Vec<u8> = (0..64).map(|_| rng.random()).collect();
        // Some large enough for several threads, some beyond the range of f32.
        let (size, factor) = match number % 16 {
            14 => (30, 1.0),
            15 => (1, 1e-30),
            _ => (1, 1.0),
        };
        let Some((layer, case)) = any_case(&mut Choices::new(&bytes).larger(size)) else { continue };
        if !case.tensors["x"].shape().contains(&0) {
            all.insert(format!("{number:03} {}", layer.name()), bounds(layer, scaled(case, factor)));
        }
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
            assert!((found - kept).abs() <= 3e-6 * kept, "{case}: {tensor}: {found:e}, and was {kept:e}");
        }
    }
}
