//! The numbers this crate computes with.
//!
//! [`Scalar`] (f32, f64) is what the production path runs on. [`Real`] asks for much less, so that
//! the definition can also run on numbers that carry something along: [`Rounded`](crate::Rounded) carries an
//! estimate of its own rounding error, [`Dual`](crate::Dual) a derivative.

use crate::operators::PARALLEL_ELEMENTS;
use crate::simd::exp_each;
use ndarray::{ArcArray, IxDyn, Zip};
use rten_simd::SimdUnaryOp;
use std::ops::{Add, Div, Mul, Sub};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// The floating-point type of a layer: `f32` or `f64`.
///
/// ```
/// use ndarray::array;
/// use woracle::Scalar;
/// /// Written once for f32 and f64.
/// fn softplus<T: Scalar>(x: T) -> T {
///     let mut one = [x];
///     T::exp_each(&mut one);
///     (T::one() + one[0]).ln()
/// }
/// assert_eq!(softplus(0.0_f64), 2f64.ln());
/// assert!((softplus(0.0_f32).as_f64() - 2f64.ln()).abs() <= 4.0 * f32::UNIT_ROUNDOFF);
/// assert_eq!((f32::NAME, f32::from_f64(0.1).as_f64()), ("f32", 0.10000000149011612));
/// let shared = array![1.5].into_dyn().into();
/// assert_eq!(f32::from_shared(&shared)[0], 1.5_f32);
/// ```
pub trait Scalar: ndarray::NdFloat + faer::traits::ComplexField + sealed::Sealed {
    /// `"f32"` or `"f64"`.
    const NAME: &'static str;
    /// Half the distance from 1 to the next number: the largest relative error of one rounding.
    const UNIT_ROUNDOFF: f64;
    /// The nearest number of this type.
    fn from_f64(value: f64) -> Self;
    /// The same number in f64, exactly.
    fn as_f64(self) -> f64;
    /// The error function.
    fn erf(self) -> Self;
    /// e to the power of each.
    fn exp_each(values: &mut [Self]);
    /// The hyperbolic tangent of each.
    fn tanh_each(values: &mut [Self]);
    /// The nearest numbers of this type, in the same shape: the same memory where they are the same numbers.
    fn from_shared(values: &ArcArray<f64, IxDyn>) -> ArcArray<Self, IxDyn>;
}

impl Scalar for f32 {
    const NAME: &'static str = "f32";
    const UNIT_ROUNDOFF: f64 = f32::EPSILON as f64 / 2.0;
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    fn as_f64(self) -> f64 {
        f64::from(self)
    }
    fn erf(self) -> Self {
        libm::erff(self)
    }
    fn exp_each(values: &mut [Self]) {
        rten_vecmath::Exp {}.map_mut(values);
    }
    fn tanh_each(values: &mut [Self]) {
        rten_vecmath::Tanh {}.map_mut(values);
    }
    fn from_shared(values: &ArcArray<f64, IxDyn>) -> ArcArray<Self, IxDyn> {
        let narrow = |&value: &f64| value as f32;
        if values.len() < PARALLEL_ELEMENTS {
            values.map(narrow).into()
        } else {
            Zip::from(values).par_map_collect(narrow).into()
        }
    }
}

impl Scalar for f64 {
    const NAME: &'static str = "f64";
    const UNIT_ROUNDOFF: f64 = f64::EPSILON / 2.0;
    fn from_f64(value: f64) -> Self {
        value
    }
    fn as_f64(self) -> f64 {
        self
    }
    fn erf(self) -> Self {
        libm::erf(self)
    }
    fn exp_each(values: &mut [Self]) {
        exp_each(values);
    }
    fn tanh_each(values: &mut [Self]) {
        values.iter_mut().for_each(|value| *value = value.tanh());
    }
    fn from_shared(values: &ArcArray<f64, IxDyn>) -> ArcArray<Self, IxDyn> {
        values.clone()
    }
}

/// A number that the [definition](crate::wora::Definition) can be evaluated on.
///
/// ```
/// use woracle::{Dual, Real};
/// /// Written once for numbers of every kind.
/// fn logistic<R: Real>(x: R) -> R {
///     let one = R::constant(1.0);
///     one / (one + (R::constant(0.0) - x).exp())
/// }
/// assert_eq!(logistic(0.0), 0.5);
/// let dual = logistic(Dual::new(0.0, 1.0));
/// assert_eq!((dual.value(), dual.eps), (0.5, 0.25)); // and its slope
/// assert!((Real::erf(Dual::new(0.0, 1.0)).eps - 2.0 / std::f64::consts::PI.sqrt()).abs() < 1e-15);
/// assert_eq!(Dual::new(3.0, 1.0).damped(0.25).eps, 0.25); // a quarter of its changes count
/// assert_eq!(Real::ln(Dual::new(1.0, 2.0)).eps, 2.0);
/// ```
pub trait Real:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Send + Sync + 'static
{
    /// A constant: exact, and independent of every input.
    fn constant(value: f64) -> Self;
    /// The number itself, without what it carries along.
    fn value(self) -> f64;
    /// The same number as one that is stored: what it was summed up from is forgotten.
    fn stored(self) -> Self {
        self
    }
    /// The same number, of whose changes only this fraction counts: what a lookup does to a gradient under
    /// `padding_idx` and `scale_grad_by_freq` (SPEC.md, E41).
    fn damped(self, _fraction: f64) -> Self {
        self
    }
    /// The square root.
    fn sqrt(self) -> Self;
    /// e to this power.
    fn exp(self) -> Self;
    /// The natural logarithm.
    fn ln(self) -> Self;
    /// The error function, `2 / sqrt(pi)` times the integral of `exp(-t^2)` from 0 on.
    fn erf(self) -> Self;
}

/// The derivative of [`Real::erf`]: `2 / sqrt(pi) exp(-x^2)`.
pub(crate) fn erf_slope<R: Real>(x: R) -> R {
    R::constant(std::f64::consts::FRAC_2_SQRT_PI) * (R::constant(0.0) - x * x).exp()
}

impl Real for f64 {
    fn constant(value: f64) -> Self {
        value
    }
    fn value(self) -> f64 {
        self
    }
    fn sqrt(self) -> Self {
        self.sqrt()
    }
    fn exp(self) -> Self {
        self.exp()
    }
    fn ln(self) -> Self {
        self.ln()
    }
    fn erf(self) -> Self {
        libm::erf(self)
    }
}
