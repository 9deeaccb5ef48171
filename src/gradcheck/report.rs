//! What a check found, and how it reads.

use super::comparison::{Element, Said, TensorReport, Verdict, Witness};
use crate::Result;
use crate::case::Tensors;
use serde::Serialize;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What was found for one case or function.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// The case or the function.
    pub name: String,
    /// Its tensors: y, then every gradient.
    pub tensors: Vec<TensorReport>,
    /// What must hold beside.
    pub laws: Vec<Law>,
    /// Why the case could not be run at all.
    pub failure: Option<String>,
}

/// Something that must hold of a case as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Law {
    /// What must hold.
    pub name: &'static str,
    /// Whether it does.
    pub holds: bool,
}

impl Law {
    /// Two runs from the same inputs gave the same bits.
    pub(super) fn same_bits(once: &Tensors, again: &Tensors) -> Self {
        let bits = |tensors: &Tensors| -> Vec<(String, Vec<usize>, Vec<u64>)> {
            let of = |values: &ndarray::ArrayD<f64>| values.iter().map(|value| value.to_bits()).collect();
            tensors.iter().map(|(name, values)| (name.clone(), values.shape().to_vec(), of(values))).collect()
        };
        Self { name: "two runs give the same bits", holds: bits(once) == bits(again) }
    }
}

impl CaseReport {
    /// The report of an examination, which may fail or panic.
    pub(super) fn of(name: &str, examine: impl FnOnce() -> Result<(Vec<TensorReport>, Vec<Law>)>) -> Self {
        let (tensors, laws, failure) = match catch_unwind(AssertUnwindSafe(examine)) {
            Ok(Ok((tensors, laws))) => (tensors, laws, None),
            Ok(Err(error)) => (vec![], vec![], Some(error.to_string())),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
                (vec![], vec![], Some(format!("panicked: {}", text.unwrap_or("no message"))))
            }
        };
        Self { name: name.into(), tensors, laws, failure }
    }

    /// The report of `y` or of a gradient, such as `grad.x`.
    pub fn tensor(&self, name: &str) -> Option<&TensorReport> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Whether the case ran, every law holds and every tensor agrees with every witness.
    pub fn agrees(&self) -> bool {
        self.failure.is_none()
            && self.laws.iter().all(|law| law.holds)
            && self.tensors.iter().all(|tensor| tensor.verdict == Verdict::Agree)
    }

    /// Whether this witness contradicts a tensor.
    pub fn contradicts(&self, witness: Witness) -> bool {
        let of = |tensor: &TensorReport| tensor.witness(witness).map(|comparison| comparison.verdict);
        self.tensors.iter().any(|tensor| of(tensor) == Some(Verdict::Disagree))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Agree => "agree",
            Self::Unresolved => "UNRESOLVED",
            Self::Disagree => "DISAGREE",
        })
    }
}

/// The value under test and its budget.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {:12} {:>24.17e}  budget {:.1e}", "ours", self.ours, self.budget)
    }
}

/// A witness's value and how far off it may be.
impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {:12} {:>24.17e}  +- {:.1e}", self.witness, self.value, self.uncertainty)
    }
}

/// One line where all is well; what is wrong, element by element and with the ladder, where it is not.
impl fmt::Display for CaseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(failure) = &self.failure {
            return write!(f, "{}: FAILED: {failure}", self.name);
        }
        if self.agrees() {
            let tensors = if self.tensors.len() == 1 {
                "1 tensor agrees"
            } else {
                &format!("{} tensors agree", self.tensors.len())
            };
            return write!(f, "{}: {tensors}", self.name);
        }
        let mut lines = vec![];
        for law in self.laws.iter().filter(|law| !law.holds) {
            lines.push(format!("{}: expected: {}: not so", self.name, law.name));
        }
        for tensor in self.tensors.iter().filter(|tensor| tensor.verdict != Verdict::Agree) {
            let Some(worst) = &tensor.worst else { continue };
            lines.push(format!("{}: {} {:?}: {}", self.name, tensor.name, worst.index, tensor.verdict));
            lines.push(worst.to_string());
            lines.extend(
                worst.says.iter().map(|said| format!("{said}, off by {:.1e}", (worst.ours - said.value).abs())),
            );
            for comparison in tensor.witnesses.iter().filter(|comparison| comparison.verdict != Verdict::Agree) {
                let at = &comparison.worst;
                if at.index != worst.index {
                    lines.push(format!(
                        "  {} is furthest off at {:?}: {:e} against {:e}",
                        comparison.witness, at.index, at.ours, at.theirs
                    ));
                }
                if !comparison.ladder.is_empty() {
                    lines
                        .push(format!("  {:>10}  {:>24}  {:>12}  {:>12}", "step", "difference", "to limit", "to ours"));
                }
                for rung in &comparison.ladder {
                    let to_ours = (rung.value - at.ours).abs();
                    lines.push(format!(
                        "  {:>10.3e}  {:>24.17e}  {:>12.1e}  {to_ours:>12.1e}",
                        rung.step, rung.value, rung.error
                    ));
                }
            }
        }
        f.write_str(&lines.join("\n"))
    }
}
