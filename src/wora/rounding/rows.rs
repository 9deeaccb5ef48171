//! The weight row by row along the norm axis, and what is made of each row: no stage of the whole weight is kept.
//!
//! With `norm_axis = "input"` rows are columns of the weight: `left` is then A and `right` B.

use super::operands::Range;
use crate::Scalar;
use crate::wora::NormGradient;
use crate::wora::direction::{Direction, Factors};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, Axis, Zip};
use rayon::prelude::*;

/// Threads take this many elements at a time, or more.
const ELEMENTS: usize = 1 << 15;
/// Sums over rows are added up in no more parts than this.
const PARTS: usize = 32;

/// The weight, as the norm sees it.
pub(super) struct Rows<'a> {
    pub factors: Factors<'a, f64>,
    /// `None` for LoRA.
    pub direction: Option<&'a Direction<f64>>,
    /// `t^2`
    pub tiny_sq: f64,
}

/// The errors of all norms and gains, and what sums over W' are made of.
pub(super) struct Stages<P> {
    /// Of n, relative: one a row; 0 for LoRA
    pub norm: Array1<f64>,
    /// Of g, relative: one a row; 0 for LoRA
    pub gain: Array1<f64>,
    /// Of what a sum over W' adds up, whichever way: V's parts apart, each with its chain: `[rows, columns]`
    pub terms: Array2<P>,
    /// Those and W' beside them; without columns where not wanted.
    pub terms_and_merged: Array2<P>,
    /// Of V; without columns where not wanted.
    pub weighted: Array2<f64>,
    /// Of W', the gain's own error among it; without columns where not wanted.
    pub merged: Array2<f64>,
    /// The magnitudes of the terms, without `t^2`.
    pub range: Range,
}

/// What is wanted beside the terms.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub terms_and_merged: bool,
    pub weighted: bool,
    pub merged: bool,
}

/// One row of the weight.
struct Row {
    /// D = B A
    delta: Array1<f64>,
    delta_error: Array1<f64>,
    /// V
    weighted: Array1<f64>,
    weighted_error: Array1<f64>,
}

impl Row {
    fn new(columns: usize) -> Self {
        let zeros = || Array1::zeros(columns);
        Self { delta: zeros(), delta_error: zeros(), weighted: zeros(), weighted_error: zeros() }
    }
}

