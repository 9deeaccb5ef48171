//! The weight row by row along the norm axis, and what is made of each row: no stage of the whole weight is kept.
//!
//! With `norm_axis = "input"` rows are columns of the weight: `left` is then A and `right` B.

use super::operands::Magnitudes;
use crate::Scalar;
use crate::matmul::{Accumulate, product_into_on_this_thread};
use crate::wora::NormGradient;
use crate::wora::direction::{Direction, Factors};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, Slice, Zip};
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

/// Some rows of D = B A, of one group.
struct Deltas {
    rows: Range<usize>,
    /// Their rows of `right`.
    ranks: Range<usize>,
    delta: Array2<f64>,
    /// `sum_k left^2 right^2`
    terms: Array2<f64>,
}

/// One row of the weight.
struct Row<'a> {
    /// Which one.
    i: usize,
    /// W0
    base: ArrayView1<'a, f64>,
    /// D
    delta: ArrayView1<'a, f64>,
    delta_error: Array1<f64>,
    /// V
    weighted: Array1<f64>,
    weighted_error: Array1<f64>,
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

    /// D of these rows, a few at a time.
    fn deltas(&self, rows: Range<usize>) -> impl Iterator<Item = Deltas> + '_ {
        let Factors { base, left, right, groups, .. } = self.factors;
        let (in_group, rank) = (base.nrows() / groups, left.ncols());
        let mut start = rows.start;
        std::iter::from_fn(move || {
            let group = start / in_group;
            let end = (start + TOGETHER).min(rows.end).min((group + 1) * in_group);
            (start < rows.end).then(|| {
                let rows = std::mem::replace(&mut start, end)..end;
                let ranks = group * rank..(group + 1) * rank;
                let product = |left: ArrayView2<'_, f64>, right: ArrayView2<'_, f64>| {
                    let mut product = Array2::zeros((rows.len(), right.ncols()));
                    let (left, right) = (part(left, &rows), part(right, &ranks));
                    product_into_on_this_thread(1.0, left, right, Accumulate::Replace, product.view_mut());
                    product
                };
                let (delta, terms) = (product(left, right), product(self.left_sq.view(), self.right_sq.view()));
                Deltas { rows, ranks, delta, terms }
            })
        })
    }

    /// The stages of one of them.
    fn row<'d>(&'d self, deltas: &'d Deltas, i: usize) -> Row<'d> {
        let Factors { base, alpha, scaling, beta, .. } = &self.factors;
        let (gamma, gamma_sq, beta_sq, tiny_sq) =
            (alpha * scaling, (alpha * scaling).powi(2), beta * beta, self.tiny_sq);
        let (base, delta) = (base.row(i), deltas.delta.row(i - deltas.rows.start));
        let terms = deltas.terms.row(i - deltas.rows.start);
        let delta_error = Zip::from(delta).and(terms).map_collect(|&delta, &terms| terms + delta * delta + tiny_sq); // E55
        let weighted = Zip::from(delta).and(base).map_collect(|&delta, &w| gamma * delta + beta * w);
        let weighted_error =
            Zip::from(delta).and(&delta_error).and(base).and(&weighted).map_collect(|&delta, &error, &w, &v| {
                gamma_sq * (error + delta * delta) + beta_sq * w * w + v * v + tiny_sq // E56
            });
        Row { i, base, delta, delta_error, weighted, weighted_error }
    }

    /// Of n and of g, relative.
    fn norm_error(&self, row: &Row<'_>) -> [f64; 2] {
        let Some(Direction { norm, weight_norm, .. }) = self.direction else { return [0.0, 0.0] };
        let (Factors { alpha, scaling, beta, .. }, i) = (self.factors, row.i);
        if weight_norm[i] == 0.0 {
            return [0.0, 1.0];
        }
        let apart = row.weighted.dot(&(&row.weighted * &row.weighted_error));
        // What alpha s and beta are rounded by reaches every element alike.
        let lora = alpha * scaling * row.weighted.dot(&row.delta);
        let of_base = beta * row.weighted.dot(&row.base);
        let relative = (apart + lora * lora + of_base * of_base) / (norm[i] * weight_norm[i]).powi(2); // E57
        let relative = relative + 3.0 + (self.chain - 1.0) / 4.0; // E57
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
        let of_chunks = chunks.into_par_iter().enumerate().map(|(nth, chunks)| {
            let (mut terms, mut both, mut weighted, mut merged, mut dweighted) = chunks;
            let first = rows.start + nth * chunk;
            let mut errors = RowErrors::none(terms.nrows(), &self.factors);
            let mut magnitudes = Magnitudes::NONE;
            for deltas in self.deltas(first..first + terms.nrows()) {
                let mut gradients = backward.map(|_| GradientRows::new(deltas.rows.len(), columns));
                for (nth, i) in deltas.rows.clone().enumerate() {
                    let (at, row) = (i - first, self.row(&deltas, i));
                    [errors.norm[at], errors.gain[at]] = self.norm_error(&row);
                    let gain = errors.gain[at];
                    magnitudes = magnitudes.and(self.terms(&row, gain, chain, terms.row_mut(at)));
                    if !both.is_empty() {
                        both.row_mut(at).assign(&terms.row(at));
                        self.add_merged(&row, gain, both.row_mut(at));
                    }
                    if !weighted.is_empty() {
                        weighted.row_mut(at).assign(&row.weighted_error);
                    }
                    if !merged.is_empty() {
                        self.add_merged(&row, gain, merged.row_mut(at));
                    }
                    if let Some((backward, gradients)) = backward.zip(gradients.as_mut()) {
                        self.backward(&row, i - rows.start, backward, gradients.row(nth), at, &mut errors);
                    }
                }
                if let Some(gradients) = gradients {
                    self.add_pair(&deltas, first, &gradients, &mut errors);
                    if !dweighted.is_empty() {
                        let of_rows = Slice::from(deltas.rows.start - first..deltas.rows.end - first);
                        dweighted.slice_axis_mut(Axis(0), of_rows).assign(&gradients.looked_up);
                    }
                }
            }
            (first, errors, magnitudes)
        });
        let mut magnitudes = Magnitudes::NONE;
        for (first, of_chunk, of_terms) in of_chunks.collect::<Vec<_>>() {
            errors.add(first, &of_chunk);
            magnitudes = magnitudes.and(of_terms);
        }
        magnitudes
    }

    /// What a sum over a row of W' adds up, and its magnitudes without `t^2`. E60
    fn terms<P: Scalar>(
        &self,
        row: &Row<'_>,
        gain_error: f64,
        chain: f64,
        mut terms: ArrayViewMut1<'_, P>,
    ) -> Magnitudes {
        let (g_sq, tiny_sq, mut range) = (self.gain(row.i).powi(2), (1.0 + chain) * self.tiny_sq, Magnitudes::NONE);
        Zip::from(&mut terms).and(&row.weighted).and(&row.weighted_error).for_each(|terms, &v, &error| {
            let stored = v * v;
            let sum = g_sq * (error + gain_error * v * v + stored + chain * (error + stored));
            range = range.with(sum);
            *terms = P::from_f64(sum + tiny_sq); // E60
        });
        range
    }

    /// Adds the error of W'. E59
    fn add_merged<P: Scalar>(&self, row: &Row<'_>, gain_error: f64, mut sum: ArrayViewMut1<'_, P>) {
        let (g_sq, tiny_sq) = (self.gain(row.i).powi(2), self.tiny_sq);
        Zip::from(&mut sum).and(&row.weighted).and(&row.weighted_error).for_each(|sum, &v, &error| {
            *sum += P::from_f64(g_sq * (error + (gain_error + 1.0) * v * v) + tiny_sq); // E59
        });
    }
}

