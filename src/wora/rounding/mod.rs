//! How far off a careful computation may be: the rounding errors of every intermediate that an implementation may
//! store, propagated to every result as a root of summed squares. SPEC.md, section 8.5.
//!
//! Two ways of computing are allowed for at once: the factored one, which stores `op(x, W0)`, `op(x, A)` and what is
//! made of them, and the one that stores V, W' and dW'. Errors are in unit roundoffs of the type stored in; every
//! `*_error` holds squares of them.

mod cotangent;
mod operands;
mod row;
mod rows;
#[cfg(test)]
mod tests;

use super::{Adapter, Cache, Evaluation, Gradients, Layer, NormAxis};
use crate::Scalar;
use crate::operators::{Input, Operator, channel_sums, in_standard_layout, mix_adjoint_weight, mix_into};
use cotangent::Cotangent;
use ndarray::{
    Array1, Array2, Array3, ArrayBase, ArrayD, ArrayView1, ArrayView3, ArrayViewD, Axis, CowArray, Data, Dimension,
    Ix2, Ix3, RawData, Zip,
};
use operands::{Magnitudes, Operands, Units};
use rows::{Backward, RowErrors, Rows, Terms, WeightErrors};

/// So many elements of the weight are looked at together.
const BLOCK: usize = 1 << 21;

/// The type that intermediates are stored in, as far as it decides how far off results may be.
///
/// ```
/// use ndarray::array;
/// use rand::SeedableRng;
/// use woracle::{operators::Linear, oracle::Dtype};
/// use woracle::wora::{Base, Config, Evaluation, Layer, LoraInit, Method};
/// let operator = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
/// let base = Base { weight: array![[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]].into_dyn().into(), bias: None };
/// let mut rng = rand_pcg::Pcg64::seed_from_u64(1);
/// let layer = Layer::init(operator, Config::new(Method::Wora, 2.0), base, 1, LoraInit::default(), &mut rng)?;
/// let x = array![[1.0, 1.0, 1.0]].into_dyn();
/// let (y, cache) = layer.forward(x.view().into(), None)?; // [[5, 7]]
/// let results =
///     Evaluation { y, weighted: None, weight_norm: None, gain: None, merged_weight: None, gradients: None };
/// let errors = layer.rounding(&cache, None, &results, Dtype::F32.storage());
/// // In unit roundoffs of f32: a careful computation of y = 7 is off by a few of its roundings and no more.
/// assert!(errors.y.iter().all(|&error| 1.0 < error && error < 100.0));
/// assert!(errors.weighted.is_none()); // nothing is said of what is not asked
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Storage {
    /// Numbers below the smallest normal one are no closer to each other than those just above it.
    pub smallest_normal: f64,
    /// How many terms a sum may add up one after the other in the type itself; 0 where sums are kept in a wider one.
    pub chain: usize,
    /// The same for a norm or a sum over all of an array, which hardly anyone adds up one by one but in the widest
    /// type.
    pub total_chain: usize,
}

impl Storage {
    /// What the squares of a sum's terms are multiplied by: the sum's own rounding, and that of adding its terms up
    /// in a row, whose squared errors come to a quarter of the terms' squares for each.
    fn of_sum(self, terms: usize) -> f64 {
        1.0 + self.chain.min(terms) as f64 / 4.0
    }

    /// The same for a norm or a sum over all of an array.
    fn of_total(self, terms: usize) -> f64 {
        Self { chain: self.total_chain, ..self }.of_sum(terms)
    }
}

