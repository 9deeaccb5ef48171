//! How far off a careful computation may be: the rounding errors of every intermediate that an implementation may
//! store, propagated to every result as a root of summed squares. SPEC.md, section 8.5.
//!
//! Two ways of computing are allowed for at once: the factored one, which stores `op(x, W0)`, `op(x, A)` and what is
//! made of them, and the one that stores V, W' and dW'. Errors are in unit roundoffs of the type stored in; every
//! `*_error` holds squares of them.

use super::{Adapter, Direction, Evaluation, Gradients, Layer, NormAxis, NormGradient};
use crate::operators::{Input, Operator, channel_sums, mix_adjoint_input, mix_adjoint_weight, mix_into};
use crate::{Result, Scalar};
use ndarray::{Array1, Array2, Array3, ArrayD, ArrayView2, ArrayView3, ArrayViewD, Axis, Zip};

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
    fn of_sum<T: Scalar>(self, terms: usize) -> T {
        T::from_f64(1.0 + self.chain.min(terms) as f64 / 4.0)
    }
}

impl<O: Operator, T: Scalar> Layer<O, T> {
    /// The rounding error to expect of every result: the root of the summed squares, in unit roundoffs.
    ///
    /// `results` are the results themselves, of the same x, mask and dy.
    ///
    /// # Errors
    ///
    /// As [`Layer::forward`].
    pub fn rounding(
        &self,
        x: &O::Input<'_, T>,
        mask: Option<ArrayViewD<'_, T>>,
        dy: Option<ArrayViewD<'_, T>>,
        results: &Evaluation<T>,
        storage: Storage,
    ) -> Result<Evaluation<T>> {
        let weights = Weights::new(self, storage)?;
        let dropped = mask.map(|mask| {
            let masked = &x.values().expect("a mask is one of values") * &mask;
            (O::Input::from_values(masked).expect("values"), mask)
        });
        let outputs = Outputs::new(&weights, dropped.as_ref().map_or(x, |(masked, _)| masked));
        let passes = Passes { weights: &weights, outputs, x, dropped, storage };

        let root = |squares: ArrayD<T>| squares.mapv_into(T::sqrt);
        let stored = |error: Array2<T>| root(self.operator.stored_weight(error));
        let per_norm = |relative: &Array1<T>, of: &Option<Array1<T>>| {
            of.as_ref().map(|of| Zip::from(relative).and(of).map_collect(|&relative, &of| relative.sqrt() * of.abs()))
        };
        let gradients = results.gradients.as_ref().zip(dy);
        let gradients = gradients.map(|(gradients, dy)| passes.gradients(dy, gradients, root));
        Ok(Evaluation {
            y: root(passes.y(&results.y)),
            weighted: results.weighted.as_ref().map(|_| stored(weights.weighted_error.clone())),
            weight_norm: per_norm(&weights.norm_error, &results.weight_norm),
            gain: per_norm(&weights.gain_error, &results.gain),
            merged_weight: results.merged_weight.as_ref().map(|_| stored(weights.merged_error.clone())),
            gradients,
        })
    }
}

/// The stages of the weight, `[units, fan_in]` where nothing else is said.
struct Weights<'a, O, T> {
    layer: &'a Layer<O, T>,
    direction: Option<Direction<T>>,
    tiny_sq: T,
    beta: T,
    /// `alpha s`
    gamma: T,
    /// g at every element
    gain: Array2<T>,
    /// D = B A
    delta: Array2<T>,
    delta_error: Array2<T>,
    /// V
    weighted: Array2<T>,
    weighted_error: Array2<T>,
    /// Of n, relative: one a norm
    norm_error: Array1<T>,
    /// Of g, relative: one a norm
    gain_error: Array1<T>,
    /// Of W', the gain's own error among it
    merged_error: Array2<T>,
    /// Of what a sum over W' adds up, whichever way: V's parts apart, each with its chain
    terms_error: Array2<T>,
}

