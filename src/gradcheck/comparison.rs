//! What witnesses say of a tensor, a budget for every element, one verdict.

use super::differences::Rung;
use crate::case::unravel;
use ndarray::ArrayD;
use serde::Serialize;
use std::fmt;

/// Who says what a result should be. SPEC.md, section 8.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Witness {
    /// The definition, and its own backward.
    Definition,
    /// The same path in f32.
    F32,
    /// Differences of the forward.
    Differences,
    /// Dual numbers through the definition.
    Duals,
    /// Identities that need no step.
    Identities,
}

impl Witness {
    /// Every witness, in the order of the tables.
    pub const ALL: [Self; 5] = [Self::Definition, Self::F32, Self::Differences, Self::Duals, Self::Identities];
}

impl fmt::Display for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Definition => "definition",
            Self::F32 => "f32",
            Self::Differences => "differences",
            Self::Duals => "duals",
            Self::Identities => "identities",
        })
    }
}

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
    /// Where; empty for a scalar, an identity, or the derivative along a direction through every element.
    pub index: Vec<usize>,
    /// The value under test.
    pub ours: f64,
    /// The witness's value.
    pub theirs: f64,
    /// `|ours - theirs|`; infinite where one of them is not a number.
    pub error: f64,
    /// How far off the witness may be by itself.
    pub uncertainty: f64,
    /// What the error may be.
    pub budget: f64,
    /// What the error is relative to: the root of the summed squares of the terms of this element.
    pub size: f64,
}

/// One witness's word on one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Who.
    pub witness: Witness,
    /// The verdict.
    pub verdict: Verdict,
    /// How many elements and directions were compared.
    pub elements: usize,
    /// The worst of them.
    pub worst: Worst,
    /// Where differences do not agree, the ladder at the worst element.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ladder: Vec<Rung>,
}

/// What every witness says of one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// The name in a case file, or `grad.` and an input's name.
    pub name: String,
    /// The worst of the witnesses' verdicts.
    pub verdict: Verdict,
    /// The element that exceeds a budget most, or comes closest to one.
    pub worst: Option<Element>,
    /// One comparison a witness.
    pub witnesses: Vec<Comparison>,
}

/// One element, and what every witness that looked at it says.
#[derive(Clone, Debug, Serialize)]
pub struct Element {
    /// Where.
    pub index: Vec<usize>,
    /// The value under test.
    pub ours: f64,
    /// What its error may be, by the witness that it comes closest to failing.
    pub budget: f64,
    /// One line a witness.
    pub says: Vec<Said>,
}

/// One witness's value of one element.
#[derive(Clone, Debug, Serialize)]
pub struct Said {
    /// Who.
    pub witness: Witness,
    /// What the element is.
    pub value: f64,
    /// How far off that may be.
    pub uncertainty: f64,
}

/// One number under comparison.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    /// Row-major index; `None` for a number made of the whole tensor.
    pub index: Option<usize>,
    pub ours: f64,
    pub theirs: f64,
    pub uncertainty: f64,
    pub budget: f64,
    /// What the error is relative to.
    pub size: f64,
    /// A budget wider than this is unresolved.
    pub widest: f64,
}

impl Point {
    pub fn error(&self) -> f64 {
        let error = (self.ours - self.theirs).abs();
        if error.is_nan() { f64::INFINITY } else { error }
    }

    pub fn verdict(&self) -> Verdict {
        let error = self.error();
        let within = error == 0.0 || error <= self.budget;
        // A budget that is not a number is exceeded by any error, and never narrow enough.
        if !self.ours.is_finite() || !within {
            Verdict::Disagree
        } else if self.budget <= self.widest {
            Verdict::Agree
        } else {
            Verdict::Unresolved
        }
    }

    /// Error over budget: 0 without an error, infinite without a budget for it.
    pub fn excess(&self) -> f64 {
        match (self.error() == 0.0, self.error() / self.budget) {
            _ if !self.ours.is_finite() => f64::INFINITY,
            (true, _) => 0.0,
            (false, ratio) if ratio.is_nan() => f64::INFINITY,
            (false, ratio) => ratio,
        }
    }
}

