//! Errors in blocks, and in f32, against those of the whole in f64.

use super::low_rank::Mixed;
use super::operands::Scaled;
use super::*;
use crate::operators::{Conv1d, ConvSettings, Linear};
use crate::wora::Direction;
use crate::wora::{Base, Config, Method, NormGradient, RequiresGrad, Workspace, as_matrix};
use approx::assert_relative_eq;
use ndarray::{Array3, ArrayD, IxDyn};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

const STORAGE: Storage = Storage { smallest_normal: f32::MIN_POSITIVE as f64, chain: 512, total_chain: 512 };

/// How small the first row of each is, and what is left of its parts in the first row of V.
#[derive(Clone, Copy)]
struct Small {
    lora_a: f64,
    lora_b: f64,
    magnitude: f64,
    weighted: f64,
}

const AS_OTHERS: Small = Small { lora_a: 1.0, lora_b: 1.0, magnitude: 1.0, weighted: 1.0 };

/// Every error, by `errors`, of a layer of 7 units whose first rows are `small` times what others are; masked unless V is
/// to cancel.
fn with_passes(
    seed: u64,
    (axis, small): (NormAxis, Small),
    errors: impl FnOnce(&Passes<'_, '_, Linear>) -> Option<Evaluation<f64>>,
) -> Option<Vec<ArrayD<f64>>> {
    let mut rng = Pcg64::seed_from_u64(seed);
    let mut draw = |shape: &[usize]| ArrayD::from_shape_simple_fn(IxDyn(shape), || rng.random_range(-1.0..1.0));
    let operator = Linear { in_features: 5, out_features: 7, fan_in_fan_out: false };
    let config = Config { norm_axis: axis, norm_gradient: NormGradient::Full, ..Config::new(Method::Wora, 1.5) };
    let mut base = Base { weight: draw(&[7, 5]).into(), bias: Some(draw(&[7])) };
    let norms = if axis == NormAxis::Output { 7 } else { 5 };
    let mut draw_rows = |shape: &[usize], small: f64| {
        let mut rows = draw(shape);
        rows.index_axis_mut(Axis(0), 0).mapv_inplace(|value| value * small);
        rows
    };
    let adapter = Adapter {
        lora_a: draw_rows(&[2, 5], small.lora_a),
        lora_b: draw_rows(&[7, 2], small.lora_b),
        magnitude: Some(draw_rows(&[norms], small.magnitude)),
        alpha: Some(draw(&[])),
        beta: Some(draw(&[])),
    };
    if small.weighted < 1.0 {
        let delta = as_matrix(&adapter.lora_b).dot(&as_matrix(&adapter.lora_a));
        let per_beta =
            config.scaling * adapter.alpha.as_ref().expect("alpha").sum() / adapter.beta.as_ref().expect("beta").sum();
        let along = Axis(if axis == NormAxis::Output { 0 } else { 1 });
        let mut weight = base.weight.to_owned();
        let mut row = weight.index_axis_mut(along, 0);
        let opposite = delta.index_axis(along, 0).mapv(|d| -per_beta * d);
        row.zip_mut_with(&opposite, |w, opposite| *w = *w * small.weighted + opposite);
        base.weight = weight.into();
    }
    let layer = Layer::new(operator, config, base, adapter).expect("a layer");
    let (x, mask, dy) = (draw(&[3, 5]), draw(&[3, 5]).mapv(|kept| if kept > 0.0 { 2.0 } else { 0.0 }), draw(&[3, 7]));
    // What dropout takes of the correction is missing where P and Z are to cancel.
    let mask = (small.weighted == 1.0).then_some(mask);
    let (y, cache) = layer.forward(x.into(), mask.as_ref().map(|mask| mask.view())).expect("y");
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
    let Evaluation { y, weighted, weight_norm, gain, merged_weight, gradients } = errors(&passes)?;
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
    let whole = with_passes(1, (NormAxis::Output, AS_OTHERS), |passes| passes.errors::<f64>(35)).expect("errors");
    assert_eq!(whole.len(), 13);
    for block in [5, 10, 15] {
        let blocks =
            with_passes(1, (NormAxis::Output, AS_OTHERS), |passes| passes.errors::<f64>(block)).expect("errors");
        for (whole, blocks) in whole.iter().zip(&blocks) {
            assert_relative_eq!(whole, blocks, max_relative = 1e-13);
        }
    }
}

