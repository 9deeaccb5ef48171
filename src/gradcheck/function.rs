//! Any function of named arrays, and how its hand-derived gradients are surveyed.

use super::comparison::{Place, Point, TensorReport, Testimony, Verdict, Witness};
use super::differences::{Differences, Estimate};
use super::duals::Duals;
use super::{CaseReport, Found, Law, Options, RESOLUTION, SLACK};
use crate::case::Tensors;
use crate::cases::Draw;
use crate::{Dual, DualTensors, Real, Result, Rounded, Scalar};
use ndarray::ArrayD;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// A differentiable function of named arrays with a backward derived by hand: what [`gradcheck`] checks.
///
/// What is not differentiated, such as ids or a mask, is a field of the function and no input.
///
/// ```
/// use ndarray::{ArrayD, array};
/// use woracle::{Dual, DualTensors, Real, Result, case::Tensors};
/// use woracle::gradcheck::{Function, Options, Witness, gradcheck};
/// /// Written once for f64 and for dual numbers.
/// fn reciprocal<R: Real>(x: &ArrayD<R>) -> ArrayD<R> {
///     x.mapv(|x| R::constant(1.0) / x)
/// }
/// struct Reciprocal;
/// impl Function for Reciprocal {
///     fn name(&self) -> &str { "reciprocal" }
///     fn forward(&self, inputs: &Tensors) -> Result<ArrayD<f64>> { Ok(reciprocal(&inputs["x"])) }
///     fn backward(&self, inputs: &Tensors, dy: &ArrayD<f64>) -> Result<Tensors> {
///         Ok(Tensors::from([("x".to_string(), -dy / inputs["x"].mapv(|x| x * x))]))
///     }
///     fn forward_dual(&self, inputs: &DualTensors) -> Result<Option<ArrayD<Dual>>> {
///         Ok(Some(reciprocal(&inputs["x"])))
///     }
/// }
/// let inputs = Tensors::from([("x".to_string(), array![0.5, -2.0].into_dyn())]);
/// let report = gradcheck(&Reciprocal, &inputs, Options::default());
/// assert!(report.agrees());
/// assert!(report.tensor("grad.x").unwrap().witness(Witness::Duals).is_some());
/// # Ok::<(), woracle::Error>(())
/// ```
pub trait Function: Sync {
    /// What the report calls it.
    fn name(&self) -> &str;
    /// y, in a shape that is always the same.
    ///
    /// # Errors
    ///
    /// Inputs that do not fit.
    fn forward(&self, inputs: &Tensors) -> Result<ArrayD<f64>>;
    /// The gradient of `<dy, y>` with respect to every input, under its name and in its shape.
    ///
    /// # Errors
    ///
    /// Inputs that do not fit.
    fn backward(&self, inputs: &Tensors, dy: &ArrayD<f64>) -> Result<Tensors>;
    /// The same forward on dual numbers, y in the same shape, where it is written for them: the second witness.
    ///
    /// # Errors
    ///
    /// Inputs that do not fit.
    fn forward_dual(&self, _inputs: &DualTensors) -> Result<Option<ArrayD<Dual>>> {
        Ok(None)
    }
    /// Whether y is affine in this input while the others stay: differences have no truncation error then, and take
    /// one large step.
    fn is_affine(&self, _input: &str) -> bool {
        false
    }
}

/// A direction through a tensor: some of its elements, each with a speed.
pub(super) type Direction = [(usize, f64)];

/// Where a gradient is looked at.
struct Probe {
    place: Place<usize>,
    direction: Vec<(usize, f64)>,
}

impl Probe {
    fn element(element: usize) -> Self {
        Self { place: Place::Element(element), direction: vec![(element, 1.0)] }
    }

    fn is(&self, element: usize) -> bool {
        self.place == Place::Element(element)
    }
}

/// What a witness says of a gradient along a probe, given inputs that it may move and puts back.
type Look<'a> = dyn Fn(&mut Tensors, &Probe) -> Result<Option<Point>> + Sync + 'a;

