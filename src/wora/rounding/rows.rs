//! The weight row by row along the norm axis, and what is made of each row: no stage of the whole weight is kept.
//!
//! With `norm_axis = "input"` rows are columns of the weight: `left` is then A and `right` B.

use super::operands::Magnitudes;
use super::row::{Dmerged, Gain, Mixing, Row, narrow};
use crate::Scalar;
use crate::matmul::{Accumulate, product_into_on_this_thread};
use crate::simd::dot_squares;
use crate::wora::NormGradient;
use crate::wora::direction::{Direction, Factors};
use ndarray::{Array1, Array2, ArrayBase, ArrayView2, ArrayViewMut2, Axis, DataMut, Ix2, Slice};
use rayon::prelude::*;
use std::ops::Range;

/// Threads take this many elements at a time, or more.
const ELEMENTS: usize = 1 << 15;
/// Sums over rows are added up in no more parts than this.
const PARTS: usize = 8;
/// So many rows are multiplied by the low-rank factors at once.
const TOGETHER: usize = 8;

/// The weight, as the norm sees it.
pub(super) struct Rows<'a> {
    pub factors: Factors<'a, f64>,
    left_sq: Array2<f64>,
    right_sq: Array2<f64>,
    /// `None` for LoRA.
    direction: Option<&'a Direction<f64>>,
    /// Of a sum over a row, and over all rows
    chain: f64,
    total_chain: f64,
    /// `t^2`
    tiny_sq: f64,
}

/// What sums over W' add up, of some rows: `[rows, columns]`.
pub(super) struct Terms<P> {
    /// In y, whichever way it is computed: V's parts apart, each with its chain.
    pub of_outputs: Array2<P>,
    /// In dx: those and W' beside them; without columns where not wanted.
    pub of_inputs: Array2<P>,
}

impl<P: Scalar> Terms<P> {
    pub fn new(rows: usize, columns: usize, with_inputs: bool) -> Self {
        let of_inputs = Array2::zeros((rows, if with_inputs { columns } else { 0 }));
        Self { of_outputs: Array2::zeros((rows, columns)), of_inputs }
    }

    /// Room for no more than so many rows.
    pub fn truncate(&mut self, rows: usize) {
        for terms in [&mut self.of_outputs, &mut self.of_inputs] {
            terms.slice_axis_inplace(Axis(0), Slice::from(..rows));
        }
    }
}

/// Errors of some rows, or of all; those of gradients before they are multiplied by `alpha s` or `beta`.
pub(super) struct RowErrors {
    /// Of n, relative: one a row; 0 for LoRA
    pub norm: Array1<f64>,
    /// Of g, relative: one a row; 0 for LoRA
    pub gain: Array1<f64>,
    /// Of dm: one a row
    pub magnitude: Array1<f64>,
    /// kappa^2: one a row; zeros where the norm is held
    pub norm_weight: Array1<f64>,
    /// `sum_j error(dV)^2 right^2`: `[rows, rank / groups]`
    pub left: Array2<f64>,
    /// `sum_i error(dV)^2 left^2`: `[rank, columns]`
    pub right: Array2<f64>,
    /// `sum error(dV)^2 D^2 + dV^2 error(D)^2` and what rows share
    pub alpha: f64,
    /// The same for W0, which is exact.
    pub beta: f64,
}

impl RowErrors {
    /// None yet, of so many rows.
    pub fn none(rows: usize, factors: &Factors<'_, f64>) -> Self {
        let [norm, gain, magnitude, norm_weight] = [(); 4].map(|()| Array1::zeros(rows));
        let (left, right) = (Array2::zeros((rows, factors.left.ncols())), Array2::zeros(factors.right.dim()));
        Self { norm, gain, magnitude, norm_weight, left, right, alpha: 0.0, beta: 0.0 }
    }

    /// Those of some rows among these.
    fn add(&mut self, start: usize, other: &Self) {
        let rows = Slice::from(start..start + other.norm.len());
        for (all, some) in [
            (&mut self.norm, &other.norm),
            (&mut self.gain, &other.gain),
            (&mut self.magnitude, &other.magnitude),
            (&mut self.norm_weight, &other.norm_weight),
        ] {
            all.slice_axis_mut(Axis(0), rows).assign(some);
        }
        self.left.slice_axis_mut(Axis(0), rows).assign(&other.left);
        self.right += &other.right;
        self.alpha += other.alpha;
        self.beta += other.beta;
    }
}

