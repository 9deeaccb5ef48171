//! How far off a careful computation may be: the rounding errors of every intermediate that an implementation may
//! store, propagated to every result as a root of summed squares. SPEC.md, section 8.5.
//!
//! Two ways of computing are allowed for at once: the factored one, which stores `op(x, W0)`, `op(x, A)` and what is
//! made of them, and the one that stores V, W' and dW'. Errors are in unit roundoffs of the type stored in; every
//! `*_error` holds squares of them.

mod operands;
mod rows;

use super::{Adapter, Cache, Direction, Evaluation, Gradients, Layer, NormAxis};
use crate::Scalar;
use crate::operators::{
    Input, Operator, channel_products, channel_sums, mix_adjoint_input, mix_adjoint_weight, mix_into,
};
use ndarray::{Array1, Array2, Array3, ArrayBase, ArrayD, ArrayViewD, Axis, Dimension, Ix2, RawData, Zip};
use operands::{Operands, Range};
use rows::{Backward, RowGradients, Rows, Stages, Wanted};

/// The type that intermediates are stored in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Storage {
    /// Numbers below the smallest normal one are no closer to each other than those just above it.
    pub smallest_normal: f64,
    /// How many terms a sum may add up one after the other in the type itself; 0 where sums are kept in a wider one.
    pub chain: usize,
}

impl Storage {
    /// What the squares of a sum's terms are multiplied by: the sum's own rounding, and that of adding its terms up
    /// in a row, whose squared errors come to a quarter of the terms' squares for each.
    fn of_sum(self, terms: usize) -> f64 {
        1.0 + self.chain.min(terms) as f64 / 4.0
    }
}

impl<O: Operator> Layer<O, f64> {
    /// The rounding error to expect of every result: the root of the summed squares, in unit roundoffs.
    ///
    /// `results` are the results of the forward that left `cache`, and of the backward at `dy`, in the shape of y. Errors
    /// are given of what the results hold.
    pub fn rounding(
        &self,
        cache: &Cache<'_, O, f64>,
        dy: Option<ArrayViewD<'_, f64>>,
        results: &Evaluation<f64>,
        storage: Storage,
    ) -> Evaluation<f64> {
        let passes = Passes::new(self, cache, dy, results, storage);
        // A lookup has no large products, and its factor may have any size.
        let narrow = cache.x.values().and_then(|_| passes.errors::<f32>());
        let Evaluation { y, weighted, weight_norm, gain, merged_weight, gradients } =
            narrow.or_else(|| passes.errors::<f64>()).expect("errors in f64");
        let gradients = gradients.map(|Gradients { x, weight, bias, adapter }| {
            let Adapter { lora_a, lora_b, magnitude, alpha, beta } = adapter;
            Gradients {
                x: x.map(root),
                weight: weight.map(root),
                bias: bias.map(root),
                adapter: Adapter {
                    lora_a: root(lora_a),
                    lora_b: root(lora_b),
                    magnitude: magnitude.map(root),
                    alpha: alpha.map(root),
                    beta: beta.map(root),
                },
            }
        });
        Evaluation {
            y: root(y),
            weighted: weighted.map(root),
            weight_norm: weight_norm.map(root),
            gain: gain.map(root),
            merged_weight: merged_weight.map(root),
            gradients,
        }
    }
}

fn root<D: Dimension>(squares: ndarray::Array<f64, D>) -> ndarray::Array<f64, D> {
    squares.mapv_into(f64::sqrt)
}

fn square<D: Dimension>(values: &ndarray::Array<f64, D>) -> ndarray::Array<f64, D> {
    values.mapv(|v| v * v)
}