/// Some rows of a matrix.
fn part<'m>(matrix: ArrayView2<'m, f64>, rows: &Range<usize>) -> ArrayView2<'m, f64> {
    matrix.slice_axis_move(Axis(0), rows.clone().into())
}

/// The errors of a few rows of the gradient.
struct GradientRows {
    /// Of dV
    dweighted: Array2<f64>,
    /// Of what reaches A and W0
    looked_up: Array2<f64>,
}

impl GradientRows {
    fn new(rows: usize, columns: usize) -> Self {
        Self { dweighted: Array2::zeros((rows, columns)), looked_up: Array2::zeros((rows, columns)) }
    }

    fn row(&mut self, at: usize) -> GradientRow<'_> {
        let direct = Array1::zeros(self.dweighted.ncols());
        GradientRow {
            dweighted: direct.clone(),
            direct,
            dweighted_error: self.dweighted.row_mut(at),
            looked_up_error: self.looked_up.row_mut(at),
        }
    }
}

/// One row of the gradient.
struct GradientRow<'g> {
    /// `g X`
    direct: Array1<f64>,
    /// dV and its error
    dweighted: Array1<f64>,
    dweighted_error: ArrayViewMut1<'g, f64>,
    /// The error of what reaches A and W0
    looked_up_error: ArrayViewMut1<'g, f64>,
}

