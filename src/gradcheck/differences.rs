//! Central differences at a ladder of steps, extrapolated to step 0, with an estimate of the error.

use super::RESOLUTION;
use super::comparison::number;
use super::function::{Along, Direction, Function, sum};
use crate::case::Tensors;
use crate::{Result, Scalar};
use ndarray::ArrayD;
use serde::Serialize;

/// Steps of the ladder where the function is curved.
const RUNGS: i32 = 9;
/// Where the ladder begins again if it says too little, in parts of the first start: a few outputs may curve more than
/// all of them together do.
const RETRIES: [f64; 2] = [1.0 / 8.0, 1.0 / 64.0];
/// The ladder starts where halving the step changes the outputs' differences by less than this part of them:
/// within about a quarter of the radius of convergence.
const CURVATURE: f64 = 1.0 / 16.0;
/// The step where the function is affine, in parts of the tensor's largest element: there is no truncation error,
/// so the step is large.
const AFFINE_STEP: f64 = 16.0;
/// A step that must not contradict it, in the same parts: no power of two.
const CLOSE_STEP: f64 = 3.0 / 64.0;
/// The first step tried where it is not, in the same parts: rounding weighs less the larger the step.
const START: f64 = 8.0;

/// A step far below the ladder, in parts of its first, that must not contradict it: small enough to look between
/// the last step and the point, large enough that its rounding is still far below the derivative.
const FAR_BELOW: f64 = 1.0 / (1 << 20) as f64;
/// How many times the rounding error to expect each output may be off by itself; the sum over outputs is what
/// counts, and the spread of the ladder sees the rest.
const NOISE: f64 = 4.0;

/// A value and how far off it may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// A bound on its error.
    pub uncertainty: f64,
}

/// A central difference at one step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rung {
    /// The step.
    pub step: f64,
    /// The difference.
    #[serde(serialize_with = "number")]
    pub value: f64,
    /// Its distance from what the ladder extrapolates to.
    #[serde(serialize_with = "number")]
    pub error: f64,
}

/// Ridders' extrapolation: `central(h)` at h, h/2, h/4, ... (`rungs` of them), each column of the tableau
/// removing one more even power of h. The entry with the smallest error estimate wins: the distance to its
/// neighbours plus the rounding that `central` reports, which the extrapolation makes half as large again (it at
/// most doubles it, but errors at different steps are independent), and no less than smaller steps contradict it by.
///
/// ```
/// use woracle::gradcheck::{Estimate, ladder};
/// let central = |h: f64| Ok(Estimate { value: ((1.0 + h).exp() - (1.0 - h).exp()) / (2.0 * h), uncertainty: 1e-15 / h });
/// let estimate = ladder(central, 0.125, 10)?;
/// assert!((estimate.value - 1f64.exp()).abs() <= estimate.uncertainty);
/// assert!(estimate.uncertainty < 1e-12);
/// # Ok::<(), woracle::Error>(())
/// ```
///
/// # Errors
///
/// Whatever `central` says.
pub fn ladder(mut central: impl FnMut(f64) -> Result<Estimate>, h: f64, rungs: usize) -> Result<Estimate> {
    let values: Vec<_> = (0..rungs).map(|rung| central(h / 2f64.powi(rung as i32))).collect::<Result<_>>()?;
    Ok(extrapolate(&values, Powers::Even))
}

/// Which powers of the step an expansion has beyond the value at step 0.
#[derive(Clone, Copy, PartialEq)]
enum Powers {
    /// `h^2, h^4, ...`, as a central difference.
    Even,
    /// `h, h^3, ...`, as a difference of two one-sided slopes.
    Odd,
}

/// The value at step 0 of a quantity known at a sequence of halved steps.
///
/// Each row of the tableau offers its most certain entry. Far from 0 two entries can be close by chance, so an offer
/// is as uncertain as the rows below it, which know smaller steps, find it wrong.
fn extrapolate(rungs: &[Estimate], powers: Powers) -> Estimate {
    let mut offers: Vec<Estimate> = Vec::new();
    let mut previous: Vec<f64> = Vec::new();
    for (rung, &Estimate { value, uncertainty: rounding }) in rungs.iter().enumerate() {
        let mut offer = Estimate { value: f64::NAN, uncertainty: f64::INFINITY };
        let mut row = vec![value];
        for column in 1..=rung {
            let power = 2f64.powi(2 * column as i32 - i32::from(powers == Powers::Odd));
            let extrapolated = (power * row[column - 1] - previous[column - 1]) / (power - 1.0);
            let spread = (extrapolated - row[column - 1]).abs().max((extrapolated - previous[column - 1]).abs());
            let uncertainty = spread + 1.5 * rounding;
            if uncertainty < offer.uncertainty {
                offer = Estimate { value: extrapolated, uncertainty };
            }
            row.push(extrapolated);
        }
        offers.push(offer);
        previous = row;
    }
    let widened = |(row, offer): (usize, &Estimate)| Estimate {
        uncertainty: offers[row + 1..]
            .iter()
            .fold(offer.uncertainty, |widest, below| offer.contradicted(below, widest)),
        ..*offer
    };
    let offers = offers.iter().enumerate().map(widened);
    offers.fold(Estimate { value: f64::NAN, uncertainty: f64::INFINITY }, |best, offer| {
        if offer.uncertainty < best.uncertainty { offer } else { best }
    })
}

