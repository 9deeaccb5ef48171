//! The diagnosis: every mistake of the bank, made in every case where it can be, must be named first.

use ndarray::{ArrayD, Axis, Ix2};
use rayon::prelude::*;
use woracle::case::Tensor;
use woracle::cases::{Spec, Twist};
use woracle::mistakes::{MISTAKES, Mistake, mistake};
use woracle::oracle::diagnose::diagnose;
use woracle::oracle::{CaseFile, Dtype};
use woracle::registry::{LAYERS, Precision, Subject, layer, mistaken};

const SEED: u64 = 11;

/// The case with these mistakes in it, its numbers rounded to a type; `None` where they cannot be made.
fn wrong(subject: &dyn Subject, spec: &Spec, mistakes: &[&Mistake], dtype: Dtype) -> Option<CaseFile> {
    let mut case = CaseFile::rounded(subject.draw(spec, SEED), dtype).case;
    let theirs = mistaken(subject, mistakes, &case).ok()??;
    let answers = theirs.into_iter().filter(|(name, _)| name == "y" || name.starts_with("grad."));
    case.extend(answers.collect());
    Some(CaseFile::rounded(case, dtype))
}

/// What came of all pairs of a mistake and a case: how many were rejected, named first, tied for the first place, and
/// the others.
#[derive(Default)]
struct Score {
    accepted: usize,
    first: usize,
    tied: usize,
    missed: Vec<String>,
}

/// Every `stride`-th of all pairs of a mistake and a small case.
fn score(dtype: Dtype, stride: usize) -> Score {
    // Weights of 2^-80 are nothing in f16.
    let small = |spec: &&Spec| !spec.name.contains("large") && (dtype != Dtype::F16 || spec.twist != Twist::Tiny);
    let all: Vec<_> = MISTAKES
        .iter()
        .flat_map(|mistake| {
            LAYERS.iter().filter(|layer| mistake.layers.contains(&layer.name())).map(move |layer| (mistake, layer))
        })
        .flat_map(|(mistake, layer)| layer.specs().iter().filter(small).map(move |spec| (mistake, *layer, spec)))
        .step_by(stride)
        .collect();
    let each: Vec<Score> = all
        .into_par_iter()
        .filter_map(|(mistake, layer, spec)| {
            let file = wrong(layer, spec, &[mistake], dtype)?;
            let diagnosis = diagnose(&file).expect("a diagnosis");
            let mut score = Score::default();
            if diagnosis.first_diverging.is_none() {
                score.accepted = 1;
                return Some(score);
            }
            let of = |id: &str| diagnosis.candidates.iter().find(|candidate| candidate.ids == [id]);
            let best = diagnosis.candidates.first();
            match (best, of(mistake.id)) {
                (Some(best), Some(_)) if best.ids == [mistake.id] => score.first = 1,
                (Some(best), Some(mine)) if best.residual == mine.residual => score.tied = 1,
                (best, _) => {
                    let instead = best.map_or("nothing", |best| best.id.as_str());
                    score.missed.push(format!("{dtype} {} in {}: {instead}", mistake.id, spec.name));
                }
            }
            Some(score)
        })
        .collect();
    each.into_iter().fold(Score::default(), |mut sum, one| {
        sum.accepted += one.accepted;
        sum.first += one.first;
        sum.tied += one.tied;
        sum.missed.extend(one.missed);
        sum
    })
}

/// A thirteenth of all pairs, or with `WORA_ALL=1` every one, which takes some minutes.
#[test]
fn every_mistake_is_named_first_or_tied_with_what_cannot_be_told_from_it() {
    let stride = if std::env::var_os("WORA_ALL").is_some() { 1 } else { 13 };
    for dtype in Dtype::ALL {
        let Score { accepted, first, tied, missed } = score(dtype, stride);
        let rejected = first + tied + missed.len();
        println!(
            "{dtype}: {rejected} rejected, {first} named first, {tied} tied with the first, {} missed; {accepted} make no difference that shows",
            missed.len()
        );
        println!("  {}", missed.iter().take(20).cloned().collect::<Vec<_>>().join("\n  "));
        assert!(first * 100 >= 95 * rejected, "{dtype}");
        assert!((first + tied) * 1000 >= 995 * rejected, "{dtype}");
    }
}

