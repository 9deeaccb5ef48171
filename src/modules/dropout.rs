//! Dropout: some elements are zero while a model is trained, the others are larger for it. SPEC.md, section 13.5.

use super::{Back, Described, Find, Forward, Module, Pass, Signal, defined};
use crate::{Real, Result, Scalar};
use ndarray::ArrayD;
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

/// PyTorch's `nn.Dropout`, of any shape. What is dropped depends on the run's seed, the step and the module's name.
///
/// ```
/// use ndarray::ArrayD;
/// use woracle::modules::{DropoutSettings, Module, Pass, Signal};
/// let dropout = DropoutSettings { p: 0.75 };
/// let run = |pass: &Pass<'_, f64>| dropout.forward(Signal::Values(ArrayD::ones(vec![1000])), pass).map(|(y, _)| y);
/// let trained = run(&Pass::training(1))?;
/// assert!(trained.iter().all(|&y| y == 0.0 || y == 4.0)); // kept with probability 1 / 4, four times as large
/// assert!((trained.sum() / 1000.0 - 1.0).abs() < 0.2);
/// assert_eq!(run(&Pass::evaluation())?, ArrayD::<f64>::ones(vec![1000]));
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropoutSettings {
    /// The probability that an element is dropped: from 0 to below 1.
    pub p: f64,
}

impl<T: Scalar> Module<T> for DropoutSettings {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let mut y = x.values()?;
        let Some(mask) = pass.mask(y.shape(), self.p) else {
            return Ok((y, Box::new(|dy| Ok(Back::of_input(dy)))));
        };
        y *= &mask; // E103
        Ok((
            y,
            Box::new(move |mut dy| {
                dy *= &mask; // E104
                Ok(Back::of_input(dy))
            }),
        ))
    }
}

impl Described for DropoutSettings {
    fn build<T: Scalar>(&self, _: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        Pass::<T>::check_probability("p", self.p)?;
        Ok(Box::new(*self))
    }
    /// With the mask as a parameter.
    fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
        ndarray::Zip::from(&defined(x)).and(&parameters("mask")).map_collect(|&x, &mask| x * mask) // E103
    }
}
