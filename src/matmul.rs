//! The one door to matrix products: C = s A B, or C += s A B.
//!
//! By default [faer](https://docs.rs/faer) computes them; with the Cargo feature `openblas-system`
//! or `openblas-static` BLAS-backed ndarray does. Operands may be any strided or transposed views.
//!
//! ```
//! use ndarray::array;
//! let a = array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]; // [3, 2]
//! let ata = woracle::matmul::product(a.t(), a.view()); // [2, 2]
//! assert_eq!(ata, array![[35.0, 44.0], [44.0, 56.0]]);
//! ```

use crate::Scalar;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

/// From this many floating-point operations on, work is spread over the threads of rayon:
/// below it, waking them costs more than they bring.
pub const PARALLEL_FLOPS: usize = 10_000_000;

/// What happens to the destination of a product.
///
/// ```
/// use ndarray::array;
/// use woracle::matmul::{Accumulate, product_into};
/// let (a, b) = (array![[1.0, 2.0]], array![[3.0], [4.0]]); // a b = 11
/// let mut c = array![[100.0]];
/// product_into(2.0, a.view(), b.view(), Accumulate::Add, c.view_mut());
/// assert_eq!(c, array![[122.0]]);
/// product_into(2.0, a.view(), b.view(), Accumulate::Replace, c.view_mut());
/// assert_eq!(c, array![[22.0]]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulate {
    /// C = s A B
    Replace,
    /// C += s A B
    Add,
}

/// A B: `[m, k]` times `[k, n]` is `[m, n]`.
///
/// # Panics
///
/// If the inner dimensions differ.
pub fn product<T: Scalar>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    product_into(T::one(), a, b, Accumulate::Replace, c.view_mut());
    c
}

/// C = s A B or C += s A B: `[m, k]` times `[k, n]` into `[m, n]`.
///
/// # Panics
///
/// If the dimensions do not fit.
pub fn product_into<T: Scalar>(
    scale: T,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    accumulate: Accumulate,
    c: ArrayViewMut2<'_, T>,
) {
    dispatch(scale, a, b, accumulate, c, true);
}

/// The same on the calling thread alone: for callers that are parallel themselves.
///
/// # Panics
///
/// If the dimensions do not fit.
pub fn product_into_on_this_thread<T: Scalar>(
    scale: T,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    accumulate: Accumulate,
    c: ArrayViewMut2<'_, T>,
) {
    dispatch(scale, a, b, accumulate, c, false);
}

/// Runs tasks that multiply, in parallel, and returns what they return in their order. `scratch` makes what a thread
/// needs for one task after the other.
///
/// OpenBLAS has threads of its own: with it the tasks run one after the other.
pub(crate) fn run_tasks<I: Send, S, R: Send>(
    tasks: Vec<I>,
    scratch: impl Fn() -> S + Send + Sync,
    run: impl Fn(&mut S, I) -> R + Send + Sync,
) -> Vec<R> {
    run_small_tasks(1, tasks, scratch, run)
}

/// The same for tasks so small that no fewer than `least` are worth a thread's while; all of them may be too few.
pub(crate) fn run_small_tasks<I: Send, S, R: Send>(
    least: usize,
    tasks: Vec<I>,
    scratch: impl Fn() -> S + Send + Sync,
    run: impl Fn(&mut S, I) -> R + Send + Sync,
) -> Vec<R> {
    if cfg!(feature = "openblas") || tasks.len() <= least {
        let mut scratch = scratch();
        tasks.into_iter().map(|task| run(&mut scratch, task)).collect()
    } else {
        tasks.into_par_iter().with_min_len(least).map_init(scratch, run).collect()
    }
}

/// Does two things, of so many floating-point operations each: side by side where a product of as many would be left to one
/// thread, and takes it longer than waking another.
pub(crate) fn both<A: Send, B: Send>(
    flops: usize,
    one: impl FnOnce() -> A + Send,
    other: impl FnOnce() -> B + Send,
) -> (A, B) {
    if cfg!(not(feature = "openblas")) && (PARALLEL_FLOPS / 4..PARALLEL_FLOPS).contains(&flops) {
        rayon::join(one, other)
    } else {
        (one(), other())
    }
}

fn dispatch<T: Scalar>(
    scale: T,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    accumulate: Accumulate,
    mut c: ArrayViewMut2<'_, T>,
    parallel: bool,
) {
    assert_eq!(a.ncols(), b.nrows(), "inner dimensions of a matrix product");
    assert_eq!(c.dim(), (a.nrows(), b.ncols()), "destination of a matrix product");
    if c.is_empty() {
        return;
    }
    if a.ncols() == 0 {
        if accumulate == Accumulate::Replace {
            c.fill(T::zero());
        }
        return;
    }
    backend::product_into(scale, a, b, accumulate, c, parallel);
}

