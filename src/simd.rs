//! Loops over slices, compiled for newer processors too and chosen at run time. Sums are kept in as many lanes as vector
//! registers have and added up in the same order everywhere.

use crate::Scalar;
use multiversion::multiversion;
use ndarray::ArrayView1;
use std::borrow::Cow;

/// A row as a slice, copied only where it does not lie contiguous.
pub(crate) fn contiguous<T: Clone>(row: ArrayView1<'_, T>) -> Cow<'_, [T]> {
    row.to_slice().map_or_else(|| row.to_vec().into(), Cow::from)
}

/// Sums kept beside each other: four registers of f64, two of f32.
const LANES: usize = 16;

/// `sum_j a_j b_j`, of as many as both have.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn dot<T: Scalar>(a: &[T], b: &[T]) -> T {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [T::zero(); LANES];
    for (a, b) in a.iter().zip(b) {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    for ((sum, &a), &b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += a * b;
    }
    sums.into_iter().fold(T::zero(), |all, sum| all + sum)
}

/// `into_j = scale from_j + shift`, of as many as both have.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn scale_and_shift<T: Scalar>(scale: T, shift: T, from: &[T], into: &mut [T]) {
    for (into, &from) in into.iter_mut().zip(from) {
        *into = scale * from + shift;
    }
}

/// `into_j = scale_j from_j + shift_j`, of as many as all have.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn scale_and_shift_each<T: Scalar>(scale: &[T], shift: &[T], from: &[T], into: &mut [T]) {
    for (((into, &from), &scale), &shift) in into.iter_mut().zip(from).zip(scale).zip(shift) {
        *into = scale * from + shift;
    }
}

/// `into_j = scale_j from_j`, of as many as all have.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn scale_each<T: Scalar>(scale: &[T], from: &[T], into: &mut [T]) {
    for ((into, &from), &scale) in into.iter_mut().zip(from).zip(scale) {
        *into = scale * from;
    }
}

/// `into_j += a_j b_j`, of as many as all have.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn add_products<T: Scalar>(a: &[T], b: &[T], into: &mut [T]) {
    for ((into, &a), &b) in into.iter_mut().zip(a).zip(b) {
        *into += a * b;
    }
}

/// `into_j += scale from_j`, of as many as both have.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn add_scaled<T: Scalar>(scale: T, from: &[T], into: &mut [T]) {
    for (into, &from) in into.iter_mut().zip(from) {
        *into += scale * from;
    }
}

/// Whether none is infinite or no number.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn all_finite<T: Scalar>(values: &[T]) -> bool {
    // Times zero what is not finite is no number, and stays none in a sum.
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut sums = [T::zero(); LANES];
    for chunk in chunks {
        for (sum, &value) in sums.iter_mut().zip(chunk) {
            *sum += value * T::zero();
        }
    }
    sums.iter().all(|sum| sum.is_finite()) && rest.iter().all(|value| value.is_finite())
}

/// The smallest magnitude but 0, infinite where there is none, and the largest.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn magnitudes(values: &[f64]) -> [f64; 2] {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let (mut least, mut most) = ([f64::INFINITY; LANES], [0.0; LANES]);
    let mut with = |chunk: &[f64]| {
        for ((least, most), value) in least.iter_mut().zip(&mut most).zip(chunk) {
            let magnitude = value.abs();
            *least = if magnitude > 0.0 && magnitude < *least { magnitude } else { *least };
            *most = if magnitude > *most { magnitude } else { *most };
        }
    };
    chunks.iter().for_each(|chunk| with(chunk));
    with(rest);
    [least.into_iter().fold(f64::INFINITY, f64::min), most.into_iter().fold(0.0, f64::max)]
}
