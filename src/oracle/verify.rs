//! Somebody's results against the oracle's: every answer in a case file is recomputed in f64 from the inputs as
//! stored, and every element is judged by a bound for its type. SPEC.md, section 8.5.
//!
//! ```
//! use woracle::oracle::{CaseFile, Dtype, verify::{Tolerance, Verdict, verify}};
//! use woracle::{case::Tensor, registry};
//! let linear = registry::layer("linear")?;
//! let mut case = linear.draw(&linear.specs()[0], 0);
//! case.tensors.insert("y".into(), Tensor::Float(linear.define(&case)?["y"].clone().into()));
//! let tensors = verify(&CaseFile::new(case, Dtype::F64), Tolerance::default())?;
//! assert_eq!((tensors[0].name.as_str(), tensors[0].verdict), ("y", Verdict::Pass));
//! # Ok::<(), woracle::Error>(())
//! ```

use super::judge::{Errors, judge};
use super::{CaseFile, Dtype};
use crate::case::{Case, Tensor, Tensors, unravel};
use crate::error::{check_finite, check_shape};
use crate::registry;
use crate::wora::SCALE_NAMES;
use crate::{Error, Result};
use ndarray::ArrayD;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// How many times the rounding error to expect an answer may be off, and the oracle beside it.
pub const SLACK: f64 = 4.0;

/// Answers are held against the definition too where it adds up no more products than this: it is slow.
pub const DEFINED: usize = 1 << 25;

/// The order in which results come about: the first that fails is where an implementation went wrong.
pub const STAGES: [&str; 5] = ["weighted", "weight_norm", "gain", "merged_weight", "y"];

/// What is said of a tensor or a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every element lies within its bound.
    Pass,
    /// Some element does not.
    Fail,
    /// It could not be judged.
    Error,
}

/// A bound that takes the place of the computed one: `atol + rtol |expected|`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tolerance {
    /// Relative; 0 where only the other is given.
    pub rtol: Option<f64>,
    /// Absolute; 0 where only the other is given.
    pub atol: Option<f64>,
}

/// What is said of one answer. Numbers that are not finite are `null` in JSON.
///
/// ```
/// use woracle::case::Tensors;
/// use woracle::oracle::{CaseFile, Dtype};
/// use woracle::oracle::verify::{STAGES, Tolerance, Verdict, first_diverging, verify};
/// use woracle::registry;
/// let linear = registry::layer("linear")?;
/// let mut case = linear.draw(&linear.specs()[0], 0);
/// let mut answers = linear.define(&case)?;
/// answers.retain(|name, _| STAGES.contains(&name.as_str()));
/// *answers.get_mut("gain").unwrap() *= 1.001;
/// case.extend(answers);
/// let file = CaseFile::new(case, Dtype::F64);
/// let tensors = verify(&file, Tolerance::default())?;
/// assert_eq!(first_diverging(&tensors), Some("gain")); // V and n are right
/// let gain = tensors.iter().find(|tensor| tensor.name == "gain").unwrap();
/// assert_eq!((gain.verdict, gain.beyond), (Verdict::Fail, 6)); // every unit's
/// assert!((gain.max_rel_error - 0.001).abs() < 1e-12);
/// let lenient = verify(&file, Tolerance { rtol: Some(0.01), atol: None })?;
/// assert!(lenient.iter().all(|tensor| tensor.verdict == Verdict::Pass));
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct TensorVerdict {
    /// The name in the case file.
    pub name: String,
    /// Pass or fail.
    pub verdict: Verdict,
    /// The type it is stored in, and judged by.
    pub dtype: Dtype,
    /// How many elements lie beyond their bounds.
    pub beyond: usize,
    /// The largest error over its bound; infinite where an answer is not a number.
    pub error_over_bound: f64,
    /// `max |actual - expected|`; infinite where an answer is not a number.
    pub max_abs_error: f64,
    /// `max |actual - expected| / |expected|`; infinite where 0 was expected and something else found.
    pub max_rel_error: f64,
    /// The largest error in units of the last place of the expected number, as its type has it.
    pub max_ulps: f64,
    /// Where the error is largest against its bound.
    pub worst_index: Vec<usize>,
    /// What the oracle says there.
    pub expected: f64,
    /// What the file says there.
    pub actual: f64,
    /// How far they may be apart there.
    pub bound: f64,
}

