//! One row of the weight element by element: its stages, its gradient, and the errors of both. The loops are compiled for
//! newer processors too and chosen at run time.

use super::operands::{LEAST, Magnitudes};
use crate::Scalar;
use crate::simd::{contiguous, reach};
use multiversion::multiversion;
use ndarray::{Array1, ArrayView1};

/// Sums kept beside each other. Rows end in zeros that fill the last of them, and add nothing to any sum.
const LANES: usize = 8;

/// Several such sums. A loop that adds their lanes up itself is not compiled into vectors.
type Lanes<const N: usize> = [[f64; LANES]; N];

fn added<const N: usize>(sums: Lanes<N>) -> [f64; N] {
    sums.map(|lanes| lanes.iter().sum())
}

/// So much memory for a row of so many columns.
pub(super) fn padded(columns: usize) -> usize {
    columns.next_multiple_of(LANES)
}

/// One row of the weight; the memory is the next one's too.
pub(super) struct Row {
    /// Which one.
    pub i: usize,
    columns: usize,
    /// W0
    base: Vec<f64>,
    /// V and its error
    weighted: Vec<f64>,
    weighted_error: Vec<f64>,
    /// X
    dmerged: Vec<f64>,
}

/// What a sum adds up of W': how often it is stored, V's parts apart once more, each with its chain, and where W0 is in it
/// apart from gains, by how much row by row.
pub(super) struct Summed {
    pub stored: f64,
    pub chain: f64,
    pub apart: Option<Array1<f64>>,
}

/// D and `sum_k left^2 right^2`, as long as [`padded`] says, and what D is to be multiplied by.
#[derive(Clone, Copy)]
pub(super) struct Delta<'a, P> {
    pub values: &'a [P],
    pub terms: &'a [P],
    pub scale: f64,
}

/// What V is made by, the chain of a sum over ranks, and `t^2`.
#[derive(Clone, Copy)]
pub(super) struct Mixing {
    /// `alpha s`
    pub gamma: f64,
    pub beta: f64,
    pub rank_chain: f64,
    pub tiny_sq: f64,
}

/// Sums over a row.
#[derive(Clone, Copy)]
pub(super) struct Stages {
    /// `sum V^2 error(V)^2`
    pub weighted_error: f64,
    /// `<V, D>` and `<V, W0>`
    pub of_delta: f64,
    pub of_base: f64,
}

/// Sums over a row with its gradient.
#[derive(Clone, Copy)]
pub(super) struct Direct {
    /// What the elements' errors apart add to that of the gradient of g, without those of the terms of X. E64
    pub apart: f64,
    /// `<X, D>` and `<X, W0>`
    pub of_delta: f64,
    pub of_base: f64,
}

/// A row's g and k with the squares of their errors, g's relative, and the chains of sums over outputs, over all of the
/// weight and over ranks.
#[derive(Clone, Copy)]
pub(super) struct Backward {
    pub gain: f64,
    pub gain_error: f64,
    pub k: f64,
    pub k_error: f64,
    pub chain: f64,
    pub total_chain: f64,
    pub rank_chain: f64,
    pub tiny_sq: f64,
    /// What the errors of dV are divided by.
    pub error_scale: f64,
}

impl Row {
    pub fn new(columns: usize) -> Self {
        let row = || vec![0.0; padded(columns)];
        Self { i: 0, columns, base: row(), weighted: row(), weighted_error: row(), dmerged: row() }
    }

    /// V from W0 and D.
    pub fn set<P: Scalar>(&mut self, mixing: Mixing, base: ArrayView1<'_, f64>, delta: Delta<'_, P>) -> Stages {
        let Self { base: w, weighted, weighted_error, columns, .. } = self;
        w[..*columns].copy_from_slice(&contiguous(base));
        let sums = stages(mixing, w, delta, weighted, weighted_error);
        weighted_error[*columns..].fill(0.0);
        let [weighted_error, of_delta, of_base] = added(sums);
        Stages { weighted_error, of_delta, of_base }
    }

    /// The error of V.
    pub fn weighted_error(&self) -> &[f64] {
        &self.weighted_error[..self.columns]
    }

    /// The error of W'. E59
    pub fn merged_error(&self, gain: f64, gain_error: f64, tiny_sq: f64, error: &mut [f64]) {
        for ((error, &v), &v_error) in error.iter_mut().zip(&self.weighted).zip(&self.weighted_error) {
            *error = gain * gain * (v_error + (gain_error + 1.0) * v * v) + tiny_sq; // E59
        }
    }

