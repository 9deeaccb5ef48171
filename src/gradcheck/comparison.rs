//! Two tensors, a budget for every element, one verdict.

use crate::case::unravel;
use ndarray::ArrayD;
use serde::Serialize;

/// What a comparison comes to, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every element lies within its budget.
    Agree,
    /// The budget of some element is too wide to say anything. Not a pass.
    Unresolved,
    /// Some element lies outside its budget, or is not a number.
    Disagree,
}

/// The element that comes closest to its budget, or exceeds it most.
#[derive(Clone, Debug, Serialize)]
pub struct Worst {
    /// Where.
    pub index: Vec<usize>,
    /// The value under test.
    pub ours: f64,
    /// The witness's value.
    pub theirs: f64,
    /// `|ours - theirs|`; infinite where one of them is not a number.
    pub error: f64,
    /// What it may be.
    pub budget: f64,
}

/// One witness's word on one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Who: `definition`, `f32` or `differences`.
    pub witness: &'static str,
    /// The verdict.
    pub verdict: Verdict,
    /// How many elements were compared.
    pub elements: usize,
    /// The worst of them.
    pub worst: Worst,
}

/// One element under comparison.
pub(super) struct Element {
    /// Row-major index.
    pub index: usize,
    pub ours: f64,
    pub theirs: f64,
    pub budget: f64,
    /// A budget wider than this is unresolved.
    pub widest: f64,
}

impl Worst {
    /// Error over budget: 0 without an error, infinite without a budget for it.
    pub fn excess(&self) -> f64 {
        if self.error == 0.0 {
            0.0
        } else if self.budget.is_nan() {
            f64::INFINITY
        } else {
            self.error / self.budget
        }
    }
}

impl Comparison {
    /// A result that one of the two does not have.
    pub(super) fn missing(witness: &'static str) -> Self {
        let worst = Worst { index: vec![], ours: f64::NAN, theirs: f64::NAN, error: f64::INFINITY, budget: 0.0 };
        Self { witness, verdict: Verdict::Disagree, elements: 0, worst }
    }

    /// Compares element by element.
    pub(super) fn of(witness: &'static str, ours: &ArrayD<f64>, theirs: &ArrayD<f64>, budget: &ArrayD<f64>) -> Self {
        assert_eq!(ours.shape(), theirs.shape(), "a witness of another shape");
        let elements = ours
            .iter()
            .zip(theirs)
            .zip(budget)
            .enumerate()
            .map(|(index, ((&ours, &theirs), &budget))| Element { index, ours, theirs, budget, widest: f64::MAX });
        Self::of_elements(witness, ours.shape(), elements)
    }

    /// Compares some elements of a tensor of this shape.
    pub(super) fn of_elements(
        witness: &'static str,
        shape: &[usize],
        elements: impl IntoIterator<Item = Element>,
    ) -> Self {
        let mut verdict = Verdict::Agree;
        let mut worst: Option<Worst> = None;
        let mut count = 0;
        for Element { index, ours, theirs, budget, widest } in elements {
            count += 1;
            let error = (ours - theirs).abs();
            let error = if error.is_nan() { f64::INFINITY } else { error };
            verdict = verdict.max(if error > budget {
                Verdict::Disagree
            } else if budget <= widest {
                Verdict::Agree
            } else {
                Verdict::Unresolved
            });
            let candidate = Worst { index: unravel(index, shape), ours, theirs, error, budget };
            if worst.as_ref().is_none_or(|worst| candidate.excess() > worst.excess()) {
                worst = Some(candidate);
            }
        }
        let nothing = Worst { index: vec![], ours: 0.0, theirs: 0.0, error: 0.0, budget: 0.0 };
        Self { witness, verdict, elements: count, worst: worst.unwrap_or(nothing) }
    }
}
