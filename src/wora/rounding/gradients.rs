//! The errors of the gradients, from what is made of rows of the weight and of the cotangent. SPEC.md, section 8.5.

use super::base::Base;
use super::cotangent::Cotangent;
use super::low_rank::Channels;
use super::operands::{Operands, Scaled};
use super::rows::{RowErrors, Rows};
use super::{Passes, Storage, square, terms_of_outputs};
use crate::Scalar;
use crate::operators::{Operator, in_standard_layout, mix_adjoint_weight};
use crate::wora::{Adapter, Gradients, Layer, NormAxis};
use ndarray::{Array1, Array2, Array3, ArrayD, Axis, CowArray, IxDyn, Zip};

impl<O: Operator> Passes<'_, '_, O> {
    /// Of the gradients beside those of x and of W0; `None` where P has not the range for them.
    pub(super) fn gradients<P: Scalar>(
        &self,
        values: &Gradients<f64>,
        cotangent: &Cotangent,
        errors: &RowErrors,
        rows: &Rows<'_, P>,
        operands: &Operands<'_, O, P>,
    ) -> Option<Gradients<f64>> {
        let Self { layer, gamma, tiny_sq, .. } = *self;
        let adapter = &values.adapter;
        let Cotangent { chain, dy_terms, t, t_terms, t_error, p_terms, z_terms, u_terms, .. } = cotangent;
        let (of_outputs, gain_sq) = (self.chain_of_outputs(), square(&self.gain_out));
        let of_all = self.chain_of_all();
        let [of_unit, of_weight] =
            [cotangent.outputs, terms_of_outputs(layer)].map(|terms| self.storage.of_total(terms));
        let in_a_row = of_unit + of_weight + 1.0;
        let of_ranks = of_weight * gain_sq.dot(u_terms);
        let scale = |error: f64, terms: &Array1<f64>, factor: f64, value: &ArrayD<f64>| {
            let error = error + in_a_row * gain_sq.dot(terms);
            value.mapv(|value| factor * factor * error + (1.0 + of_all) * value * value + tiny_sq) // E68
        };
        let [lora_a, lora_b] = self.pair(rows, errors, t);
        let a_sq = square(&(&layer.a() * &self.gain_in));
        let u_terms = operands.outputs(&operands.narrowed(a_sq.view())?);
        let often = chain + of_outputs + 1.0;
        let of_u = &self.u_sq * often + u_terms.widened() * *chain;
        let of_u = operands.mixed_terms(&operands.narrowed_up(of_u, often * tiny_sq)?);
        let lora_b = lora_b + of_u.widened() * gain_sq.view().insert_axis(Axis(1)); // E69
        let of_t = t_error * (chain + 2.0) + t_terms * *chain;
        let of_t = operands.terms_of(&operands.narrowed_up(of_t, (chain + 2.0) * self.chain_of_inputs() * tiny_sq)?);
        let lora_a = lora_a + cotangent.let_through(of_t.widened() * square(&self.gain_in)); // E70
        let pair = |error: Array2<f64>, value: &ArrayD<f64>| {
            let error = in_standard_layout(error * (gamma * gamma));
            let error = error.into_shape_with_order(value.shape()).expect("as many as the gradient");
            error + value.mapv(|value| (chain + 1.0) * value * value + tiny_sq) // E69, E70
        };
        let bias = values.bias.as_ref().map(|value| {
            let terms = dy_terms.view().into_dyn();
            // A plain sum is added up in the type itself whatever it is, but in four parts at least.
            let chain = Storage { chain: self.storage.chain.max(512), ..self.storage }.of_sum(cotangent.outputs);
            (square(value) + terms) * ((chain + 3.0) / 4.0) + tiny_sq // E72
        });
        let magnitude = adapter
            .magnitude
            .as_ref()
            .map(|value| errors.magnitude.clone().into_shape_with_order(value.shape()).expect("one an entry of m"));
        let (alpha, beta) = (adapter.alpha.as_ref(), adapter.beta.as_ref());
        Some(Gradients {
            x: None,
            weight: None,
            bias,
            adapter: Adapter {
                lora_a: pair(lora_a, &adapter.lora_a),
                lora_b: pair(lora_b, &adapter.lora_b),
                magnitude,
                alpha: alpha.map(|value| scale(errors.alpha + of_ranks, z_terms, layer.scaling(), value)),
                beta: beta.map(|value| scale(errors.beta, p_terms, 1.0, value)),
            },
        })
    }

    /// Of dW0, from what its rows have of dV. E71
    pub(super) fn dweight<P: Scalar>(
        &self,
        dweight: &ArrayD<f64>,
        dweighted: Array2<f64>,
        cotangent: &Cotangent,
        operands: &Operands<'_, O, P>,
    ) -> ArrayD<f64> {
        let Self { layer, beta, tiny_sq, .. } = *self;
        let chain = cotangent.chain;
        let mut terms = operands.terms_of_dmerged() * chain;
        terms *= &square(&self.gain_out).insert_axis(Axis(1));
        terms *= &square(&self.gain_in);
        let error = cotangent.let_through(terms) + self.as_weight(dweighted);
        let mut error = layer.operator.stored_weight(error);
        let beta_sq = beta * beta;
        Zip::from(&mut error).and(dweight).par_for_each(|error, &value| {
            *error = beta_sq * *error + 2.0 * value * value + tiny_sq; // E71
        });
        if !matches!(self.base, Base::Gained) {
            let apart = cotangent.let_through(operands.dmerged_of_both(chain));
            error += &layer.operator.stored_weight(apart); // E152
        }
        error
    }