/// Nobody's mistake: right answers in f32, of which one tensor is a few bounds off. What changes nothing in a case, as a
/// mask that it has not, explains none of that.
#[test]
fn answers_that_are_hardly_off_are_nobodys_mistake() {
    let small = |spec: &&Spec| !spec.name.contains("large") && spec.twist != Twist::Exact;
    let cases = LAYERS.iter().flat_map(|layer| layer.specs().iter().filter(small).map(move |spec| (*layer, spec)));
    // Gradients whose terms cancel are smaller than anything that a mistake makes of them.
    let cancels = |spec: &Spec| ["linear-one-feature-full", "linear-beta-0-full"].contains(&spec.name);
    let some = cases.enumerate().filter(|(nth, (_, spec))| nth % 11 == 0 || cancels(spec));
    let blamed = some.flat_map(|(_, (layer, spec))| {
        let mut case = CaseFile::rounded(layer.draw(spec, SEED), Dtype::F32).case;
        case.extend(layer.define(&case).expect("answers"));
        let (_, errors) = layer.expect(&case, &[Dtype::F32.storage()]).expect("errors");
        let unit = 4.0 * Dtype::F32.unit_roundoff();
        ["y", "grad.x", "grad.lora_wora_alpha", "grad.lora_B"].map(|name| {
            let error = errors[0].get(name)?;
            let mut case = case.clone();
            let Some(Tensor::Float(values)) = case.tensors.get_mut(name) else { panic!("{name}") };
            let mut sign = 1.0;
            values.zip_mut_with(error, |value, error| {
                *value += 3.0 * sign * unit * error;
                sign = -sign;
            });
            let diagnosis = diagnose(&CaseFile::rounded(case, Dtype::F32)).expect("a diagnosis");
            assert_eq!(diagnosis.first_diverging.as_deref(), Some(name), "{}", spec.name);
            let best = diagnosis.candidates.first()?;
            Some(format!("{} {name}: {} leaves {}", spec.name, best.id, best.residual))
        })
    });
    let blamed: Vec<String> = blamed.flatten().collect();
    assert!(blamed.is_empty(), "{}", blamed.join("\n"));
}

/// Nor is an intermediate that is wrong beside right results.
#[test]
fn an_intermediate_that_is_wrong_alone_is_nobodys_mistake() {
    let small = |spec: &&Spec| !spec.name.contains("large") && spec.config.has_norm();
    let cases = LAYERS.iter().flat_map(|layer| layer.specs().iter().filter(small).map(move |spec| (*layer, spec)));
    for (layer, spec) in cases.step_by(7) {
        let mut case = layer.draw(spec, SEED);
        case.extend(layer.define(&case).expect("answers"));
        let Some(Tensor::Float(gain)) = case.tensors.get_mut("gain") else { panic!("{}", spec.name) };
        *gain = gain.mapv(|gain| 2.0 * gain).into();
        let diagnosis = diagnose(&CaseFile::new(case, Dtype::F64)).expect("a diagnosis");
        assert_eq!(diagnosis.first_diverging.as_deref(), Some("gain"), "{}", spec.name);
        assert!(diagnosis.candidates.is_empty(), "{}: {}", spec.name, diagnosis.candidates[0].id);
    }
}