    /// What a sum over a row of W' adds up; returns its magnitudes, without `t^2`.
    pub fn terms<P: Scalar>(
        &self,
        [gain, gain_error]: [f64; 2],
        summed: &Summed,
        tiny_sq: f64,
        into: &mut [P],
    ) -> Magnitudes {
        let Self { i, base, weighted, weighted_error, .. } = self;
        let &Summed { stored, chain, ref apart } = summed;
        let g_sq = gain * gain;
        let of_error = g_sq * (stored + chain);
        let of_square = g_sq * (stored * (gain_error + 1.0) + chain);
        let of_base = apart.as_ref().map_or(0.0, |apart| apart[*i]);
        let factors = [of_error, of_square, of_base, (stored + chain) * tiny_sq];
        Magnitudes::of_lanes(terms(factors, [weighted_error, weighted, base], into))
    }

    /// X, from what it is to be multiplied by.
    pub fn set_gradient<P: Scalar>(
        &mut self,
        dmerged: (ArrayView1<'_, P>, f64),
        delta: Delta<'_, P>,
        [chain, tiny_sq]: [f64; 2],
    ) -> Direct {
        let Self { base, weighted, weighted_error, dmerged: wide, .. } = self;
        widen(&contiguous(dmerged.0), dmerged.1, wide);
        let sums = direct([chain, tiny_sq], wide, [weighted, weighted_error, base], delta);
        let [apart, of_delta, of_base] = added(sums);
        Direct { apart, of_delta, of_base }
    }

    /// The error of dV, without that of the terms of X, as long as [`padded`] says; returns what its elements add to the
    /// errors of dalpha and dbeta, and their own magnitudes.
    pub fn backward<P: Scalar>(
        &self,
        of: Backward,
        delta: Delta<'_, P>,
        dweighted_error: &mut [P],
    ) -> ([f64; 2], Magnitudes) {
        let Self { base, weighted, weighted_error, dmerged, .. } = self;
        let (sums, lanes) = backward(of, [dmerged, weighted, weighted_error, base], delta, dweighted_error);
        (added(sums), Magnitudes::of_lanes(lanes))
    }

    /// The error of what of dV reaches A and W0, where a lookup lets only a fraction of X through, column by column.
    pub fn looked_up_error<P: Scalar>(&self, of: Backward, fraction: ArrayView1<'_, f64>, error: &mut [P]) {
        let Self { weighted, weighted_error, dmerged, .. } = self;
        let (direct, through) = (of.direct(), of.through());
        for (j, (error, c)) in error.iter_mut().zip(fraction).enumerate() {
            let (x, v) = (dmerged[j], weighted[j]);
            let direct = c * c * (direct[0] * x * x + direct[1]);
            let through = through[0] * weighted_error[j] + through[1] * v * v + through[2];
            *error = P::from_f64((direct + through) / of.error_scale);
        }
    }
}

impl Backward {
    /// What comes of X, its own rounding and its sum's among it: so many times `X^2`, and so much.
    fn direct(self) -> [f64; 2] {
        let g_sq = self.gain * self.gain;
        [g_sq * (self.chain + self.gain_error + 1.0), (g_sq + 1.0) * self.tiny_sq] // E62, E63
    }

