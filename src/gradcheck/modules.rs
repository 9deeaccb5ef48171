//! Modules and losses before the same witnesses. SPEC.md, section 13.11.

use super::function::Survey;
use super::{CaseReport, Found, Function, Identity, Law, Options, check, testify};
use crate::case::Tensors;
use crate::cases::{ModuleCase, Of, Relation};
use crate::dual::DualOver;
use crate::modules::{Pass, Signal, Targets};
use crate::registry::Entry;
use crate::traced::{Traced, gradient};
use crate::{Dual, DualTensors, Real, Result, Rounded, Scalar};
use ndarray::{ArrayD, IxDyn};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::SeedableRng;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Checks every result of a module's or a loss's case with every witness. The definition's gradients are those of
/// reverse-mode differentiation.
///
/// ```
/// use woracle::{cases::MODULES, gradcheck::{Options, check_module}};
/// let spec = MODULES.iter().find(|spec| spec.name == "module-layer_norm").unwrap();
/// assert!(check_module(&spec.draw(1), Options::default()).agrees());
/// ```
pub fn check_module(case: &ModuleCase, options: Options) -> CaseReport {
    CaseReport::of(case.spec.name, || examine(case, options, &|_| ()))
}

/// Checks a case of the registry, its numbers drawn from the seed in the options.
pub fn check_entry(entry: Entry, options: Options) -> CaseReport {
    match entry {
        Entry::Layer(layer, spec) => check(layer, &layer.draw(spec, options.seed), options),
        Entry::Module(spec) => check_module(&spec.draw(options.seed), options),
    }
}

/// `spoil` changes the results under test: nothing, or in a trial of the checker something.
fn examine(case: &ModuleCase, options: Options, spoil: &dyn Fn(&mut Tensors)) -> Result<Found> {
    let inputs = &case.inputs;
    let (mut ours, single, again) =
        (produce::<f64>(case, inputs)?, produce::<f32>(case, inputs)?, produce::<f64>(case, inputs)?);
    let laws = vec![Law::same_bits(&ours, &again)];
    spoil(&mut ours);
    let define = |traced: &BTreeMap<String, ArrayD<Traced>>| Ok(case.define(traced, Traced::constant));
    let (y, gradients) = gradient(inputs, &case.cotangent, define)?;
    let named = gradients.into_iter().map(|(name, values)| (format!("grad.{name}"), values));
    let defined: Tensors = named.chain([("y".to_string(), y)]).collect();
    let expected = roundings(case);
    let function = OfModule { case, ours: &ours };
    let y = function.forward(inputs)?;
    let survey =
        Survey { function: &function, inputs, cotangent: &case.cotangent, y: &y, expected: Some(&expected), options };
    let tensors = testify([&ours, &single, &defined], &survey)?;
    let identities = case.spec.identities.iter().filter_map(|relation| identity(case, *relation, &ours, &expected));
    Ok(Found { tensors, identities: identities.collect(), laws })
}

/// y and every gradient by the production path.
fn produce<T: Scalar>(case: &ModuleCase, inputs: &Tensors) -> Result<Tensors> {
    let cast = |values: &ArrayD<f64>| values.mapv(T::from_f64);
    let widened = |values: ArrayD<T>| values.mapv(T::as_f64);
    let dy = cast(&case.cotangent);
    if let Of::Loss(loss) = case.spec.of {
        let targets = match case.targets.as_ref().expect("targets of a loss") {
            Targets::Classes(classes) => Targets::Classes(classes.clone()),
            Targets::Values(values) => Targets::Values(cast(values)),
        };
        let (loss, dx) = loss.evaluate(cast(&inputs["x"]), &targets)?;
        let loss = ArrayD::from_elem(IxDyn(&[]), loss);
        let dx = dx * dy[IxDyn(&[])];
        return Ok(Tensors::from([("y".into(), widened(loss)), ("grad.x".into(), widened(dx))]));
    }
    let settings = case.settings.as_ref().expect("settings of a module");
    let mut module = settings.build::<T>(&mut Pcg64::seed_from_u64(case.seed))?;
    for (name, mut values) in module.parameters_mut() {
        values.assign(&cast(&inputs[&name]));
    }
    let x = match &case.ids {
        Some(ids) => Signal::Ids(ids.clone()),
        None => Signal::Values(cast(&inputs["x"])),
    };
    let (y, backward) = module.forward(x, &Pass::training(case.seed))?;
    let back = backward(dy)?;
    let named = back.parameters.into_iter().chain(back.x.map(|dx| ("x".to_string(), dx)));
    let gradients = named.map(|(name, values)| (format!("grad.{name}"), widened(values)));
    Ok(gradients.chain([("y".to_string(), widened(y))]).collect())
}

