//! What somebody did wrong: the case computed once more under every known mistake, and the one that explains the
//! numbers. SPEC.md, section 8.6.
//!
//! ```
//! use woracle::{mistakes::mistake, registry};
//! use woracle::oracle::{CaseFile, Dtype, diagnose::diagnose};
//! let linear = registry::layer("linear")?;
//! let mut case = linear.draw(&linear.specs()[0], 0);
//! case.extend(registry::mistaken(linear, &[mistake("bias-scaled")?], &case)?.expect("it can be made"));
//! let diagnosis = diagnose(&CaseFile::new(case, Dtype::F64))?;
//! assert_eq!(diagnosis.candidates[0].ids, ["bias-scaled"]);
//! # Ok::<(), woracle::Error>(())
//! ```

use super::CaseFile;
use super::facts::facts;
use super::verify::{DEFINED, Expected, TensorVerdict, Tolerance, Verdict, expected, first_diverging, unit};
use crate::Result;
use crate::case::{Case, Tensor, Tensors};
use crate::mistakes::{Formula, Mistake, RIGHT, Spoiling, forward, of_layer, results};
use crate::operators::PARALLEL_ELEMENTS;
use crate::registry::{self, Precision, Subject, with_mistakes};
use ndarray::{ArrayD, ArrayRef, IxDyn};
use rayon::prelude::*;
use serde::Serialize;

/// Cases whose base weight has more elements than this are not recomputed under every mistake: differentiating one
/// takes some 900 bytes an element.
pub const SMALL: usize = 1 << 22;
/// Nor, above this, under pairs of mistakes.
const SMALL_FOR_PAIRS: usize = 1 << 14;
/// A mistake has explained something where it leaves no more than this part of the error over its bound.
const EXPLAINS: f64 = 1.0 / 32.0;
/// The same where every element lies within its bound, which the error may have been not far from.
const EXPLAINS_WITHIN: f64 = 0.5;
/// How many times the bound of the right result a wrong one's may be, for its own size.
const ALLOWANCE: f64 = 4.0;
/// A right result may be so small a part of what its terms come to before it is taken for one whose terms cancel, which
/// does not say how large a wrong one's are.
const CANCELS: f64 = 1.0 / 64.0;
/// At most so many candidates are told, those that tie with the first apart.
const TOLD: usize = 5;

/// A mistake, or two at once, that explain a case.
#[derive(Clone, Debug, Serialize)]
pub struct Candidate {
    /// The ids joined by " + ".
    pub id: String,
    /// The ids in the bank.
    pub ids: Vec<&'static str>,
    /// What goes wrong, a sentence each.
    pub title: String,
    /// Where it was seen.
    pub seen: String,
    /// The section of SPEC.md that has it right.
    pub section: &'static str,
    /// The largest error over its bound under this mistake; 0 where every element lies within its bound.
    pub residual: f64,
    /// The error that the next best mistake leaves over the one that this leaves, in root mean squares of bounds: how
    /// far behind it is. About 1 for two that cannot be told apart; absent where there is no other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runner_up_ratio: Option<f64>,
    /// What is left, and tells apart what the bounds do not.
    #[serde(skip)]
    misfit: Misfit,
}

/// Errors over bounds.
#[derive(Clone, Copy, Debug, Default)]
struct Misfit {
    largest: f64,
    /// The root mean square.
    typical: f64,
}

impl Misfit {
    /// 0 where every element lies within its bound.
    fn residual(self) -> f64 {
        if self.largest > 1.0 { self.largest } else { 0.0 }
    }

    /// Whether so little is left of what is otherwise: a mistake that changes nothing in a case leaves all of it.
    fn explains(self, unexplained: Self) -> bool {
        let part = if self.largest <= 1.0 { EXPLAINS_WITHIN } else { EXPLAINS };
        self.largest < unexplained.largest && self.largest <= part * unexplained.largest
    }

    /// Whether so much is left in y alone that gradients need not be looked at.
    fn dismisses(self, unexplained: Self) -> bool {
        self.largest > 1.0 && !self.explains(unexplained)
    }
}

/// What can be said of a case that fails.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Diagnosis {
    /// The intermediate or result that is wrong first.
    pub first_diverging: Option<String>,
    /// What explains it, best first; empty where nothing does.
    #[serde(rename = "diagnosis")]
    pub candidates: Vec<Candidate>,
    /// What is remarkable about the numbers, a line each.
    pub facts: Vec<String>,
    /// The case is too large to be computed under every mistake, so none was tried.
    #[serde(skip)]
    pub too_large: bool,
}

