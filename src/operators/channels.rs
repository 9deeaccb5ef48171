//! What is done to outputs `[outer, units, inner]` channel by channel: scaling, sums, and the mixing of
//! `rank` channels into `units`, `Z[o, i, p] = sum_k B[i, k] U[o, k, p]`. SPEC.md, section 3.

use super::group_slice;
use crate::Scalar;
use crate::matmul::{Accumulate, product_into};
use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3, ArrayViewMut3, Axis, Slice, Zip};
use rayon::prelude::*;

/// Elementwise passes over at least this many elements are spread over threads.
pub const PARALLEL_ELEMENTS: usize = 1 << 16;
/// Rows a thread sums in one go. Fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 64;

/// `y[o, i, p] = scale[i] y[o, i, p] + shift[i]`, without the shift where there is none.
pub(crate) fn scale_channels<T: Scalar>(
    mut y: ArrayViewMut3<'_, T>,
    scale: ArrayView1<'_, T>,
    shift: Option<ArrayView1<'_, T>>,
) {
    let parallel = y.len() >= PARALLEL_ELEMENTS;
    let one = |mut slab: ndarray::ArrayViewMut2<'_, T>| {
        if slab.ncols() == 1 {
            let mut row = slab.column_mut(0);
            match shift {
                Some(shift) => Zip::from(&mut row).and(scale).and(shift).for_each(|y, &g, &b| *y = g * *y + b),
                None => Zip::from(&mut row).and(scale).for_each(|y, &g| *y *= g),
            }
        } else {
            for (i, mut channel) in slab.outer_iter_mut().enumerate() {
                let (g, b) = (scale[i], shift.map_or(T::zero(), |shift| shift[i]));
                channel.map_inplace(|y| *y = g * *y + b);
            }
        }
    };
    if parallel {
        y.axis_iter_mut(Axis(0)).into_par_iter().for_each(one);
    } else {
        y.outer_iter_mut().for_each(one);
    }
}

/// `sum over o, p of a[o, i, p] b[o, i, p]` for every channel i: `[units]`.
pub(crate) fn channel_products<T: Scalar>(a: ArrayView3<'_, T>, b: ArrayView3<'_, T>) -> Array1<T> {
    sum_in_chunks(a, |chunk, start, sums| {
        let b = b.slice_axis(Axis(0), Slice::from(start..start + chunk.len_of(Axis(0))));
        for (a, b) in chunk.outer_iter().zip(b.outer_iter()) {
            if a.ncols() == 1 {
                Zip::from(&mut *sums).and(a.column(0)).and(b.column(0)).for_each(|sum, &a, &b| *sum += a * b);
            } else {
                Zip::from(&mut *sums).and(a.rows()).and(b.rows()).for_each(|sum, a, b| *sum += a.dot(&b));
            }
        }
    })
}

/// `sum over o, p of a[o, i, p]` for every channel i: `[units]`.
pub(crate) fn channel_sums<T: Scalar>(a: ArrayView3<'_, T>) -> Array1<T> {
    sum_in_chunks(a, |chunk, _, sums| {
        for a in chunk.outer_iter() {
            Zip::from(&mut *sums).and(a.rows()).for_each(|sum, a| *sum += a.sum());
        }
    })
}

/// Sums over chunks of [`ROWS`] outer positions, in parallel where that pays, added up in order.
fn sum_in_chunks<T: Scalar>(
    a: ArrayView3<'_, T>,
    add: impl Fn(ArrayView3<'_, T>, usize, &mut Array1<T>) + Sync,
) -> Array1<T> {
    let units = a.len_of(Axis(1));
    let chunk_sums = |index: usize, chunk: ArrayView3<'_, T>| {
        let mut sums = Array1::zeros(units);
        add(chunk, index * ROWS, &mut sums);
        sums
    };
    let chunks = a.axis_chunks_iter(Axis(0), ROWS);
    let partial: Vec<Array1<T>> = if a.len() >= PARALLEL_ELEMENTS {
        chunks.into_par_iter().enumerate().map(|(index, chunk)| chunk_sums(index, chunk)).collect()
    } else {
        chunks.into_iter().enumerate().map(|(index, chunk)| chunk_sums(index, chunk)).collect()
    };
    partial.iter().fold(Array1::zeros(units), |sum, part| sum + part)
}