/// Forward and backward at a point.
struct Passes<'a, 'x, O: Operator> {
    layer: &'a Layer<O, f64>,
    cache: &'a Cache<'x, O, f64>,
    results: &'a Evaluation<f64>,
    storage: Storage,
    tiny_sq: f64,
    beta: f64,
    /// `alpha s`
    gamma: f64,
    /// The gains of units and of columns: at most one is not 1.
    gain_out: Array1<f64>,
    gain_in: Array1<f64>,
    /// Z = B U: `[outer, units, inner]`
    mixed: Array3<f64>,
    /// `[outer, units, inner]`
    dy: Option<Array3<f64>>,
}

impl<'a, 'x, O: Operator> Passes<'a, 'x, O> {
    fn new(
        layer: &'a Layer<O, f64>,
        cache: &'a Cache<'x, O, f64>,
        dy: Option<ArrayViewD<'_, f64>>,
        results: &'a Evaluation<f64>,
        storage: Storage,
    ) -> Self {
        let shape = cache.base_output.dim();
        let mut mixed = Array3::zeros(shape);
        mix_into(mixed.view_mut(), layer.b(), cache.lora_output.view(), layer.operator.groups());
        let gains = |axis: NormAxis, length: usize| match &cache.direction {
            Some(direction) if layer.config.norm_axis == axis => direction.gain.clone(),
            _ => Array1::ones(length),
        };
        Self {
            layer,
            cache,
            results,
            storage,
            tiny_sq: storage.smallest_normal.powi(2),
            beta: layer.beta(),
            gamma: layer.alpha() * layer.scaling(),
            gain_out: gains(NormAxis::Output, layer.operator.units()),
            gain_in: gains(NormAxis::Input, layer.operator.fan_in()),
            mixed,
            dy: dy.map(|dy| dy.to_shape(shape).expect("as many as y").into_owned()),
        }
    }

    /// The squared errors of every result, large products computed in P; `None` where P has not the range for them.
    fn errors<P: Scalar>(&self) -> Option<Evaluation<f64>> {
        let (layer, results) = (self.layer, self.results);
        let operands = Operands::<O, P>::new(&layer.operator, self.cache, self.dy.as_ref());
        let rows = Rows { factors: layer.factors(), direction: self.cache.direction.as_ref(), tiny_sq: self.tiny_sq };
        let gradients = results.gradients.as_ref();
        let wanted = Wanted {
            terms_and_merged: gradients.is_some_and(|gradients| gradients.x.is_some()),
            weighted: results.weighted.is_some(),
            merged: results.merged_weight.is_some(),
        };
        let mut stages = rows.stages::<P>(self.storage.of_sum(layer.operator.fan_in()), wanted);
        let of_base = self.cache.dropped.as_ref().map_or(Range::NONE, |_| Range::of(&layer.base.weight).squared());
        if !operands.fit(stages.range.and(of_base)) {
            return None;
        }
        let stored = |wanted: bool, rows: &mut Array2<f64>| {
            wanted.then(|| layer.operator.stored_weight(self.as_weight(std::mem::take(rows))))
        };
        let weighted = stored(wanted.weighted, &mut stages.weighted);
        let merged_weight = stored(wanted.merged, &mut stages.merged);
        let per_norm = |relative: &Array1<f64>, of: &Option<Array1<f64>>| of.as_ref().map(|of| relative * &square(of));
        Some(Evaluation {
            y: self.y(&operands, &stages),
            weighted,
            weight_norm: per_norm(&stages.norm, &results.weight_norm),
            gain: per_norm(&stages.gain, &results.gain),
            merged_weight,
            gradients: gradients.map(|gradients| self.gradients(gradients, &operands, &rows, &stages)),
        })
    }

    /// `[rows, columns]` as `[units, fan_in]`, or the other way round.
    fn as_weight<S: RawData>(&self, rows: ArrayBase<S, Ix2>) -> ArrayBase<S, Ix2> {
        if self.layer.config.norm_axis == NormAxis::Output { rows } else { rows.reversed_axes() }
    }

    /// W0 in the type that products are computed in.
    fn base<P: Scalar>(&self) -> Array2<P> {
        self.layer.weight().mapv(P::from_f64)
    }

