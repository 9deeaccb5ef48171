//! A [`Formula`] at a case, on any kind of number: the lines of SPEC.md, section 4, in the order in which they are
//! computed, each taking the way that the formula says. It shares nothing with the definition.

use super::formula::{Bias, Delta, Eps, Formula, Gain, Learned, Norm, NormOf, NormPer, Output, Overwritten, Path};
use super::formula::{Scaling, Walk, Weighted};
use crate::operators::{Operator, Term};
use crate::wora::{Definition, NormAxis, NormGradient, as_matrix};
use crate::{Real, Result};
use ndarray::{Array2, ArrayD, ArrayView2, IxDyn};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What a formula comes to.
pub(crate) struct Evaluated<R> {
    pub y: ArrayD<R>,
    /// One entry a norm; empty for LoRA.
    pub weight_norm: Vec<R>,
    /// One entry a norm; empty for LoRA.
    pub gain: Vec<R>,
    /// V: `[units, fan_in]`
    pub weighted: Array2<R>,
    /// `g V`: `[units, fan_in]`
    pub merged: Array2<R>,
}

/// The point where n is held and from which what is looked up moves, and the case's settings.
pub(crate) struct Anchor {
    pub settings: Map<String, Value>,
    /// The formula's own n there; `None` while it is being found.
    pub weight_norm: Option<Vec<f64>>,
    /// W0 there: `[units, fan_in]`
    pub base: Array2<f64>,
    /// A there: `[rank, fan_in]`
    pub lora_a: Array2<f64>,
}

impl Formula {
    /// y and n, or `None` where this mistake cannot be made: where it asks for other shapes.
    pub(crate) fn evaluate<O: Operator, R: Real>(
        &self,
        definition: &Definition<'_, '_, O, R>,
        anchor: &Anchor,
    ) -> Result<Option<Evaluated<R>>> {
        let Some(stages) = Stages::new(self, definition, anchor) else { return Ok(None) };
        let base = definition.operator.weight_matrix(definition.base.weight.view()).to_owned();
        let lora_a = as_matrix(&definition.adapter.lora_a).to_owned();
        let delta = stages.delta(lora_a.view());
        let weight_norm = stages.weight_norm(&base, &delta, anchor.weight_norm.as_deref());
        let gains = Array2::from_shape_fn(base.dim(), |at| stages.gain(&weight_norm, at));
        let Some(y) = stages.output(&base, &lora_a, &gains, anchor)? else { return Ok(None) };
        let weighted = stages.weighted(&base, &delta);
        let gain =
            (0..weight_norm.len()).map(|i| gains[if stages.per_input { (0, i * stages.kernel) } else { (i, 0) }]);
        let gain = gain.collect();
        let merged = Array2::from_shape_fn(base.dim(), |at| gains[at] * weighted[at]);
        Ok(Some(Evaluated { y, weight_norm, gain, weighted, merged }))
    }
}

/// What meets at one term of the operator.
struct Entry<R> {
    w: R,
    delta: R,
    /// `beta w`
    of_base: R,
    /// `alpha s delta`
    of_lora: R,
    gain: R,
    /// 1 without one.
    mask: R,
    embed_scale: R,
}

/// The stages of a formula at a point.
struct Stages<'a, 'd, 'x, O: Operator, R> {
    formula: &'a Formula,
    at: &'a Definition<'d, 'x, O, R>,
    alpha: R,
    beta: R,
    s: R,
    /// One entry a norm; empty for LoRA.
    m: Vec<R>,
    norms: usize,
    /// Whether norms are those of input columns: with a kernel, of its input channels.
    per_input: bool,
    /// Columns of the weight that share an input channel.
    kernel: usize,
}

