//! The bank of mistakes, checked from outside: what each id does is computed here once more, in loops over the
//! materialised weight and with central differences, from the words of the table and nothing of the bank's formulas.

mod command;

use command::wora;
use ndarray::ArrayD;
use rayon::prelude::*;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock};
use woracle::case::{Case, Tensor, Tensors, Values};
use woracle::cases::{Spec, Twist};
use woracle::gradcheck::{Verdict, Witness, check_mistake, try_mistake};
use woracle::mistakes::{Backward, Gain, MISTAKES, Mistake, RIGHT, mistake};
use woracle::oracle::diagnose::diagnose;
use woracle::oracle::{CaseFile, Dtype};
use woracle::registry::{LAYERS, Subject, layer, mistaken};

const SEED: u64 = 7;
/// Cases with more elements than this are left to the checker: here every gradient is a difference along each.
const SMALL: usize = 640;
const NOTHING_WRONG: &str = "";
/// A y that is no mistake of the bank, but gradients may be those of it: that of the frozen layer.
const BASE_ALONE: &str = "y = W0 x + b";
/// Another: without the product of B and A, which V still has in its norm.
const WITHOUT_LORA: &str = "y = g beta W0 x + b";
const ALPHA: &str = "lora_wora_alpha";
const BETA: &str = "lora_wora_beta";
const MAGNITUDE: &str = "lora_magnitude_vector";
const WEIGHT: &str = "base.weight";
const BIAS: &str = "base.bias";

/// The ids whose meaning is written down here: all of them.
const TABLE: &str = "
    norm-not-detached norm-detached norm-per-input norm-of-base norm-without-scaling norm-without-alpha-beta
    norm-of-whole-weight norm-mean norm-squared scaling-missing scaling-twice scaling-without-rank alpha-detached
    beta-detached alpha-beta-detached alpha-beta-swapped alpha-ignored beta-ignored beta-on-lora-term bias-scaled
    bias-dropped magnitude-ignored magnitude-dropped magnitude-gradient-extra-gain gradients-averaged
    gain-outer-product base-counted-twice groups-first-only delta-on-unit-direction dropout-base-uncorrected
    dropout-ignored dropout-on-everything embed-scale-missing embed-scale-twice-on-beta padding-idx-ignored
    norm-per-stored-row repeated-ids-overwritten kernel-flipped lora-dilation-dropped lora-padding-mode-dropped
    norm-of-delta norm-absolute norm-root-mean-square norm-eps-ignored norm-eps-inside-root magnitude-not-divided
    gain-norm-twice gain-on-lora-only gain-on-base-only scaling-root-of-rank alpha-squared beta-on-both-terms
    lora-subtracted alpha-interpolates bias-twice bias-times-beta bias-times-scaling dropout-unscaled
    embed-scale-on-base-only scale-grad-by-freq-ignored padding-mode-dropped fold-overwrites magnitude-detached
    lora-a-detached lora-b-detached base-weight-detached bias-detached input-detached norm-gradient-sign
    norm-gradient-twice norm-per-output norm-eps-in-norm-gradient gain-inverted zero-norm-not-guarded
    magnitude-gradient-undivided magnitude-gradient-of-base-only lora-gradient-without-scaling
    alpha-gradient-without-scaling alpha-beta-gradients-swapped beta-gradient-negated lora-gradient-without-alpha
    alpha-beta-norm-detached delta-transposed lora-gradient-without-gain lora-b-gradient-transposed
    base-weight-gradient-without-beta cotangent-ignored bias-gradient-scaled input-gradient-without-mask
    input-gradient-masked input-gradient-of-base-only input-gradient-without-lora embed-scale-missing-in-gradient
    kernel-axes-swapped padding-gradient-lost
";

/// `y[o] += W[u, c] x[i]` as `[o, u, c, i]`, and whether the term is stale: a stale one reads A and W0 of before they
/// moved, and so sends them no gradient.
type Term = ([usize; 4], bool);

/// An operator written out as its terms.
struct Terms {
    terms: Vec<Term>,
    /// The unit of every output.
    unit_of: Vec<usize>,
}

/// The mixed-radix digits of an index, the last running fastest.
fn digits(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut digits = vec![0; shape.len()];
    for (digit, &length) in digits.iter_mut().zip(shape).rev() {
        (*digit, index) = (index % length, index / length);
    }
    digits
}

fn float<'a>(case: &'a Case, name: &str) -> &'a Values {
    case.values(name).expect("a tensor of the case")
}

fn setting<'a>(case: &'a Case, name: &str) -> &'a Value {
    case.settings.get(name).unwrap_or(&Value::Null)
}

fn linear(case: &Case) -> Terms {
    let (x, weight) = (case.tensors["x"].shape(), case.tensors["base.weight"].shape());
    let cols = *x.last().expect("features");
    let units = weight[0] * weight[1] / cols;
    let rows = x[..x.len() - 1].iter().product::<usize>();
    let mut terms = vec![];
    for n in 0..rows {
        for u in 0..units {
            terms.extend((0..cols).map(|c| ([n * units + u, u, c, n * cols + c], false)));
        }
    }
    Terms { terms, unit_of: (0..rows * units).map(|o| o % units).collect() }
}

/// The input is the number 1, at an id's column.
fn embedding(case: &Case, wrong: &str) -> Terms {
    let Tensor::Int(ids) = &case.tensors["x"] else { panic!("ids") };
    let ids: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
    let units = case.tensors["base.weight"].shape()[1];
    let mut terms = vec![];
    for (n, &c) in ids.iter().enumerate() {
        let stale = wrong == "repeated-ids-overwritten" && ids[n + 1..].contains(&c);
        terms.extend((0..units).map(|u| ([n * units + u, u, c, 0], stale)));
    }
    Terms { terms, unit_of: (0..ids.len() * units).map(|o| o % units).collect() }
}