    /// Of y, in its shape. E61
    fn y<P: Scalar>(&self, operands: &Operands<O, P>, stages: &Stages<P>) -> ArrayD<f64> {
        let Self { layer, beta, gamma, tiny_sq, .. } = *self;
        let (p, chain) = (&self.cache.base_output, self.storage.of_sum(layer.operator.fan_in()));
        let mut error = operands.outputs(self.as_weight(stages.terms.view()));
        let gained = &layer.b() * &(&self.gain_out * gamma).insert_axis(Axis(1));
        mix_into(
            error.view_mut(),
            square(&gained).view(),
            square(&self.cache.lora_output).view(),
            layer.operator.groups(),
        );
        if self.cache.dropped.is_some() {
            error += &operands.outputs_of_both(self.base().view(), chain);
        }
        let shared = match layer.config.norm_axis {
            NormAxis::Output => stages.gain.clone(),
            NormAxis::Input => Array1::zeros(p.len_of(Axis(1))),
        };
        let bias = layer.base.bias.as_ref();
        let y = self.results.y.view().into_shape_with_order(p.dim()).expect("as many as P");
        Zip::indexed(&mut error).and(p).and(&self.mixed).and(y).par_for_each(|(_, i, _), error, &p, &z, &y| {
            let (g, b) = (self.gain_out[i], bias.map_or(0.0, |bias| bias[i]));
            let (base, lora) = (g * beta * p, g * gamma * z);
            let stored = p * p + base * base + 2.0 * lora * lora;
            *error += stored + shared[i] * (base + lora).powi(2) + chain * y * y + b * b + tiny_sq;
        });
        error.into_shape_with_order(self.results.y.shape()).expect("as many as y")
    }

