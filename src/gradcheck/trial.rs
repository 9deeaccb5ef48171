//! The checker on trial: every mistake of the bank put in a layer's place, to see which witness says so.

use super::report::CaseReport;
use super::{Options, Verdict, Witness, check};
use crate::bench::TrainingStep;
use crate::case::{Case, Tensor, Tensors};
use crate::cases::Spec;
use crate::mistakes::{Formula, Mistake, TracedForward};
use crate::registry::{Forward, Precision, RoundTrip, Subject, layer, mistaken};
use crate::traced::Traced;
use crate::wora::{Line, Storage};
use crate::{DualForward, Error, Real, Result, Rounded};
use ndarray::ArrayD;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;

/// What became of a mistake in one layer.
///
/// ```
/// use woracle::gradcheck::{Witness, try_mistake};
/// use woracle::mistakes::mistake;
/// let trial = try_mistake(mistake("bias-scaled")?, "linear", 0)?; // y has g b where b should be
/// assert_eq!((trial.case, trial.tried), (Some("linear-plain"), 1)); // seen in the first case
/// assert!(trial.killed_by.contains(&Witness::Definition));
/// assert!(!trial.killed_by.contains(&Witness::F32)); // which makes the same mistake
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    /// The mistake's id.
    pub mistake: &'static str,
    /// The layer it was put in.
    pub layer: &'static str,
    /// The first case in which the witnesses that must see it do; `None` where it survived every case.
    pub case: Option<&'static str>,
    /// Who contradicts it in that case.
    pub killed_by: Vec<Witness>,
    /// In how many cases it was tried: those before it changed nothing, or were not seen through.
    pub tried: usize,
}

/// What became of a mistake in every layer that it can be made in.
#[derive(Clone)]
pub struct Tried {
    /// The mistake.
    pub mistake: &'static Mistake,
    /// One a layer.
    pub trials: Vec<Trial>,
}

impl Tried {
    /// Who can speak: a mistake is the same in f32.
    pub const WITNESSES: [Witness; 4] =
        [Witness::Definition, Witness::Differences, Witness::Duals, Witness::Identities];

    /// Puts a mistake in the place of every layer that it can be made in.
    ///
    /// # Errors
    ///
    /// As [`try_mistake`].
    pub fn new(mistake: &'static Mistake, seed: u64) -> Result<Self> {
        let trials = mistake.layers.iter().map(|layer| try_mistake(mistake, layer, seed));
        Ok(Self { mistake, trials: trials.collect::<Result<_>>()? })
    }

    /// Whether it survived nowhere.
    pub fn is_killed(&self) -> bool {
        !self.trials.is_empty() && self.trials.iter().all(|trial| trial.case.is_some())
    }

    /// In how many layers this witness contradicts it.
    pub fn contradicted_by(&self, witness: Witness) -> usize {
        self.trials.iter().filter(|trial| trial.killed_by.contains(&witness)).count()
    }
}

impl Serialize for Tried {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let Mistake { id, wrong, seen, section, .. } = self.mistake;
        let mut fields = serializer.serialize_struct("Tried", 7)?;
        fields.serialize_field("id", id)?;
        fields.serialize_field("in", self.mistake.place())?;
        fields.serialize_field("killed", &self.is_killed())?;
        fields.serialize_field("section", section)?;
        fields.serialize_field("seen", seen)?;
        fields.serialize_field("trials", &self.trials)?;
        fields.serialize_field("wrong", wrong)?;
        fields.end()
    }
}

/// Cases with more elements than this are left out: every gradient of a mistake is taken an element at a time.
const SMALL: usize = 1500;

/// Puts a mistake in this layer's place, in one small case after the other, until it is killed.
///
/// A mistake in y must be contradicted by the definition at y; one in the backward by differences *and* by dual
/// numbers.
///
/// # Errors
///
/// A layer that the registry does not have, or that refuses its own case.
pub fn try_mistake(mistake: &'static Mistake, layer_name: &str, seed: u64) -> Result<Trial> {
    let subject = layer(layer_name)?;
    let mut trial = Trial { mistake: mistake.id, layer: subject.name(), case: None, killed_by: vec![], tried: 0 };
    for spec in subject.specs() {
        let case = subject.draw(spec, seed);
        let elements: usize = case.tensors.values().map(|tensor| tensor.shape().iter().product::<usize>()).sum();
        if elements > SMALL {
            continue;
        }
        let Some(report) = check_mistake(mistake, subject, &case, seed)? else { continue };
        trial.tried += 1;
        let y = report.tensors.iter().find(|tensor| tensor.name == "y").and_then(|y| y.witness(Witness::Definition));
        let forward = y.is_some_and(|y| y.verdict == Verdict::Disagree);
        let backward = report.contradicts(Witness::Differences) && report.contradicts(Witness::Duals);
        if (forward || !mistake.is_in_forward()) && (backward || !mistake.is_in_backward()) {
            trial.case = Some(spec.name);
            trial.killed_by = Witness::ALL.into_iter().filter(|&witness| report.contradicts(witness)).collect();
            break;
        }
    }
    Ok(trial)
}

