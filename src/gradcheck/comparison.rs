//! What witnesses say of a tensor, a budget for every element, one verdict.

use super::differences::Rung;
use super::{RESOLUTION, SLACK};
use crate::case::unravel;
use crate::{Rounded, Scalar};
use ndarray::ArrayD;
use serde::{Serialize, Serializer};
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
    /// Identities that need no step: between tensors, not of one alone.
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

/// Where a number under comparison comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place<Index = Vec<usize>> {
    /// An element of the tensor; `[]` is a scalar's.
    Element(Index),
    /// The derivative along one of the random directions through the whole tensor.
    Direction(usize),
}

impl Place<usize> {
    pub(super) fn element(self) -> Option<usize> {
        match self {
            Self::Element(element) => Some(element),
            Self::Direction(_) => None,
        }
    }

    fn within(self, shape: &[usize]) -> Place {
        match self {
            Self::Element(element) => Place::Element(unravel(element, shape)),
            Self::Direction(direction) => Place::Direction(direction),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Element(index) => write!(f, "{index:?}"),
            Self::Direction(direction) => write!(f, "along direction {direction}"),
        }
    }
}

/// JSON has no word for these: they are written as text.
pub(super) fn number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.is_finite() { serializer.serialize_f64(*value) } else { serializer.collect_str(value) }
}

/// The element that comes closest to its budget, or exceeds it most.
#[derive(Clone, Debug, Serialize)]
pub struct Worst {
    /// Where.
    pub place: Place,
    /// The value under test.
    #[serde(serialize_with = "number")]
    pub ours: f64,
    /// The witness's value.
    #[serde(serialize_with = "number")]
    pub theirs: f64,
    /// `|ours - theirs|`; infinite where one of them is not a number.
    #[serde(serialize_with = "number")]
    pub error: f64,
    /// How far off the witness may be by itself.
    #[serde(serialize_with = "number")]
    pub uncertainty: f64,
    /// What the error may be.
    #[serde(serialize_with = "number")]
    pub budget: f64,
    /// What the error is relative to: the root of the summed squares of the terms of this element.
    #[serde(serialize_with = "number")]
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
    /// The worst of them; an element before a direction that is judged alike.
    pub worst: Worst,
    /// Where differences do not agree, the ladder at the worst element or direction.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ladder: Vec<Rung>,
}

/// What every witness says of one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// The name in a case file, or `grad.` and an input's name.
    pub name: String,
    /// The worst of the witnesses' verdicts; unresolved where there is nothing to compare.
    pub verdict: Verdict,
    /// Why nothing could be compared: a result that is missing, has another shape, or should not be there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mismatch: Option<String>,
    /// The element that exceeds a budget most, or comes closest to one.
    pub worst: Option<Element>,
    /// One comparison a witness.
    pub witnesses: Vec<Comparison>,
}

/// One element, and what every witness that looked at it says.
#[derive(Clone, Debug, Serialize)]
pub struct Element {
    /// Where.
    pub place: Place,
    /// The value under test.
    #[serde(serialize_with = "number")]
    pub ours: f64,
    /// What its error may be, by the witness that it comes closest to failing.
    #[serde(serialize_with = "number")]
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
    #[serde(serialize_with = "number")]
    pub value: f64,
    /// How far off that may be.
    #[serde(serialize_with = "number")]
    pub uncertainty: f64,
    /// How far from it the value under test is; infinite where one of them is not a number.
    #[serde(serialize_with = "number")]
    pub error: f64,
    /// What that may be.
    #[serde(serialize_with = "number")]
    pub budget: f64,
}

/// One number under comparison.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub place: Place<usize>,
    pub ours: f64,
    pub theirs: f64,
    pub uncertainty: f64,
    pub budget: f64,
    /// What the error is relative to.
    pub size: f64,
    /// A budget wider than this is unresolved.
    pub widest: f64,
}

/// How far apart two numbers are: infinitely where one is none.
pub(super) fn distance(one: f64, other: f64) -> f64 {
    let error = (one - other).abs();
    if error.is_nan() { f64::INFINITY } else { error }
}

/// Whether a number is what it should be, within a budget that is unresolved where it is wider than `widest`.
pub(super) fn judge(ours: f64, theirs: f64, budget: f64, widest: f64) -> Verdict {
    let error = distance(ours, theirs);
    let within = error == 0.0 || error <= budget;
    // A budget that is not a number is exceeded by any error, and never narrow enough.
    if !ours.is_finite() || !within {
        Verdict::Disagree
    } else if budget <= widest {
        Verdict::Agree
    } else {
        Verdict::Unresolved
    }
}

