//! The checker itself: it must find what is wrong, name it, and say so when it cannot tell.

use assert_cmd::Command;
use ndarray::ArrayD;
use woracle::Result;
use woracle::case::{Case, Tensors};
use woracle::cases::Spec;
use woracle::gradcheck::{CaseReport, Estimate, Options, Verdict, check, ladder};
use woracle::registry::{Forward, LAYERS, Precision, RoundTrip, Subject, layer};

/// The linear layer with something done to the results of its production path and, where the definition is to
/// be as wrong, to the definition's.
struct Tampered<F> {
    change: F,
    definition_too: bool,
}

impl<F: Fn(&mut Tensors) + Sync> Subject for Tampered<F> {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn specs(&self) -> &'static [Spec] {
        linear().specs()
    }
    fn draw(&self, spec: &Spec, seed: u64) -> Case {
        linear().draw(spec, seed)
    }
    fn evaluate(&self, case: &Case, precision: Precision) -> Result<Tensors> {
        let mut results = linear().evaluate(case, precision)?;
        (self.change)(&mut results);
        Ok(results)
    }
    fn define(&self, case: &Case) -> Result<Tensors> {
        let mut results = linear().evaluate(case, Precision::F64)?;
        if self.definition_too {
            (self.change)(&mut results);
        }
        Ok(results)
    }
    fn roundings(&self, case: &Case) -> Result<Tensors> {
        linear().roundings(case)
    }
    fn surrogate(&self, case: &Case) -> Result<Forward> {
        linear().surrogate(case)
    }
    fn merge(&self, case: &Case) -> Result<RoundTrip> {
        linear().merge(case)
    }
    fn is_input(&self, case: &Case, tensor: &str) -> Result<bool> {
        linear().is_input(case, tensor)
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

/// Checks a case whose production path *and* definition are wrong in the same way: differences stand alone.
fn tampered(case: &str, change: impl Fn(&mut Tensors) + Sync) -> CaseReport {
    let subject = Tampered { change, definition_too: true };
    check(&subject, &subject.draw(spec(case), 3), Options::default())
}

fn disagreeing(report: &CaseReport) -> Vec<&str> {
    let wrong = report.tensors.iter().filter(|tensor| tensor.verdict() == Verdict::Disagree);
    wrong.map(|tensor| tensor.name.as_str()).collect()
}

#[test]
fn an_untouched_layer_agrees() {
    assert!(tampered("linear-full", |_| {}).agrees());
}

#[test]
fn differences_alone_find_one_wrong_element_of_any_gradient_and_name_it() {
    let names = ["x", "lora_A", "lora_B", "lora_magnitude_vector", "lora_wora_alpha", "lora_wora_beta"];
    for name in names.iter().chain(&["base.weight", "base.bias"]) {
        let name = format!("grad.{name}");
        let report = tampered("linear-dropout-full", |results| {
            let values = results.get_mut(&name).expect("a gradient");
            *values.iter_mut().last().expect("an element") += 1e-8;
        });
        assert_eq!(disagreeing(&report), [name.as_str()]);
        let tensor = report.tensors.iter().find(|tensor| tensor.name == name).expect("its report");
        let worst = &tensor.worst().expect("a comparison").worst;
        let last = tensor.witnesses[0].worst.index.len();
        assert_eq!(worst.index.len(), last);
        assert!((worst.ours - worst.theirs).abs() > 0.9e-8, "{worst:?}");
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
        assert_eq!(disagreeing(&report), expected, "{case}");
    }
}

#[test]
fn differences_of_every_small_linear_case_are_closer_than_one_in_a_thousand_million() {
    let small = linear().specs().iter().filter(|spec| !spec.name.contains("large"));
    let mut cases = 0;
    for spec in small {
        let report = check(linear(), &linear().draw(spec, 0), Options::default());
        assert!(report.agrees(), "{}", spec.name);
        for tensor in &report.tensors {
            for witness in tensor.witnesses.iter().filter(|witness| witness.witness == "differences") {
                let worst = &witness.worst;
                assert!(worst.error < 1e-9 * worst.theirs.abs().max(1.0), "{} {}: {worst:?}", spec.name, tensor.name);
            }
        }
        cases += 1;
    }
    assert!(cases >= 12, "{cases}");
}

#[test]
fn a_nan_never_agrees() {
    let report = tampered("linear-plain", |results| {
        results.get_mut("grad.x").expect("dx").fill(f64::NAN);
    });
    assert_eq!(disagreeing(&report), ["grad.x"]);
}

#[test]
fn a_gradient_that_is_not_returned_disagrees() {
    let change = |results: &mut Tensors| drop(results.remove("grad.lora_magnitude_vector"));
    let subject = Tampered { change, definition_too: false };
    let report = check(&subject, &subject.draw(spec("linear-plain"), 3), Options::default());
    assert_eq!(disagreeing(&report), ["grad.lora_magnitude_vector"]);
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
    let report = tampered("linear-plain", |results| {
        let da = results.get_mut("grad.lora_A").expect("dA");
        *da = ArrayD::zeros(da.raw_dim());
    });
    assert_eq!(disagreeing(&report), ["grad.lora_A"]);
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

#[test]
fn the_list_is_one_case_a_line_that_begins_with_its_layer() {
    let (code, text) = wora(&["check", "--list"]);
    assert_eq!(code, 0);
    let names: Vec<&str> = text.lines().collect();
    assert_eq!(names.len(), LAYERS.iter().map(|layer| layer.specs().len()).sum::<usize>());
    for layer in LAYERS {
        assert!(names.iter().filter(|name| name.starts_with(layer.name())).count() >= 12, "{}", layer.name());
    }
    let (code, text) = wora(&["check", "dropout-full", "--list"]);
    assert_eq!(code, 0);
    assert!(text.lines().all(|name| name.contains("dropout-full")) && !text.is_empty());
}

#[test]
fn the_json_report_holds_every_witness_of_every_tensor() {
    let (code, text) = wora(&["check", "linear-plain", "--json", "--seed", "9"]);
    assert_eq!(code, 0);
    let report: serde_json::Value = serde_json::from_str(&text).expect("one JSON object");
    assert_eq!((&report["disagree"], &report["unresolved"]), (&0.into(), &0.into()));
    let tensors = report["cases"][0]["tensors"].as_array().expect("tensors");
    assert_eq!(report["agree"], tensors.len());
    for tensor in tensors {
        let witnesses = tensor["witnesses"].as_array().expect("witnesses");
        let names: Vec<_> = witnesses.iter().map(|witness| witness["witness"].as_str().expect("a name")).collect();
        let gradient = tensor["name"].as_str().expect("a name").starts_with("grad.");
        assert_eq!(names.contains(&"differences"), gradient);
        assert!(names.contains(&"definition") && names.contains(&"f32"));
    }
}
