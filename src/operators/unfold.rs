//! Unfold and fold (im2col and col2im), one tile of output positions at a time. SPEC.md, section 3.4.
//!
//! Where each kernel offset reads is looked up in a table for every axis, so that stride, dilation and every
//! padding mode are one piece of code.

use crate::Scalar;
use crate::simd::copy;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, Slice};
use std::ops::Range;

/// Output positions in a tile: a tile of columns stays within the cache of a core.
pub(super) const TILE: usize = 512;

/// How positions outside the input are filled. PyTorch's words.
///
/// Three numbers with one position of padding on either side, by every mode:
///
/// ```
/// use ndarray::{Array2, array};
/// use woracle::operators::{Conv1d, ConvSettings, Operator, PaddingMode};
/// let padded = |padding_mode| -> woracle::Result<Vec<f64>> {
///     let settings = ConvSettings { padding_mode, ..serde_json::from_str(r#"{"padding": 1}"#).unwrap() };
///     let conv = Conv1d::from_weight_shape(settings, &[1, 1, 1])?; // a kernel of one shows the padded input itself
///     let x = array![[[1.0, 2.0, 3.0]]].into_dyn().into();
///     Ok(conv.apply(&x, &[Array2::ones((1, 1)).view()])[0].iter().copied().collect())
/// };
/// assert_eq!(padded(PaddingMode::Zeros)?, [0.0, 1.0, 2.0, 3.0, 0.0]);
/// assert_eq!(padded(PaddingMode::Reflect)?, [2.0, 1.0, 2.0, 3.0, 2.0]);
/// assert_eq!(padded(PaddingMode::Replicate)?, [1.0, 1.0, 2.0, 3.0, 3.0]);
/// assert_eq!(padded(PaddingMode::Circular)?, [3.0, 1.0, 2.0, 3.0, 1.0]);
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PaddingMode {
    /// With 0.
    #[default]
    Zeros,
    /// Mirrored, without repeating the border.
    Reflect,
    /// With the border.
    Replicate,
    /// From the other end.
    Circular,
}

/// What one axis of a convolution is, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub size: usize,
    pub kernel: usize,
    pub stride: usize,
    pub dilation: usize,
    /// Padding before the first element.
    pub before: usize,
    /// Padding after the last element.
    pub after: usize,
    pub mode: PaddingMode,
}

impl Geometry {
    /// The number of output positions: PyTorch's formula; 0 where the kernel does not fit. E42
    pub fn output(&self) -> usize {
        let padded = self.padded_size();
        let reach = self.dilation * (self.kernel - 1) + 1;
        if padded < reach { 0 } else { (padded - reach) / self.stride + 1 } // E42
    }

    /// The input position that kernel offset k reads for output p; `None` for a zero. E43
    pub fn source(&self, p: usize, k: usize) -> Option<usize> {
        self.source_of_padded(p * self.stride + k * self.dilation)
    }

    /// The input position behind a padded one; `None` for a zero. E43
    fn source_of_padded(&self, position: usize) -> Option<usize> {
        let position = position as isize - self.before as isize;
        let size = self.size as isize;
        if (0..size).contains(&position) {
            return Some(position as usize);
        }
        let inside = match self.mode {
            PaddingMode::Zeros => return None,
            PaddingMode::Reflect if position < 0 => -position,
            PaddingMode::Reflect => 2 * (size - 1) - position,
            PaddingMode::Replicate => position.clamp(0, size - 1),
            PaddingMode::Circular => position.rem_euclid(size),
        };
        Some(inside as usize) // E43
    }
}

impl Geometry {
    /// The same of every padded position; `NOWHERE` for a zero.
    pub fn padded_sources(&self) -> Vec<usize> {
        (0..self.padded_size()).map(|position| self.source_of_padded(position).unwrap_or(NOWHERE)).collect()
    }

    /// How many positions there are with padding.
    pub fn padded_size(&self) -> usize {
        self.before + self.size + self.after
    }

    /// Places from one line to the next, a stride apart: zeros after a line are those before the next one too.
    pub fn pitch(&self) -> usize {
        let inside = if self.is_zero_padded() { self.size + self.before.max(self.after) } else { self.padded_size() };
        inside.div_ceil(self.stride).max(self.output())
    }