/// A convolution's terms; `drop` is a setting left at its default.
fn convolution(case: &Case, drop: &str, wrong: &str) -> Terms {
    let (x, weight) = (case.tensors["x"].shape(), case.tensors["base.weight"].shape());
    let (units, channels, kernel) = (weight[0], weight[1], &weight[2..]);
    let axes = kernel.len();
    let (size, groups) = (&x[x.len() - axes..], setting(case, "groups").as_u64().unwrap_or(1) as usize);
    let images = if x.len() > axes + 1 { x[0] } else { 1 };
    let per_axis = |name: &str, default: i64| -> Vec<i64> {
        match setting(case, name) {
            _ if name == drop => vec![default; axes],
            Value::Array(list) => list.iter().map(|value| value.as_i64().expect("a number")).collect(),
            one => vec![one.as_i64().unwrap_or(default); axes],
        }
    };
    let (stride, dilation) = (per_axis("stride", 1), per_axis("dilation", 1));
    let mode = if drop == "padding_mode" { "zeros" } else { setting(case, "padding_mode").as_str().unwrap_or("zeros") };
    let reach: Vec<i64> = (0..axes).map(|d| dilation[d] * (kernel[d] as i64 - 1)).collect();
    let same = setting(case, "padding") == "same";
    let before: Vec<i64> = if same { reach.iter().map(|r| r / 2).collect() } else { per_axis("padding", 0) };
    let both = |d: usize| if same { reach[d] } else { 2 * before[d] };
    let outputs: Vec<usize> =
        (0..axes).map(|d| ((size[d] as i64 + both(d) - reach[d] - 1) / stride[d] + 1) as usize).collect();
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    let (positions, offsets, pixels) = (count(&outputs), count(kernel), count(size));

    // The element that a position along an axis reads, if any.
    let read = |t: i64, length: usize| -> Option<usize> {
        let length = length as i64;
        let inside = (0..length).contains(&t);
        let t = match mode {
            _ if inside => t,
            "reflect" if t < 0 => -t,
            "reflect" => 2 * (length - 1) - t,
            "replicate" => t.clamp(0, length - 1),
            "circular" => t.rem_euclid(length),
            _ => return None,
        };
        Some(t as usize)
    };
    let (mut terms, mut unit_of) = (vec![], vec![]);
    for o in 0..images * units * positions {
        let [image, u, p] = digits(o, &[images, units, positions])[..] else { unreachable!("three digits") };
        unit_of.push(u);
        let (p, first) = (digits(p, &outputs), u / (units / groups) * channels);
        for c in 0..channels * offsets {
            let (channel, k) = (c / offsets, digits(c % offsets, kernel));
            let place = (0..axes).try_fold(0, |place, d| {
                let k = match wrong {
                    "kernel-flipped" => kernel[d] - 1 - k[d],
                    "kernel-axes-swapped" => k[axes - 1 - d],
                    _ => k[d],
                };
                let t = p[d] as i64 * stride[d] + k as i64 * dilation[d] - before[d];
                Some(place * size[d] + read(t, size[d])?)
            });
            if let Some(place) = place {
                let i = (image * channels * groups + first + channel) * pixels + place;
                terms.push(([o, u, c, i], false));
            }
        }
    }
    Terms { terms, unit_of }
}

/// What is known at the case itself: where the norms stand, and what was looked up.
struct Here {
    norms: Vec<f64>,
    weight: Vec<f64>,
    a: Vec<f64>,
}

/// The layer at a case, with one thing wrong.
struct Naive<'a> {
    case: &'a Case,
    wrong: &'a str,
    lora: [&'static str; 2],
    terms: Terms,
    /// A's own terms, where they are others.
    lora_terms: Option<Terms>,
    units: usize,
    cols: usize,
    groups: usize,
    has_norm: bool,
    per_input: bool,
    /// What part of a lookup's gradient a column gets.
    fraction: Vec<f64>,
}

impl<'a> Naive<'a> {
    /// `None` where the mistake cannot be made.
    fn new(subject: &dyn Subject, case: &'a Case, wrong: &'a str) -> Option<Self> {
        let terms = match case.layer.as_str() {
            "linear" => linear(case),
            "embedding" => embedding(case, wrong),
            _ if wrong == "padding-mode-dropped" => convolution(case, "padding_mode", wrong),
            _ => convolution(case, "", wrong),
        };
        let lora_terms = wrong.strip_prefix("lora-").and_then(|rest| rest.strip_suffix("-dropped"));
        let lora_terms = lora_terms.map(|setting| convolution(case, &setting.replace('-', "_"), wrong));
        if lora_terms.as_ref().is_some_and(|lora| lora.unit_of.len() != terms.unit_of.len()) {
            return None;
        }
        let units = terms.unit_of.iter().max().expect("an output") + 1;
        let cols = float(case, "base.weight").len() / units;
        let groups = setting(case, "groups").as_u64().unwrap_or(1) as usize;
        let has_norm = setting(case, "method") != "lora";
        let axis_is_input = setting(case, "norm_axis") == "input";
        let stored_transposed = setting(case, "fan_in_fan_out") == true;
        let per_input = match wrong {
            "norm-per-input" | "norm-per-stored-row" => true,
            "norm-per-output" => false,
            _ => axis_is_input,
        };
        let mut fraction = vec![1.0; cols];
        if let Tensor::Int(ids) = &case.tensors["x"] {
            let padding = setting(case, "padding_idx").as_u64().filter(|_| wrong != "padding-idx-ignored");
            let by_frequency = setting(case, "scale_grad_by_freq") == true && wrong != "scale-grad-by-freq-ignored";
            for (j, f) in fraction.iter_mut().enumerate() {
                let count = ids.iter().filter(|&&id| id as usize == j).count().max(1);
                *f = if by_frequency { 1.0 / count as f64 } else { 1.0 };
                *f *= f64::from(padding != Some(j as u64));
            }
        }
        let lora = subject.lora_names();
        let naive = Self { case, wrong, lora, terms, lora_terms, units, cols, groups, has_norm, per_input, fraction };
        let kernel = &case.tensors["base.weight"].shape()[2..];
        let inputs = if case.layer.starts_with("conv") { case.tensors["base.weight"].shape()[1] } else { cols };
        let possible = match wrong {
            // Without a norm there is nothing to take along the wrong axis, and nothing that does not fit.
            "norm-per-input" => !has_norm || axis_is_input || units == inputs && groups == 1,
            "norm-per-output" => !has_norm || !axis_is_input || units == cols,
            "norm-per-stored-row" => stored_transposed && !axis_is_input && (units == cols || !has_norm),
            "gain-outer-product" => has_norm && units == cols && !axis_is_input,
            "groups-first-only" => groups > 1,
            "delta-transposed" => units == cols,
            "kernel-flipped" => inputs < cols,
            "kernel-axes-swapped" => inputs < cols && kernel.iter().all(|side| *side == kernel[0]),
            "bias-scaled" => !axis_is_input,
            _ => true,
        };
        possible.then_some(naive)
    }