/// Every result of the definition with its rounding: y, and each element of a gradient by a dual number of its own.
fn roundings(case: &ModuleCase) -> BTreeMap<String, ArrayD<Rounded>> {
    let exact: BTreeMap<String, ArrayD<Rounded>> =
        case.inputs.iter().map(|(name, values)| (name.clone(), values.mapv(Rounded::exact))).collect();
    let mut all = BTreeMap::from([("y".to_string(), case.define(&exact, Rounded::exact))]);
    for (name, values) in &exact {
        let along = |element: usize| {
            let mut inputs: BTreeMap<String, ArrayD<DualOver<Rounded>>> = exact
                .iter()
                .map(|(name, values)| (name.clone(), values.mapv(|re| DualOver { re, eps: Rounded::exact(0.0) })))
                .collect();
            let moving = inputs.get_mut(name).expect("an input").iter_mut().nth(element).expect("an element");
            moving.eps = Rounded::exact(1.0);
            let y = case.define(&inputs, |value| DualOver { re: Rounded::exact(value), eps: Rounded::exact(0.0) });
            let terms = y.iter().zip(&case.cotangent).map(|(y, &dy)| y.eps * Rounded::exact(dy));
            terms.fold(Rounded::exact(0.0), |sum, term| sum + term)
        };
        let elements: Vec<_> = (0..values.len()).into_par_iter().map(along).collect();
        all.insert(format!("grad.{name}"), ArrayD::from_shape_vec(values.shape(), elements).expect("one an element"));
    }
    all
}

/// A sum of results, each with what its elements are weighed with.
type Weighed = Vec<(String, ArrayD<f64>)>;

/// What a relation says of a case: both sides by the results under test, and with their rounding.
fn identity(
    case: &ModuleCase,
    relation: Relation,
    ours: &Tensors,
    expected: &BTreeMap<String, ArrayD<Rounded>>,
) -> Option<Identity> {
    let own = |name: &str| (format!("grad.{name}"), case.inputs[name].clone());
    let ones = |name: &str, factor: f64| {
        let result = if name == "y" { name.to_string() } else { format!("grad.{name}") };
        (result.clone(), ours[&result].mapv(|_| factor))
    };
    let output = || ("y".to_string(), case.cotangent.clone());
    let less = |side: Weighed, name: &str| match name {
        "" => side,
        name => side.into_iter().chain([(format!("grad.{name}"), case.inputs[name].mapv(|value| -value))]).collect(),
    };
    let of = |names: &[&str]| names.iter().map(|name| own(name)).collect::<Weighed>();
    let (label, equation, left, right, constant): (_, String, Weighed, Weighed, f64) = match relation {
        Relation::LinearInX(bias) => {
            ("E125", "<dx, x> = <dy, y - b>".into(), of(&["x"]), less(vec![output()], bias), 0.0)
        }
        Relation::LinearInWeight(weight, bias) => {
            let equation = format!("<d {weight}, {weight}> = <dy, y - b>");
            ("E126", equation, of(&[weight]), less(vec![output()], bias), 0.0)
        }
        Relation::NothingInSum => ("E127", "sum dx = 0".into(), vec![ones("x", 1.0)], vec![], 0.0),
        Relation::Through([], _) => {
            ("E128", "sum d weight = sum dx".into(), vec![ones("weight", 1.0)], vec![ones("x", 1.0)], 0.0)
        }
        Relation::Through(left, right) => {
            let words =
                |names: &[&str]| names.iter().map(|name| format!("<d {name}, {name}>")).collect::<Vec<_>>().join(" + ");
            ("E128", format!("{} = {}", words(left), words(right)), of(left), of(right), 0.0)
        }
        Relation::Tanh => {
            let weights = &case.cotangent * &ours["y"];
            let left = vec![ones("x", 1.0), ("y".to_string(), weights)];
            ("E129", "sum dx + <dy y, y> = sum dy".into(), left, vec![], case.cotangent.sum())
        }
        Relation::Reflection => {
            let left = vec![("grad.x".to_string(), case.cotangent.mapv(|dy| 1.0 / dy))];
            ("E130", "sum dx / dy = half as many as there are".into(), left, vec![], case.cotangent.len() as f64 / 2.0)
        }
        Relation::Square => {
            let Some(Targets::Values(targets)) = &case.targets else { return None };
            let left = vec![("grad.x".to_string(), &case.inputs["x"] - targets)];
            let right = vec![("y".to_string(), case.cotangent.mapv(|dy| 2.0 * dy))];
            ("E131", "<dx, x - t> = 2 <dy, y>".into(), left, right, 0.0)
        }
    };
    let value = |side: &Weighed, constant: f64| {
        let start = (constant, Rounded::exact(constant));
        side.iter().fold(start, |sum, (name, weights)| {
            let elements = ours[name].iter().zip(&expected[name]).zip(weights);
            elements.fold(sum, |(sum, rounded), ((&ours, &expected), &weight)| {
                (sum + ours * weight, rounded + expected * Rounded::constant(weight))
            })
        })
    };
    Identity::judged(label, equation, value(&left, 0.0), value(&right, constant))
}

