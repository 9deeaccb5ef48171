//! The checker itself: it must find what is wrong, name it, and say so when it cannot tell.

use assert_cmd::Command;
use ndarray::{ArrayD, arr0, array};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use woracle::bench::TrainingStep;
use woracle::case::{Case, Tensor, Tensors};
use woracle::cases::{MODULES, Spec};
use woracle::gradcheck::{
    CaseReport, Estimate, Function, Options, Place, TensorReport, Verdict, Witness, check, gradcheck, ladder,
};
use woracle::mistakes::{Formula, TracedForward};
use woracle::modules::Settings;
use woracle::registry::{Forward, LAYERS, Precision, RoundTrip, Subject, layer};
use woracle::wora::{Config, Line, Method, NormGradient, Storage};
use woracle::{Dual, DualForward, DualTensors, Real, Result, Rounded};

/// What a lie is off by: a power of two, so that no position in a forward is rounded by it.
const LIE: f64 = 1.0 + 1.0 / 1024.0;

type Change<'a> = Box<dyn Fn(&mut Tensors) + Sync + 'a>;
type Evaluated<'a> = Box<dyn Fn(Precision, &mut Tensors) + Sync + 'a>;
/// A function and its derivative.
type Pair = (fn(f64) -> f64, fn(f64) -> f64);

/// The linear layer with any of its witnesses bribed.
struct Altered<'a> {
    evaluated: Evaluated<'a>,
    defined: Change<'a>,
    /// The forward and the dual numbers move this tensor by `LIE` times what they are told to.
    moved_further: &'static str,
    lying_surrogate: bool,
    lying_duals: bool,
    silent_identities: bool,
    /// The definition takes every norm as detached.
    deaf_definition: bool,
}

impl Default for Altered<'_> {
    fn default() -> Self {
        Self {
            evaluated: Box::new(|_, _| {}),
            defined: Box::new(|_| {}),
            moved_further: "",
            lying_surrogate: false,
            lying_duals: false,
            silent_identities: false,
            deaf_definition: false,
        }
    }
}

impl Subject for Altered<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn specs(&self) -> &'static [Spec] {
        linear().specs()
    }
    fn try_draw(&self, spec: &Spec, seed: u64) -> Result<Case> {
        linear().try_draw(spec, seed)
    }
    fn walk(&self, case: &Case) -> Result<[Vec<Line>; 2]> {
        linear().walk(case)
    }
    fn evaluate(&self, case: &Case, precision: Precision) -> Result<Tensors> {
        let mut results = linear().evaluate(case, precision)?;
        (self.evaluated)(precision, &mut results);
        Ok(results)
    }
    fn define(&self, case: &Case) -> Result<Tensors> {
        let mut case = case.clone();
        if self.deaf_definition {
            case.settings.insert("norm_gradient".into(), "detached".into());
        }
        let mut results = linear().define(&case)?;
        (self.defined)(&mut results);
        Ok(results)
    }
    fn roundings(&self, case: &Case) -> Result<BTreeMap<String, ArrayD<Rounded>>> {
        linear().roundings(case)
    }
    fn expect(&self, case: &Case, storages: &[Storage]) -> Result<(Tensors, Vec<Tensors>)> {
        linear().expect(case, storages)
    }
    fn training_step(&self, case: &Case, precision: Precision) -> Result<Box<dyn TrainingStep>> {
        linear().training_step(case, precision)
    }
    fn terms(&self, case: &Case) -> Result<usize> {
        linear().terms(case)
    }
    fn dual(&self, case: &Case) -> Result<DualForward> {
        let dual = linear().dual(case)?;
        if !self.lying_duals {
            return Ok(dual);
        }
        let name = self.moved_further;
        Ok(Box::new(move |inputs| {
            let mut inputs = inputs.clone();
            inputs.get_mut(name).expect("an input").mapv_inplace(|x| Dual::new(x.re, x.eps * LIE));
            dual(&inputs)
        }))
    }
    fn surrogate(&self, case: &Case) -> Result<Forward> {
        let forward = linear().surrogate(case)?;
        if !self.lying_surrogate {
            return Ok(forward);
        }
        let (name, here) = (self.moved_further, case.values(self.moved_further)?.clone());
        Ok(Box::new(move |case| {
            let further = &here + &((case.values(name)? - &here) * LIE);
            let mut case = case.clone();
            case.tensors.insert(name.into(), Tensor::Float(further.into()));
            forward(&case)
        }))
    }
    fn merge(&self, case: &Case) -> Result<RoundTrip> {
        linear().merge(case)
    }
    fn is_input(&self, case: &Case, tensor: &str) -> Result<bool> {
        linear().is_input(case, tensor)
    }
    fn is_gradient_of_the_loss(&self, case: &Case) -> Result<bool> {
        Ok(!self.silent_identities && linear().is_gradient_of_the_loss(case)?)
    }
    fn formula(&self, formula: &Formula, case: &Case) -> Result<Option<TracedForward>> {
        linear().formula(formula, case)
    }
    fn lora_names(&self) -> [&'static str; 2] {
        linear().lora_names()
    }
    fn is_affine(&self, case: &Case, tensor: &str) -> Result<bool> {
        linear().is_affine(case, tensor)
    }
}

fn linear() -> &'static dyn Subject {
    layer("linear").expect("linear")
}

fn spec(name: &str) -> &'static Spec {
    linear().specs().iter().find(|spec| spec.name == name).expect("a case")
}

fn check_altered(subject: &Altered, case: &str) -> CaseReport {
    check(subject, &subject.draw(spec(case), 3), Options::default())
}

/// Checks a case whose production path *and* definition are wrong in the same way.
fn tampered(case: &str, change: impl Fn(&mut Tensors) + Sync) -> CaseReport {
    let change = &change;
    let subject =
        Altered { evaluated: Box::new(move |_, results| change(results)), defined: Box::new(change), ..<_>::default() };
    check_altered(&subject, case)
}

/// Tensors that any witness contradicts.
fn disagreeing(report: &CaseReport) -> Vec<&str> {
    let wrong = report.tensors.iter().filter(|tensor| tensor.verdict == Verdict::Disagree);
    wrong.map(|tensor| tensor.name.as_str()).collect()
}

/// Labels of the identities that do not hold.
fn broken(report: &CaseReport) -> Vec<&str> {
    let broken = report.identities.iter().filter(|identity| identity.verdict != Verdict::Agree);
    broken.map(|identity| identity.label).collect()
}

/// The worst element of a tensor.
fn worst_place(tensor: &TensorReport) -> Place {
    tensor.worst.as_ref().expect("an element").place.clone()
}

/// Tensors that this witness contradicts.
fn contradicted(report: &CaseReport, witness: Witness) -> Vec<&str> {
    let verdict = |tensor: &&TensorReport| tensor.witness(witness).map(|says| says.verdict);
    let wrong = report.tensors.iter().filter(|tensor| verdict(tensor) == Some(Verdict::Disagree));
    wrong.map(|tensor| tensor.name.as_str()).collect()
}

fn tensor<'a>(report: &'a CaseReport, name: &str) -> &'a TensorReport {
    report.tensors.iter().find(|tensor| tensor.name == name).expect("its report")
}

const GRADIENTS: [&str; 8] =
    ["x", "lora_A", "lora_B", "lora_magnitude_vector", "lora_wora_alpha", "lora_wora_beta", "base.weight", "base.bias"];

