//! The three maps of a convolution, a tile of output positions at a time: `Y = W X`, `dx = fold(W^T dY)`,
//! `dW = dY X^T`, X the unfolded input. SPEC.md, section 3.4 and 3.5.

use super::channels::{for_each, sum};
use super::conv::Conv;
use super::shifts::Shifts;
use super::unfold::{TILE, Walk, Windows};
use super::{Operator, group_slice};
use crate::Scalar;
use crate::matmul::{Accumulate, PARALLEL_FLOPS, product_into_on_this_thread, run_small_tasks, run_tasks};
use crate::simd::contiguous;
use ndarray::{
    Array2, Array3, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis, CowArray, Ix2, Slice, concatenate,
};
use std::ops::Range;

/// Channels that one task of `inputs` folds.
const CHANNELS: usize = 16;
/// Tiles are shared out so many at a time that a thread has this many operations to do at least.
const UNFOLDED_FLOPS: usize = PARALLEL_FLOPS / 8;
/// Rows of a cotangent are spread over an image as many at a time as make this many elements; where one makes more, none is.
const SPREAD: usize = 1 << 18;

fn tiles(positions: usize) -> impl Iterator<Item = Range<usize>> {
    (0..positions).step_by(TILE).map(move |start| start..(start + TILE).min(positions))
}

/// The rows of group q of several matrices, one below the other.
fn stacked<'a, T: Scalar>(
    matrices: impl Iterator<Item = ArrayView2<'a, T>>,
    q: usize,
    groups: usize,
) -> CowArray<'a, T, Ix2> {
    let of_group = |matrix: ArrayView2<'a, T>| {
        let rows = group_slice(q, groups, matrix.nrows());
        matrix.slice_axis_move(Axis(0), rows)
    };
    let parts: Vec<_> = matrices.map(of_group).collect();
    match *parts.as_slice() {
        [one] => one.into(),
        _ => concatenate(Axis(0), &parts).expect("as many columns in each").into(),
    }
}

/// A weight `[rows, channels * kernel]` kernel position by kernel position: `[kernel, rows, channels]`.
fn by_tap<T: Scalar>(weight: ArrayView2<'_, T>, kernel: usize) -> Array3<T> {
    let (rows, columns) = weight.dim();
    let mut taps = Array3::zeros((kernel, rows, columns / kernel));
    for_each(weight.len(), taps.outer_iter_mut().enumerate(), |(k, mut tap)| {
        for (mut tap, row) in tap.outer_iter_mut().zip(weight.outer_iter()) {
            let of_tap = contiguous(row);
            tap.iter_mut().zip(of_tap.iter().skip(k).step_by(kernel)).for_each(|(tap, &weight)| *tap = weight);
        }
    });
    taps
}

/// Columns of a matrix.
fn columns<T>(matrix: ArrayView2<'_, T>, columns: Range<usize>) -> ArrayView2<'_, T> {
    matrix.slice_axis_move(Axis(1), Slice::from(columns))
}

fn columns_mut<T>(matrix: &mut Array2<T>, columns: Range<usize>) -> ArrayViewMut2<'_, T> {
    matrix.slice_axis_mut(Axis(1), Slice::from(columns))
}

