//! What is linear in many traced numbers at once: products of matrices, and operators. Both are one block of the tape.

use crate::Real;
use crate::matmul;
use crate::operators::{Input, Operator, Term};
use crate::traced::{Traced, block};
use ndarray::{Array2, ArrayD, ArrayView3, Axis, Ix2};

/// A B: `[m, k]` times `[k, n]`.
pub(super) fn product(a: Array2<Traced>, b: Array2<Traced>) -> Array2<Traced> {
    let (a_values, b_values) = (a.mapv(Real::value), b.mapv(Real::value));
    let result = matmul::product(a_values.view(), b_values.view());
    if a.iter().chain(&b).all(|value| value.is_constant()) {
        return result.mapv(Traced::constant);
    }
    let traced = block(result.into_dyn(), move |dc, adjoints| {
        let dc = dc.view().into_dimensionality::<Ix2>().expect("a matrix");
        adjoints.add(&a, matmul::product(dc, b_values.t()));
        adjoints.add(&b, matmul::product(a_values.t(), dc));
    });
    traced.into_dimensionality().expect("a matrix")
}

/// The adjoint of an operator, right or wrong.
pub(super) enum Adjoint {
    /// What is read several times gets the sum.
    Sum,
    /// Only the last window that reads an input sends it something back.
    LastWindows,
    /// Only the last occurrence of an id sends something back to the weight; the other occurrences read `others`, equal
    /// in value.
    LastOccurrences { others: Array2<Traced> },
}

/// `op(x, W)` for W `[units, fan_in]`, in this shape. x is `None` for ids.
pub(super) fn operate<O: Operator>(
    operator: &O,
    input: &O::Input<'_, f64>,
    x: Option<&ArrayD<Traced>>,
    weight: Array2<Traced>,
    adjoint: Adjoint,
    shape: Vec<usize>,
) -> ArrayD<Traced> {
    // The fraction of a lookup's gradient is the formula's affair.
    let operator = operator.power(1);
    let values = weight.mapv(Real::value);
    let input: O::Input<'static, f64> = match x {
        Some(x) => Input::<f64>::from_values(x.mapv(Real::value)).expect("an input with values"),
        None => Input::<f64>::from_ids(input.ids().expect("ids").to_owned()).expect("an input of ids"),
    };
    let y = operator.apply(&input, &[values.view()]).swap_remove(0);
    let stacked = y.raw_dim();
    let y = y.into_shape_with_order(shape).expect("as many outputs as the shape says");
    if x.into_iter().flatten().chain(&weight).all(|value| value.is_constant()) {
        return y.mapv(Traced::constant);
    }
    let x = x.cloned();
    block(y, move |dy, adjoints| {
        let dy = dy.view().into_shape_with_order(stacked).expect("as many as y");
        let dw = operator.adjoint_weight(&input, dy);
        if let Adjoint::LastOccurrences { others } = &adjoint {
            let last = last_occurrences(&operator, &input, dy);
            adjoints.add(others, &dw - &last);
            adjoints.add(&weight, last);
        } else {
            adjoints.add(&weight, dw);
        }
        let Some(x) = x else { return };
        let dx = match adjoint {
            Adjoint::LastWindows => last_windows(&operator, &input, dy, &values),
            _ => operator.adjoint_input(&input, &[(dy, values.view())]).expect("values"),
        };
        adjoints.add(&x, dx);
    })
}

/// dW from the last occurrence of every id alone.
fn last_occurrences<O: Operator>(operator: &O, input: &O::Input<'_, f64>, dy: ArrayView3<'_, f64>) -> Array2<f64> {
    let dy: Vec<f64> = dy.iter().copied().collect();
    let mut dw = Array2::zeros((operator.units(), operator.fan_in()));
    let occurrence = |t: &Term| (t.column, t.output / operator.units());
    visit_last(operator, input, operator.fan_in(), occurrence, |t| dw[[t.unit, t.column]] += t.factor * dy[t.output]);
    dw
}

/// dx from the last window that reads an input alone; every unit reads it at the same time.
fn last_windows<O: Operator>(
    operator: &O,
    input: &O::Input<'_, f64>,
    dy: ArrayView3<'_, f64>,
    weight: &Array2<f64>,
) -> ArrayD<f64> {
    let inner = dy.len_of(Axis(2));
    let dy: Vec<f64> = dy.iter().copied().collect();
    let shape = Input::<f64>::shape(input);
    let mut dx = vec![0.0; shape.iter().product()];
    let input_of = |t: &Term| t.input.expect("a value");
    let window = |t: &Term| (input_of(t), t.column * inner + t.output % inner);
    let count = dx.len();
    visit_last(operator, input, count, window, |t| {
        dx[input_of(&t)] += t.factor * weight[[t.unit, t.column]] * dy[t.output];
    });
    ArrayD::from_shape_vec(shape, dx).expect("as many as x")
}

/// Visits the terms that are the last to add to their target; those of one time add together.
fn visit_last<O: Operator>(
    operator: &O,
    input: &O::Input<'_, f64>,
    targets: usize,
    target_and_time: impl Fn(&Term) -> (usize, usize),
    mut visit: impl FnMut(Term),
) {
    let mut last = vec![0; targets];
    operator.terms::<f64>(input, |t| {
        let (target, time) = target_and_time(&t);
        last[target] = time;
    });
    operator.terms::<f64>(input, |t| {
        let (target, time) = target_and_time(&t);
        if last[target] == time {
            visit(t);
        }
    });
}