/// The errors of whole weights, `[rows, columns]`; without columns where not wanted.
pub(super) struct WeightErrors<A> {
    /// Of V.
    pub weighted: A,
    /// Of W', the gain's own error among it.
    pub merged: A,
    /// Of dV, as it reaches W0.
    pub dweighted: A,
}

impl WeightErrors<Array2<f64>> {
    /// Those of some rows.
    pub fn rows(&mut self, rows: &Range<usize>) -> WeightErrors<ArrayViewMut2<'_, f64>> {
        let rows = Slice::from(rows.clone());
        WeightErrors {
            weighted: self.weighted.slice_axis_mut(Axis(0), rows),
            merged: self.merged.slice_axis_mut(Axis(0), rows),
            dweighted: self.dweighted.slice_axis_mut(Axis(0), rows),
        }
    }
}

/// What the backward of some rows needs beside the weight.
pub(super) struct Backward<'a, P> {
    /// X, the gradient of W', and the sum of its squared terms: `[rows, columns]`, and what each is to be multiplied by.
    pub dmerged: (ArrayView2<'a, P>, f64),
    pub dmerged_terms: (ArrayView2<'a, P>, f64),
    /// The chain of a sum over outputs.
    pub chain: f64,
    /// `[columns]`: in column j a lookup lets only a fraction of its gradient through.
    pub fraction: Option<&'a Array1<f64>>,
    /// The gradient of g of all rows, and what the factored way adds to its error.
    pub dgain: &'a Array1<f64>,
    pub dgain_error: &'a Array1<f64>,
    pub norm_gradient: NormGradient,
}

/// A few rows of one group, which are multiplied by the low-rank factors together; the memory is the next ones' too.
struct Few {
    rows: Range<usize>,
    /// Their rows of `right`.
    ranks: Range<usize>,
    /// D = B A
    delta: Array2<f64>,
    /// `sum_k left^2 right^2`
    delta_terms: Array2<f64>,
    /// The error of dV
    dweighted_error: Array2<f64>,
    /// The error of what of dV reaches A and W0
    looked_up_error: Array2<f64>,
}

impl Few {
    fn new(columns: usize) -> Self {
        let rows = || Array2::zeros((TOGETHER, columns));
        let (delta, delta_terms, dweighted_error, looked_up_error) = (rows(), rows(), rows(), rows());
        Self { rows: 0..0, ranks: 0..0, delta, delta_terms, dweighted_error, looked_up_error }
    }
}

impl<'a> Rows<'a> {
    /// The chains of a sum over a row and over all rows; `tiny_sq` is `t^2`.
    pub fn new(
        factors: Factors<'a, f64>,
        direction: Option<&'a Direction<f64>>,
        [chain, total_chain]: [f64; 2],
        tiny_sq: f64,
    ) -> Self {
        let (left_sq, right_sq) = (factors.left.mapv(|l| l * l), factors.right.mapv(|r| r * r));
        Self { factors, left_sq, right_sq, direction, chain, total_chain, tiny_sq }
    }

    /// How many of so many rows a thread takes at a time.
    fn chunk(&self, rows: usize) -> usize {
        let columns = self.factors.base.ncols();
        rows.div_ceil(PARTS).max(ELEMENTS / columns.max(1)).max(1)
    }

    /// These rows, a few of one group at a time, and their rows of `right`.
    fn in_fews(&self, rows: Range<usize>) -> impl Iterator<Item = [Range<usize>; 2]> + use<> {
        let Factors { base, left, groups, .. } = self.factors;
        let (in_group, rank) = (base.nrows() / groups, left.ncols());
        let mut start = rows.start;
        std::iter::from_fn(move || {
            let group = start / in_group;
            let end = (start + TOGETHER).min(rows.end).min((group + 1) * in_group);
            let few = std::mem::replace(&mut start, end)..end;
            (!few.is_empty()).then(|| [few, group * rank..(group + 1) * rank])
        })
    }

    /// D of these rows.
    fn multiply(&self, [rows, ranks]: [Range<usize>; 2], few: &mut Few) {
        let Factors { left, right, .. } = self.factors;
        let product = |left: ArrayView2<'_, f64>, right: ArrayView2<'_, f64>, product: &mut Array2<f64>| {
            let product = product.slice_axis_mut(Axis(0), Slice::from(..rows.len()));
            let (left, right) = (part(left, &rows), part(right, &ranks));
            product_into_on_this_thread(1.0, left, right, Accumulate::Replace, product);
        };
        product(left, right, &mut few.delta);
        product(self.left_sq.view(), self.right_sq.view(), &mut few.delta_terms);
        (few.rows, few.ranks) = (rows, ranks);
    }

    /// The stages of one of them, `nth` among them.
    fn set(&self, few: &Few, nth: usize, row: &mut Row) {
        let Factors { base, alpha, scaling, beta, .. } = self.factors;
        let mixing = Mixing { gamma: alpha * scaling, beta, tiny_sq: self.tiny_sq };
        let [delta, terms] = [&few.delta, &few.delta_terms].map(|rows| rows.row(nth).to_slice().expect("contiguous"));
        row.i = few.rows.start + nth;
        row.set(mixing, base.row(row.i), delta, terms);
    }

    /// Of n and of g, relative.
    fn norm_error(&self, row: &Row) -> [f64; 2] {
        let Some(Direction { norm, weight_norm, .. }) = self.direction else { return [0.0, 0.0] };
        let (Factors { alpha, scaling, beta, .. }, i) = (self.factors, row.i);
        if weight_norm[i] == 0.0 {
            return [0.0, 1.0];
        }
        // What alpha s and beta are rounded by reaches every element alike.
        let (lora, of_base) = (alpha * scaling * row.of_delta, beta * row.of_base);
        let sum = dot_squares(&row.weighted, &row.weighted_error) + lora * lora + of_base * of_base;
        let relative = sum / (norm[i] * weight_norm[i]).powi(2) + 3.0 + (self.chain - 1.0) / 4.0; // E57
        [relative, relative + 1.0] // E58
    }

    fn gain(&self, i: usize) -> f64 {
        self.direction.map_or(1.0, |direction| direction.gain[i])
    }

    /// Adds the errors of some rows, forward and where there is a cotangent backward, and says what sums over them add up;
    /// returns the magnitudes of that, without `t^2`. `chain` is that of a sum over a unit's weights.
    pub fn add<P: Scalar>(
        &self,
        rows: Range<usize>,
        chain: f64,
        backward: Option<&Backward<'_, P>>,
        errors: &mut RowErrors,
        weights: WeightErrors<ArrayViewMut2<'_, f64>>,
        terms: &mut Terms<P>,
    ) -> Magnitudes {
        let (columns, chunk) = (self.factors.base.ncols(), self.chunk(rows.len()));
        let WeightErrors { mut weighted, mut merged, mut dweighted } = weights;
        let chunks = (
            terms.of_outputs.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            terms.of_inputs.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            weighted.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            merged.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            dweighted.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
        );
        let of_chunks = chunks.into_par_iter().enumerate().map_init(
            || (Few::new(columns), Row::new(columns)),
            |(few, row), (nth, chunks)| {
                let (mut terms, mut both, mut weighted, mut merged, mut dweighted) = chunks;
                let first = rows.start + nth * chunk;
                let mut errors = RowErrors::none(terms.nrows(), &self.factors);
                let mut magnitudes = Magnitudes::NONE;
                for rows_of_few in self.in_fews(first..first + terms.nrows()) {
                    self.multiply(rows_of_few, few);
                    for (nth, i) in few.rows.clone().enumerate() {
                        let at = i - first;
                        self.set(few, nth, row);
                        [errors.norm[at], errors.gain[at]] = self.norm_error(row);
                        let gain = Gain { gain: self.gain(i), error: errors.gain[at], tiny_sq: self.tiny_sq };
                        let sums = row.terms(gain, chain);
                        magnitudes = magnitudes.and(Magnitudes::of(sums));
                        narrow(sums, (1.0 + chain) * self.tiny_sq, contiguous(&mut terms, at)); // E60
                        if !both.is_empty() {
                            both.row_mut(at).assign(&terms.row(at));
                            row.add_merged(gain, contiguous(&mut both, at));
                        }
                        if !weighted.is_empty() {
                            contiguous(&mut weighted, at).copy_from_slice(&row.weighted_error);
                        }
                        if !merged.is_empty() {
                            row.add_merged(gain, contiguous(&mut merged, at));
                        }
                        if let Some(backward) = backward {
                            let in_block = i - rows.start;
                            self.backward(row, gain, backward, in_block, at, &mut errors);
                            contiguous(&mut few.dweighted_error, nth).copy_from_slice(&row.dweighted_error);
                            contiguous(&mut few.looked_up_error, nth).copy_from_slice(&row.looked_up_error);
                            if !dweighted.is_empty() {
                                contiguous(&mut dweighted, at).copy_from_slice(&row.looked_up_error);
                            }
                        }
                    }
                    if backward.is_some() {
                        self.add_pair(few, first, &mut errors);
                    }
                }
                (first, errors, magnitudes)
            },
        );
        let mut magnitudes = Magnitudes::NONE;
        for (first, of_chunk, of_terms) in of_chunks.collect::<Vec<_>>() {
            errors.add(first, &of_chunk);
            magnitudes = magnitudes.and(of_terms);
        }
        magnitudes
    }

    /// The backward of a row, in X row `in_block`, whose errors are those `at`.
    fn backward<P: Scalar>(
        &self,
        row: &mut Row,
        gain: Gain,
        of: &Backward<'_, P>,
        in_block: usize,
        at: usize,
        errors: &mut RowErrors,
    ) {
        let dmerged = Dmerged {
            values: (of.dmerged.0.row(in_block), of.dmerged.1),
            terms: (of.dmerged_terms.0.row(in_block), of.dmerged_terms.1),
            chain: of.chain,
            fraction: of.fraction.map(|fraction| fraction.view()),
        };
        let apart = row.set_direct(gain, &dmerged);
        let [magnitude, k_error] = self.through_norm(row, of, errors.norm[at], apart);
        (errors.magnitude[at], errors.norm_weight[at]) = (magnitude, k_error);
        let [of_alpha, of_beta] = row.scale_errors(gain, k_error, self.total_chain);
        errors.alpha += of_alpha;
        errors.beta += of_beta;
    }

    /// Adds to dV what comes by way of the norm; returns the errors of dm and of k.
    fn through_norm<P>(&self, row: &mut Row, of: &Backward<'_, P>, norm_error: f64, apart: f64) -> [f64; 2] {
        let Some(direction) = self.direction else { return [0.0, 0.0] };
        let i = row.i;
        let (norm, n, c) = (direction.norm[i], direction.weight_norm[i], of.dgain[i]);
        if n == 0.0 {
            return [self.tiny_sq, 0.0];
        }
        let c_error = apart + c * c + of.dgain_error[i]; // E64
        let magnitude = (c_error + (norm_error + 2.0) * c * c) / (n * n) + self.tiny_sq; // E65
        if of.norm_gradient == NormGradient::Detached {
            return [magnitude, 0.0];
        }
        let per_c = -direction.gain[i] / (n * norm);
        let k = per_c * c;
        let k_error = per_c * per_c * c_error + 3.0 * k * k * (norm_error + 1.0); // E66
        row.add_through_norm(k, k_error);
        [magnitude, k_error]
    }

    /// What a few rows add to the errors of the low-rank factors.
    fn add_pair(&self, few: &Few, first: usize, errors: &mut RowErrors) {
        let Few { rows, ranks, .. } = few;
        let left = errors.left.slice_axis_mut(Axis(0), Slice::from(rows.start - first..rows.end - first));
        let right = errors.right.slice_axis_mut(Axis(0), ranks.clone().into());
        let product = |a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>, c: ArrayViewMut2<'_, f64>| {
            product_into_on_this_thread(1.0, a, b, Accumulate::Add, c);
        };
        let [of_left, of_right] =
            [&few.dweighted_error, &few.looked_up_error].map(|error| part(error.view(), &(0..rows.len())));
        product(of_left, part(self.right_sq.view(), ranks).t(), left);
        product(part(self.left_sq.view(), rows).t(), of_right, right);
    }
}

/// Some rows of a matrix.
fn part<'m>(matrix: ArrayView2<'m, f64>, rows: &Range<usize>) -> ArrayView2<'m, f64> {
    matrix.slice_axis_move(Axis(0), rows.clone().into())
}

/// A row of an array whose rows lie contiguous.
fn contiguous<P, S: DataMut<Elem = P>>(rows: &mut ArrayBase<S, Ix2>, at: usize) -> &mut [P] {
    rows.row_mut(at).into_slice().expect("a row of an array in standard layout")
}
