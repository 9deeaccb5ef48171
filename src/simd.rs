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

/// Copies a slice into one of the same length. A line of a small image is copied before the library's function is called.
#[inline(always)]
pub(crate) fn copy<T: Copy>(from: &[T], into: &mut [T]) {
    if into.len() > 64 {
        return into.copy_from_slice(from);
    }
    let ((from, from_rest), (into, into_rest)) = (from.as_chunks::<8>(), into.as_chunks_mut::<8>());
    into.iter_mut().zip(from).for_each(|(into, from)| *into = *from);
    let ((from, from_rest), (into, into_rest)) = (from_rest.as_chunks::<4>(), into_rest.as_chunks_mut::<4>());
    into.iter_mut().zip(from).for_each(|(into, from)| *into = *from);
    // One by one: a loop over all of them would be made that call.
    for i in 0..3 {
        if let (Some(into), Some(from)) = (into_rest.get_mut(i), from_rest.get(i)) {
            *into = *from;
        }
    }
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

/// `sum_j a_j`
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn sum<T: Scalar>(a: &[T]) -> T {
    let (a, rest) = a.as_chunks::<LANES>();
    let mut sums = [T::zero(); LANES];
    for a in a {
        for (sum, &a) in sums.iter_mut().zip(a) {
            *sum += a;
        }
    }
    for (sum, &a) in sums.iter_mut().zip(rest) {
        *sum += a;
    }
    sums.into_iter().fold(T::zero(), |all, sum| all + sum)
}

/// `sum_j a_j^2`
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn sum_of_squares<T: Scalar>(a: &[T]) -> f64 {
    let (a, rest) = a.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for a in a {
        for (sum, &a) in sums.iter_mut().zip(a) {
            *sum += a.as_f64() * a.as_f64();
        }
    }
    for (sum, &a) in sums.iter_mut().zip(rest) {
        *sum += a.as_f64() * a.as_f64();
    }
    sums.into_iter().sum()
}

/// The largest, passing over what is no number.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn largest<T: Scalar>(a: &[T]) -> T {
    let larger = |largest: T, a: T| if a > largest { a } else { largest };
    let (a, rest) = a.as_chunks::<LANES>();
    let mut most = [T::neg_infinity(); LANES];
    for a in a {
        for (most, &a) in most.iter_mut().zip(a) {
            *most = if a > *most { a } else { *most };
        }
    }
    rest.iter().copied().chain(most).fold(T::neg_infinity(), larger)
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

/// Adds to three sums each what `a_j^2`, `a_j^2 b_j^2` and `a_j^2 c_j^2` are with so much added to the three squares, of
/// as many as all have.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn add_square_products<T: Scalar>([a, b, c]: [&[T]; 3], added: [T; 3], into: [&mut [T]; 3]) {
    let [of_a, of_b, of_c] = into;
    let sums = of_a.iter_mut().zip(of_b).zip(of_c);
    for (((&a, &b), &c), ((of_a, of_b), of_c)) in a.iter().zip(b).zip(c).zip(sums) {
        let a_sq = a * a + added[0];
        *of_a += a_sq;
        *of_b += a_sq * (b * b + added[1]);
        *of_c += a_sq * (c * c + added[2]);
    }
}

/// The sums over j of what [`add_square_products`] adds.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn square_products<T: Scalar>([a, b, c]: [&[T]; 3], added: [T; 3]) -> [T; 3] {
    let mut sums = [[T::zero(); LANES]; 3];
    let mut with = |a: &[T], b: &[T], c: &[T]| {
        for (l, ((&a, &b), &c)) in a.iter().zip(b).zip(c).enumerate() {
            let a_sq = a * a + added[0];
            sums[0][l] += a_sq;
            sums[1][l] += a_sq * (b * b + added[1]);
            sums[2][l] += a_sq * (c * c + added[2]);
        }
    };
    let [(a, a_rest), (b, b_rest), (c, c_rest)] = [a, b, c].map(|values| values.as_chunks::<LANES>());
    a.iter().zip(b).zip(c).for_each(|((a, b), c)| with(a, b, c));
    with(a_rest, b_rest, c_rest);
    sums.map(|lanes| lanes.into_iter().fold(T::zero(), |all, sum| all + sum))
}

/// `into_j += scale from_j`, of as many as both have.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn add_scaled<T: Scalar>(scale: T, from: &[T], into: &mut [T]) {
    for (into, &from) in into.iter_mut().zip(from) {
        *into += scale * from;
    }
}

/// e to the power of each, within one and a quarter units in the last place. The standard library's is one number at a
/// time, and so is that of every crate in f64.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
pub(crate) fn exp_each(values: &mut [f64]) {
    for value in values {
        *value = exp(*value);
    }
}

/// ln 2 in two parts, the first of which times any exponent is exact.
const LN_2: [f64; 2] = [0.693_147_180_369_123_8, 1.908_214_929_270_587_7e-10];

/// Added to a number, and taken away again, it rounds it to a whole one, which stands in its last bits in between.
const WHOLE: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52

/// `1 / n!`
const PER_FACTORIAL: [f64; 14] = {
    let mut all = [1.0; 14];
    let mut n = 1;
    while n < all.len() {
        all[n] = all[n - 1] / n as f64;
        n += 1;
    }
    all
};