impl<'a, O: Operator, T: Scalar> Weights<'a, O, T> {
    fn new(layer: &'a Layer<O, T>, storage: Storage) -> Result<Self> {
        let (beta, gamma) = (layer.beta(), layer.alpha() * layer.scaling());
        let tiny_sq = T::from_f64(storage.smallest_normal).powi(2);
        let (base, groups) = (layer.weight(), layer.operator.groups());
        let delta = layer.delta_weight(T::one());
        let mut delta_error = delta.mapv(|d| d * d + tiny_sq).insert_axis(Axis(0));
        let a_sq = layer.a().mapv(|a| a * a).insert_axis(Axis(0));
        mix_into(delta_error.view_mut(), layer.b().mapv(|b| b * b).view(), a_sq.view(), groups);
        let delta_error = delta_error.remove_axis(Axis(0)); // E55
        let weighted = &delta * gamma + &base * beta;
        let mut weighted_error = delta_error.clone();
        Zip::from(&mut weighted_error).and(&delta).and(&base).and(&weighted).for_each(|error, &d, &w, &v| {
            *error = gamma * gamma * (*error + d * d) + beta * beta * w * w + v * v + tiny_sq; // E56
        });

        let mut weights = Self {
            layer,
            direction: layer.direction()?,
            tiny_sq,
            beta,
            gamma,
            gain: Array2::ones(weighted.dim()),
            delta,
            delta_error,
            norm_error: Array1::zeros(0),
            gain_error: Array1::zeros(0),
            merged_error: weighted_error.clone(),
            terms_error: weighted_error.clone(),
            weighted,
            weighted_error,
        };
        if let Some(Direction { norm, weight_norm, gain, .. }) = &weights.direction {
            let apart = weights.sum(&(&weights.weighted * &weights.weighted * &weights.weighted_error));
            // What alpha s and beta are rounded by reaches every element alike.
            let lora = weights.sum(&(&weights.weighted * &weights.delta)) * gamma;
            let of_base = weights.sum(&(&weights.weighted * &base)) * beta;
            let together = &lora * &lora + &of_base * &of_base;
            let relative = Zip::from(&apart).and(&together).and(norm).and(weight_norm).map_collect(
                |&apart, &together, &norm, &n| {
                    if n == T::zero() { T::zero() } else { (apart + together) / (norm * n).powi(2) + T::from_f64(3.0) }
                },
            ); // E57
            weights.gain = weights.spread(gain);
            weights.gain_error = &relative + T::one(); // E58
            weights.norm_error = relative;
        }
        let shared = weights.spread(&weights.gain_error);
        let chain: T = storage.of_sum(layer.operator.fan_in());
        Zip::from(&mut weights.merged_error)
            .and(&mut weights.terms_error)
            .and(&weights.weighted)
            .and(&weights.gain)
            .and(&shared)
            .for_each(|merged, terms, &v, &g, &shared| {
                let (of_v, stored) = (*merged, g * g * v * v + tiny_sq);
                *merged = g * g * (of_v + shared * v * v) + stored; // E59
                *terms = *merged + chain * (g * g * of_v + stored); // E60
            });
        Ok(weights)
    }

    /// One number a norm at every element; 0 where there are no norms.
    fn spread(&self, values: &Array1<T>) -> Array2<T> {
        let shape = self.weighted.dim();
        if self.direction.is_none() {
            return Array2::zeros(shape);
        }
        let axis = if self.layer.config.norm_axis == NormAxis::Output { 1 } else { 0 };
        values.view().insert_axis(Axis(axis)).broadcast(shape).expect("one a norm").to_owned()
    }

    /// The sum over what belongs to each norm.
    fn sum(&self, values: &Array2<T>) -> Array1<T> {
        values.sum_axis(Axis(if self.layer.config.norm_axis == NormAxis::Output { 1 } else { 0 }))
    }

    /// Numbers of units or of columns: these values where the norms are theirs, `otherwise` where they are not.
    fn of(&self, axis: NormAxis, values: &Array1<T>, otherwise: T) -> Array1<T> {
        if self.direction.is_some() && self.layer.config.norm_axis == axis {
            return values.clone();
        }
        let (units, fan_in) = self.weighted.dim();
        Array1::from_elem(if axis == NormAxis::Output { units } else { fan_in }, otherwise)
    }

    fn gains_of(&self, axis: NormAxis) -> Array1<T> {
        let none = Array1::zeros(0);
        self.of(axis, self.direction.as_ref().map_or(&none, |direction| &direction.gain), T::one())
    }
}

