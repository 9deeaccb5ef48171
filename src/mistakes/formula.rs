//! The forward with one thing wrong: the lines of SPEC.md, section 4, each with the ways in which it is got wrong.
//!
//! A [`Formula`] says for every stage which way is taken; [`RIGHT`] takes the right one everywhere and computes what
//! the definition does.

use crate::operators::{Operator, Term};
use crate::wora::{Definition, NormAxis, NormGradient};
use crate::{Real, Result};
use ndarray::{Array2, ArrayD, ArrayView2};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Which way every stage of the forward takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Formula {
    /// s. E8
    pub scaling: Scaling,
    /// What stands where alpha should.
    pub alpha: Learned,
    /// What stands where beta should.
    pub beta: Learned,
    /// B A.
    pub delta: Delta,
    /// V. E9
    pub weighted: Weighted,
    /// What the norm is taken of. E10
    pub norm_of: NormOf,
    /// Which norm. E10
    pub norm: Norm,
    /// How many norms. E10
    pub norm_per: NormPer,
    /// Where the epsilon is. E10
    pub eps: Eps,
    /// g. E11
    pub gain: Gain,
    /// How the gradient treats n.
    pub norm_gradient: Path,
    /// How W0 and B A meet the input and the mask. E13
    pub output: Output,
    /// b. E13
    pub bias: Bias,
    /// What of the operator's own settings is lost. E39 to E44
    pub walk: Walk,
    /// What a gradient forgets that is added to several times. E40, E45
    pub overwritten: Overwritten,
}

/// Every stage as it should be.
pub const RIGHT: Formula = Formula {
    scaling: Scaling::Once,
    alpha: Learned::Itself,
    beta: Learned::Itself,
    delta: Delta::Product,
    weighted: Weighted::Sum,
    norm_of: NormOf::Weighted,
    norm: Norm::Euclidean,
    norm_per: NormPer::Setting,
    eps: Eps::Added,
    gain: Gain::Ratio,
    norm_gradient: Path::Setting,
    output: Output::Correction,
    bias: Bias::Added,
    walk: Walk::Setting,
    overwritten: Overwritten::Nothing,
};

/// s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// s
    Once,
    /// 1
    Missing,
    /// s^2
    Twice,
    /// r s: `lora_alpha` without the division.
    TimesRank,
    /// sqrt(r) s: rslora's where it is not asked for.
    TimesRootRank,
}

/// A learned scalar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Learned {
    /// It
    Itself,
    /// 1
    One,
    /// The other of the two.
    Other,
    /// Its square.
    Squared,
}

/// `B A`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Delta {
    /// `B A`, group by group.
    Product,
    /// Its transpose, where it is square.
    Transposed,
    /// Every unit combines the ranks of the first group.
    FirstGroup,
}

/// V.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighted {
    /// `beta W0 + alpha s B A`
    Sum,
    /// `beta W0 / ||W0|| + alpha s B A`
    UnitBase,
    /// `beta (W0 + alpha s B A)`
    BetaOutside,
    /// `beta W0 - alpha s B A`
    Difference,
}

/// What the norm is taken of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormOf {
    /// V
    Weighted,
    /// W0
    Base,
    /// `alpha s B A`
    Delta,
    /// `beta W0 + alpha B A`
    WithoutScaling,
    /// `W0 + s B A`
    WithoutAlphaBeta,
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// The root of the sum of squares.
    Euclidean,
    /// The sum of squares.
    Squared,
    /// The sum of absolute values.
    Absolute,
    /// The mean of absolute values.
    Mean,
    /// The root of the mean of squares.
    RootMeanSquare,
}

/// How many norms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormPer {
    /// One an output unit or an input column, as the settings say.
    Setting,
    /// One an output unit, whatever they say.
    Output,
    /// One an input column, a token or an input channel, whatever they say.
    Input,
    /// One for the whole weight; m still has one entry a unit.
    Whole,
}

/// The epsilon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Eps {
    /// `||V|| + eps`
    Added,
    /// `||V||`
    Ignored,
    /// `sqrt(||V||^2 + eps)`
    InsideRoot,
    /// `||V|| + eps`, with n instead of `||V||` in the gradient of the norm.
    InGradient,
}

/// g.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gain {
    /// `m / n`
    Ratio,
    /// 1
    One,
    /// m
    Magnitude,
    /// `1 / n`
    Reciprocal,
    /// `n / m`
    Inverted,
    /// `m_j / n_i`: a row times a column.
    Outer,
    /// `m / n^2`
    NormTwice,
}