/// What the checker says of a mistake in one case; `None` where it cannot be made or changes nothing.
///
/// # Errors
///
/// As [`try_mistake`].
pub fn check_mistake(
    mistake: &'static Mistake,
    subject: &'static dyn Subject,
    case: &Case,
    seed: u64,
) -> Result<Option<CaseReport>> {
    let Some(wrong) = mistaken(subject, &[mistake], case)? else { return Ok(None) };
    let mut results = subject.define(case)?;
    let mut roundings = subject.roundings(case)?;
    let differs = |(name, wrong): (&String, &ArrayD<f64>)| {
        let elements = wrong.iter().zip(&results[name]).zip(&roundings[name]);
        elements.into_iter().any(|((wrong, right), expected)| {
            let difference = (wrong - right).abs();
            difference.is_nan() || difference > 1e-9 * expected.size()
        })
    };
    if !wrong.iter().any(differs) {
        return Ok(None);
    }
    // Results that are larger than the right ones are rounded by as much more.
    let size = |values: &ArrayD<f64>| values.iter().map(|value| value * value).sum::<f64>().sqrt();
    for (name, wrong) in &wrong {
        let larger = size(wrong) / size(&results[name]);
        if larger > 1.0
            && larger.is_finite()
            && let Some(roundings) = roundings.get_mut(name)
        {
            roundings.mapv_inplace(|rounding| rounding * Rounded::constant(larger));
        }
    }
    results.extend(wrong);
    let forward = mistake.is_in_forward().then_some(&mistake.forward);
    let mistaken = Mistaken { subject, forward, results, roundings };
    // Directions through all elements see what samples miss.
    let options = Options { seed, large: 0, samples: 3, directions: 2 };
    Ok(Some(check(&mistaken, case, options)))
}

/// A layer whose production path makes a mistake; the witnesses know the right one.
struct Mistaken {
    subject: &'static dyn Subject,
    /// Its y, where it is another.
    forward: Option<&'static Formula>,
    results: Tensors,
    /// How they are rounded.
    roundings: BTreeMap<String, ArrayD<Rounded>>,
}

impl Subject for Mistaken {
    fn name(&self) -> &'static str {
        self.subject.name()
    }
    fn specs(&self) -> &'static [Spec] {
        self.subject.specs()
    }
    fn try_draw(&self, spec: &Spec, seed: u64) -> Result<Case> {
        self.subject.try_draw(spec, seed)
    }
    fn evaluate(&self, _case: &Case, _precision: Precision) -> Result<Tensors> {
        Ok(self.results.clone())
    }
    fn define(&self, case: &Case) -> Result<Tensors> {
        self.subject.define(case)
    }
    fn roundings(&self, _case: &Case) -> Result<BTreeMap<String, ArrayD<Rounded>>> {
        Ok(self.roundings.clone())
    }
    fn expect(&self, case: &Case, storages: &[Storage]) -> Result<(Tensors, Vec<Tensors>)> {
        self.subject.expect(case, storages)
    }
    fn walk(&self, case: &Case) -> Result<[Vec<Line>; 2]> {
        self.subject.walk(case)
    }
    fn training_step(&self, case: &Case, precision: Precision) -> Result<Box<dyn TrainingStep>> {
        self.subject.training_step(case, precision)
    }
    fn terms(&self, case: &Case) -> Result<usize> {
        self.subject.terms(case)
    }
    fn dual(&self, case: &Case) -> Result<DualForward> {
        self.subject.dual(case)
    }
    fn surrogate(&self, case: &Case) -> Result<Forward> {
        let Some(formula) = self.forward else { return self.subject.surrogate(case) };
        let forward = self.subject.formula(formula, case)?.ok_or_else(|| Error::Unknown {
            what: "mistake",
            expected: "one that can be made in this case".into(),
            found: case.name.clone(),
        })?;
        Ok(Box::new(move |case| {
            let floats = case.tensors.iter().filter_map(|(name, tensor)| match tensor {
                Tensor::Float(values) => Some((name.clone(), values.mapv(Traced::constant))),
                Tensor::Int(_) => None,
            });
            Ok(forward(&floats.collect())?.y.mapv(Real::value))
        }))
    }
    fn merge(&self, case: &Case) -> Result<RoundTrip> {
        self.subject.merge(case)
    }
    fn is_input(&self, case: &Case, tensor: &str) -> Result<bool> {
        self.subject.is_input(case, tensor)
    }
    fn formula(&self, formula: &Formula, case: &Case) -> Result<Option<TracedForward>> {
        self.subject.formula(formula, case)
    }
    fn is_gradient_of_the_loss(&self, case: &Case) -> Result<bool> {
        self.subject.is_gradient_of_the_loss(case)
    }
    fn lora_names(&self) -> [&'static str; 2] {
        self.subject.lora_names()
    }
    fn is_affine(&self, case: &Case, tensor: &str) -> Result<bool> {
        Ok(self.forward.is_none() && self.subject.is_affine(case, tensor)?)
    }
}
