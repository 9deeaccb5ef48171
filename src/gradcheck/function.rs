//! Any function of named arrays, and how its hand-derived gradients are surveyed.

use super::comparison::{Point, TensorReport, Testimony, Verdict, Witness};
use super::differences::{Differences, Estimate};
use super::duals::Duals;
use super::{CaseReport, Law, Options, RESOLUTION, SLACK};
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
pub trait Function: Sync {
    /// What the report calls it.
    fn name(&self) -> &str;
    /// y.
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
    /// The same forward on dual numbers, where it is written for them: the second witness.
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

fn survey(function: &dyn Function, inputs: &Tensors, options: Options) -> Result<(Vec<TensorReport>, Vec<Law>)> {
    let standard = |values: &ArrayD<f64>| values.as_standard_layout().into_owned();
    let inputs: Tensors = inputs.iter().map(|(name, values)| (name.clone(), standard(values))).collect();
    let y = standard(&function.forward(&inputs)?);
    let cotangent = Draw::new(options.seed).array(y.shape(), |value| value);
    let gradients = function.backward(&inputs, &cotangent)?;
    let survey = Survey { function, inputs: &inputs, cotangent: &cotangent, y: &y, expected: None, options };
    let mut tensors = Vec::new();
    for name in inputs.keys().chain(gradients.keys()).collect::<BTreeSet<_>>() {
        let gradient = gradients.get(name).map(standard);
        let fits = |gradient: &ArrayD<f64>| inputs.get(name).is_some_and(|input| input.shape() == gradient.shape());
        let (shape, testimonies) = match gradient.filter(fits) {
            None => (vec![], vec![Testimony::missing(Witness::Differences)]),
            Some(gradient) => (gradient.shape().to_vec(), survey.testimonies(name, &gradient, None)?),
        };
        tensors.push(TensorReport::new(format!("grad.{name}"), &shape, testimonies));
    }
    let run = |y: &ArrayD<f64>, gradients: &Tensors| {
        let named = gradients.iter().map(|(name, values)| (format!("grad.{name}"), values.clone()));
        named.chain([("y".to_string(), y.clone())]).collect::<Tensors>()
    };
    let again = run(&standard(&function.forward(&inputs)?), &function.backward(&inputs, &cotangent)?);
    let mut laws = vec![Law::same_bits(&run(&y, &gradients), &again)];
    let duals = inputs.iter().map(|(name, values)| (name.clone(), values.mapv(Dual::constant))).collect();
    if let Some(by_duals) = function.forward_dual(&duals)? {
        let near = |((here, dual), roundings): ((&f64, &Dual), &f64)| {
            (here - dual.re).abs() <= SLACK * f64::UNIT_ROUNDOFF * roundings
        };
        let same = y.shape() == by_duals.shape() && y.iter().zip(&by_duals).zip(&survey.roundings_of_y()).all(near);
        laws.push(Law { name: "dual numbers give the same y", holds: same });
    }
    Ok((tensors, laws))
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
    /// What differences and dual numbers say of a gradient; `also` is an element that they must look at.
    pub fn testimonies(&self, tensor: &str, gradient: &ArrayD<f64>, also: Option<usize>) -> Result<Vec<Testimony>> {
        let gradient: Vec<f64> = gradient.iter().copied().collect();
        let directions = self.directions(tensor, gradient.len(), also);
        let roundings = self.roundings_of_y();
        let (function, inputs, cotangent) = (self.function, self.inputs, self.cotangent);
        let differences = Differences { function, inputs, cotangent, y: self.y, roundings: &roundings };
        let duals = Duals { function, inputs, cotangent };

        let by_differences = |scratch: &mut Tensors, direction: &Direction| {
            let (along, _) = differences.along(scratch, tensor, direction, &gradient)?;
            Ok(Some(self.point(tensor, direction, &gradient, along).0))
        };
        let by_duals = |_: &mut Tensors, direction: &Direction| {
            let Some(along) = duals.along(tensor, direction)? else { return Ok(None) };
            // What dual numbers are uncertain by is rounding, and as much as the gradient's own.
            let (point, rounding) = self.point(tensor, direction, &gradient, along);
            Ok(Some(Point { uncertainty: rounding, budget: rounding + point.budget, ..point }))
        };
        let mut testimonies = Vec::new();
        if let Some(points) = self.look(&directions, by_differences)? {
            let mut testimony = Testimony::new(Witness::Differences, points);
            if testimony.verdict() != Verdict::Agree
                && let Some(index) = testimony.worst().and_then(|worst| worst.index)
            {
                testimony.ladder = differences.along(&mut inputs.clone(), tensor, &[(index, 1.0)], &gradient)?.1;
            }
            testimonies.push(testimony);
        }
        if let Some(points) = self.look(&directions, by_duals)? {
            testimonies.push(Testimony::new(Witness::Duals, points));
        }
        Ok(testimonies)
    }

    /// Looks along every direction; one through many elements that disagrees is halved until one element is left.
    fn look(
        &self,
        directions: &[Vec<(usize, f64)>],
        along: impl Fn(&mut Tensors, &Direction) -> Result<Option<Point>> + Sync,
    ) -> Result<Option<Vec<Point>>> {
        let looked: Vec<Option<Point>> = directions
            .par_iter()
            .map_init(|| self.inputs.clone(), |scratch, direction| along(scratch, direction))
            .collect::<Result<_>>()?;
        let Some(mut points) = looked.into_iter().collect::<Option<Vec<Point>>>() else { return Ok(None) };
        let wrong = |point: &Point| point.verdict() == Verdict::Disagree;
        let found = points.iter().any(|point| wrong(point) && point.index.is_some());
        let whole = points.iter().zip(directions).find(|(point, direction)| wrong(point) && direction.len() > 1);
        if let (false, Some((_, direction))) = (found, whole) {
            let mut scratch = self.inputs.clone();
            let mut suspects: &Direction = direction;
            while suspects.len() > 1 {
                let (left, right) = suspects.split_at(suspects.len() / 2);
                let excess = |point: Option<Point>| point.map_or(0.0, |point| point.excess());
                let (on_left, on_right) = (along(&mut scratch, left)?, along(&mut scratch, right)?);
                suspects = if excess(on_left) >= excess(on_right) { left } else { right };
            }
            points.extend(along(&mut scratch, &[(suspects[0].0, 1.0)])?);
        }
        Ok(Some(points))
    }

    /// Every element alone; of a large function some of them, and random directions through all.
    fn directions(&self, tensor: &str, len: usize, also: Option<usize>) -> Vec<Vec<(usize, f64)>> {
        let Options { seed, large, samples, directions } = self.options;
        let total: usize = self.inputs.values().map(|values| values.len()).sum();
        if total <= large || len <= samples + directions {
            return (0..len).map(|element| vec![(element, 1.0)]).collect();
        }
        let name_hash = tensor.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut rng = Pcg64::seed_from_u64(seed ^ name_hash);
        let sampled = (0..samples).map(|_| (rng.next_u64() % len as u64) as usize);
        let elements: BTreeSet<usize> = sampled.chain(also).collect();
        let mut all: Vec<_> = elements.into_iter().map(|element| vec![(element, 1.0)]).collect();
        for _ in 0..directions {
            all.push((0..len).map(|element| (element, if rng.next_u64() >> 63 == 0 { 1.0 } else { -1.0 })).collect());
        }
        all
    }

    /// A gradient along a direction beside what a witness says, and the rounding error to expect of the gradient.
    fn point(&self, tensor: &str, direction: &Direction, gradient: &[f64], along: Along) -> (Point, f64) {
        let Along { estimate: Estimate { value, uncertainty }, terms } = along;
        let ours = match *direction {
            [(element, sign)] => sign * gradient[element],
            _ => sum(direction.iter().map(|&(element, sign)| sign * gradient[element])),
        };
        let (roundings, size) = self.expected(tensor, direction, ours, terms);
        let (rounding, size) = (SLACK * f64::UNIT_ROUNDOFF * roundings, size.max(value.abs()));
        let (budget, widest) = (uncertainty + rounding, RESOLUTION * size);
        let index = if let [(element, _)] = direction { Some(*element) } else { None };
        (Point { index, ours, theirs: value, uncertainty, budget, size, widest }, rounding)
    }

    /// The rounding error to expect of the gradient along a direction, in unit roundoffs, and its size.
    fn expected(&self, tensor: &str, direction: &Direction, ours: f64, terms: f64) -> (f64, f64) {
        let size = ours.abs().max(terms);
        let Some(expected) = self.expected.and_then(|expected| expected.get(&format!("grad.{tensor}"))) else {
            return (GUESS * size, size);
        };
        let expected = expected.as_slice().expect("standard layout");
        let expected = match *direction {
            [(element, _)] => expected[element],
            _ => direction.iter().fold(Rounded::exact(0.0), |sum, &(element, sign)| {
                if sign > 0.0 { sum + expected[element] } else { sum - expected[element] }
            }),
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