    /// Which norm an element belongs to, and which magnitude multiplies it. A convolution's columns are channels of
    /// kernel positions.
    fn indices(&self, u: usize, c: usize) -> [usize; 2] {
        let kernel = self.case.tensors["base.weight"].shape().iter().skip(2).product::<usize>();
        let right = if self.per_input { c / kernel } else { u };
        match self.wrong {
            "norm-of-whole-weight" => [0, right],
            "gain-outer-product" => [right, c],
            _ => [right, right],
        }
    }

    /// A weight as a matrix, one row a unit.
    fn matrix(&self, stored: &ArrayD<f64>) -> Vec<f64> {
        let stored = stored.as_slice().expect("standard layout");
        let turned = self.case.layer == "embedding" || setting(self.case, "fan_in_fan_out") == true;
        let at = |e: usize| if turned { e % self.cols * self.units + e / self.cols } else { e };
        (0..stored.len()).map(|e| stored[at(e)]).collect()
    }

    /// B A: unit i of group q combines the ranks of group q.
    fn delta(&self, a: &[f64], b: &ArrayD<f64>) -> Vec<f64> {
        let ranks = b.len() / self.units;
        let b = b.as_slice().expect("standard layout");
        let mut delta = vec![0.0; self.units * self.cols];
        for (e, delta) in delta.iter_mut().enumerate() {
            let (u, c) = (e / self.cols, e % self.cols);
            let group = if self.wrong == "groups-first-only" { 0 } else { u / (self.units / self.groups) };
            let [u, c] = if self.wrong == "delta-transposed" { [c, u] } else { [u, c] };
            *delta = (0..ranks).map(|k| b[u * ranks + k] * a[(group * ranks + k) * self.cols + c]).sum();
        }
        delta
    }

    /// The norms of a matrix, without epsilon.
    fn norms(&self, v: &[f64]) -> Vec<f64> {
        let mut norms = vec![(0.0, 0.0); self.units.max(self.cols)];
        for (e, v) in v.iter().enumerate() {
            let (sum, count) = &mut norms[self.indices(e / self.cols, e % self.cols)[0]];
            *sum += if ["norm-mean", "norm-absolute"].contains(&self.wrong) { v.abs() } else { v * v };
            *count += 1.0;
        }
        let norm = |(sum, count): (f64, f64)| match self.wrong {
            "norm-mean" => sum / count,
            "norm-squared" | "norm-absolute" => sum,
            "norm-root-mean-square" => (sum / count).sqrt(),
            _ => sum.sqrt(),
        };
        norms.into_iter().map(norm).collect()
    }

