//! A convolution as one product a kernel position, of the padded input as that position sees it: nothing is unfolded.
//! SPEC.md, section 3.5.
//!
//! The padded input is laid out in sheets of its last two axes, and where there is a stride in one sheet for every
//! remainder of a position by it: then the outputs next to each other read inputs next to each other, from every kernel
//! position at another offset. What is computed at the ends of lines, where no window fits, is left out of the outputs.

use super::group_slice;
use super::unfold::{Geometry, NOWHERE, PaddingMode, TILE};
use crate::Scalar;
use crate::matmul::{Accumulate, product_into_on_this_thread, run_tasks};
use crate::simd::{add_scaled, copy};
use ndarray::{Array2, Array3, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis, Slice};
use std::ops::Range;

/// Products that add up fewer channels than this take longer than unfolding.
const CHANNELS: usize = 16;
/// Products of no more rows and channels than this are taken row by row instead.
const DEPTHWISE: usize = 4;
/// Elements of the padded input that a task may hold.
const BAND: usize = 1 << 19;

/// Where every kernel position reads. There are always three axes: the missing ones, in front, have one position.
pub(super) struct Shifts {
    axes: [Geometry; 3],
    /// For each axis, the source of every padded position, or `NOWHERE`.
    sources: [Vec<usize>; 3],
    /// The sheets that an output's window meets: the kernel's offset along the first axis, and the remainders of positions
    /// along the others.
    sheets: Vec<[usize; 3]>,
    taps: Vec<Tap>,
    /// Places of a line.
    line: usize,
}

/// What a kernel position reads.
struct Tap {
    /// Which of the sheets.
    sheet: usize,
    /// How many places further than the first.
    offset: usize,
}

/// Some outputs of an image by their places, or all of several images, side by side.
struct Tile {
    images: Range<usize>,
    /// Along the first axis.
    output: usize,
    places: Range<usize>,
}

impl Shifts {
    /// `None` where unfolding is better, for so many rows of the weight and channels of a group.
    pub fn new<const N: usize>(axes: [Geometry; N], rows: usize, channels: usize) -> Option<Self> {
        let point = Geometry { size: 1, kernel: 1, stride: 1, dilation: 1, before: 0, after: 0, mode: axes[0].mode };
        let axes: [Geometry; 3] =
            std::array::from_fn(|axis| (axis + N).checked_sub(3).map_or(point, |axis| axes[axis]));
        let line = axes[2].padded_size().div_ceil(axes[2].stride);
        let (mut sheets, mut taps) = (Vec::new(), Vec::new());
        for k in 0..axes.iter().map(|axis| axis.kernel).product() {
            let offsets =
                [k / axes[2].kernel / axes[1].kernel, k / axes[2].kernel % axes[1].kernel, k % axes[2].kernel];
            let [_, lines, columns] = std::array::from_fn(|axis| offsets[axis] * axes[axis].dilation);
            let sheet = [offsets[0], lines % axes[1].stride, columns % axes[2].stride];
            let nth = sheets.iter().position(|other| *other == sheet).unwrap_or_else(|| {
                sheets.push(sheet);
                sheets.len() - 1
            });
            taps.push(Tap { sheet: nth, offset: lines / axes[1].stride * line + columns / axes[2].stride });
        }
        let band = sheets.len() * (TILE + reach(&taps));
        let fits = channels >= CHANNELS || is_depthwise(rows, channels);
        // A kernel of one position has nothing to save.
        let pays = fits && band < taps.len() * TILE && band * channels <= BAND;
        pays.then(|| Self { axes, sources: axes.map(|axis| axis.padded_sources()), sheets, taps, line })
    }

    /// The adjoint's, a convolution of cotangents with the kernel reversed: its outputs are the input. `None` also where
    /// there is a stride, and where padding is more than zeros or reaches further than a kernel. E78
    pub fn adjoint<const N: usize>(mut axes: [Geometry; N], rows: usize, channels: usize) -> Option<Self> {
        for axis in &mut axes {
            let reach = axis.dilation * (axis.kernel - 1);
            let padding = (reach.checked_sub(axis.before)?, reach.checked_sub(axis.after)?);
            if axis.stride != 1 || !axis.is_zero_padded() {
                return None;
            }
            (axis.size, (axis.before, axis.after)) = (axis.output(), padding); // E78
            axis.mode = PaddingMode::Zeros;
        }
        Self::new(axes, channels, rows)
    }