    /// What reaches A and B by way of dV. E69, E70
    fn pair<P>(&self, rows: &Rows<'_, P>, errors: &RowErrors, t: &Array3<f64>) -> [Array2<f64>; 2] {
        let Layer { operator, config, .. } = self.layer;
        let (mut left, right) = (errors.left.clone(), errors.right.clone());
        if let Some(direction) = &self.cache.direction {
            // Contracted over a row, whose elements have the errors of g and of k in common: g X right^T and V right^T.
            let direct = match config.norm_axis {
                NormAxis::Output => mix_adjoint_weight(self.dy(), self.cache.lora_output.view(), operator.groups()),
                NormAxis::Input => operator.adjoint_weight(self.cache.adapted_input(), t.view()).reversed_axes(),
            };
            let column = |values: &Array1<f64>| values.clone().insert_axis(Axis(1));
            let direct = direct * column(&direction.gain);
            left += &(square(&direct) * column(&errors.gain));
            left += &(square(&direction.weighted_right(&rows.factors)) * column(&errors.norm_weight));
        }
        match config.norm_axis {
            NormAxis::Output => [right, left],
            NormAxis::Input => [left.reversed_axes(), right.reversed_axes()],
        }
    }

    /// Of dx, from what it adds up of squares. E73
    pub(super) fn dx<P: Scalar>(
        &self,
        dx: &ArrayD<f64>,
        (sums, base_gradient): (Scaled<ArrayD<P>>, Option<Scaled<ArrayD<P>>>),
        channels: Option<&Channels<P>>,
        gain_error: &Array1<f64>,
        cotangent: &Cotangent,
        operands: &Operands<'_, O, P>,
    ) -> ArrayD<f64> {
        let Self { layer, gamma, tiny_sq, .. } = *self;
        let (operator, x, chain) = (&layer.operator, &self.cache.x, self.chain_of_inputs());
        let gained_a = &layer.a() * &self.gain_in * gamma;
        let Cotangent { t, t_error, du, .. } = cotangent;
        let lora = operator.adjoint_input(x, &[(t.view(), gained_a.view())]).expect("values");
        let of_t = square(&gained_a);
        let of_t = (t_error.view(), of_t.view());
        // What is added up of W0^2 is multiplied by what columns have of their own, where there are such.
        let (low, of_sums) = match channels {
            None => (self.squared.adjoint_input(x, &[of_t]), sums.scale),
            Some(channels) => {
                let (of_base, weights) = self.of_squares();
                let low = self.low_rank.inputs(channels, &weights, (&self.squared, x), operands, of_t);
                (low.map(|low| low + sums.widened() * of_base), 0.0)
            }
        };
        let (mut error, du) = (low.expect("values"), du.as_ref().expect("values"));
        let by_column = layer.config.norm_axis == NormAxis::Input;
        let du: CowArray<'_, _, _> = if by_column { (du * &self.gain_in).into() } else { du.into() };
        let own = |dx: f64| (chain + 1.0) * dx * dx + tiny_sq;
        let is_apart = matches!(self.base, Base::Apart);
        let of_gained = 1.0 + self.base.of_gained();
        let parts = Zip::from(&mut error).and(&sums.values).and(&du).and(&lora).and(dx);
        parts.par_for_each(|error, sum, &du, &lora, &dx| {
            *error += of_sums * sum.as_f64() + of_gained * (du - lora).powi(2) + lora * lora;
            *error += if is_apart { 0.0 } else { own(dx) };
        });
        if by_column && self.cache.direction.is_some() {
            error += &(du.mapv(|du| du * du) * gain_error);
        }
        match &self.base {
            Base::Gained => {}
            Base::Summed(_) => {
                if let Some(Scaled { values, scale }) = base_gradient {
                    Zip::from(&mut error).and(&values).par_for_each(|error, whole| {
                        *error += 3.0 * (scale * whole.as_f64()).powi(2); // E152
                    });
                }
            }
            Base::Apart => {
                let apart = operands.inputs_of_both(chain);
                let none = ArrayD::ones(IxDyn(&[]));
                let mask = self.cache.dropped.as_ref().map_or(&none, |(mask, _)| mask);
                let mask = mask.broadcast(error.raw_dim()).expect("in the shape of x, or a number");
                ndarray::azip!((error in &mut error, &apart in &apart, &mask in mask, &dx in dx) {
                    *error = mask * mask * (*error + apart) + 2.0 * apart + own(dx); // E152
                });
            }
        }
        error
    }
}