    /// y and the norms. `here` is where the tensors started; with `hold` the norms stay there.
    fn y(&self, tensors: &Tensors, here: Option<&Here>, hold: bool) -> (Vec<f64>, Here) {
        let scalar = |name: &str| tensors.get(name).map_or(1.0, |value| value[[]]);
        let (mut alpha, mut beta) = (scalar("lora_wora_alpha"), scalar("lora_wora_beta"));
        let mut s = setting(self.case, "scaling").as_f64().expect("scaling");
        match self.wrong {
            "alpha-beta-swapped" => (alpha, beta) = (beta, alpha),
            "alpha-ignored" => alpha = 1.0,
            "beta-ignored" => beta = 1.0,
            "scaling-missing" => s = 1.0,
            "scaling-twice" => s *= s,
            "scaling-without-rank" => s *= self.case.tensors[self.lora[0]].shape()[0] as f64,
            "scaling-root-of-rank" => s *= (self.case.tensors[self.lora[0]].shape()[0] as f64).sqrt(),
            "alpha-squared" => alpha *= alpha,
            _ => {}
        }
        let on_lora = match self.wrong {
            "beta-on-both-terms" => beta * alpha * s,
            "lora-subtracted" => -alpha * s,
            _ => alpha * s,
        };
        let on_base = if self.wrong == "alpha-interpolates" { (1.0 - alpha) * beta } else { beta };
        let b = &tensors[self.lora[1]];
        let weight = self.matrix(&tensors["base.weight"]);
        let a: Vec<f64> = tensors[self.lora[0]].iter().copied().collect();
        let delta = self.delta(&a, b);
        let sum = |p: f64, weight: &[f64], q: f64, delta: &[f64]| -> Vec<f64> {
            weight.iter().zip(delta).map(|(w, d)| p * w + q * d).collect()
        };

        let eps = setting(self.case, "norm_eps").as_f64().unwrap_or(0.0);
        // Its own norm is not n: it is never held.
        let unit = self.wrong == "delta-on-unit-direction" && self.has_norm;
        let base_norms = self.norms(&weight);
        let base_of = |weight: &[f64]| -> Vec<f64> {
            let scale = |e: usize| match base_norms[self.indices(e / self.cols, e % self.cols)[0]] {
                norm if unit && norm > 0.0 => norm,
                _ => 1.0,
            };
            weight.iter().enumerate().map(|(e, w)| on_base * w / scale(e)).collect()
        };
        let mut norms = self.norms(&match self.wrong {
            "norm-of-base" => weight.clone(),
            "norm-without-scaling" => sum(beta, &weight, alpha, &delta),
            "norm-without-alpha-beta" => sum(1.0, &weight, s, &delta),
            "norm-of-delta" => sum(0.0, &weight, on_lora, &delta),
            _ => sum(1.0, &base_of(&weight), on_lora, &delta),
        });
        for (index, norm) in norms.iter_mut().enumerate() {
            // Without a direction there is no gain, and none is gained by moving.
            let dead = here.map_or(*norm == 0.0, |here| here.norms[index] == 0.0);
            *norm = match (self.wrong, here) {
                _ if dead => 0.0,
                ("norm-eps-ignored", _) => *norm,
                ("norm-eps-inside-root", _) => (*norm * *norm + eps).sqrt(),
                // As it moves it is divided by n where ||V|| should divide.
                ("norm-eps-in-norm-gradient", Some(here)) => {
                    let n = here.norms[index];
                    n + (*norm - (n - eps)) * (n - eps) / n
                }
                _ => *norm + eps,
            };
        }
        if let (Some(here), true) = (here, hold) {
            norms.clone_from(&here.norms);
        }
        let gain = |u: usize, c: usize| {
            if !self.has_norm || self.wrong == "magnitude-ignored" {
                return 1.0;
            }
            let n = norms[self.indices(u, c)[0]];
            let m = tensors["lora_magnitude_vector"].as_slice().expect("standard layout");
            let m = if self.wrong == "magnitude-dropped" { 1.0 } else { m[self.indices(u, c)[1]] };
            match self.wrong {
                "magnitude-not-divided" => m,
                "zero-norm-not-guarded" => m / n,
                _ if n == 0.0 => 0.0,
                "gain-inverted" => n / m,
                "gain-norm-twice" => m / (n * n),
                _ => m / n,
            }
        };

        let e =
            setting(self.case, "embed_scale").as_f64().filter(|_| self.wrong != "embed-scale-missing").unwrap_or(1.0);
        let ones = ArrayD::from_elem(vec![1], 1.0);
        let x = tensors.get("x").unwrap_or(&ones).as_slice().expect("standard layout");
        let mask = self.case.optional("dropout_mask").expect("a mask or none");
        let kept = |m: f64| if self.wrong == "dropout-unscaled" && m != 0.0 { 1.0 } else { m };
        let dropped: Vec<f64> = mask.map_or(x.to_vec(), |mask| x.iter().zip(mask).map(|(x, &m)| x * kept(m)).collect());
        let mut y = vec![0.0; self.terms.unit_of.len()];
        for stale in [false, true] {
            // What is looked up moves by the fraction, and in a stale term not at all; the norm has moved in full.
            let part = |e: usize| if stale { 0.0 } else { self.fraction[e % self.cols] };
            let looked = |now: &[f64], then: &[f64]| -> Vec<f64> {
                now.iter().zip(then).enumerate().map(|(e, (now, then))| then + (now - then) * part(e)).collect()
            };
            let weight = looked(&weight, here.map_or(&weight, |here| &here.weight));
            let delta = self.delta(&looked(&a, here.map_or(&a, |here| &here.a)), b);
            let base = base_of(&weight);
            // The coefficients of x, of the dropped x, and of A's own product with the dropped x.
            let coefficients = |k: usize, u: usize, c: usize| {
                let (g, w, base, lora) = (gain(u, c), weight[k], base[k], on_lora * delta[k]);
                match self.wrong {
                    "dropout-base-uncorrected" => (g * base, 0.0, g * lora),
                    "dropout-ignored" => (g * (base + lora), 0.0, 0.0),
                    "dropout-on-everything" => (0.0, g * base, g * lora),
                    "gain-on-lora-only" => (w, base - w, g * lora),
                    "gain-on-base-only" => (w, g * base - w, lora),
                    "embed-scale-on-base-only" => (w, (g * base - w) / e, g * lora / e),
                    "base-counted-twice" => (w, g * base, g * lora),
                    BASE_ALONE => (w, 0.0, 0.0),
                    WITHOUT_LORA => (w, g * base - w, 0.0),
                    "beta-on-lora-term" => (0.0, g * w, g * beta * s * delta[k]),
                    "embed-scale-twice-on-beta" => (g * w, g * (beta - 1.0) * e * w, g * lora),
                    _ => (w, g * base - w, g * lora),
                }
            };
            for &([o, u, c, i], _) in self.terms.terms.iter().filter(|term| term.1 == stale) {
                let (on_x, on_dropped, of_lora) = coefficients(u * self.cols + c, u, c);
                let own = if self.lora_terms.is_some() { 0.0 } else { of_lora };
                y[o] += e * (on_x * x[i] + (on_dropped + own) * dropped[i]);
            }
            for &([o, u, c, i], _) in self.lora_terms.iter().flat_map(|lora| &lora.terms) {
                y[o] += if stale { 0.0 } else { coefficients(u * self.cols + c, u, c).2 * dropped[i] };
            }
        }
        if let Some(bias) = tensors.get("base.bias") {
            for (y, &u) in y.iter_mut().zip(&self.terms.unit_of) {
                *y += match self.wrong {
                    "bias-scaled" => gain(u, 0) * bias[u],
                    "bias-dropped" => 0.0,
                    "bias-twice" => 2.0 * bias[u],
                    "bias-times-beta" => beta * bias[u],
                    "bias-times-scaling" => s * bias[u],
                    _ => bias[u],
                };
            }
        }
        (y, Here { norms, weight, a })
    }