    /// What comes by way of the norm: so many times V's error, so many times `V^2`, and so much.
    fn through(self) -> [f64; 3] {
        let k_sq = self.k * self.k;
        [k_sq, self.k_error + k_sq, self.tiny_sq] // E67
    }
}

fn lanes<P>(row: &[P]) -> &[[P; LANES]] {
    row.as_chunks().0
}

fn lanes_mut<P>(row: &mut [P]) -> &mut [[P; LANES]] {
    row.as_chunks_mut().0
}

#[multiversion(targets("x86_64+avx2"))]
fn stages<P: Scalar>(
    mixing: Mixing,
    base: &[f64],
    delta: Delta<'_, P>,
    weighted: &mut [f64],
    weighted_error: &mut [f64],
) -> Lanes<3> {
    let Mixing { gamma, beta, rank_chain, tiny_sq } = mixing;
    let (gamma_sq, beta_sq) = (gamma * gamma, beta * beta);
    let (of_terms, of_delta) = (gamma_sq * rank_chain * delta.scale.powi(2), gamma_sq * (rank_chain + 1.0)); // E55
    let once = (gamma_sq + 1.0) * tiny_sq;
    let mut sums = [[0.0; LANES]; 3];
    let Delta { values, terms, scale } = delta;
    let inputs = lanes(base).iter().zip(lanes(values)).zip(lanes(terms));
    let results = lanes_mut(weighted).iter_mut().zip(lanes_mut(weighted_error));
    for (((base, values), terms), (weighted, error)) in inputs.zip(results) {
        for l in 0..LANES {
            let (w, d) = (base[l], scale * values[l].as_f64());
            let v = gamma * d + beta * w;
            let v_error = of_terms * terms[l].as_f64() + of_delta * d * d + beta_sq * w * w + v * v + once; // E56
            (weighted[l], error[l]) = (v, v_error);
            sums[0][l] += v * v * v_error;
            sums[1][l] += v * d;
            sums[2][l] += v * w;
        }
    }
    sums
}

/// Returns the [`Magnitudes`] without what is added once.
#[multiversion(targets("x86_64+avx2"))]
fn terms<P: Scalar>(factors: [f64; 4], [weighted_error, weighted, base]: [&[f64]; 3], terms: &mut [P]) -> Lanes<2> {
    let mut magnitudes = [[f64::INFINITY; LANES], [0.0; LANES]];
    let mut rows = lanes(weighted_error).iter().zip(lanes(weighted)).zip(lanes(base));
    let (whole, rest) = terms.as_chunks_mut();
    for (terms, ((error, v), w)) in whole.iter_mut().zip(rows.by_ref()) {
        *terms = terms_of_lanes(factors, [error, v, w], &mut magnitudes);
    }
    if let Some(((error, v), w)) = rows.next() {
        let last = terms_of_lanes(factors, [error, v, w], &mut magnitudes);
        rest.copy_from_slice(&last[..rest.len()]);
    }
    magnitudes
}

/// As a closure it would be compiled once for both of its uses, and not into vectors.
#[inline(always)]
fn terms_of_lanes<P: Scalar>(
    [of_error, of_square, of_base, once]: [f64; 4],
    [error, v, w]: [&[f64; LANES]; 3],
    [least, most]: &mut Lanes<2>,
) -> [P; LANES] {
    let mut terms = [P::zero(); LANES];
    for l in 0..LANES {
        let square = of_error * error[l] + of_square * v[l] * v[l] + of_base * w[l] * w[l]; // E59, E60, E152
        reach(square, &mut least[l], &mut most[l]);
        terms[l] = P::from_f64(square + once);
    }
    terms
}

/// The same numbers times `scale` in f64.
#[multiversion(targets("x86_64+avx2"))]
fn widen<P: Scalar>(row: &[P], scale: f64, wide: &mut [f64]) {
    for (wide, value) in wide.iter_mut().zip(row) {
        *wide = value.as_f64() * scale;
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn direct<P: Scalar>(
    [chain, tiny_sq]: [f64; 2],
    dmerged: &[f64],
    [weighted, weighted_error, base]: [&[f64]; 3],
    Delta { values, scale, .. }: Delta<'_, P>,
) -> Lanes<3> {
    let mut sums = [[0.0; LANES]; 3];
    let rows = lanes(weighted).iter().zip(lanes(weighted_error)).zip(lanes(values)).zip(lanes(base));
    for (x, (((v, v_error), delta), base)) in lanes(dmerged).iter().zip(rows) {
        for l in 0..LANES {
            let (x, v) = (x[l], v[l]);
            let x_error = chain * x * x + tiny_sq; // E62
            sums[0][l] += x_error * v * v + x * x * v_error[l]; // E64
            sums[1][l] += x * (scale * delta[l].as_f64());
            sums[2][l] += x * base[l];
        }
    }
    sums
}

#[multiversion(targets("x86_64+avx2"))]
fn backward<P: Scalar>(
    of: Backward,
    [dmerged, weighted, weighted_error, base]: [&[f64]; 4],
    Delta { values, terms, scale }: Delta<'_, P>,
    dweighted_error: &mut [P],
) -> (Lanes<2>, Lanes<2>) {
    let ([of_x, of_x_once], [of_error, of_weighted, through_once]) = (of.direct(), of.through());
    let once = of_x_once + through_once;
    let (of_zero, per_scale, terms_scale) = (2.0 * once, 1.0 / of.error_scale, scale * scale);
    let mut sums = [[0.0; LANES]; 2];
    let (mut least, mut most) = ([f64::INFINITY; LANES], [0.0; LANES]);
    let gradient = lanes(dmerged).iter().zip(lanes(weighted)).zip(lanes(weighted_error));
    let parts = lanes(values).iter().zip(lanes(terms)).zip(lanes(base));
    for ((((x, v), v_error), ((values, terms), base)), error) in gradient.zip(parts).zip(lanes_mut(dweighted_error)) {
        for l in 0..LANES {
            let delta = scale * values[l].as_f64();
            let (delta_sq, base_sq) = (delta * delta, base[l] * base[l]);
            let delta_error = of.rank_chain * (terms_scale * terms[l].as_f64() + delta_sq) + of.tiny_sq; // E55
            let dv = of.gain * x[l] + of.k * v[l];
            let direct = of_x * x[l] * x[l];
            let (dv_sq, dv_error) = (dv * dv, direct + of_error * v_error[l] + of_weighted * v[l] * v[l] + once);
            let scaled = dv_error * per_scale;
            let scaled = if dv_error > 0.0 && dv_error <= of_zero && scaled < LEAST { LEAST } else { scaled };
            reach(scaled, &mut least[l], &mut most[l]);
            error[l] = P::from_f64(scaled);
            let summed = dv_error + (of.total_chain - 1.0) * dv_sq; // E68
            sums[0][l] += summed * delta_sq + dv_sq * delta_error; // E68
            sums[1][l] += summed * base_sq; // E68
        }
    }
    (sums, [least, most])
}
