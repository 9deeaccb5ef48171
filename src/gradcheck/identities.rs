//! What must hold between the gradients of a layer at one point, without any step. SPEC.md, section 8.3.

use super::SLACK;
use super::comparison::{Point, Testimony, Witness};
use crate::case::{Case, Tensor, Tensors};
use crate::registry::Subject;
use crate::wora::{Config, NormGradient};
use crate::{Real, Result, Rounded, Scalar};
use ndarray::ArrayD;
use std::collections::BTreeMap;

/// A signed sum of inner products `<d tensor, tensor>`; `y` stands for `<dy, y>`.
type Side = Vec<(f64, &'static str)>;

/// Two sides that must be equal, and the gradient that they are a witness for.
struct Identity {
    tensor: &'static str,
    left: Side,
    right: Side,
}

/// The identities that hold in a case.
fn identities(subject: &dyn Subject, case: &Case) -> Result<Vec<Identity>> {
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
    let output: Side = vec![(1.0, "y"), (-1.0, "base.bias")];

    let mut list = vec![];
    let mut equal = |tensor, left: &Side, right: &Side| {
        list.push(Identity { tensor, left: left.clone(), right: right.clone() });
    };
    let one = |name| vec![(1.0, name)];
    equal(a, &one(a), &one(of_lora)); // E49
    equal(b, &one(b), &one(if has(alpha) { alpha } else { a })); // E49
    if has(beta) && undropped {
        equal(weight, &one(weight), &one(beta)); // E50
    }
    if config.has_norm() && undropped {
        equal(magnitude, &one(magnitude), &output); // E51
    }
    if config.has_norm() && (has(beta) || undropped) && (!full || config.norm_eps == 0.0) {
        let radial = vec![(1.0, of_lora), (1.0, of_base)];
        let held = if full { vec![] } else { one(magnitude) };
        equal(of_lora, &radial, &held); // E52, E53
        equal(of_base, &radial, &held); // E52, E53
    }
    if matches!(case.tensors.get(x), Some(Tensor::Float(_))) && undropped {
        equal(x, &one(x), &output); // E54
    }
    Ok(list)
}

/// Evaluates every identity of a case on the results under test; `expected` says how far off they may be.
pub(super) fn testimonies(
    subject: &dyn Subject,
    case: &Case,
    ours: &Tensors,
    expected: &BTreeMap<String, ArrayD<Rounded>>,
) -> Result<BTreeMap<&'static str, Testimony>> {
    let mut testimonies = BTreeMap::new();
    for Identity { tensor, left, right } in identities(subject, case)? {
        let sides = (side(case, ours, expected, &left)?, side(case, ours, expected, &right)?);
        let (Some((ours, left)), Some((theirs, right))) = sides else { continue };
        let difference = left - right;
        let budget = SLACK * f64::UNIT_ROUNDOFF * difference.roundings();
        let (size, widest) = (difference.size(), f64::MAX);
        let point = Point { index: None, ours, theirs, uncertainty: budget, budget, size, widest };
        testimonies.entry(tensor).or_insert_with(|| Testimony::new(Witness::Identities, vec![])).points.push(point);
    }
    Ok(testimonies)
}

/// A side by the results under test, and its rounding; `None` where a result is missing.
fn side(
    case: &Case,
    ours: &Tensors,
    expected: &BTreeMap<String, ArrayD<Rounded>>,
    side: &Side,
) -> Result<Option<(f64, Rounded)>> {
    let (mut sum, mut rounded) = (0.0, Rounded::exact(0.0));
    for &(sign, name) in side {
        if name == "base.bias" && !case.tensors.contains_key(name) {
            continue;
        }
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
