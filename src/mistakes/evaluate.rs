//! A [`Formula`] at a case, on traced numbers: the lines of SPEC.md, section 4, in the order in which they are
//! computed, each taking the way that the formula says. It shares nothing with the definition; products and operators it
//! has from the production path.

use super::blocks::{Adjoint, operate, product};
use super::formula::{Bias, Delta, Eps, Formula, Gain, Learned, Norm, NormOf, NormPer, Output, Overwritten, Path};
use super::formula::{Scaling, Walk, Weighted};
use crate::operators::Operator;
use crate::traced::Traced;
use crate::wora::{Definition, NormAxis, NormGradient, as_matrix};
use crate::{Real, Result};
use ndarray::{Array2, ArrayD, ArrayView2, Axis, IxDyn, concatenate};
use serde_json::{Map, Value};

/// What a formula comes to.
pub(crate) struct Evaluated {
    pub y: ArrayD<Traced>,
    /// One entry a norm; empty for LoRA.
    pub weight_norm: Vec<f64>,
    /// One entry a norm; empty for LoRA.
    pub gain: Vec<f64>,
    /// V: `[units, fan_in]`
    pub weighted: Array2<f64>,
    /// `g V`: `[units, fan_in]`
    pub merged: Array2<f64>,
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
    /// What it comes to, or `None` where this mistake cannot be made: where it asks for other shapes.
    pub(crate) fn evaluate<O: Operator>(
        &self,
        definition: &Definition<'_, '_, O, Traced>,
        anchor: &Anchor,
    ) -> Result<Option<Evaluated>> {
        let Some(stages) = Stages::new(self, definition, anchor)? else { return Ok(None) };
        let base = definition.operator.weight_matrix(definition.base.weight.view()).to_owned();
        let lora_a = as_matrix(&definition.adapter.lora_a).to_owned();
        let delta = stages.delta(lora_a.view());
        let weighted = stages.weighted(&base, &delta);
        let weight_norm = stages.weight_norm(&base, &delta, &weighted, anchor.weight_norm.as_deref());
        let gains = stages.gains(&weight_norm, base.dim());
        let y = stages.output(&base, &lora_a, &delta, &gains, anchor)?;
        let (weighted, gains) = (weighted.mapv(Real::value), gains.mapv(Real::value));
        let of_norm = |i: usize| gains[if stages.per_input { (0, i * stages.kernel) } else { (i, 0) }];
        let gain = (0..weight_norm.len()).map(of_norm).collect();
        let weight_norm = weight_norm.into_iter().map(Real::value).collect();
        Ok(Some(Evaluated { y, weight_norm, gain, merged: &gains * &weighted, weighted }))
    }

    /// Its n at a case; `None` where this mistake cannot be made.
    pub(crate) fn weight_norm<O: Operator>(
        &self,
        definition: &Definition<'_, '_, O, Traced>,
        anchor: &Anchor,
    ) -> Result<Option<Vec<f64>>> {
        let Some(stages) = Stages::new(self, definition, anchor)? else { return Ok(None) };
        let base = definition.operator.weight_matrix(definition.base.weight.view()).to_owned();
        let delta = stages.delta(as_matrix(&definition.adapter.lora_a));
        Ok(Some(
            stages
                .weight_norm(&base, &delta, &stages.weighted(&base, &delta), None)
                .into_iter()
                .map(Real::value)
                .collect(),
        ))
    }
}

/// What meets at one element of the weight.
struct Entry {
    w: Traced,
    delta: Traced,
    /// `beta w`
    of_base: Traced,
    /// `alpha s delta`
    of_lora: Traced,
    gain: Traced,
    embed_scale: Traced,
}

/// What the input is multiplied by, and beside it the masked input.
#[derive(Clone, Copy)]
struct Through {
    input: Traced,
    masked: Traced,
}

/// The stages of a formula at a point.
struct Stages<'a, 'd, 'x, O: Operator> {
    formula: &'a Formula,
    at: &'a Definition<'d, 'x, O, Traced>,
    alpha: Traced,
    beta: Traced,
    s: Traced,
    /// One entry a norm; empty for LoRA.
    m: Vec<Traced>,
    norms: usize,
    /// Whether norms are those of input columns: with a kernel, of its input channels.
    per_input: bool,
    /// Columns of the weight that share an input channel.
    kernel: usize,
    /// The operator, and which branches of the weight it is applied to.
    walks: Vec<(O, &'static [Branch])>,
    /// Which column of the weight every column is taken for.
    columns: Vec<usize>,
}

