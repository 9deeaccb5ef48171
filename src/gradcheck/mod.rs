//! The gradient checker: the hand-derived backward against witnesses that know nothing of it.
//!
//! Every tensor gets one of three verdicts. *Agree*: every element lies within its budget. *Disagree*: one
//! does not, or is not a number. *Unresolved*: the budget is too wide to say. Only the first passes.
//! SPEC.md, section 8.
//!
//! ```
//! use woracle::{gradcheck::{Options, check}, registry};
//! let linear = registry::layer("linear")?;
//! let spec = linear.specs().iter().find(|spec| spec.name == "linear-full").unwrap();
//! let report = check(linear, &linear.draw(spec, 1), Options::default());
//! assert!(report.agrees());
//! # Ok::<(), woracle::Error>(())
//! ```

mod comparison;
mod differences;

pub use comparison::{Comparison, Verdict, Worst};
pub use differences::{Estimate, ladder};

use crate::case::{Case, Tensor, Tensors};
use crate::registry::{Precision, Subject};
use crate::{Result, Scalar};
use ndarray::ArrayD;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How a check is run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Picks the elements that are checked of a large tensor.
    pub seed: u64,
    /// A case with more elements of x and W together is checked at sampled elements by differences.
    pub large: usize,
    /// How many elements of each tensor are sampled then.
    pub samples: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { seed: 0, large: 10_000, samples: 12 }
    }
}

/// The error beyond which differences say nothing, in parts of the gradient or of the terms it is the sum of
/// (their root of summed squares), whichever is larger: a wider budget is unresolved.
pub const RESOLUTION: f64 = 1e-9;

/// How many times the rounding error to expect a difference between two computations may be.
const SLACK: f64 = 8.0;
/// Steps of the ladder where the function is curved.
const RUNGS: usize = 9;
/// The ladder starts where halving the step changes the outputs' differences by less than this part of them:
/// within about a quarter of the radius of convergence.
const CURVATURE: f64 = 1.0 / 16.0;

/// What was found for one case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// The case.
    pub name: String,
    /// Its tensors: y, then every gradient.
    pub tensors: Vec<TensorReport>,
    /// Why the case could not be run at all.
    pub failure: Option<String>,
}

/// What every witness says of one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// The name in a case file.
    pub name: String,
    /// One comparison a witness.
    pub witnesses: Vec<Comparison>,
}

impl CaseReport {
    /// Whether the case ran and every tensor agrees with every witness.
    pub fn agrees(&self) -> bool {
        self.failure.is_none() && self.tensors.iter().all(|tensor| tensor.verdict() == Verdict::Agree)
    }
}

impl TensorReport {
    /// The worst of its witnesses' verdicts.
    pub fn verdict(&self) -> Verdict {
        self.witnesses.iter().map(|witness| witness.verdict).max().unwrap_or(Verdict::Unresolved)
    }

    /// The comparison that comes closest to its budget, or exceeds it most.
    pub fn worst(&self) -> Option<&Comparison> {
        self.witnesses
            .iter()
            .max_by(|a, b| (a.verdict, a.worst.excess()).partial_cmp(&(b.verdict, b.worst.excess())).expect("no NaN"))
    }
}

