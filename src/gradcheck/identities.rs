//! What must hold between the gradients of a layer at one point, without any step. SPEC.md, section 8.3.

use super::comparison::{distance, judge, number};
use super::{RESOLUTION, SLACK, Verdict};
use crate::case::{Case, Tensor, Tensors};
use crate::registry::Subject;
use crate::wora::{Config, NormGradient};
use crate::{Real, Result, Rounded, Scalar};
use ndarray::ArrayD;
use serde::Serialize;
use std::collections::BTreeMap;

/// An identity between gradients, evaluated on the results under test.
#[doc = include_str!("../../docs/identities.md")]
#[derive(Clone, Debug, Serialize)]
pub struct Identity {
    /// Its label in SPEC.md.
    pub label: &'static str,
    /// What it says, with the names of the tensors.
    pub equation: String,
    /// Whether it holds.
    pub verdict: Verdict,
    /// The left side.
    #[serde(serialize_with = "number")]
    pub left: f64,
    /// The right side.
    #[serde(serialize_with = "number")]
    pub right: f64,
    /// Their distance; infinite where one is not a number.
    #[serde(serialize_with = "number")]
    pub error: f64,
    /// What that may be.
    #[serde(serialize_with = "number")]
    pub budget: f64,
    /// What the error is relative to: the root of the summed squares of the terms of both sides.
    #[serde(serialize_with = "number")]
    pub size: f64,
}

impl Identity {
    /// Two sides, each by the results under test and on numbers that estimate their rounding. One whose every term is 0
    /// says nothing.
    pub(super) fn judged(
        label: &'static str,
        equation: String,
        (left, of_left): (f64, Rounded),
        (right, of_right): (f64, Rounded),
    ) -> Option<Self> {
        let difference = of_left - of_right;
        let (budget, size) = (SLACK * f64::UNIT_ROUNDOFF * difference.roundings(), difference.size());
        if size == 0.0 && left == 0.0 && right == 0.0 {
            return None;
        }
        let (verdict, error) = (judge(left, right, budget, RESOLUTION * size), distance(left, right));
        Some(Self { label, equation, verdict, left, right, error, budget, size })
    }
}

/// A signed sum of inner products `<d tensor, tensor>`; `y` stands for `<dy, y>`.
type Side = Vec<(f64, &'static str)>;

/// The identities that hold in a case: label, left side, right side.
fn that_hold(subject: &dyn Subject, case: &Case) -> Result<Vec<(&'static str, Side, Side)>> {
    if !subject.is_gradient_of_the_loss(case)? {
        return Ok(vec![]);
    }
    let config: Config = case.settings()?;
    let has = |name: &str| case.tensors.contains_key(name);
    let [a, b] = subject.lora_names();
    let (x, weight, magnitude) = ("x", "base.weight", "lora_magnitude_vector");
    let (alpha, beta) = ("lora_wora_alpha", "lora_wora_beta");
    let full = config.norm_gradient == NormGradient::Full && config.has_norm();
    let undropped = !has("dropout_mask");
    // What <dV, V> is made of: alpha and beta where they are learned, B and W0 where they are not.
    let of_lora = if has(alpha) { alpha } else { b };
    let of_base = if has(beta) { beta } else { weight };
    let one = |name| vec![(1.0, name)];
    let output = || if has("base.bias") { vec![(1.0, "y"), (-1.0, "base.bias")] } else { one("y") };

    let mut list = vec![("E49", one(a), one(of_lora))];
    if has(alpha) {
        list.push(("E49", one(b), one(alpha)));
    }
    if has(beta) && undropped {
        list.push(("E50", one(weight), one(beta)));
    }
    if config.has_norm() && undropped {
        list.push(("E51", one(magnitude), output()));
    }
    if config.has_norm() && (has(beta) || undropped) {
        let radial = vec![(1.0, of_lora), (1.0, of_base)];
        match (full, config.norm_eps == 0.0) {
            (false, _) => list.push(("E52", radial, one(magnitude))),
            (true, true) => list.push(("E53", radial, vec![])),
            (true, false) => {}
        }
    }
    if matches!(case.tensors.get(x), Some(Tensor::Float(_))) {
        list.push(("E54", one(x), output()));
    }
    Ok(list)
}

/// Evaluates every identity of a case on the results under test; `expected` says how far off they may be. One whose
/// every term is 0 says nothing, and one about a result that is missing cannot be asked.
pub(super) fn identities(
    subject: &dyn Subject,
    case: &Case,
    ours: &Tensors,
    expected: &BTreeMap<String, ArrayD<Rounded>>,
) -> Result<Vec<Identity>> {
    let mut all = vec![];
    for (label, left, right) in that_hold(subject, case)? {
        let equation = format!("{} = {}", in_words(&left), in_words(&right));
        let sides = (value(case, ours, expected, &left)?, value(case, ours, expected, &right)?);
        let (Some((left, of_left)), Some((right, of_right))) = sides else { continue };
        all.extend(Identity::judged(label, equation, (left, of_left), (right, of_right)));
    }
    Ok(all)
}

/// A side as a reader writes it.
fn in_words(side: &Side) -> String {
    let term = |&(sign, name): &(f64, &str)| {
        let product = if name == "y" { "<dy, y>".into() } else { format!("<d {name}, {name}>") };
        format!("{} {product}", if sign < 0.0 { "-" } else { "+" })
    };
    let terms = side.iter().map(term).collect::<Vec<_>>().join(" ");
    terms.strip_prefix("+ ").map_or_else(|| "0".into(), Into::into)
}

/// A side by the results under test, and its rounding; `None` where a result is missing.
fn value(
    case: &Case,
    ours: &Tensors,
    expected: &BTreeMap<String, ArrayD<Rounded>>,
    side: &Side,
) -> Result<Option<(f64, Rounded)>> {
    let (mut sum, mut rounded) = (0.0, Rounded::exact(0.0));
    for &(sign, name) in side {
        // In <dy, y> it is y that is the result.
        let (result, input) = if name == "y" { ("y".into(), "grad.y") } else { (format!("grad.{name}"), name) };
        let (Some(ours), Some(expected)) = (ours.get(&result), expected.get(&result)) else { return Ok(None) };
        for ((&ours, &expected), &input) in ours.iter().zip(expected).zip(case.values(input)?) {
            sum += sign * ours * input;
            rounded = rounded + expected * Rounded::constant(sign * input);
        }
    }
    Ok(Some((sum, rounded)))
}