/// How the gradient treats n.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Path {
    /// As the settings say.
    Setting,
    /// As a constant.
    Held,
    /// As the function that it is.
    Free,
}

/// How W0 and B A meet the input and the mask. k is the mask, and 1 without one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Output {
    /// `(1 - k) W0 + k g V`
    Correction,
    /// `g V`
    DropoutIgnored,
    /// `k g V`
    DropoutOnEverything,
    /// `g (beta W0 + k alpha s B A)`
    DropoutOnLoraOnly,
    /// `(1 - k) W0 + k g V` with 1 for every k but 0.
    DropoutUnscaled,
    /// `W0 + k g V`
    BaseTwice,
    /// `beta W0 + k g alpha s B A`
    GainOnLoraOnly,
    /// `(1 - k) W0 + k (g beta W0 + alpha s B A)`
    GainOnBaseOnly,
    /// `W0`
    BaseOnly,
    /// `(1 - k) W0 + k g beta W0`
    WithoutLora,
    /// `g W0 + beta g s B A`
    BetaOnLora,
    /// `g W0 + e g (beta - 1) W0 + g alpha s B A`, all of it times e.
    EmbedScaleTwiceOnBeta,
    /// `e W0 + (g V - W0)`
    EmbedScaleOnBaseOnly,
}

/// b.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bias {
    /// `+ b`
    Added,
    /// `+ g b`
    Scaled,
    /// `+ beta b`
    TimesBeta,
    /// Nothing.
    Dropped,
    /// `+ 2 b`: by the base layer and by the adapter.
    Twice,
}

