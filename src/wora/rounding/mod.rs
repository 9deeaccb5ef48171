//! How far off a careful computation may be: the rounding errors of every intermediate that an implementation may
//! store, propagated to every result as a root of summed squares. SPEC.md, section 8.5.
//!
//! Two ways of computing are allowed for at once: the factored one, which stores `op(x, W0)`, `op(x, A)` and what is
//! made of them, and the one that stores V, W' and dW'. Errors are in unit roundoffs of the type stored in; every
//! `*_error` holds squares of them.

mod base;
mod cotangent;
mod gradients;
mod low_rank;
mod operands;
mod output;
mod row;
mod rows;
#[cfg(test)]
mod tests;

use super::{Adapter, Cache, Evaluation, Gradients, Layer, NormAxis};
use crate::Scalar;
use crate::operators::{Input, Operator, channel_products, mix_into};
use crate::wora::passes::column_sums;
use base::Base;
use cotangent::Cotangent;
use low_rank::{LowRank, Weights};
use ndarray::{
    Array1, Array2, Array3, ArrayBase, ArrayView1, ArrayView3, ArrayViewD, Axis, CowArray, Data, Dimension, Ix2, Ix3,
    RawData, Zip,
};
use operands::{Operands, Sums, Units};
use row::Summed;
use rows::{Backward, RowErrors, Rows, WeightErrors};

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
        1.0 + self.chain.min(terms.saturating_sub(1)) as f64 / 4.0
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
        // A lookup has no large products, and its factor may have any size.
        let narrow = cache.x.values().and_then(|_| passes.errors::<f32>(BLOCK));
        let Evaluation { y, weighted, weight_norm, gain, merged_weight, gradients } =
            narrow.or_else(|| passes.errors::<f64>(BLOCK)).expect("errors in f64");
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

/// How many terms an output adds up: a unit's weights, or its ranks.
fn terms_of_outputs<O: Operator>(layer: &Layer<O, f64>) -> usize {
    layer.operator.fan_in().max(layer.b().ncols())
}

/// How many the gradient of an input: units, or ranks.
fn terms_of_inputs<O: Operator>(layer: &Layer<O, f64>) -> usize {
    layer.operator.units().max(layer.a().nrows())
}

/// The least magnitude but 0 of these and 1.
fn least<'f>(factors: impl Iterator<Item = &'f f64>) -> f64 {
    factors.map(|factor| factor.abs()).filter(|factor| *factor > 0.0).fold(1.0, f64::min)
}

fn root<D: Dimension>(mut squares: ndarray::Array<f64, D>) -> ndarray::Array<f64, D> {
    squares.par_mapv_inplace(f64::sqrt);
    squares
}

fn square<S: Data<Elem = f64>, D: Dimension>(values: &ArrayBase<S, D>) -> ndarray::Array<f64, D> {
    stored(values, 0.0)
}

