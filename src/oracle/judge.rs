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
        let (mut errors, mut over, mut is_beyond) = (Errors::default(), [0.0; CHUNK], [false; CHUNK]);
        for witness in &witnesses {
            let expected = &witness[chunk.clone()];
            let over = &mut over[..expected.len()];
            let [most, absolute, relative, ulps] = compare(spacing, expected, actuals, bounds, over);
            let at = over.iter().position(|over| *over == most).expect("the largest");
            let there = (start + at, [expected[at], actuals[at], bounds[at]]);
            errors = errors.and(Errors { beyond: 0, over: most, absolute, relative, ulps, worst: Some(there) });
            if most > 1.0 {
                is_beyond.iter_mut().zip(&*over).for_each(|(is_beyond, over)| *is_beyond |= *over > 1.0);
            }
        }
        errors.beyond = is_beyond.iter().filter(|is_beyond| **is_beyond).count();
        errors
    };
    let chunks = (0..actuals.len().div_ceil(CHUNK)).into_par_iter().with_min_len(PARALLEL_ELEMENTS / CHUNK);
    chunks.map(of_chunk).reduce(Errors::default, Errors::and)
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

/// Every error over its bound; returns the largest of them, and the largest error, relative error, and error in units of the
/// last place.
#[multiversion(targets("x86_64+avx2"))]
fn compare(spacing: Spacing, expected: &[f64], actual: &[f64], bound: &[f64], over: &mut [f64]) -> [f64; 4] {
    let mut most = [[0.0; LANES]; 4];
    let mut with = |expected: &[f64], actual: &[f64], bound: &[f64], over: &mut [f64]| {
        for (l, (((&expected, &actual), &bound), over)) in expected.iter().zip(actual).zip(bound).zip(over).enumerate()
        {
            let difference = (actual - expected).abs();
            let error = if difference.is_nan() { f64::INFINITY } else { difference };
            // A bound that is no number is no bound.
            let per_bound = if error == 0.0 { 0.0 } else { error / bound };
            *over = if per_bound.is_nan() || bound.is_nan() { f64::INFINITY } else { per_bound };
            let relative = if error == 0.0 { 0.0 } else { error / expected.abs() };
            for (most, one) in most.iter_mut().zip([*over, error, relative, error / spacing.at(expected)]) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array1;
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64;

    /// The same one by one.
    fn plainly(actual: &[f64], witnesses: &[Vec<f64>], bound: &[f64], dtype: Dtype) -> Errors {
        let mut errors = Errors::default();
        for i in 0..actual.len() {
            let mut is_beyond = false;
            for expected in witnesses.iter().map(|witness| witness[i]) {
                let difference = (actual[i] - expected).abs();
                let error = if difference.is_nan() { f64::INFINITY } else { difference };
                let over = if bound[i].is_nan() {
                    f64::INFINITY
                } else if error == 0.0 {
                    0.0
                } else {
                    error / bound[i]
                };
                is_beyond |= over > 1.0;
                errors.absolute = errors.absolute.max(error);
                errors.relative = errors.relative.max(if error == 0.0 { 0.0 } else { error / expected.abs() });
                errors.ulps = errors.ulps.max(error / dtype.ulp(expected));
                if errors.worst.is_none() || over > errors.over {
                    (errors.over, errors.worst) = (over, Some((i, [expected, actual[i], bound[i]])));
                }
            }
            errors.beyond += usize::from(is_beyond);
        }
        errors
    }

    #[test]
    fn an_answer_is_judged_as_if_every_element_were_looked_at_alone() {
        let mut rng = Pcg64::seed_from_u64(1);
        let sizes = [0, 1, 7, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 5, PARALLEL_ELEMENTS + 3 * CHUNK];
        for (case, elements) in sizes.into_iter().chain([2 * CHUNK + 3; 6]).enumerate() {
            let mut draw =
                |scale: f64| -> Vec<f64> { (0..elements).map(|_| scale * rng.random_range(-1.0..1.0)).collect() };
            let (mut actual, mut bound) = (draw(1.0), draw(1.0));
            bound.iter_mut().for_each(|bound| *bound = bound.abs());
            let mut witness: Vec<f64> = actual.iter().zip(draw(0.5)).map(|(actual, off)| actual + off).collect();
            if case == 8 {
                actual[CHUNK + 2] = f64::NAN;
            }
            if case == 9 {
                (bound[2 * CHUNK + 1], witness[2 * CHUNK + 1]) = (f64::NAN, actual[2 * CHUNK + 1]);
            }
            if case == 10 {
                witness[CHUNK] = 2f64.powi(-140); // below the normal numbers of f32
                actual[CHUNK] = 1e300;
            }
            if case == 11 {
                witness = actual.clone();
            }
            let second: Vec<f64> = actual.iter().zip(draw(0.5)).map(|(actual, off)| actual + off).collect();
            for witnesses in [vec![witness.clone()], vec![witness, second]] {
                let arrays: Vec<_> = witnesses.iter().map(|one| Array1::from(one.clone()).into_dyn()).collect();
                let [a, b] = [&actual, &bound].map(|values| Array1::from(values.clone()).into_dyn());
                let (found, expected) =
                    (judge(&a, arrays.iter(), &b, Dtype::F32), plainly(&actual, &witnesses, &bound, Dtype::F32));
                let numbers = |of: &Errors| {
                    let (at, there) = of.worst.map_or((0, [0.0; 3]), |(at, there)| (at, there));
                    (
                        of.beyond,
                        at,
                        [of.over, of.absolute, of.relative, of.ulps].map(f64::to_bits),
                        there.map(f64::to_bits),
                    )
                };
                assert_eq!(numbers(&found), numbers(&expected), "case {case}");
                assert_eq!(found.worst.is_some(), expected.worst.is_some(), "case {case}");
            }
        }
    }
}
