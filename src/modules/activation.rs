//! Activations: functions of each element alone. SPEC.md, section 13.1.

use super::{Back, Described, Find, Forward, Module, Pass, Signal, defined};
use crate::operators::{PARALLEL_ELEMENTS, in_standard_layout};
use crate::simd::{add_scaled, scale_each};
use crate::{Real, Result, Scalar};
use multiversion::multiversion;
use ndarray::ArrayD;
use rand_pcg::Pcg64;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// So many elements are one task.
const CHUNK: usize = 1 << 13;

/// Changes chunks of some values beside those of others, on all threads where there are many.
fn in_chunks<T: Scalar>(values: &mut ArrayD<T>, beside: &ArrayD<T>, change: impl Fn(&mut [T], &[T]) + Sync) {
    let elements = values.len();
    let values = values.as_slice_mut().expect("standard layout");
    let beside = beside.as_slice().expect("standard layout");
    if elements < PARALLEL_ELEMENTS {
        change(values, beside);
    } else {
        let beside = beside.par_chunks(CHUNK);
        values.par_chunks_mut(CHUNK).zip(beside).for_each(|(values, beside)| change(values, beside));
    }
}

/// The same of two arrays at once.
fn two_in_chunks<T: Scalar>(
    values: [&mut ArrayD<T>; 2],
    beside: &ArrayD<T>,
    change: impl Fn([&mut [T]; 2], &[T]) + Sync,
) {
    let [first, second] = values.map(|values| values.as_slice_mut().expect("standard layout"));
    let beside = beside.as_slice().expect("standard layout");
    if beside.len() < PARALLEL_ELEMENTS {
        change([first, second], beside);
    } else {
        let values = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
        values.zip(beside.par_chunks(CHUNK)).for_each(|((first, second), beside)| change([first, second], beside));
    }
}

/// Adds another array of the same shape, both in standard layout.
pub(super) fn add_to<T: Scalar>(sum: &mut ArrayD<T>, part: &ArrayD<T>) {
    in_chunks(sum, part, |sum, part| add_scaled(T::one(), part, sum));
}

/// Multiplies every element of dy by a slope that depends on what was kept.
fn times<T: Scalar>(dy: ArrayD<T>, kept: &ArrayD<T>, slope: impl Fn(T) -> T + Sync) -> ArrayD<T> {
    let mut dx = in_standard_layout(dy);
    in_chunks(&mut dx, kept, |dx, kept| times_each(dx, kept, &slope));
    dx
}

#[multiversion(targets("x86_64+avx2"))]
fn times_each<T: Scalar, F: Fn(T) -> T>(values: &mut [T], kept: &[T], factor: F) {
    for (value, &kept) in values.iter_mut().zip(kept) {
        *value *= factor(kept);
    }
}

/// PyTorch's `nn.ReLU`: `y = max(x, 0)`, of any shape.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Module, Pass, Relu, Signal};
/// let x = Signal::Values(array![-1.0, 2.0].into_dyn());
/// let (y, backward) = Relu {}.forward(x, &Pass::evaluation())?;
/// assert_eq!(y, array![0.0, 2.0].into_dyn());
/// assert_eq!(backward(array![10.0, 10.0].into_dyn())?.x.unwrap(), array![0.0, 10.0].into_dyn()); // E82
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relu {}

impl<T: Scalar> Module<T> for Relu {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = in_standard_layout(x.values()?);
        let mut y = pass.array(x.shape());
        // A comparison that keeps NaN: what is wrong must be seen.
        let positive = |x: T| if x <= T::zero() { T::zero() } else { x };
        in_chunks(&mut y, &x, |y, x| y.iter_mut().zip(x).for_each(|(y, &x)| *y = positive(x))); // E81
        let slope = |x| if x > T::zero() { T::one() } else { T::zero() };
        let pass = pass.clone();
        Ok((
            y,
            Box::new(move |dy| {
                let dx = times(dy, &x, slope); // E82
                pass.recycle_input(x);
                Ok(Back::of_input(dx))
            }),
        ))
    }
}

impl Described for Relu {
    fn build<T: Scalar>(&self, _: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        Ok(Box::new(*self))
    }
    fn define<R: Real>(&self, x: Signal<R>, _: Find<'_, R>) -> ArrayD<R> {
        defined(x).mapv(|x| if x.value() > 0.0 { x } else { R::constant(0.0) }) // E81
    }
}

/// Which GELU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Approximate {
    /// `x Phi(x)` with the error function.
    #[default]
    None,
    /// The approximation by tanh.
    Tanh,
}

/// PyTorch's `nn.GELU`, of any shape.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Approximate, GeluSettings, Module, Pass, Signal};
/// let value = |approximate| -> woracle::Result<f64> {
///     let gelu = GeluSettings { approximate };
///     Ok(gelu.forward(Signal::Values(array![1.0].into_dyn()), &Pass::evaluation())?.0[0])
/// };
/// assert!((value(Approximate::None)? - 0.8413447460685429).abs() < 1e-15); // Phi(1)
/// assert!((value(Approximate::Tanh)? - 0.841191990608276).abs() < 1e-15);
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GeluSettings {
    /// Which GELU.
    pub approximate: Approximate,
}

