//! How good a model is on samples that it is not trained with.

use super::{Model, Monitor, Prepared};
use crate::modules::{Pass, Targets};
use crate::{Result, Scalar};
use ndarray::ArrayD;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Samples that are run through a model at once: as many as keep it in the cache, whatever the batch size.
const SAMPLES: usize = 128;

/// What a model makes of some samples.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::Named;
/// use woracle::train::data::{Dataset, Features, Targets};
/// use woracle::train::{Evaluation, Model, Prepared};
/// let modules: Vec<Named> = serde_json::from_str(r#"[{"type": "tanh"}]"#).unwrap();
/// let model = Model::<f64>::new(&modules, 0)?;
/// let samples = Dataset {
///     features: Features::Values(array![[0.0, 0.0], [0.0, 0.0]].into_dyn()), // scores of two classes, as it happens
///     targets: Targets::Classes(array![0, 1].into_dyn()),
///     classes: Some(2),
///     blocks: vec![0, 1],
/// };
/// let evaluation = Evaluation::of(&model, &Prepared::new(samples, None)?, &[0, 1])?;
/// assert_eq!((evaluation.loss, evaluation.accuracy), (2f64.ln(), Some(0.5))); // the first of equal scores counts
/// assert_eq!(evaluation.headline().1, 50.0); // the accuracy in percent
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The mean loss.
    pub loss: f64,
    /// The part of classes that have the highest score; `None` of a regression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// The loss in bits, where classes are said place by place: bits a character of a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<f64>,
}

impl Evaluation {
    /// Runs the model, in evaluation mode, over these samples.
    ///
    /// # Errors
    ///
    /// Samples that do not fit the model.
    pub fn of<T: Scalar>(model: &Model<T>, data: &Prepared<T>, samples: &[usize]) -> Result<Self> {
        let (mut loss, mut right, mut said, mut sequences) = (0.0, 0, 0, false);
        for samples_of_batch in samples.chunks(SAMPLES) {
            let (x, targets) = data.batch(samples_of_batch);
            let (y, _) = model.forward(x, &Pass::evaluation())?;
            if let Targets::Classes(classes) = &targets {
                right += hits(&y, classes);
                said += classes.len();
                sequences |= classes.ndim() > 1;
            }
            let (of_batch, _) = data.loss().evaluate(y, &targets)?;
            loss += of_batch.as_f64() * samples_of_batch.len() as f64;
        }
        let loss = loss / samples.len() as f64;
        let accuracy = (said > 0).then(|| right as f64 / said as f64);
        Ok(Self { loss, accuracy, bits: sequences.then(|| loss / std::f64::consts::LN_2) })
    }

    /// Whether this is better than another.
    pub(super) fn beats(&self, other: &Self, monitor: Monitor) -> bool {
        match monitor {
            Monitor::Loss => self.loss < other.loss,
            Monitor::Accuracy => self.accuracy > other.accuracy,
        }
    }

    /// What people look at: the accuracy in percent, the bits, or the loss; and its name.
    pub fn headline(&self) -> (&'static str, f64) {
        match (self.bits, self.accuracy) {
            (Some(bits), _) => ("bits a character", bits),
            (None, Some(accuracy)) => ("accuracy in %", 100.0 * accuracy),
            (None, None) => ("loss", self.loss),
        }
    }
}

/// How many rows of scores are highest at their class; the first of equal ones counts.
fn hits<T: Scalar>(y: &ArrayD<T>, classes: &ArrayD<i64>) -> usize {
    let best = |row: ndarray::ArrayView1<'_, T>| {
        (1..row.len()).fold(0, |best, class| if row[class] > row[best] { class } else { best }) as i64
    };
    y.rows().into_iter().zip(classes).filter(|(row, class)| best(*row) == **class).count()
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.bits, self.accuracy) {
            (Some(bits), _) => write!(f, "{bits:.4} bits a character"),
            (None, Some(accuracy)) => write!(f, "{:.2} %", 100.0 * accuracy),
            (None, None) => write!(f, "loss {:.6}", self.loss),
        }
    }
}