#[test]
fn two_mistakes_at_once_are_named_together() {
    let pairs = [
        ("linear", "linear-plain", ["bias-scaled", "scaling-twice"]),
        ("linear", "linear-dropout-full", ["dropout-ignored", "alpha-detached"]),
        ("embedding", "embedding-everything", ["padding-idx-ignored", "beta-ignored"]),
        ("conv1d", "conv1d-same-dilated", ["lora-dilation-dropped", "norm-of-base"]),
        ("conv1d", "conv1d-dropout", ["gradients-averaged", "beta-gradient-negated"]),
        ("conv3d", "conv3d-plain", ["kernel-flipped", "magnitude-detached"]),
        ("linear", "linear-full", ["norm-gradient-sign", "bias-twice"]),
        ("linear", "linear-full", ["norm-gradient-twice", "scaling-twice"]),
        ("linear", "linear-full", ["magnitude-gradient-extra-gain", "norm-of-base"]),
    ];
    for (name, case, ids) in pairs {
        let subject = layer(name).expect("a layer");
        let spec = subject.specs().iter().find(|spec| spec.name == case).expect("a case");
        let both = ids.map(|id| mistake(id).expect("an id"));
        let file = wrong(subject, spec, &both, Dtype::F64).expect("both can be made");
        let diagnosis = diagnose(&file).expect("a diagnosis");
        let best = diagnosis.candidates.first().unwrap_or_else(|| panic!("{case}: nothing explains {ids:?}"));
        let mut found = best.ids.clone();
        found.sort_unstable();
        let mut made = ids.to_vec();
        made.sort_unstable();
        assert_eq!((found, best.residual), (made, 0.0), "{case}");
    }
}

/// linear-plain by the definition, with something done to its answers.
fn changed(change: impl Fn(&mut woracle::case::Tensors)) -> (Vec<String>, Vec<String>) {
    let subject = layer("linear").expect("linear");
    let mut case = subject.draw(&subject.specs()[0], SEED);
    let mut right = subject.define(&case).expect("answers");
    change(&mut right);
    case.extend(right);
    let diagnosis = diagnose(&CaseFile::new(case, Dtype::F64)).expect("a diagnosis");
    let ids = diagnosis.candidates.into_iter().map(|candidate| candidate.id).collect();
    (ids, diagnosis.facts)
}

#[test]
fn a_gradient_of_the_wrong_sign_or_size_is_no_pair_of_what_is_not_there() {
    for name in ["grad.lora_A", "grad.lora_B", "grad.lora_magnitude_vector", "grad.base.bias"] {
        for factor in [-1.0, 2.0] {
            let (ids, facts) = changed(|all| all.get_mut(name).expect(name).mapv_inplace(|value| value * factor));
            let norm_path = ids.iter().find(|id| id.contains("norm-gradient"));
            assert_eq!(norm_path, None, "{name} times {factor}, where the norm is held");
            assert!(facts.iter().any(|fact| fact.contains(&format!("{factor:.6} times"))), "{name}: {facts:?}");
        }
    }
}

#[test]
fn intermediates_that_a_mistake_does_not_touch_do_not_hide_it() {
    let linear = layer("linear").expect("linear");
    for id in ["base-counted-twice", "gain-on-lora-only"] {
        let mut file = wrong(linear, &linear.specs()[0], &[mistake(id).expect("an id")], Dtype::F64).expect("made");
        let weight = linear.define(&file.case).expect("answers")["merged_weight"].mapv(|value| 1.5 * value + 0.25);
        file.case.tensors.insert("merged_weight".into(), Tensor::Float(weight.into()));
        assert_eq!(diagnose(&file).expect("a diagnosis").candidates[0].ids, [id]);
    }
}

#[test]
fn no_numbers_are_the_same_whichever_they_are() {
    let linear = layer("linear").expect("linear");
    let spec = linear.specs().iter().find(|spec| spec.name == "linear-zero-unit").expect("a case");
    let id = "zero-norm-not-guarded";
    let mut file = wrong(linear, spec, &[mistake(id).expect("an id")], Dtype::F64).expect("it can be made");
    let Tensor::Float(dm) = &file.case.tensors["grad.lora_magnitude_vector"] else { panic!("dm has values") };
    assert!(
        dm[0].is_nan() && dm.iter().skip(1).all(|dm| dm.is_finite()),
        "0 / 0 in the unit without a direction: {dm}"
    );
    for tensor in file.case.tensors.values_mut() {
        if let Tensor::Float(values) = tensor {
            values.mapv_inplace(|value| if value.is_nan() { f64::NEG_INFINITY } else { value });
        }
    }
    assert_eq!(diagnose(&file).expect("a diagnosis").candidates[0].ids, [id]);
}

