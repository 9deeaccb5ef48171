//! The definition, in plain loops over the materialised W': slow, readable, and sharing no line with the
//! production path. Every production path is tested against it, on any [`Real`] number. SPEC.md, section 4.

use super::adapter::as_matrix;
use super::watch::{Watch, unwatched};
use super::{Adapter, Base, Config, Gradients, Method, NormAxis, NormGradient};
use crate::Real;
use crate::operators::{Operator, Term};
use ndarray::{Array1, Array2, ArrayD, ArrayView2, ArrayViewD, IxDyn};

/// One layer at one input, as numbers `R`. All tensors in the shapes of a case file.
#[doc = include_str!("../../docs/definition.md")]
///
/// ```
/// # use ndarray::array;
/// use woracle::{operators::Linear, wora::{Adapter, Base, Config, Definition, Method}};
/// let operator = Linear { in_features: 2, out_features: 1, fan_in_fan_out: false };
/// let (config, x) = (Config::new(Method::Wora, 1.0), array![[1.0, 1.0]].into_dyn());
/// let scalar = |value: f64| ndarray::ArrayD::from_elem(ndarray::IxDyn(&[]), value);
/// let definition = Definition {
///     operator: &operator, config: &config, input: &x.view().into(), x: Some(x.clone()), mask: None,
///     base: Base { weight: array![[3.0, 2.0]].into_dyn().into(), bias: None },
///     adapter: Adapter {
///         lora_a: array![[0.0, 1.0]].into_dyn(), lora_b: array![[2.0]].into_dyn(),
///         magnitude: Some(array![10.0].into_dyn()), alpha: Some(scalar(1.0)), beta: Some(scalar(1.0)),
///     },
///     frozen_norm: None,
/// };
/// let dy = array![[1.0]].into_dyn();
/// let all = definition.evaluate(Some(dy.view())); // V = [3, 4], ||V|| = 5, W' = [6, 8]
/// assert_eq!(all.y, array![[14.0]].into_dyn());
/// assert_eq!(all.gradients.unwrap().adapter.magnitude.unwrap(), array![7.0 / 5.0].into_dyn());
/// ```
#[derive(Clone, Debug)]
pub struct Definition<'a, 'x, O: Operator, R> {
    /// The operator.
    pub operator: &'a O,
    /// The settings.
    pub config: &'a Config,
    /// The input as the operator takes it: its shape, or the ids.
    pub input: &'a O::Input<'x, f64>,
    /// The input's values; `None` for ids.
    pub x: Option<ArrayD<R>>,
    /// The dropout mask, in the shape of x.
    pub mask: Option<ArrayD<R>>,
    /// W0 and b.
    pub base: Base<R>,
    /// A, B, m, alpha, beta.
    pub adapter: Adapter<R>,
    /// Norms to use instead of `||V|| + eps`, held constant: `[units]` or `[fan_in]`.
    pub frozen_norm: Option<Array1<R>>,
}

/// What the definition says.
#[derive(Clone, Debug)]
pub struct Evaluation<R> {
    /// The output.
    pub y: ArrayD<R>,
    /// V, as W0 is stored; `None` where it is not asked for.
    pub weighted: Option<ArrayD<R>>,
    /// `n = ||V|| + eps`; `None` for LoRA.
    pub weight_norm: Option<Array1<R>>,
    /// `g = m / n`; `None` for LoRA.
    pub gain: Option<Array1<R>>,
    /// W', as W0 is stored; `None` where it is not asked for.
    pub merged_weight: Option<ArrayD<R>>,
    /// All gradients, where there was a cotangent.
    pub gradients: Option<Gradients<R>>,
}

/// The adapted weight, every stage of it.
struct Weights<R> {
    /// W0: `[units, fan_in]`
    base: Array2<R>,
    /// B A: `[units, fan_in]`
    delta: Array2<R>,
    /// V: `[units, fan_in]`
    weighted: Array2<R>,
    /// m, `||V||` and n; `None` for LoRA.
    norms: Option<Norms<R>>,
    /// W': `[units, fan_in]`
    merged: Array2<R>,
}

/// One entry a norm: `[units]` or `[fan_in]`.
struct Norms<R> {
    m: Vec<R>,
    /// `||V||`
    norm: Vec<R>,
    /// `||V|| + eps`, or the frozen norm
    n: Vec<R>,
}

