//! With OpenBLAS: LAPACK-backed ndarray-linalg as one more witness of the weighted direction.
#![cfg(feature = "openblas")]

use approx::assert_abs_diff_eq;
use ndarray::{Array2, ArrayD, Axis, IxDyn};
use ndarray_linalg::{Norm, NormalizeAxis, SVD, normalize};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use woracle::operators::Linear;
use woracle::wora::{Adapter, Base, Config, Layer, Method};

fn random(shape: (usize, usize), rng: &mut Pcg64) -> Array2<f64> {
    Array2::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
}

#[test]
fn rows_normalised_by_ndarray_linalg_are_the_merged_weight_over_its_magnitude() {
    let mut rng = Pcg64::seed_from_u64(1);
    let (weight, a, b) = (random((30, 40), &mut rng), random((4, 40), &mut rng), random((30, 4), &mut rng));
    let magnitude = random((30, 1), &mut rng) + 2.0;
    let weighted = &weight * 0.8 + b.dot(&a) * (1.3 * 2.0);
    let scalar = |value| ArrayD::from_elem(IxDyn(&[]), value);
    let adapter = Adapter {
        lora_a: a.into_dyn(),
        lora_b: b.into_dyn(),
        magnitude: Some(magnitude.column(0).to_owned().into_dyn()),
        alpha: Some(scalar(1.3)),
        beta: Some(scalar(0.8)),
    };
    let operator = Linear { in_features: 40, out_features: 30, fan_in_fan_out: false };
    let base = Base { weight: weight.into_dyn().into(), bias: None };
    let layer = Layer::new(operator, Config::new(Method::Wora, 2.0), base, adapter).expect("a layer");

    let (direction, norms) = normalize(weighted, NormalizeAxis::Row);
    let merged = layer.merge().expect("W'");
    assert_abs_diff_eq!(merged.weight, (&direction * &magnitude).into_dyn(), epsilon = 1e-13);
    let factored = layer.direction().expect("norms").expect("a method with a norm");
    assert_abs_diff_eq!(factored.weight_norm, ndarray::Array1::from(norms), epsilon = 1e-13);
}

#[test]
fn the_delta_has_the_rank_of_the_adapter() {
    let mut rng = Pcg64::seed_from_u64(2);
    let (a, b) = (random((3, 20), &mut rng), random((15, 3), &mut rng));
    let delta = woracle::matmul::product(b.view(), a.view());
    let (_, values, _) = delta.svd(false, false).expect("a decomposition");
    assert!(values[2] > 0.1 && values[3] < 1e-12 * values[0], "{values}");
    let norm = values.norm_l2();
    assert_abs_diff_eq!(norm, delta.axis_iter(Axis(0)).map(|row| row.dot(&row)).sum::<f64>().sqrt(), epsilon = 1e-12);
}