#[test]
fn where_no_mistake_explains_the_numbers_facts_are_told() {
    let no_ids: Vec<String> = vec![];
    assert_eq!(changed(|_| {}), (no_ids.clone(), vec![]));
    // Six numbers are too few to tell what they were computed in.
    let narrow = |all: &mut woracle::case::Tensors| {
        all.get_mut("grad.lora_magnitude_vector").expect("dm").mapv_inplace(|m| f64::from(m as f32));
    };
    assert_eq!(changed(narrow), (no_ids.clone(), vec![]));
    type Change = fn(&mut woracle::case::Tensors);
    let changes: [(Change, &str); 10] = [
        (|all| *all.get_mut("y").expect("y") *= 3.0, "y: every element is 3.000000 times what it should be"),
        (|all| all.get_mut("y").expect("y").fill(0.0), "y: it is zero everywhere"),
        (
            |all| *all.get_mut("grad.lora_wora_alpha").expect("dalpha") *= 1.0 + 1e-9, // one number is no pattern
            "grad.lora_wora_alpha: it is 1.000000 times what it should be",
        ),
        (
            |all| all.get_mut("y").expect("y")[[1, 2]] = f64::NAN,
            "y: 1 of 30 elements are no numbers, the first at [1, 2]",
        ),
        (|all| all.get_mut("y").expect("y").mapv_inplace(|y| y + 0.25), "y: every element is off by 2.5e-1"),
        (
            |all| all.get_mut("y").expect("y").mapv_inplace(|y| f64::from(y as f32)),
            "y: it is as exact as f32 is, and stored as f64: was it computed in f32?",
        ),
        (
            |all| all.get_mut("grad.lora_B").expect("dB").invert_axis(Axis(0)),
            "grad.lora_B: along axis 0 it is the right tensor in another order: 5, 4, 3, 2, 1, 0",
        ),
        (
            |all| all.get_mut("grad.x").expect("dx")[[4, 1]] += 1.0,
            "grad.x: 1 of 35 elements are wrong, all of them at index 4 of axis 0",
        ),
        (
            |all| {
                let columns = all.get_mut("grad.lora_B").expect("dB").axis_iter_mut(Axis(1));
                columns.enumerate().for_each(|(k, mut column)| column *= (k + 1) as f64);
            },
            "grad.lora_B: along axis 1 it is off by one factor an index: 1.0000, 2.0000, 3.0000",
        ),
        (
            |all| {
                let y = all.get_mut("y").expect("y");
                (y[[0, 0]], y[[2, 3]]) = (9.0, 9.0);
            },
            "y: 2 of 30 elements are wrong, the first at [0, 0]",
        ),
    ];
    for (change, fact) in changes {
        let (ids, facts) = changed(change);
        assert_eq!((ids, facts), (no_ids.clone(), vec![fact.to_string()]));
    }
}

#[test]
fn a_case_that_is_too_large_says_so() {
    let subject = layer("linear").expect("linear");
    let mut case = subject.draw(&subject.specs()[0], SEED);
    let (units, fan_in, rank) = (2049, 2048, case.tensors["lora_A"].shape()[0]);
    let shapes = [
        ("x", vec![2, fan_in]),
        ("base.weight", vec![units, fan_in]),
        ("base.bias", vec![units]),
        ("lora_A", vec![rank, fan_in]),
        ("lora_B", vec![units, rank]),
        ("lora_magnitude_vector", vec![units]),
    ];
    for (name, shape) in shapes {
        let values = ArrayD::from_shape_fn(shape, |index| 0.1 + (index[0] % 7) as f64);
        case.tensors.insert(name.into(), Tensor::Float(values.into()));
    }
    case.tensors.remove("grad.y");
    let mut y = subject.evaluate(&case, Precision::F64).expect("y")["y"].clone();
    y *= 1.5;
    case.tensors.insert("y".into(), Tensor::Float(y.into()));
    let file = CaseFile::new(case, Dtype::F64);
    let facts = diagnose(&file).expect("a diagnosis").facts;
    assert!(facts[0].contains("1.5") && facts[1].contains("too large"), "{facts:?}");
}