/// Checks every result of a case with every witness. A layer that fails or panics on a case does not agree.
pub fn check(subject: &dyn Subject, case: &Case, options: Options) -> CaseReport {
    let examined = catch_unwind(AssertUnwindSafe(|| examine(subject, case, options)));
    let (tensors, failure) = match examined {
        Ok(Ok(tensors)) => (tensors, None),
        Ok(Err(error)) => (vec![], Some(error.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            (vec![], Some(format!("panicked: {}", text.unwrap_or("no message"))))
        }
    };
    CaseReport { name: case.name.clone(), tensors, failure }
}

fn examine(subject: &dyn Subject, case: &Case, options: Options) -> Result<Vec<TensorReport>> {
    let ours = subject.evaluate(case, Precision::F64)?;
    let single = subject.evaluate(case, Precision::F32)?;
    let defined = subject.define(case)?;
    let roundings = subject.roundings(case)?;
    let differences = Differences::new(subject, case, &roundings, options)?;
    let mut tensors = Vec::new();
    let names: BTreeSet<&String> = ours.keys().chain(single.keys()).chain(defined.keys()).collect();
    for name in names {
        let (Some(ours), Some(single), Some(defined)) = (ours.get(name), single.get(name), defined.get(name)) else {
            // A result that only one side has is wrong, whichever side it is.
            tensors.push(TensorReport { name: name.clone(), witnesses: vec![Comparison::missing("definition")] });
            continue;
        };
        let rounded = |unit: f64| roundings[name].mapv(|roundings| SLACK * unit * roundings);
        let mut witnesses = vec![
            Comparison::of("definition", ours, defined, &rounded(f64::UNIT_ROUNDOFF)),
            Comparison::of("f32", single, ours, &rounded(f32::UNIT_ROUNDOFF)),
        ];
        if let Some(tensor) = name.strip_prefix("grad.") {
            witnesses.push(differences.compare(tensor, ours)?);
        }
        tensors.push(TensorReport { name: name.clone(), witnesses });
    }
    tensors.sort_by_key(|tensor| tensor.name.starts_with("grad."));
    Ok(tensors)
}

/// Differences of the production forward along single elements.
struct Differences<'a> {
    subject: &'a dyn Subject,
    case: &'a Case,
    forward: crate::registry::Forward,
    cotangent: &'a ArrayD<f64>,
    roundings: &'a Tensors,
    options: Options,
}

impl<'a> Differences<'a> {
    fn new(subject: &'a dyn Subject, case: &'a Case, roundings: &'a Tensors, options: Options) -> Result<Self> {
        let (forward, cotangent) = (subject.surrogate(case)?, case.values("grad.y")?);
        Ok(Self { subject, case, forward, cotangent, roundings, options })
    }

    /// Compares a gradient with differences along every element, or along sampled ones of a large case.
    fn compare(&self, tensor: &str, gradient: &ArrayD<f64>) -> Result<Comparison> {
        let affine = self.subject.is_affine(self.case, tensor)?;
        let name = format!("grad.{tensor}");
        let roundings: Vec<f64> = self.roundings[&name].iter().copied().collect();
        let ours: Vec<f64> = gradient.iter().copied().collect();
        let estimates: Vec<(usize, (Estimate, f64))> = self
            .elements(tensor, ours.len())
            .into_par_iter()
            .map_with(self.case.clone(), |case, element| Ok((element, self.along(case, tensor, element, affine)?)))
            .collect::<Result<_>>()?;
        let elements = estimates.into_iter().map(|(element, (estimate, terms))| {
            let rounding = SLACK * f64::UNIT_ROUNDOFF * roundings[element];
            let scale = ours[element].abs().max(estimate.value.abs()).max(terms).max(1.0);
            let budget = estimate.uncertainty + rounding;
            comparison::Element {
                index: element,
                ours: ours[element],
                theirs: estimate.value,
                budget,
                widest: RESOLUTION * scale,
            }
        });
        Ok(Comparison::of_elements("differences", gradient.shape(), elements))
    }

    fn elements(&self, tensor: &str, len: usize) -> Vec<usize> {
        let size =
            |name: &str| self.case.tensors.get(name).map_or(0, |tensor| tensor.shape().iter().product::<usize>());
        if size("x") + size("base.weight") <= self.options.large || len <= self.options.samples {
            return (0..len).collect();
        }
        let name_hash = tensor.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut rng = Pcg64::seed_from_u64(self.options.seed ^ name_hash);
        (0..self.options.samples).map(|_| (rng.next_u64() % len as u64) as usize).collect()
    }