#[test]
fn errors_in_f32_are_those_in_f64() {
    for axis in [NormAxis::Output, NormAxis::Input] {
        let wide = with_passes(2, (axis, AS_OTHERS), |passes| passes.errors::<f64>(BLOCK)).expect("errors");
        let narrow = with_passes(2, (axis, AS_OTHERS), |passes| passes.errors::<f32>(10)).expect("errors");
        for (wide, narrow) in wide.iter().zip(&narrow) {
            assert_relative_eq!(wide, narrow, max_relative = 1e-4);
        }
    }
}

#[test]
fn f32_is_not_used_where_it_has_not_the_range() {
    type OfRows = fn(f64) -> Small;
    let of_rows: [(OfRows, f64); 5] = [
        (|lora_a| Small { lora_a, ..AS_OTHERS }, 1e-22),
        (|lora_b| Small { lora_b, ..AS_OTHERS }, 1e-22),
        (|magnitude| Small { magnitude, ..AS_OTHERS }, 1e-22),
        (|weighted| Small { weighted: 1e3 * weighted, ..AS_OTHERS }, 1e-8),
        // Neither alone is too small.
        (|both| Small { lora_a: both, magnitude: both, ..AS_OTHERS }, 1e-11),
    ];
    for (axis, (small, unfit)) in
        [NormAxis::Output, NormAxis::Input].into_iter().flat_map(|axis| of_rows.map(|of| (axis, of)))
    {
        let narrow = |small| with_passes(2, (axis, small), |passes| passes.errors::<f32>(10));
        let fit = small(1e-5);
        let wide = with_passes(2, (axis, fit), |passes| passes.errors::<f64>(BLOCK)).expect("errors");
        for (wide, narrow) in wide.iter().zip(&narrow(fit).expect("errors")) {
            assert_relative_eq!(wide, narrow, max_relative = 1e-4);
        }
        for unfit in [unfit, 1e-50, 1e-100] {
            assert!(narrow(small(unfit)).is_none());
        }
    }
}

/// The sums of `D^2`, `B^2 A^2` and 1 of a layer against those of every element.
fn squares_of_low_rank<O: Operator>(operator: O, x: &[usize], rank: usize, axis: NormAxis) {
    let mut rng = Pcg64::seed_from_u64(4);
    let mut draw = |shape: &[usize]| ArrayD::from_shape_simple_fn(IxDyn(shape), || rng.random_range(-1.0..1.0));
    let (units, fan_in, groups) = (operator.units(), operator.fan_in(), operator.groups());
    let norms = if axis == NormAxis::Output { units } else { fan_in };
    let [a, b] = operator.lora_shapes(rank);
    let config = Config { norm_axis: axis, ..Config::new(Method::Dora, 1.5) };
    let base = Base { weight: draw(&operator.weight_shape()).into(), bias: None };
    let magnitude = crate::wora::adapter::magnitude_shape(&operator, &config);
    let adapter =
        Adapter { lora_a: draw(&a), lora_b: draw(&b), magnitude: Some(draw(&magnitude)), alpha: None, beta: None };
    let layer = Layer::new(operator, config, base, adapter).expect("a layer");
    let x = O::Input::from_values(draw(x)).expect("values");
    let (y, cache) = layer.forward(x, None).expect("y");
    let dy = draw(y.shape());
    let dy = in_shape(dy.view(), cache.base_output.dim());
    let operands = Operands::<O, f64>::new(&layer, &cache, Some(dy.view()), 0.0).expect("operands");
    let (a, b, in_group) = (layer.a(), layer.b(), units / groups);
    let sum = |of: &dyn Fn(f64) -> f64, (i, j): (usize, usize)| -> f64 {
        (0..b.ncols()).map(|k| of(b[[i, k]] * a[[i / in_group * b.ncols() + k, j]])).sum()
    };
    let delta = Array2::from_shape_fn((units, fan_in), |at| sum(&|term| term, at).powi(2));
    let terms = Array2::from_shape_fn((units, fan_in), |at| sum(&|term| term * term, at));

    let low_rank = LowRank::new(a, b, groups);
    let channels = low_rank.channels(axis, &operands).expect("channels");
    let contracted = low_rank.contracted(axis, &channels, &operands);
    let along = Axis(if axis == NormAxis::Output { 1 } else { 0 });
    let expected = (&delta * &operands.terms_of_dmerged()).sum_axis(along);
    assert_relative_eq!(contracted, expected, max_relative = 1e-12);

    let mut of_norms = || draw(&[norms]).mapv(f64::abs).into_dimensionality().expect("one axis");
    let weights = Weights { delta: of_norms(), terms: of_norms(), ones: of_norms() };
    let [of_delta, of_terms, of_ones] =
        [&weights.delta, &weights.terms, &weights.ones].map(|weights| weights.view().insert_axis(along));
    let whole = &delta * &of_delta + &terms * &of_terms + of_ones;
    let whole = Scaled { values: whole, scale: 1.0 };
    if axis == NormAxis::Input {
        let (t, a) = (square(&cache.lora_output), Array2::zeros(a.dim()));

        let squared = (&layer.operator.power(2), &cache.x);
        let sums = low_rank.inputs(&channels, &weights, squared, &operands, (t.view(), a.view()));
        let mut all = Sums { outputs: None, inputs: None, base_gradient: None };
        operands.add(NormAxis::Input, &Units::all(units), &whole, &mut all);
        let Scaled { values, scale } = all.inputs.expect("sums");
        assert_relative_eq!(sums.expect("values"), values * scale, max_relative = 1e-12);
        return;
    }
    let u = &cache.lora_output;
    let (Mixed { sums, scales }, apart) =
        low_rank.outputs(channels, &weights, (square(u).view(), 0.7), &operands.workspace);
    let mut sums = sums * scales.insert_axis(Axis(1));
    if let Some(Scaled { values, scale }) = apart {
        sums += &(values * scale * of_delta);
    }
    let Scaled { values, scale } = operands.outputs(&whole);
    let mut expected = Array3::zeros(values.dim());
    let mixed = square(&b) * of_terms * 0.7;
    mix_into(expected.view_mut(), mixed.view(), square(u).view(), groups);
    expected += &(values * scale);
    assert_relative_eq!(sums, expected, max_relative = 1e-12);
}

