//! The linear layer as a library: what its forward, backward, merge and start must be.

use approx::assert_abs_diff_eq;
use ndarray::{Array, ArrayD, Axis, Dimension, IxDyn, array};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use woracle::case::{Case, Tensor, Tensors};
use woracle::cases::{LINEAR, Spec};
use woracle::matmul::PARALLEL_FLOPS;
use woracle::operators::Linear;
use woracle::registry::{LAYERS, Precision, RoundTrip, Subject, layer};
use woracle::wora::{Adapter, Base, CANCELLATION, Config, Layer, LoraInit, Method, RequiresGrad, ZeroNorm, scaling};
use woracle::{Error, NormAxis, NormGradient, Scalar};

const OPERATOR: Linear = Linear { in_features: 7, out_features: 5, fan_in_fan_out: false };

fn random(shape: &[usize], rng: &mut Pcg64) -> ArrayD<f64> {
    ArrayD::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
}

fn scalar(value: f64) -> ArrayD<f64> {
    ArrayD::from_elem(IxDyn(&[]), value)
}

/// A layer away from every initial value.
fn trained(config: Config, seed: u64) -> Layer<Linear, f64> {
    let mut rng = Pcg64::seed_from_u64(seed);
    let base = Base { weight: random(&[5, 7], &mut rng).into(), bias: Some(random(&[5], &mut rng)) };
    let norms = if config.norm_axis == NormAxis::Output { 5 } else { 7 };
    let adapter = Adapter {
        lora_a: random(&[3, 7], &mut rng),
        lora_b: random(&[5, 3], &mut rng),
        magnitude: config.has_norm().then(|| random(&[norms], &mut rng) + 2.0),
        alpha: (config.method == Method::Wora).then(|| scalar(1.3)),
        beta: (config.method == Method::Wora).then(|| scalar(0.8)),
    };
    Layer::new(OPERATOR, config, base, adapter).expect("a layer")
}

fn configs() -> Vec<Config> {
    let mut configs = vec![];
    for method in [Method::Lora, Method::Dora, Method::Wora] {
        for norm_axis in [NormAxis::Output, NormAxis::Input] {
            for norm_eps in [0.0, 0.5] {
                configs.push(Config { norm_axis, norm_eps, ..Config::new(method, 2.0) });
            }
        }
    }
    configs
}

#[test]
fn the_merged_weight_computes_what_the_adapted_layer_does() {
    for config in configs() {
        let layer = trained(config, 1);
        let x = random(&[4, 7], &mut Pcg64::seed_from_u64(2));
        let (y, _) = layer.forward(x.view().into(), None).expect("y");
        let merged = layer.merge().expect("W'").weight.into_dimensionality::<ndarray::Ix2>().expect("a matrix");
        let x = x.into_dimensionality::<ndarray::Ix2>().expect("a matrix");
        let plain = x.dot(&merged.t()) + layer.base().bias.as_ref().expect("b");
        let plain: ArrayD<f64> = plain.into_dyn();
        assert_abs_diff_eq!(y, plain, epsilon = 1e-13);
    }
}

/// E37.
#[test]
fn unmerging_restores_the_base_weight() {
    for config in configs() {
        let layer = trained(config, 3);
        let restored = layer.unmerge(&layer.merge().expect("W'")).expect("W0");
        assert_abs_diff_eq!(restored, layer.base().weight, epsilon = 1e-13);
    }
}

#[test]
fn unmerging_needs_the_norms_that_merging_divided_by() {
    let layer = trained(Config::new(Method::Wora, 2.0), 3);
    let mut merged = layer.merge().expect("W'");
    merged.weight_norm.as_mut().expect("norms")[2] *= 1.5;
    let wrong = layer.unmerge(&merged).expect("a weight");
    assert!((wrong - &layer.base().weight).iter().any(|difference| difference.abs() > 0.1));
    merged.weight_norm = None;
    assert!(matches!(layer.unmerge(&merged), Err(Error::Missing { tensor, .. }) if tensor == "weight_norm"));
}

/// C6.
#[test]
fn what_a_merged_weight_has_lost_is_a_clear_error() {
    let mut layer = trained(Config::new(Method::Wora, 2.0), 3);
    let merged = layer.merge().expect("W'");
    set(&mut layer, "lora_wora_beta", |_| 0.0);
    let message = layer.unmerge(&merged).expect_err("beta = 0").to_string();
    assert_eq!(message, "unmerge: expected beta other than 0, found 0: W0 cannot be recovered from the merged weight");
    let mut layer = trained(Config::new(Method::Wora, 2.0), 3);
    set(&mut layer, "lora_magnitude_vector", |i| if i == 4 { 0.0 } else { 1.0 });
    let message = layer.unmerge(&merged).expect_err("m = 0").to_string();
    assert!(message.contains("m[4] other than 0"), "{message}");
}

