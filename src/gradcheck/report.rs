//! What a check found, and how it reads.

use super::comparison::{Comparison, Element, Said, TensorReport, Verdict, Witness};
use super::identities::Identity;
use crate::Result;
use crate::case::Tensors;
use serde::Serialize;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What was found for one case or function.
///
/// ```
/// use woracle::gradcheck::{Options, Verdict, Witness, check};
/// use woracle::registry;
/// let linear = registry::layer("linear")?;
/// let report = check(linear, &linear.draw(&linear.specs()[0], 1), Options::default());
/// let db = report.tensor("grad.lora_B").expect("B is learned");
/// assert_eq!((db.verdict, db.witnesses.len()), (Verdict::Agree, 4)); // identities speak of no single tensor
/// let duals = db.witness(Witness::Duals).expect("the definition runs on dual numbers");
/// assert_eq!(duals.elements, 18); // B [6, 3], one by one
/// assert!(duals.worst.error <= duals.worst.budget);
/// assert!(report.identities.iter().all(|identity| identity.error <= identity.budget));
/// assert!(report.laws.iter().any(|law| law.name == "two runs give the same bits" && law.holds));
/// assert!(!report.contradicts(Witness::Differences));
/// println!("{}", db.worst.as_ref().expect("elements")); // the number that comes closest to its budget
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// The case or the function.
    pub name: String,
    /// Its tensors: y, then every gradient.
    pub tensors: Vec<TensorReport>,
    /// What must hold between the gradients.
    pub identities: Vec<Identity>,
    /// What must hold beside.
    pub laws: Vec<Law>,
    /// Why the case could not be run at all.
    pub failure: Option<String>,
}

/// What an examination finds.
pub(super) struct Found {
    pub tensors: Vec<TensorReport>,
    pub identities: Vec<Identity>,
    pub laws: Vec<Law>,
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
    pub(super) fn of(name: &str, examine: impl FnOnce() -> Result<Found>) -> Self {
        let failure = match catch_unwind(AssertUnwindSafe(examine)) {
            Ok(Ok(Found { tensors, identities, laws })) => {
                return Self { name: name.into(), tensors, identities, laws, failure: None };
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
                format!("panicked: {}", text.unwrap_or("no message"))
            }
        };
        Self { name: name.into(), tensors: vec![], identities: vec![], laws: vec![], failure: Some(failure) }
    }

    /// The report of `y` or of a gradient, such as `grad.x`.
    pub fn tensor(&self, name: &str) -> Option<&TensorReport> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Whether the case ran, every law and identity holds and every tensor, of which there is one at least, agrees
    /// with every witness.
    pub fn agrees(&self) -> bool {
        self.failure.is_none()
            && !self.tensors.is_empty()
            && self.laws.iter().all(|law| law.holds)
            && self.identities.iter().all(|identity| identity.verdict == Verdict::Agree)
            && self.tensors.iter().all(|tensor| tensor.verdict == Verdict::Agree)
    }

    /// Whether this witness contradicts a tensor, or as identities do the gradients together.
    pub fn contradicts(&self, witness: Witness) -> bool {
        let of = |tensor: &TensorReport| tensor.witness(witness).map(|comparison| comparison.verdict);
        let broken = self.identities.iter().any(|identity| identity.verdict == Verdict::Disagree);
        self.tensors.iter().any(|tensor| of(tensor) == Some(Verdict::Disagree))
            || witness == Witness::Identities && broken
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

/// A witness's value and how far off it may be, and how far off the value under test is.
impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { witness, value, uncertainty, error, .. } = self;
        write!(f, "  {witness:12} {value:>24.17e}  +- {uncertainty:.1e}, off by {error:.1e}")
    }
}

/// The worst element in full: the value, what each witness makes of it, and how sure it is.
impl fmt::Display for TensorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, verdict, mismatch, worst, .. } = self;
        match (mismatch, worst) {
            (Some(mismatch), _) => write!(f, "{name}: {verdict}: {mismatch}"),
            (None, None) => write!(f, "{name}: {verdict}: it has no elements"),
            (None, Some(worst)) => {
                write!(f, "{name} {}: {verdict}\n{worst}", worst.place)?;
                worst.says.iter().try_for_each(|said| write!(f, "\n{said}"))
            }
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { label, equation, verdict, left, right, error, budget, .. } = self;
        writeln!(f, "{label}, {equation}: {verdict}")?;
        write!(f, "  {left:.17e} and {right:.17e}, off by {error:.1e}, budget {budget:.1e}")
    }
}

/// A comparison that fails elsewhere than at the tensor's worst element, and the ladder.
fn failing(comparison: &Comparison, worst: Option<&Element>) -> Vec<String> {
    let (at, mut lines) = (&comparison.worst, vec![]);
    if worst.is_none_or(|worst| worst.place != at.place) {
        let Comparison { witness, .. } = comparison;
        lines.push(format!("  {witness} is furthest off at {}: {:e} against {:e}", at.place, at.ours, at.theirs));
    }
    if !comparison.ladder.is_empty() {
        lines.push(format!("  {:>10}  {:>24}  {:>12}  {:>12}", "step", "difference", "to limit", "to ours"));
    }
    lines.extend(comparison.ladder.iter().map(|rung| {
        let to_ours = (rung.value - at.ours).abs();
        format!("  {:>10.3e}  {:>24.17e}  {:>12.1e}  {to_ours:>12.1e}", rung.step, rung.value, rung.error)
    }));
    lines
}

/// One line where all is well; what is wrong, element by element and with the ladder, where it is not.
impl fmt::Display for CaseReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, tensors, identities, laws, failure } = self;
        if let Some(failure) = failure {
            return write!(f, "{name}: FAILED: {failure}");
        }
        if self.agrees() {
            let tensors =
                if tensors.len() == 1 { "1 tensor agrees" } else { &format!("{} tensors agree", tensors.len()) };
            return write!(f, "{name}: {tensors}");
        }
        let mut lines = vec![];
        if tensors.is_empty() {
            lines.push(format!("{name}: nothing was compared"));
        }
        let broken = laws.iter().filter(|law| !law.holds);
        lines.extend(broken.map(|law| format!("{name}: expected: {}: not so", law.name)));
        for tensor in tensors.iter().filter(|tensor| tensor.verdict != Verdict::Agree) {
            lines.push(format!("{name}: {tensor}"));
            let failed = tensor.witnesses.iter().filter(|comparison| comparison.verdict != Verdict::Agree);
            lines.extend(failed.flat_map(|comparison| failing(comparison, tensor.worst.as_ref())));
        }
        let broken = identities.iter().filter(|identity| identity.verdict != Verdict::Agree);
        lines.extend(broken.map(|identity| format!("{name}: {identity}")));
        f.write_str(&lines.join("\n"))
    }
}
