//! Merging: the plain layer that computes what the adapted one does, and the way back. SPEC.md, section 7.
//!
//! The way back needs the norms that merging divided by: W' has lost them.

use super::direction::{Direction, weight_norm};
use super::{Layer, NormAxis};
use crate::error::check_shape;
use crate::matmul::{Accumulate, product_into};
use crate::operators::{Operator, group_slice};
use crate::{Error, Result, Scalar};
use ndarray::{Array1, Array2, ArrayD, ArrayView2, Axis};

/// A merged weight, and what it takes to undo the merge.
#[doc = include_str!("../../docs/merge.md")]
///
/// ```
/// # use ndarray::array;
/// # use rand::SeedableRng;
/// # use woracle::{operators::Linear, wora::{Base, Config, Layer, LoraInit, Method}};
/// # let operator = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
/// # let base = Base { weight: array![[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]].into_dyn().into(), bias: None };
/// # let mut rng = rand_pcg::Pcg64::seed_from_u64(1);
/// # let layer = Layer::init(operator, Config::new(Method::Wora, 2.0), base, 1, LoraInit::default(), &mut rng)?;
/// let merged = layer.merge()?;
/// assert_eq!(merged.weight_norm.as_ref().unwrap(), &array![3.0, 5.0]);
/// let restored: ndarray::ArrayD<f64> = layer.unmerge(&merged)?;
/// assert!((restored - &layer.base().weight).iter().all(|difference| difference.abs() < 1e-14));
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Merged<T> {
    /// W', in the shape and layout of W0.
    pub weight: ArrayD<T>,
    /// `n = ||V|| + eps`, which was divided by: `[units]`, or `[fan_in]` with `norm_axis = "input"`; 0 where
    /// `||V|| = 0`; `None` for LoRA.
    pub weight_norm: Option<Array1<T>>,
}

impl<O: Operator, T: Scalar> Layer<O, T> {
    /// `W' = g V`. E12
    ///
    /// # Errors
    ///
    /// A unit with `||V|| = 0` (C5), unless `zero_norm` allows it; a norm that overflows (C2).
    pub fn merge(&self) -> Result<Merged<T>> {
        self.merge_by(|weighted| self.norms_of(weighted))
    }

    /// [`Layer::merge`] of some columns of a larger weight, whose norms `||V||` are these.
    pub(crate) fn merge_at_norm(&self, norm: Array1<T>) -> Result<Merged<T>> {
        self.merge_by(|_| norm)
    }

    /// `||V_i||^2`, which those of other columns are added to.
    pub(crate) fn squared_weighted_norms(&self) -> Array1<T> {
        self.norms_of(self.weighted_matrix().view()).mapv_into(|norm| norm * norm)
    }

    /// `norm` finds `||V||` where there is a method with norms.
    fn merge_by(&self, norm: impl FnOnce(ArrayView2<'_, T>) -> Array1<T>) -> Result<Merged<T>> {
        let mut weighted = self.weighted_matrix();
        let Some(magnitude) = self.magnitude() else {
            return Ok(Merged { weight: self.operator().stored_weight(weighted), weight_norm: None });
        };
        let weight_norm = weight_norm(norm(weighted.view()).view(), self.config())?; // E10
        let gain = Direction::gain(magnitude, weight_norm.view()); // E11
        weighted *= &self.along_norm_axis(gain); // E12
        Ok(Merged { weight: self.operator().stored_weight(weighted), weight_norm: Some(weight_norm) })
    }

    /// `W0 = (W' / g - alpha s B A) / beta`, in the shape and layout of W0. E37
    ///
    /// # Errors
    ///
    /// beta = 0, or a magnitude of 0 where the norm is not: W' does not hold W0 then (C6). A weight of another shape
    /// or norms that are missing (C1, C7).
    pub fn unmerge(&self, merged: &Merged<T>) -> Result<ArrayD<T>> {
        check_shape("merged_weight", self.base().weight.shape(), merged.weight.shape())?; // C1
        if self.beta() == T::zero() {
            return Err(Error::Unmerge { expected: "beta other than 0".into(), found: "0".into() }); // C6
        }
        let standard = merged.weight.as_standard_layout();
        let mut weight = self.operator().weight_matrix(standard.view()).to_owned();
        if let Some(magnitude) = self.magnitude() {
            let Some(weight_norm) = &merged.weight_norm else {
                let expected = "the norms that merging divided by".into();
                return Err(Error::Missing { tensor: "weight_norm".into(), expected }); // C7
            };
            check_shape("weight_norm", magnitude.shape(), weight_norm.shape())?; // C1
            let lost = |(&m, &n): (&T, &T)| m == T::zero() && n != T::zero();
            if let Some(unit) = magnitude.iter().zip(weight_norm).position(lost) {
                let expected = format!("m[{unit}] other than 0");
                return Err(Error::Unmerge { expected, found: "0".into() }); // C6
            }
            // Where the norm is 0, V is, whatever the magnitude.
            let inverse_gain = Direction::gain(weight_norm.view(), magnitude);
            weight *= &self.along_norm_axis(inverse_gain); // E37
        }
        weight -= &self.delta_weight(self.alpha() * self.scaling()); // E37
        weight /= self.beta(); // E37
        Ok(self.operator().stored_weight(weight))
    }

    /// `V = beta W0 + alpha s B A`, in the shape and layout of W0. E9
    pub fn weighted(&self) -> ArrayD<T> {
        self.operator().stored_weight(self.weighted_matrix())
    }

    /// V: `[units, fan_in]`
    fn weighted_matrix(&self) -> Array2<T> {
        let mut weighted = self.delta_weight(self.alpha() * self.scaling());
        weighted.scaled_add(self.beta(), &self.weight()); // E9
        weighted
    }

    /// `scale B A`: `[units, fan_in]`
    pub(crate) fn delta_weight(&self, scale: T) -> Array2<T> {
        let (a, b, groups) = (self.a(), self.b(), self.operator().groups());
        let mut delta = Array2::zeros((b.nrows(), a.ncols()));
        for q in 0..groups {
            let (units, ranks) = (group_slice(q, groups, b.nrows()), group_slice(q, groups, a.nrows()));
            let (a, b) = (a.slice_axis(Axis(0), ranks), b.slice_axis(Axis(0), units));
            product_into(scale, b, a, Accumulate::Replace, delta.slice_axis_mut(Axis(0), units));
        }
        delta
    }

    /// One number a norm, broadcastable over `[units, fan_in]`.
    fn along_norm_axis(&self, values: Array1<T>) -> Array2<T> {
        let axis = if self.config().norm_axis == NormAxis::Output { 1 } else { 0 };
        values.insert_axis(Axis(axis))
    }
}