impl<O: Operator> Layer<O, f64> {
    /// The rounding error to expect of every result: the root of the summed squares, in unit roundoffs. SPEC.md, section 8.5
    ///
    /// `results` are the results of the forward that left `cache`, and of the backward at `dy`, in the shape of y.
    /// Errors are given of what the results hold, each in the shape of its result.
    ///
    /// # Panics
    ///
    /// If the results, the cache and dy are not of one pass of this layer.
    pub fn rounding(
        &self,
        cache: &Cache<'_, O, f64>,
        dy: Option<ArrayViewD<'_, f64>>,
        results: &Evaluation<f64>,
        storage: Storage,
    ) -> Evaluation<f64> {
        let passes = Passes::new(self, cache, dy, results, storage);
        let cotangent = results.gradients.as_ref().map(|values| Cotangent::new(&passes, values));
        // A lookup has no large products, and its factor may have any size.
        let narrow = cache.x.values().and_then(|_| passes.errors::<f32>(cotangent.as_ref(), BLOCK));
        let Evaluation { y, weighted, weight_norm, gain, merged_weight, gradients } =
            narrow.or_else(|| passes.errors::<f64>(cotangent.as_ref(), BLOCK)).expect("errors in f64");
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

fn root<D: Dimension>(mut squares: ndarray::Array<f64, D>) -> ndarray::Array<f64, D> {
    squares.par_mapv_inplace(f64::sqrt);
    squares
}

fn square<S: Data<Elem = f64>, D: Dimension>(values: &ArrayBase<S, D>) -> ndarray::Array<f64, D> {
    Zip::from(values).par_map_collect(|v| v * v)
}

/// The same values in another shape: copied only where they lie in another order.
fn in_shape(values: ArrayViewD<'_, f64>, shape: (usize, usize, usize)) -> CowArray<'_, f64, Ix3> {
    if values.is_standard_layout() {
        return values.into_shape_with_order(shape).expect("as many elements").into();
    }
    values.to_shape(shape).expect("as many elements").into_owned().into()
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
    dy: Option<CowArray<'a, f64, Ix3>>,
}

impl<'a, 'x, O: Operator> Passes<'a, 'x, O> {
    fn new(
        layer: &'a Layer<O, f64>,
        cache: &'a Cache<'x, O, f64>,
        dy: Option<ArrayViewD<'a, f64>>,
        results: &'a Evaluation<f64>,
        storage: Storage,
    ) -> Self {
        let shape = cache.base_output.dim();
        let mut mixed = Array3::zeros(shape);
        mix_into(mixed.view_mut(), layer.b(), cache.lora_output.view(), layer.operator.groups());
        let gain = cache.direction.as_ref().map(|direction| direction.gain.view());
        let (gain_in, gain_out) = layer.split_gain(gain);
        let or_ones = |gain: Option<ArrayView1<'_, f64>>, length| {
            gain.map_or_else(|| Array1::ones(length), |gain| gain.to_owned())
        };
        Self {
            layer,
            cache,
            results,
            storage,
            tiny_sq: storage.smallest_normal.powi(2),
            beta: layer.beta(),
            gamma: layer.alpha() * layer.scaling(),
            gain_out: or_ones(gain_out, layer.operator.units()),
            gain_in: or_ones(gain_in, layer.operator.fan_in()),
            mixed,
            dy: dy.map(|dy| in_shape(dy, shape)),
        }
    }

    /// The squared errors of every result, large products computed in P, of about `block` elements of the weight at a
    /// time; `None` where P has not the range for them.
    fn errors<P: Scalar>(&self, cotangent: Option<&Cotangent>, block: usize) -> Option<Evaluation<f64>> {
        let (layer, results, cache) = (self.layer, self.results, self.cache);
        let operands = Operands::<O, P>::new(&layer.operator, cache, self.dy.as_ref().map(|dy| dy.view()));
        let factors = layer.factors();
        let of_norm = self.storage.of_total(factors.base.ncols());
        let rows = Rows::new(factors, cache.direction.as_ref(), [of_norm, self.chain_of_all()], self.tiny_sq);
        let of_base = cache
            .dropped
            .as_ref()
            .map_or(Magnitudes::NONE, |_| Magnitudes::of_array(layer.base.weight.view()).squared());
        let chain = self.chain_of_outputs();

        let mut sums = Sums::new(self, &rows);
        let blocks = self.blocks(block);
        let mut terms = Terms::<P>::new(blocks[0].0.len(), rows.factors.base.ncols(), sums.x.is_some());
        for (range, units) in blocks {
            let dmerged = cotangent.map(|_| operands.weights(&units));
            let of_rows = cotangent.zip(dmerged.as_ref()).map(|(cotangent, [x, terms])| Backward {
                dmerged: (self.as_weight(x.0.view()), x.1),
                dmerged_terms: (self.as_weight(terms.0.view()), terms.1),
                chain: cotangent.chain,
                fraction: cotangent.fraction.as_ref(),
                dgain: &cotangent.dgain,
                dgain_error: &cotangent.dgain_error,
                norm_gradient: layer.config.norm_gradient,
            });
            let weights = sums.weights.rows(&range);
            terms.truncate(range.len());
            let magnitudes = rows.add(range, chain, of_rows.as_ref(), &mut sums.rows, weights, &mut terms);
            if !operands.fit(magnitudes.and(of_base)) {
                return None;
            }
            operands.add_outputs(&units, self.as_weight(terms.of_outputs.view()), sums.y.view_mut());
            if let Some(dx) = &mut sums.x {
                operands.add_inputs(&units, self.as_weight(terms.of_inputs.view()), dx);
            }
            if let Some(dmerged) = dmerged {
                operands.recycle(dmerged);
            }
        }

        let Sums { rows: errors, weights: WeightErrors { weighted, merged, dweighted }, y, x } = sums;
        let stored = |rows: Array2<f64>| layer.operator.stored_weight(self.as_weight(rows));
        let per_norm = |relative: &Array1<f64>, of: &Option<Array1<f64>>| of.as_ref().map(|of| relative * &square(of));
        Some(Evaluation {
            y: self.y(y, &errors.gain, &operands),
            weighted: results.weighted.as_ref().map(|_| stored(weighted)),
            weight_norm: per_norm(&errors.norm, &results.weight_norm),
            gain: per_norm(&errors.gain, &results.gain),
            merged_weight: results.merged_weight.as_ref().map(|_| stored(merged)),
            gradients: results.gradients.as_ref().zip(cotangent).map(|(values, cotangent)| {
                let x =
                    values.x.as_ref().zip(x).map(|(dx, terms)| self.dx(dx, terms, &errors.gain, cotangent, &operands));
                let weight =
                    values.weight.as_ref().map(|value| self.dweight(value, dweighted, cotangent.chain, &operands));
                Gradients { x, weight, ..self.gradients(values, cotangent, &errors, &rows) }
            }),
        })
    }

    /// The rows of the weight that are looked at together, and the units that they belong to: few enough to stay in the
    /// cache, where units are independent of each other.
    fn blocks(&self, block: usize) -> Vec<(std::ops::Range<usize>, Units)> {
        let (units, fan_in) = self.layer.weight().dim();
        let operator = &self.layer.operator;
        if self.layer.config.norm_axis == NormAxis::Input || operator.of_units(1).is_none() {
            return vec![(0..self.layer.base_sq.len(), Units::all(units))];
        }
        Units::in_blocks(units, block.div_ceil(fan_in)).map(|units| (units.range.clone(), units)).collect()
    }

    /// `[rows, columns]` as `[units, fan_in]`, or the other way round.
    fn as_weight<S: RawData>(&self, rows: ArrayBase<S, Ix2>) -> ArrayBase<S, Ix2> {
        if self.layer.config.norm_axis == NormAxis::Output { rows } else { rows.reversed_axes() }
    }

    /// The chain of a sum over a unit's weights, as outputs are.
    fn chain_of_outputs(&self) -> f64 {
        self.storage.of_sum(self.layer.operator.fan_in())
    }

    /// The chain of a sum over units, as gradients of inputs are.
    fn chain_of_inputs(&self) -> f64 {
        self.storage.of_sum(self.layer.operator.units())
    }

    /// The chain of a sum over all of the weight.
    fn chain_of_all(&self) -> f64 {
        self.storage.of_total(self.layer.base.weight.len())
    }

    fn dy(&self) -> ArrayView3<'_, f64> {
        self.dy.as_ref().expect("a cotangent").view()
    }

    /// W0 in the type that products are computed in.
    fn base<P: Scalar>(&self) -> Array2<P> {
        self.layer.weight().mapv(P::from_f64)
    }

    /// Of y, in its shape, from what the terms of W' add up to. E61
    fn y<P: Scalar>(&self, mut error: Array3<f64>, gain_error: &Array1<f64>, operands: &Operands<O, P>) -> ArrayD<f64> {
        let Self { layer, beta, gamma, tiny_sq, .. } = *self;
        let (p, chain) = (&self.cache.base_output, self.chain_of_outputs());
        let gained_sq = square(&(&layer.b() * &(&self.gain_out * gamma).insert_axis(Axis(1))));
        let u_error = square(&self.cache.lora_output) * chain;
        mix_into(error.view_mut(), gained_sq.view(), u_error.view(), layer.operator.groups());
        if self.cache.dropped.is_some() {
            error += &operands.outputs_of_both(self.base().view(), chain);
        }
        let shared = match layer.config.norm_axis {
            NormAxis::Output => gain_error.clone(),
            NormAxis::Input => Array1::zeros(p.len_of(Axis(1))),
        };
        let bias = layer.base.bias.as_ref();
        let y = self.results.y.view().into_shape_with_order(p.dim()).expect("as many as P");
        // Where there is one inner position this has the shape of an outer one, which is then gone through as one row.
        let of_unit = Array2::from_shape_fn((p.len_of(Axis(1)), 1), |(i, _)| {
            (self.gain_out[i], shared[i], bias.map_or(0.0, |bias| bias[i]))
        });
        let outer =
            Zip::from(error.outer_iter_mut()).and(p.outer_iter()).and(self.mixed.outer_iter()).and(y.outer_iter());
        outer.par_for_each(|error, p, z, y| {
            let all = Zip::from(error).and(p).and(z).and(y).and_broadcast(&of_unit);
            all.for_each(|error, &p, &z, &y, &(g, shared, b)| {
                let (base, lora) = (g * beta * p, g * gamma * z);
                let stored = p * p + base * base + 2.0 * lora * lora;
                *error += stored + shared * (base + lora).powi(2) + chain * y * y + b * b + tiny_sq;
            });
        });
        error.into_shape_with_order(self.results.y.shape()).expect("as many as y")
    }

    /// Of the gradients beside those of x and of W0.
    fn gradients(
        &self,
        values: &Gradients<f64>,
        cotangent: &Cotangent,
        errors: &RowErrors,
        rows: &Rows<'_>,
    ) -> Gradients<f64> {
        let Self { layer, gamma, tiny_sq, .. } = *self;
        let (operator, adapter) = (&layer.operator, &values.adapter);
        let Cotangent { chain, dy_sq, t, t_error, p_terms, z_terms, .. } = cotangent;
        let (of_outputs, gain_sq) = (self.chain_of_outputs(), square(&self.gain_out));
        let of_all = self.chain_of_all();
        let [of_unit, of_weight] = [cotangent.outputs, operator.fan_in()].map(|terms| self.storage.of_total(terms));
        let in_a_row = of_unit + of_weight + 1.0;
        let scale = |error: f64, terms: &Array1<f64>, factor: f64, value: &ArrayD<f64>| {
            let error = error + in_a_row * gain_sq.dot(terms);
            value.mapv(|value| factor * factor * error + (1.0 + of_all) * value * value + tiny_sq) // E68
        };
        let [lora_a, lora_b] = self.pair(rows, errors, t);
        let u_sq = square(&self.cache.lora_output);
        let of_u =
            mix_adjoint_weight(dy_sq.view(), u_sq.view(), operator.groups()) * gain_sq.view().insert_axis(Axis(1));
        let lora_b = lora_b + of_u * (chain + of_outputs + 1.0); // E69
        let x_sq = self.cache.adapted_input();
        let x_sq = x_sq
            .values()
            .and_then(|x| O::Input::from_values(Zip::from(x).par_map_collect(|x| x * x)))
            .unwrap_or_else(|| x_sq.clone());
        let mut of_t = operator.power(2).adjoint_weight(&x_sq, t_error.view()) * square(&self.gain_in) * (chain + 2.0);
        if let Some(fraction) = &cotangent.fraction {
            of_t *= &square(fraction);
        }
        let lora_a = lora_a + of_t; // E70
        let pair = |error: Array2<f64>, value: &ArrayD<f64>| {
            let error = in_standard_layout(error * (gamma * gamma));
            let error = error.into_shape_with_order(value.shape()).expect("as many as the gradient");
            error + value.mapv(|value| (chain + 1.0) * value * value + tiny_sq) // E69, E70
        };
        let bias = values.bias.as_ref().map(|value| {
            let terms = channel_sums(dy_sq.view()).into_dyn();
            // A plain sum is added up in the type itself whatever it is, but in four parts at least.
            let chain = Storage { chain: self.storage.chain.max(512), ..self.storage }.of_sum(cotangent.outputs);
            (terms + square(value)) * ((chain + 3.0) / 4.0) + tiny_sq // E72
        });
        let magnitude = adapter
            .magnitude
            .as_ref()
            .map(|value| errors.magnitude.clone().into_shape_with_order(value.shape()).expect("one an entry of m"));
        let (alpha, beta) = (adapter.alpha.as_ref(), adapter.beta.as_ref());
        Gradients {
            x: None,
            weight: None,
            bias,
            adapter: Adapter {
                lora_a: pair(lora_a, &adapter.lora_a),
                lora_b: pair(lora_b, &adapter.lora_b),
                magnitude,
                alpha: alpha.map(|value| scale(errors.alpha, z_terms, layer.scaling(), value)),
                beta: beta.map(|value| scale(errors.beta, p_terms, 1.0, value)),
            },
        }
    }

    /// Of dW0, from what its rows have of dV. E71
    fn dweight<P: Scalar>(
        &self,
        dweight: &ArrayD<f64>,
        dweighted: Array2<f64>,
        chain: f64,
        operands: &Operands<O, P>,
    ) -> ArrayD<f64> {
        let Self { layer, beta, tiny_sq, .. } = *self;
        let mut error = layer.operator.stored_weight(self.as_weight(dweighted));
        let beta_sq = beta * beta;
        Zip::from(&mut error).and(dweight).par_for_each(|error, &value| {
            *error = beta_sq * *error + 2.0 * value * value + tiny_sq; // E71
        });
        if self.cache.dropped.is_some() {
            error += &layer.operator.stored_weight(operands.weights_of_both(chain)); // E71
        }
        error
    }

    /// What reaches A and B by way of dV. E69, E70
    fn pair(&self, rows: &Rows<'_>, errors: &RowErrors, t: &Array3<f64>) -> [Array2<f64>; 2] {
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

    /// Of dx, from what the terms of W' add up to. E73
    fn dx<P: Scalar>(
        &self,
        dx: &ArrayD<f64>,
        mut error: ArrayD<f64>,
        gain_error: &Array1<f64>,
        cotangent: &Cotangent,
        operands: &Operands<O, P>,
    ) -> ArrayD<f64> {
        let Self { layer, gamma, tiny_sq, .. } = *self;
        let (operator, x, chain) = (&layer.operator, &self.cache.x, self.chain_of_inputs());
        let gained_a = &layer.a() * &self.gain_in * gamma;
        let Cotangent { t, t_error, du, .. } = cotangent;
        let (lora, du) =
            (operator.adjoint_input(x, &[(t.view(), gained_a.view())]).expect("values"), du.as_ref().expect("values"));
        let of_t = operator.power(2).adjoint_input(x, &[(t_error.view(), square(&gained_a).view())]);
        let by_column = layer.config.norm_axis == NormAxis::Input;
        let du: CowArray<'_, _, _> = if by_column { (du * &self.gain_in).into() } else { du.into() };
        Zip::from(&mut error).and(&of_t.expect("values")).and(&du).and(&lora).par_for_each(
            |error, &of_t, &du, &lora| {
                *error += of_t + (du - lora).powi(2) + lora * lora;
            },
        );
        if by_column && self.cache.direction.is_some() {
            error += &(du.mapv(|du| du * du) * gain_error);
        }
        if let Some((mask, _)) = &self.cache.dropped {
            let kept = operands.inputs_of_both(self.base().view(), chain);
            ndarray::azip!((error in &mut error, &kept in &kept, &mask in mask) {
                *error = mask * mask * (*error + kept) + 2.0 * kept;
            });
        }
        Zip::from(&mut error).and(dx).par_for_each(|error, &dx| *error += (chain + 1.0) * dx * dx + tiny_sq);
        error
    }
}

/// What the blocks of the weight add up to.
struct Sums {
    rows: RowErrors,
    weights: WeightErrors<Array2<f64>>,
    /// What W' alone adds to the error of y: `[outer, units, inner]`
    y: Array3<f64>,
    /// And of dx.
    x: Option<ArrayD<f64>>,
}

impl Sums {
    fn new<O: Operator>(passes: &Passes<'_, '_, O>, rows: &Rows<'_>) -> Self {
        let (norms, columns) = rows.factors.base.dim();
        let weight = |wanted: bool| Array2::zeros((norms, if wanted { columns } else { 0 }));
        let Evaluation { weighted, merged_weight, gradients, .. } = passes.results;
        let dx = gradients.as_ref().and_then(|gradients| gradients.x.as_ref());
        let dweight = gradients.as_ref().and_then(|gradients| gradients.weight.as_ref());
        Self {
            rows: RowErrors::none(norms, &rows.factors),
            weights: WeightErrors {
                weighted: weight(weighted.is_some()),
                merged: weight(merged_weight.is_some()),
                dweighted: weight(dweight.is_some()),
            },
            y: Array3::zeros(passes.mixed.dim()),
            x: dx.map(|dx| ArrayD::zeros(dx.shape())),
        }
    }
}