impl<'a, 'd, 'x, O: Operator, R: Real> Stages<'a, 'd, 'x, O, R> {
    fn new(formula: &'a Formula, at: &'a Definition<'d, 'x, O, R>, anchor: &Anchor) -> Option<Self> {
        let (operator, config, adapter) = (at.operator, at.config, &at.adapter);
        let value = |scalar: &Option<ArrayD<R>>| scalar.as_ref().map_or(R::constant(1.0), |value| value[IxDyn(&[])]);
        let learned = |way: Learned, this: R, other: R| match way {
            Learned::Itself => this,
            Learned::One => R::constant(1.0),
            Learned::Other => other,
            Learned::Squared => this * this,
        };
        let (alpha, beta) = (value(&adapter.alpha), value(&adapter.beta));
        let rank = adapter.rank() as f64;
        let s = R::constant(match formula.scaling {
            Scaling::Once => config.scaling,
            Scaling::Missing => 1.0,
            Scaling::Twice => config.scaling.powi(2),
            Scaling::TimesRank => config.scaling * rank,
            Scaling::TimesRootRank => config.scaling * rank.sqrt(),
        }); // E8
        let kernel: usize = at.base.weight.shape()[2..].iter().product();
        let per_input = match formula.norm_per {
            NormPer::Setting | NormPer::Whole => config.norm_axis == NormAxis::Input,
            NormPer::Output => false,
            NormPer::Input | NormPer::StoredRow => true,
        };
        let (units, fan_in) = (operator.units(), operator.fan_in());
        let norms = if per_input { fan_in / kernel } else { units };
        let m: Vec<R> = adapter.magnitude.iter().flatten().copied().collect();
        let (square, has_norm) = (units == fan_in, config.has_norm());
        let stored_transposed = anchor.settings.get("fan_in_fan_out") == Some(&true.into());
        let possible = (m.len() == norms || !has_norm)
            && (formula.delta != Delta::Transposed || square)
            && (formula.delta != Delta::FirstGroup || operator.groups() > 1)
            && (formula.gain != Gain::Outer || (square && has_norm && !per_input))
            && (formula.norm_per != NormPer::StoredRow || stored_transposed && config.norm_axis == NormAxis::Output)
            && (formula.bias != Bias::Scaled || !per_input);
        let (alpha, beta) = (learned(formula.alpha, alpha, beta), learned(formula.beta, beta, alpha));
        possible.then_some(Self { formula, at, alpha, beta, s, m, norms, per_input, kernel })
    }

    /// B A: `[units, fan_in]`
    fn delta(&self, a: ArrayView2<'_, R>) -> Array2<R> {
        let (operator, b) = (self.at.operator, as_matrix(&self.at.adapter.lora_b));
        let units = operator.units();
        let first = |u: usize| match self.formula.delta {
            Delta::FirstGroup => 0,
            _ => u / (units / operator.groups()) * b.ncols(),
        };
        let delta = Array2::from_shape_fn((units, operator.fan_in()), |(u, j)| {
            (0..b.ncols()).fold(R::constant(0.0), |sum, k| sum + b[[u, k]] * a[[first(u) + k, j]])
        });
        if self.formula.delta == Delta::Transposed { delta.reversed_axes() } else { delta }
    }

    /// The norm that an entry of V belongs to.
    fn index(&self, (u, j): (usize, usize)) -> usize {
        if self.per_input { j / self.kernel } else { u }
    }

    /// What W0 adds to V. E9
    fn of_base(&self, w: R, base_norm: Option<R>) -> R {
        match base_norm {
            Some(norm) if norm.value() != 0.0 => self.beta * w / norm,
            _ => self.beta * w,
        }
    }

    /// What B A adds to V. E9
    fn of_lora(&self, delta: R) -> R {
        let term = self.alpha * self.s * delta;
        match self.formula.weighted {
            Weighted::BetaOutside => self.beta * term,
            Weighted::Difference => R::constant(0.0) - term,
            Weighted::Sum | Weighted::UnitBase => term,
        }
    }

    /// `||W0||`, where V is made of its direction.
    fn base_norm(&self, base: &Array2<R>) -> Option<Vec<R>> {
        let unit = self.formula.weighted == Weighted::UnitBase && self.at.config.has_norm();
        unit.then(|| self.norm(base, Eps::Ignored))
    }

