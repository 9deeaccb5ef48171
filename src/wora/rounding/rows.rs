//! The weight row by row along the norm axis, and what is made of each row: no stage of the whole weight is kept.
//!
//! With `norm_axis = "input"` rows are columns of the weight: `left` is then A and `right` B.

use super::operands::{Magnitudes, Scaled, fit, power_of_two};
use super::row::{self, Delta, Mixing, Row, Stages, Summed, padded};
use crate::Scalar;
use crate::matmul::{Accumulate, product_into_on_this_thread};
use crate::wora::NormGradient;
use crate::wora::direction::{Direction, Factors};
use ndarray::{Array1, Array2, ArrayBase, ArrayView1, ArrayView2, ArrayViewMut2, Axis, DataMut, Ix2, Slice, Zip};
use rayon::prelude::*;
use std::ops::Range;

/// Threads take this many elements at a time, or more.
const ELEMENTS: usize = 1 << 15;
/// Sums over rows are added up in no more parts than this.
const PARTS: usize = 8;
/// So many rows are multiplied by the low-rank factors at once.
const TOGETHER: usize = 16;
/// Where less than this is left of the squares that make up a row of V, D in f32 says too little of it.
const CANCELS: f64 = 1e-6;

/// The weight, as the norm sees it. Products with the low-rank factors are computed in P.
pub(super) struct Rows<'a, P> {
    pub factors: Factors<'a, f64>,
    left: Squared<P>,
    right: Squared<P>,
    /// `None` for LoRA.
    direction: Option<&'a Direction<f64>>,
    largest_gain: f64,
    /// Of a sum over a row, over all rows, and over the ranks that a unit has
    chain: f64,
    total_chain: f64,
    rank_chain: f64,
    /// `t^2`
    tiny_sq: f64,
}

/// A low-rank factor and its square.
struct Squared<P> {
    values: Scaled<Array2<P>>,
    squares: Array2<P>,
    /// Of the squares.
    magnitudes: Magnitudes,
}

impl<P: Scalar> Squared<P> {
    fn new(values: ArrayView2<'_, f64>) -> Self {
        let magnitudes = Magnitudes::of_array(values).scaled().squared();
        let values = Scaled::<Array2<P>>::of(values);
        Self { squares: values.values.mapv(|value| value * value), values, magnitudes }
    }
}

/// Errors of some rows, or of all; those of gradients before they are multiplied by `alpha s` or `beta`.
pub(super) struct RowErrors<P = f64> {
    /// Of n, relative: one a row; 0 for LoRA
    pub norm: Array1<f64>,
    /// Of g, relative: one a row; 0 for LoRA
    pub gain: Array1<f64>,
    /// Of dm: one a row
    pub magnitude: Array1<f64>,
    /// kappa^2: one a row; zeros where the norm is held
    pub norm_weight: Array1<f64>,
    /// `sum_j error(dV)^2 right^2`: `[rows, rank / groups]`
    pub left: Array2<P>,
    /// `sum_i error(dV)^2 left^2`: `[rank, columns]`
    pub right: Array2<P>,
    /// `sum error(dV)^2 D^2 + dV^2 error(D)^2` and what rows share
    pub alpha: f64,
    /// The same for W0, which is exact.
    pub beta: f64,
}

impl<P: Scalar> RowErrors<P> {
    /// None yet, of so many rows.
    pub fn none(rows: usize, factors: &Factors<'_, f64>) -> Self {
        let of_rows = || Array1::zeros(rows);
        Self {
            norm: of_rows(),
            gain: of_rows(),
            magnitude: of_rows(),
            norm_weight: of_rows(),
            left: Array2::zeros((rows, factors.left.ncols())),
            right: Array2::zeros(factors.right.dim()),
            alpha: 0.0,
            beta: 0.0,
        }
    }
}

