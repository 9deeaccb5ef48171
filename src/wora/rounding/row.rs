//! One row of the weight element by element: its stages, its gradient, and the errors of both. The loops are compiled for
//! newer processors too and chosen at run time.

use crate::Scalar;
use crate::simd::{contiguous, dot, dot_squares};
use multiversion::multiversion;
use ndarray::ArrayView1;

/// One row of the weight; the memory is the next one's too.
pub(super) struct Row {
    /// Which one.
    pub i: usize,
    /// W0
    base: Vec<f64>,
    /// D and its error
    delta: Vec<f64>,
    delta_error: Vec<f64>,
    /// V and its error
    pub weighted: Vec<f64>,
    pub weighted_error: Vec<f64>,
    /// `<V, D>` and `<V, W0>`
    pub of_delta: f64,
    pub of_base: f64,
    /// X, then `g X`
    direct: Vec<f64>,
    /// dV and its error
    dweighted: Vec<f64>,
    pub dweighted_error: Vec<f64>,
    /// The error of what of dV reaches A and W0
    pub looked_up_error: Vec<f64>,
    /// What has been worked out is used at once.
    scratch: Vec<f64>,
}

/// What V is made by, and `t^2`.
#[derive(Clone, Copy)]
pub(super) struct Mixing {
    /// `alpha s`
    pub gamma: f64,
    pub beta: f64,
    pub tiny_sq: f64,
}

/// A row's gain and its error, and `t^2`.
#[derive(Clone, Copy)]
pub(super) struct Gain {
    pub gain: f64,
    pub error: f64,
    pub tiny_sq: f64,
}

