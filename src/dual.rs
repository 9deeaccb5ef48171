//! Dual numbers: a value and its derivative along one direction, carried through every operation by the chain
//! rule. No step, no truncation: derivatives exact to rounding. SPEC.md, section 8.

use crate::scalar::erf_slope;
use crate::{Real, Result};
use ndarray::ArrayD;
use num_dual::{Dual64, DualNum};
use std::collections::BTreeMap;
use std::ops::{Add, Div, Mul, Sub};

/// A dual number over f64: the value `re` and its derivative `eps`.
///
/// ```
/// use woracle::{Dual, Real};
/// let x: Dual = Dual::new(3.0, 1.0); // the value 3, moving at speed 1
/// let y = Real::sqrt(x * x + Dual::constant(7.0));
/// assert_eq!((y.re, y.eps), (4.0, 3.0 / 4.0));
/// ```
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
    fn exp(self) -> Self {
        DualNum::exp(&self)
    }
    fn ln(self) -> Self {
        DualNum::ln(&self)
    }
    fn erf(self) -> Self {
        Dual::new(Real::erf(self.re), self.eps * erf_slope(self.re))
    }
}

/// A dual number over any numbers: over [`Rounded`](crate::Rounded) ones it tells how far off a derivative may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DualOver<R> {
    pub re: R,
    pub eps: R,
}

impl<R: Real> Add for DualOver<R> {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { re: self.re + other.re, eps: self.eps + other.eps }
    }
}

impl<R: Real> Sub for DualOver<R> {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self { re: self.re - other.re, eps: self.eps - other.eps }
    }
}

impl<R: Real> Mul for DualOver<R> {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        Self { re: self.re * other.re, eps: self.eps * other.re + self.re * other.eps }
    }
}

impl<R: Real> Div for DualOver<R> {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let re = self.re / other.re;
        Self { re, eps: (self.eps - re * other.eps) / other.re }
    }
}

impl<R: Real> Real for DualOver<R> {
    fn constant(value: f64) -> Self {
        Self { re: R::constant(value), eps: R::constant(0.0) }
    }
    fn value(self) -> f64 {
        self.re.value()
    }
    fn sqrt(self) -> Self {
        let re = self.re.sqrt();
        Self { re, eps: self.eps / (re + re) }
    }
    fn exp(self) -> Self {
        let re = self.re.exp();
        Self { re, eps: self.eps * re }
    }
    fn ln(self) -> Self {
        Self { re: self.re.ln(), eps: self.eps / self.re }
    }
    fn erf(self) -> Self {
        Self { re: self.re.erf(), eps: self.eps * erf_slope(self.re) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of any numbers and one of f64 are the same rules, written by two people.
    #[test]
    fn derivatives_over_any_number_are_those_of_dual_numbers() {
        type Of<N> = fn(N) -> N;
        fn unary<N: Real>() -> [Of<N>; 4] {
            [N::sqrt, N::exp, N::ln, N::erf]
        }
        fn binary<N: Real>() -> [fn(N, N) -> N; 4] {
            [|a, b| a + b, |a, b| a - b, |a, b| a * b, |a, b| a / b]
        }
        let over = |re: f64, eps: f64| DualOver { re, eps };
        for (ours, theirs) in unary::<DualOver<f64>>().into_iter().zip(unary::<Dual>()) {
            let (ours, theirs) = (ours(over(0.7, 2.0)), theirs(Dual::new(0.7, 2.0)));
            approx::assert_relative_eq!(ours.re, theirs.re, max_relative = 1e-14);
            approx::assert_relative_eq!(ours.eps, theirs.eps, max_relative = 1e-14);
        }
        for (ours, theirs) in binary::<DualOver<f64>>().into_iter().zip(binary::<Dual>()) {
            let (ours, theirs) =
                (ours(over(0.7, 2.0), over(-1.5, 0.3)), theirs(Dual::new(0.7, 2.0), Dual::new(-1.5, 0.3)));
            approx::assert_relative_eq!(ours.re, theirs.re, max_relative = 1e-14);
            approx::assert_relative_eq!(ours.eps, theirs.eps, max_relative = 1e-14);
        }
    }
}