#[cfg(not(feature = "openblas"))]
mod backend {
    use super::{Accumulate, PARALLEL_FLOPS};
    use crate::Scalar;
    use faer::{Accum, Par, linalg::matmul::matmul};
    use faer_ext::IntoFaer;
    use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix2, Slice};
    use rayon::prelude::*;

    /// Columns this many bytes apart, or a multiple, meet in the same few lines of a cache.
    const PAGE: usize = 4096;

    /// A product with no more rows or columns than this is cut into blocks, one a task, and so is one of no more
    /// operations than that: waking faer's threads for it takes longer.
    const NARROW: usize = 64;
    const SMALL: usize = 1 << 27;
    /// Rows or columns of such a block.
    const BLOCK: usize = 128;
    /// Terms of a sum that one task adds up, at least and at most, where a product of no more elements than `FEW_SUMS` has
    /// sums so much longer than its rows and columns.
    const TERMS: [usize; 2] = [512, 2048];
    const FEW_SUMS: usize = 1 << 18;
    const LONGER: usize = 4;
    /// Rows that one task adds up of such parts.
    const ROWS: usize = 16;
    /// Where B has no more columns than this, columns of A are copied so many at a time.
    const FEW: usize = 16;
    const COPIED: usize = 64;
    /// faer multiplies into a wide destination up to an eighth more slowly than into this many columns at a time.
    const PANEL: usize = 512;

    /// How the work of a product is divided depends on its dimensions alone, and so do results: never on the number of
    /// threads.
    pub(super) fn product_into<T: Scalar>(
        scale: T,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        accumulate: Accumulate,
        mut c: ArrayViewMut2<'_, T>,
        parallel: bool,
    ) {
        let (rows, columns, terms) = (c.nrows(), c.ncols(), a.ncols());
        let flops = 2 * rows * columns * terms;
        let in_blocks = flops <= SMALL || rows.min(columns) <= NARROW;
        let longer = terms >= LONGER * rows.max(columns).max(TERMS[0]);
        let sums_are_long = longer && rows * columns <= FEW_SUMS;
        if !parallel || flops < PARALLEL_FLOPS {
            multiply(scale, a, b, accumulate, c, Par::Seq);
        } else if sums_are_long {
            let of_a_task = terms.div_ceil(LONGER).clamp(TERMS[0], TERMS[1]);
            let starts: Vec<usize> = (0..terms).step_by(of_a_task).collect();
            let part = |start: usize| {
                let terms = Slice::from(start..(start + of_a_task).min(terms));
                let (a, b) = (a.slice_axis(Axis(1), terms), b.slice_axis(Axis(0), terms));
                if columns <= FEW && a.strides()[0] == 1 {
                    return columns_times_rows(scale, a, b);
                }
                let mut part = Array2::zeros((rows, columns));
                multiply(scale, a, b, Accumulate::Replace, part.view_mut(), Par::Seq);
                part
            };
            let parts: Vec<Array2<T>> = starts.into_par_iter().map(part).collect();
            if accumulate == Accumulate::Replace {
                c.fill(T::zero());
            }
            c.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter().enumerate().for_each(|(nth, mut c)| {
                let rows = Slice::from(nth * ROWS..nth * ROWS + c.nrows());
                parts.iter().for_each(|part| c += &part.slice_axis(Axis(0), rows));
            });
        } else if in_blocks && rows <= columns {
            c.axis_chunks_iter_mut(Axis(1), BLOCK).into_par_iter().enumerate().for_each(|(nth, block)| {
                let b = b.slice_axis(Axis(1), Slice::from(nth * BLOCK..nth * BLOCK + block.ncols()));
                multiply(scale, a, b, accumulate, block, Par::Seq);
            });
        } else if in_blocks {
            c.axis_chunks_iter_mut(Axis(0), BLOCK).into_par_iter().enumerate().for_each(|(nth, block)| {
                let a = a.slice_axis(Axis(0), Slice::from(nth * BLOCK..nth * BLOCK + block.nrows()));
                multiply(scale, a, b, accumulate, block, Par::Seq);
            });
        } else {
            // Where b is narrow the copy costs more than it brings.
            let a = if columns * size_of::<T>() >= PAGE { without_aliasing(a) } else { a.into() };
            for (nth, panel) in c.axis_chunks_iter_mut(Axis(1), PANEL).enumerate() {
                let b = b.slice_axis(Axis(1), Slice::from(nth * PANEL..nth * PANEL + panel.ncols()));
                multiply(scale, a.view(), b, accumulate, panel, Par::rayon(0));
            }
        }
    }

    fn multiply<T: Scalar>(
        scale: T,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        accumulate: Accumulate,
        c: ArrayViewMut2<'_, T>,
        par: Par,
    ) {
        let accum = match accumulate {
            Accumulate::Replace => Accum::Replace,
            Accumulate::Add => Accum::Add,
        };
        matmul(c.into_faer(), accum, a.into_faer(), b.into_faer(), scale, par);
    }

    /// `s A B` for contiguous columns of A that would meet in the cache: some are copied to where they do not, and are
    /// there still when they are multiplied.
    fn columns_times_rows<T: Scalar>(scale: T, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
        let mut sums = Array2::zeros((a.nrows(), b.ncols()));
        let mut apart = apart(a.nrows(), COPIED);
        for (a, b) in a.axis_chunks_iter(Axis(1), COPIED).zip(b.axis_chunks_iter(Axis(0), COPIED)) {
            let mut copy = apart.slice_axis_mut(Axis(1), Slice::from(..a.ncols()));
            copy_columns(a, copy.view_mut());
            multiply(scale, copy.view(), b, Accumulate::Add, sums.view_mut(), Par::Seq);
        }
        sums
    }

    /// Columns that lie contiguous are read by faer where they lie: where they would meet in the cache rows are made of
    /// them, which makes a product of 4096 x 512 x 4096 more than twice as fast.
    fn without_aliasing<T: Scalar>(a: ArrayView2<'_, T>) -> CowArray<'_, T, Ix2> {
        let meet = |stride: isize| stride > 0 && (stride as usize * size_of::<T>()).is_multiple_of(PAGE);
        match *a.strides() {
            [1, stride] if meet(stride) => {
                let mut rows = Array2::zeros(a.raw_dim());
                let blocks =
                    rows.axis_chunks_iter_mut(Axis(0), COPIED).into_par_iter().zip(a.axis_chunks_iter(Axis(0), COPIED));
                blocks.for_each(|(mut rows, a)| rows.assign(&a));
                rows.into()
            }
            _ => a.into(),
        }
    }

    /// Column by column: ndarray would copy a few rows of all columns.
    fn copy_columns<T: Scalar>(from: ArrayView2<'_, T>, into: ArrayViewMut2<'_, T>) {
        into.reversed_axes().assign(&from.t());
    }

    /// Contiguous columns that lie a cache line more than their length apart.
    fn apart<T: Scalar>(rows: usize, columns: usize) -> Array2<T> {
        let mut apart = Array2::zeros((columns, rows + PAGE / 64 / size_of::<T>()));
        apart.slice_axis_inplace(Axis(1), Slice::from(..rows));
        apart.reversed_axes()
    }
}