    /// The tiles of so many images, in their order, all about as wide: one product of small images costs less than one each.
    fn tiles(&self, images: usize) -> Vec<Tile> {
        let [outputs, lines, columns] = self.axes.map(|axis| axis.output());
        let places = (lines - 1) * self.line + columns;
        let together = TILE / (places + reach(&self.taps));
        if outputs == 1 && together > 1 {
            let starts = (0..images).step_by(together);
            let tile = |start| Tile { images: start..(start + together).min(images), output: 0, places: 0..places };
            return starts.map(tile).collect();
        }
        let width = places.div_ceil(places.div_ceil(TILE));
        let of_image = |image: usize| {
            (0..outputs).flat_map(move |output| {
                let starts = (0..places).step_by(width);
                let ends = move |start: usize| (start + width).min(places);
                starts.map(move |start| Tile { images: image..image + 1, output, places: start..ends(start) })
            })
        };
        (0..images).flat_map(of_image).collect()
    }

    /// Places from one image of a tile to the next.
    fn pitch(&self, tile: &Tile) -> usize {
        tile.places.len() + reach(&self.taps)
    }

    /// How many outputs lie before a place.
    fn outputs_before(&self, place: usize) -> usize {
        let columns = self.axes[2].output();
        place / self.line * columns + (place % self.line).min(columns)
    }

