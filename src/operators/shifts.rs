//! A convolution as one product a kernel position, of the padded input as that position sees it: nothing is unfolded.
//! SPEC.md, section 3.5.
//!
//! The padded input is laid out in sheets of its last two axes, and where there is a stride in one sheet for every
//! remainder of a position by it: then the outputs next to each other read inputs next to each other, from every kernel
//! position at another offset. What is computed at the ends of lines, where no window fits, is left out of the outputs.

use super::channels::sum;
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
/// Elements of the padded input that a task may hold, but for the end of a tile's last window.
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
    /// Places from one line to the next.
    line: usize,
    /// Places that images side by side may take.
    together: usize,
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
        let line = axes[2].pitch();
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
        let together = if pays { places_together(sheets.len() * channels) } else { 0 };
        pays.then(|| Self { axes, sources: axes.map(|axis| axis.padded_sources()), sheets, taps, line, together })
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

    /// That of the gradient of the weight. Row by row it would save nothing. E156
    pub fn of_weight<const N: usize>(axes: [Geometry; N], rows: usize, channels: usize) -> Option<Self> {
        Self::new(axes, rows, channels).filter(|_| !is_depthwise(rows, channels))
    }

    /// The tiles of so many images, in their order, all about as wide: one product of small images costs less than one each.
    fn tiles(&self, images: usize) -> Vec<Tile> {
        let [outputs, lines, columns] = self.axes.map(|axis| axis.output());
        let places = (lines - 1) * self.line + columns;
        let together = self.images_together();
        if outputs == 1 && together > 1 {
            // So many that a few threads have as many each.
            let tiles = images.div_ceil(together).next_multiple_of(4).min(images);
            let start = |nth: usize| nth * images / tiles;
            let tile = |nth| Tile { images: start(nth)..start(nth + 1), output: 0, places: 0..places };
            return (0..tiles).map(tile).collect();
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
    fn pitch(&self) -> usize {
        self.axes[1].pitch() * self.line
    }

    /// How many images fit side by side.
    fn images_together(&self) -> usize {
        self.together / self.pitch()
    }

    /// How many places a tile's products have, and how many of the padded input they read.
    fn widths(&self, tile: &Tile) -> [usize; 2] {
        let products = (tile.images.len() - 1) * self.pitch() + tile.places.len();
        [products, products + reach(&self.taps)]
    }

    /// Where an image of a tile lies in what the tile reads: the last one up to its end.
    fn span(&self, tile: &Tile, nth: usize) -> Slice {
        let end = if nth + 1 == tile.images.len() { self.widths(tile)[1] } else { (nth + 1) * self.pitch() };
        Slice::from(nth * self.pitch()..end)
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
        let widest = tasks.iter().map(|(tile, _)| self.widths(tile)[1]).max().unwrap_or(0);
        let (_, rows, channels) = weights[0].dim();
        let scratch = || {
            let band = Array2::zeros((self.sheets.len() * channels, widest));
            (band, Array2::zeros((rows, widest)))
        };
        run_tasks(tasks, scratch, |(band, products), (tile, mut outputs)| {
            let [places, _] = self.widths(&tile);
            let products = &mut products.slice_axis_mut(Axis(1), Slice::from(0..places));
            for (q, weight) in weights.iter().enumerate() {
                let of_group = |values: ArrayView2<'_, T>| group_slice(q, weights.len(), values.nrows());
                for (nth, image) in tile.images.clone().enumerate() {
                    let images = inputs.iter().map(|input| input.index_axis_move(Axis(0), image));
                    let images = images.map(|image| image.slice_axis_move(Axis(0), of_group(image)));
                    self.fill(&tile, images, band.slice_axis_mut(Axis(1), self.span(&tile, nth)));
                }
                self.multiply(weight.view(), band.view(), products.view_mut());
                let (mut rows, windows) = (products.outer_iter(), self.windows(&tile));
                for images in &mut outputs {
                    let units = of_group(images[0].view());
                    let products: Vec<_> = rows.by_ref().take(images[0].nrows() / weights.len()).collect();
                    for (nth, output) in images.iter_mut().enumerate() {
                        let units = output.slice_axis_mut(Axis(0), units);
                        for (output, products) in units.into_outer_iter_mut().zip(&products) {
                            let products = &products.to_slice().expect("contiguous rows")[nth * self.pitch()..];
                            let output = output.into_slice().expect("contiguous rows");
                            windows.iter().fold(output, |output, of_line| {
                                let (output, rest) = output.split_at_mut(of_line.len());
                                copy(&products[of_line.clone()], output);
                                rest
                            });
                        }
                    }
                }
            }
        });
    }

    /// `dW_k = dY X_k^T`, summed over images: `[kernel, channels, rows]`, rows of all groups. E156
    ///
    /// x `[images, channels, size]`, dy `[images, rows, outputs]` in standard layout.
    pub fn weights<T: Scalar>(&self, x: ArrayView3<'_, T>, dy: ArrayView3<'_, T>, groups: usize) -> Array3<T> {
        let (images, rows, _) = dy.dim();
        let channels = x.len_of(Axis(1)) / groups;
        let tiles = self.tiles(images);
        let widest = tiles.iter().map(|tile| self.widths(tile)[1]).max().unwrap_or(0);
        let scratch = || {
            let band = Array2::zeros((self.sheets.len() * channels, widest));
            (band, Array2::zeros((widest, rows / groups)))
        };
        let zero = || Array3::zeros((self.taps.len(), channels, rows));
        let add = |(band, placed): &mut (Array2<T>, Array2<T>), dweight: &mut Array3<T>, tile: Tile| {
            let [places, _] = self.widths(&tile);
            for q in 0..groups {
                for (nth, image) in tile.images.clone().enumerate() {
                    let of_image = self.span(&tile, nth);
                    let [x, dy] = [x, dy].map(|values| {
                        let values = values.index_axis_move(Axis(0), image);
                        values.slice_axis_move(Axis(0), group_slice(q, groups, values.nrows()))
                    });
                    self.fill(&tile, [x].into_iter(), band.slice_axis_mut(Axis(1), of_image));
                    self.place(&tile, dy, placed.slice_axis_mut(Axis(0), of_image));
                }
                let placed = placed.slice_axis(Axis(0), Slice::from(..places));
                let of_group = group_slice(q, groups, rows);
                for (k, dweight) in dweight.slice_axis_mut(Axis(2), of_group).outer_iter_mut().enumerate() {
                    let (seen, dweight) = (self.seen(k, band.view(), places), dweight.reversed_axes());
                    product_into_on_this_thread(T::one(), placed.t(), seen.t(), Accumulate::Add, dweight); // E156
                }
            }
        };
        sum(x.len().max(dy.len()), tiles.into_iter(), scratch, zero, add, |all, part| *all += &part)
    }

    /// The padded input that a tile reads of one image, `[sheets * channels, places]`.
    fn fill<'a, T: Scalar>(
        &self,
        tile: &Tile,
        images: impl Iterator<Item = ArrayView2<'a, T>>,
        band: ArrayViewMut2<'_, T>,
    ) {
        let [outer, lines, columns] = &self.axes;
        let length = band.ncols();
        let channels: Vec<&[T]> = images
            .flat_map(|image| image.into_outer_iter())
            .map(|channel| channel.to_slice().expect("standard layout"))
            .collect();
        let mut rows: Vec<&mut [T]> =
            band.into_outer_iter_mut().map(|row| row.into_slice().expect("standard layout")).collect();
        let mut padding = Vec::new();
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
                padding.clear();
                padding.extend((from..inside.start).chain(inside.end..to).map(|place| {
                    let source = self.sources[2].get(place * columns.stride + remainder);
                    (place - from, source.copied().unwrap_or(NOWHERE))
                }));
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
                    for &(place, source) in &padding {
                        into[place] = x.get(source).copied().unwrap_or(T::zero());
                    }
                }
            }
        }
    }

    /// The padded input as kernel position k sees it.
    fn seen<'a, T: Scalar>(&self, k: usize, band: ArrayView2<'a, T>, places: usize) -> ArrayView2<'a, T> {
        let Tap { sheet, offset } = self.taps[k];
        let channels = band.nrows() / self.sheets.len();
        let seen = band.slice_axis_move(Axis(0), Slice::from(sheet * channels..(sheet + 1) * channels));
        seen.slice_axis_move(Axis(1), Slice::from(offset..offset + places))
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
        for k in 0..self.taps.len() {
            let weight = weight.index_axis(Axis(0), k);
            let seen = self.seen(k, band.view(), places);
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

    /// A cotangent at the places of its outputs, 0 at the others: dy `[rows, outputs]` into `[places, rows]`. E156
    fn place<T: Scalar>(&self, tile: &Tile, dy: ArrayView2<'_, T>, mut placed: ArrayViewMut2<'_, T>) {
        placed.fill(T::zero());
        let rows: Vec<&[T]> = dy.outer_iter().map(|row| row.to_slice().expect("contiguous rows")).collect();
        let of_sheet = self.axes[1].output() * self.axes[2].output();
        let first = tile.output * of_sheet + self.outputs_before(tile.places.start);
        let places = self.windows(tile).into_iter().flatten();
        for (output, place) in (first..).zip(places) {
            placed.row_mut(place).iter_mut().zip(&rows).for_each(|(into, row)| *into = row[output]);
        }
    }

    /// The places of a tile where a window fits, line by line, counted from its first.
    fn windows(&self, tile: &Tile) -> Vec<Range<usize>> {
        let (Range { start, end }, columns) = (tile.places.clone(), self.axes[2].output());
        let lines = start / self.line..end.div_ceil(self.line);
        let of_line = |line: usize| {
            let line = line * self.line;
            line.max(start) - start..(line + columns).clamp(start, end) - start
        };
        lines.map(of_line).filter(|places| !places.is_empty()).collect()
    }
}

/// Places that images side by side may take where so many rows hold their padded input.
fn places_together(rows: usize) -> usize {
    (BAND / 2 / rows.max(1)).min(2 * TILE)
}

/// How much further the last kernel position reads than the first.
fn reach(taps: &[Tap]) -> usize {
    taps.iter().map(|tap| tap.offset).max().unwrap_or(0)
}

fn is_depthwise(rows: usize, channels: usize) -> bool {
    rows <= DEPTHWISE && channels <= DEPTHWISE
}