impl RowErrors {
    /// Those of some rows among these; what is added up of the low-rank factors is to be multiplied by so much.
    fn add<P: Scalar>(&mut self, start: usize, other: &RowErrors<P>, [of_left, of_right]: [f64; 2]) {
        let rows = Slice::from(start..start + other.norm.len());
        for (all, some) in [
            (&mut self.norm, &other.norm),
            (&mut self.gain, &other.gain),
            (&mut self.magnitude, &other.magnitude),
            (&mut self.norm_weight, &other.norm_weight),
        ] {
            all.slice_axis_mut(Axis(0), rows).assign(some);
        }
        Zip::from(self.left.slice_axis_mut(Axis(0), rows)).and(&other.left).for_each(|all, some| {
            *all = of_left * some.as_f64();
        });
        Zip::from(&mut self.right).and(&other.right).for_each(|all, some| *all += of_right * some.as_f64());
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
    /// X, the gradient of W', `[rows, columns]`, and what it is to be multiplied by.
    pub dmerged: (ArrayView2<'a, P>, f64),
    /// What errors of dV are divided by.
    pub error_scale: f64,
    /// The chain of a sum over outputs.
    pub chain: f64,
    /// `[columns]`: in column j a lookup lets only a fraction of its gradient through.
    pub fraction: Option<&'a Array1<f64>>,
    /// `sum terms(X) W0^2` of the squared terms of X, of these rows, and `sum terms(X) D^2`, of all: one each a row
    pub terms_of_base: &'a Array1<f64>,
    pub terms_of_delta: &'a Array1<f64>,
    /// The gradient of g of all rows, and what the factored way adds to its error.
    pub dgain: &'a Array1<f64>,
    pub dgain_error: &'a Array1<f64>,
    pub norm_gradient: NormGradient,
}

/// A few rows of one group, which are multiplied by the low-rank factors together, each with what [`padded`] adds; the
/// memory is the next ones' too.
struct Few<P> {
    rows: Range<usize>,
    /// Their rows of `right`.
    ranks: Range<usize>,
    columns: usize,
    /// D = B A
    delta: Scaled<Array2<P>>,
    /// `sum_k left^2 right^2`, by the square of that scale
    delta_terms: Array2<P>,
    /// The error of dV, and of what of it reaches A and W0, without those of the terms of X, by a scale
    dweighted_error: Array2<P>,
    looked_up_error: Array2<P>,
    /// Of these errors.
    magnitudes: Magnitudes,
}

impl<P: Scalar> Few<P> {
    fn new(columns: usize, scale: f64) -> Self {
        let rows = || Array2::zeros((TOGETHER, padded(columns)));
        Self {
            rows: 0..0,
            ranks: 0..0,
            columns,
            delta: Scaled { values: rows(), scale },
            delta_terms: rows(),
            dweighted_error: rows(),
            looked_up_error: rows(),
            magnitudes: Magnitudes::NONE,
        }
    }

    /// D of one of them, and beside it room for the error of its dV.
    fn row(&mut self, nth: usize) -> (Delta<'_, P>, &mut [P]) {
        let [values, terms] =
            [&self.delta.values, &self.delta_terms].map(|rows| rows.row(nth).to_slice().expect("contiguous"));
        (Delta { values, terms, scale: self.delta.scale }, contiguous(&mut self.dweighted_error, nth))
    }

    /// Of what of dV reaches A and W0, of which a lookup may hold something back.
    fn looked_up_error(&self, held_back: bool) -> ArrayView2<'_, P> {
        self.errors(if held_back { &self.looked_up_error } else { &self.dweighted_error })
    }

    fn errors<'e>(&self, errors: &'e Array2<P>) -> ArrayView2<'e, P> {
        let rows = errors.slice_axis(Axis(0), Slice::from(..self.rows.len()));
        rows.slice_axis_move(Axis(1), Slice::from(..self.columns))
    }
}

impl<'a, P: Scalar> Rows<'a, P> {
    /// The chains of a sum over a row, over all rows and over ranks; `tiny_sq` is `t^2`. `None` where P is too coarse
    /// for V.
    pub fn new(
        factors: Factors<'a, f64>,
        direction: Option<&'a Direction<f64>>,
        [chain, total_chain, rank_chain]: [f64; 3],
        tiny_sq: f64,
    ) -> Option<Self> {
        if P::UNIT_ROUNDOFF > f64::UNIT_ROUNDOFF && direction.is_some_and(|direction| cancels(&factors, direction)) {
            return None;
        }
        let [left, right] = [factors.left, factors.right].map(Squared::new);
        let gains = direction.into_iter().flat_map(|direction| &direction.gain);
        let largest_gain = gains.map(|gain| gain.abs()).fold(if direction.is_some() { 0.0 } else { 1.0 }, f64::max);
        Some(Self { factors, left, right, direction, largest_gain, chain, total_chain, rank_chain, tiny_sq })
    }

