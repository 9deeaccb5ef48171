//! Numbers that remember how they came about, so that one sweep back finds the derivative of a result with respect to
//! everything it was made of: reverse-mode differentiation.
//!
//! ```
//! use ndarray::{ArrayD, array};
//! use woracle::{case::Tensors, traced::{Traced, gradient}};
//! let inputs = Tensors::from([("x".to_string(), array![3.0, 4.0].into_dyn())]);
//! let square = |inputs: &woracle::traced::TracedTensors| {
//!     let sum = inputs["x"].iter().fold(woracle::Real::constant(0.0), |sum: Traced, &x| sum + x * x);
//!     Ok(ArrayD::from_elem(vec![], sum))
//! };
//! let (y, gradients) = gradient(&inputs, &ArrayD::from_elem(vec![], 1.0), square)?;
//! assert_eq!((y[[]], &gradients["x"]), (25.0, &array![6.0, 8.0].into_dyn()));
//! # Ok::<(), woracle::Error>(())
//! ```

use crate::case::Tensors;
use crate::{Real, Result};
use ndarray::ArrayD;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Add, Div, Mul, Sub};

/// A number on the tape of the thread that made it; a constant is on none.
#[derive(Clone, Copy, Debug)]
pub struct Traced {
    value: f64,
    node: usize,
}

/// Tensors of traced numbers by their names.
pub type TracedTensors = BTreeMap<String, ArrayD<Traced>>;

/// What a number was made of, and its derivative with respect to each.
#[derive(Clone, Copy)]
struct Node {
    parents: [usize; 2],
    partials: [f64; 2],
}

const CONSTANT: usize = usize::MAX;

thread_local! {
    static TAPE: RefCell<Vec<Node>> = const { RefCell::new(Vec::new()) };
}

impl Traced {
    fn new(value: f64, parents: [usize; 2], partials: [f64; 2]) -> Self {
        if parents == [CONSTANT; 2] {
            return Self { value, node: CONSTANT };
        }
        let node = TAPE.with_borrow_mut(|tape| {
            tape.push(Node { parents, partials });
            tape.len() - 1
        });
        Self { value, node }
    }

    fn variable(value: f64) -> Self {
        let node = TAPE.with_borrow_mut(|tape| {
            tape.push(Node { parents: [CONSTANT; 2], partials: [0.0; 2] });
            tape.len() - 1
        });
        Self { value, node }
    }
}

impl Add for Traced {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self::new(self.value + other.value, [self.node, other.node], [1.0, 1.0])
    }
}

impl Sub for Traced {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self::new(self.value - other.value, [self.node, other.node], [1.0, -1.0])
    }
}

impl Mul for Traced {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        Self::new(self.value * other.value, [self.node, other.node], [other.value, self.value])
    }
}

impl Div for Traced {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        let value = self.value / other.value;
        Self::new(value, [self.node, other.node], [1.0 / other.value, -value / other.value])
    }
}

impl Real for Traced {
    fn constant(value: f64) -> Self {
        Self { value, node: CONSTANT }
    }
    fn value(self) -> f64 {
        self.value
    }
    fn damped(self, fraction: f64) -> Self {
        Self::new(self.value, [self.node, CONSTANT], [fraction, 0.0])
    }
    fn sqrt(self) -> Self {
        let root = self.value.sqrt();
        Self::new(root, [self.node, CONSTANT], [0.5 / root, 0.0])
    }
}

/// y of a function, and the gradient of `<dy, y>` with respect to every input.
///
/// # Errors
///
/// Whatever the function says.
pub fn gradient(
    inputs: &Tensors,
    cotangent: &ArrayD<f64>,
    function: impl FnOnce(&TracedTensors) -> Result<ArrayD<Traced>>,
) -> Result<(ArrayD<f64>, Tensors)> {
    TAPE.with_borrow_mut(Vec::clear);
    let traced = inputs.iter().map(|(name, values)| (name.clone(), values.mapv(Traced::variable)));
    let traced: TracedTensors = traced.collect();
    let y = function(&traced);
    let tape = TAPE.take();
    let y = y?;
    let mut adjoints = vec![0.0; tape.len()];
    for (y, dy) in y.iter().zip(cotangent).filter(|(y, _)| y.node != CONSTANT) {
        adjoints[y.node] += dy;
    }
    for (node, Node { parents, partials }) in tape.iter().enumerate().rev() {
        let adjoint = adjoints[node];
        if adjoint == 0.0 {
            continue;
        }
        for (&parent, partial) in parents.iter().zip(partials).filter(|(parent, _)| **parent != CONSTANT) {
            adjoints[parent] += partial * adjoint;
        }
    }
    let of = |values: &ArrayD<Traced>| values.mapv(|value| adjoints[value.node]);
    let gradients = traced.iter().map(|(name, values)| (name.clone(), of(values))).collect();
    Ok((y.mapv(Traced::value), gradients))
}