/// A sum that is rounded as if once (Neumaier's): what is contracted here must not blur what is compared.
pub(super) fn sum(terms: impl IntoIterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0.0_f64, 0.0);
    for term in terms {
        let next = sum + term;
        lost += if sum.abs() >= term.abs() { (sum - next) + term } else { (term - next) + sum };
        sum = next;
    }
    sum + lost
}

/// A derivative along a direction.
pub(super) struct Along {
    pub estimate: Estimate,
    /// The root of the summed squares of what each output contributes.
    pub terms: f64,
}

/// Checks the backward of any function at these inputs, against differences and, where it has them, dual numbers.
///
/// The cotangent is drawn from the seed. A large function is checked along sampled elements and along random
/// directions through all elements, which are narrowed down to the wrong element where they do not agree. A function
/// that fails or panics does not agree.
pub fn gradcheck(function: &dyn Function, inputs: &Tensors, options: Options) -> CaseReport {
    CaseReport::of(function.name(), || survey(function, inputs, options))
}

fn survey(function: &dyn Function, inputs: &Tensors, options: Options) -> Result<Found> {
    let standard = |values: &ArrayD<f64>| values.as_standard_layout().into_owned();
    let inputs: Tensors = inputs.iter().map(|(name, values)| (name.clone(), standard(values))).collect();
    let y = standard(&function.forward(&inputs)?);
    let cotangent = Draw::new(options.seed).array(y.shape(), |value| value);
    let gradients = function.backward(&inputs, &cotangent)?;
    let survey = Survey { function, inputs: &inputs, cotangent: &cotangent, y: &y, expected: None, options };
    let mut tensors = Vec::new();
    for name in inputs.keys().chain(gradients.keys()).collect::<BTreeSet<_>>() {
        let (input, gradient) = (inputs.get(name), gradients.get(name).map(standard));
        let result = format!("grad.{name}");
        tensors.push(match (input, gradient) {
            (Some(input), Some(gradient)) if input.shape() == gradient.shape() => {
                TensorReport::new(result, input.shape(), survey.testimonies(name, &gradient, &[])?)
            }
            (input, gradient) => {
                let (expected, found) = (shape_of(input), shape_of(gradient.as_ref()));
                TensorReport::mismatch(result, format!("expected {expected}, found {found}"))
            }
        });
    }
    let run = |y: &ArrayD<f64>, gradients: &Tensors| {
        let named = gradients.iter().map(|(name, values)| (format!("grad.{name}"), values.clone()));
        named.chain([("y".to_string(), y.clone())]).collect::<Tensors>()
    };
    let again = run(&standard(&function.forward(&inputs)?), &function.backward(&inputs, &cotangent)?);
    let finite = !y.is_empty() && y.iter().all(|y| y.is_finite());
    let mut laws =
        vec![Law::same_bits(&run(&y, &gradients), &again), Law { name: "y has elements, all finite", holds: finite }];
    let duals = inputs.iter().map(|(name, values)| (name.clone(), values.mapv(Dual::constant))).collect();
    if let Some(by_duals) = function.forward_dual(&duals)? {
        let near = |((here, dual), roundings): ((&f64, &Dual), &f64)| {
            (here - dual.re).abs() <= SLACK * f64::UNIT_ROUNDOFF * roundings
        };
        let same = y.shape() == by_duals.shape() && y.iter().zip(&by_duals).zip(&survey.roundings_of_y()).all(near);
        laws.push(Law { name: "dual numbers give the same y", holds: same });
    }
    Ok(Found { tensors, identities: vec![], laws })
}

/// The shape of a result, where there is one.
pub(super) fn shape_of(values: Option<&ArrayD<f64>>) -> String {
    values.map_or_else(|| "none".into(), |values| format!("shape {:?}", values.shape()))
}

/// A function at a point, and what rounding to expect there.
pub(super) struct Survey<'a> {
    pub function: &'a dyn Function,
    /// In standard layout.
    pub inputs: &'a Tensors,
    pub cotangent: &'a ArrayD<f64>,
    pub y: &'a ArrayD<f64>,
    /// `y` and `grad.*` on numbers that estimate their own rounding, where there are such.
    pub expected: Option<&'a BTreeMap<String, ArrayD<Rounded>>>,
    pub options: Options,
}