/// By way of pairs of ranks where they are few, and of every element where they are not, in groups of units as well.
#[test]
fn squares_of_low_rank_are_those_of_every_element() {
    for (rank, axis) in [(2, NormAxis::Output), (4, NormAxis::Output), (2, NormAxis::Input), (4, NormAxis::Input)] {
        squares_of_low_rank(Linear { in_features: 5, out_features: 12, fan_in_fan_out: false }, &[3, 5], rank, axis);
    }
    for rank in [3, 6, 9] {
        let settings = ConvSettings { groups: 3, ..ConvSettings::default() };
        let conv = Conv1d::from_weight_shape(settings, &[18, 2, 2]).expect("a convolution");
        squares_of_low_rank(conv, &[2, 6, 7], rank, NormAxis::Output);
    }
}

/// What all terms of an output share is large where V cancels, and is itself what is left of parts that cancel.
#[test]
fn errors_are_no_less_than_zero_where_parts_cancel() {
    for axis in [NormAxis::Output, NormAxis::Input] {
        for weighted in [1e-3, 1e-6, 1e-9, 1e-12] {
            let small = Small { weighted, ..AS_OTHERS };
            let errors = with_passes(3, (axis, small), |passes| passes.errors::<f64>(BLOCK)).expect("errors");
            assert!(errors.iter().flatten().all(|error| *error >= 0.0));
        }
    }
}

/// What is added up of squares is not lost where f32 would lose it beside the largest of its row.
#[test]
fn what_is_small_beside_others_of_its_row_does_not_vanish() {
    let u = Array3::from_shape_vec((1, 2, 1), vec![0.0_f32, 1.0]).expect("two ranks");
    let u = Scaled { values: u, scale: 4.0 };
    let b = Array2::from_shape_vec((2, 2), vec![1.0, 1e-60, 0.0, 1e-60]).expect("two units");
    let ones = || Array1::ones(2);
    let weights = Weights { delta: ones(), terms: ones(), ones: ones() };
    let Mixed { sums, scales } = low_rank::mix((b.view(), 0, 2), &weights, &u, 1, &Workspace::default());
    let sums: Vec<_> = sums.iter().zip(&scales).map(|(sum, scale)| f64::from(*sum) * scale).collect();
    assert!(4e-60 <= sums[0] && sums[0] < 1e-29);
    assert_relative_eq!(sums[1], 4e-60, max_relative = 1e-6);
}
