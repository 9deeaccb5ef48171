//! What is done to outputs `[outer, units, inner]` channel by channel: scaling, sums, and the mixing of
//! `rank` channels into `units`, `Z[o, i, p] = sum_k B[i, k] U[o, k, p]`. SPEC.md, section 3.
//!
//! All of it runs over blocks of outer and inner positions, few enough to stay in the cache from one thing that is done
//! to them to the next.

use super::group_slice;
use crate::Scalar;
use crate::matmul::{Accumulate, product_into, product_into_on_this_thread, run_small_tasks, run_tasks};
use crate::simd::{self, contiguous};
use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis, Slice};

/// Elementwise passes over at least this many elements are spread over threads.
pub const PARALLEL_ELEMENTS: usize = 1 << 16;
/// So many of them at least are one thread's.
const TOGETHER: usize = 1 << 13;
/// Outer positions of a block where there is one inner position, and inner positions of one outer position elsewhere.
const BLOCK: [usize; 2] = [64, 1024];
/// A sum over all blocks is taken in at most this many parts, which are added up in order: it does not depend on the
/// number of threads, and needs no more memory for more blocks.
const PARTS: usize = 16;

/// Outer and inner positions of a block.
fn block(inner: usize) -> [usize; 2] {
    if inner == 1 { [BLOCK[0], 1] } else { [1, BLOCK[1]] }
}