    /// Of every gradient.
    fn gradients<P: Scalar>(
        &self,
        values: &Gradients<f64>,
        operands: &Operands<O, P>,
        rows: &Rows<'_>,
        stages: &Stages<P>,
    ) -> Gradients<f64> {
        let Self { layer, beta, gamma, tiny_sq, .. } = *self;
        let Layer { operator, config, .. } = layer;
        let groups = operator.groups();
        let dy = self.dy.as_ref().expect("a cotangent");
        let outputs = dy.len_of(Axis(0)) * dy.len_of(Axis(2));
        let chain = self.storage.of_sum(outputs);

        // The sums of dy^2 P^2 and dy^2 Z^2 over a unit's outputs.
        let of_unit = |values: &Array3<f64>| {
            let terms = dy * values;
            channel_products(terms.view(), terms.view())
        };
        let (p_terms, z_terms) = (of_unit(&self.cache.base_output), of_unit(&self.mixed));
        // T = H B, stored, and its terms.
        let gained = &layer.b() * &self.gain_out.view().insert_axis(Axis(1));
        let t = mix_adjoint_input(gained.view(), dy.view(), groups);
        let dy_sq = square(dy);
        let t_error = mix_adjoint_input(square(&gained).view(), dy_sq.view(), groups) + square(&t);
        let du = self.du(values, dy, &t);

        let norms = stages.norm.len();
        let (mut dgain, mut dgain_error) = (Array1::zeros(norms), Array1::zeros(norms));
        if let Some(Direction { weight_norm, .. }) = &self.cache.direction {
            let dm = values.adapter.magnitude.as_ref().expect("dm").view().into_shape_with_order(norms);
            dgain = &dm.expect("one an entry of m") * weight_norm; // E28
            let terms = match config.norm_axis {
                NormAxis::Output => &p_terms * (beta * beta) + &z_terms * (gamma * gamma),
                NormAxis::Input => self.column_terms(du.as_ref().expect("features")),
            };
            dgain_error = terms * (chain + 1.0); // E64
        }
        let [dmerged, dmerged_terms] = operands.weights();
        let fraction = operator.gradient_fraction(&self.cache.x).map(Array1::from);
        let of_rows = rows.gradients(&Backward {
            stages,
            dmerged: (self.as_weight(dmerged.0.view()), dmerged.1),
            dmerged_terms: (self.as_weight(dmerged_terms.0.view()), dmerged_terms.1),
            chain,
            fraction: fraction.as_ref(),
            dgain,
            dgain_error,
            norm_gradient: config.norm_gradient,
            wants_weight: values.weight.is_some(),
        });

        let gain_sq = square(&self.gain_out);
        let scale = |error: f64, terms: &Array1<f64>, factor: f64, value: &ArrayD<f64>| {
            let error = error + 3.0 * gain_sq.dot(terms); // summed up in a tree, not in a row
            value.mapv(|value| factor * factor * error + 2.0 * value * value + tiny_sq) // E68
        };
        let [lora_a, lora_b] = self.pair(rows, stages, &of_rows, &t, dy);
        let lora_b = lora_b
            + mix_adjoint_weight(
                (&dy_sq * &gain_sq.view().insert_axis(Axis(1))).view(),
                square(&self.cache.lora_output).view(),
                groups,
            ) * (chain + 2.0); // E69
        let x_sq = self.cache.adapted_input();
        let x_sq = x_sq.values().and_then(|x| O::Input::from_values(x.mapv(|x| x * x))).unwrap_or_else(|| x_sq.clone());
        let mut of_t = operator.power(2).adjoint_weight(&x_sq, t_error.view()) * square(&self.gain_in) * (chain + 2.0);
        if let Some(fraction) = &fraction {
            of_t *= &square(fraction);
        }
        let lora_a = lora_a + of_t; // E70
        let pair = |error: Array2<f64>, value: &ArrayD<f64>| {
            let error = error.mapv(|error| gamma * gamma * error).as_standard_layout().into_owned();
            let error = error.into_shape_with_order(value.shape()).expect("as many as the gradient");
            error + value.mapv(|value| (chain + 1.0) * value * value + tiny_sq) // E69, E70
        };
        let weight = values.weight.as_ref().map(|value| {
            let mut error = self.as_weight(of_rows.weight) * (beta * beta);
            if self.cache.dropped.is_some() {
                error += &operands.weights_of_both(chain);
            }
            let mut error = operator.stored_weight(error);
            Zip::from(&mut error).and(value).par_for_each(|error, &value| *error += 2.0 * value * value + tiny_sq); // E71
            error
        });
        let bias = values.bias.as_ref().map(|value| {
            let terms = channel_sums(dy_sq.view()).into_dyn();
            // A plain sum is added up in the type itself whatever it is, but in four parts at least.
            let chain = Storage { chain: self.storage.chain.max(512), ..self.storage }.of_sum(outputs);
            (terms + square(value)) * ((chain + 3.0) / 4.0) + tiny_sq // E72
        });
        let magnitude = values
            .adapter
            .magnitude
            .as_ref()
            .map(|value| of_rows.magnitude.into_shape_with_order(value.shape()).expect("one an entry of m"));
        Gradients {
            x: values.x.as_ref().map(|value| self.dx(value, operands, stages, du.expect("values"), &t, &t_error)),
            weight,
            bias,
            adapter: Adapter {
                lora_a: pair(lora_a, &values.adapter.lora_a),
                lora_b: pair(lora_b, &values.adapter.lora_b),
                magnitude,
                alpha: values
                    .adapter
                    .alpha
                    .as_ref()
                    .map(|value| scale(of_rows.alpha, &z_terms, layer.scaling(), value)),
                beta: values.adapter.beta.as_ref().map(|value| scale(of_rows.beta, &p_terms, 1.0, value)),
            },
        }
    }

