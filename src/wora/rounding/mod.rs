//! How far off a careful computation may be: the rounding errors of every intermediate that an implementation may
//! store, propagated to every result as a root of summed squares. SPEC.md, section 8.5.
//!
//! Two ways of computing are allowed for at once: the factored one, which stores `op(x, W0)`, `op(x, A)` and what is
//! made of them, and the one that stores V, W' and dW'. Errors are in unit roundoffs of the type stored in; every
//! `*_error` holds squares of them.

mod base;
mod cotangent;
mod low_rank;
mod operands;
mod row;
mod rows;
#[cfg(test)]
mod tests;

use super::{Adapter, Cache, Evaluation, Gradients, Layer, NormAxis};
use crate::Scalar;
use crate::operators::{
    Input, Operator, channel_products, channel_sums, in_standard_layout, mix_adjoint_weight, mix_into,
};
use crate::wora::passes::column_sums;
use base::Base;
use cotangent::Cotangent;
use low_rank::{Channels, LowRank, Mixed, Weights};
use ndarray::{
    Array1, Array2, Array3, ArrayBase, ArrayD, ArrayView1, ArrayView3, ArrayViewD, Axis, CowArray, Data, Dimension,
    Ix2, Ix3, IxDyn, RawData, Zip,
};
use operands::{Operands, Scaled, Units};
use row::Summed;
use rows::{Backward, RowErrors, Rows, WeightErrors};

/// So many elements of the weight are looked at together.
const BLOCK: usize = 1 << 22;

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

/// What the squares that make up the error of an output are multiplied by, where the sums of W' are there already. E61
struct OfUnit {
    sums: f64,
    mixed: f64,
    base_sq: f64,
    both: f64,
    lora_sq: f64,
    y_sq: f64,
    once: f64,
}