    /// The derivative of `<dy, y>` along one element, and the size of its terms. `case` is scratch, and left as
    /// it was.
    fn along(&self, case: &mut Case, tensor: &str, element: usize, affine: bool) -> Result<(Estimate, f64)> {
        let at = |case: &mut Case, step: f64| -> Result<(f64, ArrayD<f64>)> {
            let before = *slot(case, tensor, element);
            let moved = before + step;
            *slot(case, tensor, element) = moved;
            let y = (self.forward)(case);
            *slot(case, tensor, element) = before;
            Ok((moved, y?))
        };
        let difference = |case: &mut Case, step: f64| -> Result<Difference> {
            let (right, plus) = at(case, step)?;
            let (left, minus) = at(case, -step)?;
            let width = right - left;
            let mut difference = Difference { value: 0.0, rounding: 0.0, outputs: Vec::new(), noise: 0.0 };
            let outputs = plus.iter().zip(&minus).zip(self.cotangent).zip(&self.roundings["y"]);
            for (((plus, minus), dy), roundings) in outputs {
                // Subtracted before it is multiplied by the cotangent: one rounding less, and outputs that
                // the element does not reach drop out exactly.
                let term = dy * (plus - minus) / width;
                let noise = if plus == minus {
                    0.0
                } else {
                    SLACK * f64::UNIT_ROUNDOFF * dy * (roundings + plus.abs() + minus.abs()) / width
                };
                difference.value += term;
                difference.noise += noise.abs();
                difference.rounding += noise.powi(2); // outputs are rounded independently of each other
                difference.outputs.push(term);
            }
            difference.rounding = difference.rounding.sqrt();
            Ok(difference)
        };
        if affine {
            // No truncation error: the larger the step, the smaller the error.
            let (near, far) = (difference(case, 0.5)?, difference(case, 1.0)?);
            let spread = (near.value - far.value).abs();
            return Ok((Estimate { value: far.value, uncertainty: far.rounding + spread }, far.terms()));
        }
        let mut step = 0.5;
        let mut wide = difference(case, step)?;
        loop {
            let narrow = difference(case, step / 2.0)?;
            if wide.curvature(&narrow) <= CURVATURE || step < f64::EPSILON {
                break;
            }
            (wide, step) = (narrow, step / 2.0);
        }
        let central = |step| difference(case, step).map(|d| Estimate { value: d.value, uncertainty: d.rounding });
        Ok((ladder(central, step, RUNGS)?, wide.terms()))
    }
}

/// A central difference of `<dy, y>`.
struct Difference {
    value: f64,
    /// Its rounding error.
    rounding: f64,
    /// What each output contributes.
    outputs: Vec<f64>,
    /// The sum of the outputs' rounding errors.
    noise: f64,
}

impl Difference {
    /// The root of the summed squares of the contributions.
    fn terms(&self) -> f64 {
        self.outputs.iter().map(|term| term * term).sum::<f64>().sqrt()
    }

    /// How much the contributions change when the step is halved, in parts of themselves, beyond rounding.
    fn curvature(&self, narrow: &Difference) -> f64 {
        let sum = |terms: &mut dyn Iterator<Item = f64>| terms.map(f64::abs).sum::<f64>();
        let change = sum(&mut self.outputs.iter().zip(&narrow.outputs).map(|(wide, narrow)| wide - narrow));
        let beyond = (change - narrow.noise).max(0.0);
        if beyond == 0.0 { 0.0 } else { beyond / sum(&mut narrow.outputs.iter().copied()) }
    }
}

/// One element of one tensor of a case, to be changed.
fn slot<'c>(case: &'c mut Case, tensor: &str, element: usize) -> &'c mut f64 {
    let Some(Tensor::Float(values)) = case.tensors.get_mut(tensor) else {
        unreachable!("a gradient is that of values")
    };
    &mut values.as_slice_mut().expect("a case holds standard layout")[element]
}