    /// What reaches A and B by way of dV. E69, E70
    fn pair<P>(
        &self,
        rows: &Rows<'_>,
        stages: &Stages<P>,
        of_rows: &RowGradients,
        t: &Array3<f64>,
        dy: &Array3<f64>,
    ) -> [Array2<f64>; 2] {
        let Layer { operator, config, .. } = self.layer;
        let (mut left, right) = (of_rows.left.clone(), of_rows.right.clone());
        if let Some(direction) = &self.cache.direction {
            // Contracted over a row, whose elements have the errors of g and of k in common: g X right^T and V right^T.
            let direct = match config.norm_axis {
                NormAxis::Output => mix_adjoint_weight(dy.view(), self.cache.lora_output.view(), operator.groups()),
                NormAxis::Input => operator.adjoint_weight(self.cache.adapted_input(), t.view()).reversed_axes(),
            };
            let column = |values: &Array1<f64>| values.clone().insert_axis(Axis(1));
            let direct = direct * column(&direction.gain);
            left += &(square(&direct) * column(&stages.gain));
            left += &(square(&direction.weighted_right(&rows.factors)) * column(&of_rows.norm_weight));
        }
        match config.norm_axis {
            NormAxis::Output => [right, left],
            NormAxis::Input => [left.reversed_axes(), right.reversed_axes()],
        }
    }

    /// `du`, the gradient of what meets the weight, before the gains of columns; `None` for ids.
    fn du(&self, values: &Gradients<f64>, dy: &Array3<f64>, t: &Array3<f64>) -> Option<ArrayD<f64>> {
        let layer = self.layer;
        if self.cache.dropped.is_none() && layer.config.norm_axis == NormAxis::Output {
            return values.x.clone();
        }
        let h_beta = dy * &(&self.gain_out * self.beta).insert_axis(Axis(1));
        let t = t * self.gamma;
        let pairs = [(h_beta.view(), layer.weight()), (t.view(), layer.a())];
        layer.operator.adjoint_input(&self.cache.x, &pairs)
    }

    /// `sum over rows of x~^2 du^2` for every column: `[fan_in]`.
    fn column_terms(&self, du: &ArrayD<f64>) -> Array1<f64> {
        let terms = square(&(&self.cache.adapted_input().values().expect("features") * du));
        let columns = self.layer.operator.fan_in();
        let terms = terms.into_shape_with_order((du.len() / columns, columns)).expect("[outer, features]");
        terms.sum_axis(Axis(0))
    }

    /// Of dx; `t` is `H B` and `t_error` its error. E73
    fn dx<P: Scalar>(
        &self,
        dx: &ArrayD<f64>,
        operands: &Operands<O, P>,
        stages: &Stages<P>,
        du: ArrayD<f64>,
        t: &Array3<f64>,
        t_error: &Array3<f64>,
    ) -> ArrayD<f64> {
        let Self { layer, gamma, tiny_sq, .. } = *self;
        let (operator, x, chain) = (&layer.operator, &self.cache.x, self.storage.of_sum(layer.operator.units()));
        let gained_a = &layer.a() * &self.gain_in * gamma;
        let lora = operator.adjoint_input(x, &[(t.view(), gained_a.view())]).expect("values");
        let of_t = operator.power(2).adjoint_input(x, &[(t_error.view(), square(&gained_a).view())]);
        let mut error = operands.inputs(self.as_weight(stages.terms_and_merged.view()));
        let by_column = layer.config.norm_axis == NormAxis::Input;
        let du = if by_column { du * &self.gain_in } else { du };
        Zip::from(&mut error).and(&of_t.expect("values")).and(&du).and(&lora).par_for_each(
            |error, &of_t, &du, &lora| {
                *error += of_t + (du - lora).powi(2) + lora * lora;
            },
        );
        if by_column && self.cache.direction.is_some() {
            error += &(square(&du) * &stages.gain);
        }
        if let Some((mask, _)) = &self.cache.dropped {
            let kept = operands.inputs_whole(self.base().view(), chain);
            ndarray::azip!((error in &mut error, &kept in &kept, &mask in mask) {
                *error = mask * mask * (*error + kept) + 2.0 * kept;
            });
        }
        Zip::from(&mut error).and(dx).par_for_each(|error, &dx| *error += (chain + 1.0) * dx * dx + tiny_sq);
        error
    }
}