/// Diagnoses a case; empty where it passes.
///
/// # Errors
///
/// As [`verify`](super::verify::verify).
pub fn diagnose(file: &CaseFile) -> Result<Diagnosis> {
    Ok(judge(file, Tolerance::default())?.1.unwrap_or_default())
}

/// Judges every answer of a case, and diagnoses one that fails.
///
/// # Errors
///
/// As [`verify`](super::verify::verify).
///
/// ```
/// use ndarray::ArrayD;
/// use woracle::case::Tensors;
/// use woracle::oracle::{CaseFile, Dtype, diagnose::judge, verify::Tolerance};
/// use woracle::registry;
/// let linear = registry::layer("linear")?;
/// let mut case = linear.draw(&linear.specs()[0], 0);
/// let mut y = linear.define(&case)?.remove("y").unwrap();
/// y[[2, 1]] += 1.0; // no mistake that anybody has a name for
/// case.extend(Tensors::from([("y".to_string(), y)]));
/// let (tensors, diagnosis) = judge(&CaseFile::new(case, Dtype::F64), Tolerance::default())?;
/// assert_eq!((tensors[0].beyond, tensors[0].worst_index.as_slice()), (1, &[2, 1][..]));
/// let diagnosis = diagnosis.expect("it fails");
/// assert_eq!(diagnosis.first_diverging.as_deref(), Some("y"));
/// assert!(diagnosis.candidates.is_empty());
/// # Ok::<(), woracle::Error>(())
/// ```
pub fn judge(file: &CaseFile, tolerance: Tolerance) -> Result<(Vec<TensorVerdict>, Option<Diagnosis>)> {
    let expected = expected(file, tolerance)?;
    let tensors = expected.judge(file);
    let failed = tensors.iter().any(|tensor| tensor.verdict != Verdict::Pass);
    let diagnosis = failed.then(|| explain(file, &expected, &tensors)).transpose()?;
    Ok((tensors, diagnosis))
}

fn explain(file: &CaseFile, expected: &Expected, tensors: &[TensorVerdict]) -> Result<Diagnosis> {
    let subject = registry::layer(&file.case.layer)?;
    let first_diverging = first_diverging(tensors).map(Into::into);
    let elements = file.case.stored("base.weight")?.len();
    let mut facts = facts(file, expected, tensors);
    if elements > SMALL {
        facts.push(format!(
            "too large to be computed under every mistake: {elements} elements of base.weight, and the limit is {SMALL}"
        ));
        return Ok(Diagnosis { first_diverging, facts, too_large: true, ..Diagnosis::default() });
    }
    // Right results were computed by no mistake, whatever is recorded beside them.
    let mut of_results = tensors.iter().filter(|tensor| is_result(&tensor.name)).peekable();
    if of_results.peek().is_some() && of_results.all(|tensor| tensor.verdict == Verdict::Pass) {
        return Ok(Diagnosis { first_diverging, facts, ..Diagnosis::default() });
    }
    let right = right(subject, &file.case)?;
    let candidates = with_mistakes(subject, &file.case, &right, |spoiling| {
        let evidence = Evidence::new(file, expected);
        let mut candidates = singles(&evidence, spoiling, SMALL / elements.max(1))?;
        let is_explained = |one: &Candidate| one.residual == 0.0 && one.misfit.explains(evidence.unexplained);
        if !candidates.iter().any(is_explained) && elements <= SMALL_FOR_PAIRS {
            candidates.extend(pairs(&evidence, spoiling)?);
        }
        Ok(ranked(candidates, evidence.unexplained))
    })?;
    Ok(Diagnosis { first_diverging, candidates, facts, too_large: false })
}

/// The right results that mistakes are made from: those that the case has, and what is small.
fn right(subject: &dyn Subject, case: &Case) -> Result<Tensors> {
    let defined = subject.terms(case)? <= DEFINED;
    let mut right = if defined { subject.define(case)? } else { subject.evaluate(case, Precision::F64)? };
    right.retain(|name, values| case.tensors.contains_key(name) || values.len() <= PARALLEL_ELEMENTS);
    Ok(right)
}

/// A tensor of somebody's, and how far off it may be.
struct Answer<'a> {
    name: &'a str,
    actual: &'a ArrayRef<f64, IxDyn>,
    bound: &'a ArrayD<f64>,
    /// The bound of an error of one unit roundoff.
    unit: f64,
}