impl<const N: usize> Conv<N> {
    /// The channels of group q of an image.
    fn of_group<'a, T>(&self, image: ArrayView2<'a, T>, q: usize) -> ArrayView2<'a, T> {
        image.slice_axis_move(Axis(0), group_slice(q, self.groups, self.in_channels))
    }

    /// `Y = W X` for several weights `[rows, fan_in]` at once, into `[images, rows, positions]` each. E46
    ///
    /// x `[images, channels, inputs]`.
    pub(super) fn outputs<T: Scalar>(
        &self,
        windows: &Windows<N>,
        x: ArrayView3<'_, T>,
        weights: &[ArrayView2<'_, T>],
        outputs: Vec<ArrayViewMut3<'_, T>>,
    ) {
        let of_groups: Vec<_> = (0..self.groups).map(|q| stacked(weights.iter().copied(), q, self.groups)).collect();
        let channels = self.in_channels / self.groups;
        if let Some(shifts) = Shifts::new(windows.axes, of_groups[0].nrows(), channels) {
            let weights: Vec<_> = of_groups.iter().map(|weight| by_tap(weight.view(), windows.kernel)).collect();
            return shifts.outputs(&[x], &weights, outputs); // E77
        }
        let mut tasks: Vec<(usize, Range<usize>, Vec<ArrayViewMut2<'_, T>>)> = Vec::new();
        for output in outputs {
            let mut task = 0;
            for (image, output) in output.into_outer_iter_mut().enumerate() {
                let parts = output.into_axis_chunks_iter_mut(Axis(1), TILE);
                for (tile, output) in tiles(windows.positions()).zip(parts) {
                    if task == tasks.len() {
                        tasks.push((image, tile, Vec::new()));
                    }
                    tasks[task].2.push(output);
                    task += 1;
                }
            }
        }
        let width = TILE.min(windows.positions());
        let rows = of_groups[0].nrows();
        let scratch = || (windows.walk(), Array2::zeros((self.fan_in(), width)), Array2::zeros((rows, width)));
        let least = UNFOLDED_FLOPS / (2 * rows * self.groups * self.fan_in() * width).max(1);
        run_small_tasks(least, tasks, scratch, |(walk, unfolded, products), (image, tile, mut outputs)| {
            for (q, weight) in of_groups.iter().enumerate() {
                let image = self.of_group(x.index_axis(Axis(0), image), q);
                let unfolded = walk.unfolded(image, tile.clone(), unfolded);
                if let [output] = outputs.as_mut_slice() {
                    let units = group_slice(q, self.groups, output.nrows());
                    let output = output.slice_axis_mut(Axis(0), units);
                    product_into_on_this_thread(T::one(), weight.view(), unfolded, Accumulate::Replace, output); // E46
                    continue;
                }
                let mut products = columns_mut(products, 0..tile.len());
                let into = products.view_mut();
                product_into_on_this_thread(T::one(), weight.view(), unfolded, Accumulate::Replace, into); // E46
                let mut start = 0;
                for output in &mut outputs {
                    let units = group_slice(q, self.groups, output.nrows());
                    let mut output = output.slice_axis_mut(Axis(0), units);
                    let end = start + output.nrows();
                    output.assign(&products.slice_axis(Axis(0), Slice::from(start..end)));
                    start = end;
                }
            }
        });
    }

    /// `dx = fold(W^T dY)`, summed over pairs of dY `[images, rows, positions]` and W `[rows, fan_in]`, into
    /// `[images, channels, inputs]`. E47
    pub(super) fn inputs<T: Scalar>(
        &self,
        windows: &Windows<N>,
        pairs: &[(ArrayView3<'_, T>, ArrayView2<'_, T>)],
        mut dx: ArrayViewMut3<'_, T>,
    ) {
        if pairs.is_empty() {
            return dx.fill(T::zero());
        }
        let channels = self.in_channels / self.groups;
        let rows: usize = pairs.iter().map(|(_, weight)| weight.nrows() / self.groups).sum();
        if let Some(shifts) = Shifts::adjoint(windows.axes, rows, channels) {
            let of_group = |q: usize| {
                let weights = pairs.iter().map(|(_, weight)| *weight);
                let mut weight = by_tap(stacked(weights, q, self.groups).view(), windows.kernel);
                weight.invert_axis(Axis(0));
                weight.permuted_axes([0, 2, 1]).as_standard_layout().into_owned()
            };
            let weights: Vec<_> = (0..self.groups).map(of_group).collect();
            let dys: Vec<_> = pairs.iter().map(|(dy, _)| dy.as_standard_layout()).collect();
            let dys: Vec<_> = dys.iter().map(|dy| dy.view()).collect();
            return shifts.outputs(&dys, &weights, vec![dx]); // E78
        }
        // One task a block of channels of an image, within a group: no two tasks fold into the same element.
        let mut tasks: Vec<(usize, usize, Range<usize>, ArrayViewMut2<'_, T>)> = Vec::new();
        for (image, dx) in dx.into_outer_iter_mut().enumerate() {
            for (q, dx) in dx.into_axis_chunks_iter_mut(Axis(0), self.in_channels / self.groups).enumerate() {
                for (block, dx) in dx.into_axis_chunks_iter_mut(Axis(0), CHANNELS).enumerate() {
                    let first = block * CHANNELS;
                    tasks.push((image, q, first * windows.kernel..(first + dx.nrows()) * windows.kernel, dx));
                }
            }
        }
        let (width, most) = (TILE.min(windows.positions()), self.fan_in().min(CHANNELS * windows.kernel));
        let scratch = || (windows.walk(), Array2::zeros((most, width)));
        run_tasks(tasks, scratch, |(walk, gradients), (image, q, of_channels, mut dx)| {
            dx.fill(T::zero());
            for tile in tiles(windows.positions()) {
                let mut gradient = columns_mut(gradients, 0..tile.len());
                gradient.slice_axis_inplace(Axis(0), Slice::from(0..of_channels.len()));
                for (nth, (dy, weight)) in pairs.iter().enumerate() {
                    let rows = group_slice(q, self.groups, weight.nrows());
                    let weight = columns(weight.slice_axis(Axis(0), rows), of_channels.clone());
                    let dy = columns(dy.index_axis(Axis(0), image).slice_axis_move(Axis(0), rows), tile.clone());
                    let accumulate = if nth == 0 { Accumulate::Replace } else { Accumulate::Add };
                    product_into_on_this_thread(T::one(), weight.t(), dy, accumulate, gradient.view_mut()); // E47
                }
                walk.fold(gradient.view(), tile.start, dx.view_mut()); // E47
            }
        });
    }

    /// `dW = dY X^T`, summed over images: `[rows, fan_in]`. E48
    ///
    /// x `[images, channels, inputs]`, dy `[images, rows, positions]`.
    pub(super) fn weights<T: Scalar>(
        &self,
        windows: &Windows<N>,
        x: ArrayView3<'_, T>,
        dy: ArrayView3<'_, T>,
    ) -> Array2<T> {
        let dy = dy.as_standard_layout();
        let (images, rows, _) = dy.dim();
        let of_group = |image: usize, q: usize| {
            let dy = dy.index_axis(Axis(0), image);
            let dy = dy.slice_axis_move(Axis(0), group_slice(q, self.groups, rows));
            (self.of_group(x.index_axis(Axis(0), image), q), dy)
        };
        let zero = || Array2::zeros((rows, self.fan_in()));
        let join = |dw: &mut Array2<T>, part| *dw += &part;
        let (channels, of_a_row) = (self.in_channels / self.groups, windows.kernel * windows.inputs());
        // Few rows are spread over the inputs in less time than all inputs are unfolded.
        if rows / self.groups < channels && of_a_row <= SPREAD {
            let together = (SPREAD / of_a_row).min(rows / self.groups);
            let spread = together * windows.kernel;
            let scratch =
                || (windows.walk(), Array2::zeros((spread, windows.inputs())), Array2::zeros((spread, channels)));
            let add = |(walk, spread, product): &mut (Walk<'_, N>, Array2<T>, Array2<T>), dw: &mut Array2<T>, image| {
                for q in 0..self.groups {
                    let (image, dy) = of_group(image, q);
                    let mut dw = dw.slice_axis_mut(Axis(0), group_slice(q, self.groups, rows));
                    let of_rows = dy.axis_chunks_iter(Axis(0), together);
                    for (dy, mut dw) in of_rows.zip(dw.axis_chunks_iter_mut(Axis(0), together)) {
                        let used = Slice::from(0..dy.nrows() * windows.kernel);
                        let mut spread = spread.slice_axis_mut(Axis(0), used);
                        let mut product = product.slice_axis_mut(Axis(0), used);
                        walk.spread(dy, spread.view_mut()); // E74
                        let into = product.view_mut();
                        product_into_on_this_thread(T::one(), spread.view(), image.t(), Accumulate::Replace, into); // E75
                        let of_rows = product.axis_chunks_iter(Axis(0), windows.kernel);
                        for (mut dw, product) in dw.outer_iter_mut().zip(of_rows) {
                            dw.iter_mut().zip(product.t()).for_each(|(dw, &product)| *dw += product); // E75
                        }
                    }
                }
            };
            return sum(x.len(), 0..images, scratch, zero, add, join);
        }
        if let Some(shifts) = Shifts::of_weight(windows.axes, rows / self.groups, channels) {
            let dweight = shifts.weights(x, dy.view(), self.groups).permuted_axes([2, 1, 0]); // E156
            return dweight.to_shape((rows, self.fan_in())).expect("as many").into_owned();
        }
        let scratch = || (windows.walk(), Array2::zeros((self.fan_in(), TILE.min(windows.positions()))));
        let add = |(walk, scratch): &mut (Walk<'_, N>, Array2<T>),
                   dw: &mut Array2<T>,
                   (image, tile): (usize, Range<usize>)| {
            for q in 0..self.groups {
                let (image, dy) = of_group(image, q);
                let unfolded = walk.unfolded(image, tile.clone(), scratch);
                let dw = dw.slice_axis_mut(Axis(0), group_slice(q, self.groups, rows));
                let dy = columns(dy, tile.clone());
                product_into_on_this_thread(T::one(), dy, unfolded.t(), Accumulate::Add, dw); // E48
            }
        };
        let all = (0..images).flat_map(|image| tiles(windows.positions()).map(move |tile| (image, tile)));
        sum(x.len(), all, scratch, zero, add, join)
    }
}