/// `y[o, i, p] += sum_k b[i, k] u[o, k, p]`, k running over the ranks of the group of i. E5.
///
/// y `[outer, units, inner]`, b `[units, rank / groups]`, u `[outer, rank, inner]`.
pub(crate) fn mix_into<T: Scalar>(
    mut y: ArrayViewMut3<'_, T>,
    b: ArrayView2<'_, T>,
    u: ArrayView3<'_, T>,
    groups: usize,
) {
    for q in 0..groups {
        let (units, ranks) = (group_slice(q, groups, b.nrows()), group_slice(q, groups, u.len_of(Axis(1))));
        let (b, u) = (b.slice_axis(Axis(0), units), u.slice_axis(Axis(1), ranks));
        let mut y = y.slice_axis_mut(Axis(1), units);
        if y.len_of(Axis(2)) == 1 {
            product_into(T::one(), u.index_axis(Axis(2), 0), b.t(), Accumulate::Add, y.index_axis_mut(Axis(2), 0));
        } else {
            for (y, u) in y.outer_iter_mut().zip(u.outer_iter()) {
                product_into(T::one(), b, u, Accumulate::Add, y);
            }
        }
    }
}

/// The adjoint of u -> mix(b, u): `t[o, k, p] = sum_i b[i, k] dy[o, i, p]`: `[outer, rank, inner]`. E6.
pub(crate) fn mix_adjoint_input<T: Scalar>(b: ArrayView2<'_, T>, dy: ArrayView3<'_, T>, groups: usize) -> Array3<T> {
    let (outer, _, inner) = dy.dim();
    let rank = b.ncols() * groups;
    let mut t = Array3::zeros((outer, rank, inner));
    for q in 0..groups {
        let (units, ranks) = (group_slice(q, groups, b.nrows()), group_slice(q, groups, rank));
        let (b, dy) = (b.slice_axis(Axis(0), units), dy.slice_axis(Axis(1), units));
        let mut t = t.slice_axis_mut(Axis(1), ranks);
        if inner == 1 {
            product_into(T::one(), dy.index_axis(Axis(2), 0), b, Accumulate::Add, t.index_axis_mut(Axis(2), 0));
        } else {
            for (t, dy) in t.outer_iter_mut().zip(dy.outer_iter()) {
                product_into(T::one(), b.t(), dy, Accumulate::Add, t);
            }
        }
    }
    t
}

/// The adjoint of b -> mix(b, u): `s[i, k] = sum over o, p of dy[o, i, p] u[o, k, p]`: `[units, rank / groups]`. E7.
pub(crate) fn mix_adjoint_weight<T: Scalar>(dy: ArrayView3<'_, T>, u: ArrayView3<'_, T>, groups: usize) -> Array2<T> {
    let (_, total_units, inner) = dy.dim();
    let rank = u.len_of(Axis(1));
    let mut sums = Array2::zeros((total_units, rank / groups));
    for q in 0..groups {
        let (units, ranks) = (group_slice(q, groups, total_units), group_slice(q, groups, rank));
        let (dy, u) = (dy.slice_axis(Axis(1), units), u.slice_axis(Axis(1), ranks));
        let mut sums = sums.slice_axis_mut(Axis(0), units);
        if inner == 1 {
            product_into(T::one(), dy.index_axis(Axis(2), 0).t(), u.index_axis(Axis(2), 0), Accumulate::Add, sums);
        } else {
            for (dy, u) in dy.outer_iter().zip(u.outer_iter()) {
                product_into(T::one(), dy, u.t(), Accumulate::Add, sums.view_mut());
            }
        }
    }
    sums
}