/// What is lost of the operator's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Walk {
    /// Nothing.
    Setting,
    /// This setting, by the whole operator.
    Without(&'static str),
    /// This setting, by A's path alone.
    LoraWithout(&'static str),
    /// This setting, by the gradient's fraction alone (E41).
    FractionWithout(&'static str),
    /// The direction of the kernel: convolution instead of cross-correlation.
    Flipped,
    /// The order of the kernel's axes, where it is as long along each.
    AxesSwapped,
}

/// What a gradient forgets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Overwritten {
    /// Nothing: contributions add up.
    Nothing,
    /// All occurrences of an id but the last.
    Ids,
    /// All windows that read an input but the last.
    Inputs,
}

/// A formula at a point.
pub(crate) struct Evaluated<R> {
    pub y: ArrayD<R>,
    /// One entry a norm; empty for LoRA.
    pub weight_norm: Vec<R>,
}

/// The definition's tensors at the point where n and what is looked up are held, and the case's settings.
pub(crate) struct Anchor {
    pub settings: Map<String, Value>,
    /// The formula's own n there; `None` while it is being found.
    pub weight_norm: Option<Vec<f64>>,
    /// W0 `[units, fan_in]` there
    pub base: Array2<f64>,
    /// A `[rank, fan_in]` there
    pub lora_a: Array2<f64>,
}

/// The matrix that a tensor is, one row an entry of its first axis.
pub(crate) fn matrix<R: Copy>(tensor: &ArrayD<R>) -> Array2<R> {
    let rows = tensor.shape()[0];
    let columns = tensor.len() / rows;
    tensor.to_shape((rows, columns)).expect("as many as before").into_owned()
}

impl Formula {
    /// y, or `None` where this mistake cannot be made: where it asks for another shape.
    pub(crate) fn evaluate<O: Operator, R: Real>(
        &self,
        definition: &Definition<'_, '_, O, R>,
        anchor: &Anchor,
    ) -> Result<Option<Evaluated<R>>> {
        let Definition { operator, config, input, adapter, base, .. } = definition;
        let (zero, one) = (R::constant(0.0), R::constant(1.0));
        let (units, fan_in) = (operator.units(), operator.fan_in());
        let w = operator.weight_matrix(base.weight.view()).to_owned();
        let (a, b) = (matrix(&adapter.lora_a), matrix(&adapter.lora_b));

        let learned = |this: &Option<ArrayD<R>>, other: &Option<ArrayD<R>>, way: Learned| {
            let value = |scalar: &Option<ArrayD<R>>| scalar.as_ref().map_or(one, |scalar| scalar[ndarray::IxDyn(&[])]);
            match way {
                Learned::Itself => value(this),
                Learned::One => one,
                Learned::Other => value(other),
                Learned::Squared => value(this) * value(this),
            }
        };
        let alpha = learned(&adapter.alpha, &adapter.beta, self.alpha);
        let beta = learned(&adapter.beta, &adapter.alpha, self.beta);
        let rank = a.nrows() as f64;
        let s = R::constant(match self.scaling {
            Scaling::Once => config.scaling,
            Scaling::Missing => 1.0,
            Scaling::Twice => config.scaling.powi(2),
            Scaling::TimesRank => config.scaling * rank,
            Scaling::TimesRootRank => config.scaling * rank.sqrt(),
        });

        let product = |a: ArrayView2<'_, R>| -> Array2<R> {
            let of_unit = |u: usize| match self.delta {
                Delta::FirstGroup => 0,
                _ => u / (units / operator.groups()) * b.ncols(),
            };
            let delta = Array2::from_shape_fn((units, fan_in), |(u, j)| {
                (0..b.ncols()).fold(zero, |sum, k| sum + b[[u, k]] * a[[of_unit(u) + k, j]])
            });
            if self.delta == Delta::Transposed { delta.reversed_axes() } else { delta }
        };
        let possible = match self.delta {
            Delta::Product => true,
            Delta::Transposed => units == fan_in,
            Delta::FirstGroup => operator.groups() > 1,
        };
        if !possible {
            return Ok(None);
        }
        let delta = product(a.view());

        // The norms.
        let kernel: usize = base.weight.shape()[2..].iter().product();
        let per_input = match self.norm_per {
            NormPer::Setting | NormPer::Whole => config.norm_axis == NormAxis::Input,
            NormPer::Output => false,
            NormPer::Input => true,
        };
        let index = |u: usize, j: usize| if per_input { j / kernel } else { u };
        let norms = if per_input { fan_in / kernel } else { units };
        let m: Vec<R> = adapter.magnitude.iter().flatten().copied().collect();
        let has_norm = config.has_norm();
        if has_norm && m.len() != norms {
            return Ok(None);
        }
        let root = |values: &Array2<R>| -> Vec<R> {
            let mut sums = vec![zero; norms];
            let mut counts = vec![0.0; norms];
            for ((u, j), &v) in values.indexed_iter() {
                let i = if self.norm_per == NormPer::Whole { 0 } else { index(u, j) };
                let absolute = if v.value() < 0.0 { zero - v } else { v };
                let squared = !matches!(self.norm, Norm::Absolute | Norm::Mean);
                sums[i] = sums[i] + if squared { v * v } else { absolute };
                counts[i] += 1.0;
            }
            let each = |i: usize| {
                let i = if self.norm_per == NormPer::Whole { 0 } else { i };
                let (sum, count) = (sums[i], R::constant(counts[i]));
                let eps = R::constant(config.norm_eps);
                let norm = match self.norm {
                    _ if sum.value() == 0.0 => return zero,
                    Norm::Euclidean if self.eps == Eps::InsideRoot => return (sum + eps).sqrt(),
                    Norm::Euclidean => sum.sqrt(),
                    Norm::Squared | Norm::Absolute => sum,
                    Norm::Mean => sum / count,
                    Norm::RootMeanSquare => (sum / count).sqrt(),
                };
                match self.eps {
                    Eps::Ignored | Eps::InsideRoot => norm,
                    Eps::Added => norm + eps,
                    Eps::InGradient => norm.damped(norm.value() / (norm + eps).value()) + eps,
                }
            };
            (0..norms).map(each).collect()
        };
        let base_norm = if self.weighted == Weighted::UnitBase { root(&w) } else { vec![] };
        // The part of V that W0 makes, and the part that B A makes.
        let of_base = |u: usize, j: usize, w: R| match self.weighted {
            Weighted::UnitBase if base_norm[index(u, j)].value() != 0.0 => beta * w / base_norm[index(u, j)],
            _ => beta * w,
        };
        let of_lora = |delta: R| match self.weighted {
            Weighted::BetaOutside => beta * alpha * s * delta,
            Weighted::Difference => zero - alpha * s * delta,
            _ => alpha * s * delta,
        };
        let n = if !has_norm {
            vec![]
        } else {
            let entry = |(u, j): (usize, usize)| {
                let (w, delta) = (w[[u, j]], delta[[u, j]]);
                match self.norm_of {
                    NormOf::Weighted => of_base(u, j, w) + of_lora(delta),
                    NormOf::Base => w,
                    NormOf::Delta => alpha * s * delta,
                    NormOf::WithoutScaling => beta * w + alpha * delta,
                    NormOf::WithoutAlphaBeta => w + s * delta,
                }
            };
            root(&Array2::from_shape_fn((units, fan_in), entry))
        };
        let held = match self.norm_gradient {
            Path::Setting => config.norm_gradient == NormGradient::Detached,
            Path::Held => true,
            Path::Free => false,
        };
        let n: Vec<R> = match &anchor.weight_norm {
            None => n,
            // A unit without a direction keeps its zero row.
            Some(here) => {
                n.iter().zip(here).map(|(&n, &here)| if held || here == 0.0 { R::constant(here) } else { n }).collect()
            }
        };
        let gain = |u: usize, j: usize| {
            if !has_norm {
                return one;
            }
            let (m, n) = (if self.gain == Gain::Outer { m[j % m.len()] } else { m[index(u, j)] }, n[index(u, j)]);
            match self.gain {
                Gain::One => one,
                Gain::Magnitude => m,
                _ if n.value() == 0.0 => zero,
                Gain::Ratio | Gain::Outer => m / n,
                Gain::Reciprocal => one / n,
                Gain::Inverted => n / m,
                Gain::NormTwice => m / n / n,
            }
        };
        if self.gain == Gain::Outer && (!has_norm || units != fan_in) {
            return Ok(None);
        }

        // What is looked up moves by a fraction of what A and W0 move by (E41).
        let without = |name: &str| -> Result<O> {
            let mut settings = anchor.settings.clone();
            settings.remove(name);
            let settings = serde_json::from_value(settings.into()).expect("settings with one left out");
            O::from_weight_shape(settings, base.weight.shape())
        };
        let (base_walk, lora_walk) = match self.walk {
            Walk::Without(name) => (without(name)?, without(name)?),
            Walk::LoraWithout(name) => ((*operator).clone(), without(name)?),
            _ => ((*operator).clone(), (*operator).clone()),
        };
        let fraction = match self.walk {
            Walk::FractionWithout(name) => without(name)?.gradient_fraction::<f64>(input),
            _ => operator.gradient_fraction::<f64>(input),
        };
        let shape = operator.output_shape::<f64>(input)?;
        for walk in [&base_walk, &lora_walk] {
            if !walk.output_shape::<f64>(input).is_ok_and(|other| other == shape) {
                return Ok(None);
            }
        }
        let moved = |values: &Array2<R>, anchor: &Array2<f64>, fraction: &dyn Fn(usize) -> f64| {
            Array2::from_shape_fn(values.dim(), |(i, j)| {
                let here = R::constant(anchor[[i, j]]);
                here + (values[[i, j]] - here) * R::constant(fraction(j))
            })
        };
        let (looked_up, looked_up_delta) = match &fraction {
            None => (w.clone(), delta.clone()),
            Some(fraction) => {
                let fraction = |j: usize| fraction[j];
                (moved(&w, &anchor.base, &fraction), product(moved(&a, &anchor.lora_a, &fraction).view()))
            }
        };
        // The same with W0 and A standing still: what an overwritten lookup has left of its gradient.
        let (still, still_delta) = match self.overwritten {
            Overwritten::Ids => {
                (moved(&w, &anchor.base, &|_| 0.0), product(moved(&a, &anchor.lora_a, &|_| 0.0).view()))
            }
            _ => (looked_up.clone(), looked_up_delta.clone()),
        };

        let Some(columns) = columns(self.walk, &base.weight.shape()[2..], fan_in) else { return Ok(None) };
        let outputs_of_unit: usize = shape[operator.unit_axis(shape.len()) + 1..].iter().product();
        let x: Option<Vec<R>> = definition.x.as_ref().map(|x| x.iter().copied().collect());
        let mask: Option<Vec<R>> = definition.mask.as_ref().map(|mask| mask.iter().copied().collect());
        let embed_scale = |t: Term| R::constant(t.factor);
        let mut y = vec![zero; shape.iter().product()];
        let mut visit = |t: Term, lora: bool, last: bool| {
            let (u, j) = (t.unit, columns[t.column]);
            let (w, delta) = match last || self.overwritten != Overwritten::Ids {
                true => (looked_up[[u, j]], looked_up_delta[[u, j]]),
                false => (still[[u, j]], still_delta[[u, j]]),
            };
            let k = mask.as_ref().zip(t.input).map_or(one, |(mask, input)| mask[input]);
            let k = match self.output {
                Output::DropoutUnscaled if k.value() != 0.0 => one,
                Output::DropoutIgnored => one,
                _ => k,
            };
            let (g, base, lora_part) = (gain(u, j), of_base(u, j, w), of_lora(delta));
            let e = embed_scale(t);
            let (on_base, on_lora) = match self.output {
                Output::Correction | Output::DropoutIgnored | Output::DropoutUnscaled => {
                    ((one - k) * w + k * g * base, k * g * lora_part)
                }
                Output::DropoutOnEverything => (k * g * base, k * g * lora_part),
                Output::DropoutOnLoraOnly => (g * base, k * g * lora_part),
                Output::BaseTwice => (w + k * g * base, k * g * lora_part),
                Output::GainOnLoraOnly => (base, k * g * lora_part),
                Output::GainOnBaseOnly => ((one - k) * w + k * g * base, k * lora_part),
                Output::BaseOnly => (w, zero),
                Output::WithoutLora => ((one - k) * w + k * g * base, zero),
                Output::BetaOnLora => (g * w, beta * g * s * delta),
                Output::EmbedScaleTwiceOnBeta => (g * w + g * (beta - one) * e * w, g * lora_part),
                Output::EmbedScaleOnBaseOnly => (w + (g * base - w) / e, g * lora_part / e),
            };
            let input = t.input.zip(x.as_ref()).map_or(one, |(input, x)| {
                if last || self.overwritten != Overwritten::Inputs { x[input] } else { x[input].damped(0.0) }
            });
            y[t.output] = y[t.output] + if lora { on_lora } else { on_base } * input * e;
        };
        for (lora, walk) in [(false, &base_walk), (true, &lora_walk)] {
            let last = last_of(self.overwritten, walk, input, outputs_of_unit);
            let mut count = 0;
            walk.terms::<f64>(input, |t| {
                visit(t, lora, last.as_ref().is_none_or(|last| last[count]));
                count += 1;
            });
        }
        if let Some(bias) = &base.bias {
            for (o, y) in y.iter_mut().enumerate() {
                let u = (o / outputs_of_unit) % units;
                *y = *y
                    + match self.bias {
                        Bias::Added => bias[u],
                        Bias::Scaled if per_input => return Ok(None),
                        Bias::Scaled => gain(u, 0) * bias[u],
                        Bias::TimesBeta => beta * bias[u],
                        Bias::Dropped => zero,
                        Bias::Twice => bias[u] + bias[u],
                    };
            }
        }
        Ok(Some(Evaluated { y: ArrayD::from_shape_vec(shape, y).expect("as many outputs"), weight_norm: n }))
    }
}