    /// V. E9
    fn weighted(&self, base: &Array2<R>, delta: &Array2<R>) -> Array2<R> {
        let base_norm = self.base_norm(base);
        Array2::from_shape_fn(base.dim(), |at| {
            self.of_base(base[at], base_norm.as_ref().map(|norm| norm[self.index(at)])) + self.of_lora(delta[at])
        })
    }

    /// One norm a unit or column, with its epsilon. E10
    fn norm(&self, values: &Array2<R>, way: Eps) -> Vec<R> {
        let place = |i: usize| if self.formula.norm_per == NormPer::Whole { 0 } else { i };
        let mut sums = vec![R::constant(0.0); self.norms];
        let mut counts = vec![0.0; self.norms];
        for (at, &v) in values.indexed_iter() {
            let i = place(self.index(at));
            let absolute = if v.value() < 0.0 { R::constant(0.0) - v } else { v };
            let is_absolute = matches!(self.formula.norm, Norm::Absolute | Norm::Mean);
            sums[i] = sums[i] + if is_absolute { absolute } else { v * v };
            counts[i] += 1.0;
        }
        let eps = R::constant(self.at.config.norm_eps);
        let one = |i: usize| {
            let (sum, count) = (sums[place(i)], R::constant(counts[place(i)]));
            if sum.value() == 0.0 {
                return R::constant(0.0);
            }
            let inside = if way == Eps::InsideRoot { sum + eps } else { sum };
            let norm = match self.formula.norm {
                Norm::Euclidean => inside.sqrt(),
                Norm::Squared | Norm::Absolute => sum,
                Norm::Mean => sum / count,
                Norm::RootMeanSquare => (sum / count).sqrt(),
            };
            match way {
                Eps::Ignored | Eps::InsideRoot => norm,
                Eps::Added => norm + eps,
                Eps::InGradient => norm.damped(norm.value() / (norm + eps).value()) + eps,
            }
        };
        (0..self.norms).map(one).collect()
    }

    /// n, held at the anchor's where the gradient is not to see it. E10
    fn weight_norm(&self, base: &Array2<R>, delta: &Array2<R>, anchor: Option<&[f64]>) -> Vec<R> {
        if !self.at.config.has_norm() {
            return vec![];
        }
        let (alpha, beta, s) = (self.alpha, self.beta, self.s);
        let each = |entry: &dyn Fn(R, R) -> R| Array2::from_shape_fn(base.dim(), |at| entry(base[at], delta[at]));
        let of = match self.formula.norm_of {
            NormOf::Weighted => self.weighted(base, delta),
            NormOf::Base => base.clone(),
            NormOf::Delta => each(&|_, delta| alpha * s * delta),
            NormOf::WithoutScaling => each(&|w, delta| beta * w + alpha * delta),
            NormOf::WithoutAlphaBeta => each(&|w, delta| w + s * delta),
        };
        let n = self.norm(&of, self.formula.eps);
        let held = match self.formula.norm_gradient {
            Path::Setting => self.at.config.norm_gradient == NormGradient::Detached,
            Path::Held => true,
            Path::Free => false,
        };
        let Some(anchor) = anchor else { return n };
        // A unit without a direction keeps its zero row.
        let one = |(&n, &here): (&R, &f64)| if held || here == 0.0 { R::constant(here) } else { n };
        n.iter().zip(anchor).map(one).collect()
    }

    /// What V is multiplied by. E11
    fn gain(&self, weight_norm: &[R], at: (usize, usize)) -> R {
        if !self.at.config.has_norm() {
            return R::constant(1.0);
        }
        let (m, n) = (self.m[self.index(at)], weight_norm[self.index(at)]);
        match self.formula.gain {
            Gain::One => R::constant(1.0),
            Gain::Magnitude => m,
            _ if n.value() == 0.0 && self.formula.gain != Gain::Unguarded => R::constant(0.0),
            Gain::Ratio | Gain::Unguarded => m / n,
            Gain::Outer => self.m[at.1] / n,
            Gain::Reciprocal => R::constant(1.0) / n,
            Gain::Inverted => n / m,
            Gain::NormTwice => m / n / n,
        }
    }

