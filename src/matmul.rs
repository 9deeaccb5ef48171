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

/// From this many floating-point operations on, work is spread over the threads of rayon:
/// below it, waking them costs more than they bring.
pub const PARALLEL_FLOPS: usize = 10_000_000;

/// What happens to the destination of a product.
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

    /// Columns this many bytes apart, or a multiple, meet in the same few lines of a cache.
    const PAGE: usize = 4096;

    pub(super) fn product_into<T: Scalar>(
        scale: T,
        a: ArrayView2<'_, T>,
        b: ArrayView2<'_, T>,
        accumulate: Accumulate,
        c: ArrayViewMut2<'_, T>,
        parallel: bool,
    ) {
        let (rows, columns) = c.dim();
        // A product with one row or one column is split along the sum by faer, into as many parts as
        // there are threads: kept sequential, so that results do not depend on their number.
        let parallel = parallel && rows > 1 && columns > 1 && 2 * rows * columns * a.ncols() >= PARALLEL_FLOPS;
        let par = if parallel { Par::rayon(0) } else { Par::Seq };
        let accum = match accumulate {
            Accumulate::Replace => Accum::Replace,
            Accumulate::Add => Accum::Add,
        };
        // Where b is narrow the copy costs more than it brings.
        let a = if parallel && columns * size_of::<T>() >= PAGE { without_aliasing(a) } else { a.into() };
        matmul(c.into_faer(), accum, a.view().into_faer(), b.into_faer(), scale, par);
    }

    /// Columns that lie contiguous are read by faer where they lie: copied to where they do not meet in the cache, which
    /// makes a product of 4096 x 512 x 4096 in f64 twice as fast.
    fn without_aliasing<T: Scalar>(a: ArrayView2<'_, T>) -> CowArray<'_, T, Ix2> {
        let meet = |stride: isize| stride > 0 && (stride as usize * size_of::<T>()).is_multiple_of(PAGE);
        match *a.strides() {
            [1, stride] if meet(stride) => {
                let mut apart = Array2::zeros((a.ncols(), a.nrows() + PAGE / 64 / size_of::<T>()));
                apart.slice_axis_inplace(Axis(1), Slice::from(..a.nrows()));
                apart.assign(&a.t());
                apart.reversed_axes().into()
            }
            _ => a.into(),
        }
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