/// What the answers of a case should be, and how far off they may be.
pub(super) struct Expected {
    /// By the production path, and where that is not too slow by the definition.
    pub witnesses: Vec<Tensors>,
    /// What an answer is judged by.
    pub bounds: Tensors,
    /// The bounds by rounding of a case whose right answers are exact.
    roundings: Tensors,
}

impl Expected {
    /// Every answer of a file against it.
    pub fn judge(&self, file: &CaseFile) -> Vec<TensorVerdict> {
        let one = |(name, bound): (&String, &ArrayD<f64>)| {
            let Tensor::Float(actual) = &file.case.tensors[name] else { unreachable!("an answer has values") };
            let (witnesses, dtype) = (self.witnesses.iter().map(|witness| &witness[name]), file.dtype(name));
            let Errors { beyond, over, absolute, relative, ulps, worst } = judge(actual, witnesses, bound, dtype);
            let [expected, actual_there, bound] = worst.map_or([f64::NAN; 3], |(_, there)| there);
            TensorVerdict {
                name: name.into(),
                verdict: if beyond > 0 { Verdict::Fail } else { Verdict::Pass },
                dtype,
                beyond,
                error_over_bound: over,
                max_abs_error: absolute,
                max_rel_error: relative,
                max_ulps: ulps,
                worst_index: worst.map_or_else(Vec::new, |(element, _)| unravel(element, actual.shape())),
                expected,
                actual: actual_there,
                bound,
            }
        };
        self.bounds.iter().map(one).collect()
    }

    /// How far off the answers may be of somebody who makes a mistake: they are not exact where the right ones are.
    pub fn bounds_of_mistakes(&self) -> &Tensors {
        if self.roundings.is_empty() { &self.bounds } else { &self.roundings }
    }
}

/// Judges every answer of a case: `y`, `grad.*`, `weighted`, `weight_norm`, `gain`, `merged_weight`.
///
/// # Errors
///
/// An input that is missing, does not fit or is not finite; a tensor that no case of this layer has; a case
/// without any answer.
pub fn verify(file: &CaseFile, tolerance: Tolerance) -> Result<Vec<TensorVerdict>> {
    let expected = expected(file, tolerance)?;
    Ok(expected.judge(file))
}

/// The first of [`STAGES`] that fails, or else the first gradient.
pub fn first_diverging(tensors: &[TensorVerdict]) -> Option<&str> {
    let failed = |name: &str| tensors.iter().any(|tensor| tensor.name == name && tensor.verdict != Verdict::Pass);
    let stage = STAGES.into_iter().find(|name| failed(name));
    stage.or_else(|| tensors.iter().map(|tensor| tensor.name.as_str()).find(|name| failed(name)))
}

/// What errors are counted in: their bounds are so many times as large.
pub(super) fn unit(dtype: Dtype) -> f64 {
    SLACK * (dtype.unit_roundoff() + Dtype::F64.unit_roundoff())
}

