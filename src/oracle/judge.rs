//! An answer against what is expected of it, element by element.

use super::Dtype;
use crate::dtype::Spacing;
use crate::operators::PARALLEL_ELEMENTS;
use multiversion::multiversion;
use ndarray::{ArrayD, ArrayRef, IxDyn};
use rayon::prelude::*;
use std::borrow::Cow;

/// So many elements are compared at once.
const CHUNK: usize = 1 << 10;
/// Largest numbers kept beside each other.
const LANES: usize = 8;

/// The largest errors of some elements.
#[derive(Clone, Copy, Default)]
pub(super) struct Errors {
    /// How many lie beyond their bounds.
    pub beyond: usize,
    /// The largest error over its bound, absolute, relative, and in units of the last place.
    pub over: f64,
    pub absolute: f64,
    pub relative: f64,
    pub ulps: f64,
    /// Where the error is largest against its bound, and what is expected there, found, and allowed.
    pub worst: Option<(usize, [f64; 3])>,
}

/// The largest errors of an answer against every witness, all of one shape.
pub(super) fn judge<'a>(
    actual: &ArrayRef<f64, IxDyn>,
    witnesses: impl Iterator<Item = &'a ArrayD<f64>>,
    bound: &ArrayD<f64>,
    dtype: Dtype,
) -> Errors {
    fn elements(values: &ArrayRef<f64, IxDyn>) -> Cow<'_, [f64]> {
        values.as_slice().map_or_else(|| values.iter().copied().collect(), Cow::from)
    }
    let witnesses: Vec<_> = witnesses.map(|witness| elements(witness)).collect();
    let (actuals, bounds, spacing) = (elements(actual), elements(bound), dtype.spacing());
    let of_chunk = |nth: usize| {
        let start = nth * CHUNK;
        let chunk = start..(start + CHUNK).min(actuals.len());
        let [actuals, bounds] = [&actuals, &bounds].map(|values| &values[chunk.clone()]);
        let (mut errors, mut over, mut largest_over) = (Errors::default(), [0.0; CHUNK], [0.0; CHUNK]);
        for witness in &witnesses {
            let expected = &witness[chunk.clone()];
            let over = &mut over[..expected.len()];
            let [absolute, relative, ulps] = compare(spacing, expected, actuals, bounds, over);
            let (at, &most) = first_largest(over);
            let there = (start + at, [expected[at], actuals[at], bounds[at]]);
            errors = errors.and(Errors { beyond: 0, over: most, absolute, relative, ulps, worst: Some(there) });
            for (largest, &over) in largest_over.iter_mut().zip(&*over) {
                *largest = if over > *largest { over } else { *largest };
            }
        }
        errors.beyond = largest_over.iter().filter(|over| **over > 1.0).count();
        errors
    };
    let chunks = (0..actuals.len().div_ceil(CHUNK)).into_par_iter().with_min_len(PARALLEL_ELEMENTS / CHUNK);
    chunks.map(of_chunk).reduce(Errors::default, Errors::and)
}

fn first_largest(values: &[f64]) -> (usize, &f64) {
    values.iter().enumerate().reduce(|most, one| if one.1 > most.1 { one } else { most }).expect("an element")
}

impl Errors {
    /// With those of later elements.
    fn and(self, later: Self) -> Self {
        let later_is_worse = self.worst.is_none() || later.over > self.over;
        Self {
            beyond: self.beyond + later.beyond,
            over: self.over.max(later.over),
            absolute: self.absolute.max(later.absolute),
            relative: self.relative.max(later.relative),
            ulps: self.ulps.max(later.ulps),
            worst: if later_is_worse { later.worst } else { self.worst },
        }
    }
}

/// Every error over its bound; returns the largest error, relative error, and error in units of the last place.
#[multiversion(targets("x86_64+avx2"))]
fn compare(spacing: Spacing, expected: &[f64], actual: &[f64], bound: &[f64], over: &mut [f64]) -> [f64; 3] {
    let mut most = [[0.0; LANES]; 3];
    let mut with = |expected: &[f64], actual: &[f64], bound: &[f64], over: &mut [f64]| {
        for (l, (((&expected, &actual), &bound), over)) in expected.iter().zip(actual).zip(bound).zip(over).enumerate()
        {
            let difference = (actual - expected).abs();
            let error = if difference.is_nan() { f64::INFINITY } else { difference };
            // A bound that is no number is no bound.
            let per_bound = if error == 0.0 { 0.0 } else { error / bound };
            *over = if per_bound.is_nan() || bound.is_nan() { f64::INFINITY } else { per_bound };
            let relative = if error == 0.0 { 0.0 } else { error / expected.abs() };
            for (most, one) in most.iter_mut().zip([error, relative, error / spacing.at(expected)]) {
                most[l] = if one > most[l] { one } else { most[l] };
            }
        }
    };
    let (e, a, b) = (expected.as_chunks::<LANES>(), actual.as_chunks::<LANES>(), bound.as_chunks::<LANES>());
    let o = over.as_chunks_mut::<LANES>();
    for (((expected, actual), bound), over) in e.0.iter().zip(a.0).zip(b.0).zip(o.0) {
        with(expected, actual, bound, over);
    }
    with(e.1, a.1, b.1, o.1);
    most.map(|lanes| lanes.into_iter().fold(0.0, f64::max))
}
