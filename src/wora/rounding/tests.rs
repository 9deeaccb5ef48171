//! Errors in blocks, and in f32, against those of the whole in f64.

use super::*;
use crate::operators::Linear;
use crate::wora::Direction;
use crate::wora::{Base, Config, Method, NormGradient, RequiresGrad};
use approx::assert_relative_eq;
use ndarray::IxDyn;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

const STORAGE: Storage = Storage { smallest_normal: 0.0, chain: 512, total_chain: 512 };

/// Every error of a masked layer of 7 units, by `errors`.
fn with_passes(
    seed: u64,
    axis: NormAxis,
    errors: impl FnOnce(&Passes<'_, '_, Linear>, Option<&Cotangent>) -> Option<Evaluation<f64>>,
) -> Option<Vec<ArrayD<f64>>> {
    let mut rng = Pcg64::seed_from_u64(seed);
    let mut draw = |shape: &[usize]| ArrayD::from_shape_simple_fn(IxDyn(shape), || rng.random_range(-1.0..1.0));
    let operator = Linear { in_features: 5, out_features: 7, fan_in_fan_out: false };
    let config = Config { norm_axis: axis, norm_gradient: NormGradient::Full, ..Config::new(Method::Wora, 1.5) };
    let base = Base { weight: draw(&[7, 5]).into(), bias: Some(draw(&[7])) };
    let norms = if axis == NormAxis::Output { 7 } else { 5 };
    let adapter = Adapter {
        lora_a: draw(&[2, 5]),
        lora_b: draw(&[7, 2]),
        magnitude: Some(draw(&[norms])),
        alpha: Some(draw(&[])),
        beta: Some(draw(&[])),
    };
    let layer = Layer::new(operator, config, base, adapter).expect("a layer");
    let (x, mask, dy) = (draw(&[3, 5]), draw(&[3, 5]).mapv(|kept| if kept > 0.0 { 2.0 } else { 0.0 }), draw(&[3, 7]));
    let (y, cache) = layer.forward(x.into(), Some(mask.view())).expect("y");
    let gradients = layer.backward_of(&cache, dy.view(), RequiresGrad::ALL).expect("gradients");
    let Direction { weight_norm, gain, .. } = cache.direction.clone().expect("a direction");
    let results = Evaluation {
        y,
        weighted: Some(layer.weighted()),
        weight_norm: Some(weight_norm),
        gain: Some(gain),
        merged_weight: Some(layer.merge().expect("W'").weight),
        gradients: Some(gradients),
    };
    let passes = Passes::new(&layer, &cache, Some(dy.view()), &results, STORAGE);
    let cotangent = results.gradients.as_ref().map(|values| Cotangent::new(&passes, values));
    let Evaluation { y, weighted, weight_norm, gain, merged_weight, gradients } = errors(&passes, cotangent.as_ref())?;
    let Gradients { x, weight, bias, adapter } = gradients.expect("gradients");
    let of_adapter = adapter.named(Linear::LORA_NAMES).into_iter().map(|(_, error)| error.to_owned());
    let all = [
        Some(y),
        weighted,
        weight_norm.map(Array1::into_dyn),
        gain.map(Array1::into_dyn),
        merged_weight,
        x,
        weight,
        bias,
    ];
    Some(all.map(|error| error.expect("every result")).into_iter().chain(of_adapter).collect())
}

#[test]
fn errors_do_not_depend_on_how_many_rows_are_looked_at_together() {
    let whole =
        with_passes(1, NormAxis::Output, |passes, cotangent| passes.errors::<f64>(cotangent, 35)).expect("errors");
    assert_eq!(whole.len(), 13);
    for block in [5, 10, 15] {
        let blocks = with_passes(1, NormAxis::Output, |passes, cotangent| passes.errors::<f64>(cotangent, block))
            .expect("errors");
        for (whole, blocks) in whole.iter().zip(&blocks) {
            assert_relative_eq!(whole, blocks, max_relative = 1e-13);
        }
    }
}

#[test]
fn errors_in_f32_are_those_in_f64() {
    for axis in [NormAxis::Output, NormAxis::Input] {
        let wide = with_passes(2, axis, |passes, cotangent| passes.errors::<f64>(cotangent, BLOCK)).expect("errors");
        let narrow = with_passes(2, axis, |passes, cotangent| passes.errors::<f32>(cotangent, 10)).expect("errors");
        for (wide, narrow) in wide.iter().zip(&narrow) {
            assert_relative_eq!(wide, narrow, max_relative = 1e-4);
        }
    }
}

/// By way of pairs of ranks where they are few, and of every element where they are not, in groups of units as well.
#[test]
fn squares_of_low_rank_are_those_of_every_element() {
    let mut rng = Pcg64::seed_from_u64(4);
    let mut draw = |shape: [usize; 2]| Array2::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0));
    for (units, rank, groups) in [(12, 2, 1), (12, 4, 1), (12, 1, 3), (12, 3, 2)] {
        let operator = Linear { in_features: 5, out_features: units, fan_in_fan_out: false };
        let (a, b, x, dy) = (draw([rank * groups, 5]), draw([units, rank]), draw([3, 5]), draw([3, units]));
        let mut product = Array2::zeros((units, 5));
        for (i, mut row) in product.outer_iter_mut().enumerate() {
            let first = i / (units / groups) * rank;
            (0..rank).for_each(|k| row.scaled_add(b[[i, k]], &a.row(first + k)));
        }
        let square_of_product = LowRank::square_of_product(a.view(), b.view(), groups);
        let (low, dense) = (square_of_product.whole(groups), square(&product));
        assert_relative_eq!(low, dense, max_relative = 1e-12, epsilon = 1e-15);
        if groups > 1 {
            continue; // no linear layer has them
        }
        let (x, dy) = (square(&x), square(&dy).insert_axis(Axis(2)));
        let terms = &dy.index_axis(Axis(2), 0).t().dot(&x) * &dense;
        let input = CowArray::from(x.into_dyn());
        for (axis, norms) in [(NormAxis::Output, units), (NormAxis::Input, 5)] {
            let scales = Array1::from_iter((1..=norms).map(|scale| scale as f64));
            let (by_row, terms) = match axis {
                NormAxis::Output => (scales.view().insert_axis(Axis(1)), terms.sum_axis(Axis(1))),
                NormAxis::Input => (scales.view().insert_axis(Axis(0)), terms.sum_axis(Axis(0))),
            };
            let scaled = square_of_product.scaled(axis, &scales);
            assert_relative_eq!(scaled.whole(1), &dense * &by_row, max_relative = 1e-12, epsilon = 1e-15);
            let contracted = square_of_product.contracted(axis, &operator, &input, dy.view());
            assert_relative_eq!(contracted, terms, max_relative = 1e-12);
        }
    }
}
