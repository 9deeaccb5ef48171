//! What holds for every layer, every shape and every setting: one test a law, on cases that are drawn at random.

mod any_case;

use any_case::{Choices, any_case};
use ndarray::{ArrayD, Axis, Slice};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use woracle::Error;
use woracle::case::{Case, Tensor, Tensors};
use woracle::gradcheck::{self, Options, TensorReport, check};
use woracle::oracle::verify::{Tolerance, verify};
use woracle::oracle::{CaseFile, Dtype};
use woracle::registry::{LAYERS, Precision, Subject};

type Outcome = Result<(), TestCaseError>;

/// Holds a law against so many cases that it says something of; it returns `false` of one that it says nothing of.
fn hold(cases: u32, law: impl Fn(&'static dyn Subject, &Case) -> Result<bool, TestCaseError>) {
    hold_for(1, cases, law);
}

/// The same for cases that are so much larger.
fn hold_for(scale: usize, cases: u32, law: impl Fn(&'static dyn Subject, &Case) -> Result<bool, TestCaseError>) {
    let mut config = ProptestConfig { failure_persistence: None, ..Default::default() };
    // The same cases every time, unless others are asked for: PROPTEST_RNG_SEED=7 PROPTEST_CASES=10000.
    let (seeded, counted) = (config.rng_seed != RngSeed::Random, std::env::var_os("PROPTEST_CASES").is_some());
    config.rng_seed = if seeded { config.rng_seed } else { RngSeed::Fixed(0) };
    config.cases = if counted { config.cases } else { cases };
    config.max_global_rejects = 20 * config.cases;
    let (cases, seen) = (config.cases, AtomicUsize::new(0));
    proptest!(config, |(bytes in prop::collection::vec(any::<u8>(), 64))| {
        let Some((layer, case)) = any_case(&mut Choices::new(&bytes).larger(scale)) else {
            return Err(TestCaseError::reject("contradicts itself"));
        };
        if !law(layer, &case)? {
            return Err(TestCaseError::reject("says nothing"));
        }
        seen.fetch_add(1, Ordering::Relaxed);
    });
    assert!(seen.into_inner() >= cases as usize);
}

/// The oracle's bound is four times the root of summed squares: of a hundred thousand elements a few lie beyond it, which
/// are right. What is wrong lies beyond it by millions.
const BEYOND: f64 = 2.0;

/// Holds results against those of the oracle, every element by the bound of its type.
fn is_right(case: &Case, dtype: Dtype, results: Tensors) -> Outcome {
    let mut answered = case.clone();
    answered.extend(results);
    let verdicts = verify(&CaseFile::new(answered, dtype), Tolerance::default());
    for tensor in verdicts.map_err(|error| TestCaseError::fail(error.to_string()))? {
        prop_assert!(tensor.error_over_bound <= BEYOND, "{tensor:?} of {:?}", case.settings);
    }
    Ok(())
}

fn evaluate(layer: &dyn Subject, case: &Case) -> Tensors {
    layer.evaluate(case, Precision::F64).expect("results")
}

fn has(case: &Case, tensor: &str) -> bool {
    case.tensors.contains_key(tensor)
}

/// Whether the setting has this value.
fn is(case: &Case, setting: &str, value: impl Into<Value>) -> bool {
    case.settings.get(setting) == Some(&value.into())
}

fn put(case: &mut Case, tensor: &str, values: ArrayD<f64>) {
    case.tensors.insert(tensor.into(), Tensor::Float(values.into()));
}

fn values(case: &Case, tensor: &str) -> ArrayD<f64> {
    case.values(tensor).expect("a tensor").to_owned()
}

const ALPHA: &str = "lora_wora_alpha";
const BETA: &str = "lora_wora_beta";
const MAGNITUDE: &str = "lora_magnitude_vector";

/// What a tensor of a case is multiplied by.
fn scale(case: &mut Case, tensor: &str, factor: f64) {
    let scaled = values(case, tensor) * factor;
    put(case, tensor, scaled);
}

/// A law says nothing of cases that are never drawn: every layer's are, and only geometry refuses some.
#[test]
fn every_layer_is_drawn_and_only_convolutions_are_refused() {
    let mut rng = Pcg64::seed_from_u64(0);
    let mut drawn = BTreeMap::<&str, [usize; 2]>::new();
    for (index, layer) in LAYERS.iter().enumerate().cycle().take(500) {
        let bytes: Vec<u8> = std::iter::once(index as u8).chain((0..63).map(|_| rng.random())).collect();
        drawn.entry(layer.name()).or_default()[usize::from(any_case(&mut Choices::new(&bytes)).is_some())] += 1;
    }
    for (layer, [refused, made]) in drawn {
        assert!(made >= if layer.starts_with("conv") { 30 } else { 100 }, "{layer}: {made} made, {refused} refused");
    }
}

/// E9 to E36, E49 to E54: differences, dual numbers, the definition, f32 and the identities that need no step.
#[test]
fn every_witness_agrees() {
    hold(48, |layer, case| {
        if case.tensors["x"].shape().contains(&0) {
            return Ok(false);
        }
        let mut report = check(layer, case, Options::default());
        // Where the gradient by V happens to be orthogonal to V the two do not, as with one column and x = 0.
        report.laws.retain(|law| law.name != "detached and full gradient differ");
        let contradicted = |tensor: &&TensorReport| tensor.verdict != gradcheck::Verdict::Agree;
        let first = report.tensors.iter().find(contradicted);
        prop_assert!(report.agrees(), "{first:?}, {:?}, {:?} of {:?}", report.identities, report.laws, case.settings);
        Ok(true)
    });
}

#[test]
fn the_factored_path_is_the_definition() {
    hold(200, |layer, case| {
        is_right(case, Dtype::F64, layer.define(case).expect("results"))?;
        is_right(case, Dtype::F64, evaluate(layer, case))?;
        Ok(true)
    });
}

#[test]
fn single_precision_lies_within_its_bound() {
    hold(200, |layer, case| {
        is_right(case, Dtype::F32, layer.evaluate(case, Precision::F32).expect("results"))?;
        Ok(true)
    });
}

/// E37: and back again.
#[test]
fn a_merged_layer_computes_what_the_adapted_one_does_and_is_unmerged() {
    hold(200, |layer, case| {
        let trip = layer.merge(case).expect("a merged layer");
        let mut unmasked = case.clone();
        unmasked.tensors.remove("dropout_mask");
        is_right(&unmasked, Dtype::F64, Tensors::from([("y".into(), trip.adapted)]))?;
        is_right(&unmasked, Dtype::F64, Tensors::from([("y".into(), trip.merged)]))?;
        let base = values(case, "base.weight");
        let beta = if has(case, BETA) { values(case, BETA).sum() } else { 1.0 };
        // A maximum passes over what is no number; this does not.
        let largest = |values: &ArrayD<f64>| {
            values.iter().fold(0.0, |most: f64, value| if value.abs() <= most { most } else { value.abs() })
        };
        // What is taken apart is V, in which W0 may have been small.
        let size = largest(&base) + largest(&layer.define(case).expect("results")["weighted"]) / beta.abs();
        match trip.restored {
            Ok(restored) => prop_assert!(largest(&(restored - &base)) <= 64.0 * f64::EPSILON * size),
            Err(Error::Unmerge { .. }) => return Ok(false),
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        }
        Ok(true)
    });
}

#[test]
fn wora_at_one_and_one_is_dora() {
    hold(100, |layer, case| {
        if !is(case, "method", "wora") {
            return Ok(false);
        }
        let mut wora = case.clone();
        [ALPHA, BETA].into_iter().for_each(|name| put(&mut wora, name, ndarray::arr0(1.0).into_dyn()));
        let mut dora = wora.clone();
        dora.settings.insert("method".into(), "dora".into());
        [ALPHA, BETA].into_iter().for_each(|name| drop(dora.tensors.remove(name)));
        let (mut of_wora, of_dora) = (evaluate(layer, &wora), evaluate(layer, &dora));
        of_wora.retain(|name, _| of_dora.contains_key(name));
        prop_assert_eq!(of_wora, of_dora);
        Ok(true)
    });
}

/// With m = ||V|| the gain is 1, and what is left is LoRA on beta W0 with alpha s.
#[test]
fn a_magnitude_that_is_the_norm_leaves_no_norm() {
    hold(100, |layer, case| {
        if !has(case, MAGNITUDE) {
            return Ok(false);
        }
        let mut adapted = case.clone();
        // Under a mask the base output keeps W0, whatever beta is.
        adapted.tensors.remove("dropout_mask");
        let magnitude = values(case, MAGNITUDE);
        let gain = evaluate(layer, case)["gain"].clone().into_shape_with_order(magnitude.raw_dim());
        // The norm with its eps.
        put(&mut adapted, MAGNITUDE, magnitude / gain.expect("one a norm"));
        let mut plain = adapted.clone();
        for (name, becomes) in [(ALPHA, "scaling"), (BETA, "base.weight"), (MAGNITUDE, "")] {
            let Some(Tensor::Float(factor)) = plain.tensors.remove(name) else { continue };
            match becomes {
                "scaling" => {
                    let scaling = plain.settings["scaling"].as_f64().expect("a number") * factor.sum();
                    plain.settings.insert("scaling".into(), scaling.into());
                }
                "" => {}
                tensor => scale(&mut plain, tensor, factor.sum()),
            }
        }
        plain.settings.insert("method".into(), "lora".into());
        ["norm_gradient", "norm_axis", "norm_eps"].into_iter().for_each(|name| drop(plain.settings.remove(name)));
        let y = evaluate(layer, &adapted).remove("y").expect("y");
        is_right(&plain, Dtype::F64, Tensors::from([("y".into(), y)]))?;
        Ok(true)
    });
}

/// Section 5.4: only the direction of (alpha, beta) reaches the output, so their gradients shrink as they grow.
#[test]
fn a_common_factor_of_alpha_and_beta_changes_nothing() {
    hold(100, |layer, case| {
        if !is(case, "method", "wora") || !is(case, "norm_eps", 0.0) {
            return Ok(false);
        }
        for factor in [0.5, 3.0] {
            let mut scaled = case.clone();
            [ALPHA, BETA].into_iter().for_each(|name| scale(&mut scaled, name, factor));
            let mut results = evaluate(layer, &scaled);
            for name in ["grad.lora_wora_alpha", "grad.lora_wora_beta"] {
                *results.get_mut(name).expect("a gradient") *= factor;
            }
            // V, its norm and m / ||V|| are what the factor does reach.
            ["weighted", "weight_norm", "gain"].into_iter().for_each(|name| drop(results.remove(name)));
            is_right(case, Dtype::F64, results)?;
        }
        Ok(true)
    });
}

/// The axis of a tensor that runs over the units, where it has one.
fn unit_axis(layer: &dyn Subject, case: &Case, name: &str) -> Option<usize> {
    let per_unit = !is(case, "norm_axis", "input");
    let transposed = layer.name() == "embedding" || is(case, "fan_in_fan_out", true);
    let kernel_axes = values(case, "base.weight").ndim() - 2;
    match name.trim_start_matches("grad.") {
        "base.weight" | "weighted" | "merged_weight" => Some(usize::from(transposed)),
        "base.bias" | "lora_B" | "lora_embedding_B" => Some(0),
        "weight_norm" | "gain" => per_unit.then_some(0),
        MAGNITUDE => per_unit.then_some(usize::from(kernel_axes > 0)),
        "y" => Some(values(case, "grad.y").ndim() - 1 - kernel_axes),
        _ => None,
    }
}

/// E53, of each unit: the length of its row of V does not reach the loss, and what W0 and B make of it is `<dV, V>`.
#[test]
fn the_full_gradient_of_a_direction_is_orthogonal_to_it_unit_by_unit() {
    let (detached_is_not, cases) = (AtomicUsize::new(0), AtomicUsize::new(0));
    hold(100, |layer, case| {
        if !has(case, MAGNITUDE)
            || !is(case, "norm_gradient", "full")
            || !is(case, "norm_eps", 0.0)
            || has(case, "dropout_mask")
            || !layer.is_gradient_of_the_loss(case).expect("a case")
        {
            return Ok(false);
        }
        // One per input feature are columns of V, whose factor is A.
        let per_input = is(case, "norm_axis", "input");
        let factor = layer.lora_names()[usize::from(!per_input)];
        let units = unit_axis(layer, case, "base.weight").expect("one");
        let axes = [("base.weight", if per_input { 1 - units } else { units }), (factor, usize::from(per_input))];
        let radial = |case: &Case| {
            let results = evaluate(layer, case);
            let of = |(name, axis): (&str, usize)| {
                let products = values(case, name) * &results[&format!("grad.{name}")];
                let by_unit = products.axis_iter(Axis(axis));
                by_unit.map(|unit| (unit.sum(), unit.mapv(f64::abs).sum())).collect::<Vec<_>>()
            };
            let [base, low_rank] = axes.map(of);
            assert_eq!(base.len(), low_rank.len());
            base.into_iter().zip(low_rank).map(|(one, other)| (one.0 + other.0, one.1 + other.1)).collect::<Vec<_>>()
        };
        let mut detached = case.clone();
        detached.settings.insert("norm_gradient".into(), "detached".into());
        let mut is_not = false;
        for ((full, _), (detached, size)) in radial(case).into_iter().zip(radial(&detached)) {
            prop_assert!(full.abs() <= 1e-11 * size, "{full} of {size}: {:?}", case.settings);
            is_not |= detached.abs() > 1e-3 * size;
        }
        cases.fetch_add(1, Ordering::Relaxed);
        detached_is_not.fetch_add(usize::from(is_not), Ordering::Relaxed);
        Ok(true)
    });
    assert!(detached_is_not.into_inner() * 2 > cases.into_inner(), "it says nothing of the full gradient");
}

#[test]
fn permuted_units_permute_the_results() {
    hold(100, |layer, case| {
        let units = evaluate(layer, case)["y"].len_of(Axis(unit_axis(layer, case, "y").expect("one")));
        let groups = case.settings.get("groups").map_or(1, |groups| groups.as_u64().expect("a number") as usize);
        // Within their groups, which see other channels.
        let in_group = units / groups;
        let order: Vec<usize> =
            (0..units).map(|unit| unit / in_group * in_group + (unit % in_group + 1) % in_group).collect();
        if in_group == 1 {
            return Ok(false);
        }
        let permute = |name: &str, values: ArrayD<f64>| match unit_axis(layer, case, name) {
            Some(axis) => values.select(Axis(axis), &order),
            None => values,
        };
        let mut permuted = case.clone();
        for (name, tensor) in &mut permuted.tensors {
            if let Tensor::Float(values) = tensor {
                *values = permute(name, values.to_owned().into_owned()).into();
            }
        }
        prop_assert_ne!(&permuted, case);
        let results = evaluate(layer, case).into_iter().map(|(name, values)| (name.clone(), permute(&name, values)));
        is_right(&permuted, Dtype::F64, results.collect())?;
        Ok(true)
    });
}

/// Some samples of a case.
fn part(case: &Case, samples: Slice) -> Case {
    let mut part = case.clone();
    for name in ["x", "dropout_mask", "grad.y"] {
        match part.tensors.get_mut(name) {
            Some(Tensor::Float(values)) => *values = values.slice_axis(Axis(0), samples).to_owned().into(),
            Some(Tensor::Int(ids)) => *ids = ids.slice_axis(Axis(0), samples).to_owned(),
            None => {}
        }
    }
    part
}

#[test]
fn a_batch_is_its_parts_joined() {
    hold(100, |layer, case| {
        let x = case.tensors["x"].shape();
        let sample_axes = match layer.name() {
            "embedding" => 0,
            "linear" => 1,
            _ => values(case, "base.weight").ndim() - 1,
        };
        // How often an id occurs is asked of the whole batch.
        if x.len() <= sample_axes || x[0] < 2 || is(case, "scale_grad_by_freq", true) {
            return Ok(false);
        }
        let mut joined = Tensors::new();
        for samples in [Slice::new(0, Some(1), 1), Slice::new(1, None, 1)] {
            for (name, values) in evaluate(layer, &part(case, samples)) {
                let of_samples = ["y", "grad.x"].contains(&name.as_str());
                let of_parameters = name.starts_with("grad.") && !of_samples;
                match joined.get_mut(&name) {
                    Some(before) if of_samples => before.append(Axis(0), values.view()).expect("the same shape"),
                    Some(before) if of_parameters => *before += &values,
                    Some(before) => prop_assert_eq!(&*before, &values, "{}", name),
                    None => drop(joined.insert(name, values)),
                }
            }
        }
        is_right(case, Dtype::F64, joined)?;
        Ok(true)
    });
}

#[test]
#[cfg(not(feature = "openblas"))]
fn the_number_of_threads_changes_no_bit() {
    let pools = [1, 2, 3].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads"));
    hold_for(90, 24, |layer, case| {
        for precision in [Precision::F32, Precision::F64] {
            let [one, two, three] =
                pools.each_ref().map(|pool| pool.install(|| layer.evaluate(case, precision)).expect("results"));
            prop_assert!(one == two && two == three);
        }
        Ok(true)
    });
}