/// How a product of two matrices is computed: by all threads, or by the calling one where blocks are spread over them.
type Multiply<T> = fn(T, ArrayView2<'_, T>, ArrayView2<'_, T>, Accumulate, ArrayViewMut2<'_, T>);

/// Where there are more ranks than this, products of all blocks are computed as one where they can be: each of theirs
/// would put the pair in order anew.
const MANY: usize = 64;

/// Whether a product of the pair with all of these needs no blocks.
fn is_one_product<T>(a: &ArrayView3<'_, T>, ranks: usize, groups: usize) -> bool {
    ranks > MANY && groups == 1 && (a.len_of(Axis(0)) == 1 || a.len_of(Axis(2)) == 1)
}

fn blocks<T>(a: ArrayView3<'_, T>) -> impl Iterator<Item = ArrayView3<'_, T>> {
    let (outer, _, inner) = a.dim();
    let [rows, columns] = block(inner);
    let starts = (0..outer).step_by(rows).flat_map(move |o| (0..inner).step_by(columns).map(move |i| (o, i)));
    starts.map(move |(o, i)| {
        let of_rows = a.slice_axis_move(Axis(0), Slice::from(o..(o + rows).min(outer)));
        of_rows.slice_axis_move(Axis(2), Slice::from(i..(i + columns).min(inner)))
    })
}

fn blocks_mut<T>(a: ArrayViewMut3<'_, T>) -> impl Iterator<Item = ArrayViewMut3<'_, T>> {
    let [rows, columns] = block(a.len_of(Axis(2)));
    a.into_axis_chunks_iter_mut(Axis(0), rows)
        .flat_map(move |of_rows| of_rows.into_axis_chunks_iter_mut(Axis(2), columns))
}

/// Does something to every block of so many elements in all: by [`run_tasks`] where that pays.
pub(crate) fn for_each<I: Send>(elements: usize, blocks: impl Iterator<Item = I>, run: impl Fn(I) + Send + Sync) {
    if elements < PARALLEL_ELEMENTS {
        blocks.for_each(run);
    } else {
        let blocks: Vec<I> = blocks.collect();
        run_small_tasks(blocks.len() * TOGETHER / elements, blocks, || (), |(), block| run(block));
    }
}

/// A sum over all blocks of so many elements, in parallel where that pays: every part starts with `zero`, every thread
/// with `scratch`.
pub(super) fn sum<I: Send, S: Send, W>(
    elements: usize,
    blocks: impl Iterator<Item = I>,
    scratch: impl Fn() -> W + Send + Sync,
    zero: impl Fn() -> S + Send + Sync,
    add: impl Fn(&mut W, &mut S, I) + Send + Sync,
    join: impl Fn(&mut S, S),
) -> S {
    let mut blocks: Vec<I> = blocks.collect();
    let of_a_part = blocks.len().div_ceil(PARTS).max(1);
    let mut parts = Vec::with_capacity(PARTS);
    while !blocks.is_empty() {
        let rest = blocks.split_off(of_a_part.min(blocks.len()));
        parts.push(std::mem::replace(&mut blocks, rest));
    }
    let of_part = |scratch: &mut W, part: Vec<I>| {
        let mut sum = zero();
        part.into_iter().for_each(|block| add(scratch, &mut sum, block));
        sum
    };
    let sums: Vec<S> = if elements < PARALLEL_ELEMENTS {
        let mut scratch = scratch();
        parts.into_iter().map(|part| of_part(&mut scratch, part)).collect()
    } else {
        run_tasks(parts, scratch, of_part)
    };
    sums.into_iter().fold(zero(), |mut sum, part| {
        join(&mut sum, part);
        sum
    })
}

/// A block as a matrix: `[outer, units]` where there is one inner position, `[units, inner]` of its one outer position
/// elsewhere.
fn matrix<T>(block: ArrayView3<'_, T>) -> ArrayView2<'_, T> {
    if block.len_of(Axis(2)) == 1 { block.index_axis_move(Axis(2), 0) } else { block.index_axis_move(Axis(0), 0) }
}

fn matrix_mut<T>(block: ArrayViewMut3<'_, T>) -> ArrayViewMut2<'_, T> {
    if block.len_of(Axis(2)) == 1 { block.index_axis_move(Axis(2), 0) } else { block.index_axis_move(Axis(0), 0) }
}

/// `y[o, i, q] = scale[i] p[o, i, q]`
pub(crate) fn scale_into<T: Scalar>(y: ArrayViewMut3<'_, T>, p: ArrayView3<'_, T>, scale: ArrayView1<'_, T>) {
    for_each(p.len(), blocks_mut(y).zip(blocks(p)), |(y, p)| scale_block(y, p, scale, None));
}

/// `y[o, i, q] = scale[i] p[o, i, q] + shift[i] + sum_k b[i, k] u[o, k, q]`, without the shift where there is none, k
/// running over the ranks of the group of i. E5.
///
/// p and y `[outer, units, inner]`, b `[units, rank / groups]`, u `[outer, rank, inner]`.
pub(crate) fn scale_and_mix_into<T: Scalar>(
    y: ArrayViewMut3<'_, T>,
    p: ArrayView3<'_, T>,
    scale: ArrayView1<'_, T>,
    shift: Option<ArrayView1<'_, T>>,
    b: ArrayView2<'_, T>,
    u: ArrayView3<'_, T>,
    groups: usize,
) {
    let blocks = blocks_mut(y).zip(blocks(p)).zip(blocks(u));
    for_each(p.len(), blocks, |((mut y, p), u)| {
        scale_block(y.view_mut(), p, scale, shift);
        mix_block(y, b, u, groups, (Accumulate::Add, product_into_on_this_thread));
    });
}

/// `y = mix(b, u)`: see [`scale_and_mix_into`]. E5.
pub(crate) fn mix_into<T: Scalar>(y: ArrayViewMut3<'_, T>, b: ArrayView2<'_, T>, u: ArrayView3<'_, T>, groups: usize) {
    if is_one_product(&u, b.ncols(), groups) {
        return mix_block(y, b, u, groups, (Accumulate::Replace, product_into));
    }
    let mix = |(y, u)| mix_block(y, b, u, groups, (Accumulate::Replace, product_into_on_this_thread));
    for_each(y.len(), blocks_mut(y).zip(blocks(u)), mix);
}

/// `sum over o, q of a[o, i, q] b[o, i, q]` for every channel i: `[units]`.
pub(crate) fn channel_products<T: Scalar>(a: ArrayView3<'_, T>, b: ArrayView3<'_, T>) -> Array1<T> {
    let zero = || Array1::zeros(a.len_of(Axis(1)));
    let add = |_: &mut (), sums: &mut Array1<T>, (a, b)| add_products(sums, a, b);
    sum(a.len(), blocks(a).zip(blocks(b)), || (), zero, add, |sums, part| *sums += &part)
}

/// Values, and what is added to their squares.
type Squared<'a, T> = (ArrayView3<'a, T>, T);

/// The sums of `a^2`, of `a^2 b^2` and of `a^2 c^2` over o and q for every channel i, with what each is given added to
/// its squares: `[units]`.
pub(crate) fn channel_square_products<T: Scalar>(
    (a, a_added): Squared<'_, T>,
    [(b, b_added), (c, c_added)]: [Squared<'_, T>; 2],
) -> [Array1<T>; 3] {
    let added = [a_added, b_added, c_added];
    let zero = || [0; 3].map(|_| Array1::zeros(a.len_of(Axis(1))));
    let add = |_: &mut (), sums: &mut [Array1<T>; 3], ((a, b), c)| {
        let (_, in_rows) = channel_axis(&a);
        let [a, b, c] = [a, b, c].map(matrix);
        let [of_a, of_b, of_c] = sums.each_mut().map(|sums| sums.as_slice_mut().expect("standard layout"));
        for (i, ((a, b), c)) in a.outer_iter().zip(b.outer_iter()).zip(c.outer_iter()).enumerate() {
            let (a, b, c) = (contiguous(a), contiguous(b), contiguous(c));
            if in_rows {
                simd::add_square_products([&a, &b, &c], added, [of_a, of_b, of_c]);
            } else {
                let [a, b, c] = simd::square_products([&a, &b, &c], added);
                (of_a[i], of_b[i], of_c[i]) = (of_a[i] + a, of_b[i] + b, of_c[i] + c);
            }
        }
    };
    let join = |sums: &mut [Array1<T>; 3], part| sums.iter_mut().zip(&part).for_each(|(sums, part)| *sums += part);
    sum(a.len(), blocks(a).zip(blocks(b)).zip(blocks(c)), || (), zero, add, join)
}

/// `sum over o, q of a[o, i, q]` for every channel i: `[units]`.
pub(crate) fn channel_sums<T: Scalar>(a: ArrayView3<'_, T>) -> Array1<T> {
    let zero = || Array1::zeros(a.len_of(Axis(1)));
    let add = |_: &mut (), sums: &mut Array1<T>, a: ArrayView3<'_, T>| {
        let (_, in_rows) = channel_axis(&a);
        let sums = sums.as_slice_mut().expect("standard layout");
        for (i, a) in matrix(a).outer_iter().enumerate() {
            if in_rows {
                simd::add_scaled(T::one(), &contiguous(a), sums);
            } else {
                sums[i] += simd::sum(&contiguous(a));
            }
        }
    };
    sum(a.len(), blocks(a), || (), zero, add, |sums, part| *sums += &part)
}

/// What a cotangent dy of outputs is contracted with, in one walk over it.
pub(crate) struct Contracted<T> {
    /// `sum over o, q of dy[o, i, q] p[o, i, q]`: `[units]`
    pub products: Array1<T>,
    /// The adjoint of b -> mix(b, u): see [`mix_adjoint_weight`].
    pub weight: Array2<T>,
    /// The adjoint of u -> mix(b, u): see [`mix_adjoint_input`].
    pub input: Array3<T>,
}

/// [`channel_products`] of dy and p, [`mix_adjoint_weight`] of dy and u, [`mix_adjoint_input`] of b and dy, which takes
/// the place of u.
pub(crate) fn contract<T: Scalar>(
    dy: ArrayView3<'_, T>,
    p: ArrayView3<'_, T>,
    mut u: Array3<T>,
    b: ArrayView2<'_, T>,
    groups: usize,
) -> Contracted<T> {
    let all = blocks_mut(u.view_mut()).zip(blocks(dy)).zip(blocks(p));
    let zero = || (Array1::zeros(b.nrows()), Array2::zeros(b.dim()));
    let add =
        |_: &mut (), (products, weight): &mut (Array1<T>, Array2<T>), ((u, dy), p): ((ArrayViewMut3<'_, T>, _), _)| {
            add_products(products, dy, p);
            add_mix_adjoint_weight(weight.view_mut(), dy, u.view(), groups, product_into_on_this_thread);
            mix_adjoint_input_block(u, b, dy, groups, product_into_on_this_thread);
        };
    let (products, weight) = sum(
        dy.len(),
        all,
        || (),
        zero,
        add,
        |(products, weight), part| {
            *products += &part.0;
            *weight += &part.1;
        },
    );
    Contracted { products, weight, input: u }
}

/// The adjoint of u -> mix(b, u): `t[o, k, q] = sum_i b[i, k] dy[o, i, q]`: `[outer, rank, inner]`. E6.
pub(crate) fn mix_adjoint_input<T: Scalar>(b: ArrayView2<'_, T>, dy: ArrayView3<'_, T>, groups: usize) -> Array3<T> {
    let (outer, _, inner) = dy.dim();
    let mut t = Array3::zeros((outer, b.ncols() * groups, inner));
    if is_one_product(&dy, b.ncols(), groups) {
        mix_adjoint_input_block(t.view_mut(), b, dy, groups, product_into);
        return t;
    }
    let all = blocks_mut(t.view_mut()).zip(blocks(dy));
    for_each(dy.len(), all, |(t, dy)| mix_adjoint_input_block(t, b, dy, groups, product_into_on_this_thread));
    t
}

/// The adjoint of b -> mix(b, u): `s[i, k] = sum over o, q of dy[o, i, q] u[o, k, q]`: `[units, rank / groups]`. E7.
pub(crate) fn mix_adjoint_weight<T: Scalar>(dy: ArrayView3<'_, T>, u: ArrayView3<'_, T>, groups: usize) -> Array2<T> {
    let zero = || Array2::zeros((dy.len_of(Axis(1)), u.len_of(Axis(1)) / groups));
    if is_one_product(&dy, u.len_of(Axis(1)), groups) {
        let mut sums = zero();
        add_mix_adjoint_weight(sums.view_mut(), dy, u, groups, product_into);
        return sums;
    }
    let add = |_: &mut (), sums: &mut Array2<T>, (dy, u)| {
        add_mix_adjoint_weight(sums.view_mut(), dy, u, groups, product_into_on_this_thread);
    };
    sum(dy.len(), blocks(dy).zip(blocks(u)), || (), zero, add, |sums, part| *sums += &part)
}

fn scale_block<T: Scalar>(
    y: ArrayViewMut3<'_, T>,
    p: ArrayView3<'_, T>,
    scale: ArrayView1<'_, T>,
    shift: Option<ArrayView1<'_, T>>,
) {
    let (_, in_rows) = channel_axis(&p);
    let (mut y, p) = (matrix_mut(y), matrix(p));
    let (scales, shifts) = (contiguous(scale), shift.map(contiguous));
    for (i, (mut y, p)) in y.outer_iter_mut().zip(p.outer_iter()).enumerate() {
        let (y, p) = (y.as_slice_mut().expect("standard layout"), &contiguous(p));
        match &shifts {
            Some(shifts) if in_rows => simd::scale_and_shift_each(&scales, shifts, p, y),
            None if in_rows => simd::scale_each(&scales, p, y),
            shifts => simd::scale_and_shift(scales[i], shifts.as_ref().map_or(T::zero(), |shifts| shifts[i]), p, y),
        }
    }
}

fn add_products<T: Scalar>(sums: &mut Array1<T>, a: ArrayView3<'_, T>, b: ArrayView3<'_, T>) {
    let (_, in_rows) = channel_axis(&a);
    let (a, b) = (matrix(a), matrix(b));
    let sums = sums.as_slice_mut().expect("standard layout");
    for (i, (a, b)) in a.outer_iter().zip(b.outer_iter()).enumerate() {
        let (a, b) = (contiguous(a), contiguous(b));
        if in_rows {
            simd::add_products(&a, &b, sums);
        } else {
            sums[i] += simd::dot(&a, &b);
        }
    }
}

fn mix_block<T: Scalar>(
    y: ArrayViewMut3<'_, T>,
    b: ArrayView2<'_, T>,
    u: ArrayView3<'_, T>,
    groups: usize,
    (accumulate, multiply): (Accumulate, Multiply<T>),
) {
    let (channels, in_rows) = channel_axis(&u);
    let (mut y, u) = (matrix_mut(y), matrix(u));
    for q in 0..groups {
        let (units, ranks) = (group_slice(q, groups, b.nrows()), group_slice(q, groups, u.len_of(channels)));
        let (b, u) = (b.slice_axis(Axis(0), units), u.slice_axis(channels, ranks));
        let y = y.slice_axis_mut(channels, units);
        let (left, right) = if in_rows { (u, b.t()) } else { (b, u) };
        multiply(T::one(), left, right, accumulate, y);
    }
}

fn mix_adjoint_input_block<T: Scalar>(
    t: ArrayViewMut3<'_, T>,
    b: ArrayView2<'_, T>,
    dy: ArrayView3<'_, T>,
    groups: usize,
    multiply: Multiply<T>,
) {
    let (channels, in_rows) = channel_axis(&dy);
    let (mut t, dy) = (matrix_mut(t), matrix(dy));
    for q in 0..groups {
        let (units, ranks) = (group_slice(q, groups, b.nrows()), group_slice(q, groups, t.len_of(channels)));
        let (b, dy) = (b.slice_axis(Axis(0), units), dy.slice_axis(channels, units));
        let t = t.slice_axis_mut(channels, ranks);
        let (left, right) = if in_rows { (dy, b) } else { (b.reversed_axes(), dy) };
        multiply(T::one(), left, right, Accumulate::Replace, t);
    }
}

fn add_mix_adjoint_weight<T: Scalar>(
    mut sums: ArrayViewMut2<'_, T>,
    dy: ArrayView3<'_, T>,
    u: ArrayView3<'_, T>,
    groups: usize,
    multiply: Multiply<T>,
) {
    let (channels, in_rows) = channel_axis(&dy);
    let (dy, u) = (matrix(dy), matrix(u));
    for q in 0..groups {
        let (units, ranks) = (group_slice(q, groups, sums.nrows()), group_slice(q, groups, u.len_of(channels)));
        let (dy, u) = (dy.slice_axis(channels, units), u.slice_axis(channels, ranks));
        let sums = sums.slice_axis_mut(Axis(0), units);
        let (left, right) = if in_rows { (dy.reversed_axes(), u) } else { (dy, u.reversed_axes()) };
        multiply(T::one(), left, right, Accumulate::Add, sums);
    }
}

/// Which axis of a block as a matrix runs over its channels, and whether that is a row.
fn channel_axis<T>(block: &ArrayView3<'_, T>) -> (Axis, bool) {
    let in_rows = block.len_of(Axis(2)) == 1;
    (Axis(usize::from(in_rows)), in_rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64;

    /// With one inner position, with one outer position, and with several of both; in one product, in blocks and in groups.
    #[test]
    fn channels_are_mixed_and_summed_term_by_term() {
        let rng = &mut Pcg64::seed_from_u64(1);
        let mut draw = |shape| Array3::<f64>::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0));
        let shapes = [(70, 1), (1, 1030), (3, 2), (70, 1), (70, 1)];
        for ((outer, inner), (rank, groups)) in shapes.into_iter().zip([(65, 1), (66, 1), (67, 1), (2, 1), (65, 2)]) {
            let (units, ranks) = (6, rank * groups);
            let (b, u, dy) = (draw((1, units, rank)), draw((outer, ranks, inner)), draw((outer, units, inner)));
            let (b, p) = (b.index_axis_move(Axis(0), 0), draw((outer, units, inner)));
            let (mut y, mut t) = (p.clone(), Array3::zeros(u.dim()));
            let (mut s, mut sums) = (Array2::zeros(b.dim()), [0; 3].map(|_| Array1::zeros(units)));
            for ((o, i, q), &dy) in dy.indexed_iter() {
                for k in 0..rank {
                    let of_all = i / (units / groups) * rank + k;
                    y[[o, i, q]] += b[[i, k]] * u[[o, of_all, q]];
                    t[[o, of_all, q]] += b[[i, k]] * dy;
                    s[[i, k]] += dy * u[[o, of_all, q]];
                }
                let [a, b, c] = [dy * dy + 0.1, p[[o, i, q]].powi(2) + 0.2, y[[o, i, q]].powi(2) + 0.3];
                sums[0][i] += a;
                sums[1][i] += a * b;
                sums[2][i] += a * c;
            }
            let mut mixed = p.clone();
            mix_into(mixed.view_mut(), b.view(), u.view(), groups);
            assert_relative_eq!(mixed + &p, y, epsilon = 1e-12);
            assert_relative_eq!(mix_adjoint_input(b.view(), dy.view(), groups), t, epsilon = 1e-12);
            assert_relative_eq!(mix_adjoint_weight(dy.view(), u.view(), groups), s, epsilon = 1e-11);
            let found = channel_square_products((dy.view(), 0.1), [(p.view(), 0.2), (y.view(), 0.3)]);
            for (found, sums) in found.iter().zip(&sums) {
                assert_relative_eq!(found, sums, max_relative = 1e-12);
            }
        }
    }
}