#[inline(always)]
fn exp(x: f64) -> f64 {
    // Beyond these all is infinite, or 0. A comparison that keeps NaN.
    let x = if x > 720.0 { 720.0 } else { x };
    let x = if x < -760.0 { -760.0 } else { x };
    let whole = |x: f64| (x + WHOLE) - WHOLE;
    let k = whole(x * std::f64::consts::LOG2_E);
    let r = (x - k * LN_2[0]) - k * LN_2[1]; // E154
    let mut power = PER_FACTORIAL[13];
    for n in (0..13).rev() {
        power = power * r + PER_FACTORIAL[n]; // E155
    }
    let power_of_two = |k: f64| f64::from_bits(((k + WHOLE).to_bits() << 52).wrapping_add(1.0_f64.to_bits()));
    // 2^k alone may be beyond the range of what is not.
    let half = whole(k * 0.5);
    power * power_of_two(half) * power_of_two(k - half) // E154
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

/// Takes a magnitude into the smallest but 0 and the largest. A minimum that looks out for NaN would be slower.
#[inline(always)]
pub(crate) fn reach(magnitude: f64, least: &mut f64, most: &mut f64) {
    *least = if magnitude > 0.0 && magnitude < *least { magnitude } else { *least };
    *most = if magnitude > *most { magnitude } else { *most };
}

/// `into_j = (scale values_j)^2`, of as many as both have; returns the squares' [`magnitudes`].
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn squares<T: Scalar>(values: &[f64], scale: f64, into: &mut [T]) -> [f64; 2] {
    let (mut least, mut most) = ([f64::INFINITY; LANES], [0.0; LANES]);
    let mut with = |values: &[f64], into: &mut [T]| {
        for (((value, into), least), most) in values.iter().zip(into).zip(&mut least).zip(&mut most) {
            let square = (value * scale) * (value * scale);
            reach(square, least, most);
            *into = T::from_f64(square);
        }
    };
    let ((values, rest), (into, into_rest)) = (values.as_chunks::<LANES>(), into.as_chunks_mut::<LANES>());
    values.iter().zip(into).for_each(|(values, into)| with(values, into));
    with(rest, into_rest);
    [least.into_iter().fold(f64::INFINITY, f64::min), most.into_iter().fold(0.0, f64::max)]
}

/// The smallest magnitude but 0, infinite where there is none, and the largest.
#[multiversion(targets("x86_64+avx2"))]
pub(crate) fn magnitudes(values: &[f64]) -> [f64; 2] {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let (mut least, mut most) = ([f64::INFINITY; LANES], [0.0; LANES]);
    let mut with = |chunk: &[f64]| {
        for ((least, most), value) in least.iter_mut().zip(&mut most).zip(chunk) {
            reach(value.abs(), least, most);
        }
    };
    chunks.iter().for_each(|chunk| with(chunk));
    with(rest);
    [least.into_iter().fold(f64::INFINITY, f64::min), most.into_iter().fold(0.0, f64::max)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64;

    #[test]
    fn rows_of_any_length_are_copied_and_summed_whole() {
        let mut rng = Pcg64::seed_from_u64(2);
        for length in 0..70 {
            let [a, b] = [(); 2].map(|()| (0..length).map(|_| rng.random_range(-4.0..-1.0)).collect::<Vec<f64>>());
            let mut copied = vec![f64::NAN; length];
            copy(&a, &mut copied);
            assert_eq!(copied, a);
            let near =
                |found: f64, terms: f64| assert!((found - terms).abs() < 1e-12, "{length}: {found}, not {terms}");
            near(sum(&a), a.iter().sum());
            near(sum_of_squares(&a), a.iter().map(|a| a * a).sum());
            near(dot(&a, &b), a.iter().zip(&b).map(|(a, b)| a * b).sum());
            assert_eq!(largest(&a), a.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }
    }

    /// E154 and E155
    #[test]
    fn exponentials_are_the_standard_librarys_within_a_unit_in_the_last_place() {
        let mut rng = Pcg64::seed_from_u64(1);
        for (least, most) in [(-745.2, 709.9), (-40.0, 40.0), (-1.0, 1.0), (-1e-9, 1e-9), (-745.2, -708.0)] {
            let x: Vec<f64> = (0..10_007).map(|_| rng.random_range(least..most)).collect();
            let mut found = x.clone();
            exp_each(&mut found);
            for (x, found) in x.iter().zip(found) {
                let expected = x.exp();
                let unit = if expected.is_finite() { expected.next_up() - expected } else { 0.0 };
                assert!(found == expected || (found - expected).abs() <= unit, "{x}: {found}, not {expected}");
            }
        }
    }

    #[test]
    fn exponentials_beyond_the_range_are_0_or_infinite_and_of_no_number_none() {
        let mut found = [0.0, -0.0, f64::INFINITY, 709.79, 1e300, f64::NEG_INFINITY, -745.2, -1e300, f64::NAN];
        exp_each(&mut found);
        assert_eq!(found[..8], [1.0, 1.0, f64::INFINITY, f64::INFINITY, f64::INFINITY, 0.0, 0.0, 0.0]);
        assert!(found[8].is_nan());
    }
}