fn set(layer: &mut Layer<Linear, f64>, tensor: &str, value: impl Fn(usize) -> f64) {
    let (_, mut values) = layer.adapter_mut().into_iter().find(|(name, _)| *name == tensor).expect("a tensor");
    values.iter_mut().enumerate().for_each(|(i, slot)| *slot = value(i));
}

#[test]
fn a_fresh_adapter_changes_nothing() {
    for config in configs().into_iter().filter(|config| config.norm_eps == 0.0) {
        for init in [LoraInit::KaimingUniform, LoraInit::Gaussian] {
            let mut rng = Pcg64::seed_from_u64(5);
            let base = Base { weight: random(&[5, 7], &mut rng).into(), bias: None };
            let layer = Layer::init(OPERATOR, config, base, 3, init, &mut rng).expect("a layer");
            assert_abs_diff_eq!(layer.merge().expect("W'").weight, layer.base().weight, epsilon = 1e-15);
            assert!(layer.adapter().lora_b.iter().all(|&b| b == 0.0));
            assert_eq!(layer.adapter().magnitude.is_some(), config.has_norm());
        }
    }
}

/// E38.
#[test]
fn a_starts_within_its_bound_and_with_its_deviation() {
    let (rank, features) = (16, 400);
    let operator = Linear { in_features: features, out_features: 2, fan_in_fan_out: false };
    let start = |init| {
        let base = Base { weight: ArrayD::<f64>::ones(IxDyn(&[2, features])).into(), bias: None };
        let rng = &mut Pcg64::seed_from_u64(6);
        let config = Config::new(Method::Wora, 1.0);
        let layer = Layer::init(operator.clone(), config, base, rank, init, rng).expect("a layer");
        let a = layer.adapter().lora_a.clone();
        let largest = a.iter().fold(0.0, |largest: f64, a| largest.max(a.abs()));
        (largest, a.std(0.0), a.mean().expect("a mean"))
    };
    let bound = 1.0 / (features as f64).sqrt();
    let (largest, deviation, mean) = start(LoraInit::KaimingUniform);
    assert!(largest <= bound && largest > 0.99 * bound, "{largest}");
    assert!((deviation - bound / 3f64.sqrt()).abs() < 0.02 * bound && mean.abs() < 0.05 * bound);
    let (_, deviation, mean) = start(LoraInit::Gaussian);
    assert!((deviation * rank as f64 - 1.0).abs() < 0.03 && (mean * rank as f64).abs() < 0.05, "{deviation} {mean}");
}

/// E8.
#[test]
fn scaling_divides_by_the_rank_or_its_root() {
    assert_eq!(scaling(16.0, 8, false).expect("s"), 2.0);
    assert_eq!(scaling(16.0, 4, true).expect("s"), 8.0);
    assert!(scaling(16.0, 0, false).expect_err("rank 0").to_string().contains("rank: expected 1 or more, found 0"));
    assert!(scaling(f64::NAN, 8, true).is_err());
}

#[test]
fn dora_is_wora_at_one_and_one() {
    let dora = trained(Config::new(Method::Dora, 2.0), 8);
    let config = Config::new(Method::Wora, 2.0);
    let adapter = Adapter { alpha: Some(scalar(1.0)), beta: Some(scalar(1.0)), ..dora.adapter().clone() };
    let wora = Layer::new(OPERATOR, config, dora.base().clone(), adapter).expect("a layer");
    let (x, dy) = (random(&[4, 7], &mut Pcg64::seed_from_u64(2)), random(&[4, 5], &mut Pcg64::seed_from_u64(3)));
    let run = |layer: &Layer<Linear, f64>| {
        let (y, cache) = layer.forward(x.view().into(), None).expect("y");
        (y, layer.backward(cache, dy.view(), RequiresGrad::ALL).expect("gradients"))
    };
    let ((dora_y, dora), (wora_y, wora)) = (run(&dora), run(&wora));
    assert_eq!(dora_y, wora_y);
    assert_eq!((dora.adapter.alpha, dora.adapter.beta), (None, None));
    assert_eq!((dora.adapter.lora_a, dora.adapter.magnitude), (wora.adapter.lora_a, wora.adapter.magnitude));
}

#[test]
fn only_the_gradients_that_are_wanted_are_computed() {
    let layer = trained(Config::new(Method::Wora, 2.0), 8);
    let (x, dy) = (random(&[4, 7], &mut Pcg64::seed_from_u64(2)), random(&[4, 5], &mut Pcg64::seed_from_u64(3)));
    let run = |requires_grad| {
        let (_, cache) = layer.forward(x.view().into(), None).expect("y");
        layer.backward(cache, dy.view(), requires_grad).expect("gradients")
    };
    let all = run(RequiresGrad::ALL);
    let few = run(RequiresGrad { x: false, weight: false, bias: false });
    assert!(few.x.is_none() && few.weight.is_none() && few.bias.is_none());
    assert_eq!(few.adapter, all.adapter);
    let usual = run(RequiresGrad::default());
    assert_eq!((usual.x, usual.weight, usual.bias), (all.x, None, None));
}