impl<R: Real> Weights<R> {
    fn show(&self, watch: &mut Watch<'_, R>) {
        watch("E9", "BA", &|| self.delta.clone().into_dyn());
        watch("E9", "V", &|| self.weighted.clone().into_dyn());
        if let Some(Norms { m, norm, n }) = &self.norms {
            let gain = || m.iter().zip(n).map(|(&m, &n)| gain(m, n)).collect::<Array1<_>>();
            watch("E10", "||V||", &|| Array1::from(norm.clone()).into_dyn());
            watch("E10", "n", &|| Array1::from(n.clone()).into_dyn());
            watch("E11", "g", &|| gain().into_dyn());
        }
        watch("E12", "W'", &|| self.merged.clone().into_dyn());
    }
}

impl<O: Operator, R: Real> Definition<'_, '_, O, R> {
    /// y, the stages of the weight, and, given the cotangent dy, every gradient.
    ///
    /// # Panics
    ///
    /// If the tensors' shapes do not fit together: [`Layer::new`](super::Layer::new) is what checks them.
    pub fn evaluate(&self, dy: Option<ArrayViewD<'_, f64>>) -> Evaluation<R> {
        self.evaluate_watched(dy, &mut unwatched)
    }

    /// [`Definition::evaluate`], every line of which is shown to `watch`.
    ///
    /// # Panics
    ///
    /// As [`Definition::evaluate`].
    pub fn evaluate_watched(&self, dy: Option<ArrayViewD<'_, f64>>, watch: &mut Watch<'_, R>) -> Evaluation<R> {
        let weights = self.weights();
        weights.show(watch);
        self.show_columns(watch);
        let y = self.forward(&weights);
        watch("E13", "y", &|| y.clone());
        Evaluation {
            y,
            weighted: Some(self.operator.stored_weight(weights.weighted.clone())),
            weight_norm: weights.norms.as_ref().map(|norms| norms.n.clone().into()),
            gain: weights.norms.as_ref().map(|Norms { m, n, .. }| m.iter().zip(n).map(|(&m, &n)| gain(m, n)).collect()),
            merged_weight: Some(self.operator.stored_weight(weights.merged.clone())),
            gradients: dy.map(|dy| self.backward(&weights, &dy.mapv(R::constant), watch)),
        }
    }

    /// `n = ||V|| + eps`: `[units]` or `[fan_in]`; `None` for LoRA.
    pub fn weight_norm(&self) -> Option<Array1<R>> {
        self.weights().norms.map(|norms| norms.n.into())
    }

    fn alpha(&self) -> R {
        self.adapter.alpha_or(R::constant(1.0))
    }
    fn beta(&self) -> R {
        self.adapter.beta_or(R::constant(1.0))
    }
    /// The rows of A that unit u combines are those of its group: the first of them.
    fn first_rank(&self, u: usize, ranks_of_group: usize) -> usize {
        u / (self.operator.units() / self.operator.groups()) * ranks_of_group
    }
    /// The norm that entry (u, j) of V belongs to.
    fn norm_index(&self, u: usize, j: usize) -> usize {
        if self.config.norm_axis == NormAxis::Output { u } else { j }
    }

    /// `B A` and `V = beta W0 + alpha s B A`: `[units, fan_in]` each.
    fn weighted(&self, base: &Array2<R>, a: ArrayView2<'_, R>, b: ArrayView2<'_, R>) -> (Array2<R>, Array2<R>) {
        let alpha_s = self.alpha() * R::constant(self.config.scaling);
        let mut delta = Array2::from_elem(base.dim(), R::constant(0.0));
        let mut weighted = delta.clone();
        for ((u, j), &w) in base.indexed_iter() {
            let first = self.first_rank(u, b.ncols());
            for k in 0..b.ncols() {
                delta[[u, j]] = delta[[u, j]] + b[[u, k]] * a[[first + k, j]];
            }
            weighted[[u, j]] = self.beta() * w + alpha_s * delta[[u, j]]; // E9
        }
        (delta, weighted)
    }

