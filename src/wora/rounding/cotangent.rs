//! The backward as far as it comes before the weight's: what is made of dy and of the outputs.

use super::operands::Operands;
use super::{Passes, square, stored};
use crate::Scalar;
use crate::operators::{Operator, channel_square_products, mix_adjoint_input};
use crate::wora::passes::{column_sums, feature_products};
use crate::wora::{Direction, Gradients, NormAxis};
use ndarray::{Array1, Array2, Array3, Axis, CowArray, IxDyn};

/// The backward, as far as it comes before the weight's.
pub(super) struct Cotangent<'v> {
    /// How many outputs a unit has, and the chain of a sum over them.
    pub outputs: usize,
    pub chain: f64,
    /// The sums of dy^2, of dy^2 P^2, of dy^2 Z^2 and of dy^2 B^2 U^2 over a unit's outputs: `[units]`
    pub dy_terms: Array1<f64>,
    pub p_terms: Array1<f64>,
    pub z_terms: Array1<f64>,
    pub u_terms: Array1<f64>,
    /// T = H B, stored, the squares of its sums' terms, and its error: `[outer, rank, inner]`
    pub t: Array3<f64>,
    pub t_terms: Array3<f64>,
    pub t_error: Array3<f64>,
    /// The gradient of what meets the weight, before the gains of columns, in the shape of x; `None` for ids
    pub du: Option<CowArray<'v, f64, IxDyn>>,
    /// The gradient of g, and what the factored way adds to its error: one a row
    pub dgain: Array1<f64>,
    pub dgain_error: Array1<f64>,
    /// `[fan_in]`: in column j a lookup lets only a fraction of its gradient through.
    pub fraction: Option<Array1<f64>>,
}

impl<'v> Cotangent<'v> {
    /// `None` where P has not the range for it.
    pub fn new<O: Operator, P: Scalar>(
        passes: &Passes<'_, '_, O>,
        values: &'v Gradients<f64>,
        operands: &Operands<'_, O, P>,
    ) -> Option<Self> {
        let Passes { layer, cache, beta, gamma, .. } = *passes;
        let (dy, groups) = (passes.dy(), layer.operator.groups());
        let outputs = dy.len_of(Axis(0)) * dy.len_of(Axis(2));
        let chain = passes.storage.of_sum(outputs);
        let (output, mixed) = ((cache.base_output.view(), 0.0), (passes.mixed.view(), passes.tiny_sq));
        let [dy_terms, p_terms, z_terms] = channel_square_products((dy, passes.dy_tiny_sq), [output, mixed]);
        let u_sq = operands.narrowed_up(passes.u_sq.clone(), passes.tiny_sq)?;
        let u_terms = (operands.mixed_terms(&u_sq).widened() * square(&layer.b())).sum_axis(Axis(1));
        let gained = &layer.b() * &passes.gain_out.view().insert_axis(Axis(1));
        let t = mix_adjoint_input(gained.view(), dy, groups);
        let t_terms = operands.mixed_inputs(&operands.narrowed(square(&gained).view())?).widened();
        let t_error = (&t_terms + &stored(&t, passes.tiny_sq)) * passes.chain_of_inputs();
        let du = du(passes, values, &t);

        let norms = layer.base_sq.len();
        let (mut dgain, mut dgain_error) = (Array1::zeros(norms), Array1::zeros(norms));
        if let Some(Direction { weight_norm, .. }) = &cache.direction {
            let dm = values.adapter.magnitude.as_ref().expect("dm").view().into_shape_with_order(norms);
            dgain = &dm.expect("one an entry of m") * weight_norm; // E28
            let terms = match layer.config.norm_axis {
                NormAxis::Output => {
                    let (of_outputs, gamma_sq) = (passes.chain_of_outputs(), gamma * gamma);
                    let products = &p_terms * (beta * beta) + &z_terms * gamma_sq;
                    products * (chain + of_outputs) + &u_terms * (of_outputs * gamma_sq)
                }
                NormAxis::Input => {
                    let products = feature_products(cache, du.as_ref().expect("du").view());
                    column_sums(square(&products)) * (chain + passes.chain_of_inputs())
                }
            };
            dgain_error = terms; // E64
        }
        let fraction = layer.operator.gradient_fraction(&cache.x).map(Array1::from);
        Some(Self {
            outputs,
            chain,
            dy_terms,
            p_terms,
            z_terms,
            u_terms,
            t,
            t_terms,
            t_error,
            du,
            dgain,
            dgain_error,
            fraction,
        })
    }

    /// What a lookup lets through of the squared errors of a gradient `[rows, fan_in]`.
    pub fn let_through(&self, errors: Array2<f64>) -> Array2<f64> {
        match &self.fraction {
            Some(fraction) => errors * square(fraction),
            None => errors,
        }
    }
}

fn du<'v, O: Operator>(
    passes: &Passes<'_, '_, O>,
    values: &'v Gradients<f64>,
    t: &Array3<f64>,
) -> Option<CowArray<'v, f64, IxDyn>> {
    let (layer, cache) = (passes.layer, passes.cache);
    if cache.dropped.is_none() && layer.config.norm_axis == NormAxis::Output {
        return values.x.as_ref().map(CowArray::from);
    }
    let h_beta = &passes.dy() * &(&passes.gain_out * passes.beta).insert_axis(Axis(1));
    let t = t * passes.gamma;
    let pairs = [(h_beta.view(), layer.weight()), (t.view(), layer.a())];
    layer.operator.adjoint_input(&cache.x, &pairs).map(CowArray::from)
}