/// The squared errors of storing these.
fn stored<S: Data<Elem = f64>, D: Dimension>(values: &ArrayBase<S, D>, tiny_sq: f64) -> ndarray::Array<f64, D> {
    Zip::from(values).par_map_collect(|v| v * v + tiny_sq)
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
    /// What storing dy times a factor adds to its square, by that factor.
    dy_tiny_sq: f64,
    beta: f64,
    /// `alpha s`
    gamma: f64,
    /// The gains of units and of columns: at most one is not 1.
    gain_out: Array1<f64>,
    gain_in: Array1<f64>,
    /// The operator with every factor squared.
    squared: O,
    base: Base,
    /// What sums over W' add up beside W0^2.
    low_rank: LowRank,
    /// U^2, stored: `[outer, rank, inner]`
    u_sq: Array3<f64>,
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
        let (operator, tiny_sq) = (&layer.operator, storage.smallest_normal.powi(2));
        let chains = [terms_of_outputs(layer), terms_of_inputs(layer)].map(|terms| storage.of_sum(terms));
        let (beta, gamma) = (layer.beta(), layer.alpha() * layer.scaling());
        let gains = cache.direction.iter().flat_map(|direction| &direction.gain);
        let least = least([beta, gamma].iter()) * least(gains);
        Self {
            layer,
            cache,
            results,
            storage,
            squared: operator.power(2),
            base: Base::new(layer, cache, chains),
            low_rank: LowRank::new(layer.a(), layer.b(), operator.groups()),
            u_sq: stored(&cache.lora_output, tiny_sq),
            tiny_sq,
            dy_tiny_sq: tiny_sq / least.powi(2),
            beta,
            gamma,
            gain_out: or_ones(gain_out, layer.operator.units()),
            gain_in: or_ones(gain_in, layer.operator.fan_in()),
            mixed,
            dy: dy.map(|dy| in_shape(dy, shape)),
        }
    }

    /// The squared errors of every result, large products computed in P, of about `block` elements of the weight at a
    /// time; `None` where P has not the range for them.
    fn errors<P: Scalar>(&self, block: usize) -> Option<Evaluation<f64>> {
        let (layer, results, cache, axis) = (self.layer, self.results, self.cache, self.layer.config.norm_axis);
        let dy = self.dy.as_ref().map(|dy| dy.view());
        let operands = Operands::<O, P>::new(layer, cache, dy, self.dy_tiny_sq)?;
        let cotangent = match &results.gradients {
            Some(values) => Some(Cotangent::new(self, values, &operands)?),
            None => None,
        };
        let cotangent = cotangent.as_ref();
        let factors = layer.factors();
        let of_norm = self.storage.of_total(factors.base.ncols());
        let chains = [of_norm, self.chain_of_all(), self.chain_of_ranks()];
        let rows = Rows::<P>::new(factors, cache.direction.as_ref(), chains, self.tiny_sq)?;

        let of_others = if axis == NormAxis::Output { NormAxis::Input } else { NormAxis::Output };
        let is_summed = axis == NormAxis::Output || cotangent.is_some();
        let channels = if is_summed { Some(self.low_rank.channels(axis, &operands)?) } else { None };
        let terms_of_delta = cotangent.and(channels.as_ref());
        let terms_of_delta = terms_of_delta.map(|channels| self.low_rank.contracted(axis, channels, &operands));
        let is_wanted = axis == NormAxis::Input || results.gradients.as_ref().is_some_and(|all| all.x.is_some());
        let summed =
            Summed { stored: self.stored(of_others), chain: self.chain_of_outputs(), apart: self.base.of_rows() };
        let mut errors = RowErrors::none(layer.base_sq.len(), &rows.factors);
        let mut weights = self.weight_errors(&rows);
        let mut sums = Sums { outputs: None, inputs: None, base_gradient: None };
        for (range, units) in self.blocks(block) {
            if is_wanted && self.base.is_gradient_needed() {
                operands.add_base_gradient(&units, &mut sums.base_gradient);
            }
            // On the norms' side W0^2 alone is multiplied, and the sums by what rows have of their own.
            let mut squares = operands.weight_sq(&units)?;
            if is_summed {
                operands.add(axis, &units, &squares, &mut sums);
            }
            let terms_of_base = cotangent.map(|_| self.terms_of_base(&units, &sums, &operands));
            let dmerged = cotangent.map(|_| operands.dmerged(&units));
            let terms = terms_of_base.as_ref().zip(terms_of_delta.as_ref());
            let of_rows = cotangent.zip(dmerged.as_ref()).zip(terms);
            let of_rows = of_rows.map(|((cotangent, x), (terms_of_base, terms_of_delta))| Backward {
                dmerged: (self.as_weight(x.values.view()), x.scale),
                error_scale: rows.error_scale(x.scale),
                chain: cotangent.chain,
                fraction: cotangent.fraction.as_ref(),
                terms_of_base,
                terms_of_delta,
                dgain: &cotangent.dgain,
                dgain_error: &cotangent.dgain_error,
                norm_gradient: layer.config.norm_gradient,
            });
            // On the other side every element has something of its own, which takes the place of its square.
            squares.scale = 1.0;
            let mut elements = self.as_weight(squares.values.view_mut());
            elements.slice_axis_inplace(Axis(1), (..if is_wanted { elements.ncols() } else { 0 }).into());
            let magnitudes =
                rows.add(range.clone(), of_rows.as_ref(), &mut errors, weights.rows(&range), (elements, &summed))?;
            if !operands.fit(magnitudes) {
                return None;
            }
            if let Some(dmerged) = dmerged {
                operands.recycle(dmerged.values);
            }
            if is_wanted {
                operands.add(of_others, &units, &squares, &mut sums);
            }
            operands.recycle(squares.values);
        }

        let gradients = match results.gradients.as_ref().zip(cotangent) {
            Some(of) => Some((of, self.gradients(of.0, of.1, &errors, &rows, &operands)?)),
            None => None,
        };
        let WeightErrors { weighted, merged, dweighted } = weights;
        let Sums { outputs, inputs, base_gradient } = sums;
        let stored = |rows: Array2<f64>| layer.operator.stored_weight(self.as_weight(rows));
        let per_norm = |relative: &Array1<f64>, of: &Option<Array1<f64>>| of.as_ref().map(|of| relative * &square(of));
        let (of_y, of_dx) = match axis {
            NormAxis::Output => (channels, None),
            NormAxis::Input => (None, channels),
        };
        Some(Evaluation {
            y: self.y(outputs.expect("sums"), of_y, &errors.gain, &operands),
            weighted: results.weighted.as_ref().map(|_| stored(weighted)),
            weight_norm: per_norm(&errors.norm, &results.weight_norm),
            gain: per_norm(&errors.gain, &results.gain),
            merged_weight: results.merged_weight.as_ref().map(|_| stored(merged)),
            gradients: gradients.map(|((values, cotangent), others)| {
                let x = values.x.as_ref().zip(inputs);
                let x = x.map(|(dx, inputs)| {
                    self.dx(dx, (inputs, base_gradient), of_dx.as_ref(), &errors.gain, cotangent, &operands)
                });
                let weight = values.weight.as_ref().map(|value| self.dweight(value, dweighted, cotangent, &operands));
                Gradients { x, weight, ..others }
            }),
        })
    }

    /// The squared terms of X contracted row by row with `W0^2`, by way of the sums of some units that have that in them.
    fn terms_of_base<P: Scalar>(&self, units: &Units, sums: &Sums<P>, operands: &Operands<'_, O, P>) -> Array1<f64> {
        match self.layer.config.norm_axis {
            NormAxis::Output => {
                let (dy, sums) = (operands.dy_sq_of(units), sums.outputs.as_ref().expect("sums"));
                let terms = channel_products(dy.values, units.slice(sums.values.view()));
                terms.mapv(|terms| sums.scale * dy.scale * terms.as_f64())
            }
            NormAxis::Input => {
                let (x, sums) = (operands.x_sq(), sums.inputs.as_ref().expect("sums"));
                let scale = sums.scale * x.scale;
                let product = |sum: &P, x: &P| scale * sum.as_f64() * x.as_f64();
                column_sums(Zip::from(&sums.values).and(x.values.values().expect("features")).par_map_collect(product))
            }
        }
    }

    /// Room for the errors of whole weights, where they are wanted.
    fn weight_errors<P>(&self, rows: &Rows<'_, P>) -> WeightErrors<Array2<f64>> {
        let (norms, columns) = rows.factors.base.dim();
        let weight = |wanted: bool| Array2::zeros((norms, if wanted { columns } else { 0 }));
        let Evaluation { weighted, merged_weight, gradients, .. } = self.results;
        let dweight = gradients.as_ref().and_then(|gradients| gradients.weight.as_ref());
        WeightErrors {
            weighted: weight(weighted.is_some()),
            merged: weight(merged_weight.is_some()),
            dweighted: weight(dweight.is_some()),
        }
    }

    /// How often W' is stored among what a sum adds up: in y once, and once more in dx, which reads it again.
    fn stored(&self, side: NormAxis) -> f64 {
        if side == NormAxis::Output { 1.0 } else { 2.0 }
    }

    /// What the squares that a sum over W' adds up on the norms' side are multiplied by, row by row: W0^2, and those of
    /// low rank. The error of a gain is none of their own: all terms of such a sum share it. E151
    fn of_squares(&self) -> (Array1<f64>, Weights) {
        let axis = self.layer.config.norm_axis;
        let gain = self.cache.direction.as_ref().map(|direction| direction.gain.view());
        let g_sq = gain.map_or_else(|| Array1::ones(self.layer.base_sq.len()), |gain| square(&gain));
        let often = self.stored(axis) + self.chain_of_outputs();
        let (gamma_sq, tiny_sq, of_ranks) = (self.gamma * self.gamma, self.tiny_sq, self.chain_of_ranks());
        let weights = Weights {
            delta: &g_sq * ((of_ranks + 5.0) * often * gamma_sq),
            terms: &g_sq * (of_ranks * often * gamma_sq),
            ones: (&g_sq * (gamma_sq + 1.0) + 1.0) * (often * tiny_sq),
        };
        (g_sq * (5.0 * often * self.beta * self.beta), weights)
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
        self.storage.of_sum(terms_of_outputs(self.layer))
    }

    /// The chain of a sum over units, as gradients of inputs are.
    fn chain_of_inputs(&self) -> f64 {
        self.storage.of_sum(terms_of_inputs(self.layer))
    }

    /// The chain of a sum over the ranks that a unit has.
    fn chain_of_ranks(&self) -> f64 {
        self.storage.of_sum(self.layer.b().ncols())
    }

    /// The chain of a sum over all of the weight.
    fn chain_of_all(&self) -> f64 {
        self.storage.of_total(self.layer.base.weight.len())
    }

    fn dy(&self) -> ArrayView3<'_, f64> {
        self.dy.as_ref().expect("a cotangent").view()
    }
}