/// What is right is 0 to the bit, and so is its bound in f64; what is wrong is not, and has rounding errors of its own.
#[test]
fn a_mistake_is_named_where_the_right_answer_is_0() {
    let subject = layer("linear").expect("linear");
    for (name, id) in [("linear-alpha-0-full", "alpha-ignored"), ("linear-fresh-b", "alpha-beta-swapped")] {
        let spec = subject.specs().iter().find(|spec| spec.name == name).expect("a case");
        let mut case =
            wrong(subject, spec, &[mistake(id).expect("an id")], Dtype::F64).expect("a mistake of this case").case;
        for (name, tensor) in &mut case.tensors {
            if let (true, Tensor::Float(values)) = (name == "y" || name.starts_with("grad.l"), tensor) {
                values.mapv_inplace(|value| value * (1.0 + 2f64.powi(-50)));
            }
        }
        let candidates = diagnose(&CaseFile::new(case, Dtype::F64)).expect("a diagnosis").candidates;
        let best: Vec<_> = candidates.iter().filter(|one| one.residual == 0.0).map(|one| one.id.as_str()).collect();
        assert!(best.contains(&id), "{name}: {best:?}");
    }
}

/// As in PyTorch, NumPy and JAX.
#[test]
fn the_slope_of_a_magnitude_is_0_at_0() {
    let subject = layer("linear").expect("linear");
    let spec = subject.specs().iter().find(|spec| spec.name == "linear-exact-full").expect("a case");
    let case = subject.draw(spec, SEED);
    let theirs = mistaken(subject, &[mistake("norm-absolute").expect("an id")], &case)
        .expect("results")
        .expect("a mistake of this case");
    let values =
        |name: &str| case.values(name).expect("a tensor").view().into_dimensionality::<Ix2>().expect("a matrix");
    let (weighted, dweight) = (&subject.define(&case).expect("answers")["weighted"], &theirs["grad.base.weight"]);
    let x = values("grad.y").t().dot(&values("x"));
    let [m, beta] = ["lora_magnitude_vector", "lora_wora_beta"].map(|name| case.values(name).expect("a tensor"));
    let mut zeros = 0;
    for (i, row) in weighted.axis_iter(Axis(0)).enumerate() {
        let gain = m[[i]] / row.iter().map(|v| v.abs()).sum::<f64>();
        for (j, _) in row.iter().enumerate().filter(|(_, v)| **v == 0.0) {
            assert_eq!(dweight[[i, j]], beta.first().expect("a number") * gain * x[[i, j]], "{i}, {j}");
            zeros += 1;
        }
    }
    assert!(zeros > 0, "V has no zeros");
}

#[test]
fn where_nothing_explains_an_exact_case_nothing_is_named() {
    let subject = layer("linear").expect("linear");
    let spec = subject.specs().iter().find(|spec| spec.name == "linear-exact").expect("a case");
    let mut case = subject.draw(spec, SEED);
    let mut right = subject.define(&case).expect("answers");
    right.get_mut("y").expect("y")[[0, 1]] += 3.0;
    case.extend(right);
    let diagnosis = diagnose(&CaseFile::new(case, Dtype::F64)).expect("a diagnosis");
    let ids: Vec<_> = diagnosis.candidates.iter().map(|candidate| candidate.id.as_str()).collect();
    assert_eq!((ids, diagnosis.facts.len()), (vec![], 1));
}

#[test]
fn an_answer_that_is_no_number_is_no_mistake_of_the_bank() {
    let subject = layer("linear").expect("linear");
    let mut case = subject.draw(&subject.specs()[0], SEED);
    let mut right = subject.define(&case).expect("answers");
    right.get_mut("y").expect("y")[[0, 0]] = f64::INFINITY;
    case.extend(right);
    let diagnosis = diagnose(&CaseFile::new(case, Dtype::F32)).expect("a diagnosis");
    assert_eq!((diagnosis.first_diverging.as_deref(), diagnosis.candidates.len()), (Some("y"), 0));
}