impl Answer<'_> {
    /// The largest error over its bound, and the sum of squares, of values that should be `wrong`. Its bound is that of
    /// the right result, as much wider as the wrong one is larger.
    fn errors(&self, actual: &ArrayRef<f64, IxDyn>, wrong: &ArrayD<f64>, right: &ArrayD<f64>) -> (f64, f64) {
        let size = |values: &ArrayD<f64>| {
            let finite = values.iter().filter(|value| value.is_finite());
            (finite.map(|value| value * value).sum::<f64>() / values.len().max(1) as f64).sqrt()
        };
        // Squares of the bounds of what is 0 may be too small.
        let typical = size(self.bound).max(f64::MIN_POSITIVE);
        let right = size(right).max(CANCELS * typical / self.unit);
        let larger = ALLOWANCE * (size(wrong) / right).max(1.0);
        let larger = if larger.is_nan() { ALLOWANCE } else { larger };
        let (mut most, mut squares) = (0.0_f64, 0.0);
        for ((&actual, &wrong), &bound) in actual.iter().zip(wrong).zip(self.bound) {
            // Whether 0 / 0 or 1 / 0 is met first depends on the order of operations.
            let same = actual == wrong || !(actual.is_finite() || wrong.is_finite());
            let over = if same { 0.0 } else { (actual - wrong).abs() / (larger * bound.max(typical)) };
            // An answer that is no number is as far off as can be, and no mistake's.
            let over = if over.is_finite() { over } else { f64::MAX };
            most = most.max(over);
            squares += over.min(1e150).powi(2);
        }
        (most, squares)
    }
}

/// Somebody's answers.
struct Evidence<'a> {
    answers: Vec<Answer<'a>>,
    right: &'a Tensors,
    /// What is left where nothing is wrong.
    unexplained: Misfit,
}

impl<'a> Evidence<'a> {
    fn new(file: &'a CaseFile, expected: &'a Expected) -> Self {
        let answers = expected.bounds_of_mistakes().iter().filter_map(|(name, bound)| match &file.case.tensors[name] {
            Tensor::Float(actual) => Some(Answer { name, actual, bound, unit: unit(file.dtype(name)) }),
            Tensor::Int(_) => None,
        });
        let mut evidence =
            Self { answers: answers.collect(), right: &expected.witnesses[0], unexplained: Misfit::default() };
        evidence.unexplained = evidence.weigh(evidence.right);
        evidence
    }

    /// What is left, if these are somebody's results. Somebody may have
    /// recorded right intermediates beside a wrong y, so those speak for a mistake or not at all; so do those that the
    /// mistake leaves as they are, beside a y that it explains.
    fn weigh(&self, theirs: &Tensors) -> Misfit {
        let (mut most, mut squares, mut count) = (0.0_f64, 0.0, 0);
        for answer in &self.answers {
            let &Answer { name, actual, .. } = answer;
            let Some(wrong) = theirs.get(name).filter(|wrong| wrong.shape() == actual.shape()) else { continue };
            let right = &self.right[name];
            let mut of = answer.errors(actual, wrong, right);
            if !is_result(name) {
                let untouched = answer.errors(wrong, right, right).0 <= 1.0;
                if untouched && self.answers.iter().any(|answer| is_result(answer.name)) {
                    continue;
                }
                let right = answer.errors(actual, right, right);
                if right.0 < of.0 {
                    of = right;
                }
            }
            most = most.max(of.0);
            squares += of.1;
            count += actual.len();
        }
        Misfit { largest: most, typical: (squares / count.max(1) as f64).sqrt() }
    }

    /// The same of y alone; `None` where the formula cannot be evaluated in the case.
    fn weigh_output(&self, forward: &Formula, spoiling: &Spoiling<'_>) -> Result<Option<Misfit>> {
        Ok(spoiling.value(forward)?.map(|y| self.weigh(&Tensors::from([("y".into(), y)]))))
    }
}

/// Whether an answer is y or a gradient, and no intermediate.
pub(super) fn is_result(name: &str) -> bool {
    name == "y" || name.starts_with("grad.")
}

/// Every mistake that can be made in this case, weighed; so many at a time, since each takes memory.
fn singles(evidence: &Evidence<'_>, spoiling: &Spoiling<'_>, at_a_time: usize) -> Result<Vec<Candidate>> {
    let known: Vec<&Mistake> = of_layer(&spoiling.case.layer).collect();
    let mut candidates = vec![];
    // About half of all mistakes are changes of these, which two threads would find at the same time.
    if evidence.weigh_output(&RIGHT, spoiling)?.is_some_and(|left| !left.dismisses(evidence.unexplained)) {
        spoiling.evaluate(&RIGHT)?;
    }
    for some in known.chunks(at_a_time) {
        let some: Result<Vec<_>> = some.par_iter().map(|&mistake| candidate(&[mistake], evidence, spoiling)).collect();
        candidates.extend(some?.into_iter().flatten());
    }
    Ok(candidates)
}