/// Through which part of the weight the input goes.
#[derive(Clone, Copy)]
enum Branch {
    Base,
    Lora,
}

impl<'a, 'd, 'x, O: Operator> Stages<'a, 'd, 'x, O> {
    fn new(formula: &'a Formula, at: &'a Definition<'d, 'x, O, Traced>, anchor: &Anchor) -> Result<Option<Self>> {
        let (operator, config, adapter) = (at.operator, at.config, &at.adapter);
        let value =
            |scalar: &Option<ArrayD<Traced>>| scalar.as_ref().map_or(Traced::constant(1.0), |value| value[IxDyn(&[])]);
        let learned = |way: Learned, this: Traced, other: Traced| match way {
            Learned::Itself => this,
            Learned::One => Traced::constant(1.0),
            Learned::Other => other,
            Learned::Squared => this * this,
        };
        let (alpha, beta) = (value(&adapter.alpha), value(&adapter.beta));
        let rank = adapter.rank() as f64;
        let s = Traced::constant(match formula.scaling {
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
        let m: Vec<Traced> = adapter.magnitude.iter().flatten().copied().collect();
        let (square, has_norm) = (units == fan_in, config.has_norm());
        let stored_transposed = anchor.settings.get("fan_in_fan_out") == Some(&true.into());
        let possible = (m.len() == norms || !has_norm)
            && (formula.delta != Delta::Transposed || square)
            && (formula.delta != Delta::FirstGroup || operator.groups() > 1)
            && (formula.gain != Gain::Outer || (square && has_norm && !per_input))
            && (formula.norm_per != NormPer::StoredRow || stored_transposed && config.norm_axis == NormAxis::Output)
            && (formula.bias != Bias::Scaled || !per_input);
        let (alpha, beta) = (learned(formula.alpha, alpha, beta), learned(formula.beta, beta, alpha));
        let without = |setting| operator_without(setting, at, anchor);
        let walks: Vec<(O, &'static [Branch])> = match formula.walk {
            Walk::Without(setting) => vec![(without(setting)?, &[Branch::Base, Branch::Lora])],
            Walk::LoraWithout(setting) => {
                vec![(operator.clone(), &[Branch::Base]), (without(setting)?, &[Branch::Lora])]
            }
            _ => vec![(operator.clone(), &[Branch::Base, Branch::Lora])],
        };
        let shape = operator.output_shape::<f64>(at.input)?;
        let fits = |(walk, _): &(O, _)| walk.output_shape::<f64>(at.input).is_ok_and(|other| other == shape);
        let columns = columns(formula.walk, &at.base.weight.shape()[2..], fan_in);
        let (Some(columns), true) = (columns, possible && walks.iter().all(fits)) else { return Ok(None) };
        Ok(Some(Self { formula, at, alpha, beta, s, m, norms, per_input, kernel, walks, columns }))
    }

    /// B A: `[units, fan_in]`
    fn delta(&self, a: ArrayView2<'_, Traced>) -> Array2<Traced> {
        let (groups, b) = (self.at.operator.groups(), as_matrix(&self.at.adapter.lora_b));
        let (units, ranks) = (self.at.operator.units() / groups, b.ncols());
        let group = |q: usize| {
            let of = |matrix: ArrayView2<'_, Traced>, q: usize, rows: usize| {
                matrix.slice_axis_move(Axis(0), (q * rows..(q + 1) * rows).into()).to_owned()
            };
            let ranks_of = if self.formula.delta == Delta::FirstGroup { 0 } else { q };
            product(of(b, q, units), of(a, ranks_of, ranks))
        };
        let deltas: Vec<Array2<Traced>> = (0..groups).map(group).collect();
        let views: Vec<_> = deltas.iter().map(|delta| delta.view()).collect();
        let delta = concatenate(Axis(0), &views).expect("rows of the same length");
        if self.formula.delta == Delta::Transposed { delta.reversed_axes() } else { delta }
    }

    /// The norm that an entry of V belongs to.
    fn index(&self, (u, j): (usize, usize)) -> usize {
        if self.per_input { j / self.kernel } else { u }
    }

    /// What W0 adds to V. E9
    fn of_base(&self, w: Traced, base_norm: Option<Traced>) -> Traced {
        let w = match self.formula.weighted {
            Weighted::Interpolated => (Traced::constant(1.0) - self.alpha) * w,
            _ => w,
        };
        match base_norm {
            Some(norm) if norm.value() != 0.0 => self.beta * w / norm,
            _ => self.beta * w,
        }
    }

    /// What B A adds to V. E9
    fn of_lora(&self, delta: Traced) -> Traced {
        let term = self.alpha * self.s * delta;
        match self.formula.weighted {
            Weighted::BetaOutside => self.beta * term,
            Weighted::Difference => Traced::constant(0.0) - term,
            Weighted::Sum | Weighted::UnitBase | Weighted::Interpolated => term,
        }
    }

    /// `||W0||`, where V is made of its direction.
    fn base_norm(&self, base: &Array2<Traced>) -> Option<Vec<Traced>> {
        let unit = self.formula.weighted == Weighted::UnitBase && self.at.config.has_norm();
        unit.then(|| self.norm(base, Eps::Ignored))
    }

    /// V. E9
    fn weighted(&self, base: &Array2<Traced>, delta: &Array2<Traced>) -> Array2<Traced> {
        let base_norm = self.base_norm(base);
        Array2::from_shape_fn(base.dim(), |at| {
            self.of_base(base[at], base_norm.as_ref().map(|norm| norm[self.index(at)])) + self.of_lora(delta[at])
        })
    }

    /// One norm a unit or column, with its epsilon. E10
    fn norm(&self, values: &Array2<Traced>, way: Eps) -> Vec<Traced> {
        let place = |i: usize| if self.formula.norm_per == NormPer::Whole { 0 } else { i };
        let mut sums = vec![Traced::constant(0.0); self.norms];
        let mut counts = vec![0.0; self.norms];
        for (at, &v) in values.indexed_iter() {
            let i = place(self.index(at));
            // With a slope of 0 at 0.
            let absolute = match v.value() {
                value if value > 0.0 => v,
                value if value < 0.0 => Traced::constant(0.0) - v,
                value => Traced::constant(value.abs()),
            };
            let is_absolute = matches!(self.formula.norm, Norm::Absolute | Norm::Mean);
            sums[i] = sums[i] + if is_absolute { absolute } else { v * v };
            counts[i] += 1.0;
        }
        let eps = Traced::constant(self.at.config.norm_eps);
        let one = |i: usize| {
            let (sum, count) = (sums[place(i)], Traced::constant(counts[place(i)]));
            if sum.value() == 0.0 {
                return Traced::constant(0.0);
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
    fn weight_norm(
        &self,
        base: &Array2<Traced>,
        delta: &Array2<Traced>,
        weighted: &Array2<Traced>,
        anchor: Option<&[f64]>,
    ) -> Vec<Traced> {
        if !self.at.config.has_norm() {
            return vec![];
        }
        let (alpha, beta, s) = (self.alpha, self.beta, self.s);
        let each = |entry: &dyn Fn(Traced, Traced) -> Traced| {
            let of = Array2::from_shape_fn(base.dim(), |at| entry(base[at], delta[at]));
            self.norm(&of, self.formula.eps)
        };
        let n = match self.formula.norm_of {
            NormOf::Weighted => self.norm(weighted, self.formula.eps),
            NormOf::Base => self.norm(base, self.formula.eps),
            NormOf::Delta => each(&|_, delta| alpha * s * delta),
            NormOf::WithoutScaling => each(&|w, delta| beta * w + alpha * delta),
            NormOf::WithoutAlphaBeta => each(&|w, delta| w + s * delta),
        };
        let held = match self.formula.norm_gradient {
            Path::Setting => self.at.config.norm_gradient == NormGradient::Detached,
            Path::Held => true,
            Path::Free => false,
        };
        let Some(anchor) = anchor else { return n };
        // A unit without a direction keeps its zero row.
        let one = |(&n, &here): (&Traced, &f64)| if held || here == 0.0 { Traced::constant(here) } else { n };
        n.iter().zip(anchor).map(one).collect()
    }

    /// What V is multiplied by: `[units, fan_in]`. E11
    fn gains(&self, weight_norm: &[Traced], shape: (usize, usize)) -> Array2<Traced> {
        if !self.at.config.has_norm() {
            return Array2::from_elem(shape, Traced::constant(1.0));
        }
        if self.formula.gain == Gain::Outer {
            return Array2::from_shape_fn(shape, |(i, j)| self.gain(self.m[j], weight_norm[i]));
        }
        let gains: Vec<Traced> = self.m.iter().zip(weight_norm).map(|(&m, &n)| self.gain(m, n)).collect();
        Array2::from_shape_fn(shape, |at| gains[self.index(at)])
    }

    /// g of a magnitude and a norm. E11
    fn gain(&self, m: Traced, n: Traced) -> Traced {
        match self.formula.gain {
            Gain::One => Traced::constant(1.0),
            Gain::Magnitude => m,
            _ if n.value() == 0.0 && self.formula.gain != Gain::Unguarded => Traced::constant(0.0),
            Gain::Ratio | Gain::Unguarded | Gain::Outer => m / n,
            Gain::Reciprocal => Traced::constant(1.0) / n,
            Gain::Inverted => n / m,
            Gain::NormTwice => m / n / n,
        }
    }

    /// What an input is multiplied by on its way through W0, and through B A. E13
    fn weights(&self, entry: Entry) -> [Through; 2] {
        let Entry { w, delta, of_base: base, of_lora: lora, gain: g, embed_scale: e } = entry;
        let (zero, one) = (Traced::constant(0.0), Traced::constant(1.0));
        let plain = |input| Through { input, masked: zero };
        let corrected = |correction| Through { input: w, masked: correction };
        let masked = |masked| Through { input: zero, masked };
        match self.formula.output {
            Output::Correction | Output::DropoutIgnored | Output::DropoutUnscaled => {
                [corrected(g * base - w), masked(g * lora)]
            }
            Output::DropoutOnEverything => [masked(g * base), masked(g * lora)],
            Output::DropoutOnLoraOnly => [plain(g * base), masked(g * lora)],
            Output::BaseTwice => [corrected(g * base), masked(g * lora)],
            Output::GainOnLoraOnly => [corrected(base - w), masked(g * lora)],
            Output::GainOnBaseOnly => [corrected(g * base - w), masked(lora)],
            Output::BaseOnly => [plain(w), plain(zero)],
            Output::WithoutLora => [corrected(g * base - w), plain(zero)],
            Output::BetaOnLora => [plain(g * w), plain(self.beta * g * self.s * delta)],
            Output::EmbedScaleTwiceOnBeta => [plain(g * w + g * (self.beta - one) * e * w), plain(g * lora)],
            Output::EmbedScaleOnBaseOnly => [plain(w + (g * base - w) / e), plain(g * lora / e)],
        }
    }

    /// y. E13
    fn output(
        &self,
        base: &Array2<Traced>,
        lora_a: &Array2<Traced>,
        delta: &Array2<Traced>,
        gain: &Array2<Traced>,
        anchor: &Anchor,
    ) -> Result<ArrayD<Traced>> {
        let Definition { operator, input, .. } = *self.at;
        let shape = operator.output_shape::<f64>(input)?;
        let moving = self.looked_up(base, lora_a, delta, anchor)?;
        // What an overwritten lookup has left of its gradient: nothing, but for what the gain passes on.
        let still = (self.formula.overwritten == Overwritten::Ids)
            .then(|| (moved(base, &anchor.base, |_| 0.0), self.delta(moved(lora_a, &anchor.lora_a, |_| 0.0).view())));
        let base_norm = self.base_norm(base);
        let embed_scale = anchor.settings.get("embed_scale").and_then(Value::as_f64).unwrap_or(1.0);
        let weigh = |(base, delta): &(Array2<Traced>, Array2<Traced>), at: (usize, usize)| {
            self.weights(Entry {
                w: base[at],
                delta: delta[at],
                of_base: self.of_base(base[at], base_norm.as_ref().map(|norm| norm[self.index(at)])),
                of_lora: self.of_lora(delta[at]),
                gain: gain[at],
                embed_scale: Traced::constant(embed_scale),
            })
        };
        let mask = self.at.mask.as_ref().filter(|_| self.formula.output != Output::DropoutIgnored);
        let kept = |k: f64| if self.formula.output == Output::DropoutUnscaled && k != 0.0 { 1.0 } else { k };
        let masked = self.at.x.as_ref().zip(mask).map(|(x, mask)| {
            let values = x.iter().zip(mask).map(|(&x, mask)| x * Traced::constant(kept(mask.value())));
            ArrayD::from_shape_vec(x.shape(), values.collect()).expect("a mask in the shape of x")
        });
        let mut parts = vec![];
        for (walk, branches) in &self.walks {
            let weight = |of: &(Array2<Traced>, Array2<Traced>), part: fn(Through) -> Traced| {
                Array2::from_shape_fn(base.dim(), |(u, j)| {
                    let through = weigh(of, (u, self.columns[j]));
                    let parts = branches.iter().map(|&branch| part(through[branch as usize]));
                    parts.reduce(|sum, part| sum + part).expect("a branch")
                })
            };
            let through = |x: Option<&ArrayD<Traced>>, part: fn(Through) -> Traced| {
                let adjoint = match (&still, self.formula.overwritten) {
                    (Some(still), _) => Adjoint::LastOccurrences { others: weight(still, part) },
                    (None, Overwritten::Inputs) => Adjoint::LastWindows,
                    (None, _) => Adjoint::Sum,
                };
                operate(walk, input, x, weight(&moving, part), adjoint, shape.clone())
            };
            let x = self.at.x.as_ref();
            match &masked {
                None => parts.push(through(x, |Through { input, masked }| input + masked)),
                Some(masked) => {
                    parts.push(through(x, |through| through.input));
                    parts.push(through(Some(masked), |through| through.masked));
                }
            }
        }
        let mut y = parts.into_iter().reduce(|sum, part| sum + &part).expect("an operator");
        if let Some(bias) = &self.at.base.bias {
            let outputs_of_unit: usize = shape[operator.unit_axis(shape.len()) + 1..].iter().product();
            for (o, y) in y.iter_mut().enumerate() {
                let u = (o / outputs_of_unit) % operator.units();
                *y = *y + self.bias(bias[u], gain[(u, 0)]);
            }
        }
        Ok(y)
    }

    /// What is added to an output of a unit with this bias and gain. E13
    fn bias(&self, b: Traced, g: Traced) -> Traced {
        match self.formula.bias {
            Bias::Added => b,
            Bias::Scaled => g * b,
            Bias::TimesBeta => self.beta * b,
            Bias::TimesScaling => self.s * b,
            Bias::Dropped => Traced::constant(0.0),
            Bias::Twice => b + b,
        }
    }

    /// W0 and B A as the lookup sees them: moved by only a fraction of what W0 and A move by. E41
    fn looked_up(
        &self,
        base: &Array2<Traced>,
        lora_a: &Array2<Traced>,
        delta: &Array2<Traced>,
        anchor: &Anchor,
    ) -> Result<(Array2<Traced>, Array2<Traced>)> {
        let fraction = match self.formula.walk {
            Walk::FractionWithout(setting) => {
                operator_without(setting, self.at, anchor)?.gradient_fraction::<f64>(self.at.input)
            }
            _ => self.at.operator.gradient_fraction::<f64>(self.at.input),
        };
        let Some(fraction) = fraction else { return Ok((base.clone(), delta.clone())) };
        let lora_a = moved(lora_a, &anchor.lora_a, |j| fraction[j]);
        Ok((moved(base, &anchor.base, |j| fraction[j]), self.delta(lora_a.view())))
    }
}

/// The operator as it is without one of the case's settings.
fn operator_without<O: Operator>(setting: &str, at: &Definition<'_, '_, O, Traced>, anchor: &Anchor) -> Result<O> {
    let mut settings = anchor.settings.clone();
    settings.remove(setting);
    let settings = serde_json::from_value(settings.into()).expect("the settings of a case but one");
    O::from_weight_shape(settings, at.base.weight.shape())
}

/// Each column moved from the anchor by a fraction of the way.
fn moved(values: &Array2<Traced>, anchor: &Array2<f64>, fraction: impl Fn(usize) -> f64) -> Array2<Traced> {
    Array2::from_shape_fn(values.dim(), |(i, j)| {
        let here = Traced::constant(anchor[[i, j]]);
        here + (values[[i, j]] - here) * Traced::constant(fraction(j))
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
