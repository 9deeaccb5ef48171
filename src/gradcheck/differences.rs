//! Central differences at a ladder of steps, extrapolated to step 0, with an estimate of the error.
//!
//! ```
//! use woracle::gradcheck::{Estimate, ladder};
//! let central = |h: f64| Ok(Estimate { value: ((1.0 + h).exp() - (1.0 - h).exp()) / (2.0 * h), uncertainty: 1e-15 / h });
//! let estimate = ladder(central, 0.125, 10)?;
//! assert!((estimate.value - 1f64.exp()).abs() <= estimate.uncertainty);
//! assert!(estimate.uncertainty < 1e-12);
//! # Ok::<(), woracle::Error>(())
//! ```

use crate::Result;

/// A value and how far off it may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// A bound on its error.
    pub uncertainty: f64,
}

/// Ridders' extrapolation: `central(h)` at h, h/2, h/4, ... (`rungs` of them), each column of the tableau
/// removing one more even power of h. The entry with the smallest error estimate wins: the distance to its
/// neighbours plus the rounding that `central` reports, which the extrapolation at most doubles.
///
/// # Errors
///
/// Whatever `central` says.
pub fn ladder(mut central: impl FnMut(f64) -> Result<Estimate>, h: f64, rungs: usize) -> Result<Estimate> {
    let mut best = Estimate { value: f64::NAN, uncertainty: f64::INFINITY };
    let mut previous: Vec<f64> = Vec::new();
    for rung in 0..rungs {
        let Estimate { value, uncertainty: rounding } = central(h / 2f64.powi(rung as i32))?;
        let mut row = vec![value];
        for column in 1..=rung {
            let power = 4f64.powi(column as i32);
            let extrapolated = (power * row[column - 1] - previous[column - 1]) / (power - 1.0);
            let spread = (extrapolated - row[column - 1]).abs().max((extrapolated - previous[column - 1]).abs());
            let uncertainty = spread + 2.0 * rounding;
            if uncertainty < best.uncertainty {
                best = Estimate { value: extrapolated, uncertainty };
            }
            row.push(extrapolated);
        }
        previous = row;
    }
    Ok(best)
}
