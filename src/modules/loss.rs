//! Losses: one number for a batch. SPEC.md, section 13.10.

use crate::error::check_shape;
use crate::simd;
use crate::{Error, Real, Result, Scalar};
use ndarray::{Array2, ArrayD, Axis, Zip};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// What a model is trained to say.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets<E> {
    /// Classes: in the shape of the model's output without its last axis.
    Classes(ArrayD<i64>),
    /// Values: in the shape of the model's output.
    Values(ArrayD<E>),
}

/// A loss, the mean over all that is said.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Loss, Targets};
/// let scores = array![[0.0, 0.0]].into_dyn(); // [rows, classes]
/// let (loss, gradient) = Loss::CrossEntropy.evaluate(scores, &Targets::Classes(array![1].into_dyn()))?;
/// assert_eq!(loss, 2f64.ln()); // one of two
/// assert_eq!(gradient, array![[0.5, -0.5]].into_dyn()); // the softmax less the class
/// let (loss, gradient) =
///     Loss::MeanSquaredError.evaluate(array![1.0, 3.0].into_dyn(), &Targets::Values(array![1.0, 1.0].into_dyn()))?;
/// assert_eq!((loss, gradient), (2.0, array![0.0, 2.0].into_dyn()));
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// PyTorch's `nn.CrossEntropyLoss` of scores `[..., classes]`: the classes are the last axis.
    CrossEntropy,
    /// PyTorch's `nn.MSELoss`.
    MeanSquaredError,
}

/// So many rows are one task, and one partial sum.
const ROWS: usize = 64;

impl Loss {
    /// The loss of an output, and its gradient with respect to it, in the output's shape.
    ///
    /// # Errors
    ///
    /// Targets that do not fit the output (C1) or the loss; a class that there is not (C9).
    pub fn evaluate<T: Scalar>(self, output: ArrayD<T>, targets: &Targets<T>) -> Result<(T, ArrayD<T>)> {
        match (self, targets) {
            (Self::CrossEntropy, Targets::Classes(classes)) => cross_entropy(output, classes),
            (Self::MeanSquaredError, Targets::Values(values)) => mean_squared_error(output, values),
            _ => Err(self.unfit(targets)),
        }
    }

    fn unfit<E>(self, targets: &Targets<E>) -> Error {
        let (expected, found) = match targets {
            Targets::Values(_) => ("classes", "values"),
            Targets::Classes(_) => ("values", "classes"),
        };
        let reason = format!("expected {expected} for the loss {}, found {found}", self.name());
        Error::Unexpected { tensor: "targets".into(), reason }
    }

    /// As a configuration has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::CrossEntropy => "cross_entropy",
            Self::MeanSquaredError => "mean_squared_error",
        }
    }

    /// The definition, in plain loops.
    ///
    /// # Panics
    ///
    /// Where [`Loss::evaluate`] has an error.
    pub fn define<R: Real>(self, output: &ArrayD<R>, targets: &Targets<f64>) -> R {
        let zero = R::constant(0.0);
        match (self, targets) {
            (Self::CrossEntropy, Targets::Classes(classes)) => {
                let rows = output.rows().into_iter().zip(classes);
                let losses = rows.map(|(row, &class)| {
                    let largest = row.iter().fold(f64::NEG_INFINITY, |largest, score| largest.max(score.value()));
                    let shifted = |score: R| score - R::constant(largest);
                    let sum = row.iter().fold(zero, |sum, &score| sum + shifted(score).exp());
                    sum.ln() - shifted(row[class as usize]) // E121
                });
                losses.fold(zero, |sum, loss| sum + loss) / R::constant(classes.len() as f64)
            }
            (Self::MeanSquaredError, Targets::Values(values)) => {
                let squares = output.iter().zip(values).map(|(&y, &t)| (y - R::constant(t)) * (y - R::constant(t)));
                squares.fold(zero, |sum, square| sum + square) / R::constant(values.len() as f64) // E123
            }
            _ => panic!("{}", self.unfit(targets)),
        }
    }
}

/// The mean of `ln sum_j exp(y_j) - y_t` over rows y `[..., classes]`.
fn cross_entropy<T: Scalar>(output: ArrayD<T>, targets: &ArrayD<i64>) -> Result<(T, ArrayD<T>)> {
    let shape = output.shape().to_vec();
    let (classes, outer) = shape.split_last().map_or((0, &[][..]), |(&classes, outer)| (classes, outer));
    check_shape("targets", outer, targets.shape())?; // C1
    if let Some((index, &found)) = targets.indexed_iter().find(|(_, class)| !(0..classes as i64).contains(class)) {
        let index = ndarray::Dimension::slice(&index).to_vec();
        return Err(Error::ClassOutOfRange { index, classes, found }); // C9
    }
    let rows = targets.len();
    let standard = crate::operators::in_standard_layout(output);
    let mut scores: Array2<T> = standard.into_shape_with_order((rows, classes)).expect("rows");
    let targets: Vec<usize> = targets.iter().map(|&class| class as usize).collect();
    let part = T::one() / T::from_f64(rows as f64);
    let tasks = scores.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter().zip(targets.par_chunks(ROWS));
    let losses: Vec<T> = tasks
        .map(|(mut scores, targets)| {
            let mut sum_of_losses = T::zero();
            for (mut row, &class) in scores.outer_iter_mut().zip(targets) {
                let row = row.as_slice_mut().expect("rows in standard layout");
                let largest = simd::largest(row);
                let of_class = row[class] - largest;
                row.iter_mut().for_each(|score| *score -= largest);
                T::exp_each(row);
                let sum = simd::sum(row);
                sum_of_losses += sum.ln() - of_class; // E121
                let factor = part / sum;
                row.iter_mut().for_each(|score| *score *= factor);
                row[class] -= part; // E122
            }
            sum_of_losses
        })
        .collect();
    let loss = losses.into_iter().fold(T::zero(), |sum, loss| sum + loss) * part;
    Ok((loss, scores.into_shape_with_order(shape).expect("as many elements")))
}

/// The mean of `(y - t)^2`.
fn mean_squared_error<T: Scalar>(mut output: ArrayD<T>, targets: &ArrayD<T>) -> Result<(T, ArrayD<T>)> {
    check_shape("targets", output.shape(), targets.shape())?; // C1
    output -= targets;
    let part = T::one() / T::from_f64(targets.len() as f64);
    let loss = output.iter().fold(T::zero(), |sum, &off| sum + off * off) * part; // E123
    let twice = part + part;
    Zip::from(&mut output).for_each(|off| *off *= twice); // E124
    Ok((loss, output))
}
