//! The errors of y, from what it adds up of squares. SPEC.md, section 8.5, E61.

use super::low_rank::{self, Channels, Mixed, Weights};
use super::operands::{Operands, Scaled};
use super::{Base, Passes, square};
use crate::Scalar;
use crate::operators::Operator;
use crate::wora::NormAxis;
use multiversion::multiversion;
use ndarray::{Array1, Array3, ArrayD, Axis, Zip};

/// What the squares that make up the error of an output are multiplied by, where the sums of W' are there already: one
/// number each a unit. E61
struct Factors {
    sums: Vec<f64>,
    mixed: Vec<f64>,
    base_sq: Vec<f64>,
    lora_sq: Vec<f64>,
    /// Of P and of Z, before they are added up and squared: of what all terms of an output share, which may cancel.
    base: Vec<f64>,
    lora: Vec<f64>,
    y_sq: f64,
    once: Vec<f64>,
}

/// The error of one output, from its unit's factors and what it has of them: the sums, what is mixed, P, Z and y.
#[inline(always)]
fn error([sums, mixed, base_sq, lora_sq, base, lora, y_sq, once]: [f64; 8], of: [f64; 5]) -> f64 {
    let [of_sums, of_mixed, p, z, y] = of;
    let shared = base * p + lora * z;
    sums * of_sums + mixed * of_mixed + base_sq * p * p + lora_sq * z * z + shared * shared + y_sq * y * y + once // E61
}

/// Those of the units at one place, where there is one inner position.
#[multiversion(targets("x86_64+avx2"))]
fn of_units<P: Scalar>(of: &Factors, [sums, mixed]: [&[P]; 2], [p, z, y]: [&[f64]; 3], errors: &mut [f64]) {
    let n = errors.len();
    let (sums, mixed, p, z, y) = (&sums[..n], &mixed[..n], &p[..n], &z[..n], &y[..n]);
    let (of_sums, of_mixed, base_sq) = (&of.sums[..n], &of.mixed[..n], &of.base_sq[..n]);
    let (lora_sq, base, lora, once) = (&of.lora_sq[..n], &of.base[..n], &of.lora[..n], &of.once[..n]);
    for i in 0..n {
        let factors = [of_sums[i], of_mixed[i], base_sq[i], lora_sq[i], base[i], lora[i], of.y_sq, once[i]];
        errors[i] = error(factors, [sums[i].as_f64(), mixed[i].as_f64(), p[i], z[i], y[i]]);
    }
}

/// Those of one unit, at every inner position.
#[multiversion(targets("x86_64+avx2"))]
fn of_places<P: Scalar>(unit: [f64; 8], [sums, mixed]: [&[P]; 2], [p, z, y]: [&[f64]; 3], errors: &mut [f64]) {
    let n = errors.len();
    let (sums, mixed, p, z, y) = (&sums[..n], &mixed[..n], &p[..n], &z[..n], &y[..n]);
    for q in 0..n {
        errors[q] = error(unit, [sums[q].as_f64(), mixed[q].as_f64(), p[q], z[q], y[q]]);
    }
}

/// The errors of one outer position, `[units, inner]`.
fn errors<P: Scalar>(of: &Factors, sums: [&[P]; 2], outputs: [&[f64]; 3], errors: &mut [f64]) {
    let units = of.sums.len();
    if errors.len() == units {
        return of_units(of, sums, outputs, errors);
    }
    let inner = errors.len() / units;
    for (i, errors) in errors.chunks_exact_mut(inner).enumerate() {
        let unit = i * inner..(i + 1) * inner;
        let (sums, outputs) = (sums.map(|part| &part[unit.clone()]), outputs.map(|part| &part[unit.clone()]));
        let [base, lora] = [of.base[i], of.lora[i]];
        let factors = [of.sums[i], of.mixed[i], of.base_sq[i], of.lora_sq[i], base, lora, of.y_sq, of.once[i]];
        of_places(factors, sums, outputs, errors);
    }
}

impl<O: Operator> Passes<'_, '_, O> {
    /// Of y, in its shape, from what it adds up of squares. E61
    pub(super) fn y<P: Scalar>(
        &self,
        sums: Scaled<Array3<P>>,
        channels: Option<Channels<P>>,
        gain_error: &Array1<f64>,
        operands: &Operands<'_, O, P>,
    ) -> ArrayD<f64> {
        let Self { layer, beta, gamma, tiny_sq, .. } = *self;
        let (p, chain) = (&self.cache.base_output, self.chain_of_outputs());
        let (groups, workspace) = (layer.operator.groups(), &operands.workspace);
        let units = p.len_of(Axis(1));
        let ((of_base, of_delta), (mixed, whole), shared) = match channels {
            Some(channels) => {
                let (of_base, weights) = self.of_squares();
                let of_ranks = self.chain_of_ranks();
                let share = chain / ((self.stored(NormAxis::Output) + chain) * of_ranks);
                let mixed = self.low_rank.outputs(channels, &weights, (self.u_sq.view(), share), workspace);
                ((of_base, weights.delta), mixed, gain_error.clone())
            }
            None => {
                let gained_sq = square(&(&layer.b() * &(&self.gain_out * gamma).insert_axis(Axis(1))));
                let u_error = Scaled::<Array3<P>>::of((&self.u_sq * chain).view());
                let as_it_is = || Array1::ones(units);
                let weights = Weights { delta: as_it_is(), terms: as_it_is(), ones: as_it_is() };
                let mixed =
                    low_rank::mix((gained_sq.view(), 0, gained_sq.ncols()), &weights, &u_error, groups, workspace);
                ((weights.ones, weights.delta), (mixed, None), Array1::zeros(units))
            }
        };
        let Mixed { sums: mixed, scales } = mixed;
        let bias = layer.base.bias.as_ref();
        let apart = self.base.of_outputs();
        let y = self.results.y.view().into_shape_with_order(p.dim()).expect("as many as P");
        let (base, lora) = (&self.gain_out * beta, &self.gain_out * gamma);
        let factors = Factors {
            sums: ((of_base + apart[0]) * sums.scale).to_vec(),
            mixed: scales.to_vec(),
            base_sq: (&base * &base + (1.0 + apart[1])).to_vec(),
            lora_sq: (&lora * &lora * 2.0).to_vec(),
            base: (&base * &shared.sqrt()).to_vec(),
            lora: (&lora * &shared.sqrt()).to_vec(),
            y_sq: chain,
            once: (0..units).map(|i| bias.map_or(0.0, |bias| bias[i] * bias[i]) + tiny_sq).collect(),
        };
        let mut error = Array3::zeros(p.dim());
        let outer = Zip::from(error.outer_iter_mut()).and(sums.values.outer_iter()).and(mixed.outer_iter());
        let outer = outer.and(p.outer_iter()).and(self.mixed.outer_iter());
        outer.and(y.outer_iter()).par_for_each(|mut error, sums, mixed, p, z, y| {
            let squares = [sums, mixed].map(|part| part.to_slice().expect("standard layout"));
            let parts = [p, z, y].map(|part| part.to_slice().expect("standard layout"));
            errors(&factors, squares, parts, error.as_slice_mut().expect("standard layout"));
        });
        if let Some(Scaled { values, scale }) = whole {
            let of_units = (of_delta * scale).insert_axis(Axis(1));
            error += &(values.mapv(Scalar::as_f64) * of_units);
        }
        if matches!(self.base, Base::Apart) {
            error += &operands.outputs_of_both(chain); // E152
        }
        error.into_shape_with_order(self.results.y.shape()).expect("as many as y")
    }
}