#[test]
fn an_untouched_layer_agrees() {
    for case in ["linear-plain", "linear-full", "linear-dropout-full"] {
        let report = check_altered(&Altered::default(), case);
        assert!(report.agrees(), "{report}");
    }
}

/// A layer whose gradient of one tensor is wrong, and every witness but one says it is right.
fn all_but_one_lie(name: &'static str, honest: Witness) -> Altered<'static> {
    let gradient = format!("grad.{name}");
    let wrong = move |results: &mut Tensors| *results.get_mut(&gradient).expect("a gradient") *= LIE;
    let (in_f64, in_f32) = (wrong.clone(), wrong.clone());
    let defined: Change = if honest == Witness::Definition { Box::new(|_| {}) } else { Box::new(wrong) };
    Altered {
        evaluated: Box::new(move |precision, results| match precision {
            Precision::F64 => in_f64(results),
            Precision::F32 if honest == Witness::F32 => {}
            Precision::F32 => in_f32(results),
        }),
        defined,
        moved_further: name,
        lying_surrogate: honest != Witness::Differences,
        lying_duals: honest != Witness::Duals,
        silent_identities: honest != Witness::Identities,
        ..Altered::default()
    }
}

#[test]
fn each_witness_alone_catches_a_wrong_gradient_that_all_others_confirm() {
    for witness in Witness::ALL {
        for name in GRADIENTS {
            if (witness, name) == (Witness::Identities, "base.bias") {
                continue;
            }
            let subject = all_but_one_lie(name, witness);
            let report = check_altered(&subject, "linear-full");
            let gradient = format!("grad.{name}");
            for other in Witness::ALL.into_iter().filter(|&other| other != witness) {
                assert_eq!(contradicted(&report, other), [""; 0], "{other} of {name}, {witness} being honest");
            }
            let caught = contradicted(&report, witness);
            if witness == Witness::Identities {
                // An identity is between gradients: it accuses none of them.
                let about = |equation: &str| equation.contains(&format!("<d {name}, {name}>"));
                let named: Vec<_> = report.identities.iter().filter(|one| about(&one.equation)).collect();
                assert!(!named.is_empty() && named.iter().all(|one| one.verdict == Verdict::Disagree), "{name}");
                assert_eq!((broken(&report).len(), disagreeing(&report)), (named.len(), vec![]), "{name}");
            } else {
                assert_eq!((caught, broken(&report)), (vec![gradient.as_str()], vec![]), "{witness}");
                let verdict = tensor(&report, &gradient).witness(witness).expect("its word").verdict;
                assert_eq!((verdict, tensor(&report, &gradient).verdict), (Verdict::Disagree, Verdict::Disagree));
            }
            assert!(!report.agrees() && report.contradicts(witness), "{name}: {witness}");
        }
    }
}

#[test]
fn differences_and_duals_find_one_wrong_element_of_any_gradient_and_name_it() {
    for name in GRADIENTS {
        let name = format!("grad.{name}");
        let report = tampered("linear-dropout-full", |results| {
            let values = results.get_mut(&name).expect("a gradient");
            *values.iter_mut().last().expect("an element") += 1e-8;
        });
        let found = tensor(&report, &name);
        for witness in [Witness::Differences, Witness::Duals] {
            assert_eq!(contradicted(&report, witness), [name.as_str()]);
            let worst = &found.witness(witness).expect("a comparison").worst;
            let case = linear().draw(spec("linear-dropout-full"), 3);
            let shape = case.tensors[&name["grad.".len()..]].shape().to_vec();
            let last: Vec<usize> = shape.iter().map(|length| length - 1).collect();
            assert_eq!(worst.place, Place::Element(last), "{name}");
            assert!((worst.ours - worst.theirs).abs() > 0.9e-8, "{worst:?}");
        }
    }
}

#[test]
fn the_detached_gradient_is_not_taken_for_the_full_one_nor_the_other_way_round() {
    for (case, other) in [("linear-plain", "full"), ("linear-full", "detached")] {
        let mut swapped = linear().draw(spec(case), 3);
        swapped.settings.insert("norm_gradient".into(), other.into());
        let results = linear().evaluate(&swapped, Precision::F64).expect("results");
        let report = tampered(case, |ours| *ours = results.clone());
        let expected =
            ["grad.base.weight", "grad.lora_A", "grad.lora_B", "grad.lora_wora_alpha", "grad.lora_wora_beta"];
        for witness in [Witness::Differences, Witness::Duals] {
            assert_eq!(contradicted(&report, witness), expected, "{case}");
        }
        // E49 and E50 hold for both treatments; the one that tells them apart is E52 or E53.
        assert_eq!(broken(&report), [if case == "linear-plain" { "E52" } else { "E53" }], "{case}");
    }
}

#[test]
fn a_definition_that_knows_one_treatment_of_the_norm_breaks_a_law() {
    let law = "detached and full gradient differ";
    let holds = |subject: &Altered| {
        let report = check_altered(subject, "linear-plain");
        let holds = report.laws.iter().find(|found| found.name == law).expect("the law").holds;
        (holds, report.agrees())
    };
    assert_eq!(holds(&Altered::default()), (true, true));
    assert_eq!(holds(&Altered { deaf_definition: true, ..Altered::default() }), (false, false));
}

/// Identities that a case must have.
fn expected_identities(subject: &dyn Subject, case: &Case) -> Vec<&'static str> {
    let config: Config = case.settings().expect("settings");
    if !subject.is_gradient_of_the_loss(case).expect("a layer") {
        return vec![];
    }
    let (wora, norm) = (config.method == Method::Wora, config.method != Method::Lora);
    let masked = case.tensors.contains_key("dropout_mask");
    let full = config.norm_gradient == NormGradient::Full;
    let radial = if full { "E53" } else { "E52" };
    let all = [
        ("E49", true),
        ("E49", wora),
        ("E50", wora && !masked),
        ("E51", norm && !masked),
        (radial, norm && (wora || !masked) && !(full && config.norm_eps != 0.0)),
        ("E54", matches!(case.tensors["x"], Tensor::Float(_))),
    ];
    all.into_iter().filter(|(_, holds)| *holds).map(|(label, _)| label).collect()
}