#[test]
fn inputs_of_any_leading_shape_and_any_strides_give_the_same_rows() {
    let layer = trained(Config::new(Method::Wora, 2.0), 9);
    let x = random(&[6, 7], &mut Pcg64::seed_from_u64(2));
    let (rows, _) = layer.forward(x.view().into(), None).expect("y");
    let deep = x.view().into_shape_with_order(IxDyn(&[2, 1, 3, 7])).expect("a view");
    let (y, _) = layer.forward(deep.into(), None).expect("y");
    assert_eq!(y.shape(), [2, 1, 3, 5]);
    assert_eq!(y.iter().collect::<Vec<_>>(), rows.iter().collect::<Vec<_>>());
    let turned = x.t().as_standard_layout().into_owned();
    let (y, _) = layer.forward(turned.t().into(), None).expect("y");
    assert_eq!(y, rows);
    let (y, cache) = layer.forward(x.index_axis(Axis(0), 0).into(), None).expect("y");
    assert_eq!(y.shape(), [5]);
    let gradients = layer.backward(cache, y.view(), RequiresGrad::ALL).expect("gradients");
    assert_eq!(gradients.x.expect("dx").shape(), [7]);
    let (y, cache) = layer.forward(ArrayD::zeros(IxDyn(&[0, 7])).into(), None).expect("no rows");
    assert_eq!(y.shape(), [0, 5]);
    let gradients = layer.backward(cache, y.view(), RequiresGrad::ALL).expect("gradients");
    assert!(gradients.adapter.lora_a.iter().all(|&da| da == 0.0));
}

#[test]
fn a_unit_without_direction_is_named_or_zero_but_never_nan() {
    for (norm_axis, norms) in [(NormAxis::Output, 2), (NormAxis::Input, 3)] {
        for norm_gradient in [NormGradient::Detached, NormGradient::Full] {
            for norm_eps in [0.0, 0.25] {
                let strict = Config { norm_axis, norm_gradient, norm_eps, ..Config::new(Method::Wora, 2.0) };
                let (weight, a) = match norm_axis {
                    NormAxis::Output => (array![[1.0, 2.0, -1.0], [0.0, 0.0, 0.0]], array![[1.0, 0.5, 2.0]]),
                    NormAxis::Input => (array![[1.0, 0.0, -1.0], [2.0, 0.0, 1.0]], array![[1.0, 0.0, 2.0]]),
                };
                let b = if norm_axis == NormAxis::Output { array![[1.0], [0.0]] } else { array![[1.0], [0.5]] };
                let make = |config| {
                    let adapter = Adapter {
                        lora_a: a.clone().into_dyn(),
                        lora_b: b.clone().into_dyn(),
                        magnitude: Some(ArrayD::ones(IxDyn(&[norms]))),
                        alpha: Some(scalar(1.0)),
                        beta: Some(scalar(1.0)),
                    };
                    let operator = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
                    let base = Base { weight: weight.clone().into_dyn().into(), bias: None };
                    Layer::new(operator, config, base, adapter).expect("a layer")
                };
                let x = array![[1.0, 2.0, 3.0]].into_dyn();
                let refused = make(strict).forward(x.view().into(), None).expect_err("no direction");
                assert!(matches!(refused, Error::ZeroNorm { unit: 1 }), "{refused}");
                assert!(matches!(make(strict).merge(), Err(Error::ZeroNorm { unit: 1 })));
                let lenient = make(Config { zero_norm: ZeroNorm::Zero, ..strict });
                let (y, cache) = lenient.forward(x.view().into(), None).expect("a zero row");
                let dy = ArrayD::ones(y.raw_dim());
                let gradients = lenient.backward(cache, dy.view(), RequiresGrad::ALL).expect("gradients");
                let merged = lenient.merge().expect("a zero row").weight;
                let of_unit = |matrix: &ArrayD<f64>| {
                    let axis = if norm_axis == NormAxis::Output { 0 } else { 1 };
                    matrix.index_axis(Axis(axis), 1).to_owned()
                };
                assert!(of_unit(&merged).iter().all(|&w| w == 0.0));
                assert_eq!(gradients.adapter.magnitude.as_ref().expect("dm")[1], 0.0);
                assert!(of_unit(gradients.weight.as_ref().expect("dW0")).iter().all(|&d| d == 0.0));
                let of_pair = if norm_axis == NormAxis::Output {
                    gradients.adapter.lora_b.index_axis(Axis(0), 1).to_owned()
                } else {
                    gradients.adapter.lora_a.index_axis(Axis(1), 1).to_owned()
                };
                assert!(of_pair.iter().all(|&d| d == 0.0));
                for values in [&y, gradients.x.as_ref().expect("dx"), &gradients.adapter.lora_a] {
                    assert!(values.iter().all(|value| value.is_finite()));
                }
            }
        }
    }
}