/// What the factored way makes of `x~`, with the gains of the columns in it: `[outer, units or rank, inner]`.
struct Outputs<T> {
    /// P = op(u, W0)
    base: Array3<T>,
    /// U = op(u, A)
    lora: Array3<T>,
    /// Z = B U
    mixed: Array3<T>,
}

impl<T: Scalar> Outputs<T> {
    fn new<O: Operator>(weights: &Weights<'_, O, T>, x: &O::Input<'_, T>) -> Self {
        let (layer, gain) = (weights.layer, weights.gains_of(NormAxis::Input));
        let (w, a) = (&layer.weight() * &gain, &layer.a() * &gain);
        let mut outputs = layer.operator.apply(x, &[w.view(), a.view()]).into_iter();
        let (base, lora) = (outputs.next().expect("P"), outputs.next().expect("U"));
        let mut mixed = Array3::zeros(base.dim());
        mix_into(mixed.view_mut(), layer.b(), lora.view(), layer.operator.groups());
        Self { base, lora, mixed }
    }
}

/// Forward and backward at a point.
struct Passes<'a, 'x, O: Operator, T: Scalar> {
    weights: &'a Weights<'a, O, T>,
    outputs: Outputs<T>,
    x: &'a O::Input<'x, T>,
    /// `x~` and the mask
    dropped: Option<(O::Input<'x, T>, ArrayViewD<'a, T>)>,
    storage: Storage,
}

/// The squares of an input's values; ids as they are.
fn squares<'x, O: Operator, T: Scalar>(x: &O::Input<'x, T>) -> O::Input<'x, T> {
    x.values().and_then(|values| O::Input::from_values(values.mapv(|x| x * x))).unwrap_or_else(|| x.clone())
}

fn square<D: ndarray::Dimension, T: Scalar>(values: &ndarray::Array<T, D>) -> ndarray::Array<T, D> {
    values.mapv(|v| v * v)
}