    /// How many of so many rows a thread takes at a time.
    fn chunk(&self, rows: usize) -> usize {
        let columns = self.factors.base.ncols();
        rows.div_ceil(PARTS).max(ELEMENTS / columns.max(1)).max(1)
    }

    /// These rows, a few of one group at a time, and their rows of `right`.
    fn in_fews(&self, rows: Range<usize>) -> impl Iterator<Item = [Range<usize>; 2]> + use<P> {
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
    fn multiply(&self, [rows, ranks]: [Range<usize>; 2], few: &mut Few<P>) {
        let product = |left: &Array2<P>, right: &Array2<P>, product: &mut Array2<P>| {
            let mut product = product.slice_axis_mut(Axis(0), Slice::from(..rows.len()));
            product.slice_axis_inplace(Axis(1), Slice::from(..right.ncols()));
            let (left, right) = (part(left, &rows), part(right, &ranks));
            product_into_on_this_thread(P::one(), left, right, Accumulate::Replace, product);
        };
        product(&self.left.values.values, &self.right.values.values, &mut few.delta.values);
        product(&self.left.squares, &self.right.squares, &mut few.delta_terms);
        (few.rows, few.ranks) = (rows, ranks);
    }

    /// The stages of one of them, `nth` among them.
    fn set(&self, few: &mut Few<P>, nth: usize, row: &mut Row) -> Stages {
        let Factors { base, alpha, scaling, beta, .. } = self.factors;
        let mixing = Mixing { gamma: alpha * scaling, beta, rank_chain: self.rank_chain, tiny_sq: self.tiny_sq };
        row.i = few.rows.start + nth;
        row.set(mixing, base.row(row.i), few.row(nth).0)
    }

    /// Of n and of g, relative.
    fn norm_error(&self, i: usize, stages: Stages) -> [f64; 2] {
        let Some(Direction { norm, weight_norm, .. }) = self.direction else { return [0.0, 0.0] };
        let Factors { alpha, scaling, beta, .. } = self.factors;
        if weight_norm[i] == 0.0 {
            return [0.0, 1.0];
        }
        // What alpha s and beta are rounded by reaches every element alike.
        let (lora, of_base) = (alpha * scaling * stages.of_delta, beta * stages.of_base);
        let sum = stages.weighted_error + lora * lora + of_base * of_base;
        let relative = sum / (norm[i] * weight_norm[i]).powi(2) + 3.0 + (self.chain - 1.0) / 4.0; // E57
        [relative, relative + 1.0] // E58
    }

    fn gain(&self, i: usize) -> f64 {
        self.direction.map_or(1.0, |direction| direction.gain[i])
    }

    /// Adds the errors of some rows, forward and where there is a cotangent backward, and says what sums over them add up:
    /// `[rows, columns]`, without columns where not wanted. Returns the magnitudes of that, without `t^2`; `None` where P
    /// has not the range for products of the low-rank factors' squares with the errors.
    pub fn add(
        &self,
        rows: Range<usize>,
        backward: Option<&Backward<'_, P>>,
        errors: &mut RowErrors,
        weights: WeightErrors<ArrayViewMut2<'_, f64>>,
        (mut terms, summed): (ArrayViewMut2<'_, P>, &Summed),
    ) -> Option<Magnitudes> {
        let (columns, chunk) = (self.factors.base.ncols(), self.chunk(rows.len()));
        let WeightErrors { mut weighted, mut merged, mut dweighted } = weights;
        let chunks = (
            terms.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            weighted.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            merged.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            dweighted.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
        );
        let scale = self.left.values.scale * self.right.values.scale;
        let of_chunks = chunks.into_par_iter().enumerate().map_init(
            || (Few::new(columns, scale), Row::new(columns), vec![P::zero(); columns]),
            |(few, row, apart), (nth, chunks)| {
                let (mut terms, mut weighted, mut merged, mut dweighted) = chunks;
                let mut magnitudes = Magnitudes::NONE;
                few.magnitudes = Magnitudes::NONE;
                let first = rows.start + nth * chunk;
                let mut errors = RowErrors::none(weighted.nrows(), &self.factors);
                for rows_of_few in self.in_fews(first..first + weighted.nrows()) {
                    self.multiply(rows_of_few, few);
                    for (nth, i) in few.rows.clone().enumerate() {
                        let at = i - first;
                        let stages = self.set(few, nth, row);
                        [errors.norm[at], errors.gain[at]] = self.norm_error(i, stages);
                        if !terms.is_empty() {
                            let mut terms = terms.row_mut(at);
                            let gain = [self.gain(i), errors.gain[at]];
                            let mut add = |terms: &mut [P]| {
                                magnitudes = magnitudes.and(row.terms(gain, summed, self.tiny_sq, terms));
                            };
                            match terms.as_slice_mut() {
                                Some(terms) => add(terms),
                                None => {
                                    add(apart);
                                    terms.assign(&ArrayView1::from(&*apart));
                                }
                            }
                        }
                        if !weighted.is_empty() {
                            contiguous(&mut weighted, at).copy_from_slice(row.weighted_error());
                        }
                        if !merged.is_empty() {
                            row.merged_error(self.gain(i), errors.gain[at], self.tiny_sq, contiguous(&mut merged, at));
                        }
                        if let Some(backward) = backward {
                            let in_block = i - rows.start;
                            self.backward(row, stages, backward, [in_block, nth, at], few, &mut errors);
                            if !dweighted.is_empty() {
                                let error = few.looked_up_error(backward.fraction.is_some());
                                let wide = Zip::from(dweighted.row_mut(at)).and(error.row(nth));
                                wide.for_each(|wide, error| *wide = backward.error_scale * error.as_f64());
                            }
                        }
                    }
                    if let Some(backward) = backward {
                        self.add_pair(few, backward.fraction.is_some(), first, &mut errors);
                    }
                }
                (first, errors, [magnitudes, few.magnitudes])
            },
        );
        let error_scale = backward.map_or(1.0, |backward| backward.error_scale);
        let scales = [&self.right, &self.left].map(|factor| error_scale * factor.values.scale.powi(2));
        let mut magnitudes = [Magnitudes::NONE; 2];
        for (first, of_chunk, [of_terms, of_errors]) in of_chunks.collect::<Vec<_>>() {
            errors.add(first, &of_chunk, scales);
            magnitudes = [magnitudes[0].and(of_terms), magnitudes[1].and(of_errors)];
        }
        fit::<P>([self.left.magnitudes, self.right.magnitudes], magnitudes[1]).then_some(magnitudes[0])
    }

    /// What errors of dV are divided by, which come of an X that is to be multiplied by `scale`.
    pub fn error_scale(&self, scale: f64) -> f64 {
        power_of_two((scale * self.largest_gain).powi(2))
    }

    /// The backward of a row, in X row `in_block`, `nth` among a few, whose errors are those `at`.
    fn backward(
        &self,
        row: &mut Row,
        stages: Stages,
        of: &Backward<'_, P>,
        [in_block, nth, at]: [usize; 3],
        few: &mut Few<P>,
        errors: &mut RowErrors<P>,
    ) {
        let Factors { alpha, scaling, beta, .. } = self.factors;
        let (i, tiny_sq, chain) = (row.i, self.tiny_sq, of.chain);
        let (delta, dweighted_error) = few.row(nth);
        let direct = row.set_gradient((of.dmerged.0.row(in_block), of.dmerged.1), delta, [chain, tiny_sq]);
        let terms = [of.terms_of_base[in_block], of.terms_of_delta[i]];
        let of_weighted = 2.0 * (beta * beta * terms[0] + (alpha * scaling).powi(2) * terms[1]); // E151
        let [magnitude, k, k_error] = self.through_norm(i, of, errors.norm[at], direct.apart + chain * of_weighted);
        (errors.magnitude[at], errors.norm_weight[at]) = (magnitude, k_error);
        let (gain, gain_error) = (self.gain(i), errors.gain[at]);
        let (total_chain, rank_chain) = (self.total_chain, self.rank_chain);
        let error_scale = of.error_scale;
        let of_row =
            row::Backward { gain, gain_error, k, k_error, chain, total_chain, rank_chain, tiny_sq, error_scale };
        let ([of_delta, of_base], magnitudes) = row.backward(of_row, delta, dweighted_error);
        few.magnitudes = few.magnitudes.and(magnitudes);
        if let Some(fraction) = of.fraction {
            row.looked_up_error(of_row, fraction.view(), contiguous(&mut few.looked_up_error, nth));
        }
        // The errors of g and of k are the same in all elements of a row.
        let g_sq = gain * gain;
        let shared = |direct: f64, weighted: f64| gain_error * g_sq * direct * direct + k_error * weighted * weighted;
        errors.alpha += of_delta + g_sq * chain * terms[1] + shared(direct.of_delta, stages.of_delta); // E68
        errors.beta += of_base + g_sq * chain * terms[0] + shared(direct.of_base, stages.of_base); // E68
    }

    /// The error of dm, and k with its error.
    fn through_norm(&self, i: usize, of: &Backward<'_, P>, norm_error: f64, apart: f64) -> [f64; 3] {
        let Some(direction) = self.direction else { return [0.0; 3] };
        let (norm, n, c) = (direction.norm[i], direction.weight_norm[i], of.dgain[i]);
        if n == 0.0 {
            return [self.tiny_sq, 0.0, 0.0];
        }
        let c_error = apart + c * c + self.tiny_sq + of.dgain_error[i]; // E64
        let magnitude = (c_error + (norm_error + 2.0) * c * c) / (n * n) + self.tiny_sq; // E65
        if of.norm_gradient == NormGradient::Detached {
            return [magnitude, 0.0, 0.0];
        }
        let per_dm = -direction.gain[i] / norm;
        let (per_c, tiny_sq) = (per_dm / n, self.tiny_sq * (per_dm * per_dm + 1.0));
        let k = per_c * c;
        [magnitude, k, per_c * per_c * c_error + 3.0 * k * k * (norm_error + 1.0) + tiny_sq] // E66
    }

    /// What a few rows add to the errors of the low-rank factors.
    fn add_pair(&self, few: &Few<P>, held_back: bool, first: usize, errors: &mut RowErrors<P>) {
        let Few { rows, ranks, .. } = few;
        let left = errors.left.slice_axis_mut(Axis(0), Slice::from(rows.start - first..rows.end - first));
        let right = errors.right.slice_axis_mut(Axis(0), ranks.clone().into());
        let product = |a: ArrayView2<'_, P>, b: ArrayView2<'_, P>, c: ArrayViewMut2<'_, P>| {
            product_into_on_this_thread(P::one(), a, b, Accumulate::Add, c);
        };
        let (of_left, of_right) = (few.errors(&few.dweighted_error), few.looked_up_error(held_back));
        product(of_left, part(&self.right.squares, ranks).t(), left);
        product(part(&self.left.squares, rows).t(), of_right, right);
    }
}

/// Whether the parts of V nearly cancel in some row, ranks among them.
fn cancels(factors: &Factors<'_, f64>, direction: &Direction<f64>) -> bool {
    let Factors { base_sq, left, right, groups, alpha, scaling, beta, .. } = *factors;
    let (in_group, rank) = (base_sq.len() / groups, left.ncols());
    let right_sq = right.map_axis(Axis(1), |row| row.dot(&row));
    (0..base_sq.len()).any(|i| {
        let ranks = i / in_group * rank..(i / in_group + 1) * rank;
        let terms: f64 =
            left.row(i).iter().zip(right_sq.slice_axis(Axis(0), ranks.into())).map(|(l, r)| l * l * r).sum();
        let parts = (alpha * scaling).powi(2) * terms + beta * beta * base_sq[i];
        let is_kept = direction.weight_norm[i].powi(2) >= CANCELS * parts;
        !is_kept
    })
}

/// Some rows of a matrix.
fn part<'m, P>(matrix: &'m Array2<P>, rows: &Range<usize>) -> ArrayView2<'m, P> {
    matrix.slice_axis(Axis(0), rows.clone().into())
}

/// A row of an array whose rows lie contiguous.
fn contiguous<P, S: DataMut<Elem = P>>(rows: &mut ArrayBase<S, Ix2>, at: usize) -> &mut [P] {
    rows.row_mut(at).into_slice().expect("a row of an array in standard layout")
}