#[test]
fn norms_of_tiny_and_huge_weights_neither_vanish_nor_overflow() {
    for size in [1e-30_f32, 1e25] {
        let operator = Linear { in_features: 2, out_features: 1, fan_in_fan_out: false };
        let base = Base { weight: (array![[3.0, 4.0]] * size).into_dyn().into(), bias: None };
        let rng = &mut Pcg64::seed_from_u64(1);
        let layer =
            Layer::init(operator, Config::new(Method::Wora, 1.0), base, 1, LoraInit::default(), rng).expect("a layer");
        let norm = layer.direction().expect("norms").expect("a method with a norm").norm[0];
        assert!((norm / (5.0 * size) - 1.0).abs() < 1e-6, "{norm}");
    }
}

/// C11.
#[test]
fn scaling_every_weight_by_a_power_of_two_changes_no_other_gradient_or_is_refused() {
    fn gradients<T: Scalar>(power: i32) -> Result<Adapter<f64>, Error> {
        let layer = trained(Config { norm_gradient: NormGradient::Full, ..Config::new(Method::Wora, 2.0) }, 4);
        let size = 2f64.powi(power);
        let cast = |values: &ArrayD<f64>, size: f64| values.mapv(|value| T::from_f64(value * size));
        let base = Base { weight: cast(&layer.base().weight.to_owned(), size).into(), bias: None };
        let from = layer.adapter();
        let adapter = Adapter {
            lora_a: cast(&from.lora_a, 1.0),
            lora_b: cast(&from.lora_b, size),
            magnitude: from.magnitude.as_ref().map(|m| cast(m, 1.0)),
            alpha: from.alpha.as_ref().map(|alpha| cast(alpha, 1.0)),
            beta: from.beta.as_ref().map(|beta| cast(beta, 1.0)),
        };
        let layer = Layer::new(OPERATOR, *layer.config(), base, adapter)?;
        let x = random(&[4, 7], &mut Pcg64::seed_from_u64(2)).mapv(T::from_f64);
        let (y, cache) = layer.forward(x.into(), None)?;
        let found = layer.backward(cache, y.view(), RequiresGrad::default())?.adapter;
        let wide = |values: ArrayD<T>| values.mapv(T::as_f64);
        Ok(Adapter {
            lora_a: wide(found.lora_a),
            lora_b: wide(found.lora_b) * size,
            magnitude: found.magnitude.map(wide),
            alpha: found.alpha.map(wide),
            beta: found.beta.map(wide),
        })
    }
    fn near<T: Scalar>(powers: impl Iterator<Item = i32>) -> (usize, usize) {
        let expected = gradients::<T>(0).expect("gradients");
        let (mut right, mut refused) = (0, 0);
        for power in powers {
            match gradients::<T>(power) {
                Err(Error::Range { .. } | Error::NotFinite { .. }) => refused += 1,
                Err(other) => panic!("2^{power}: {other}"),
                Ok(found) => {
                    for ((name, a), (_, b)) in found.named(["A", "B"]).into_iter().zip(expected.named(["A", "B"])) {
                        let error = a.iter().zip(&b).fold(0.0, |error: f64, (a, b)| error.max((a - b).abs()));
                        let equal = a.iter().all(|value| value.is_finite()) && error <= 1e3 * T::UNIT_ROUNDOFF;
                        assert!(equal, "2^{power} {name}: {a} is not {b}");
                    }
                    right += 1;
                }
            }
        }
        (right, refused)
    }
    let (right, refused) = near::<f32>((-75..=75).step_by(1));
    assert!(right > 100 && refused > 10, "{right} right, {refused} refused");
    let (right, refused) = near::<f64>((-560..=560).step_by(7));
    assert!(right > 100 && refused > 10, "{right} right, {refused} refused");
}

#[test]
fn a_tensor_that_is_not_finite_is_named_at_construction() {
    let good = trained(Config::new(Method::Wora, 2.0), 1);
    let mut adapter = good.adapter().clone();
    adapter.lora_b[[1, 2]] = f64::NAN;
    let message = Layer::new(OPERATOR, *good.config(), good.base().clone(), adapter).expect_err("NaN").to_string();
    assert_eq!(message, "lora_B[1, 2]: expected a finite number, found NaN");
}

#[test]
fn tensors_of_any_strides_make_the_same_layer() {
    let good = trained(Config::new(Method::Wora, 2.0), 1);
    let reversed = |values: &ArrayD<f64>| {
        let mut twice = values.clone();
        twice.invert_axis(Axis(0));
        let mut twice = twice.as_standard_layout().into_owned();
        twice.invert_axis(Axis(0));
        twice
    };
    let from = good.adapter();
    let adapter = Adapter {
        lora_a: reversed(&from.lora_a),
        lora_b: reversed(&from.lora_b),
        magnitude: from.magnitude.as_ref().map(reversed),
        ..from.clone()
    };
    let base =
        Base { weight: reversed(&good.base().weight.to_owned()).into(), bias: good.base().bias.as_ref().map(reversed) };
    let strided = Layer::new(OPERATOR, *good.config(), base, adapter).expect("a layer");
    let x = random(&[4, 7], &mut Pcg64::seed_from_u64(2));
    let run = |layer: &Layer<Linear, f64>| layer.forward(x.view().into(), None).expect("y").0;
    assert_eq!(run(&strided), run(&good));
    assert_eq!(strided.merge().expect("W'"), good.merge().expect("W'"));
}