#[test]
fn every_small_case_has_every_witness_and_every_witness_is_sharp() {
    let mut silent = 0;
    for &layer in LAYERS {
        let small: Vec<_> = layer.specs().iter().filter(|spec| !spec.name.contains("large")).collect();
        assert!(small.len() >= 12, "{}", layer.name());
        for spec in small {
            let case = layer.draw(spec, 0);
            let report = check(layer, &case, Options::default());
            assert!(report.agrees(), "{report}");
            for tensor in &report.tensors {
                let place = format!("{} {}", spec.name, tensor.name);
                let speak = if tensor.name.starts_with("grad.") { &Witness::ALL[..4] } else { &Witness::ALL[..2] };
                let witnesses: Vec<_> = tensor.witnesses.iter().map(|says| says.witness).collect();
                let says: Vec<_> = tensor.worst.as_ref().expect("one").says.iter().map(|said| said.witness).collect();
                assert_eq!((witnesses.as_slice(), says.as_slice()), (speak, speak), "{place}");
                if let Some(says) = tensor.witness(Witness::Differences) {
                    let worst = &says.worst;
                    assert!(worst.error <= 1e-11 * worst.size, "{place}: {worst:?}");
                    assert!(worst.uncertainty <= 1e-11 * worst.size, "{place}: {worst:?}");
                }
                if let Some(says) = tensor.witness(Witness::Duals) {
                    let worst = &says.worst;
                    assert!(worst.error <= 1e-13 * worst.size, "{place}: {worst:?}");
                }
            }
            // One whose terms are all 0 says nothing: B = 0, alpha = 0 or beta = 0.
            let mut expected = expected_identities(layer, &case);
            let nothing = |label: &&str| match spec.name.split_once('-').expect("a layer and a case").1 {
                "fresh-b" | "alpha-0-full" => *label == "E49",
                "beta-0-full" => *label == "E50",
                _ => false,
            };
            let before = expected.len();
            expected.retain(|label| !nothing(label));
            silent += before - expected.len();
            let labels: Vec<_> = report.identities.iter().map(|identity| identity.label).collect();
            assert_eq!(labels, expected, "{}", spec.name);
            for identity in &report.identities {
                assert!(identity.size > 0.0 && identity.error <= 1e-13 * identity.size, "{}: {identity}", spec.name);
            }
        }
    }
    assert_eq!(silent, 11);
}

#[test]
fn what_has_nothing_to_compare_does_not_agree() {
    let forward = |_: &Tensors| arr0(1.0).into_dyn();
    let function = Hand { forward, backward: |_: &Tensors, _: &ArrayD<f64>| Tensors::new(), affine: true };
    let report = gradcheck(&function, &Tensors::new(), Options::default());
    assert_eq!((report.agrees(), report.to_string().as_str()), (false, "hand: nothing was compared"));
    let empty = ArrayD::zeros(vec![0, 3]);
    let report = elementwise(true, empty, |_, x| x, |_, _| 1.0);
    assert_eq!((report.agrees(), report.tensors[0].verdict), (false, Verdict::Unresolved));
    assert!(report.to_string().contains("it has no elements"), "{report}");
}

#[test]
fn a_report_in_json_says_which_number_is_none() {
    let report = tampered("linear-plain", |results| results.get_mut("grad.x").expect("dx")[[1, 2]] = f64::NAN);
    let json = serde_json::to_value(&report).expect("a report");
    let dx = json["tensors"].as_array().expect("tensors").iter().find(|one| one["name"] == "grad.x").expect("dx");
    assert_eq!(dx["worst"]["place"], serde_json::json!({"element": [1, 2]}));
    assert_eq!((&dx["worst"]["ours"], &dx["worst"]["says"][0]["error"]), (&"NaN".into(), &"inf".into()));
    assert!(!json.to_string().contains("null,\"error\""), "{json}");
}

#[test]
fn a_value_that_is_no_number_never_agrees() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let report = tampered("linear-plain", |results| results.get_mut("grad.x").expect("dx")[[1, 2]] = value);
        for witness in [Witness::Definition, Witness::Differences, Witness::Duals] {
            assert_eq!(contradicted(&report, witness), ["grad.x"], "{witness} {value}");
        }
        let report = tampered("linear-plain", |results| results.get_mut("y").expect("y")[[1, 2]] = value);
        assert!(disagreeing(&report).contains(&"y"), "{value}");
    }
}

#[test]
fn a_result_that_only_one_path_has_disagrees() {
    let name = "grad.lora_magnitude_vector";
    let remove = |results: &mut Tensors| drop(results.remove(name));
    let missing = Altered { evaluated: Box::new(|_, results| remove(results)), ..Altered::default() };
    assert_eq!(disagreeing(&check_altered(&missing, "linear-plain")), [name]);
    let undefined = Altered { defined: Box::new(remove), ..Altered::default() };
    assert_eq!(disagreeing(&check_altered(&undefined, "linear-plain")), [name]);
    let extra = |_: Precision, results: &mut Tensors| drop(results.insert("grad.scaling".into(), arr0(1.0).into_dyn()));
    let extra = Altered { evaluated: Box::new(extra), ..Altered::default() };
    assert_eq!(disagreeing(&check_altered(&extra, "linear-plain")), ["grad.scaling"]);
}

#[test]
fn a_result_that_both_paths_lack_or_have_too_much_does_not_agree() {
    let missing = tampered("linear-plain", |results| drop(results.remove("grad.lora_magnitude_vector")));
    assert!(!missing.agrees(), "a missing one: {missing}");
    let extra = tampered("linear-plain", |results| drop(results.insert("grad.scaling".into(), arr0(1.0).into_dyn())));
    assert!(!extra.agrees(), "an extra one: {extra}");
}

#[test]
fn a_result_in_another_shape_does_not_agree() {
    let flat = |results: &mut Tensors| {
        let gradient = results.get_mut("grad.lora_A").expect("dA");
        *gradient = gradient.flatten().into_owned().into_dyn();
    };
    let subject = Altered { evaluated: Box::new(move |_, results| flat(results)), ..Altered::default() };
    assert_eq!(disagreeing(&check_altered(&subject, "linear-plain")), ["grad.lora_A"]);
    let report = tampered("linear-plain", flat);
    assert!(!report.agrees(), "both paths: {report}");
}

#[test]
fn a_layer_that_panics_or_refuses_its_own_case_does_not_agree() {
    let report = tampered("linear-plain", |_| panic!("a transposed operand"));
    assert_eq!((report.agrees(), report.failure.as_deref()), (false, Some("panicked: a transposed operand")));
    let mut case = linear().draw(spec("linear-plain"), 3);
    case.tensors.remove("lora_B");
    let report = check(linear(), &case, Options::default());
    assert_eq!((report.agrees(), report.failure.as_deref()), (false, Some("lora_B: expected a tensor, found none")));
}

#[test]
fn a_gradient_of_zero_where_there_is_one_disagrees() {
    let report = tampered("linear-plain", |results| results.get_mut("grad.lora_A").expect("dA").fill(0.0));
    assert_eq!(contradicted(&report, Witness::Differences), ["grad.lora_A"]);
    assert_eq!(contradicted(&report, Witness::Duals), ["grad.lora_A"]);
}

#[test]
fn a_layer_that_gives_other_bits_the_second_time_breaks_a_law() {
    let calls = AtomicU64::new(0);
    let last_bit = |precision: Precision, results: &mut Tensors| {
        if precision == Precision::F64 && calls.fetch_add(1, Ordering::Relaxed) > 0 {
            let value = results.get_mut("grad.x").expect("dx").first_mut().expect("an element");
            *value = value.next_up();
        }
    };
    let subject = Altered { evaluated: Box::new(last_bit), ..Altered::default() };
    let report = check_altered(&subject, "linear-plain");
    assert!(report.tensors.iter().all(|tensor| tensor.verdict == Verdict::Agree));
    assert!(report.laws.iter().any(|law| law.name == "two runs give the same bits" && !law.holds));
    assert!(!report.agrees());
}

