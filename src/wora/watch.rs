//! Looking on while a pass works: every line of SPEC.md that is worked out, by its label, with its numbers.

use ndarray::ArrayD;

/// Is shown a line: its label in SPEC.md, what the quantity is called there, and its numbers, which are made only where
/// somebody looks.
///
/// ```
/// # use ndarray::array;
/// # use woracle::{operators::Linear, wora::{Adapter, Base, Config, Definition, Method}};
/// # let operator = Linear { in_features: 2, out_features: 1, fan_in_fan_out: false };
/// # let (config, x) = (Config::new(Method::Dora, 1.0), array![[1.0, 1.0]].into_dyn());
/// # let definition = Definition {
/// #     operator: &operator, config: &config, input: &x.view().into(), x: Some(x.clone()), mask: None,
/// #     base: Base { weight: array![[3.0, 2.0]].into_dyn().into(), bias: None },
/// #     adapter: Adapter {
/// #         lora_a: array![[0.0, 1.0]].into_dyn(), lora_b: array![[2.0]].into_dyn(),
/// #         magnitude: Some(array![10.0].into_dyn()), alpha: None, beta: None,
/// #     },
/// #     frozen_norm: None,
/// # };
/// let mut lines = Vec::new();
/// definition.evaluate_watched(None, &mut |label, quantity, values| {
///     lines.push(format!("{label}: {quantity} = {}", values()));
/// });
/// assert!(lines.contains(&"E9: V = [[3, 4]]".to_string()));
/// assert!(lines.contains(&"E10: n = [5]".to_string()));
/// ```
pub type Watch<'w, R> = dyn FnMut(&'static str, &'static str, &dyn Fn() -> ArrayD<R>) + 'w;

/// Looks at nothing.
pub(crate) fn unwatched<R>(_: &'static str, _: &'static str, _: &dyn Fn() -> ArrayD<R>) {}

/// A line that has been worked out: one call of a [`Watch`], kept. [`Subject::walk`](crate::registry::Subject::walk)
/// gives those of a case.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Its label in SPEC.md.
    pub label: &'static str,
    /// What the quantity is called there.
    pub quantity: &'static str,
    /// Its numbers; weights as `[units, fan_in]`, outputs of an operator as `[outer, units, inner]`.
    pub values: ArrayD<f64>,
}

/// Everything that a pass shows, in the order in which it is worked out.
pub(crate) fn watched<Out>(run: impl FnOnce(&mut Watch<'_, f64>) -> Out) -> (Out, Vec<Line>) {
    let mut lines = Vec::new();
    let out = run(&mut |label, quantity, values| lines.push(Line { label, quantity, values: values() }));
    (out, lines)
}