#[test]
fn what_the_base_weight_is_kept_with_is_taken_from_the_weight_given() {
    let first = trained(Config::new(Method::Wora, 2.0), 1);
    let base = Base { weight: (&first.base().weight * 3.0).into(), ..first.base().clone() };
    let second = Layer::new(OPERATOR, *first.config(), base, first.adapter().clone()).expect("a layer");
    let merged = second.merge().expect("W'");
    let direction = second.direction().expect("norms").expect("a method with a norm");
    assert_abs_diff_eq!(direction.weight_norm, merged.weight_norm.expect("norms"), epsilon = 1e-13);
}

/// C11: each square is a number, as the norm is, and their sum is none.
#[test]
fn squares_whose_sum_overflows_are_refused() {
    let operator = Linear { in_features: 2, out_features: 1, fan_in_fan_out: false };
    let size = 1.5e19_f32;
    let base = Base { weight: (array![[1.0, 0.0]] * size).into_dyn().into(), bias: None };
    let config = Config { norm_gradient: NormGradient::Full, ..Config::new(Method::Wora, 1.0) };
    let adapter = Adapter {
        lora_a: array![[-0.75, 0.66]].into_dyn(),
        lora_b: array![[size]].into_dyn(),
        magnitude: Some(array![1.0].into_dyn()),
        alpha: Some(ndarray::arr0(1.0).into_dyn()),
        beta: Some(ndarray::arr0(1.0).into_dyn()),
    };
    let layer = Layer::new(operator, config, base, adapter).expect("a layer");
    let (y, cache) = layer.forward(array![[1.0, 1.0]].into_dyn().into(), None).expect("y");
    let refused = layer.backward(cache, y.view(), RequiresGrad::ALL).expect_err("no such square");
    assert!(matches!(refused, Error::Range { unit: 0, .. }), "{refused}");
}

/// E10: of the definition too.
#[test]
fn the_definition_finds_the_norm_of_a_huge_weight() {
    let small = |case: &Case, subject: &dyn Subject| subject.terms(case).is_ok_and(|terms| terms < 10_000);
    let cases = every_case(3).filter(|(subject, spec, case)| spec.config.has_norm() && small(case, *subject));
    let cases: Vec<_> = cases.collect();
    assert!(cases.len() > 60, "{}", cases.len());
    for (subject, spec, case) in cases {
        for size in [2f64.powi(700), 2f64.powi(-700)] {
            let mut scaled = case.clone();
            let [_, name_b] = subject.lora_names();
            for name in ["base.weight", name_b] {
                let values = case.values(name).expect("a tensor").mapv(|value| value * size);
                scaled.tensors.insert(name.into(), Tensor::Float(values.into()));
            }
            scaled.tensors.remove("grad.y");
            scaled.settings.insert("norm_eps".into(), 0.0.into());
            let mut plain = case.clone();
            plain.settings.insert("norm_eps".into(), 0.0.into());
            let norms = |case| subject.define(case).expect("results").remove("weight_norm").expect("norms");
            assert_eq!(norms(&scaled), norms(&plain) * size, "{}", spec.name);
        }
    }
}