/// The production forward of a case as a function of its inputs.
struct OfModule<'a> {
    case: &'a ModuleCase,
    ours: &'a Tensors,
}

impl Function for OfModule<'_> {
    fn name(&self) -> &str {
        self.case.spec.name
    }
    fn forward(&self, inputs: &Tensors) -> Result<ArrayD<f64>> {
        Ok(produce::<f64>(self.case, inputs)?.remove("y").expect("y"))
    }
    fn backward(&self, _: &Tensors, _: &ArrayD<f64>) -> Result<Tensors> {
        Ok(self.ours.clone())
    }
    fn forward_dual(&self, inputs: &DualTensors) -> Result<Option<ArrayD<Dual>>> {
        Ok(Some(self.case.define(inputs, Dual::constant)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::MODULES;
    use crate::gradcheck::{Verdict, Witness};

    /// E81 to E131: a wrong line is contradicted by its definition, by differences or by dual numbers.
    #[test]
    fn every_module_agrees_with_every_witness() {
        for seed in 0..3 {
            for spec in MODULES {
                let report = check_module(&spec.draw(seed), Options::default());
                assert!(report.agrees(), "{report}");
                let gradients: Vec<_> = report.tensors.iter().filter(|tensor| tensor.name != "y").collect();
                for tensor in gradients {
                    for witness in [Witness::Definition, Witness::F32, Witness::Differences, Witness::Duals] {
                        assert!(tensor.witness(witness).is_some(), "{}: no {witness} of {}", spec.name, tensor.name);
                    }
                }
                assert!(!report.identities.is_empty(), "{}: no identity", spec.name);
            }
        }
    }

    #[test]
    fn a_gradient_that_is_a_little_wrong_disagrees_with_every_witness() {
        for spec in MODULES {
            let case = spec.draw(1);
            for name in produce::<f64>(&case, &case.inputs).unwrap().into_keys().filter(|name| name != "y") {
                let spoil = |ours: &mut Tensors| {
                    let values = ours.get_mut(&name).unwrap();
                    let largest = values.iter().copied().fold(0.0, |a: f64, b| if b.abs() > a.abs() { b } else { a });
                    values
                        .iter_mut()
                        .filter(|value| **value == largest)
                        .for_each(|value| *value += 1e-3 * (1.0 + value.abs()));
                };
                let found = examine(&case, Options::default(), &spoil).unwrap();
                let tensor = found.tensors.iter().find(|tensor| tensor.name == name).unwrap();
                for comparison in &tensor.witnesses {
                    assert_eq!(
                        comparison.verdict,
                        Verdict::Disagree,
                        "{}: {} of {name}",
                        spec.name,
                        comparison.witness
                    );
                }
            }
        }
    }
}
