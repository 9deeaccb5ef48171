//! Somebody's results against the oracle's: every answer in a case file is recomputed in f64, by the
//! production path and again by the definition, and judged by the one that it is further from.
//!
//! ```no_run
//! use woracle::oracle::{case_file, verify::{Verdict, verify}};
//! let case = case_file::read("linear-plain.safetensors".as_ref())?;
//! for tensor in verify(&case)? {
//!     println!("{} {:?} {:e}", tensor.name, tensor.verdict, tensor.max_abs_error);
//! }
//! # Ok::<(), woracle::Error>(())
//! ```

use crate::case::{Case, Tensor, unravel};
use crate::error::{check_finite, check_shape};
use crate::registry::{self, Precision};
use crate::{Error, Result};
use ndarray::ArrayD;
use serde::Serialize;

/// An answer passes when no element is further off than this times `max(1, max |expected|)`.
pub const TOLERANCE: f64 = 1e-12;

/// What is said of a tensor or a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Within tolerance.
    Pass,
    /// Not within tolerance.
    Fail,
    /// It could not be judged.
    Error,
}

/// What is said of one answer. Numbers that are not finite are `null` in JSON.
#[derive(Clone, Debug, Serialize)]
pub struct TensorVerdict {
    /// The name in the case file.
    pub name: String,
    /// Pass or fail.
    pub verdict: Verdict,
    /// `max |actual - expected|`; infinite where an answer is not a number.
    pub max_abs_error: f64,
    /// `max |actual - expected| / |expected|`; infinite where 0 was expected and something else found.
    pub max_rel_error: f64,
    /// Where the absolute error is largest.
    pub worst_index: Vec<usize>,
    /// What the oracle says there.
    pub expected: f64,
    /// What the file says there.
    pub actual: f64,
}

/// Judges every answer of a case: `y`, `grad.*`, `weight_norm`, `merged_weight`.
///
/// # Errors
///
/// An input that is missing, does not fit or is not finite; a tensor that no case of this layer has; a case
/// without any answer.
pub fn verify(case: &Case) -> Result<Vec<TensorVerdict>> {
    let layer = registry::layer(&case.layer)?;
    let produced = layer.evaluate(case, Precision::F64)?;
    let defined = layer.define(case)?;
    let mut verdicts = Vec::new();
    for (name, tensor) in &case.tensors {
        let Some(produced) = produced.get(name) else {
            if layer.is_input(case, name)? {
                continue;
            }
            if name.starts_with("grad.") && !case.tensors.contains_key("grad.y") {
                let expected = format!("the cotangent, as there is {name}");
                return Err(Error::Missing { tensor: "grad.y".into(), expected }); // C7
            }
            let reason = format!("expected none: a case of {} has no tensor of this name", case.layer);
            return Err(Error::Unexpected { tensor: name.clone(), reason }); // C7
        };
        let Tensor::Float(actual) = tensor else {
            let reason = "expected floating-point values, found integers".into();
            return Err(Error::Unexpected { tensor: name.clone(), reason }); // C1
        };
        check_shape(name, produced.shape(), actual.shape())?; // C1
        for witness in [produced, &defined[name]] {
            check_finite(&format!("the oracle's {name}"), witness.view())?; // C2
        }
        verdicts.push(judge(name, actual, [produced, &defined[name]]));
    }
    if verdicts.is_empty() {
        return Err(Error::Missing {
            tensor: "y".into(),
            expected: "an answer: y, grad.*, weight_norm or merged_weight".into(),
        }); // C7
    }
    Ok(verdicts)
}

fn judge(name: &str, actual: &ArrayD<f64>, witnesses: [&ArrayD<f64>; 2]) -> TensorVerdict {
    let mut verdict = Verdict::Pass;
    let (mut max_abs_error, mut max_rel_error) = (-1.0, 0.0);
    let (mut worst, mut worst_expected, mut worst_actual) = (0, f64::NAN, f64::NAN);
    for witness in witnesses {
        let scale = witness.iter().fold(1.0, |largest: f64, expected| largest.max(expected.abs()));
        for (element, (&expected, &actual)) in witness.iter().zip(actual).enumerate() {
            let difference = (actual - expected).abs();
            let error = if difference.is_nan() { f64::INFINITY } else { difference };
            if error > TOLERANCE * scale {
                verdict = Verdict::Fail;
            }
            let relative = if error == 0.0 { 0.0 } else { error / expected.abs() };
            max_rel_error = f64::max(max_rel_error, relative);
            if error > max_abs_error {
                (max_abs_error, worst, worst_expected, worst_actual) = (error, element, expected, actual);
            }
        }
    }
    TensorVerdict {
        name: name.into(),
        verdict,
        max_abs_error: max_abs_error.max(0.0),
        max_rel_error,
        worst_index: if actual.is_empty() { vec![] } else { unravel(worst, actual.shape()) },
        expected: worst_expected,
        actual: worst_actual,
    }
}