/// C1, C7, C8.
#[test]
fn shapes_and_methods_that_do_not_fit_are_refused_by_name() {
    let good = trained(Config::new(Method::Wora, 2.0), 1);
    let refused = |config: Config, change: &dyn Fn(&mut Base<f64>, &mut Adapter<f64>)| {
        let (mut base, mut adapter) = (good.base().clone(), good.adapter().clone());
        change(&mut base, &mut adapter);
        Layer::new(OPERATOR, config, base, adapter).expect_err("refused").to_string()
    };
    let wora = *good.config();
    let expect = |message: String, start: &str| assert!(message.starts_with(start), "{message}");
    let zeros = |shape: &[usize]| ArrayD::zeros(shape);
    expect(
        refused(wora, &|base, _| base.weight = zeros(&[7, 5]).into()),
        "base.weight: expected shape [5, 7], found [7, 5]",
    );
    expect(refused(wora, &|base, _| base.bias = Some(zeros(&[7]))), "base.bias: expected shape [5], found [7]");
    expect(refused(wora, &|_, a| a.lora_a = zeros(&[0, 7])), "lora_A: expected shape [rank, 7], rank 1 or more");
    expect(refused(wora, &|_, a| a.lora_a = zeros(&[])), "lora_A: expected shape [rank, 7], rank 1 or more");
    expect(refused(wora, &|_, a| a.lora_b = zeros(&[3, 5])), "lora_B: expected shape [5, 3], found [3, 5]");
    expect(refused(wora, &|_, a| a.magnitude = Some(zeros(&[5, 1]))), "lora_magnitude_vector: expected shape [5]");
    expect(refused(wora, &|_, a| a.magnitude = Some(zeros(&[1, 5]))), "lora_magnitude_vector: expected shape [5]");
    expect(refused(wora, &|_, a| a.magnitude = None), "lora_magnitude_vector: expected a tensor");
    expect(refused(wora, &|_, a| a.beta = None), "lora_wora_beta: expected a tensor");
    expect(refused(wora, &|_, a| a.alpha = Some(zeros(&[1]))), "lora_wora_alpha: expected shape []");
    let lora = Config { method: Method::Lora, ..wora };
    expect(refused(lora, &|_, _| {}), "lora_magnitude_vector: expected none");
    expect(refused(Config { scaling: f64::NAN, ..wora }, &|_, _| {}), "setting scaling: expected a finite number");
    expect(refused(Config { norm_eps: -1.0, ..wora }, &|_, _| {}), "setting norm_eps: expected a finite number, 0 or");
    let x = |shape: &[usize]| ArrayD::<f64>::zeros(shape);
    let forward = |x: ArrayD<f64>, mask: Option<ArrayD<f64>>| {
        good.forward(x.into(), mask.as_ref().map(|mask| mask.view())).expect_err("refused").to_string()
    };
    expect(forward(x(&[4, 5]), None), "x: expected shape [..., 7], found [4, 5]");
    expect(forward(x(&[]), None), "x: expected shape [..., 7], found []");
    expect(forward(x(&[4, 7]), Some(x(&[7]))), "dropout_mask: expected shape [4, 7], found [7]");
    let (_, cache) = good.forward(x(&[4, 7]).into(), None).expect("y");
    let message = good.backward(cache, x(&[5, 4]).view(), RequiresGrad::ALL).expect_err("refused").to_string();
    expect(message, "grad.y: expected shape [4, 5], found [5, 4]");
    let message = good.forward_at_norm(x(&[4, 7]).into(), None, Array::zeros(7).view()).expect_err("refused");
    expect(message.to_string(), "weight_norm: expected shape [5], found [7]");
}

#[test]
fn a_magnitude_per_input_may_be_a_row() {
    let config = Config { norm_axis: NormAxis::Input, ..Config::new(Method::Wora, 2.0) };
    let flat = trained(config, 4);
    let magnitude = flat.adapter().magnitude.clone().map(|m| m.into_shape_with_order(IxDyn(&[1, 7])).expect("a row"));
    let adapter = Adapter { magnitude, ..flat.adapter().clone() };
    let row = Layer::new(OPERATOR, config, flat.base().clone(), adapter).expect("a layer");
    let (y, cache) = row.forward(random(&[4, 7], &mut Pcg64::seed_from_u64(2)).into(), None).expect("y");
    let gradients = row.backward(cache, y.view(), RequiresGrad::default()).expect("gradients");
    assert_eq!(gradients.adapter.magnitude.expect("dm").shape(), [1, 7]);
}

fn draw(spec: &Spec, seed: u64) -> Case {
    layer("linear").expect("linear").draw(spec, seed)
}

/// Every case of every layer.
fn every_case(seed: u64) -> impl Iterator<Item = (&'static dyn Subject, &'static Spec, Case)> {
    let specs = LAYERS.iter().flat_map(|&layer| layer.specs().iter().map(move |spec| (layer, spec)));
    specs.map(move |(layer, spec)| (layer, spec, layer.draw(spec, seed)))
}

#[test]
fn every_case_merges_to_what_it_computes_and_unmerges_to_what_it_was() {
    for (layer, spec, case) in every_case(21) {
        let RoundTrip { adapted, merged, restored } = layer.merge(&case).expect("a merged layer");
        let close = |left: &ArrayD<f64>, right: &ArrayD<f64>, what: &str| {
            assert_eq!(left.shape(), right.shape());
            let scale = right.iter().fold(1.0, |scale: f64, value| scale.max(value.abs()));
            let error = left.iter().zip(right).fold(0.0, |error: f64, (a, b)| error.max((a - b).abs()));
            assert!(error <= 1e-12 * scale, "{}: {what} is off by {error}", spec.name);
        };
        close(&merged, &adapted, "the merged layer");
        match restored {
            Ok(weight) => close(&weight, &case.values("base.weight").expect("W0").to_owned(), "the restored weight"),
            Err(Error::Unmerge { expected, .. }) => {
                assert!(spec.alpha_beta.1 == 0.0, "{}: {expected}", spec.name);
            }
            Err(other) => panic!("{}: {other}", spec.name),
        }
    }
}

fn dot(case: &Case, results: &Tensors, tensor: &str) -> f64 {
    let values = case.values(tensor).expect("a tensor");
    values.iter().zip(&results[&format!("grad.{tensor}")]).map(|(value, gradient)| value * gradient).sum()
}

