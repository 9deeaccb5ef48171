//! Which tensor went wrong first.

use super::Model;
use crate::modules::{Pass, Signal};
use crate::{Result, Scalar};
use ndarray::{ArrayD, ArrayViewD};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// The largest magnitude in every module's output, by the module's name, in the order in which they are computed.
pub(super) type Sizes = Vec<(String, f64)>;

fn largest<T: Scalar>(values: ArrayViewD<'_, T>) -> f64 {
    // A NaN counts as the largest.
    values.iter().fold(0.0, |largest: f64, value| {
        let size = value.as_f64().abs();
        if size > largest || size.is_nan() { if largest.is_nan() { largest } else { size } } else { largest }
    })
}

/// How large every module's output is.
pub(super) fn sizes<T: Scalar>(model: &Model<T>, x: Signal<T>, pass: &Pass<'_, T>) -> Result<Sizes> {
    let seen = Mutex::new(Sizes::new());
    let watch = |module: &str, y: ArrayViewD<'_, T>| {
        let mut seen = seen.lock().expect("nobody panics while looking");
        seen.push((module.to_string(), largest(y)));
    };
    let pass = Pass::evaluation().watched(&watch).dropping_as(pass);
    drop(model.forward(x, &pass)?);
    drop(pass);
    Ok(seen.into_inner().expect("nobody panics while looking"))
}

/// The first parameter that is not finite, in the order of the model.
pub(super) fn parameter<T: Scalar>(model: &Model<T>) -> Option<String> {
    let broken = model.parameters().into_iter().find(|parameter| !largest(parameter.values.view()).is_finite());
    broken.map(|parameter| format!("{} is the first tensor that is not finite", parameter.name))
}

/// How many times as large as at first an output is that has exploded.
const EXPLODED: f64 = 100.0;

/// What of a forward is the first that is not finite, or that has exploded, or has grown most.
pub(super) fn forward<T: Scalar>(model: &Model<T>, before: &Sizes, now: &Sizes) -> String {
    if let Some(parameter) = parameter(model) {
        return parameter;
    }
    if let Some((module, _)) = now.iter().find(|(_, size)| !size.is_finite()) {
        return format!("the output of {module} is the first tensor that is not finite");
    }
    let growth: Vec<(&str, f64)> =
        now.iter().zip(before).map(|((module, now), (_, before))| (module.as_str(), now / before)).collect();
    let exploded = growth.iter().find(|(_, growth)| *growth > EXPLODED);
    let most = growth.iter().max_by(|(_, a), (_, b)| a.total_cmp(b));
    match exploded.or(most) {
        Some((module, growth)) => format!("the output of {module} is {growth:.0} times what it was at the first step"),
        None => "the model has no modules".into(),
    }
}

/// The first gradient that is not finite, in the order of the model.
pub(super) fn gradient<T: Scalar>(model: &Model<T>, gradients: &BTreeMap<String, ArrayD<T>>) -> Option<String> {
    let names = model.parameters().into_iter().filter(|parameter| parameter.trained);
    names
        .map(|parameter| parameter.name)
        .find(|name| gradients.get(name).is_some_and(|gradient| gradient.iter().any(|value| !value.is_finite())))
}