impl Rows<'_> {
    /// The backward of a row; X has it `at_x`, and the errors `at`.
    fn backward<P: Scalar>(
        &self,
        row: &Row<'_>,
        at_x: usize,
        of: &Backward<'_, P>,
        mut d: GradientRow<'_>,
        at: usize,
        errors: &mut RowErrors,
    ) {
        let gain_error = errors.gain[at];
        let [magnitude, k_error] = self.dweighted(row, at_x, of, [errors.norm[at], gain_error], &mut d);
        (errors.magnitude[at], errors.norm_weight[at]) = (magnitude, k_error);
        self.add_scales(row, gain_error, k_error, &d, errors);
    }

    /// What a few rows add to the errors of the low-rank factors.
    fn add_pair(&self, deltas: &Deltas, first: usize, gradients: &GradientRows, errors: &mut RowErrors) {
        let Deltas { rows, ranks, .. } = deltas;
        let left = errors.left.slice_axis_mut(Axis(0), Slice::from(rows.start - first..rows.end - first));
        let right = errors.right.slice_axis_mut(Axis(0), ranks.clone().into());
        let product = |a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>, c: ArrayViewMut2<'_, f64>| {
            product_into_on_this_thread(1.0, a, b, Accumulate::Add, c);
        };
        product(gradients.dweighted.view(), part(self.right_sq.view(), ranks).t(), left);
        product(part(self.left_sq.view(), rows).t(), gradients.looked_up.view(), right);
    }

    /// dV of a row; returns the errors of dm and of k.
    fn dweighted<P: Scalar>(
        &self,
        row: &Row<'_>,
        at: usize,
        of: &Backward<'_, P>,
        [norm_error, gain_error]: [f64; 2],
        d: &mut GradientRow<'_>,
    ) -> [f64; 2] {
        let (i, g) = (row.i, self.gain(row.i));
        let ((x, x_scale), (terms, terms_scale)) = (of.dmerged, of.dmerged_terms);
        let (x, terms, tiny_sq) = (x.row(at), terms.row(at), self.tiny_sq);
        let Row { weighted, weighted_error, .. } = row;
        Zip::from(&mut d.direct).and(&mut d.dweighted_error).and(x).and(terms).for_each(|x, error, &of_x, &terms| {
            (*x, *error) = (of_x.as_f64() * x_scale, terms.as_f64() * terms_scale);
            *error = of.chain * (*error + *x * *x) + tiny_sq; // E62
        });
        let apart = Zip::from(&d.direct).and(&d.dweighted_error).and(weighted).and(weighted_error);
        let apart = apart.map_collect(|&x, &error, &v, &v_error| error * v * v + x * x * v_error).sum(); // E64
        Zip::from(&mut d.direct).and(&mut d.dweighted_error).for_each(|direct, error| {
            *direct *= g;
            *error = g * g * *error + (gain_error + 1.0) * *direct * *direct; // E63
        });
        d.dweighted.assign(&d.direct);
        d.looked_up_error.assign(&d.dweighted_error);
        if let Some(fraction) = of.fraction {
            Zip::from(&mut d.looked_up_error).and(fraction).for_each(|error, &c| *error *= c * c);
        }
        let Some(direction) = self.direction else { return [0.0, 0.0] };
        let (norm, n, c) = (direction.norm[i], direction.weight_norm[i], of.dgain[i]);
        if n == 0.0 {
            return [tiny_sq, 0.0];
        }
        let c_error = apart + c * c + of.dgain_error[i]; // E64
        let magnitude = (c_error + (norm_error + 2.0) * c * c) / (n * n) + tiny_sq; // E65
        if of.norm_gradient == NormGradient::Detached {
            return [magnitude, 0.0];
        }
        let per_c = -g / (n * norm);
        let k = per_c * c;
        let k_error = per_c * per_c * c_error + 3.0 * k * k * (norm_error + 1.0); // E66
        Zip::from(&mut d.dweighted)
            .and(&mut d.dweighted_error)
            .and(&mut d.looked_up_error)
            .and(weighted)
            .and(weighted_error)
            .for_each(|dv, error, looked_up, &v, &v_error| {
                let through = k * k * v_error + (k_error + k * k) * v * v;
                *dv += k * v;
                *error += through; // E67
                *looked_up += through; // E67
            });
        [magnitude, k_error]
    }

    /// What a row adds to the errors of dalpha and dbeta. E68
    fn add_scales(&self, row: &Row<'_>, gain_error: f64, k_error: f64, d: &GradientRow<'_>, errors: &mut RowErrors) {
        let GradientRow { direct, dweighted, dweighted_error, .. } = d;
        // The errors of g and of k are the same in all elements of a row.
        let shared = |other: ArrayView1<'_, f64>| {
            gain_error * direct.dot(&other).powi(2) + k_error * row.weighted.dot(&other).powi(2)
        };
        let added = self.total_chain - 1.0;
        let of_delta = Zip::from(dweighted).and(dweighted_error).and(row.delta).and(&row.delta_error);
        let of_delta = of_delta.map_collect(|&dv, &error, &delta, &delta_error| {
            (error + added * dv * dv) * delta * delta + dv * dv * delta_error
        });
        let of_base = Zip::from(dweighted).and(dweighted_error).and(row.base);
        let of_base = of_base.map_collect(|&dv, &error, &w| (error + added * dv * dv) * w * w);
        errors.alpha += of_delta.sum() + shared(row.delta);
        errors.beta += of_base.sum() + shared(row.base);
    }
}