/// Two mistakes at once.
fn pairs(evidence: &Evidence<'_>, spoiling: &Spoiling<'_>) -> Result<Vec<Candidate>> {
    let known: Vec<&Mistake> = of_layer(&spoiling.case.layer).collect();
    let pairs = known.iter().enumerate().flat_map(|(at, &one)| known[at + 1..].iter().map(move |&other| [one, other]));
    let pairs: Vec<_> = pairs.collect();
    let candidates: Result<Vec<_>> = pairs.into_par_iter().map(|pair| candidate(&pair, evidence, spoiling)).collect();
    Ok(candidates?.into_iter().flatten().collect())
}

/// How well these mistakes explain a case; `None` where they cannot be made. A y that they do not explain is enough to
/// dismiss them.
fn candidate(
    mistakes: &[&'static Mistake],
    evidence: &Evidence<'_>,
    spoiling: &Spoiling<'_>,
) -> Result<Option<Candidate>> {
    let Some(forward) = forward(mistakes) else { return Ok(None) };
    let Some(mut misfit) = evidence.weigh_output(&forward, spoiling)? else { return Ok(None) };
    if !misfit.dismisses(evidence.unexplained) {
        let Some(theirs) = results(mistakes, spoiling)? else { return Ok(None) };
        misfit = evidence.weigh(&theirs);
    }
    let join = |of: fn(&Mistake) -> &'static str, between: &str| {
        mistakes.iter().map(|mistake| of(mistake)).collect::<Vec<_>>().join(between)
    };
    Ok(Some(Candidate {
        id: join(|mistake| mistake.id, " + "),
        ids: mistakes.iter().map(|mistake| mistake.id).collect(),
        title: join(|mistake| mistake.wrong, " "),
        seen: join(|mistake| mistake.seen, "; "),
        section: mistakes[0].section,
        residual: misfit.residual(),
        runner_up_ratio: None,
        misfit,
    }))
}

/// Those that explain the case, best first: by residual, then by how few mistakes they are, then by the finer measure.
/// All that tie with the best are told, and a few more.
fn ranked(mut candidates: Vec<Candidate>, unexplained: Misfit) -> Vec<Candidate> {
    let rank = |one: &Candidate| (one.residual, one.ids.len(), one.misfit.typical);
    candidates.sort_by(|one, other| rank(one).partial_cmp(&rank(other)).expect("numbers"));
    // What is exact to the last digit is taken for a thousandth of a bound off, so that a ratio stays one of errors.
    let misfit = |one: &Candidate| one.misfit.typical.max(1e-3);
    for at in 1..candidates.len() {
        candidates[at - 1].runner_up_ratio =
            Some((misfit(&candidates[at]) / misfit(&candidates[at - 1])).min(f64::MAX));
    }
    candidates.retain(|one| one.misfit.explains(unexplained));
    let best = candidates.first().map(|best| (best.residual, best.ids.len()));
    let ties = candidates.iter().take_while(|one| Some((one.residual, one.ids.len())) == best).count();
    candidates.truncate(ties.max(TOLD));
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;

    fn misfit(error: f64) -> Misfit {
        Misfit { largest: error, typical: error }
    }

    /// How many are told of these, of which the largest and the typical error over its bound are left.
    fn told(left: &[f64], unexplained: f64) -> usize {
        let candidate = |&left: &f64| Candidate {
            id: String::new(),
            ids: vec!["one"],
            title: String::new(),
            seen: String::new(),
            section: "",
            residual: misfit(left).residual(),
            runner_up_ratio: None,
            misfit: misfit(left),
        };
        ranked(left.iter().map(candidate).collect(), misfit(unexplained)).len()
    }

    #[test]
    fn all_that_tie_with_the_best_are_told_and_a_few_more() {
        let of = |ties: usize, others: usize| told(&[vec![0.0; ties], vec![2.0; others]].concat(), 100.0);
        assert_eq!([of(TOLD + 3, 4), of(2, 10), of(2, 1)], [TOLD + 3, TOLD, 3]);
    }

    #[test]
    fn nothing_explains_an_error_that_it_leaves() {
        assert_eq!([told(&[4.0], 100.0), told(&[3.0], 100.0)], [0, 1]);
        assert_eq!([told(&[0.9], 0.9), told(&[0.6], 0.9), told(&[0.2], 0.9)], [0, 0, 1]);
        assert_eq!([told(&[0.0], 0.0), told(&[f64::MAX], f64::MAX)], [0, 0]);
    }

    #[test]
    fn an_output_within_its_bounds_dismisses_nothing() {
        let dismisses = |output: f64, unexplained: f64| misfit(output).dismisses(misfit(unexplained));
        assert_eq!([dismisses(0.9, 1.2), dismisses(1.1, 1.2), dismisses(1.1, 100.0)], [false, true, false]);
    }
}