/// A row of X, and of the squared terms of its sums, each with what it is to be multiplied by.
pub(super) struct Dmerged<'a, P> {
    pub values: (ArrayView1<'a, P>, f64),
    pub terms: (ArrayView1<'a, P>, f64),
    /// The chain of a sum over outputs.
    pub chain: f64,
    /// `[columns]`: in column j a lookup lets only a fraction of its gradient through.
    pub fraction: Option<ArrayView1<'a, f64>>,
}

impl Row {
    pub fn new(columns: usize) -> Self {
        let row = || vec![0.0; columns];
        Self {
            i: 0,
            base: row(),
            delta: row(),
            delta_error: row(),
            weighted: row(),
            weighted_error: row(),
            of_delta: 0.0,
            of_base: 0.0,
            direct: row(),
            dweighted: row(),
            dweighted_error: row(),
            looked_up_error: row(),
            scratch: row(),
        }
    }

    /// D and V from W0, D and `sum_k left^2 right^2`.
    pub fn set(&mut self, mixing: Mixing, base: ArrayView1<'_, f64>, delta: &[f64], delta_terms: &[f64]) {
        self.base.copy_from_slice(&contiguous(base));
        self.delta.copy_from_slice(delta);
        let Self { base, delta, delta_error, weighted, weighted_error, .. } = self;
        stages(mixing, base, delta, delta_terms, delta_error, weighted, weighted_error);
        (self.of_delta, self.of_base) = (dot(&self.weighted, &self.delta), dot(&self.weighted, &self.base));
    }

    /// What a sum over a row of W' adds up, without `t^2`.
    pub fn terms(&mut self, gain: Gain, chain: f64) -> &[f64] {
        terms(gain, chain, &self.weighted, &self.weighted_error, &mut self.scratch);
        &self.scratch
    }

    /// Adds the error of W'.
    pub fn add_merged<P: Scalar>(&self, gain: Gain, sum: &mut [P]) {
        add_merged(gain, &self.weighted, &self.weighted_error, sum);
    }

    /// dV and its error, without what comes by way of the norm; returns what the elements' errors apart add to that of
    /// the gradient of g. E64
    pub fn set_direct<P: Scalar>(&mut self, gain: Gain, of: &Dmerged<'_, P>) -> f64 {
        let Dmerged { values, terms, chain, fraction } = of;
        let (x, x_terms) = (contiguous(values.0), contiguous(terms.0));
        let (scales, tiny_sq) = ([values.1, terms.1], gain.tiny_sq);
        dmerged(&x, &x_terms, scales, *chain, tiny_sq, &mut self.direct, &mut self.dweighted_error);
        let apart =
            dot_squares(&self.weighted, &self.dweighted_error) + dot_squares(&self.direct, &self.weighted_error); // E64
        direct(gain, &mut self.direct, &mut self.dweighted, &mut self.dweighted_error, &mut self.looked_up_error);
        if let Some(fraction) = fraction {
            self.looked_up_error.iter_mut().zip(fraction).for_each(|(error, c)| *error *= c * c);
        }
        apart
    }

    /// Adds what comes by way of the norm, `k V`.
    pub fn add_through_norm(&mut self, k: f64, k_error: f64) {
        let Self { weighted, weighted_error, dweighted, dweighted_error, looked_up_error, .. } = self;
        through_norm(k, k_error, weighted, weighted_error, dweighted, dweighted_error, looked_up_error);
    }

    /// What the row adds to the errors of dalpha and dbeta, where sums over all rows have this chain. E68
    pub fn scale_errors(&mut self, gain: Gain, k_error: f64, total_chain: f64) -> [f64; 2] {
        let Self { base, delta, direct, dweighted, scratch, .. } = self;
        summed(total_chain, dweighted, &self.dweighted_error, scratch);
        // The errors of g and of k are the same in all elements of a row.
        let shared = |direct: f64, weighted: f64| gain.error * direct * direct + k_error * weighted * weighted;
        let of_delta = dot_squares(delta, scratch) + dot_squares(dweighted, &self.delta_error);
        let of_delta = of_delta + shared(dot(direct, delta), self.of_delta);
        let of_base = dot_squares(base, scratch) + shared(dot(direct, base), self.of_base);
        [of_delta, of_base]
    }
}

/// The same numbers plus `added` in another type.
#[multiversion(targets("x86_64+avx2"))]
pub(super) fn narrow<P: Scalar>(row: &[f64], added: f64, narrow: &mut [P]) {
    for (narrow, &value) in narrow.iter_mut().zip(row) {
        *narrow = P::from_f64(value + added);
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn stages(
    mixing: Mixing,
    base: &[f64],
    delta: &[f64],
    delta_terms: &[f64],
    delta_error: &mut [f64],
    weighted: &mut [f64],
    weighted_error: &mut [f64],
) {
    let Mixing { gamma, beta, tiny_sq } = mixing;
    let (gamma_sq, beta_sq) = (gamma * gamma, beta * beta);
    let inputs = base.iter().zip(delta).zip(delta_terms);
    let results = delta_error.iter_mut().zip(weighted_error).zip(weighted);
    for (((&w, &delta), &terms), ((delta_error, error), v)) in inputs.zip(results) {
        *delta_error = terms + delta * delta + tiny_sq; // E55
        *v = gamma * delta + beta * w;
        *error = gamma_sq * (*delta_error + delta * delta) + beta_sq * w * w + *v * *v + tiny_sq; // E56
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn terms(gain: Gain, chain: f64, weighted: &[f64], weighted_error: &[f64], terms: &mut [f64]) {
    let g_sq = gain.gain * gain.gain;
    for ((terms, &v), &error) in terms.iter_mut().zip(weighted).zip(weighted_error) {
        let stored = v * v;
        *terms = g_sq * (error + gain.error * stored + stored + chain * (error + stored)); // E60
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn add_merged<P: Scalar>(gain: Gain, weighted: &[f64], weighted_error: &[f64], sum: &mut [P]) {
    let g_sq = gain.gain * gain.gain;
    for ((sum, &v), &error) in sum.iter_mut().zip(weighted).zip(weighted_error) {
        *sum += P::from_f64(g_sq * (error + (gain.error + 1.0) * v * v) + gain.tiny_sq); // E59
    }
}

/// X and its error from what they are to be multiplied by.
#[multiversion(targets("x86_64+avx2"))]
fn dmerged<P: Scalar>(
    x: &[P],
    terms: &[P],
    scales: [f64; 2],
    chain: f64,
    tiny_sq: f64,
    wide: &mut [f64],
    error: &mut [f64],
) {
    for ((x, terms), (wide, error)) in x.iter().zip(terms).zip(wide.iter_mut().zip(error)) {
        *wide = x.as_f64() * scales[0];
        *error = chain * (terms.as_f64() * scales[1] + *wide * *wide) + tiny_sq; // E62
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn direct(gain: Gain, direct: &mut [f64], dweighted: &mut [f64], error: &mut [f64], looked_up: &mut [f64]) {
    let g_sq = gain.gain * gain.gain;
    for ((direct, dv), (error, looked_up)) in direct.iter_mut().zip(dweighted).zip(error.iter_mut().zip(looked_up)) {
        *direct *= gain.gain;
        *dv = *direct;
        *error = g_sq * *error + (gain.error + 1.0) * *direct * *direct; // E63
        *looked_up = *error;
    }
}

#[multiversion(targets("x86_64+avx2"))]
fn through_norm(
    k: f64,
    k_error: f64,
    weighted: &[f64],
    weighted_error: &[f64],
    dweighted: &mut [f64],
    dweighted_error: &mut [f64],
    looked_up_error: &mut [f64],
) {
    let (k_sq, k_terms) = (k * k, k_error + k * k);
    let results = dweighted.iter_mut().zip(dweighted_error).zip(looked_up_error);
    for ((&v, &v_error), ((dv, error), looked_up)) in weighted.iter().zip(weighted_error).zip(results) {
        let through = k_sq * v_error + k_terms * v * v;
        *dv += k * v;
        *error += through; // E67
        *looked_up += through; // E67
    }
}

/// The error of dV, and that of what is added up of it.
#[multiversion(targets("x86_64+avx2"))]
fn summed(chain: f64, dweighted: &[f64], error: &[f64], sum: &mut [f64]) {
    for ((sum, &dv), &error) in sum.iter_mut().zip(dweighted).zip(error) {
        *sum = error + (chain - 1.0) * dv * dv; // E68
    }
}