/// The factors of the approximation: `sqrt(2 / pi)`, and that of the cube.
const OUTER: f64 = 0.797_884_560_802_865_4;
const CUBE: f64 = 0.044_715;

/// `1 / (1 + e^(-2 u))` of each x.
#[multiversion(targets("x86_64+avx2"))]
fn logistic<T: Scalar>(share: &mut [T], x: &[T]) {
    let [outer, cube] = [-2.0 * OUTER, CUBE].map(T::from_f64);
    for (share, &x) in share.iter_mut().zip(x) {
        *share = outer * (x + cube * x * x * x);
    }
    T::exp_each(share);
    for share in share {
        *share = (T::one() + *share).recip(); // E85
    }
}

/// What dy is to be multiplied by, in the place of x.
#[multiversion(targets("x86_64+avx2"))]
fn logistic_slope<T: Scalar>(slope: &mut [T], share: &[T]) {
    let [outer, cube] = [2.0 * OUTER, 3.0 * CUBE].map(T::from_f64);
    for (slope, &share) in slope.iter_mut().zip(share) {
        let x = *slope;
        *slope = share + x * share * (T::one() - share) * outer * (T::one() + cube * x * x); // E86
    }
}

impl GeluSettings {
    /// The share of x that is let through, phi: the normal distribution, or the logistic function that approximates it.
    fn share<T: Scalar>(self, share: &mut [T], x: &[T]) {
        let half = T::from_f64(0.5);
        let root_half = T::from_f64(std::f64::consts::FRAC_1_SQRT_2);
        match self.approximate {
            Approximate::None => {
                let normal = |x: T| half * (T::one() + (x * root_half).erf());
                share.iter_mut().zip(x).for_each(|(share, &x)| *share = normal(x));
            }
            Approximate::Tanh => logistic(share, x),
        }
    }
}

impl<T: Scalar> Module<T> for GeluSettings {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = in_standard_layout(x.values()?);
        let [mut share, mut y] = [(); 2].map(|()| pass.array(x.shape()));
        two_in_chunks([&mut share, &mut y], &x, |[share, y], x| {
            self.share(share, x);
            scale_each(share, x, y); // E83, E85
        });
        let pass = pass.clone();
        let approximate = self.approximate;
        Ok((
            y,
            Box::new(move |dy| {
                let half = T::from_f64(0.5);
                let density = T::from_f64(1.0 / (2.0 * std::f64::consts::PI).sqrt());
                let mut slope = x;
                in_chunks(&mut slope, &share, |slope, share| match approximate {
                    Approximate::None => {
                        let mut bell: Vec<T> = slope.iter().map(|&x| -half * x * x).collect();
                        T::exp_each(&mut bell);
                        for ((slope, &share), bell) in slope.iter_mut().zip(share).zip(bell) {
                            *slope = share + *slope * density * bell; // E84
                        }
                    }
                    Approximate::Tanh => logistic_slope(slope, share),
                });
                let dx = times(dy, &slope, |slope| slope);
                pass.recycle(share);
                pass.recycle_input(slope);
                Ok(Back::of_input(dx))
            }),
        ))
    }
}

impl Described for GeluSettings {
    fn build<T: Scalar>(&self, _: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        Ok(Box::new(*self))
    }
    fn define<R: Real>(&self, x: Signal<R>, _: Find<'_, R>) -> ArrayD<R> {
        let number = R::constant;
        defined(x).mapv(|x| match self.approximate {
            Approximate::None => {
                number(0.5) * x * (number(1.0) + (x / number(std::f64::consts::SQRT_2)).erf()) // E83
            }
            Approximate::Tanh => {
                let inner = number(OUTER) * (x + number(CUBE) * x * x * x);
                number(0.5) * x * (number(1.0) + defined_tanh(inner)) // E85
            }
        })
    }
}

/// PyTorch's `nn.Tanh`, of any shape.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Module, Pass, Signal, Tanh};
/// let (y, backward) = Tanh {}.forward(Signal::Values(array![0.0].into_dyn()), &Pass::evaluation())?;
/// assert_eq!(y[0], 0.0);
/// assert_eq!(backward(array![10.0].into_dyn())?.x.unwrap()[0], 10.0); // dx = dy (1 - y^2)
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tanh {}

impl<T: Scalar> Module<T> for Tanh {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let mut kept = in_standard_layout(x.values()?);
        let mut y = pass.array(kept.shape());
        in_chunks(&mut kept, &y, |kept, _| T::tanh_each(kept)); // E87
        y.assign(&kept);
        let pass = pass.clone();
        Ok((
            y,
            Box::new(move |dy| {
                let dx = times(dy, &kept, |y| T::one() - y * y); // E88
                pass.recycle_input(kept);
                Ok(Back::of_input(dx))
            }),
        ))
    }
}

/// `(e^x - e^-x) / (e^x + e^-x)`
fn defined_tanh<R: Real>(x: R) -> R {
    let (up, down) = (x.exp(), (R::constant(0.0) - x).exp());
    (up - down) / (up + down)
}

impl Described for Tanh {
    fn build<T: Scalar>(&self, _: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        Ok(Box::new(*self))
    }
    fn define<R: Real>(&self, x: Signal<R>, _: Find<'_, R>) -> ArrayD<R> {
        defined(x).mapv(defined_tanh) // E87
    }
}
