//! A number that carries an estimate of its own rounding error, whatever the order it was summed in.
//!
//! Beside its value it keeps two sums of squares: of the terms that make it up, which say how large partial
//! sums get in any order, and of the rounding errors made so far, taken as independent. SPEC.md, section 8.

use crate::Real;
use crate::scalar::erf_slope;
use std::ops::{Add, Div, Mul, Sub};

/// A value and its rounding error, as a root of summed squares in unit roundoffs.
///
/// ```
/// use woracle::{Real, Rounded};
/// let difference = Rounded::exact(1.0) - Rounded::exact(1.0);
/// assert_eq!(difference.value(), 0.0);
/// assert_eq!(difference.roundings(), 2f64.sqrt()); // one rounding of partial sums as large as the terms
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounded {
    value: f64,
    /// The sum of the squares of the terms that make the value up.
    terms: f64,
    /// The sum of the squares of the errors, in unit roundoffs.
    errors: f64,
}

impl Rounded {
    /// A number without error.
    pub fn exact(value: f64) -> Self {
        Self { value, terms: value * value, errors: 0.0 }
    }

    /// The rounding error to expect, in unit roundoffs of the type computed in.
    pub fn roundings(self) -> f64 {
        self.errors.sqrt()
    }

    /// The root of the summed squares of the terms that make the number up: what its error is relative to. A
    /// number much smaller than this is the small difference of large ones.
    pub fn size(self) -> f64 {
        self.terms.max(self.value * self.value).sqrt()
    }

    /// A function of it with this value and slope, rounded once. What its argument was summed up from says nothing of
    /// it.
    fn mapped(self, value: f64, slope: f64) -> Self {
        Self { value, terms: value * value, errors: self.errors * slope * slope + value * value }
    }

    fn sum(self, other: Self, value: f64) -> Self {
        let terms = self.terms + other.terms;
        Self { value, terms, errors: self.errors + other.errors + terms.max(value * value) }
    }
}

impl Add for Rounded {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        self.sum(other, self.value + other.value)
    }
}

impl Sub for Rounded {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self.sum(other, self.value - other.value)
    }
}

// An error that is already in a factor is the same in every term that the factor appears in, so it multiplies
// the other factor itself; a fresh rounding is as large as the terms of the expanded product.

impl Mul for Rounded {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let value = self.value * other.value;
        let terms = self.terms * other.terms;
        let carried = self.errors * other.value.powi(2) + self.value.powi(2) * other.errors;
        Self { value, terms, errors: carried + terms.max(value * value) }
    }
}

impl Div for Rounded {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let value = self.value / other.value;
        let divisor = other.value * other.value;
        let terms = self.terms / divisor;
        let carried = (self.errors + value * value * other.errors) / divisor;
        Self { value, terms, errors: carried + terms.max(value * value) }
    }
}

impl Real for Rounded {
    fn constant(value: f64) -> Self {
        Self::exact(value)
    }
    fn value(self) -> f64 {
        self.value
    }
    fn stored(self) -> Self {
        Self { terms: self.value * self.value, ..self }
    }
    fn sqrt(self) -> Self {
        let square = self.value;
        // The error of a root is that of its argument over twice the root; the root of 0 is exact.
        let errors = if square == 0.0 { 0.0 } else { self.errors / (4.0 * square) + square };
        Self { value: square.sqrt(), terms: square, errors }
    }
    fn exp(self) -> Self {
        let value = self.value.exp();
        self.mapped(value, value)
    }
    fn ln(self) -> Self {
        self.mapped(self.value.ln(), 1.0 / self.value)
    }
    fn erf(self) -> Self {
        self.mapped(Real::erf(self.value), erf_slope(self.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_passes_errors_on_by_its_slope_and_makes_one() {
        let argument = Rounded { value: 2.0, terms: 4.0, errors: 9.0 };
        let roundings = |slope: f64, value: f64| (9.0 * slope * slope + value * value).sqrt();
        for (result, slope) in [
            (Real::exp(argument), 2f64.exp()),
            (Real::ln(argument), 0.5),
            (Real::erf(argument), 2.0 / std::f64::consts::PI.sqrt() * (-4f64).exp()),
        ] {
            approx::assert_relative_eq!(result.roundings(), roundings(slope, result.value()), max_relative = 1e-14);
        }
    }
}