pub(super) fn expected(file: &CaseFile, tolerance: Tolerance) -> Result<Expected> {
    let case = &file.case;
    let layer = registry::layer(&case.layer)?;
    let answers = answers(case, layer)?;
    let dtypes: BTreeSet<Dtype> = answers.iter().map(|name| file.dtype(name)).collect();
    let storages: Vec<_> = dtypes.iter().map(|dtype| dtype.storage()).collect();
    let (produced, roundings) = layer.expect(case, &storages)?;
    let mut roundings: BTreeMap<Dtype, Tensors> = dtypes.into_iter().zip(roundings).collect();
    let mut witnesses = vec![produced];
    if layer.terms(case)? <= DEFINED {
        witnesses.push(layer.define(case)?);
    }
    let (mut bounds, mut exact) = (Tensors::new(), Tensors::new());
    let is_exact = is_exact(case)?;
    for name in answers {
        let Some(expected) = witnesses[0].get(name) else {
            if name.starts_with("grad.") && !case.tensors.contains_key("grad.y") {
                let expected = format!("the cotangent, as there is {name}");
                return Err(Error::Missing { tensor: "grad.y".into(), expected }); // C7
            }
            let reason = format!("expected none: a case of {} has no tensor of this name", case.layer);
            return Err(Error::Unexpected { tensor: name.into(), reason }); // C7
        };
        let Tensor::Float(actual) = &case.tensors[name] else {
            let reason = "expected floating-point values, found integers".into();
            return Err(Error::Unexpected { tensor: name.into(), reason }); // C1
        };
        check_shape(name, expected.shape(), actual.shape())?; // C1
        for witness in &witnesses {
            check_finite(&format!("the oracle's {name}"), witness[name].view())?; // C2
        }
        let dtype = file.dtype(name);
        let mut rounding = || {
            let unit = unit(dtype);
            let least = dtype.smallest_subnormal() / 2.0;
            let error = roundings.get_mut(&dtype).and_then(|of_dtype| of_dtype.remove(name));
            let mut error = error.expect("an error of every answer");
            error.par_mapv_inplace(|rounding| unit * rounding + least);
            error
        };
        let bound = match tolerance {
            Tolerance { rtol: None, atol: None } if is_exact => {
                exact.insert(name.into(), rounding());
                ArrayD::zeros(expected.raw_dim())
            }
            Tolerance { rtol: None, atol: None } => rounding(),
            Tolerance { rtol, atol } => {
                let (rtol, atol) = (rtol.unwrap_or(0.0), atol.unwrap_or(0.0));
                expected.mapv(|expected| atol + rtol * expected.abs())
            }
        };
        bounds.insert(name.into(), bound);
    }
    if bounds.is_empty() {
        let expected = format!("an answer: grad.* or {}", STAGES.join(", "));
        return Err(Error::Missing { tensor: "y".into(), expected }); // C7
    }
    Ok(Expected { witnesses, bounds, roundings: exact })
}

/// Whether a case's tier is the one whose answers are compared without a bound. C4
fn is_exact(case: &Case) -> Result<bool> {
    match case.settings.get("tier").map(|tier| tier.as_str().ok_or(tier)) {
        None | Some(Ok("rounded")) => Ok(false),
        Some(Ok("exact")) => Ok(true),
        Some(found) => {
            let found = found.map_or_else(ToString::to_string, |word| format!("{word:?}"));
            Err(Error::Setting { name: "tier", expected: "\"rounded\" or \"exact\"".into(), found })
        }
    }
}

/// What a file could have answered and does not: y, and where there is a cotangent the gradients of the adapter. A
/// gradient that is cut off is often no tensor of zeros but none at all.
///
/// # Errors
///
/// A layer that the registry does not have.
pub fn unanswered(file: &CaseFile) -> Result<Vec<String>> {
    let case = &file.case;
    let learned = registry::layer(&case.layer)?.lora_names().into_iter().chain(SCALE_NAMES);
    let learned = learned.filter(|name| case.tensors.contains_key("grad.y") && case.tensors.contains_key(*name));
    let answers = std::iter::once("y".to_string()).chain(learned.map(|name| format!("grad.{name}")));
    Ok(answers.filter(|name| !case.tensors.contains_key(name)).collect())
}

/// The tensors of a case that are no inputs.
fn answers<'a>(case: &'a Case, layer: &dyn registry::Subject) -> Result<Vec<&'a str>> {
    let mut answers = vec![];
    for name in case.tensors.keys() {
        if !layer.is_input(case, name)? {
            answers.push(name.as_str());
        }
    }
    Ok(answers)
}