/// Everything one witness says of a tensor.
pub(super) struct Testimony {
    pub witness: Witness,
    pub points: Vec<Point>,
    pub ladder: Vec<Rung>,
}

impl Testimony {
    pub fn new(witness: Witness, points: Vec<Point>) -> Self {
        Self { witness, points, ladder: Vec::new() }
    }

    /// A result that one of the two does not have.
    pub fn missing(witness: Witness) -> Self {
        let nan = f64::NAN;
        let nothing =
            Point { index: None, ours: nan, theirs: nan, uncertainty: 0.0, budget: 0.0, size: nan, widest: nan };
        Self::new(witness, vec![nothing])
    }

    /// A witness that knows every element of a tensor, in its shape.
    pub fn of_all(witness: Witness, ours: &ArrayD<f64>, theirs: &ArrayD<f64>, budget: &ArrayD<f64>) -> Self {
        let point = |(index, ((&ours, &theirs), &budget)): (usize, ((&f64, &f64), &f64))| Point {
            index: Some(index),
            ours,
            theirs,
            uncertainty: budget,
            budget,
            size: f64::NAN,
            widest: f64::MAX,
        };
        Self::new(witness, ours.iter().zip(theirs).zip(budget).enumerate().map(point).collect())
    }

    pub fn verdict(&self) -> Verdict {
        self.points.iter().map(Point::verdict).max().unwrap_or(Verdict::Agree)
    }

    pub fn worst(&self) -> Option<&Point> {
        self.points.iter().max_by(|a, b| {
            (a.verdict(), a.excess()).partial_cmp(&(b.verdict(), b.excess())).expect("an excess is a number")
        })
    }

    fn at(&self, index: Option<usize>) -> Option<&Point> {
        self.points.iter().find(|point| point.index == index)
    }
}

impl TensorReport {
    /// All that was said of a tensor of this shape.
    pub(super) fn new(name: String, shape: &[usize], testimonies: Vec<Testimony>) -> Self {
        let place = |index: Option<usize>| index.map_or_else(Vec::new, |index| unravel(index, shape));
        // f32 has the widest budget, which says little of an f64 value: it comes last where all agree.
        let all = testimonies.iter().filter_map(|testimony| Some((testimony.witness, testimony.worst()?)));
        let worst = all.max_by(|(a, one), (b, other)| {
            let rank = |witness: Witness, point: &Point| (point.verdict(), witness != Witness::F32, point.excess());
            rank(*a, one).partial_cmp(&rank(*b, other)).expect("an excess is a number")
        });
        let worst = worst.map(|(_, &Point { index, ours, budget, .. })| {
            let said = |testimony: &Testimony| {
                let point = testimony.at(index)?;
                let (witness, value, uncertainty) = (testimony.witness, point.theirs, point.uncertainty);
                Some(Said { witness, value, uncertainty })
            };
            Element { index: place(index), ours, budget, says: testimonies.iter().filter_map(said).collect() }
        });
        let verdict = testimonies.iter().map(Testimony::verdict).max().unwrap_or(Verdict::Unresolved);
        let witnesses = testimonies.into_iter().filter_map(|testimony| {
            let &point = testimony.worst()?;
            let Point { index, ours, theirs, uncertainty, budget, size, .. } = point;
            let worst = Worst { index: place(index), ours, theirs, error: point.error(), uncertainty, budget, size };
            let (witness, verdict, elements) = (testimony.witness, testimony.verdict(), testimony.points.len());
            Some(Comparison { witness, verdict, elements, worst, ladder: testimony.ladder })
        });
        Self { name, verdict, worst, witnesses: witnesses.collect() }
    }

    /// What this witness says, where it says something.
    pub fn witness(&self, witness: Witness) -> Option<&Comparison> {
        self.witnesses.iter().find(|comparison| comparison.witness == witness)
    }
}