    /// What an input is multiplied by on its way through W0, and through B A. E13
    fn weights(&self, entry: Entry<R>) -> (R, R) {
        let Entry { w, delta, of_base: base, of_lora: lora, gain: g, mask: k, embed_scale: e } = entry;
        let one = R::constant(1.0);
        let k = match self.formula.output {
            Output::DropoutUnscaled if k.value() != 0.0 => one,
            Output::DropoutIgnored => one,
            _ => k,
        };
        let (kept, corrected) = ((one - k) * w, k * g * base);
        match self.formula.output {
            Output::Correction | Output::DropoutIgnored | Output::DropoutUnscaled => (kept + corrected, k * g * lora),
            Output::DropoutOnEverything => (corrected, k * g * lora),
            Output::DropoutOnLoraOnly => (g * base, k * g * lora),
            Output::BaseTwice => (w + corrected, k * g * lora),
            Output::GainOnLoraOnly => (base, k * g * lora),
            Output::GainOnBaseOnly => (kept + corrected, k * lora),
            Output::BaseOnly => (w, R::constant(0.0)),
            Output::WithoutLora => (kept + corrected, R::constant(0.0)),
            Output::BetaOnLora => (g * w, self.beta * g * self.s * delta),
            Output::EmbedScaleTwiceOnBeta => (g * w + g * (self.beta - one) * e * w, g * lora),
            Output::EmbedScaleOnBaseOnly => (w + (g * base - w) / e, g * lora / e),
        }
    }

    /// y; `None` where the operator with a setting lost gives another shape, or its kernel has no other order. E13
    fn output(
        &self,
        base: &Array2<R>,
        lora_a: &Array2<R>,
        gain: &Array2<R>,
        anchor: &Anchor,
    ) -> Result<Option<ArrayD<R>>> {
        let Definition { operator, input, .. } = *self.at;
        let shape = operator.output_shape::<f64>(input)?;
        let (base_walk, lora_walk) = match self.formula.walk {
            Walk::Without(setting) => (self.without(setting, anchor)?, self.without(setting, anchor)?),
            Walk::LoraWithout(setting) => (operator.clone(), self.without(setting, anchor)?),
            _ => (operator.clone(), operator.clone()),
        };
        let fits = |walk: &O| walk.output_shape::<f64>(input).is_ok_and(|other| other == shape);
        let columns = columns(self.formula.walk, &self.at.base.weight.shape()[2..], operator.fan_in());
        let (Some(columns), true) = (columns, fits(&base_walk) && fits(&lora_walk)) else { return Ok(None) };

        let outputs_of_unit: usize = shape[operator.unit_axis(shape.len()) + 1..].iter().product();
        let moving = self.looked_up(base, lora_a, anchor)?;
        // What an overwritten lookup has left of its gradient: nothing.
        let still = (moved(base, &anchor.base, |_| 0.0), self.delta(moved(lora_a, &anchor.lora_a, |_| 0.0).view()));
        let base_norm = self.base_norm(base);
        let x: Option<Vec<R>> = self.at.x.as_ref().map(|x| x.iter().copied().collect());
        let mask: Option<Vec<R>> = self.at.mask.as_ref().map(|mask| mask.iter().copied().collect());
        let one = R::constant(1.0);
        let weigh = |(w, delta): (&Array2<R>, &Array2<R>), at: (usize, usize), mask: R, embed_scale: f64| {
            self.weights(Entry {
                w: w[at],
                delta: delta[at],
                of_base: self.of_base(w[at], base_norm.as_ref().map(|norm| norm[self.index(at)])),
                of_lora: self.of_lora(delta[at]),
                gain: gain[at],
                mask,
                embed_scale: R::constant(embed_scale),
            })
        };
        // Without a mask an element of the weight is the same wherever it is met.
        let mut met = Array2::from_elem(base.dim(), None);
        let mut y = vec![R::constant(0.0); shape.iter().product()];
        for (through_lora, walk) in [(false, &base_walk), (true, &lora_walk)] {
            let last = last_of(self.formula.overwritten, walk, input, outputs_of_unit);
            let mut visited = 0;
            walk.terms::<f64>(input, |t| {
                let counts = last.as_ref().is_none_or(|last| last[visited]);
                visited += 1;
                let at = (t.unit, columns[t.column]);
                let looked_up = self.formula.overwritten != Overwritten::Ids || counts;
                let (on_base, on_lora) = match mask.as_ref().zip(t.input) {
                    Some((mask, input)) => weigh((&moving.0, &moving.1), at, mask[input], t.factor),
                    None if looked_up => {
                        *met[at].get_or_insert_with(|| weigh((&moving.0, &moving.1), at, one, t.factor))
                    }
                    None => weigh((&still.0, &still.1), at, one, t.factor),
                };
                let mut term = if through_lora { on_lora } else { on_base };
                if let Some((input, x)) = t.input.zip(x.as_ref()) {
                    let counts = self.formula.overwritten != Overwritten::Inputs || counts;
                    term = term * if counts { x[input] } else { x[input].damped(0.0) };
                }
                if t.factor != 1.0 {
                    term = term * R::constant(t.factor);
                }
                y[t.output] = y[t.output] + term;
            });
        }
        if let Some(bias) = &self.at.base.bias {
            for (o, y) in y.iter_mut().enumerate() {
                let u = (o / outputs_of_unit) % operator.units();
                *y = *y + self.bias(bias[u], gain[(u, 0)]);
            }
        }
        Ok(Some(ArrayD::from_shape_vec(shape, y).expect("as many outputs as the shape says")))
    }