    fn weights(&self) -> Weights<R> {
        let zero = R::constant(0.0);
        let base = self.operator.weight_matrix(self.base.weight.view()).to_owned();
        let (a, b) = (as_matrix(&self.adapter.lora_a), as_matrix(&self.adapter.lora_b));
        let (delta, weighted) = self.weighted(&base, a, b);
        // The norm sees A and W0 themselves; what is looked up moves by the operator's fraction of their changes.
        let looked_up = match self.operator.gradient_fraction::<f64>(self.input) {
            None => weighted.clone(),
            Some(fraction) => {
                let damp = |matrix: ArrayView2<'_, R>| {
                    let columns = |((_, j), &w): ((usize, usize), &R)| w.damped(fraction[j]);
                    let damped: Vec<R> = matrix.indexed_iter().map(columns).collect();
                    Array2::from_shape_vec(matrix.dim(), damped).expect("as many as before")
                };
                self.weighted(&damp(base.view()), damp(a).view(), b).1 // E41
            }
        };
        let Some(magnitude) = &self.adapter.magnitude else {
            let merged = looked_up;
            return Weights { base, delta, weighted, norms: None, merged };
        };
        let m = flat(magnitude);
        // Scaled by a power of two, which rounds nothing, so that no square leaves the range of f64.
        let mut largest = vec![0.0_f64; m.len()];
        for ((u, j), &v) in weighted.indexed_iter() {
            let i = self.norm_index(u, j);
            largest[i] = largest[i].max(v.value().abs());
        }
        let powers: Vec<f64> = largest.iter().map(|&v| if v > 0.0 { v.log2().floor().exp2() } else { 1.0 }).collect();
        let mut squares = vec![zero; m.len()];
        for ((u, j), &v) in weighted.indexed_iter() {
            let i = self.norm_index(u, j);
            let scaled = v.stored() / R::constant(powers[i]); // the norm of V itself, however V came about
            squares[i] = squares[i] + scaled * scaled;
        }
        let root = |(square, &power): (R, &f64)| square.sqrt() * R::constant(power);
        let norm: Vec<R> = squares.into_iter().zip(&powers).map(root).collect();
        let plus_eps = |&norm: &R| if norm.value() == 0.0 { zero } else { norm + R::constant(self.config.norm_eps) };
        let n = match &self.frozen_norm {
            Some(frozen) => frozen.to_vec(),
            None => norm.iter().map(plus_eps).collect(), // E10
        };
        let mut merged = looked_up;
        for ((u, j), w) in merged.indexed_iter_mut() {
            let i = self.norm_index(u, j);
            *w = gain(m[i], n[i]) * *w; // E12
        }
        Weights { base, delta, weighted, norms: Some(Norms { m, norm, n }), merged }
    }

    /// `y = op(x, W0) + op(x~, W' - W0) + b`. E13
    fn forward(&self, weights: &Weights<R>) -> ArrayD<R> {
        let shape = self.operator.output_shape::<f64>(self.input).expect("an input that a layer accepts");
        let mut y = vec![R::constant(0.0); shape.iter().product()];
        let (x, mask) = (self.x.as_ref().map(flat), self.mask.as_ref().map(flat));
        self.operator.terms::<f64>(self.input, |t| {
            let at = [t.unit, t.column];
            let weight = match &mask {
                None => weights.merged[at],
                Some(mask) => {
                    let kept = mask[t.input.expect("a mask is one of values")];
                    weights.base[at] + (weights.merged[at] - weights.base[at]) * kept // E13
                }
            };
            y[t.output] = y[t.output] + weight * input_of(&x, t); // E13
        });
        if let Some(bias) = &self.base.bias {
            let outputs_of_unit: usize = shape[self.operator.unit_axis(shape.len()) + 1..].iter().product();
            for (o, y) in y.iter_mut().enumerate() {
                *y = *y + bias[(o / outputs_of_unit) % self.operator.units()]; // E13
            }
        }
        ArrayD::from_shape_vec(shape, y).expect("as many outputs as the shape says")
    }

    /// What each output reads, where it is not simply x: `[outer, groups * fan_in, inner]`, E44 for windows, E39 for ids.
    fn show_columns(&self, watch: &mut Watch<'_, R>) {
        if O::COLUMNS_ARE_NOT_FEATURES.is_none() {
            return;
        }
        let label = if self.x.is_some() { "E44" } else { "E39" };
        watch(label, "X", &|| {
            let dropped = self.x.as_ref().zip(self.mask.as_ref()).map(|(x, mask)| {
                let kept = x.iter().zip(mask).map(|(&x, &mask)| x * mask).collect();
                ArrayD::from_shape_vec(x.shape(), kept).expect("as many as x")
            });
            let x = dropped.as_ref().or(self.x.as_ref()).map(flat);
            self.columns(|t| input_of(&x, t))
        });
    }

    /// One number a term of the first unit of each group, laid out as the columns that its group reads.
    fn columns(&self, of: impl Fn(Term) -> R) -> ArrayD<R> {
        let [outer, inner] = self.operator.places::<f64>(self.input);
        let (units, groups, fan_in) = (self.operator.units(), self.operator.groups(), self.operator.fan_in());
        let mut columns = ArrayD::from_elem(IxDyn(&[outer, groups * fan_in, inner]), R::constant(0.0));
        self.operator.terms::<f64>(self.input, |t| {
            let (group, first) = (t.unit / (units / groups), t.unit % (units / groups) == 0);
            if first {
                let at = [t.output / (units * inner), group * fan_in + t.column, t.output % inner];
                columns[IxDyn(&at)] = columns[IxDyn(&at)] + of(t);
            }
        });
        columns
    }

    /// `C = W'^T dy`, the gradient of the columns, which folding adds up where they were read. E47
    fn show_column_gradients(&self, weights: &Weights<R>, dy: &[R], watch: &mut Watch<'_, R>) {
        if O::COLUMNS_ARE_NOT_FEATURES.is_none() || self.x.is_none() || self.mask.is_some() {
            return;
        }
        watch("E47", "C", &|| {
            let [outer, inner] = self.operator.places::<f64>(self.input);
            let (units, groups, fan_in) = (self.operator.units(), self.operator.groups(), self.operator.fan_in());
            let in_group = units / groups;
            ArrayD::from_shape_fn(IxDyn(&[outer, groups * fan_in, inner]), |at| {
                let (group, column) = (at[1] / fan_in, at[1] % fan_in);
                (group * in_group..(group + 1) * in_group).fold(R::constant(0.0), |sum, unit| {
                    sum + weights.merged[[unit, column]] * dy[(at[0] * units + unit) * inner + at[2]] // E47
                })
            })
        });
    }

    /// The adjoint of every line of the forward, last line first. SPEC.md, section 4.2.
    fn backward(&self, weights: &Weights<R>, dy: &ArrayD<R>, watch: &mut Watch<'_, R>) -> Gradients<R> {
        let zero = R::constant(0.0);
        let (units, fan_in) = weights.base.dim();
        let (x, mask, dy_flat) = (self.x.as_ref().map(flat), self.mask.as_ref().map(flat), flat(dy));

        let mut dmerged = Array2::from_elem((units, fan_in), zero);
        let mut dbase = dmerged.clone();
        let mut dx = vec![zero; x.as_ref().map_or(0, Vec::len)];
        self.operator.terms::<f64>(self.input, |t| {
            let at = [t.unit, t.column];
            let (dy, factor) = (dy_flat[t.output], input_of(&x, t));
            let kept = mask.as_ref().map(|mask| mask[t.input.expect("a mask is one of values")]);
            let weight = match kept {
                None => weights.merged[at],
                Some(kept) => weights.base[at] + (weights.merged[at] - weights.base[at]) * kept,
            };
            dmerged[at] = dmerged[at] + kept.map_or(dy * factor, |kept| dy * factor * kept); // E142
            if let Some(kept) = kept {
                dbase[at] = dbase[at] + (dy * factor - dy * factor * kept); // E150
            }
            if let Some(input) = t.input {
                dx[input] = dx[input] + dy * R::constant(t.factor) * weight; // E143
            }
        });
        self.show_column_gradients(weights, &dy_flat, watch);
        watch("E142", "dW'", &|| dmerged.clone().into_dyn());

        // W' = g V, so dV = g dW', and through the norm, where it is not held constant, dV = k V beside.
        // A and W0 learn from the lookup through the operator's fraction alone; the norm has no such thing.
        let fraction = self.operator.gradient_fraction::<f64>(self.input);
        let mut dweighted = dmerged.clone();
        let mut dlooked_up = dmerged.clone();
        let mut dmagnitude = None;
        if weights.norms.is_none() {
            dlooked_up.indexed_iter_mut().for_each(|((_, j), d)| *d = part(&fraction, j, *d));
        }
        if let Some(Norms { m, norm, n }) = &weights.norms {
            let mut dgain = vec![zero; n.len()];
            for ((u, j), &d) in dmerged.indexed_iter() {
                let i = self.norm_index(u, j);
                dgain[i] = dgain[i] + d * weights.weighted[[u, j]]; // E144
            }
            watch("E144", "c", &|| Array1::from(dgain.clone()).into_dyn());
            let full = self.config.norm_gradient == NormGradient::Full && self.frozen_norm.is_none();
            for ((u, j), &d) in dmerged.indexed_iter() {
                let (at, i) = ([u, j], self.norm_index(u, j));
                let g = gain(m[i], n[i]);
                dweighted[at] = g * d; // E145
                dlooked_up[at] = g * part(&fraction, j, d);
                if full && n[i].value() != 0.0 {
                    let through_norm = dgain[i] / n[i] * (g / norm[i]) * weights.weighted[at]; // E31, E145
                    dweighted[at] = dweighted[at] - through_norm;
                    dlooked_up[at] = dlooked_up[at] - through_norm;
                }
            }
            dmagnitude = Some(dgain.iter().zip(n).map(|(&c, &n)| gain(c, n)).collect::<Vec<R>>()); // E28
            let dmagnitude = dmagnitude.iter().flatten().copied();
            watch("E28", "dm", &|| dmagnitude.clone().collect::<Array1<_>>().into_dyn());
        }
        watch("E145", "dV", &|| dweighted.clone().into_dyn());

        // V = beta W0 + alpha s B A.
        let (alpha, beta, s) = (self.alpha(), self.beta(), R::constant(self.config.scaling));
        let (a, b) = (as_matrix(&self.adapter.lora_a), as_matrix(&self.adapter.lora_b));
        let (mut dalpha, mut dbeta) = (zero, zero);
        let (mut da, mut db) = (Array2::from_elem(a.dim(), zero), Array2::from_elem(b.dim(), zero));
        for ((u, j), &dv) in dweighted.indexed_iter() {
            dalpha = dalpha + s * dv * weights.delta[[u, j]]; // E146
            dbeta = dbeta + dv * weights.base[[u, j]]; // E147
            let dv_looked_up = dlooked_up[[u, j]];
            dbase[[u, j]] = dbase[[u, j]] + beta * dv_looked_up; // E150
            let first = self.first_rank(u, b.ncols());
            for k in 0..b.ncols() {
                db[[u, k]] = db[[u, k]] + alpha * s * dv * a[[first + k, j]]; // E148
                da[[first + k, j]] = da[[first + k, j]] + alpha * s * dv_looked_up * b[[u, k]]; // E149
            }
        }
        if self.config.method == Method::Wora {
            watch("E146", "dalpha", &|| ArrayD::from_elem(IxDyn(&[]), dalpha));
            watch("E147", "dbeta", &|| ArrayD::from_elem(IxDyn(&[]), dbeta));
        }
        watch("E148", "dB", &|| db.clone().into_dyn());
        watch("E149", "dA", &|| da.clone().into_dyn());
        watch("E150", "dW0", &|| dbase.clone().into_dyn());
        let dbias = self.base.bias.as_ref().map(|bias| {
            let outputs_of_unit: usize = dy.shape()[self.operator.unit_axis(dy.ndim()) + 1..].iter().product();
            let mut dbias = ArrayD::from_elem(bias.shape(), zero);
            for (o, &dy) in dy_flat.iter().enumerate() {
                let u = (o / outputs_of_unit) % units;
                dbias[u] = dbias[u] + dy; // E30
            }
            dbias
        });

        let dx = self.x.as_ref().map(|x| ArrayD::from_shape_vec(x.shape(), dx).expect("as many as x"));
        if let Some(dx) = &dx {
            watch("E143", "dx", &|| dx.clone());
        }
        let scalar = |value| (self.config.method == Method::Wora).then(|| ArrayD::from_elem(IxDyn(&[]), value));
        Gradients {
            x: dx,
            weight: Some(self.operator.stored_weight(dbase)),
            bias: dbias,
            adapter: Adapter {
                lora_a: ArrayD::from_shape_vec(self.adapter.lora_a.shape(), da.into_raw_vec_and_offset().0).expect("A"),
                lora_b: ArrayD::from_shape_vec(self.adapter.lora_b.shape(), db.into_raw_vec_and_offset().0).expect("B"),
                magnitude: dmagnitude
                    .zip(self.adapter.magnitude.as_ref())
                    .map(|(dm, m)| ArrayD::from_shape_vec(m.shape(), dm).expect("one an entry of m")),
                alpha: scalar(dalpha),
                beta: scalar(dbeta),
            },
        }
    }
}

/// `m / n`, 0 where there is no direction. E11
fn gain<R: Real>(m: R, n: R) -> R {
    if n.value() == 0.0 { n } else { m / n }
}

/// What a term multiplies its weight by.
fn input_of<R: Real>(x: &Option<Vec<R>>, term: Term) -> R {
    let factor = R::constant(term.factor);
    term.input.map_or(factor, |input| factor * x.as_ref().expect("values")[input])
}

/// The part of a gradient that reaches column j.
fn part<R: Real>(fraction: &Option<Vec<f64>>, j: usize, gradient: R) -> R {
    fraction.as_ref().map_or(gradient, |fraction| R::constant(fraction[j]) * gradient)
}

/// The elements in row-major order.
fn flat<R: Copy>(array: &ArrayD<R>) -> Vec<R> {
    array.iter().copied().collect()
}