impl Point {
    pub fn error(&self) -> f64 {
        distance(self.ours, self.theirs)
    }

    pub fn verdict(&self) -> Verdict {
        judge(self.ours, self.theirs, self.budget, self.widest)
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

    /// What makes one point worse than another: an element says more than a direction that is judged alike.
    fn rank(&self) -> (Verdict, bool, f64) {
        (self.verdict(), self.place.element().is_some(), self.excess())
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

    /// A witness that knows every element of a tensor, in its shape, computed in a type of this unit roundoff;
    /// `expected` says how far off such a computation may be.
    pub fn of_all(
        witness: Witness,
        ours: &ArrayD<f64>,
        theirs: &ArrayD<f64>,
        expected: &ArrayD<Rounded>,
        unit: f64,
    ) -> Self {
        let widest = RESOLUTION * (unit / f64::UNIT_ROUNDOFF);
        let point = |(element, ((&ours, &theirs), expected)): (usize, ((&f64, &f64), &Rounded))| {
            let (budget, size) = (SLACK * unit * expected.roundings(), expected.size());
            let place = Place::Element(element);
            Point { place, ours, theirs, uncertainty: budget, budget, size, widest: widest * size }
        };
        Self::new(witness, ours.iter().zip(theirs).zip(expected).enumerate().map(point).collect())
    }

    pub fn verdict(&self) -> Verdict {
        self.points.iter().map(Point::verdict).max().unwrap_or(Verdict::Unresolved)
    }

    pub fn worst(&self) -> Option<&Point> {
        self.points.iter().max_by(|a, b| a.rank().partial_cmp(&b.rank()).expect("an excess is a number"))
    }

    pub fn at(&self, place: Place<usize>) -> Option<&Point> {
        self.points.iter().find(|point| point.place == place)
    }
}

impl TensorReport {
    /// All that was said of a tensor of this shape.
    pub(super) fn new(name: String, shape: &[usize], testimonies: Vec<Testimony>) -> Self {
        // f32 has the widest budget, which says little of an f64 value: it comes last where all agree.
        let all = testimonies.iter().filter_map(|testimony| Some((testimony.witness, testimony.worst()?)));
        let worst = all.max_by(|(a, one), (b, other)| {
            let rank = |witness: Witness, point: &Point| {
                let (verdict, is_element, excess) = point.rank();
                (verdict, is_element, witness != Witness::F32, excess)
            };
            rank(*a, one).partial_cmp(&rank(*b, other)).expect("an excess is a number")
        });
        let worst = worst.map(|(_, &Point { place, ours, budget, .. })| {
            let said = |testimony: &Testimony| {
                let point = testimony.at(place)?;
                let &Point { theirs: value, uncertainty, budget, .. } = point;
                Some(Said { witness: testimony.witness, value, uncertainty, error: point.error(), budget })
            };
            let says = testimonies.iter().filter_map(said).collect();
            Element { place: place.within(shape), ours, budget, says }
        });
        let verdict = testimonies.iter().map(Testimony::verdict).max().unwrap_or(Verdict::Unresolved);
        let witnesses = testimonies.into_iter().filter_map(|testimony| {
            let &point = testimony.worst()?;
            let Point { place, ours, theirs, uncertainty, budget, size, .. } = point;
            let place = place.within(shape);
            let worst = Worst { place, ours, theirs, error: point.error(), uncertainty, budget, size };
            let (witness, verdict, elements) = (testimony.witness, testimony.verdict(), testimony.points.len());
            Some(Comparison { witness, verdict, elements, worst, ladder: testimony.ladder })
        });
        Self { name, verdict, mismatch: None, worst, witnesses: witnesses.collect() }
    }

    /// A result that cannot be compared, which is wrong whichever side it is wrong on.
    pub(super) fn mismatch(name: String, mismatch: String) -> Self {
        Self { name, verdict: Verdict::Disagree, mismatch: Some(mismatch), worst: None, witnesses: vec![] }
    }

    /// What this witness says, where it says something.
    pub fn witness(&self, witness: Witness) -> Option<&Comparison> {
        self.witnesses.iter().find(|comparison| comparison.witness == witness)
    }
}
