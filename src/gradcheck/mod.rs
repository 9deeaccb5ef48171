//! The gradient checker: a hand-derived backward against witnesses of other kinds. SPEC.md, section 8.
//!
//! Every tensor gets one of three verdicts. *Agree*: every element lies within its budget. *Disagree*: one
//! does not, or is not a number. *Unresolved*: the budget is too wide to say. Only the first passes.
//!
//! A layer of this crate, against all five witnesses:
//!
//! ```
//! use woracle::{gradcheck::{Options, check}, registry};
//! let linear = registry::layer("linear")?;
//! let spec = linear.specs().iter().find(|spec| spec.name == "linear-full").unwrap();
//! let report = check(linear, &linear.draw(spec, 1), Options::default());
//! assert!(report.agrees());
//! # Ok::<(), woracle::Error>(())
//! ```
//!
//! Any function of named arrays, against differences:
//!
//! ```
//! use ndarray::{ArrayD, array};
//! use woracle::{Result, case::Tensors, gradcheck::{Function, Options, gradcheck}};
//! struct Square;
//! impl Function for Square {
//!     fn name(&self) -> &str { "square" }
//!     fn forward(&self, inputs: &Tensors) -> Result<ArrayD<f64>> { Ok(inputs["x"].mapv(|x| x * x)) }
//!     fn backward(&self, inputs: &Tensors, dy: &ArrayD<f64>) -> Result<Tensors> {
//!         Ok(Tensors::from([("x".to_string(), dy * &inputs["x"])])) // the factor 2 is missing
//!     }
//! }
//! let inputs = Tensors::from([("x".to_string(), array![0.5, -1.0].into_dyn())]);
//! let report = gradcheck(&Square, &inputs, Options::default());
//! assert!(!report.agrees());
//! println!("{report}");
//! # Ok::<(), woracle::Error>(())
//! ```

mod comparison;
mod differences;
mod duals;
mod function;
mod identities;
mod modules;
mod report;
mod slopes;
mod trial;

pub use comparison::{Comparison, Element, Place, Said, TensorReport, Verdict, Witness, Worst};
pub use differences::{Estimate, Rung, ladder};
pub use function::{Function, gradcheck};
pub use identities::Identity;
pub use modules::{check_entry, check_module};
pub use report::{CaseReport, Law};
pub use slopes::{Curve, Slope, Slopes, curve, slopes};
pub use trial::{Trial, Tried, check_mistake, try_mistake};

use crate::case::{Case, Tensor, Tensors};
use crate::registry::{Forward, Precision, Subject};
use crate::wora::{Config, NormGradient};
use crate::{Dual, DualForward, DualTensors, Result, Rounded, Scalar};
use comparison::Testimony;
use function::{Survey, shape_of};
use identities::identities;
use ndarray::ArrayD;
use report::Found;
use std::collections::{BTreeMap, BTreeSet};

/// How a check is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Picks the elements and directions that are looked along in a large function, and a function's cotangent.
    pub seed: u64,
    /// A function with more elements than this in all its inputs is not looked at along every element.
    pub large: usize,
    /// How many elements of each tensor are sampled then.
    pub samples: usize,
    /// How many random directions, each through every element of a tensor, are looked along beside them.
    pub directions: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 0, large: 4_000, samples: 4, directions: 2 }
    }
}

/// The budget beyond which differences and dual numbers say nothing, in parts of the gradient or of the terms it
/// is the sum of (their root of summed squares), or of the outputs that its difference is the difference of, whichever
/// is largest: a wider one is unresolved.
pub const RESOLUTION: f64 = 1e-11;

/// How many times the rounding error to expect a difference between two computations may be.
const SLACK: f64 = 8.0;

/// Checks every result of a case with every witness. A layer that fails or panics on a case does not agree.
pub fn check(subject: &dyn Subject, case: &Case, options: Options) -> CaseReport {
    CaseReport::of(&case.name, || examine(subject, case, options))
}

fn examine(subject: &dyn Subject, case: &Case, options: Options) -> Result<Found> {
    let before = case.clone();
    let ours = subject.evaluate(case, Precision::F64)?;
    let single = subject.evaluate(case, Precision::F32)?;
    let defined = subject.define(case)?;
    let expected = subject.roundings(case)?;
    let identities = identities(subject, case, &ours, &expected)?;
    let tensors = with_survey(subject, case, &expected, options, |survey| testify([&ours, &single, &defined], survey))?;
    let mut laws = vec![
        Law::same_bits(&ours, &subject.evaluate(case, Precision::F64)?),
        Law { name: "inputs are left as they were", holds: *case == before },
    ];
    if matches!(case.tensors.get("x"), Some(Tensor::Int(_))) {
        laws.push(Law { name: "ids get no gradient", holds: !ours.contains_key("grad.x") });
    }
    if case.settings::<Config>()?.has_norm() {
        laws.push(Law {
            name: "detached and full gradient differ",
            holds: norm_counts(subject, case, &defined, &expected)?,
        });
    }
    Ok(Found { tensors, identities, laws })
}