#[cfg(feature = "openblas")]
mod backend {
    // Nothing calls into this crate by name: it brings the library that ndarray's products link to.
    extern crate openblas_src as _;

    use super::Accumulate;
    use crate::Scalar;
    use ndarray::{ArrayView2, ArrayViewMut2, CowArray, Ix2, linalg::general_mat_mul};

    pub(super) fn product_into<T: Scalar>(
        scale: T,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        accumulate: Accumulate,
        mut c: ArrayViewMut2<'_, T>,
        _parallel: bool, // OpenBLAS decides for itself
    ) {
        let beta = if accumulate == Accumulate::Add { T::one() } else { T::zero() };
        let (a, b) = (for_blas(a), for_blas(b));
        if has_unit_stride(c.strides()) {
            general_mat_mul(scale, &a, &b, beta, &mut c);
        } else {
            let mut contiguous = c.to_owned();
            general_mat_mul(scale, &a, &b, beta, &mut contiguous);
            c.assign(&contiguous);
        }
    }

    /// BLAS reads rows or columns that lie contiguous; ndarray would quietly leave it for other strides.
    fn for_blas<T: Scalar>(a: ArrayView2<'_, T>) -> CowArray<'_, T, Ix2> {
        if has_unit_stride(a.strides()) { a.into() } else { a.as_standard_layout().into_owned().into() }
    }

    fn has_unit_stride(strides: &[isize]) -> bool {
        strides.iter().all(|&stride| stride > 0) && strides.contains(&1)
    }
}