/// E49 to E54; and E6, E7: they hold between all gradients only if channels are mixed and their adjoints taken right.
#[test]
fn the_gradients_obey_the_identities_that_need_no_step() {
    for (layer, spec, case) in every_case(11) {
        // What padding_idx and scale_grad_by_freq return is no gradient of the loss.
        let of_the_loss = !spec.operator.contains("padding_idx") && !spec.operator.contains("scale_grad");
        if spec.config.method != Method::Wora || spec.config.norm_eps != 0.0 || !of_the_loss {
            continue;
        }
        let results = layer.evaluate(&case, Precision::F64).expect("results");
        let [name_a, name_b] = match layer.name() {
            "embedding" => ["lora_embedding_A", "lora_embedding_B"],
            _ => ["lora_A", "lora_B"],
        };
        let (alpha, beta) = (dot(&case, &results, "lora_wora_alpha"), dot(&case, &results, "lora_wora_beta"));
        let (a, b) = (dot(&case, &results, name_a), dot(&case, &results, name_b));
        let m = dot(&case, &results, "lora_magnitude_vector");
        let near = |left: f64, right: f64, what: &str| {
            let scale = 1.0 + alpha.abs() + beta.abs() + m.abs();
            assert!((left - right).abs() <= 1e-10 * scale, "{}: {what}: {left} against {right}", spec.name);
        };
        near(a, alpha, "<dA, A> = alpha dalpha");
        near(b, alpha, "<dB, B> = alpha dalpha");
        let euler = if spec.config.norm_gradient == NormGradient::Full { 0.0 } else { m };
        near(alpha + beta, euler, "alpha dalpha + beta dbeta");
    }
}

#[test]
#[cfg(not(feature = "openblas"))]
fn the_number_of_threads_changes_no_bit() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    for (layer, spec, case) in every_case(12).filter(|(_, spec, _)| spec.name.contains("large")) {
        for precision in [Precision::F32, Precision::F64] {
            let run = |threads| {
                let results = pool(threads).install(|| layer.evaluate(&case, precision));
                let bits = |values: &ArrayD<f64>| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                results.expect("results").iter().map(|(name, values)| (name.clone(), bits(values))).collect::<Vec<_>>()
            };
            let one = run(1);
            for threads in [2, 3, 5] {
                assert!(one == run(threads), "{} differs with {threads} threads", spec.name);
            }
        }
    }
}