    /// Whether all that is put around the input is zeros.
    pub fn is_zero_padded(&self) -> bool {
        self.mode == PaddingMode::Zeros || self.before + self.after == 0
    }

    /// The padded positions a stride apart, from `first` on, that lie inside the input.
    pub fn inside_of(&self, first: usize) -> Range<usize> {
        let start = self.before.saturating_sub(first).div_ceil(self.stride);
        let end = (self.size + self.before).saturating_sub(first).div_ceil(self.stride);
        start..end.max(start)
    }

    /// The padded axis written out: the source of every padded position; `None` for a zero. The definition reads
    /// this, so that it shares nothing with `source`. E43
    fn padded(&self) -> Vec<Option<usize>> {
        let Self { size, before, after, .. } = *self;
        let (left, right): (Vec<_>, Vec<_>) = match self.mode {
            PaddingMode::Zeros => (vec![None; before], vec![None; after]),
            PaddingMode::Reflect => {
                ((1..=before).rev().map(Some).collect(), (size - 1 - after..size - 1).rev().map(Some).collect())
            }
            PaddingMode::Replicate => (vec![Some(0); before], vec![Some(size - 1); after]),
            PaddingMode::Circular => ((size - before..size).map(Some).collect(), (0..after).map(Some).collect()),
        };
        left.into_iter().chain((0..size).map(Some)).chain(right).collect() // E43
    }

    /// The output positions for which kernel offset k reads inside the input, a stride apart.
    fn inside(&self, k: usize) -> Range<usize> {
        let Range { start, end } = self.inside_of(k * self.dilation);
        start.min(self.output())..end.min(self.output())
    }
}

/// A run of output positions along the last axis, for one kernel position.
struct Run<'a> {
    /// Its first column.
    at: usize,
    /// Where its line of the input begins; `None` where the whole line lies in the zeros.
    line: Option<usize>,
    /// The source of each column along the line, or `NOWHERE`.
    sources: &'a [usize],
    /// The columns whose sources lie inside, a stride apart: taken as a slice.
    inside: Range<usize>,
}

/// Where every column of the weight reads for every output position: the index maps of one input.
pub(super) struct Windows<const N: usize> {
    pub axes: [Geometry; N],
    /// For each axis, `[kernel, output]`: the source, or `NOWHERE`.
    sources: [Vec<usize>; N],
    /// For each axis, the padded axis written out.
    padded: [Vec<Option<usize>>; N],
    /// For each kernel offset along the last axis, the output positions whose sources lie inside, a stride apart.
    inside: Vec<Range<usize>>,
    /// The output's extent along each axis.
    pub output: [usize; N],
    /// Kernel positions: the product of the kernel's extents.
    pub kernel: usize,
}

/// Stands for the source of a zero.
pub(super) const NOWHERE: usize = usize::MAX;

impl<const N: usize> Windows<N> {
    pub fn new(axes: [Geometry; N]) -> Self {
        let sources = axes.map(|axis| {
            let positions = (0..axis.kernel).flat_map(|k| (0..axis.output()).map(move |p| (p, k)));
            positions.map(|(p, k)| axis.source(p, k).unwrap_or(NOWHERE)).collect()
        });
        let last = axes[N - 1];
        let padded = axes.map(|axis| axis.padded());
        let inside = (0..last.kernel).map(|k| last.inside(k)).collect();
        Self {
            axes,
            sources,
            inside,
            padded,
            output: axes.map(|axis| axis.output()),
            kernel: axes.iter().map(|axis| axis.kernel).product(),
        }
    }

    /// Output positions of one image.
    pub fn positions(&self) -> usize {
        self.output.iter().product()
    }

    /// Input positions of one channel.
    pub fn inputs(&self) -> usize {
        self.axes.iter().map(|axis| axis.size).product()
    }