#[test]
fn one_wrong_element_of_a_large_layer_is_found_and_named() {
    let place = [201, 77];
    let report =
        tampered("linear-large", |results| results.get_mut("grad.base.weight").expect("dW")[place] *= 1.0 + 1e-6);
    let found = tensor(&report, "grad.base.weight");
    assert_eq!(worst_place(found), Place::Element(place.to_vec()));
    for witness in [Witness::Differences, Witness::Duals] {
        assert_eq!(contradicted(&report, witness), ["grad.base.weight"], "{witness}");
        let says = found.witness(witness).expect("its word");
        assert_eq!(says.worst.place, Place::Element(place.to_vec()), "{witness}");
        // Looking at every element would find it too, but not in time.
        assert!(says.elements < 20, "{}", says.elements);
    }
}

/// A function by its forward and backward.
struct Hand<F, B> {
    forward: F,
    backward: B,
    affine: bool,
}

impl<F, B> Function for Hand<F, B>
where
    F: Fn(&Tensors) -> ArrayD<f64> + Sync,
    B: Fn(&Tensors, &ArrayD<f64>) -> Tensors + Sync,
{
    fn name(&self) -> &str {
        "hand"
    }
    fn forward(&self, inputs: &Tensors) -> Result<ArrayD<f64>> {
        Ok((self.forward)(inputs))
    }
    fn backward(&self, inputs: &Tensors, dy: &ArrayD<f64>) -> Result<Tensors> {
        Ok((self.backward)(inputs, dy))
    }
    fn is_affine(&self, _input: &str) -> bool {
        self.affine
    }
}

fn named(x: ArrayD<f64>) -> Tensors {
    Tensors::from([("x".to_string(), x)])
}

/// Checks `y_i = f(i, x_i)` whose hand gradient is `dy_i df(i, x_i)`.
fn elementwise(
    affine: bool,
    x: ArrayD<f64>,
    f: impl Fn(usize, f64) -> f64 + Sync,
    df: impl Fn(usize, f64) -> f64 + Sync,
) -> CaseReport {
    let map = |x: &ArrayD<f64>, f: &dyn Fn(usize, f64) -> f64| {
        let values = x.iter().enumerate().map(|(i, &x)| f(i, x)).collect();
        ArrayD::from_shape_vec(x.raw_dim(), values).expect("as many")
    };
    let function = Hand {
        forward: |inputs: &Tensors| map(&inputs["x"], &f),
        backward: |inputs: &Tensors, dy: &ArrayD<f64>| named(map(&inputs["x"], &df) * dy),
        affine,
    };
    gradcheck(&function, &named(x), Options::default())
}

fn verdict(report: &CaseReport) -> Verdict {
    assert_eq!(report.agrees(), report.tensors[0].verdict == Verdict::Agree, "{report}");
    report.tensors[0].verdict
}

/// `[100, 500]` numbers within [-1, 1).
fn many() -> ArrayD<f64> {
    ArrayD::from_shape_fn(vec![100, 500], |at| ((500 * at[0] + at[1]) * 7919 % 65536) as f64 / 32768.0 - 1.0)
}

#[test]
fn one_wrong_element_of_fifty_thousand_is_found_and_named() {
    let right = |_: usize, x: f64| 1.0 - x.tanh().powi(2);
    for wrong in [0, 31_337, 49_999] {
        let df = |i: usize, x: f64| right(i, x) * if i == wrong { 1.0 + 1e-6 } else { 1.0 };
        let report = elementwise(false, many(), |_, x| x.tanh(), df);
        assert_eq!(verdict(&report), Verdict::Disagree);
        let place = Place::Element(vec![wrong / 500, wrong % 500]);
        assert_eq!((&worst_place(&report.tensors[0]), &report.tensors[0].witnesses[0].worst.place), (&place, &place));
    }
    assert_eq!(verdict(&elementwise(false, many(), |_, x| x.tanh(), right)), Verdict::Agree);
}

#[test]
fn one_wrong_element_of_fifty_thousand_is_found_where_every_output_depends_on_it() {
    let wrong = 12_345;
    // y = |x|^2 and a linear sum: one output is a sum over all elements.
    let report = |factor: f64| {
        let forward = |inputs: &Tensors| {
            let x = &inputs["x"];
            array![x.iter().map(|x| x * x).sum::<f64>(), x.sum()].into_dyn()
        };
        let backward = |inputs: &Tensors, dy: &ArrayD<f64>| {
            let mut gradient = inputs["x"].mapv(|x| 2.0 * x * dy[0] + dy[1]);
            *gradient.iter_mut().nth(wrong).expect("an element") *= factor;
            named(gradient)
        };
        let function = Hand { forward, backward, affine: false };
        gradcheck(&function, &named(many()), Options::default())
    };
    assert_eq!(verdict(&report(1.001)), Verdict::Disagree);
    let found = report(1.001);
    assert_eq!(worst_place(&found.tensors[0]), Place::Element(vec![wrong / 500, wrong % 500]));
}

#[test]
fn two_elements_of_a_large_gradient_that_are_swapped_are_found_whatever_the_seed() {
    // y = W x; dW = dy x, two elements of it exchanged.
    let x: Vec<f64> = (0..80).map(|i| f64::from(i * 37 % 64) / 32.0 - 1.0).collect();
    let forward = |inputs: &Tensors| {
        let rows = inputs["w"].rows().into_iter().map(|row| row.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>());
        ndarray::Array1::from_iter(rows).into_dyn()
    };
    let backward = |_: &Tensors, dy: &ArrayD<f64>| {
        let mut dw = ArrayD::from_shape_fn(vec![80, 80], |at| dy[at[0]] * x[at[1]]);
        let (one, other) = (dw[[10, 11]], dw[[11, 10]]);
        (dw[[10, 11]], dw[[11, 10]]) = (other, one);
        Tensors::from([("w".to_string(), dw)])
    };
    let weight =
        ArrayD::from_shape_fn(vec![80, 80], |at| f64::from((at[0] * 80 + at[1]) as u32 * 7919 % 4096) / 4096.0);
    let inputs = Tensors::from([("w".to_string(), weight)]);
    for seed in 0..20 {
        let options = Options { seed, ..Options::default() };
        let report = gradcheck(&Hand { forward, backward, affine: true }, &inputs, options);
        assert_eq!(verdict(&report), Verdict::Disagree, "seed {seed}");
    }
}

#[test]
fn a_function_that_is_another_at_the_point_alone_is_not_agreed_with() {
    for f in [|x: f64| if x == 0.0 { 0.0 } else { 1.0 }, |x: f64| if x == 0.0 { 1.0 } else { x }] {
        let report = elementwise(false, array![0.0].into_dyn(), |_, x| f(x), |_, _| 0.0);
        assert_ne!(verdict(&report), Verdict::Agree, "{report}");
    }
}

#[test]
fn a_function_that_repeats_itself_at_every_power_of_two_is_no_line() {
    let triangle = |x: f64| ((x + 0.25).rem_euclid(1.0) - 0.5).abs();
    for f in [triangle, |x: f64| x.rem_euclid(1.0)] {
        let report = elementwise(true, array![0.25].into_dyn(), |_, x| f(x), |_, _| 0.0);
        assert_ne!(verdict(&report), Verdict::Agree, "{report}");
    }
}

#[test]
fn a_y_without_elements_breaks_a_law() {
    let forward = |_: &Tensors| ArrayD::zeros(vec![0]);
    let backward = |_: &Tensors, _: &ArrayD<f64>| named(array![0.0].into_dyn());
    let report =
        gradcheck(&Hand { forward, backward, affine: true }, &named(array![0.5].into_dyn()), Options::default());
    assert!(!report.agrees(), "{report}");
}