/// The errors of one outer position, `[units, inner]`, from what sums, P, Z and y add to them.
fn outputs<P: Scalar>(units: &[OfUnit], [sums, mixed]: [&[P]; 2], [p, z, y]: [&[f64]; 3], error: &mut [f64]) {
    let inner = error.len() / units.len().max(1);
    let at = |place: usize, unit: &OfUnit| {
        let OfUnit { sums: of_sums, mixed: of_mixed, base_sq, both, lora_sq, y_sq, once } = unit;
        let (sums, mixed) = (of_sums * sums[place].as_f64(), of_mixed * mixed[place].as_f64());
        let (p, z, y) = (p[place], z[place], y[place]);
        sums + mixed + base_sq * p * p + both * p * z + lora_sq * z * z + y_sq * y * y + once // E61
    };
    for (i, unit) in units.iter().enumerate() {
        for (place, error) in error[i * inner..(i + 1) * inner].iter_mut().enumerate() {
            *error = at(i * inner + place, unit);
        }
    }
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
    fn errors<P: Scalar>(&self, cotangent: Option<&Cotangent>, block: usize) -> Option<Evaluation<f64>> {
        let (layer, results, cache, axis) = (self.layer, self.results, self.cache, self.layer.config.norm_axis);
        let dy = self.dy.as_ref().map(|dy| dy.view());
        let operands = Operands::<O, P>::new(&layer.operator, layer.weight(), cache, dy, self.dy_tiny_sq)?;
        let factors = layer.factors();
        let of_norm = self.storage.of_total(factors.base.ncols());
        let chains = [of_norm, self.chain_of_all(), self.chain_of_ranks()];
        let rows = Rows::new(factors, cache.direction.as_ref(), chains, self.tiny_sq);

        // On the norms' side W0^2 alone is multiplied, and the sums by what rows have of their own.
        let mut squares = operands.weight_sq();
        let is_summed = axis == NormAxis::Output || cotangent.is_some();
        let channels = if is_summed { Some(self.low_rank.channels(axis, &operands)?) } else { None };
        let by_norm = is_summed.then(|| match axis {
            NormAxis::Output => operands.outputs(&squares).into_dyn(),
            NormAxis::Input => operands.inputs(&squares),
        });
        // On the other side every element has something of its own, which takes the place of its square.
        let is_wanted = axis == NormAxis::Input || results.gradients.as_ref().is_some_and(|all| all.x.is_some());
        squares.scale = 1.0;
        let mut elements = self.as_weight(squares.values.view_mut());
        elements.slice_axis_inplace(Axis(1), (..if is_wanted { elements.ncols() } else { 0 }).into());
        let summed = Summed {
            stored: self.stored(if axis == NormAxis::Output { NormAxis::Input } else { NormAxis::Output }),
            chain: self.chain_of_outputs(),
            apart: if let Base::Summed(of) = &self.base { Some(&of.gradient * 3.0) } else { None },
        };
        let sums = cotangent.and(by_norm.as_ref()).zip(channels.as_ref());
        let terms = sums.map(|(of_base, channels)| self.terms(of_base, channels, &operands));
        let mut errors = RowErrors::none(layer.base_sq.len(), &rows.factors);
        let mut weights = self.weight_errors(&rows);
        for (range, units) in self.blocks(block) {
            let dmerged = cotangent.map(|_| operands.dmerged(&units));
            let of_rows = cotangent.zip(dmerged.as_ref()).zip(terms.as_ref());
            let of_rows = of_rows.map(|((cotangent, x), [terms_of_base, terms_of_delta])| Backward {
                dmerged: (self.as_weight(x.values.view()), x.scale),
                chain: cotangent.chain,
                fraction: cotangent.fraction.as_ref(),
                terms_of_base,
                terms_of_delta,
                dgain: &cotangent.dgain,
                dgain_error: &cotangent.dgain_error,
                norm_gradient: layer.config.norm_gradient,
            });
            let of_units = elements.slice_axis_mut(Axis(0), range.clone().into());
            let magnitudes =
                rows.add(range.clone(), of_rows.as_ref(), &mut errors, weights.rows(&range), (of_units, &summed));
            if !operands.fit(magnitudes) {
                return None;
            }
            if let Some(dmerged) = dmerged {
                operands.recycle(dmerged.values);
            }
        }

        let gradients = match results.gradients.as_ref().zip(cotangent) {
            Some(of) => Some((of, self.gradients(of.0, of.1, &errors, &rows, &operands)?)),
            None => None,
        };
        let WeightErrors { weighted, merged, dweighted } = weights;
        let stored = |rows: Array2<f64>| layer.operator.stored_weight(self.as_weight(rows));
        let per_norm = |relative: &Array1<f64>, of: &Option<Array1<f64>>| of.as_ref().map(|of| relative * &square(of));
        let (y_sums, dx_sums) = match axis {
            NormAxis::Output => (by_norm, is_wanted.then(|| operands.inputs(&squares))),
            NormAxis::Input => (Some(operands.outputs(&squares).into_dyn()), by_norm),
        };
        let (of_y, of_dx) = match axis {
            NormAxis::Output => (channels, None),
            NormAxis::Input => (None, channels),
        };
        Some(Evaluation {
            y: self.y(y_sums.expect("sums"), of_y, &errors.gain, &operands),
            weighted: results.weighted.as_ref().map(|_| stored(weighted)),
            weight_norm: per_norm(&errors.norm, &results.weight_norm),
            gain: per_norm(&errors.gain, &results.gain),
            merged_weight: results.merged_weight.as_ref().map(|_| stored(merged)),
            gradients: gradients.map(|((values, cotangent), others)| {
                let x = values.x.as_ref().zip(dx_sums);
                let x = x.map(|(dx, sums)| self.dx(dx, sums, of_dx.as_ref(), &errors.gain, cotangent, &operands));
                let weight = values.weight.as_ref().map(|value| self.dweight(value, dweighted, cotangent, &operands));
                Gradients { x, weight, ..others }
            }),
        })
    }

    /// The squared terms of X contracted row by row with `W0^2` and with `D^2`, by way of the sums that have those in them.
    fn terms<P: Scalar>(
        &self,
        of_base: &Scaled<ArrayD<P>>,
        channels: &Channels<P>,
        operands: &Operands<'_, O, P>,
    ) -> [Array1<f64>; 2] {
        let axis = self.layer.config.norm_axis;
        let sums = of_base.values.view();
        let base = match axis {
            NormAxis::Output => {
                let dy = operands.dy_sq();
                let terms = channel_products(dy.values, sums.into_dimensionality().expect("as P has"));
                terms.mapv(|terms| of_base.scale * dy.scale * terms.as_f64())
            }
            NormAxis::Input => {
                let x = operands.x_sq();
                let scale = of_base.scale * x.scale;
                let product = |sum: &P, x: &P| scale * sum.as_f64() * x.as_f64();
                column_sums(Zip::from(sums).and(x.values.values().expect("features")).par_map_collect(product))
            }
        };
        [base, self.low_rank.contracted(axis, channels, operands)]
    }

    /// Room for the errors of whole weights, where they are wanted.
    fn weight_errors(&self, rows: &Rows<'_>) -> WeightErrors<Array2<f64>> {
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

    /// Of y, in its shape, from what it adds up of squares. E61
    fn y<P: Scalar>(
        &self,
        sums: Scaled<ArrayD<P>>,
        channels: Option<Channels<P>>,
        gain_error: &Array1<f64>,
        operands: &Operands<'_, O, P>,
    ) -> ArrayD<f64> {
        let Self { layer, beta, gamma, tiny_sq, .. } = *self;
        let (p, chain) = (&self.cache.base_output, self.chain_of_outputs());
        let groups = layer.operator.groups();
        let units = p.len_of(Axis(1));
        let ((of_base, of_delta), (mixed, whole), shared) = match channels {
            Some(channels) => {
                let (of_base, weights) = self.of_squares();
                let of_ranks = self.chain_of_ranks();
                let share = chain / ((self.stored(NormAxis::Output) + chain) * of_ranks);
                let mixed = self.low_rank.outputs(channels, &weights, (self.u_sq.view(), share));
                ((of_base, weights.delta), mixed, gain_error.clone())
            }
            None => {
                let gained_sq = square(&(&layer.b() * &(&self.gain_out * gamma).insert_axis(Axis(1))));
                let u_error = Scaled::<Array3<P>>::of((&self.u_sq * chain).view());
                let as_it_is = || Array1::ones(units);
                let weights = Weights { delta: as_it_is(), terms: as_it_is(), ones: as_it_is() };
                let mixed = low_rank::mix((gained_sq.view(), 0, gained_sq.ncols()), &weights, &u_error, groups);
                ((weights.ones, weights.delta), (mixed, None), Array1::zeros(units))
            }
        };
        let Mixed { sums: mixed, scales } = mixed;
        let bias = layer.base.bias.as_ref();
        let apart = if let Base::Summed(of) = &self.base { [of.output, 1.0] } else { [0.0; 2] }; // E152
        let y = self.results.y.view().into_shape_with_order(p.dim()).expect("as many as P");
        let of_unit = |i: usize| {
            let (base, lora, shared) = (self.gain_out[i] * beta, self.gain_out[i] * gamma, shared[i]);
            OfUnit {
                sums: (of_base[i] + apart[0]) * sums.scale,
                mixed: scales[i],
                base_sq: 1.0 + apart[1] + (1.0 + shared) * base * base,
                both: 2.0 * shared * base * lora,
                lora_sq: (2.0 + shared) * lora * lora,
                y_sq: chain,
                once: bias.map_or(0.0, |bias| bias[i] * bias[i]) + tiny_sq,
            }
        };
        let units: Vec<_> = (0..units).map(of_unit).collect();
        let sums = sums.values.into_dimensionality::<Ix3>().expect("as P has");
        let mut error = Array3::zeros(p.dim());
        let outer = Zip::from(error.outer_iter_mut()).and(sums.outer_iter()).and(mixed.outer_iter());
        let outer = outer.and(p.outer_iter()).and(self.mixed.outer_iter());
        outer.and(y.outer_iter()).par_for_each(|mut error, sums, mixed, p, z, y| {
            let squares = [sums, mixed].map(|part| part.to_slice().expect("standard layout"));
            let parts = [p, z, y].map(|part| part.to_slice().expect("standard layout"));
            outputs(&units, squares, parts, error.as_slice_mut().expect("standard layout"));
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

    /// Of the gradients beside those of x and of W0; `None` where P has not the range for them.
    fn gradients<P: Scalar>(
        &self,
        values: &Gradients<f64>,
        cotangent: &Cotangent,
        errors: &RowErrors,
        rows: &Rows<'_>,
        operands: &Operands<'_, O, P>,
    ) -> Option<Gradients<f64>> {
        let Self { layer, gamma, tiny_sq, .. } = *self;
        let (operator, adapter) = (&layer.operator, &values.adapter);
        let Cotangent { chain, dy_sq, t, t_terms, t_error, p_terms, z_terms, u_terms, .. } = cotangent;
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
        let of_u = &self.u_sq * (chain + of_outputs + 1.0) + u_terms.widened() * *chain;
        let of_u = mix_adjoint_weight(dy_sq.view(), of_u.view(), operator.groups());
        let lora_b = lora_b + of_u * gain_sq.view().insert_axis(Axis(1)); // E69
        let of_t = t_error * (chain + 2.0) + t_terms * *chain;
        let of_t = operands.terms_of(&operands.narrowed(of_t.view())?);
        let lora_a = lora_a + cotangent.let_through(of_t.widened() * square(&self.gain_in)); // E70
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
    fn dweight<P: Scalar>(
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

    /// Of dx, from what it adds up of squares. E73
    fn dx<P: Scalar>(
        &self,
        dx: &ArrayD<f64>,
        sums: Scaled<ArrayD<P>>,
        channels: Option<&Channels<P>>,
        gain_error: &Array1<f64>,
        cotangent: &Cotangent,
        operands: &Operands<'_, O, P>,
    ) -> ArrayD<f64> {
        let Self { layer, gamma, tiny_sq, .. } = *self;
        let (operator, x, chain) = (&layer.operator, &self.cache.x, self.chain_of_inputs());
        let gained_a = &layer.a() * &self.gain_in * gamma;
        let Cotangent { dy_sq, t, t_error, du, .. } = cotangent;
        let lora = operator.adjoint_input(x, &[(t.view(), gained_a.view())]).expect("values");
        let of_t = square(&gained_a);
        let of_t = (t_error.view(), of_t.view());
        // What is added up of W0^2 is multiplied by what columns have of their own, where there are such.
        let (low, of_sums) = match channels {
            None => (self.squared.adjoint_input(x, &[of_t]), sums.scale),
            Some(channels) => {
                let (of_base, weights) = self.of_squares();
                let (operator, dy_sq) = (&self.squared, dy_sq.view());
                let low = self.low_rank.inputs(channels, &weights, operator, x, dy_sq, of_t);
                (low.map(|low| low + sums.widened() * of_base), 0.0)
            }
        };
        let (mut error, du) = (low.expect("values"), du.as_ref().expect("values"));
        let by_column = layer.config.norm_axis == NormAxis::Input;
        let du: CowArray<'_, _, _> = if by_column { (du * &self.gain_in).into() } else { du.into() };
        let own = |dx: f64| (chain + 1.0) * dx * dx + tiny_sq;
        let is_apart = matches!(self.base, Base::Apart);
        let per_gain = if let Base::Summed(of) = &self.base { of.per_gain } else { None };
        let of_gained = 1.0 + 6.0 * per_gain.map_or(0.0, |per_gain| per_gain * per_gain); // E153
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
            Base::Summed(of) if of.per_gain.is_some() => {}
            Base::Summed(_) => {
                let Scaled { values, scale } = operands.base_gradient();
                Zip::from(&mut error).and(&values).par_for_each(|error, whole| {
                    *error += 3.0 * (scale * whole.as_f64()).powi(2); // E152
                });
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
