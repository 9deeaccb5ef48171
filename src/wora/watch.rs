//! Looking on while a pass works: every line of SPEC.md that is worked out, by its label, with its numbers.

use ndarray::ArrayD;

/// Is shown a line: its label in SPEC.md, what the quantity is called there, and its numbers, which are made only where
/// somebody looks.
pub type Watch<'w, R> = dyn FnMut(&'static str, &'static str, &dyn Fn() -> ArrayD<R>) + 'w;

/// Looks at nothing.
pub(crate) fn unwatched<R>(_: &'static str, _: &'static str, _: &dyn Fn() -> ArrayD<R>) {}

/// A line that has been worked out.
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