#[test]
fn a_kink_at_the_point_is_unresolved() {
    let relu = |x: f64| x.max(0.0);
    for affine in [false, true] {
        for f in [f64::abs, relu, |x: f64| x.min(0.0), |x: f64| x.abs() + x * x] {
            for gradient in [0.0, 0.5, 1.0, -1.0] {
                let report = elementwise(affine, array![0.0].into_dyn(), |_, x| f(x), |_, _| gradient);
                assert_ne!(verdict(&report), Verdict::Agree, "{gradient}: {report}");
            }
            let middle = (f(1.0) - f(-1.0)) / 2.0;
            for gradient in [0.0, middle] {
                let report = elementwise(affine, array![0.0].into_dyn(), |_, x| f(x), |_, _| gradient);
                assert_eq!(verdict(&report), Verdict::Unresolved, "{gradient}: {report}");
            }
        }
    }
}

#[test]
fn a_kink_in_one_element_of_several_is_unresolved_and_named() {
    let x = array![0.75, -0.5, 0.0, 0.25].into_dyn();
    for affine in [false, true] {
        // One output an element, then one output of all elements.
        let apart = elementwise(
            affine,
            x.clone(),
            |i, x| if i == 2 { x.abs() } else { 3.0 * x },
            |i, _| {
                if i == 2 { 0.0 } else { 3.0 }
            },
        );
        let forward = |inputs: &Tensors| {
            let x = &inputs["x"];
            arr0(3.0 * (x[0] + x[1] + x[3]) + x[2].max(0.0)).into_dyn()
        };
        let backward = |_: &Tensors, dy: &ArrayD<f64>| named(array![3.0, 3.0, 0.0, 3.0].into_dyn() * dy.sum());
        let function = Hand { forward, backward, affine };
        let together = gradcheck(&function, &named(x.clone()), Options::default());
        for report in [apart, together] {
            assert_eq!(verdict(&report), Verdict::Unresolved, "{report}");
            assert_eq!(worst_place(&report.tensors[0]), Place::Element(vec![2]));
        }
    }
}

#[test]
fn a_kink_in_one_of_fifty_thousand_elements_is_unresolved() {
    let mut x = many();
    let kink = 24_680;
    *x.iter_mut().nth(kink).expect("an element") = 0.0;
    let f = |i: usize, x: f64| if i == kink { x.abs() } else { x.exp() };
    let df = |i: usize, x: f64| if i == kink { 0.0 } else { x.exp() };
    assert_eq!(verdict(&elementwise(false, x, f, df)), Verdict::Unresolved);
}