    /// y and every gradient.
    fn results(&self) -> Tensors {
        let (tensors, dy) = differentiated(self.case);
        let mut results: Tensors = tensors.keys().map(|name| (format!("grad.{name}"), self.gradient(name))).collect();
        results.insert("y".into(), self.output(dy.shape()));
        results
    }

    /// y, in this shape.
    fn output(&self, shape: &[usize]) -> ArrayD<f64> {
        let (y, _) = self.y(&differentiated(self.case).0, None, false);
        ArrayD::from_shape_vec(shape, y).expect("as many as the cotangent")
    }

    /// The gradient of `<dy, y>` with respect to a tensor, by differences.
    fn gradient(&self, name: &str) -> ArrayD<f64> {
        let (mut tensors, dy) = differentiated(self.case);
        let (y, here) = self.y(&tensors, None, false);
        // With the norms held and not, each so many times.
        let times: &[(bool, f64)] = match (self.wrong, setting(self.case, "norm_gradient") == "full") {
            ("norm-not-detached", _) => &[(false, 1.0)],
            ("norm-detached", _) | (_, false) => &[(true, 1.0)],
            ("norm-gradient-sign", true) => &[(true, 2.0), (false, -1.0)],
            ("norm-gradient-twice", true) => &[(true, -1.0), (false, 2.0)],
            _ => &[(false, 1.0)],
        };
        let largest = tensors[name].iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        // An absolute value has kinks, which a long step would cross.
        let h = if ["norm-mean", "norm-absolute"].contains(&self.wrong) { 1e-6 } else { 1e-4 }
            * if largest == 0.0 { 1.0 } else { largest };
        let mut gradient = ArrayD::zeros(tensors[name].raw_dim());
        for (element, derivative) in gradient.iter_mut().enumerate() {
            // Four points instead of two: the norm curves too much for a tolerance of 1e-6 otherwise.
            for (step, factor) in [(h, 8.0), (-h, -8.0), (2.0 * h, -1.0), (-2.0 * h, 1.0)] {
                let before = *element_of(&mut tensors, name, element);
                *element_of(&mut tensors, name, element) = before + step;
                for &(hold, times) in times {
                    let (there, _) = self.y(&tensors, Some(&here), hold);
                    let change: f64 = there.iter().zip(&y).zip(&dy).map(|((there, y), dy)| (there - y) * dy).sum();
                    *derivative += times * factor * change / (12.0 * h);
                }
                *element_of(&mut tensors, name, element) = before;
            }
        }
        gradient
    }

    /// The layer of which every element of x is seen by one window alone, the last that is written where the windows are
    /// gone through once for each place of the kernel.
    fn last_windows(&self, dy: &ArrayD<f64>) -> Self {
        let kernel = &self.case.tensors["base.weight"].shape()[2..];
        let positions: usize = dy.shape().iter().rev().take(kernel.len()).product();
        let places: usize = kernel.iter().product();
        let written = |term: &Term| (term.0[2] % places, term.0[0] % positions);
        let mut last = BTreeMap::new();
        for term in &self.terms.terms {
            let last = last.entry(term.0[3]).or_insert((0, 0));
            *last = written(term).max(*last);
        }
        let seen = |term: &&Term| written(term).1 == last[&term.0[3]].1;
        let terms = self.terms.terms.iter().filter(seen).copied().collect();
        let terms = Terms { terms, unit_of: self.terms.unit_of.clone() };
        Self { terms, lora_terms: None, fraction: self.fraction.clone(), ..*self }
    }
}

/// An element of a tensor.
fn element_of<'t>(tensors: &'t mut Tensors, name: &str, element: usize) -> &'t mut f64 {
    &mut tensors.get_mut(name).expect("a tensor").as_slice_mut().expect("standard layout")[element]
}

/// The tensors of a case that have gradients, and the cotangent.
fn differentiated(case: &Case) -> (Tensors, ArrayD<f64>) {
    let float = |(name, tensor): (&String, &Tensor)| match tensor {
        Tensor::Float(values) => Some((name.clone(), values.to_owned())),
        Tensor::Int(_) => None,
    };
    let mut tensors: Tensors = case.tensors.iter().filter_map(float).collect();
    let dy = tensors.remove("grad.y").expect("a cotangent");
    tensors.remove("dropout_mask");
    (tensors, dy)
}