/// Which column of the weight every column is taken for; `None` where the kernel has no such order.
fn columns(walk: Walk, kernel_size: &[usize], fan_in: usize) -> Option<Vec<usize>> {
    let kernel: usize = kernel_size.iter().product();
    let side = kernel_size.first().copied().unwrap_or(1);
    let possible = match walk {
        Walk::Flipped => kernel > 1,
        Walk::AxesSwapped => kernel_size.len() > 1 && side > 1 && kernel_size.iter().all(|&extent| extent == side),
        _ => true,
    };
    let place = |k: usize| match walk {
        Walk::Flipped => kernel - 1 - k,
        Walk::AxesSwapped => {
            let digits = kernel_size.iter().scan(k, |rest, _| Some((*rest % side, *rest /= side).0));
            digits.fold(0, |swapped, digit| swapped * side + digit)
        }
        _ => k,
    };
    possible.then(|| (0..fan_in).map(|column| column / kernel * kernel + place(column % kernel)).collect())
}

/// For every term whether it is the last that adds to what is overwritten; `None` where nothing is.
fn last_of<O: Operator>(
    overwritten: Overwritten,
    operator: &O,
    input: &O::Input<'_, f64>,
    outputs_of_unit: usize,
) -> Option<Vec<bool>> {
    if overwritten == Overwritten::Nothing {
        return None;
    }
    // What a term adds to, and when: every unit adds at the same time.
    let mut all = Vec::new();
    operator.terms::<f64>(input, |t| {
        all.push(match t.input {
            None => (t.column, t.output / operator.units()),
            Some(input) => (input, t.column * outputs_of_unit + t.output % outputs_of_unit),
        });
    });
    let last: BTreeMap<usize, usize> = all.iter().copied().collect();
    Some(all.iter().map(|(target, time)| last[target] == *time).collect())
}