#[test]
fn a_kink_near_the_point_neither_lets_a_wrong_gradient_pass_nor_condemns_a_right_one() {
    type Kinked = (fn(f64, f64) -> f64, fn(f64, f64) -> f64);
    // Functions of the distance to the kink and of x, with their derivatives.
    let kinked: [Kinked; 5] = [
        (|d, _| d.abs(), |d, _| d.signum()),
        (|d, _| d.max(0.0), |d, _| if d > 0.0 { 1.0 } else { 0.0 }),
        (|d, x| x.exp() + d.abs(), |d, x| x.exp() + d.signum()),
        (|d, x| x * x + 1e-3 * d.max(0.0), |d, x| 2.0 * x + if d > 0.0 { 1e-3 } else { 0.0 }),
        (|d, x| 5.0 * x + 1e-6 * d.abs(), |d, _| 5.0 + 1e-6 * d.signum()),
    ];
    for affine in [false, true] {
        for x in [0.0, 1.0, -0.7, 0.3] {
            for distance in [1e-3, -1e-3, 1e-4, 0.1, -1.0] {
                for (which, (f, df)) in kinked.iter().enumerate() {
                    let kink = x + distance;
                    let of = |factor: f64, offset: f64| {
                        let (f, df) = (|_, x| f(x - kink, x), |_, x| factor * df(x - kink, x) + offset);
                        elementwise(affine, array![x].into_dyn(), f, df)
                    };
                    let place = format!("{which} at {x} by {distance}, affine {affine}");
                    let right = of(1.0, 0.0);
                    assert_ne!(verdict(&right), Verdict::Disagree, "{place}: {right}");
                    // The slope of the other side, of the middle, and others.
                    for (factor, offset) in [(1.0, 1e-7), (0.0, 0.0), (-1.0, 0.0), (0.5, 0.0), (1.0 + 1e-6, 0.0)] {
                        let wrong = of(factor, offset);
                        let zero = df(x - kink, x) == 0.0 && offset == 0.0;
                        assert!(zero || verdict(&wrong) != Verdict::Agree, "{place}, {factor} {offset}: {wrong}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_function_that_falsely_claims_to_be_affine_is_not_agreed_with() {
    let curved: [Pair; 4] = [
        (|x| x * x, |x| 2.0 * x),
        (|x| x * x * x, |x| 3.0 * x * x),
        (f64::tanh, |x| 1.0 - x.tanh().powi(2)),
        (f64::abs, f64::signum),
    ];
    for (f, df) in curved {
        for x in [0.5, -1.0, 0.0] {
            let report = elementwise(true, array![x].into_dyn(), |_, x| f(x), |_, x| df(x));
            assert_ne!(verdict(&report), Verdict::Agree, "at {x}: {report}");
        }
    }
}

#[test]
fn the_chord_of_a_function_that_falsely_claims_to_be_affine_is_not_its_gradient() {
    // Odd functions at 0: the slopes on both sides are the same at any one step.
    for f in [|x: f64| x * x * x, f64::tanh] {
        for step in [8.0, 16.0, 32.0] {
            let report = elementwise(true, array![0.0].into_dyn(), |_, x| f(x), |_, _| f(step) / step);
            assert_ne!(verdict(&report), Verdict::Agree, "{step}: {report}");
        }
    }
}

#[test]
fn kinks_on_both_sides_nearer_than_the_last_step_are_not_stepped_over() {
    // Flat up to 5e-4, then steep up to 1e-3, then x itself: from 1e-3 on every chord through 0 has slope 1.
    let f = |_: usize, x: f64| {
        let beyond = (2.0 * (x.abs() - 5e-4)).max(0.0);
        x.signum() * beyond.min(x.abs())
    };
    let right = elementwise(false, array![0.0].into_dyn(), f, |_, _| 0.0);
    assert_ne!(verdict(&right), Verdict::Disagree, "{right}");
    let wrong = elementwise(false, array![0.0].into_dyn(), f, |_, _| 1.0);
    assert_ne!(verdict(&wrong), Verdict::Agree, "{wrong}");
}

#[test]
fn a_small_output_may_curve_much_more_than_a_large_one_beside_it() {
    let judge = |factor: f64| {
        let forward = |inputs: &Tensors| {
            let x = inputs["x"][0];
            array![4000.0 * x, (60.0 * x).sin()].into_dyn()
        };
        let backward = |inputs: &Tensors, dy: &ArrayD<f64>| {
            let x = inputs["x"][0];
            named(array![4000.0 * dy[0] + factor * 60.0 * (60.0 * x).cos() * dy[1]].into_dyn())
        };
        let function = Hand { forward, backward, affine: false };
        verdict(&gradcheck(&function, &named(array![0.75].into_dyn()), Options::default()))
    };
    assert_eq!([1.0, 1.0 + 1e-6, 0.0].map(judge), [Verdict::Agree, Verdict::Disagree, Verdict::Disagree]);
}

#[test]
fn a_right_gradient_of_a_smooth_function_is_never_condemned_by_a_lucky_extrapolation() {
    let right = elementwise(
        false,
        array![1.0].into_dyn(),
        |_, x| x + 1.0 / (1.0 + x * x),
        |_, x| 1.0 - 2.0 * x / (1.0 + x * x).powi(2),
    );
    assert_ne!(verdict(&right), Verdict::Disagree, "{right}");
}

#[test]
fn a_right_gradient_of_a_fast_wave_is_never_condemned() {
    for frequency in [50.0, 100.0, 200.0, 201.0, 400.0, 1000.0] {
        let f = |_: usize, x: f64| (frequency * x).sin();
        let right = elementwise(false, array![0.1].into_dyn(), f, |_, x| frequency * (frequency * x).cos());
        assert_ne!(verdict(&right), Verdict::Disagree, "{frequency}: {right}");
    }
}

#[test]
fn a_right_gradient_beside_a_line_is_never_condemned_by_a_lucky_extrapolation() {
    // The line sets where the ladder starts, far outside the radius of convergence of the other output.
    let forward = |inputs: &Tensors| {
        let x = inputs["x"][0];
        array![x, 1.0 / (1.0 + x * x)].into_dyn()
    };
    let backward = |inputs: &Tensors, dy: &ArrayD<f64>| {
        let x = inputs["x"][0];
        named(array![dy[0] - dy[1] * 2.0 * x / (1.0 + x * x).powi(2)].into_dyn())
    };
    let function = Hand { forward, backward, affine: false };
    let report = gradcheck(&function, &named(array![1.0].into_dyn()), Options::default());
    assert_ne!(verdict(&report), Verdict::Disagree, "{report}");
}

#[test]
fn a_gradient_that_is_no_number_disagrees() {
    for affine in [false, true] {
        for x in [1.0, 0.1] {
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let (f, df) = (|_: usize, x: f64| 3.0 * x, |i: usize, _: f64| if i == 1 { value } else { 3.0 });
                let report = elementwise(affine, array![x, x, x].into_dyn(), f, df);
                assert_eq!(verdict(&report), Verdict::Disagree, "{value} at {x}, affine {affine}: {report}");
            }
        }
    }
}

#[test]
fn a_y_that_is_no_number_disagrees() {
    for affine in [false, true] {
        for value in [f64::NAN, f64::INFINITY] {
            let f = |i: usize, x: f64| if i == 1 { value * x } else { 3.0 * x };
            let report = elementwise(affine, array![1.0, 2.0, 3.0].into_dyn(), f, |_, _| 3.0);
            assert_eq!(verdict(&report), Verdict::Disagree, "{value}, affine {affine}: {report}");
        }
    }
}

#[test]
fn small_gradients_are_judged_by_their_own_size() {
    for affine in [false, true] {
        let judge = |slope: f64, gradient: f64| {
            verdict(&elementwise(affine, array![0.75, -1.5].into_dyn(), |_, x| slope * x, |_, _| gradient))
        };
        for slope in [1e-20, 1e-30, 1e-100] {
            assert_eq!(judge(slope, slope), Verdict::Agree, "{slope}");
            assert_eq!(judge(slope, slope * 1.001), Verdict::Disagree, "{slope}");
            assert_eq!(judge(slope, slope * (1.0 + 1e-9)), Verdict::Disagree, "{slope}");
            assert_eq!(judge(slope, 0.0), Verdict::Disagree, "{slope}");
        }
    }
    let small = |_: usize, x: f64| 1e-30 * x.exp();
    let judge = |factor: f64| verdict(&elementwise(false, array![0.5].into_dyn(), small, |i, x| factor * small(i, x)));
    assert_eq!([1.0, 1.001, 0.0].map(judge), [Verdict::Agree, Verdict::Disagree, Verdict::Disagree]);
}

#[test]
fn a_small_gradient_beside_a_large_one_is_not_taken_on_trust() {
    let f = |i: usize, x: f64| if i == 1 { 1e-20 * x } else { x };
    for gradient in [0.0, 1.001e-20] {
        let df = |i: usize, _: f64| if i == 1 { gradient } else { 1.0 };
        let report = elementwise(false, array![0.5, 0.5].into_dyn(), f, df);
        assert_ne!(verdict(&report), Verdict::Agree, "{report}");
    }
}

#[test]
fn outputs_that_are_too_large_to_move_condemn_no_gradient_below_their_rounding_and_every_one_above() {
    for (gradient, expected) in [(0.0, Verdict::Agree), (1e-20, Verdict::Agree), (1e-12, Verdict::Disagree)] {
        let report = elementwise(false, array![0.5].into_dyn(), |_, x| 1.0 + 1e-20 * x, |_, _| gradient);
        assert_eq!(verdict(&report), expected, "{gradient}: {report}");
    }
}

#[test]
fn a_function_that_is_not_defined_everywhere_is_looked_at_where_it_is() {
    let functions: [Pair; 2] = [(f64::sqrt, |x| 0.5 / x.sqrt()), (f64::ln, f64::recip)];
    for x in [array![0.5, 0.75], array![0.05, 16.0]] {
        for (f, df) in functions {
            let judge =
                |factor: f64| elementwise(false, x.clone().into_dyn(), |_, x| f(x), |_, x| factor * df(x)).to_string();
            assert_eq!(judge(1.0), "hand: 1 tensor agrees");
            assert!(judge(1.001).contains("DISAGREE"));
        }
    }
}

#[test]
fn a_gradient_that_is_missing_extra_or_in_another_shape_is_not_agreed_with() {
    let x = array![[0.5, -1.0, 0.25], [1.0, 2.0, -0.5]].into_dyn();
    let report = |gradients: &(dyn Fn(ArrayD<f64>) -> Tensors + Sync)| {
        let (forward, backward) =
            (|inputs: &Tensors| inputs["x"].clone() * 3.0, |_: &Tensors, dy: &ArrayD<f64>| gradients(dy * 3.0));
        gradcheck(&Hand { forward, backward, affine: true }, &named(x.clone()), Options::default())
    };
    assert!(report(&named).agrees());
    let missing = report(&|_| Tensors::new());
    assert_eq!((missing.agrees(), disagreeing(&missing)), (false, vec!["grad.x"]));
    let extra = report(&|dx| Tensors::from([("x".into(), dx.clone()), ("z".into(), dx)]));
    assert_eq!((extra.agrees(), disagreeing(&extra)), (false, vec!["grad.z"]));
    for shape in [vec![6], vec![3, 2], vec![2, 3, 1]] {
        let reshaped = report(&|dx| named(dx.into_shape_with_order(shape.clone()).expect("as many")));
        assert_eq!((reshaped.agrees(), disagreeing(&reshaped)), (false, vec!["grad.x"]), "{shape:?}");
    }
}

#[test]
fn a_gradient_in_another_memory_layout_is_the_same_gradient() {
    let forward = |inputs: &Tensors| inputs["x"].clone() * 3.0;
    let transposed = |values: ArrayD<f64>| values.reversed_axes().as_standard_layout().into_owned().reversed_axes();
    let backward = |_: &Tensors, dy: &ArrayD<f64>| named(transposed(dy * 3.0));
    let x = transposed(array![[0.5, -1.0, 0.25], [1.0, 2.0, -0.5]].into_dyn());
    let report = gradcheck(&Hand { forward, backward, affine: true }, &named(x), Options::default());
    assert!(report.agrees(), "{report}");
}

#[test]
fn a_backward_that_gives_other_bits_the_second_time_breaks_a_law() {
    let calls = AtomicU64::new(0);
    let forward = |inputs: &Tensors| inputs["x"].clone() * 3.0;
    let backward = |_: &Tensors, dy: &ArrayD<f64>| {
        let again = calls.fetch_add(1, Ordering::Relaxed) > 0;
        named(dy.mapv(|dy| if again { (3.0 * dy).next_up() } else { 3.0 * dy }))
    };
    let function = Hand { forward, backward, affine: true };
    let report = gradcheck(&function, &named(array![0.5].into_dyn()), Options::default());
    assert_eq!(report.tensors[0].verdict, Verdict::Agree);
    assert_eq!(report.laws.iter().map(|law| law.holds).collect::<Vec<_>>(), [false, true]);
    assert!(!report.agrees());
    assert!(report.to_string().contains("two runs give the same bits: not so"), "{report}");
}

#[test]
fn a_report_of_a_wrong_function_shows_the_ladder_and_one_of_a_right_function_is_a_line() {
    let functions: [Pair; 2] = [(f64::exp, f64::exp), (|x| x, |_| 1.0)];
    for (affine, (f, df)) in [false, true].into_iter().zip(functions) {
        let x = array![0.5, -0.25].into_dyn();
        let right = elementwise(affine, x.clone(), |_, x| f(x), |_, x| df(x));
        assert_eq!(right.to_string(), "hand: 1 tensor agrees");
        assert!(right.tensors[0].witnesses[0].ladder.is_empty());
        let wrong = elementwise(affine, x, |_, x| f(x), |i, x| df(x) * if i == 1 { 1.01 } else { 1.0 });
        let text = wrong.to_string();
        assert!(text.starts_with("hand: grad.x [1]: DISAGREE"), "{text}");
        let (_, steps) = text.split_once("step").expect("a ladder");
        let rungs = steps.lines().skip(1).take_while(|line| line.split_whitespace().count() == 4).count();
        assert_eq!(rungs, wrong.tensors[0].witnesses[0].ladder.len());
        assert!(rungs >= if affine { 2 } else { 9 }, "{text}");
        for word in ["ours", "differences", "off by"] {
            assert!(text.contains(word), "{text}");
        }
    }
}

fn central(f: impl Fn(f64) -> f64) -> impl FnMut(f64) -> Result<Estimate> {
    move |h| Ok(Estimate { value: (f(h) - f(-h)) / (2.0 * h), uncertainty: 2.2e-16 / h })
}

#[test]
fn the_ladder_reaches_a_smooth_derivative_and_knows_how_well() {
    for (f, derivative) in [(f64::exp as fn(f64) -> f64, 1.0), (f64::sin, 1.0), (|x| (1.0 + x).sqrt(), 0.5)] {
        let estimate = ladder(central(f), 0.25, 9).expect("an estimate");
        assert!((estimate.value - derivative).abs() <= estimate.uncertainty, "{estimate:?}");
        assert!(estimate.uncertainty < 1e-11, "{estimate:?}");
    }
}

#[test]
fn the_ladder_claims_nothing_where_there_is_no_derivative() {
    let step = ladder(central(f64::signum), 0.25, 9).expect("an estimate");
    assert!(step.uncertainty > 1.0, "{step:?}");
    let nan = ladder(central(|_| f64::NAN), 0.25, 9).expect("an estimate");
    assert!(nan.uncertainty.is_infinite(), "{nan:?}");
}

fn wora(arguments: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_wora")).args(arguments).output().expect("the command");
    (output.status.code().expect("a code"), String::from_utf8(output.stdout).expect("text"))
}

fn json(arguments: &[&str]) -> serde_json::Value {
    let (code, text) = wora(&[&["check", "--json"], arguments].concat());
    assert_eq!(code, 0);
    serde_json::from_str(&text).expect("one JSON object")
}

#[test]
fn the_list_is_one_case_a_line_that_begins_with_its_layer() {
    let (code, text) = wora(&["check", "--list"]);
    assert_eq!(code, 0);
    let names: Vec<&str> = text.lines().collect();
    let of_layers: usize = LAYERS.iter().map(|layer| layer.specs().len()).sum();
    assert_eq!(names.len(), of_layers + MODULES.len());
    for name in Settings::TYPES {
        let module = format!("module-{name}");
        assert!(names.iter().any(|name| name.starts_with(&module)), "{module} has no case");
    }
    for layer in LAYERS {
        assert!(names.iter().filter(|name| name.starts_with(layer.name())).count() >= 12, "{}", layer.name());
    }
    let (code, text) = wora(&["check", "dropout-full", "--list"]);
    assert_eq!(code, 0);
    assert!(text.lines().all(|name| name.contains("dropout-full")) && text.lines().count() > 1, "{text}");
}

#[test]
fn the_name_of_a_case_chooses_that_case_alone() {
    let (code, text) = wora(&["check", "--list"]);
    assert_eq!(code, 0);
    let name = "linear-dropout";
    assert!(text.lines().filter(|other| other.contains(name)).count() > 1, "a name that others contain");
    assert_eq!(wora(&["check", name, "--list"]), (0, format!("{name}\n")));
    let report = json(&[name]);
    let names: Vec<_> = report["cases"].as_array().expect("cases").iter().map(|case| &case["name"]).collect();
    assert_eq!(names, [name]);
}

#[test]
fn the_verbose_report_prints_the_value_of_every_witness() {
    let (code, text) = wora(&["check", "linear-plain", "--verbose", "--seed", "9"]);
    assert_eq!(code, 0);
    let report = json(&["linear-plain", "--seed", "9"]);
    let mut values = 0;
    for tensor in report["cases"][0]["tensors"].as_array().expect("tensors") {
        let heading = format!("linear-plain: {} ", tensor["name"].as_str().expect("a name"));
        let (_, rest) = text.split_once(&heading).expect("the tensor");
        for said in tensor["worst"]["says"].as_array().expect("what each says") {
            let (witness, value) =
                (said["witness"].as_str().expect("a name"), said["value"].as_f64().expect("a value"));
            let mut lines = rest.lines().skip(1).take_while(|line| line.starts_with("  "));
            let line = lines.find(|line| line.trim_start().starts_with(witness)).expect("its line");
            let printed = line.split_whitespace().nth(1).expect("a number").parse::<f64>().expect("a number");
            assert!((printed - value).abs() <= f64::EPSILON * value.abs(), "{line}: {value}");
            values += 1;
        }
    }
    assert!(values >= 8 * 3, "{values}");
}

#[test]
fn the_table_has_what_identities_are_off_by_under_their_own_head() {
    let (code, text) = wora(&["check", "linear-plain"]);
    assert_eq!(code, 0);
    let cells = |line: &str| line.split(['│', '┆']).map(|cell| cell.trim().to_string()).collect::<Vec<_>>();
    let head = text.lines().find(|line| line.contains("identities")).map(cells).expect("a head");
    let column = head.iter().position(|cell| cell == "identities").expect("a column");
    let rows: Vec<_> = text.lines().filter(|line| line.contains(": <")).map(cells).collect();
    assert!(!rows.is_empty() && rows.iter().all(|row| !row[column].is_empty()), "{text}");
}

#[test]
fn the_json_report_holds_every_witness_of_every_tensor() {
    let report = json(&["linear-plain", "--seed", "9"]);
    assert_eq!((&report["disagree"], &report["unresolved"]), (&0.into(), &0.into()));
    let tensors = report["cases"][0]["tensors"].as_array().expect("tensors");
    assert_eq!(report["agree"], tensors.len());
    let names = |list: &serde_json::Value| -> Vec<String> {
        let list = list.as_array().expect("a list").iter();
        list.map(|one| one["witness"].as_str().expect("a name").to_string()).collect()
    };
    for tensor in tensors {
        let name = tensor["name"].as_str().expect("a name");
        let all = Witness::ALL.map(|witness| witness.to_string());
        let expected = if name.starts_with("grad.") { &all[..4] } else { &all[..2] };
        assert_eq!(names(&tensor["witnesses"]), expected, "{name}");
        assert_eq!(names(&tensor["worst"]["says"]), expected, "{name}");
    }
    let identities = report["cases"][0]["identities"].as_array().expect("identities");
    let labels: Vec<_> = identities.iter().map(|one| one["label"].as_str().expect("a label")).collect();
    assert_eq!(labels, ["E49", "E49", "E50", "E51", "E52", "E54"]);
    assert_eq!(identities[2]["equation"], "<d base.weight, base.weight> = <d lora_wora_beta, lora_wora_beta>");
    assert_eq!(report["seed"], 9);
    assert_eq!(report["cases"][0]["again"], "wora check linear-plain --seed 9 --verbose");
}

#[test]
fn lists_can_be_had_as_json() {
    for mistakes in [&[][..], &["--mistakes"]] {
        let (code, text) = wora(&[&["check", "--list"], mistakes].concat());
        let names: Vec<&str> = text.lines().collect();
        let (code_of_json, json) = wora(&[&["check", "--list", "--json"], mistakes].concat());
        assert_eq!((code, code_of_json), (0, 0));
        assert_eq!(serde_json::from_str::<Vec<&str>>(&json).expect("an array"), names);
    }
}

#[test]
fn the_worst_element_is_the_one_that_is_off_by_most_of_its_budget() {
    let slopes = [1e6, 1.0];
    let report = elementwise(true, array![0.5, 0.5].into_dyn(), |i, x| slopes[i] * x, |i, _| slopes[i] + [1.0, 0.5][i]);
    assert_eq!(worst_place(&report.tensors[0]), Place::Element(vec![1]), "{report}");
}

/// A line whose dual numbers are off by a part of y.
struct OffDuals {
    slope: f64,
    off: f64,
}

impl Function for OffDuals {
    fn name(&self) -> &str {
        "off duals"
    }
    fn forward(&self, inputs: &Tensors) -> Result<ArrayD<f64>> {
        Ok(&inputs["x"] * self.slope)
    }
    fn backward(&self, _: &Tensors, dy: &ArrayD<f64>) -> Result<Tensors> {
        Ok(named(dy * self.slope))
    }
    fn forward_dual(&self, inputs: &DualTensors) -> Result<Option<ArrayD<Dual>>> {
        let Self { slope, off } = self;
        let of = |x: &Dual| Dual::constant(slope * (1.0 + off)) * *x;
        Ok(Some(inputs["x"].map(of)))
    }
}

#[test]
fn the_y_of_dual_numbers_may_differ_by_its_rounding() {
    for slope in [1e-12, 1.0, 1e12] {
        let law = |off: f64| {
            let report = gradcheck(&OffDuals { slope, off }, &named(array![0.75, -1.5].into_dyn()), Options::default());
            report.laws.iter().find(|law| law.name == "dual numbers give the same y").expect("the law").holds
        };
        assert!(law(0.0) && law(4.0 * f64::EPSILON) && !law(1e-9), "{slope}");
    }
}

#[test]
fn a_small_cotangent_is_checked_like_a_large_one() {
    for power in [-60, 0, 60] {
        for name in ["linear-plain", "linear-full"] {
            let mut case = linear().draw(spec(name), 3);
            let Some(Tensor::Float(dy)) = case.tensors.get_mut("grad.y") else { panic!("grad.y") };
            dy.mapv_inplace(|dy| dy * 2f64.powi(power));
            let report = check(linear(), &case, Options::default());
            assert!(report.agrees(), "2^{power}: {report}");
        }
    }
}

/// A chord of an affine path has its middle on it; no other path that there is has.
#[test]
fn paths_are_affine_where_they_are_said_to_be() {
    let mut found = [0, 0];
    for subject in LAYERS {
        for spec in subject.specs().iter().filter(|spec| !spec.name.contains("large")) {
            let case = subject.draw(spec, 5);
            let surrogate = subject.surrogate(&case).expect("a surrogate");
            let names = ["base.weight", "lora_magnitude_vector", "lora_wora_alpha", "lora_wora_beta"];
            for name in names.into_iter().chain(subject.lora_names()) {
                let Some(Tensor::Float(middle)) = case.tensors.get(name) else { continue };
                if !subject.is_input(&case, name).expect("a case") {
                    continue;
                }
                let at = |part: f64| {
                    let mut moved = case.clone();
                    let by = |(at, value): (usize, &f64)| value + part * (1.0 + (at % 3) as f64) / 8.0;
                    let values = middle.iter().enumerate().map(by).collect();
                    let values = ArrayD::from_shape_vec(middle.shape(), values).expect("as many");
                    moved.tensors.insert(name.into(), Tensor::Float(values.into()));
                    surrogate(&moved).expect("y")
                };
                let (below, y, above) = (at(-1.0), at(0.0), at(1.0));
                let largest = |values: &ArrayD<f64>| values.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
                let bend = largest(&(&below + &above - 2.0 * &y)) / largest(&(&above - &below)).max(largest(&y));
                let affine = subject.is_affine(&case, name).expect("a case");
                found[usize::from(affine)] += 1;
                // One element has no direction but a sign, and with a 0 for alpha or beta V moves along itself or not.
                let flat = ["one-feature", "alpha-0", "beta-0"].iter().any(|part| spec.name.contains(part));
                let straight = if affine { bend < 1e-12 } else { flat || bend > 1e-9 };
                assert!(straight, "{}: {name} bends by {bend}", spec.name);
            }
        }
    }
    assert!(found.iter().all(|&count| count > 50), "{found:?}");
}

#[test]
fn a_function_of_numbers_in_another_unit_is_judged_alike() {
    for power in [-60, -20, 0, 20, 60] {
        let unit = 2f64.powi(power);
        let judge = |off: f64| {
            let x = array![0.75, -1.5].into_dyn() * unit;
            verdict(&elementwise(false, x, |_, x| (x / unit).sin(), |_, x| (x / unit).cos() / unit * off))
        };
        assert_eq!([1.0, 1.001].map(judge), [Verdict::Agree, Verdict::Disagree], "2^{power}");
    }
}
