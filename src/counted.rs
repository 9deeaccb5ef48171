//! Numbers that know how many digits they need in whatever order they were summed: a result whose every sum stays below
//! 2^8 of its smallest unit is the same bits in f64, f32, bf16 and f16. SPEC.md, section 11.1.

use crate::Real;
use std::ops::{Add, Div, Mul, Sub};

/// A value, the sum of the absolute terms that it is made of, and the largest power of two that divides them all.
///
/// ```
/// use woracle::{Counted, Real};
/// let three = Counted::constant(1.0) + Counted::constant(2.0);
/// assert_eq!(three.units(), 3.0); // |1| + |2| in units of 1
/// assert_eq!((three - Counted::constant(0.5)).units(), 7.0); // 3.5 in units of 1/2
/// assert_eq!(Real::sqrt(three).units(), f64::INFINITY); // no finite number of digits
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Counted {
    value: f64,
    absolute: f64,
    /// Infinite for 0, which needs none.
    unit: f64,
    /// The most units that anything it was made of needed.
    worst: f64,
}

impl Counted {
    /// The most units that this number, or any that it was made of, needs; infinite where some step was not exact.
    pub fn units(self) -> f64 {
        self.worst
    }

    fn new(value: f64, absolute: f64, unit: f64, worst: f64) -> Self {
        let units = if absolute == 0.0 { 0.0 } else { absolute / unit };
        Self { value, absolute, unit, worst: worst.max(units) }
    }

    /// A number that one step made of others, exactly.
    fn made(value: f64, exact: bool, worst: f64) -> Self {
        Self::new(value, value.abs(), unit(value), if exact { worst } else { f64::INFINITY })
    }

    fn sum(self, other: Self, value: f64) -> Self {
        Self::new(value, self.absolute + other.absolute, self.unit.min(other.unit), self.worst.max(other.worst))
    }
}

/// The largest power of two that divides a number.
fn unit(value: f64) -> f64 {
    if value == 0.0 {
        return f64::INFINITY;
    }
    let mut unit = value.abs().log2().floor().exp2();
    while (value / unit).fract() != 0.0 {
        unit /= 2.0;
    }
    unit
}

impl Add for Counted {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        self.sum(other, self.value + other.value)
    }
}

impl Sub for Counted {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self.sum(other, self.value - other.value)
    }
}

// A product of sums is the sum of the products of their terms: the digits suffice multiplied out, too.
impl Mul for Counted {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let (absolute, worst) = (self.absolute * other.absolute, self.worst.max(other.worst));
        let unit = if absolute == 0.0 { f64::INFINITY } else { self.unit * other.unit };
        Self::new(self.value * other.value, absolute, unit, worst)
    }
}

impl Div for Counted {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let power_of_two = other.value.is_normal() && unit(other.value) == other.value.abs();
        let worst = self.worst.max(other.worst);
        let divisor = other.value.abs();
        match power_of_two {
            true => Self::new(self.value / other.value, self.absolute / divisor, self.unit / divisor, worst),
            false => Self::made(self.value / other.value, false, worst),
        }
    }
}

impl Real for Counted {
    fn constant(value: f64) -> Self {
        Self::made(value, value.is_finite(), 0.0)
    }
    fn value(self) -> f64 {
        self.value
    }
    fn sqrt(self) -> Self {
        let root = self.value.sqrt();
        Self::made(root, root * root == self.value, self.worst)
    }
    fn exp(self) -> Self {
        Self::made(self.value.exp(), self.value == 0.0, self.worst)
    }
    fn ln(self) -> Self {
        Self::made(self.value.ln(), self.value == 1.0, self.worst)
    }
    fn erf(self) -> Self {
        Self::made(Real::erf(self.value), self.value == 0.0, self.worst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_exact_at_one_argument() {
        let exact = [Real::exp(Counted::constant(0.0)), Real::ln(Counted::constant(1.0))];
        assert!(exact.into_iter().chain([Real::erf(Counted::constant(0.0))]).all(|exact| exact.units() <= 1.0));
        let half = Counted::constant(0.5);
        assert!([Real::exp(half), Real::ln(half), Real::erf(half)].iter().all(|one| one.units() == f64::INFINITY));
    }
}