impl Survey<'_> {
    /// What differences and dual numbers say of a gradient; `also` are elements that they must look at.
    pub fn testimonies(&self, tensor: &str, gradient: &ArrayD<f64>, also: &[usize]) -> Result<Vec<Testimony>> {
        let gradient: Vec<f64> = gradient.iter().copied().collect();
        let mut probes = self.probes(tensor, gradient.len(), also);
        let roundings = self.roundings_of_y();
        let (function, inputs, cotangent) = (self.function, self.inputs, self.cotangent);
        let differences = Differences { function, inputs, cotangent, y: self.y, roundings: &roundings };
        let duals = Duals { function, inputs, cotangent };

        let by_differences = |scratch: &mut Tensors, probe: &Probe| {
            let (along, _) = differences.along(scratch, tensor, &probe.direction, &gradient)?;
            Ok(Some(self.point(tensor, probe, &gradient, along).0))
        };
        let by_duals = |_: &mut Tensors, probe: &Probe| {
            let Some(along) = duals.along(tensor, &probe.direction)? else { return Ok(None) };
            // What dual numbers are uncertain by is rounding, and as much as the gradient's own.
            let (point, rounding) = self.point(tensor, probe, &gradient, along);
            Ok(Some(Point { uncertainty: rounding, budget: rounding + point.budget, ..point }))
        };
        let witnesses: [(Witness, &Look<'_>); 2] =
            [(Witness::Differences, &by_differences), (Witness::Duals, &by_duals)];
        let mut testimonies: Vec<(Testimony, &Look<'_>)> = Vec::new();
        for (witness, look) in witnesses {
            let Some(points) = self.survey(&probes, look)? else { continue };
            let testimony = Testimony::new(witness, points);
            // What one finds worst the other looks at too.
            let worst = testimony.worst().and_then(|worst| worst.place.element());
            probes.extend(worst.filter(|&element| !probes.iter().any(|probe| probe.is(element))).map(Probe::element));
            testimonies.push((testimony, look));
        }
        let mut scratch = inputs.clone();
        for (testimony, look) in &mut testimonies {
            for probe in &probes {
                if testimony.at(probe.place).is_none() {
                    testimony.points.extend(look(&mut scratch, probe)?);
                }
            }
            if testimony.witness == Witness::Differences
                && testimony.verdict() != Verdict::Agree
                && let Some(worst) = testimony.worst()
                && let Some(probe) = probes.iter().find(|probe| probe.place == worst.place)
            {
                testimony.ladder = differences.along(&mut scratch, tensor, &probe.direction, &gradient)?.1;
            }
        }
        Ok(testimonies.into_iter().map(|(testimony, _)| testimony).collect())
    }

    /// Looks along every probe; one through many elements that disagrees is halved until one element is left.
    fn survey(&self, probes: &[Probe], look: &Look<'_>) -> Result<Option<Vec<Point>>> {
        let looked: Vec<Option<Point>> = probes
            .par_iter()
            .map_init(|| self.inputs.clone(), |scratch, probe| look(scratch, probe))
            .collect::<Result<_>>()?;
        let Some(mut points) = looked.into_iter().collect::<Option<Vec<Point>>>() else { return Ok(None) };
        let wrong = |point: &Point| point.verdict() == Verdict::Disagree;
        let found = points.iter().any(|point| wrong(point) && point.place.element().is_some());
        let whole = points.iter().zip(probes).find(|(point, probe)| wrong(point) && probe.direction.len() > 1);
        if let (false, Some((_, probe))) = (found, whole) {
            let mut scratch = self.inputs.clone();
            let (place, mut suspects) = (probe.place, &probe.direction[..]);
            while suspects.len() > 1 {
                let (left, right) = suspects.split_at(suspects.len() / 2);
                let mut excess = |half: &Direction| -> Result<f64> {
                    let point = look(&mut scratch, &Probe { place, direction: half.to_vec() })?;
                    Ok(point.map_or(0.0, |point| point.excess()))
                };
                suspects = if excess(left)? >= excess(right)? { left } else { right };
            }
            points.extend(look(&mut scratch, &Probe::element(suspects[0].0))?);
        }
        Ok(Some(points))
    }

    /// Every element alone; of a large function some of them, and random directions through all.
    fn probes(&self, tensor: &str, len: usize, also: &[usize]) -> Vec<Probe> {
        let Options { seed, large, samples, directions } = self.options;
        let total: usize = self.inputs.values().map(|values| values.len()).sum();
        if total <= large || len <= samples + directions {
            return (0..len).map(Probe::element).collect();
        }
        let name_hash = tensor.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut rng = Pcg64::seed_from_u64(seed ^ name_hash);
        let sampled = (0..samples).map(|_| (rng.next_u64() % len as u64) as usize);
        let elements: BTreeSet<usize> = sampled.chain(also.iter().copied()).collect();
        let mut all: Vec<_> = elements.into_iter().map(Probe::element).collect();
        for number in 0..directions {
            // Speeds of many sizes, so that two errors hardly ever cancel; of few digits, so that positions are exact.
            let speed = |element| {
                let bits = rng.next_u64();
                (element, (if bits >> 63 == 0 { 1.0 } else { -1.0 }) * (1.0 + (bits % 1024) as f64 / 1024.0))
            };
            all.push(Probe { place: Place::Direction(number), direction: (0..len).map(speed).collect() });
        }
        all
    }

    /// A gradient along a probe beside what a witness says, and the rounding error to expect of the gradient.
    fn point(&self, tensor: &str, probe: &Probe, gradient: &[f64], along: Along) -> (Point, f64) {
        let Along { estimate: Estimate { value, uncertainty }, terms } = along;
        let ours = match *probe.direction {
            [(element, speed)] => speed * gradient[element],
            _ => sum(probe.direction.iter().map(|&(element, speed)| speed * gradient[element])),
        };
        let (roundings, size) = self.expected(tensor, &probe.direction, ours, terms);
        let (rounding, size) = (SLACK * f64::UNIT_ROUNDOFF * roundings, size.max(value.abs()));
        let (budget, widest) = (uncertainty + rounding, RESOLUTION * size);
        (Point { place: probe.place, ours, theirs: value, uncertainty, budget, size, widest }, rounding)
    }

    /// The rounding error to expect of the gradient along a direction, in unit roundoffs, and its size.
    fn expected(&self, tensor: &str, direction: &Direction, ours: f64, terms: f64) -> (f64, f64) {
        let size = ours.abs().max(terms);
        let Some(expected) = self.expected.and_then(|expected| expected.get(&format!("grad.{tensor}"))) else {
            return (GUESS * size, size);
        };
        let expected = expected.as_slice().expect("standard layout");
        let expected = match *direction {
            [(element, speed)] => expected[element] * Rounded::constant(speed),
            _ => direction
                .iter()
                .fold(Rounded::exact(0.0), |sum, &(element, speed)| sum + expected[element] * Rounded::constant(speed)),
        };
        // No result is more exact than its own size allows.
        (expected.roundings().max(ours.abs()), size.max(expected.size()))
    }

    /// The rounding error to expect of each output.
    fn roundings_of_y(&self) -> ArrayD<f64> {
        match self.expected.and_then(|expected| expected.get("y")) {
            Some(expected) => expected.mapv(Rounded::roundings),
            None => {
                let mean = (self.y.iter().map(|y| y * y).sum::<f64>() / self.y.len() as f64).sqrt();
                self.y.mapv(|y| (GUESS * y.abs()).max(GUESS / 8.0 * mean))
            }
        }
    }
}

/// How many roundings of its own size a result of a function is taken to carry that cannot say how many; an output
/// much smaller than the others may be the small difference of numbers as large, and is given an eighth of theirs.
const GUESS: f64 = 32.0;

#[cfg(test)]
mod tests {
    #[test]
    fn a_sum_is_rounded_as_if_once() {
        assert_eq!(super::sum([1.0, 1e100, 1.0, -1e100]), 2.0);
        assert_eq!(super::sum([1.0, f64::EPSILON / 4.0, f64::EPSILON / 4.0, -1.0]), f64::EPSILON / 2.0);
    }
}