/// The largest difference between production and definition, over the largest value.
fn distance(results: &Tensors, defined: &Tensors) -> f64 {
    assert_eq!(results.keys().collect::<Vec<_>>(), defined.keys().collect::<Vec<_>>());
    let of_tensor = |(name, values): (&String, &ArrayD<f64>)| {
        let scale = defined[name].iter().fold(1.0, |scale: f64, value| scale.max(value.abs()));
        values.iter().zip(&defined[name]).fold(0.0, |largest: f64, (a, b)| {
            let difference = (a - b).abs() / scale;
            if difference.is_nan() { f64::INFINITY } else { largest.max(difference) }
        })
    };
    results.iter().map(of_tensor).fold(0.0, f64::max)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn the_factored_path_is_the_definition_for_any_shape_and_setting(
        (rows, features, units, rank) in (0usize..6, 1usize..9, 1usize..9, 1usize..7),
        (method, axis, gradient, dropout, stored) in (0usize..3, 0usize..2, 0usize..2, prop::bool::ANY, prop::bool::ANY),
        (alpha, beta) in (-2.0..2.0, -2.0..2.0),
        seed in any::<u64>(),
    ) {
        let config = Config {
            norm_axis: [NormAxis::Output, NormAxis::Input][axis],
            norm_gradient: [NormGradient::Detached, NormGradient::Full][gradient],
            ..Config::new([Method::Lora, Method::Dora, Method::Wora][method], 1.5)
        };
        let leak = |shape: Vec<usize>| -> &'static [usize] { Vec::leak(shape) };
        let spec = Spec {
            x: leak(vec![rows, features]),
            weight: leak(if stored { vec![features, units] } else { vec![units, features] }),
            operator: if stored { r#"{"fan_in_fan_out":true}"# } else { "{}" },
            rank,
            dropout: dropout.then_some(0.5),
            config,
            alpha_beta: (alpha, beta),
            ..Spec::plain("linear-random")
        };
        let (case, linear) = (draw(&spec, seed), layer("linear").expect("linear"));
        let (results, defined) = (linear.evaluate(&case, Precision::F64).unwrap(), linear.define(&case).unwrap());
        // A norm near 0 magnifies what went into it.
        let smallest = defined.get("weight_norm").map_or(1.0, |n| n.iter().copied().fold(1.0, f64::min));
        prop_assert!(distance(&results, &defined) <= 1e-12 / smallest.powi(2));
    }
}

#[test]
fn methods_and_scalars_say_what_they_are() {
    let names = [Method::Lora, Method::Dora, Method::Wora].map(|method| method.to_string());
    assert_eq!(names, ["LoRA", "DoRA", "WoRA"]);
    assert_eq!((f32::NAME, f64::NAME), ("f32", "f64"));
    assert_eq!(1.0 + f64::UNIT_ROUNDOFF, 1.0);
    assert_eq!(1.0f32 + f32::from_f64(f32::UNIT_ROUNDOFF), 1.0);
    assert!(f64::from(1.0f32 + f32::EPSILON).as_f64() > 1.0);
}

#[test]
fn a_case_is_drawn_the_same_for_the_same_seed_and_differs_for_another() {
    let spec = &LINEAR[0];
    assert_eq!(draw(spec, 1), draw(spec, 1));
    assert_ne!(draw(spec, 1).tensors, draw(spec, 2).tensors);
    assert_ne!(draw(spec, 1).tensors["lora_A"], draw(&Spec { name: "linear-other", ..*spec }, 1).tensors["lora_A"]);
    let shape = draw(spec, 1).values("x").expect("x").raw_dim();
    assert_eq!(shape.slice(), spec.x);
}

/// A norm may lose as many digits as V itself does, whose elements are small differences: not as many again.
#[test]
fn norms_in_f32_lose_to_cancellation_what_their_rows_lose() {
    let operator = Linear { in_features: 64, out_features: 8, fan_in_fan_out: false };
    let config = Config { scaling: 1.0, ..Config::new(Method::Wora, 1.0) };
    for power in 0..20 {
        let mut rng = Pcg64::seed_from_u64(power);
        let left = 2f64.powi(-(power as i32));
        let narrow = |values: ArrayD<f64>| values.mapv(|value| value as f32);
        let [a, b] = [[4, 64], [8, 4]].map(|shape| narrow(random(&shape, &mut rng)));
        let (alpha, beta) = (0.75_f32, 1.25_f32);
        let matrix = |values: &ArrayD<f32>| values.mapv(f64::from).into_dimensionality::<ndarray::Ix2>().unwrap();
        let delta = matrix(&b).dot(&matrix(&a));
        // beta W0 = -alpha B A but for so small a part.
        let noise = random(&[8, 64], &mut rng).into_dimensionality::<ndarray::Ix2>().unwrap() * left;
        let base = narrow(((&delta * -f64::from(alpha) + noise) / f64::from(beta)).into_dyn());
        let weighted = &delta * f64::from(alpha) + matrix(&base) * f64::from(beta);
        let sizes = matrix(&b).mapv(f64::abs).dot(&matrix(&a).mapv(f64::abs)) * f64::from(alpha)
            + matrix(&base).mapv(f64::abs) * f64::from(beta);
        let scalar = |value: f32| Some(ArrayD::from_elem(IxDyn(&[]), value));
        let magnitude = Some(ArrayD::ones(IxDyn(&[8])));
        let adapter = Adapter { lora_a: a, lora_b: b, magnitude, alpha: scalar(alpha), beta: scalar(beta) };
        let layer =
            Layer::new(operator.clone(), config, Base { weight: base.into(), bias: None }, adapter).expect("a layer");
        let norm = layer.direction().expect("norms").expect("a method with norms").norm;
        for ((norm, weighted), sizes) in norm.iter().zip(weighted.rows()).zip(sizes.rows()) {
            let (exact, size) = (weighted.dot(&weighted).sqrt(), sizes.dot(&sizes).sqrt());
            let error = (f64::from(*norm) - exact).abs();
            let allowed = 4.0 * f64::from(f32::EPSILON) * size;
            assert!(error <= allowed, "2^-{power}: {norm} is not {exact}, off by {error}, and {allowed} allowed");
        }
    }
}

#[test]
fn the_cancelling_cases_cancel_in_every_row_and_the_large_ones_enough_for_threads() {
    for (layer, spec, case) in every_case(0).filter(|(_, spec, _)| spec.name.contains("cancelling")) {
        if spec.config.norm_axis == NormAxis::Input {
            continue;
        }
        let matrix = |name: &str| {
            let values = case.values(name).expect("a tensor");
            let rows = values.shape()[0];
            values.to_shape((rows, values.len() / rows)).expect("a matrix").into_owned()
        };
        let (weight, a, b) = match layer.name() {
            "embedding" => {
                (matrix("base.weight").reversed_axes(), matrix("lora_embedding_A"), matrix("lora_embedding_B"))
            }
            _ => (matrix("base.weight"), matrix("lora_A"), matrix("lora_B")),
        };
        let (alpha, beta) = spec.alpha_beta;
        let (base, delta) = (weight * beta, b.dot(&a) * (alpha * spec.config.scaling));
        for (base, delta) in base.rows().into_iter().zip(delta.rows()) {
            let terms = [base.dot(&base), 2.0 * base.dot(&delta), delta.dot(&delta)];
            let fraction = terms.iter().sum::<f64>() / terms.iter().map(|term| term.abs()).sum::<f64>();
            assert!(fraction < 0.8 * CANCELLATION, "{}: {fraction}", spec.name);
        }
        let cost = 2 * base.len() * (spec.rank + 1);
        assert_eq!(cost >= PARALLEL_FLOPS, spec.name.contains("large"), "{}: {cost}", spec.name);
    }
}