impl Rows<'_> {
    /// How many rows threads take at a time.
    fn chunk(&self) -> usize {
        let (rows, columns) = self.factors.base.dim();
        rows.div_ceil(PARTS).max(ELEMENTS / columns.max(1)).max(1)
    }

    /// The ranks that row i is made of, as rows of `right`.
    fn ranks(&self, i: usize) -> impl Iterator<Item = (usize, f64)> + '_ {
        let Factors { base, left, groups, .. } = &self.factors;
        let first = i / (base.nrows() / groups) * left.ncols();
        left.row(i).into_iter().enumerate().map(move |(k, &l)| (first + k, l))
    }

    fn stages_of(&self, i: usize, row: &mut Row) {
        let Factors { base, right, alpha, scaling, beta, .. } = self.factors;
        let (gamma_sq, beta_sq) = ((alpha * scaling).powi(2), beta * beta);
        row.delta.fill(0.0);
        row.delta_error.fill(0.0);
        for (k, l) in self.ranks(i) {
            Zip::from(&mut row.delta).and(&mut row.delta_error).and(right.row(k)).for_each(|delta, error, &r| {
                let term = l * r;
                *delta += term;
                *error += term * term;
            });
        }
        let tiny_sq = self.tiny_sq;
        Zip::from(&row.delta)
            .and(&mut row.delta_error)
            .and(&mut row.weighted)
            .and(&mut row.weighted_error)
            .and(base.row(i))
            .for_each(|&delta, delta_error, weighted, weighted_error, &w| {
                *delta_error += delta * delta + tiny_sq; // E55
                let v = alpha * scaling * delta + beta * w;
                *weighted = v;
                *weighted_error = gamma_sq * (*delta_error + delta * delta) + beta_sq * w * w + v * v + tiny_sq; // E56
            });
    }

    /// Of n and of g, relative.
    fn norm_error(&self, i: usize, row: &Row) -> [f64; 2] {
        let Some(Direction { norm, weight_norm, .. }) = self.direction else { return [0.0, 0.0] };
        let Factors { base, alpha, scaling, beta, .. } = self.factors;
        if weight_norm[i] == 0.0 {
            return [0.0, 1.0];
        }
        let apart = Zip::from(&row.weighted).and(&row.weighted_error).fold(0.0, |sum, &v, &error| sum + v * v * error);
        // What alpha s and beta are rounded by reaches every element alike.
        let lora = alpha * scaling * row.weighted.dot(&row.delta);
        let of_base = beta * row.weighted.dot(&base.row(i));
        let relative = (apart + lora * lora + of_base * of_base) / (norm[i] * weight_norm[i]).powi(2) + 3.0; // E57
        [relative, relative + 1.0] // E58
    }

    fn gain(&self, i: usize) -> f64 {
        self.direction.map_or(1.0, |direction| direction.gain[i])
    }

    /// Forward. `chain` is that of a sum over a unit's weights.
    pub fn stages<P: Scalar>(&self, chain: f64, wanted: Wanted) -> Stages<P> {
        let (rows, columns) = self.factors.base.dim();
        let of = |wanted: bool| (rows, if wanted { columns } else { 0 });
        let mut terms = Array2::zeros((rows, columns));
        let mut terms_and_merged = Array2::zeros(of(wanted.terms_and_merged));
        let (mut weighted, mut merged) = (Array2::zeros(of(wanted.weighted)), Array2::zeros(of(wanted.merged)));
        let outputs = (
            terms.axis_iter_mut(Axis(0)).into_par_iter(),
            terms_and_merged.axis_iter_mut(Axis(0)).into_par_iter(),
            weighted.axis_iter_mut(Axis(0)).into_par_iter(),
            merged.axis_iter_mut(Axis(0)).into_par_iter(),
        );
        let tiny_sq = self.tiny_sq;
        let one = |row: &mut Row, (i, (mut terms, mut both, mut weighted, mut merged)): (usize, RowOutputs<'_, P>)| {
            self.stages_of(i, row);
            let [norm_error, gain_error] = self.norm_error(i, row);
            let g_sq = self.gain(i).powi(2);
            let mut range = Range::NONE;
            let stored = |v: f64, error: f64| (g_sq * (error + gain_error * v * v), g_sq * v * v);
            Zip::from(&mut terms).and(&row.weighted).and(&row.weighted_error).for_each(|terms, &v, &error| {
                let (made, stored) = stored(v, error);
                let sum = made + stored + chain * (g_sq * error + stored);
                range = range.with(sum);
                *terms = P::from_f64(sum + (1.0 + chain) * tiny_sq); // E60
            });
            let merged_error = |v: f64, error: f64| {
                let (made, stored) = stored(v, error);
                made + stored + tiny_sq // E59
            };
            if !both.is_empty() {
                Zip::from(&mut both)
                    .and(&terms)
                    .and(&row.weighted)
                    .and(&row.weighted_error)
                    .for_each(|both, &terms, &v, &error| *both = terms + P::from_f64(merged_error(v, error)));
            }
            if !weighted.is_empty() {
                weighted.assign(&row.weighted_error);
            }
            if !merged.is_empty() {
                Zip::from(&mut merged)
                    .and(&row.weighted)
                    .and(&row.weighted_error)
                    .for_each(|merged, &v, &error| *merged = merged_error(v, error));
            }
            (norm_error, gain_error, range)
        };
        let of_rows: Vec<_> = outputs
            .into_par_iter()
            .enumerate()
            .with_min_len(self.chunk())
            .map_init(|| Row::new(columns), one)
            .collect();
        let range = of_rows.iter().fold(Range::NONE, |range, of_row| range.and(of_row.2));
        let norm = of_rows.iter().map(|of_row| of_row.0).collect();
        let gain = of_rows.iter().map(|of_row| of_row.1).collect();
        Stages { norm, gain, terms, terms_and_merged, weighted, merged, range }
    }
}