    /// A walk that stands nowhere yet.
    pub fn walk(&self) -> Walk<'_, N> {
        Walk { windows: self, positions: 0..0, runs: Vec::new() }
    }

    /// What kernel position k (row-major) reads for these output positions: the same in every channel.
    fn runs_of(&self, k: usize, Range { start, end }: Range<usize>) -> Vec<Run<'_>> {
        let length = end - start;
        let last = N - 1;
        let mut offsets = [0; N];
        let mut rest = k;
        for axis in (0..N).rev() {
            (offsets[axis], rest) = (rest % self.axes[axis].kernel, rest / self.axes[axis].kernel);
        }
        let extent = self.output[last];
        let inside = &self.inside[offsets[last]];
        let (mut runs, mut at) = (Vec::new(), 0);
        while at < length {
            let position = start + at;
            let (mut outer, from) = (position / extent, position % extent);
            let run = (extent - from).min(length - at);
            let (mut line, mut stride) = (Some(0), self.axes[last].size);
            for axis in (0..last).rev() {
                let source = self.sources[axis][offsets[axis] * self.output[axis] + outer % self.output[axis]];
                outer /= self.output[axis];
                line = line.filter(|_| source != NOWHERE).map(|line| line + source * stride);
                stride *= self.axes[axis].size;
            }
            let sources = &self.sources[last][offsets[last] * extent + from..][..run];
            let clamp = |p: usize| p.clamp(from, from + run) - from;
            runs.push(Run { at, line, sources, inside: clamp(inside.start)..clamp(inside.end) });
            at += run;
        }
        runs
    }

    /// A kernel of one position without stride or padding reads every input where it is.
    fn is_identity(&self) -> bool {
        let plain = |axis: &Geometry| axis.kernel == 1 && axis.stride == 1 && axis.before + axis.after == 0;
        self.axes.iter().all(plain)
    }

    /// Every pair of output position and input position that kernel position `k` joins, by the definition: a window
    /// stands wherever all of it lies on the padded axis.
    pub fn pairs(&self, k: usize, mut visit: impl FnMut(usize, usize)) {
        let outputs: [usize; N] = std::array::from_fn(|axis| {
            let Geometry { kernel, stride, dilation, .. } = self.axes[axis];
            let fits = |p: &usize| p * stride + (kernel - 1) * dilation < self.padded[axis].len();
            (0..).take_while(fits).count() // E42
        });
        for p in 0..outputs.iter().product() {
            let (mut rest_p, mut rest_k, mut stride, mut input) = (p, k, 1, Some(0));
            for axis in (0..N).rev() {
                let geometry = &self.axes[axis];
                let (p, k) = (rest_p % outputs[axis], rest_k % geometry.kernel);
                let source = self.padded[axis][p * geometry.stride + k * geometry.dilation];
                input = input.zip(source).map(|(input, source)| input + source * stride);
                stride *= geometry.size;
                rest_p /= outputs[axis];
                rest_k /= geometry.kernel;
            }
            if let Some(input) = input {
                visit(p, input);
            }
        }
    }
}

/// A thread's walk through tiles. What one of them reads is kept for the next: in small images, of one tile each, all read
/// the same.
pub(super) struct Walk<'w, const N: usize> {
    windows: &'w Windows<N>,
    /// The output positions of the tile that it stands on.
    positions: Range<usize>,
    /// For every kernel position, what it reads.
    runs: Vec<Vec<Run<'w>>>,
}