    /// What is added to an output of a unit with this bias and gain. E13
    fn bias(&self, b: R, g: R) -> R {
        match self.formula.bias {
            Bias::Added => b,
            Bias::Scaled => g * b,
            Bias::TimesBeta => self.beta * b,
            Bias::Dropped => R::constant(0.0),
            Bias::Twice => b + b,
        }
    }

    /// The operator as it is without one of the case's settings.
    fn without(&self, setting: &str, anchor: &Anchor) -> Result<O> {
        let mut settings = anchor.settings.clone();
        settings.remove(setting);
        let settings = serde_json::from_value(settings.into()).expect("the settings of a case but one");
        O::from_weight_shape(settings, self.at.base.weight.shape())
    }

    /// W0 and B A as the lookup sees them: moved by only a fraction of what W0 and A move by. E41
    fn looked_up(&self, base: &Array2<R>, lora_a: &Array2<R>, anchor: &Anchor) -> Result<(Array2<R>, Array2<R>)> {
        let fraction = match self.formula.walk {
            Walk::FractionWithout(setting) => self.without(setting, anchor)?.gradient_fraction::<f64>(self.at.input),
            _ => self.at.operator.gradient_fraction::<f64>(self.at.input),
        };
        let Some(fraction) = fraction else { return Ok((base.clone(), self.delta(lora_a.view()))) };
        let lora_a = moved(lora_a, &anchor.lora_a, |j| fraction[j]);
        Ok((moved(base, &anchor.base, |j| fraction[j]), self.delta(lora_a.view())))
    }
}

/// Each column moved from the anchor by a fraction of the way.
fn moved<R: Real>(values: &Array2<R>, anchor: &Array2<f64>, fraction: impl Fn(usize) -> f64) -> Array2<R> {
    Array2::from_shape_fn(values.dim(), |(i, j)| {
        let here = R::constant(anchor[[i, j]]);
        here + (values[[i, j]] - here) * R::constant(fraction(j))
    })
}

/// Which column of the weight every column is taken for; `None` where the kernel has no other order.
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
    operator.terms::<f64>(input, |t: Term| {
        all.push(match t.input {
            None => (t.column, t.output / operator.units()),
            Some(input) => (input, t.column * outputs_of_unit + t.output % outputs_of_unit),
        });
    });
    let last: BTreeMap<usize, usize> = all.iter().copied().collect();
    Some(all.iter().map(|(target, time)| last[target] == *time).collect())
}