/// Hands `run` the surrogate of a layer at a case as what is surveyed; `expected` are its results on numbers that estimate
/// their rounding.
fn with_survey<Out>(
    subject: &dyn Subject,
    case: &Case,
    expected: &BTreeMap<String, ArrayD<Rounded>>,
    options: Options,
    run: impl FnOnce(&Survey<'_>) -> Result<Out>,
) -> Result<Out> {
    let layer = OfCase { subject, case, surrogate: subject.surrogate(case)?, dual: subject.dual(case)? };
    let differentiated = |(name, tensor): (&String, &Tensor)| match tensor {
        Tensor::Float(values) if expected.contains_key(&format!("grad.{name}")) => {
            Some((name.clone(), values.to_owned()))
        }
        _ => None,
    };
    let inputs: Tensors = case.tensors.iter().filter_map(differentiated).collect();
    let (cotangent, y) = (case.values("grad.y")?.to_owned(), layer.forward(&inputs)?);
    run(&Survey { function: &layer, inputs: &inputs, cotangent: &cotangent, y: &y, expected: Some(expected), options })
}

/// Results by the production path in f64 and in f32 and by the definition, tensor by tensor before every witness. What
/// there should be is what the survey expects.
fn testify([ours, single, defined]: [&Tensors; 3], survey: &Survey<'_>) -> Result<Vec<TensorReport>> {
    let (inputs, expected) = (survey.inputs, survey.expected.expect("results with their rounding"));
    let mut tensors = Vec::new();
    let names = [ours.keys(), single.keys(), defined.keys()].into_iter().flatten();
    let due = inputs.keys().map(|name| format!("grad.{name}"));
    for name in names.cloned().chain(due).chain(["y".into()]).collect::<BTreeSet<_>>() {
        let shape = match name.strip_prefix("grad.") {
            Some(tensor) => inputs.get(tensor).map(ArrayD::shape),
            None => expected.get(&name).map(ArrayD::shape),
        };
        let sides = [ours, single, defined].map(|all| all.get(&name));
        let [Some(ours), Some(single), Some(defined)] =
            sides.map(|side| side.filter(|side| Some(side.shape()) == shape))
        else {
            let due = shape.map_or_else(|| "none".into(), |shape| format!("shape {shape:?}"));
            let [ours, single, defined] = sides.map(shape_of);
            let mismatch = format!("expected {due}; found {ours}, in f32 {single}, by the definition {defined}");
            tensors.push(TensorReport::mismatch(name, mismatch));
            continue;
        };
        let by = |witness, theirs, unit| Testimony::of_all(witness, ours, theirs, &expected[&name], unit);
        let mut testimonies =
            vec![by(Witness::Definition, defined, f64::UNIT_ROUNDOFF), by(Witness::F32, single, f32::UNIT_ROUNDOFF)];
        if let Some(tensor) = name.strip_prefix("grad.") {
            let worst = testimonies.iter().filter_map(|testimony| testimony.worst()?.place.element());
            let also: Vec<usize> = worst.collect();
            testimonies.extend(survey.testimonies(tensor, ours, &also)?);
        }
        let shape = ours.shape().to_vec();
        tensors.push(TensorReport::new(name, &shape, testimonies));
    }
    tensors.sort_by_key(|tensor| tensor.name.starts_with("grad."));
    Ok(tensors)
}

/// Whether a gradient is so different with the other treatment of the norm that the one cannot pass for the other.
fn norm_counts(
    subject: &dyn Subject,
    case: &Case,
    defined: &Tensors,
    expected: &BTreeMap<String, ArrayD<Rounded>>,
) -> Result<bool> {
    let mut swapped = case.clone();
    let other = match case.settings::<Config>()?.norm_gradient {
        NormGradient::Full => "detached",
        NormGradient::Detached => "full",
    };
    swapped.settings.insert("norm_gradient".into(), other.into());
    let swapped = subject.define(&swapped)?;
    let far = |name: &String, values: &ArrayD<f64>| {
        let elements = values.iter().zip(&swapped[name]).zip(&expected[name]);
        elements.into_iter().any(|((a, b), expected)| (a - b).abs() > 1e3 * RESOLUTION * expected.size())
    };
    Ok(defined.iter().any(|(name, values)| name.starts_with("grad.") && far(name, values)))
}

/// The surrogate of a layer at a case, as a function of the tensors that have a gradient.
struct OfCase<'a> {
    subject: &'a dyn Subject,
    case: &'a Case,
    surrogate: Forward,
    dual: DualForward,
}

impl Function for OfCase<'_> {
    fn name(&self) -> &str {
        &self.case.name
    }
    fn forward(&self, inputs: &Tensors) -> Result<ArrayD<f64>> {
        let mut case = self.case.clone();
        case.tensors.extend(inputs.iter().map(|(name, values)| (name.clone(), Tensor::Float(values.clone().into()))));
        (self.surrogate)(&case)
    }
    fn backward(&self, _inputs: &Tensors, _dy: &ArrayD<f64>) -> Result<Tensors> {
        self.subject.evaluate(self.case, Precision::F64)
    }
    fn forward_dual(&self, inputs: &DualTensors) -> Result<Option<ArrayD<Dual>>> {
        (self.dual)(inputs).map(Some)
    }
    fn is_affine(&self, input: &str) -> bool {
        self.subject.is_affine(self.case, input).unwrap_or(false)
    }
}