/// What the right layer comes to, computed once a case.
fn right(subject: &dyn Subject, spec: &'static Spec, case: &Case) -> Tensors {
    type Known = BTreeMap<(String, &'static str), Arc<OnceLock<Tensors>>>;
    static KNOWN: Mutex<Known> = Mutex::new(BTreeMap::new());
    let known = KNOWN.lock().expect("no panic").entry((case.layer.clone(), spec.name)).or_default().clone();
    let results = || Naive::new(subject, case, NOTHING_WRONG).expect("nothing is wrong").results();
    known.get_or_init(results).clone()
}

/// What someone with one thing wrong gets: the results of another y, or the right ones with gradients that are others.
/// `None` where the mistake cannot be made.
fn results(subject: &dyn Subject, spec: &'static Spec, case: &Case, wrong: &str) -> Option<Tensors> {
    let of = |wrong: &str, case: &Case| Naive::new(subject, case, wrong).map(|naive| naive.results());
    let mut results = right(subject, spec, case);
    let gradients: Vec<String> = results.keys().filter(|name| name.starts_with("grad.")).cloned().collect();
    let lora = subject.lora_names();
    let scalar = |name: &str| case.values(name).map_or(1.0, |value| value[[]]);
    let s = setting(case, "scaling").as_f64().expect("scaling");
    let first = case.tensors["x"].shape().first().copied().unwrap_or(1) as f64;
    let parameters: Vec<&str> =
        gradients.iter().map(|name| &name["grad.".len()..]).filter(|&name| name != "x").collect();

    let scaled = |results: &mut Tensors, names: &[&str], factor: f64| {
        for name in names {
            results.entry(format!("grad.{name}")).and_modify(|gradient| *gradient *= factor);
        }
    };
    // A factor that is missing; one of 0 cannot be taken out.
    let without = |results: &mut Tensors, names: &[&str], factor: f64| {
        scaled(results, names, if factor == 0.0 { 1.0 } else { 1.0 / factor });
    };
    let those_of = |results: &mut Tensors, names: &[&str], other: &str| -> Option<()> {
        let other = Naive::new(subject, case, other)?;
        for name in names {
            results.entry(format!("grad.{name}")).and_modify(|gradient| *gradient = other.gradient(name));
        }
        Some(())
    };
    // One factor a unit of m, from m and n.
    let by_unit = |results: &mut Tensors, factor: fn(f64, f64) -> f64| {
        let (tensors, _) = differentiated(case);
        let (_, here) = Naive::new(subject, case, NOTHING_WRONG).expect("nothing is wrong").y(&tensors, None, false);
        if let (Some(m), Some(gradient)) = (tensors.get(MAGNITUDE), results.get_mut(&format!("grad.{MAGNITUDE}"))) {
            gradient.iter_mut().zip(m).zip(here.norms).for_each(|((dm, &m), n)| *dm *= factor(m, n));
        }
    };
    match wrong {
        "alpha-detached" => scaled(&mut results, &[ALPHA], 0.0),
        "beta-detached" => scaled(&mut results, &[BETA], 0.0),
        "alpha-beta-detached" => scaled(&mut results, &[ALPHA, BETA], 0.0),
        "magnitude-detached" => scaled(&mut results, &[MAGNITUDE], 0.0),
        "lora-a-detached" => scaled(&mut results, &[lora[0]], 0.0),
        "lora-b-detached" => scaled(&mut results, &[lora[1]], 0.0),
        "base-weight-detached" => scaled(&mut results, &[WEIGHT], 0.0),
        "bias-detached" => scaled(&mut results, &[BIAS], 0.0),
        "input-detached" => scaled(&mut results, &["x"], 0.0),
        "gradients-averaged" => scaled(&mut results, &parameters, 1.0 / first),
        "beta-gradient-negated" => scaled(&mut results, &[BETA], -1.0),
        "lora-gradient-without-alpha" => without(&mut results, &lora, scalar(ALPHA)),
        "lora-gradient-without-scaling" => without(&mut results, &lora, s),
        "alpha-gradient-without-scaling" => without(&mut results, &[ALPHA], s),
        "base-weight-gradient-without-beta" => without(&mut results, &[WEIGHT], scalar(BETA)),
        "magnitude-gradient-extra-gain" => by_unit(&mut results, |m, n| if n == 0.0 { 0.0 } else { m / n }),
        "magnitude-gradient-undivided" => by_unit(&mut results, |_, n| n),
        "alpha-beta-gradients-swapped" => {
            let swapped = [ALPHA, BETA].map(|name| results.remove(&format!("grad.{name}")));
            let names = [BETA, ALPHA].map(|name| format!("grad.{name}"));
            results.extend(names.into_iter().zip(swapped).filter_map(|(name, gradient)| Some((name, gradient?))));
        }
        "lora-b-gradient-transposed" => {
            if let Some(gradient) = results.get_mut(&format!("grad.{}", lora[1]))
                && gradient.shape()[0] == gradient.shape()[1]
            {
                gradient.swap_axes(0, 1);
            }
        }
        "lora-gradient-without-gain" => those_of(&mut results, &lora, "magnitude-ignored")?,
        "alpha-beta-norm-detached" => those_of(&mut results, &[ALPHA, BETA], "norm-detached")?,
        "magnitude-gradient-of-base-only" => those_of(&mut results, &[MAGNITUDE], WITHOUT_LORA)?,
        "bias-gradient-scaled" => those_of(&mut results, &[BIAS], "bias-scaled")?,
        "input-gradient-of-base-only" => those_of(&mut results, &["x"], BASE_ALONE)?,
        "input-gradient-without-lora" => those_of(&mut results, &["x"], WITHOUT_LORA)?,
        "input-gradient-without-mask" => those_of(&mut results, &["x"], "dropout-ignored")?,
        "input-gradient-masked" => those_of(&mut results, &["x"], "dropout-on-everything")?,
        "padding-gradient-lost" => those_of(&mut results, &["x"], "padding-mode-dropped")?,
        "embed-scale-missing-in-gradient" => those_of(&mut results, &parameters, "embed-scale-missing")?,
        "fold-overwrites" => {
            let (_, dy) = differentiated(case);
            let naive = Naive::new(subject, case, NOTHING_WRONG)?.last_windows(&dy);
            results.entry("grad.x".into()).and_modify(|gradient| *gradient = naive.gradient("x"));
        }
        "cotangent-ignored" => {
            let mut ones = case.clone();
            let Some(Tensor::Float(dy)) = ones.tensors.get_mut("grad.y") else { panic!("a cotangent") };
            dy.fill(1.0);
            results = of(NOTHING_WRONG, &ones)?;
        }
        "beta-on-lora-term" => {
            results = of(wrong, case)?;
            scaled(&mut results, &[ALPHA, BETA], 0.0);
        }
        // A y that is no number has no differences.
        "zero-norm-not-guarded" => {
            let y = Naive::new(subject, case, wrong)?.output(results["y"].shape());
            results = Tensors::from([("y".into(), y)]);
        }
        _ => results = of(wrong, case)?,
    }
    Some(results)
}

/// The largest difference of two tensors, in parts of the larger of 1 and the largest element; infinite at a NaN.
fn distance(a: &ArrayD<f64>, b: &ArrayD<f64>) -> f64 {
    assert_eq!(a.shape(), b.shape());
    let largest = b.iter().fold(1.0_f64, |largest, value| largest.max(value.abs()));
    let off = a.iter().zip(b).map(|(a, b)| (a - b).abs() / largest);
    off.fold(0.0_f64, |worst, off| if off.is_nan() { f64::INFINITY } else { worst.max(off) })
}

/// Small in size; numbers of 2^-80 beside others are beyond differences with one step.
fn small_cases(subject: &'static dyn Subject) -> impl Iterator<Item = (&'static Spec, Case)> {
    let elements = |case: &Case| case.tensors.values().map(|t| t.shape().iter().product::<usize>()).sum::<usize>();
    let drawn = subject.specs().iter().map(move |spec| (spec, subject.draw(spec, SEED)));
    drawn.filter(move |(spec, case)| elements(case) < SMALL && spec.twist != Twist::Tiny)
}

/// Where the crate's results are not the naive ones.
fn differences(naive: &Tensors, theirs: &Tensors, place: &str) -> Vec<String> {
    let line = |(name, naive): (&String, &ArrayD<f64>)| {
        let off = distance(&theirs[name], naive);
        let tolerance = if name == "y" { 1e-10 } else { 1e-6 };
        (off > tolerance).then(|| format!("{place}: {name} is off by {off:.2e}"))
    };
    naive.iter().filter_map(line).collect()
}

/// y with 0 where it is no number, and where it is one.
fn numbers(results: &Tensors) -> Tensors {
    let y = &results["y"];
    let number = |y: f64| if y.is_nan() { 0.0 } else { y };
    Tensors::from([
        ("y".into(), y.mapv(number)),
        ("whether y is a number".into(), y.mapv(|y| f64::from(u8::from(!y.is_nan())))),
    ])
}

/// Cases of each setting in which a mistake is compared: naive gradients take their time.
const ENOUGH: usize = 2;

/// A mistake in the small cases of a layer: what differs, and in how many detached and full cases it matters.
fn examine(id: &str, layer_name: &str) -> (Vec<String>, [usize; 2]) {
    let (mistake, subject) = (mistake(id).expect("an id"), layer(layer_name).expect("a layer"));
    let (mut wrong, mut matters) = (vec![], [0, 0]);
    for (spec, case) in small_cases(subject) {
        let place = format!("{id} in {}", spec.name);
        let theirs = mistaken(subject, &[mistake], &case).expect("a result");
        let Some(theirs) = &theirs else {
            if results(subject, spec, &case, id).is_some() {
                wrong.push(format!("{place}: can be made, although the crate says that it cannot"));
            }
            continue;
        };
        if Naive::new(subject, &case, id).is_none() {
            wrong.push(format!("{place}: cannot be made, although the crate says that it can"));
            continue;
        }
        let right = subject.define(&case).expect("a result");
        let full = usize::from(setting(&case, "norm_gradient") == "full");
        let differs = theirs.iter().any(|(name, wrong)| distance(wrong, &right[name]) > 1e-6);
        if differs && matters[full] < ENOUGH {
            matters[full] += 1;
            let results = results(subject, spec, &case, id).expect("it can be made");
            wrong.extend(match id {
                "zero-norm-not-guarded" => differences(&numbers(&results), &numbers(theirs), &place),
                _ => differences(&results, theirs, &place),
            });
            wrong.extend(misdiagnosed(id, &case, results).map(|instead| format!("{place}: diagnosed as {instead}")));
        }
    }
    (wrong, matters)
}

/// What the diagnosis makes of results computed here, where that is neither this mistake nor one tied with it.
fn misdiagnosed(id: &str, case: &Case, results: Tensors) -> Option<String> {
    let mut case = case.clone();
    case.extend(results);
    // Differences are exact to f32, not to f64.
    let candidates = diagnose(&CaseFile::new(case, Dtype::F32)).expect("a diagnosis").candidates;
    let best = candidates.first().map_or(f64::NAN, |best| best.residual);
    let named = candidates.iter().any(|candidate| candidate.ids == [id] && candidate.residual == best);
    (!named).then(|| candidates.first().map_or_else(|| "nothing".into(), |best| best.id.clone()))
}

#[test]
fn the_naive_layer_is_the_definition_where_nothing_is_wrong() {
    let wrong: Vec<String> = LAYERS
        .par_iter()
        .flat_map_iter(|&subject| small_cases(subject).map(move |(spec, case)| (subject, spec, case)))
        .flat_map_iter(|(subject, spec, case)| {
            let right = subject.define(&case).expect("a result");
            let naive = self::right(subject, spec, &case);
            let gradients = |tensors: &Tensors| tensors.keys().filter(|name| name.starts_with("grad.")).count();
            assert_eq!(gradients(&naive), gradients(&right), "{}", spec.name);
            differences(&naive, &right, spec.name)
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_mistake_is_what_the_table_says() {
    let all: Vec<_> = TABLE
        .split_whitespace()
        .flat_map(|id| mistake(id).expect("an id").layers.iter().map(move |&layer| (id, layer)))
        .collect();
    let examined: Vec<_> = all.into_par_iter().map(|(id, layer)| (id, layer, examine(id, layer))).collect();
    let mut complaints = vec![];
    for (id, layer, (wrong, matters)) in examined {
        println!("{id} {layer}: matters in {} detached and {} full cases", matters[0], matters[1]);
        complaints.extend(wrong);
        let by_eps = |(_, case): (&Spec, Case)| setting(&case, "norm_eps").as_f64().is_some_and(|eps| eps > 0.0);
        let asked =
            !id.starts_with("norm-eps-") || small_cases(woracle::registry::layer(layer).expect("a layer")).any(by_eps);
        if matters == [0, 0] && asked {
            complaints.push(format!("{id} changes nothing in any small case of {layer}"));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn ids_are_unique_and_in_kebab_case_and_the_table_has_every_one() {
    let ids: BTreeSet<_> = MISTAKES.iter().map(|mistake| mistake.id).collect();
    assert_eq!(ids.len(), MISTAKES.len());
    for id in &ids {
        let word = |word: &str| !word.is_empty() && word.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        assert!(id.split('-').all(word), "{id}");
    }
    assert_eq!(ids, TABLE.split_whitespace().collect());
}

#[test]
fn every_mistake_names_a_section_of_the_specification_and_layers_of_the_registry() {
    let spec = include_str!("../SPEC.md");
    let number = |line: &str| line.strip_prefix('#').map(|line| line.trim_start_matches('#').trim().to_string());
    let headings: BTreeSet<_> = spec
        .lines()
        .filter_map(number)
        .filter_map(|line| line.split(' ').next().map(|number| number.trim_end_matches('.').to_string()))
        .collect();
    for Mistake { id, wrong, seen, section, layers, .. } in MISTAKES {
        assert!(headings.contains(*section), "{id}: {section}");
        assert!(!layers.is_empty() && layers.iter().all(|name| layer(name).is_ok()), "{id}");
        assert!(wrong.ends_with('.') && !seen.is_empty(), "{id}");
    }
}

#[test]
fn no_mistake_at_all_survives() {
    let nothing: &'static Mistake = Box::leak(Box::new(Mistake {
        id: "nothing",
        wrong: "Nothing.",
        seen: "here",
        section: "4",
        layers: &["linear", "embedding", "conv1d", "conv2d", "conv3d"],
        forward: RIGHT,
        backward: Backward::OfForward,
    }));
    nothing.layers.par_iter().for_each(|name| {
        let trial = try_mistake(nothing, name, SEED).expect("a trial");
        assert_eq!((trial.case, trial.killed_by), (None, vec![]), "{name}");
    });
}

#[test]
fn a_wrong_forward_passes_differences_with_its_own_backward_and_fails_the_definition() {
    // A y that is no number has no gradient to agree with.
    let has_gradient = |mistake: &&Mistake| mistake.forward.gain != Gain::Unguarded;
    let forward = MISTAKES.iter().filter(|mistake| mistake.is_in_forward() && !mistake.is_in_backward());
    let forward = forward.filter(has_gradient);
    let all: Vec<_> = forward.flat_map(|mistake| mistake.layers.iter().map(move |&name| (mistake, name))).collect();
    let complaints: Vec<String> = all
        .into_par_iter()
        .filter_map(|(mistake, name)| {
            let subject = layer(name).expect("a layer");
            let trial = try_mistake(mistake, name, SEED).expect("a trial");
            let Some(killed) = trial.case else { return Some(format!("{} survives in {name}", mistake.id)) };
            let spec = subject.specs().iter().find(|spec| spec.name == killed).expect("its case");
            let report =
                check_mistake(mistake, subject, &subject.draw(spec, SEED), SEED).expect("a report").expect("a change");
            let verdict = |tensor: &str, witness| {
                let tensor = report.tensors.iter().find(|report| report.name == tensor)?;
                tensor.witness(witness).map(|comparison| comparison.verdict)
            };
            let own = !report.contradicts(Witness::Differences);
            let seen = verdict("y", Witness::Definition) == Some(Verdict::Disagree);
            (!own || !seen).then(|| format!("{} in {killed}: differences {own}, definition {seen}", mistake.id))
        })
        .collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn the_command_line_says_how_many_mistakes_were_killed() {
    let (code, out, _) = wora(&["check", "--mistakes", "norm-of-base"]);
    assert_eq!((code, out.lines().last()), (Some(0), Some("1 / 1 mistakes killed")));
    let (code, out, _) = wora(&["check", "--mistakes", "norm-of-base", "--json"]);
    let report: BTreeMap<String, Value> = serde_json::from_str(&out).expect("JSON");
    assert_eq!((code, &report["killed"], &report["total"]), (Some(0), &1.into(), &1.into()));
    assert_eq!(report["mistakes"][0]["id"], "norm-of-base");
}

#[test]
fn the_command_line_lists_every_mistake_and_refuses_an_unknown_one() {
    let (code, out, _) = wora(&["check", "--mistakes", "--list"]);
    assert_eq!((code, out.lines().collect()), (Some(0), MISTAKES.iter().map(|mistake| mistake.id).collect::<Vec<_>>()));
    let (code, out, err) = wora(&["check", "--mistakes", "no-such-mistake"]);
    assert_eq!((code, out.as_str(), err.lines().count()), (Some(2), "", 1));
    assert!(err.contains("no-such-mistake"), "{err}");
}