    /// `Y = sum_k W_k X_k` into `[images, rows, outputs]` each, one below the other as W has its rows, for inputs
    /// `[images, channels, size]` one below the other. W of every group: `[kernel, rows, channels]`. E77
    pub fn outputs<T: Scalar>(
        &self,
        inputs: &[ArrayView3<'_, T>],
        weights: &[Array3<T>],
        outputs: Vec<ArrayViewMut3<'_, T>>,
    ) {
        let images = inputs[0].len_of(Axis(0));
        // Of every tile the outputs, and of each of those what belongs to its images.
        let mut tasks: Vec<(Tile, Vec<Vec<ArrayViewMut2<'_, T>>>)> =
            self.tiles(images).into_iter().map(|tile| (tile, Vec::new())).collect();
        for output in outputs {
            let mut tasks = tasks.iter_mut().peekable();
            let mut images = output.into_outer_iter_mut();
            while let Some((Tile { images: of_tile, places, .. }, outputs)) = tasks.next() {
                if of_tile.len() > 1 {
                    outputs.push(images.by_ref().take(of_tile.len()).collect());
                    continue;
                }
                let length =
                    |places: &Range<usize>| self.outputs_before(places.end) - self.outputs_before(places.start);
                let (output, mut rest) = images.next().expect("an image").split_at(Axis(1), length(places));
                outputs.push(vec![output]);
                while let Some((Tile { places, .. }, outputs)) = tasks.next_if(|(next, _)| next.images == *of_tile) {
                    let (output, after) = rest.split_at(Axis(1), length(places));
                    outputs.push(vec![output]);
                    rest = after;
                }
            }
        }
        let widest = tasks.iter().map(|(tile, _)| tile.images.len() * self.pitch(tile)).max().unwrap_or(0);
        let (_, rows, channels) = weights[0].dim();
        let scratch = || {
            let band = Array2::zeros((self.sheets.len() * channels, widest));
            (band, Array2::zeros((rows, widest)))
        };
        run_tasks(tasks, scratch, |(band, products), (tile, mut outputs)| {
            let pitch = self.pitch(&tile);
            let places = tile.images.len() * pitch - reach(&self.taps);
            let products = &mut products.slice_axis_mut(Axis(1), Slice::from(0..places));
            for (q, weight) in weights.iter().enumerate() {
                let of_group = |values: ArrayView2<'_, T>| group_slice(q, weights.len(), values.nrows());
                for (nth, image) in tile.images.clone().enumerate() {
                    let images = inputs.iter().map(|input| input.index_axis_move(Axis(0), image));
                    let images = images.map(|image| image.slice_axis_move(Axis(0), of_group(image)));
                    let band = band.slice_axis_mut(Axis(1), Slice::from(nth * pitch..(nth + 1) * pitch));
                    self.fill(&tile, images, band);
                }
                self.multiply(weight.view(), band.view(), products.view_mut());
                let mut rows = products.outer_iter();
                for images in &mut outputs {
                    let units = of_group(images[0].view());
                    let products: Vec<_> = rows.by_ref().take(images[0].nrows() / weights.len()).collect();
                    for (nth, output) in images.iter_mut().enumerate() {
                        let units = output.slice_axis_mut(Axis(0), units);
                        for (output, products) in units.into_outer_iter_mut().zip(&products) {
                            let products = &products.to_slice().expect("contiguous rows")[nth * pitch..];
                            let products = &products[..tile.places.len()];
                            self.store(&tile, products, output.into_slice().expect("contiguous rows"));
                        }
                    }
                }
            }
        });
    }

    /// The padded input that a tile reads of one image, `[sheets * channels, places]`.
    fn fill<'a, T: Scalar>(
        &self,
        tile: &Tile,
        images: impl Iterator<Item = ArrayView2<'a, T>>,
        band: ArrayViewMut2<'_, T>,
    ) {
        let [outer, lines, columns] = &self.axes;
        let length = self.pitch(tile);
        let channels: Vec<&[T]> = images
            .flat_map(|image| image.into_outer_iter())
            .map(|channel| channel.to_slice().expect("standard layout"))
            .collect();
        let mut rows: Vec<&mut [T]> =
            band.into_outer_iter_mut().map(|row| row.into_slice().expect("standard layout")).collect();
        for (&[k, line_remainder, remainder], rows) in self.sheets.iter().zip(rows.chunks_exact_mut(channels.len())) {
            let sheet = self.sources[0][tile.output * outer.stride + k * outer.dilation];
            let inside = columns.inside_of(remainder);
            let mut at = 0;
            while at < length {
                let place = tile.places.start + at;
                let (line, from) = (place / self.line, place % self.line);
                let of_line = at..(at + self.line - from).min(length);
                let to = from + of_line.len();
                at = of_line.end;
                let source = self.sources[1].get(line * lines.stride + line_remainder).copied().unwrap_or(NOWHERE);
                if sheet == NOWHERE || source == NOWHERE {
                    rows.iter_mut().for_each(|row| row[of_line.clone()].fill(T::zero()));
                    continue;
                }
                let x = (sheet * lines.size + source) * columns.size;
                let inside = inside.start.clamp(from, to)..inside.end.clamp(from, to);
                for (row, channel) in rows.iter_mut().zip(&channels) {
                    let (into, x) = (&mut row[of_line.clone()], &channel[x..][..columns.size]);
                    if !inside.is_empty() {
                        let x = &x[inside.start * columns.stride + remainder - columns.before..];
                        let into = &mut into[inside.start - from..inside.end - from];
                        if columns.stride == 1 {
                            copy(&x[..into.len()], into);
                        } else {
                            into.iter_mut().zip(x.iter().step_by(columns.stride)).for_each(|(into, &x)| *into = x);
                        }
                    }
                    for place in (from..inside.start).chain(inside.end..to) {
                        let source = self.sources[2].get(place * columns.stride + remainder);
                        into[place - from] = source.and_then(|&source| x.get(source)).copied().unwrap_or(T::zero());
                    }
                }
            }
        }
    }

    /// E77
    fn multiply<T: Scalar>(
        &self,
        weight: ArrayView3<'_, T>,
        band: ArrayView2<'_, T>,
        mut products: ArrayViewMut2<'_, T>,
    ) {
        let (_, rows, channels) = weight.dim();
        let places = products.ncols();
        let depthwise = is_depthwise(rows, channels);
        if depthwise {
            products.fill(T::zero());
        }
        for (k, Tap { sheet, offset }) in self.taps.iter().enumerate() {
            let weight = weight.index_axis(Axis(0), k);
            let seen = band.slice_axis(Axis(0), Slice::from(sheet * channels..(sheet + 1) * channels));
            let seen = seen.slice_axis(Axis(1), Slice::from(*offset..offset + places));
            if !depthwise {
                let accumulate = if k == 0 { Accumulate::Replace } else { Accumulate::Add };
                product_into_on_this_thread(T::one(), weight, seen, accumulate, products.view_mut()); // E77
                continue;
            }
            for (mut products, weight) in products.outer_iter_mut().zip(weight.outer_iter()) {
                let products = products.as_slice_mut().expect("contiguous rows");
                for (&weight, seen) in weight.iter().zip(seen.outer_iter()) {
                    add_scaled(weight, seen.to_slice().expect("contiguous rows"), products); // E77
                }
            }
        }
    }

    /// The outputs among the places of a row.
    fn store<T: Scalar>(&self, tile: &Tile, products: &[T], mut output: &mut [T]) {
        let columns = self.axes[2].output();
        let mut at = 0;
        while at < products.len() {
            let from = (tile.places.start + at) % self.line;
            let run = (self.line - from).min(products.len() - at);
            let outputs = columns.saturating_sub(from).min(run);
            let (into, rest) = output.split_at_mut(outputs);
            copy(&products[at..at + outputs], into);
            (at, output) = (at + run, rest);
        }
    }
}

/// How much further the last kernel position reads than the first.
fn reach(taps: &[Tap]) -> usize {
    taps.iter().map(|tap| tap.offset).max().unwrap_or(0)
}

fn is_depthwise(rows: usize, channels: usize) -> bool {
    rows <= DEPTHWISE && channels <= DEPTHWISE
}
