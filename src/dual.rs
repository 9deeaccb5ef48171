//! Dual numbers: a value and its derivative along one direction, carried through every operation by the chain
//! rule. No step, no truncation: derivatives exact to rounding. SPEC.md, section 8.
//!
//! ```
//! use woracle::{Dual, Real};
//! let x: Dual = Dual::new(3.0, 1.0); // the value 3, moving at speed 1
//! let y = Real::sqrt(x * x + Dual::constant(7.0));
//! assert_eq!((y.re, y.eps), (4.0, 3.0 / 4.0));
//! ```

use crate::{Real, Result};
use ndarray::ArrayD;
use num_dual::{Dual64, DualNum};
use std::collections::BTreeMap;

/// A dual number over f64: the value `re` and its derivative `eps`.
pub type Dual = Dual64;

/// Tensors of dual numbers by their names.
pub type DualTensors = BTreeMap<String, ArrayD<Dual>>;

/// y as a function of dual numbers, which take the place of a case's tensors of the same names.
pub type DualForward = Box<dyn Fn(&DualTensors) -> Result<ArrayD<Dual>> + Send + Sync>;

impl Real for Dual {
    fn constant(value: f64) -> Self {
        Dual::from_re(value)
    }
    fn value(self) -> f64 {
        self.re
    }
    fn damped(self, fraction: f64) -> Self {
        Dual::new(self.re, self.eps * fraction)
    }
    fn sqrt(self) -> Self {
        DualNum::sqrt(&self)
    }
}