impl<'x, O: Operator, T: Scalar> Passes<'_, 'x, O, T> {
    /// `x~`
    fn adapted_input(&self) -> &O::Input<'x, T> {
        self.dropped.as_ref().map_or(self.x, |(masked, _)| masked)
    }

    /// Of y, in its shape. E61
    fn y(&self, y: &ArrayD<T>) -> ArrayD<T> {
        let Weights { layer, tiny_sq, beta, gamma, terms_error, .. } = self.weights;
        let Outputs { base: p, lora: u, mixed: z } = &self.outputs;
        let operator = layer.operator.power(2);
        let mut error = operator.apply(&squares::<O, T>(self.adapted_input()), &[terms_error.view()]).swap_remove(0);
        let gain = self.weights.gains_of(NormAxis::Output);
        let shared = self.weights.of(NormAxis::Output, &self.weights.gain_error, T::zero());
        let b_sq = square(&(&layer.b() * &(&gain * *gamma).insert_axis(Axis(1))));
        mix_into(error.view_mut(), b_sq.view(), square(u).view(), operator.groups()); // U is stored
        let values = y.view().into_shape_with_order(p.dim()).expect("as many as y");
        let chain: T = self.storage.of_sum(operator.fan_in());
        for (i, mut error) in error.axis_iter_mut(Axis(1)).enumerate() {
            let (g, shared) = (gain[i], shared[i]);
            let b = layer.base.bias.as_ref().map_or(T::zero(), |bias| bias[i]);
            let of = |values: &Array3<T>| values.index_axis(Axis(1), i).to_owned();
            Zip::from(&mut error).and(&of(p)).and(&of(z)).and(values.index_axis(Axis(1), i)).for_each(
                |error, &p, &z, &y| {
                    let (base, lora) = (g * *beta * p, g * *gamma * z);
                    let stored = p * p + base * base + (lora * lora + lora * lora);
                    *error += stored + shared * (base + lora).powi(2) + chain * y * y + b * b + *tiny_sq;
                },
            );
        }
        if self.dropped.is_some() {
            let w_sq = layer.weight().mapv(|w| w * w);
            for x in [self.x, self.adapted_input()] {
                let terms = operator.apply(&squares::<O, T>(x), &[w_sq.view()]).swap_remove(0);
                let whole = layer.operator.apply(x, &[layer.weight()]).swap_remove(0);
                error += &(terms * chain + square(&whole));
            }
        }
        error.into_shape_with_order(y.shape()).expect("as many as y")
    }

    /// Of every gradient: the roots.
    fn gradients(
        &self,
        dy: ArrayViewD<'_, T>,
        values: &Gradients<T>,
        root: impl Fn(ArrayD<T>) -> ArrayD<T>,
    ) -> Gradients<T> {
        let w = self.weights;
        let &Weights { layer, tiny_sq, beta, gamma, .. } = w;
        let Outputs { base: p, lora: u, mixed: z } = &self.outputs;
        let (groups, config, scaling) = (layer.operator.groups(), layer.config, layer.scaling());
        let (whole, squared) = (layer.operator.power(1), layer.operator.power(2));
        let dy = dy.to_shape(p.dim()).expect("as many as y").into_owned();
        let dy_sq = square(&dy);
        let (x, two) = (self.adapted_input(), T::one() + T::one());
        let x_sq = squares::<O, T>(x);
        let outputs = dy.len_of(Axis(0)) * dy.len_of(Axis(2));
        let long: T = self.storage.of_sum(outputs);
        let (gain_out, gain_in) = (w.gains_of(NormAxis::Output), w.gains_of(NormAxis::Input));
        let unit = |values: &Array1<T>| values.to_owned().insert_axis(Axis(1)).insert_axis(Axis(0));
        let g_sq = square(&w.gain);

        // dW', and what is made of it.
        let dmerged = whole.adjoint_weight(x, dy.view());
        let mut dmerged_error = (squared.adjoint_weight(&x_sq, dy_sq.view()) + &square(&dmerged)) * long; // E62
        dmerged_error += tiny_sq;
        let direct = &w.gain * &dmerged;
        let shared = w.spread(&w.gain_error);
        let direct_error = &g_sq * &dmerged_error + (&shared + T::one()) * square(&direct); // E63
        let (mut dweighted, mut dweighted_error) = (direct.clone(), direct_error.clone());
        // In column j a lookup lets only a fraction of its gradient through.
        let mut looked_up_error = direct_error;
        let fraction = layer.operator.gradient_fraction(x).map(|c| Array1::from_iter(c.into_iter().map(T::from_f64)));
        if let Some(fraction) = &fraction {
            looked_up_error *= &square(fraction);
        }

        let (mut magnitude, mut norm_weight_error) = (None, Array1::zeros(0));
        if let Some(direction) = &w.direction {
            let c = w.sum(&(&dmerged * &w.weighted)); // E27
            let apart = &dmerged_error * &square(&w.weighted) + square(&dmerged) * &w.weighted_error;
            let mut c_error = w.sum(&apart) + &square(&c);
            match config.norm_axis {
                NormAxis::Output => {
                    let parts = p.mapv(|p| (beta * p).powi(2)) + z.mapv(|z| (gamma * z).powi(2));
                    c_error += &(channel_sums((&dy_sq * &parts).view()) * (long + T::one()));
                }
                NormAxis::Input => {
                    let pairs = [(dy.view(), w.weighted.view())];
                    let du = layer.operator.adjoint_input(x, &pairs).expect("features");
                    let products = &x_sq.values().expect("features") * &square(&du);
                    let columns = products.into_shape_with_order((outputs, c.len())).expect("[outer, features]");
                    c_error += &(columns.sum_axis(Axis(0)) * (long + T::one()));
                }
            } // E64
            let n = &direction.weight_norm;
            let over = |values: &Array1<T>| Direction::gain(values.view(), n.view());
            let dm = over(&c);
            let dm_error = over(&over(&c_error)) + &square(&dm) * &(&w.norm_error + two);
            magnitude = Some(dm_error.mapv_into(|error| error + tiny_sq)); // E65
            if config.norm_gradient == NormGradient::Full {
                let per_c = direction.norm_weight(Array1::ones(c.len()).view());
                let k = &per_c * &c;
                norm_weight_error = square(&per_c) * &c_error;
                norm_weight_error += &(square(&k) * (&w.norm_error + T::one()) * T::from_f64(3.0)); // E66
                let (at, of_k) = (w.spread(&k), w.spread(&norm_weight_error));
                let through = &square(&at) * &w.weighted_error + (&of_k + &square(&at)) * square(&w.weighted);
                dweighted_error += &through; // E67
                looked_up_error += &through; // E67
                dweighted += &(&at * &w.weighted);
            }
        }
        // The square of a contraction over each norm's elements that the errors of g and of k share.
        let together = |other: ArrayView2<'_, T>| {
            let mut error = Array1::zeros(w.gain_error.len());
            if w.direction.is_some() {
                error = square(&w.sum(&(&direct * &other))) * &w.gain_error;
            }
            if !norm_weight_error.is_empty() {
                error += &(square(&w.sum(&(&w.weighted * &other))) * &norm_weight_error);
            }
            error.sum()
        };

        let h_sq = &dy_sq * &unit(&square(&gain_out));
        let scalar = |of: ArrayView2<'_, T>, of_error: Option<&Array2<T>>, output: &Array3<T>, factor: T, value: T| {
            let mut error = (&dweighted_error * &of.mapv(|v| v * v)).sum() + together(of);
            error += of_error.map_or(T::zero(), |of_error| (square(&dweighted) * of_error).sum());
            error += (&h_sq * &square(output)).sum() * (two + T::one()); // summed up in a tree, not in a row
            factor * factor * error + two * value * value + tiny_sq // E68
        };
        let alpha = values.adapter.alpha.as_ref().map(|value| {
            let value = value.sum();
            scalar(w.delta.view(), Some(&w.delta_error), z, scaling, value)
        });
        let beta_error =
            values.adapter.beta.as_ref().map(|value| scalar(layer.weight(), None, p, T::one(), value.sum()));

        // B and A meet dV as channels that are mixed.
        let as_channels = |matrix: &Array2<T>| matrix.clone().insert_axis(Axis(0));
        let mix_b = |dv: &Array2<T>, a: ArrayView2<'_, T>| {
            mix_adjoint_weight(as_channels(dv).view(), a.insert_axis(Axis(0)), groups)
        };
        let mix_a = |b: ArrayView2<'_, T>, dv: &Array2<T>| {
            mix_adjoint_input(b, as_channels(dv).view(), groups).remove_axis(Axis(0))
        };
        let (a_sq, b_sq) = (layer.a().mapv(|a| a * a), layer.b().mapv(|b| b * b));
        let mut lora_b = mix_b(&dweighted_error, a_sq.view());
        let mut lora_a = mix_a(b_sq.view(), &looked_up_error);
        if w.direction.is_some() {
            let paths = [(&direct, Some(&w.gain_error)), (&w.weighted, Some(&norm_weight_error))];
            for (path, error) in
                paths.into_iter().filter_map(|(path, error)| Some((path, error.filter(|e| !e.is_empty())?)))
            {
                match config.norm_axis {
                    NormAxis::Output => {
                        lora_b += &(square(&mix_b(path, layer.a())) * error.view().insert_axis(Axis(1)));
                    }
                    NormAxis::Input => lora_a += &(square(&mix_a(layer.b(), path)) * error),
                }
            }
        } // E69, E70
        lora_b += &(mix_adjoint_weight(h_sq.view(), square(u).view(), groups) * (long + two));
        // T = H B, stored, and its terms.
        let gained = &layer.b() * &gain_out.view().insert_axis(Axis(1));
        let t = mix_adjoint_input(gained.view(), dy.view(), groups);
        let t_error = mix_adjoint_input(square(&gained).view(), dy_sq.view(), groups) + &square(&t);
        let mut factored = squared.adjoint_weight(&x_sq, t_error.view()) * (long + two) * &square(&gain_in);
        if let Some(fraction) = &fraction {
            factored *= &square(fraction);
        }
        lora_a += &factored;
        let finished = |error: Array2<T>, value: &ArrayD<T>| {
            let error = error.mapv(|error| gamma * gamma * error).as_standard_layout().into_owned();
            let error = error.into_shape_with_order(value.shape()).expect("as many as the gradient");
            root(error + &value.mapv(|value| (long + T::one()) * value * value + tiny_sq))
        };

        let weight = values.weight.as_ref().map(|value| {
            let mut error = looked_up_error.mapv(|error| beta * beta * error);
            if self.dropped.is_some() {
                for x in [self.x, x] {
                    let terms = squared.adjoint_weight(&squares::<O, T>(x), dy_sq.view()) * long;
                    error += &(terms + square(&whole.adjoint_weight(x, dy.view())));
                }
            }
            let error = layer.operator.stored_weight(error);
            root(error + &value.mapv(|value| two * value * value + tiny_sq)) // E71
        });
        let bias = values.bias.as_ref().map(|value| {
            let terms = channel_sums(dy_sq.view()).into_dyn();
            // A plain sum is added up in the type itself whatever it is, but in four parts at least.
            let chain: T = Storage { chain: self.storage.chain.max(512), ..self.storage }.of_sum(outputs);
            root((terms + &square(value)) * ((chain + two + T::one()) / (two + two)) + tiny_sq) // E72
        });
        let x = values.x.as_ref().map(|value| root(self.dx(dy.view(), value, &t, &t_error)));
        let scalar = |error: Option<T>| error.map(|error| ArrayD::from_elem(vec![], error.sqrt()));
        Gradients {
            x,
            weight,
            bias,
            adapter: Adapter {
                lora_a: finished(lora_a, &values.adapter.lora_a),
                lora_b: finished(lora_b, &values.adapter.lora_b),
                magnitude: magnitude
                    .zip(values.adapter.magnitude.as_ref())
                    .map(|(error, value)| root(error.into_shape_with_order(value.shape()).expect("one an entry of m"))),
                alpha: scalar(alpha),
                beta: scalar(beta_error),
            },
        }
    }

    /// Of dx; `t` is `H B` and `t_error` its error. E73
    fn dx(&self, dy: ArrayView3<'_, T>, dx: &ArrayD<T>, t: &Array3<T>, t_error: &Array3<T>) -> ArrayD<T> {
        let w = self.weights;
        let &Weights { layer, tiny_sq, beta, gamma, .. } = w;
        let (operator, squared) = (&layer.operator, layer.operator.power(2));
        let x = self.adapted_input();
        let (gain_out, gain_in) = (w.gains_of(NormAxis::Output), w.gains_of(NormAxis::Input));
        let shared = w.of(NormAxis::Input, &w.gain_error, T::zero());
        let adjoint = |dy: ArrayView3<'_, T>, weight: ArrayView2<'_, T>| {
            operator.adjoint_input(x, &[(dy, weight)]).expect("values")
        };
        let adjoint_sq = |dy: ArrayView3<'_, T>, weight: ArrayView2<'_, T>| {
            squared.adjoint_input(x, &[(dy, weight)]).expect("values")
        };
        let dy_sq = dy.mapv(|dy| dy * dy);
        let (gained_w, gained_a) = (&layer.weight() * &gain_in * beta, &layer.a() * &gain_in * gamma);
        let h = &dy * &gain_out.view().insert_axis(Axis(1)).insert_axis(Axis(0));
        let (base, lora) = (adjoint(h.view(), gained_w.view()), adjoint(t.view(), gained_a.view()));
        let terms = adjoint_sq(dy_sq.view(), (&w.terms_error + &w.merged_error).view());
        let mut error = terms + &adjoint_sq(t_error.view(), square(&gained_a).view()) + &square(&base) + &square(&lora);
        if w.direction.is_some() && layer.config.norm_axis == NormAxis::Input {
            error += &(square(&(&base + &lora)) * &shared);
        }
        let chain: T = self.storage.of_sum(operator.units());
        if let Some((_, mask)) = &self.dropped {
            let w_sq = layer.weight().mapv(|w| w * w);
            let kept = adjoint_sq(dy_sq.view(), w_sq.view()) * chain + &square(&adjoint(dy, layer.weight()));
            let two = T::one() + T::one();
            ndarray::azip!((error in &mut error, &kept in &kept, &mask in mask) {
                *error = mask * mask * (*error + kept) + two * kept;
            });
        }
        error + &dx.mapv(|dx| (chain + T::one()) * dx * dx + tiny_sq)
    }
}