type RowOutputs<'o, P> = (ArrayViewMut1<'o, P>, ArrayViewMut1<'o, P>, ArrayViewMut1<'o, f64>, ArrayViewMut1<'o, f64>);

/// What the backward of a row needs beside the weight.
pub(super) struct Backward<'a, P> {
    pub stages: &'a Stages<P>,
    /// X, the gradient of W', and the sum of its squared terms: `[rows, columns]`, and what each is to be multiplied by.
    pub dmerged: (ArrayView2<'a, P>, f64),
    pub dmerged_terms: (ArrayView2<'a, P>, f64),
    /// The chain of a sum over outputs.
    pub chain: f64,
    /// `[columns]`: in column j a lookup lets only a fraction of its gradient through.
    pub fraction: Option<&'a Array1<f64>>,
    /// The gradient of g, and what the factored way adds to its error: `[rows]`
    pub dgain: Array1<f64>,
    pub dgain_error: Array1<f64>,
    pub norm_gradient: NormGradient,
    pub wants_weight: bool,
}

/// Errors of gradients, before they are multiplied by `alpha s` or `beta`.
pub(super) struct RowGradients {
    /// Of dm: `[rows]`
    pub magnitude: Array1<f64>,
    /// kappa^2: `[rows]`; zeros where the norm is held
    pub norm_weight: Array1<f64>,
    /// `sum_j error(dV)^2 right^2`: `[rows, rank / groups]`
    pub left: Array2<f64>,
    /// `sum_i error(dV)^2 left^2`: `[rank, columns]`
    pub right: Array2<f64>,
    /// `sum error(dV)^2 D^2 + dV^2 error(D)^2` and what rows share
    pub alpha: f64,
    /// The same for W0, which is exact.
    pub beta: f64,
    /// Of dV: `[rows, columns]`; without columns where not wanted
    pub weight: Array2<f64>,
}

/// The sums that one chunk of rows adds to.
struct Part {
    right: Array2<f64>,
    alpha: f64,
    beta: f64,
}

/// One row of the gradient.
struct GradientRow {
    row: Row,
    /// `g X` and its error
    direct: Array1<f64>,
    /// dV and its error
    dweighted: Array1<f64>,
    dweighted_error: Array1<f64>,
    /// The error of what reaches A and W0
    looked_up_error: Array1<f64>,
}

impl Rows<'_> {
    /// Backward.
    pub fn gradients<P: Scalar>(&self, of: &Backward<'_, P>) -> RowGradients {
        let Factors { left, right, .. } = &self.factors;
        let (rows, columns) = self.factors.base.dim();
        let mut left_error = Array2::zeros(left.dim());
        let (mut magnitude, mut norm_weight) = (Array1::zeros(rows), Array1::zeros(rows));
        let mut weight = Array2::zeros((rows, if of.wants_weight { columns } else { 0 }));
        let (right_sq, chunk) = (right.mapv(|r| r * r), self.chunk());
        let chunks = (
            left_error.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            magnitude.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            norm_weight.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
            weight.axis_chunks_iter_mut(Axis(0), chunk).into_par_iter(),
        );
        let parts: Vec<Part> = chunks
            .into_par_iter()
            .enumerate()
            .map(|(at, (mut left, mut magnitude, mut norm_weight, mut weight))| {
                let mut part = Part { right: Array2::zeros(right.dim()), alpha: 0.0, beta: 0.0 };
                let zeros = || Array1::zeros(columns);
                let mut d = GradientRow {
                    row: Row::new(columns),
                    direct: zeros(),
                    dweighted: zeros(),
                    dweighted_error: zeros(),
                    looked_up_error: zeros(),
                };
                for in_chunk in 0..magnitude.len() {
                    let i = at * chunk + in_chunk;
                    [magnitude[in_chunk], norm_weight[in_chunk]] = self.backward_of(i, of, &mut d);
                    self.add_scales(i, of.stages.gain[i], norm_weight[in_chunk], &d, &mut part);
                    for (own, (k, l)) in self.ranks(i).enumerate() {
                        left[[in_chunk, own]] = d.dweighted_error.dot(&right_sq.row(k));
                        part.right.row_mut(k).scaled_add(l * l, &d.looked_up_error);
                    }
                    if of.wants_weight {
                        weight.row_mut(in_chunk).assign(&d.looked_up_error);
                    }
                }
                part
            })
            .collect();
        let mut gradients = RowGradients {
            magnitude,
            norm_weight,
            left: left_error,
            right: Array2::zeros(right.dim()),
            alpha: 0.0,
            beta: 0.0,
            weight,
        };
        for part in parts {
            gradients.right += &part.right;
            gradients.alpha += part.alpha;
            gradients.beta += part.beta;
        }
        gradients
    }

    /// dV of a row; returns the errors of dm and of k.
    fn backward_of<P: Scalar>(&self, i: usize, of: &Backward<'_, P>, d: &mut GradientRow) -> [f64; 2] {
        self.stages_of(i, &mut d.row);
        let (g, gain_error) = (self.gain(i), of.stages.gain[i]);
        let ((x, x_scale), (terms, terms_scale)) = (of.dmerged, of.dmerged_terms);
        let (x, terms, tiny_sq) = (x.row(i), terms.row(i), self.tiny_sq);
        let Row { weighted, weighted_error, .. } = &d.row;
        let mut apart = 0.0;
        Zip::from(&mut d.direct)
            .and(&mut d.dweighted_error)
            .and(x)
            .and(terms)
            .and(weighted)
            .and(weighted_error)
            .for_each(|direct, error, &x, &terms, &v, &v_error| {
                let (x, terms) = (x.as_f64() * x_scale, terms.as_f64() * terms_scale);
                let x_error = of.chain * (terms + x * x) + tiny_sq; // E62
                *direct = g * x;
                *error = g * g * x_error + (gain_error + 1.0) * *direct * *direct; // E63
                apart += x_error * v * v + x * x * v_error; // E64
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
        let magnitude = (c_error + (of.stages.norm[i] + 2.0) * c * c) / (n * n) + tiny_sq; // E65
        if of.norm_gradient == NormGradient::Detached {
            return [magnitude, 0.0];
        }
        let per_c = -g / (n * norm);
        let k = per_c * c;
        let k_error = per_c * per_c * c_error + 3.0 * k * k * (of.stages.norm[i] + 1.0); // E66
        let Row { weighted, weighted_error, .. } = &d.row;
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
    fn add_scales(&self, i: usize, gain_error: f64, k_error: f64, d: &GradientRow, part: &mut Part) {
        let GradientRow { row, direct, dweighted, dweighted_error, .. } = d;
        // The errors of g and of k are the same in all elements of a row.
        let shared = |other: ArrayView1<'_, f64>| {
            gain_error * direct.dot(&other).powi(2) + k_error * row.weighted.dot(&other).powi(2)
        };
        let base = self.factors.base.row(i);
        let (mut of_delta, mut of_base) = (0.0, 0.0);
        Zip::from(dweighted).and(dweighted_error).and(&row.delta).and(&row.delta_error).and(base).for_each(
            |&dv, &error, &delta, &delta_error, &w| {
                of_delta += error * delta * delta + dv * dv * delta_error;
                of_base += error * w * w;
            },
        );
        part.alpha += of_delta + shared(row.delta.view());
        part.beta += of_base + shared(base);
    }
}