impl Estimate {
    /// The larger of `widest` and the distance to another estimate beyond what that one is uncertain by.
    fn contradicted(&self, other: &Estimate, widest: f64) -> f64 {
        let beyond = (self.value - other.value).abs() - other.uncertainty;
        if beyond > widest { beyond } else { widest }
    }
}

/// Differences of a function's forward, `<dy, y>` at one point.
pub(super) struct Differences<'a> {
    pub function: &'a dyn Function,
    pub inputs: &'a Tensors,
    pub cotangent: &'a ArrayD<f64>,
    /// y at the point.
    pub y: &'a ArrayD<f64>,
    /// The rounding error to expect of each output there, in unit roundoffs.
    pub roundings: &'a ArrayD<f64>,
}

/// A central difference of `<dy, y>`, and beside it the difference of the two one-sided slopes.
struct Difference {
    step: f64,
    central: Estimate,
    /// Vanishes with the step where there is a derivative.
    jump: Estimate,
    /// What each output contributes.
    outputs: Vec<f64>,
    /// The sum of the outputs' rounding errors.
    noise: f64,
    /// The root of the summed squares of the outputs that the element reaches, over the tensor's scale: the numbers
    /// that a difference is the difference of.
    reached: f64,
}

impl Differences<'_> {
    /// The derivative along a direction through a tensor. `inputs` is scratch, and left as it was. `gradient` is
    /// the one under test: positions that are rounded are made up for by its elements.
    pub fn along(
        &self,
        inputs: &mut Tensors,
        tensor: &str,
        direction: &Direction,
        gradient: &[f64],
    ) -> Result<(Along, Vec<Rung>)> {
        let largest = self.inputs[tensor].iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
        let scale = if largest > 0.0 && largest.is_finite() { largest.log2().ceil().exp2() } else { 1.0 };
        let mut at = |step: f64| self.difference(inputs, tensor, direction, gradient, step, scale);

        if self.function.is_affine(tensor) {
            let (near, far) = (at(AFFINE_STEP / 2.0 * scale)?, at(AFFINE_STEP * scale)?);
            // What repeats itself at every power of two only looks like a line.
            let close = at(CLOSE_STEP * scale)?;
            let spread = (near.central.value - far.central.value).abs();
            let jumps = [&far, &close].map(|at| (at.jump.value.abs() - at.jump.uncertainty).max(0.0));
            let uncertainty = far.central.uncertainty + spread + jumps[0] + jumps[1];
            let estimate =
                Estimate { uncertainty: far.central.contradicted(&close.central, uncertainty), ..far.central };
            let rungs = [&far, &near].map(|difference| difference.rung(estimate.value)).to_vec();
            return Ok((Along { estimate, terms: far.terms() }, rungs));
        }
        let mut wide = at(START * scale)?;
        let start = loop {
            let narrow = at(wide.step / 2.0)?;
            if wide.curvature(&narrow) <= CURVATURE || wide.step < f64::EPSILON * scale {
                break wide.step;
            }
            wide = narrow;
        };
        let terms = wide.terms();
        let (mut best, mut rungs) = self.climb(&mut at, start)?;
        for factor in RETRIES {
            if best.uncertainty <= RESOLUTION / 2.0 * terms.max(best.value.abs()) {
                break;
            }
            let (estimate, other) = self.climb(&mut at, factor * start)?;
            if estimate.uncertainty < best.uncertainty {
                (best, rungs) = (estimate, other);
            }
        }
        Ok((Along { estimate: best, terms }, rungs))
    }

    /// The ladder from this step down.
    fn climb(&self, at: &mut impl FnMut(f64) -> Result<Difference>, start: f64) -> Result<(Estimate, Vec<Rung>)> {
        let rungs: Vec<_> = (0..RUNGS).map(|rung| at(start / 2f64.powi(rung))).collect::<Result<_>>()?;
        let far_below = at(start * FAR_BELOW)?;
        let pick = |field: fn(&Difference) -> Estimate| rungs.iter().map(field).collect::<Vec<_>>();
        let mut estimate = extrapolate(&pick(|difference| difference.central), Powers::Even);
        // A function may be straight for as far as the ladder reaches, and bend nearer than its last step.
        estimate.uncertainty = estimate.contradicted(&far_below.central, estimate.uncertainty);
        // Where the slopes on both sides differ however small the step, there is no derivative to agree with.
        let jump = extrapolate(&pick(|difference| difference.jump), Powers::Odd);
        if jump.value.abs() > jump.uncertainty || jump.value.is_nan() {
            estimate.uncertainty += jump.value.abs();
        }
        // Nor where they differ the more the smaller the step.
        let [first, last] = [&rungs[0], &rungs[rungs.len() - 1]].map(|rung| rung.jump);
        if last.value.abs() > first.value.abs().max(last.uncertainty) {
            estimate.uncertainty += last.value.abs();
        }
        Ok((estimate, rungs.iter().map(|difference| difference.rung(estimate.value)).collect()))
    }

    fn difference(
        &self,
        inputs: &mut Tensors,
        tensor: &str,
        direction: &Direction,
        gradient: &[f64],
        step: f64,
        scale: f64,
    ) -> Result<Difference> {
        let mut at = |step: f64| -> ArrayD<f64> {
            let values = self.inputs[tensor].as_slice().expect("standard layout");
            let moved = inputs.get_mut(tensor).expect("an input").as_slice_mut().expect("standard layout");
            direction.iter().for_each(|&(element, speed)| moved[element] = values[element] + step * speed);
            let y = self.function.forward(inputs);
            let moved = inputs.get_mut(tensor).expect("an input").as_slice_mut().expect("standard layout");
            direction.iter().for_each(|&(element, _)| moved[element] = values[element]);
            // Refused out there, where it is accepted at the point itself: it is not defined.
            y.unwrap_or_else(|_| self.y.mapv(|_| f64::NAN))
        };
        let (plus, minus) = (at(step), at(-step));
        let width = 2.0 * step;
        // What the positions themselves were rounded by, times the slope.
        let values = self.inputs[tensor].as_slice().expect("standard layout");
        let misplaced: f64 = direction
            .iter()
            .map(|&(element, speed)| {
                let moved = (values[element] + step * speed) - (values[element] - step * speed) - width * speed;
                if moved == 0.0 { 0.0 } else { moved * gradient[element] / width }
            })
            .sum();
        let mut jumps = Vec::with_capacity(plus.len());
        let (mut squares, mut jump_squares, mut noise, mut reached, mut all) = (0.0, 0.0, 0.0, 0.0, 0.0);
        let mut outputs = Vec::with_capacity(plus.len());
        let moved = plus.iter().zip(&minus).zip(self.y).zip(self.cotangent).zip(self.roundings);
        for ((((&plus, &minus), &here), &dy), &roundings) in moved {
            // Subtracted before it is multiplied by the cotangent: one rounding less, and outputs that
            // the element does not reach drop out exactly.
            let term = dy * (plus - minus) / width;
            outputs.push(term);
            jumps.push(dy * ((plus - here) + (minus - here)) / step);
            // Terms that grow with the step round as much as it is larger than what was there.
            let rounding = roundings * (1.0 + step / scale) + plus.abs() + minus.abs();
            let rounding = NOISE * f64::UNIT_ROUNDOFF * dy.abs() * rounding / width;
            all += (dy * here).powi(2);
            if plus != minus || plus != here {
                squares += rounding.powi(2); // outputs are rounded independently of each other
                noise += rounding;
                reached += (dy * here / scale).powi(2);
            }
            if plus != here || minus != here {
                jump_squares += (4.0 * rounding).powi(2);
            }
        }
        if noise == 0.0 && jump_squares == 0.0 {
            // Nothing moved: either nothing is reached, or by less than the outputs can hold.
            squares = all * (f64::UNIT_ROUNDOFF / step).powi(2);
            reached = all / (scale * scale);
        }
        Ok(Difference {
            step,
            central: Estimate { value: sum(outputs.iter().copied()) - misplaced, uncertainty: squares.sqrt() },
            jump: Estimate { value: sum(jumps), uncertainty: jump_squares.sqrt() },
            outputs,
            noise,
            reached: reached.sqrt(),
        })
    }
}

impl Difference {
    /// The root of the summed squares of the contributions, or of what they are differences of.
    fn terms(&self) -> f64 {
        self.outputs.iter().map(|term| term * term).sum::<f64>().sqrt().max(self.reached)
    }

    /// How much the contributions change when the step is halved, in parts of themselves, beyond rounding.
    fn curvature(&self, narrow: &Difference) -> f64 {
        let change = self.outputs.iter().zip(&narrow.outputs).map(|(wide, narrow)| (wide - narrow).abs()).sum::<f64>();
        let beyond = change - narrow.noise;
        if beyond.is_nan() {
            f64::INFINITY // not defined out there
        } else if beyond <= 0.0 {
            0.0
        } else {
            beyond / narrow.outputs.iter().map(|term| term.abs()).sum::<f64>()
        }
    }

    fn rung(&self, estimate: f64) -> Rung {
        let Estimate { value, .. } = self.central;
        Rung { step: self.step, value, error: (value - estimate).abs() }
    }
}