impl<const N: usize> Walk<'_, N> {
    fn step_to(&mut self, positions: Range<usize>) {
        if self.positions != positions {
            self.runs = (0..self.windows.kernel).map(|k| self.windows.runs_of(k, positions.clone())).collect();
            self.positions = positions;
        }
    }

    /// `columns[c k, p] = x[c, source(p, k)]` for the output positions `start..`, as many as there are columns.
    ///
    /// x `[channels, inputs]`, columns `[channels * kernel, positions]`, both in standard layout. E44
    fn unfold<T: Scalar>(&mut self, x: ArrayView2<'_, T>, start: usize, columns: ArrayViewMut2<'_, T>) {
        self.step_to(start..start + columns.ncols());
        let (kernel, stride) = (self.windows.kernel, self.windows.axes[N - 1].stride);
        let x: Vec<&[T]> = x.outer_iter().map(|channel| channel.to_slice().expect("standard layout")).collect();
        let rows = columns.into_outer_iter_mut().map(|row| row.into_slice().expect("standard layout"));
        let mut rows: Vec<&mut [T]> = rows.collect();
        for (k, runs) in self.runs.iter().enumerate() {
            for Run { at, line, sources, inside } in runs {
                let of_run = *at..at + sources.len();
                let rows = rows.iter_mut().skip(k).step_by(kernel).map(|row| &mut row[of_run.clone()]);
                let Some(line) = line else {
                    rows.for_each(|into| into.fill(T::zero()));
                    continue;
                };
                for (into, x) in rows.zip(&x) {
                    let x = &x[*line..];
                    if !inside.is_empty() {
                        let x = &x[sources[inside.start]..];
                        let into = &mut into[inside.clone()];
                        if stride == 1 {
                            copy(&x[..into.len()], into); // E44
                        } else {
                            into.iter_mut().zip(x.iter().step_by(stride)).for_each(|(into, &x)| *into = x); // E44
                        }
                    }
                    for i in (0..inside.start).chain(inside.end..sources.len()) {
                        into[i] = if sources[i] == NOWHERE { T::zero() } else { x[sources[i]] }; // E44
                    }
                }
            }
        }
    }

    /// The adjoint of unfold: `x[c, source(p, k)] += columns[c k, p]`. E45
    pub fn fold<T: Scalar>(&mut self, columns: ArrayView2<'_, T>, start: usize, mut x: ArrayViewMut2<'_, T>) {
        self.step_to(start..start + columns.ncols());
        let kernel = self.windows.kernel;
        for (row, column) in columns.axis_iter(Axis(0)).enumerate() {
            let mut x = x.index_axis_mut(Axis(0), row / kernel);
            let x = x.as_slice_mut().expect("standard layout");
            self.scatter(row % kernel, column.to_slice().expect("standard layout"), x); // E45
        }
    }

    /// The columns `X[c k, p] = x[c, source(p, k)]` of some output positions, in `scratch` unless they are x itself.
    pub fn unfolded<'a, T: Scalar>(
        &mut self,
        x: ArrayView2<'a, T>,
        positions: Range<usize>,
        scratch: &'a mut Array2<T>,
    ) -> ArrayView2<'a, T> {
        if self.windows.is_identity() {
            return x.slice_axis_move(Axis(1), Slice::from(positions));
        }
        let mut columns = scratch.slice_axis_mut(Axis(1), Slice::from(0..positions.len()));
        self.unfold(x, positions.start, columns.view_mut());
        let columns: ArrayView2<'a, T> = scratch.view();
        columns.slice_axis_move(Axis(1), Slice::from(0..positions.len()))
    }

    /// A cotangent moved to where each kernel position reads: `rows[u k, i] = sum over p with source(p, k) = i of dy[u,
    /// p]`.
    ///
    /// dy `[rows, positions]`; `rows` `[rows * kernel, inputs]` in standard layout. E74
    pub fn spread<T: Scalar>(&mut self, dy: ArrayView2<'_, T>, mut rows: ArrayViewMut2<'_, T>) {
        self.step_to(0..dy.ncols());
        rows.fill(T::zero());
        let kernel = self.windows.kernel;
        for (row, into) in rows.outer_iter_mut().enumerate() {
            let dy = dy.index_axis(Axis(0), row / kernel).to_slice().expect("contiguous rows");
            self.scatter(row % kernel, dy, into.into_slice().expect("standard layout")); // E74
        }
    }

    /// `into[source(p, k)] += from[p]`
    fn scatter<T: Scalar>(&self, k: usize, from: &[T], into: &mut [T]) {
        let stride = self.windows.axes[N - 1].stride;
        for Run { at, line, sources, inside } in &self.runs[k] {
            let Some(line) = line else { continue };
            let from = &from[*at..at + sources.len()];
            if !inside.is_empty() {
                let into = &mut into[line + sources[inside.start]..];
                let from = &from[inside.clone()];
                if stride == 1 {
                    into.iter_mut().zip(from).for_each(|(into, &from)| *into += from);
                } else {
                    into.iter_mut().step_by(stride).zip(from).for_each(|(into, &from)| *into += from);
                }
            }
            for i in (0..inside.start).chain(inside.end..sources.len()) {
                if sources[i] != NOWHERE {
                    into[line + sources[i]] += from[i];
                }
            }
        }
    }
}
