//! Numbers that remember how they came about, so that one sweep back finds the derivative of a result with respect to
//! everything it was made of: reverse-mode differentiation. What is linear in many numbers at once, a product of
//! matrices or an operator, is remembered as one [`block`] with its adjoint.
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
use crate::scalar::erf_slope;
use crate::{Real, Result};
use ndarray::ArrayD;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Add, Div, Mul, Range, Sub};

/// A number on the tape of the thread that made it; a constant is on none.
#[derive(Clone, Copy, Debug)]
pub struct Traced {
    value: f64,
    node: u32,
}

/// Tensors of traced numbers by their names.
pub type TracedTensors = BTreeMap<String, ArrayD<Traced>>;

/// What a number was made of, and its derivative with respect to each.
#[derive(Clone, Copy)]
struct Node {
    parents: [u32; 2],
    partials: [f64; 2],
}

/// The node of a number that is on no tape.
const CONSTANT: u32 = u32::MAX;

/// What a block does with the cotangent of its results.
type Backward = Box<dyn FnOnce(&ArrayD<f64>, &mut Adjoints)>;

/// Results that were computed all at once, and their nodes.
struct Block {
    results: Range<usize>,
    shape: Vec<usize>,
    backward: Backward,
}

#[derive(Default)]
struct Tape {
    nodes: Vec<Node>,
    blocks: Vec<Block>,
}

impl Tape {
    fn push(&mut self, parents: [u32; 2], partials: [f64; 2]) -> u32 {
        let node = u32::try_from(self.nodes.len()).ok().filter(|&node| node != CONSTANT);
        self.nodes.push(Node { parents, partials });
        node.expect("fewer than 2^32 operations")
    }
}

thread_local! {
    static TAPE: RefCell<Tape> = const { RefCell::new(Tape { nodes: Vec::new(), blocks: Vec::new() }) };
}

/// The derivatives of a result, as far as the sweep has come.
pub struct Adjoints(Vec<f64>);

impl Adjoints {
    /// Adds amounts to the derivatives with respect to as many numbers; constants have none.
    pub fn add<'a>(&mut self, numbers: impl IntoIterator<Item = &'a Traced>, amounts: impl IntoIterator<Item = f64>) {
        for (number, amount) in numbers.into_iter().zip(amounts) {
            if !number.is_constant() {
                self.0[number.node as usize] += amount;
            }
        }
    }
}

/// Results computed from traced numbers in one piece: `backward` gets their cotangent, and adds to the derivatives with
/// respect to what they were computed from.
///
/// ```
/// use ndarray::{ArrayD, array};
/// use woracle::case::Tensors;
/// use woracle::traced::{TracedTensors, block, gradient};
/// use woracle::{Real, traced::Traced};
/// // A sum of squares as one step of the tape, with the adjoint that belongs to it.
/// let sum_of_squares = |inputs: &TracedTensors| {
///     let x = inputs["x"].clone();
///     let values: Vec<f64> = x.iter().map(|x: &Traced| x.value()).collect();
///     let sum = values.iter().map(|x| x * x).sum();
///     let y = block(ArrayD::from_elem(vec![], sum), move |dy, adjoints| {
///         adjoints.add(&x, values.iter().map(|x| 2.0 * x * dy[[]]));
///     });
///     assert!(!y[[]].is_constant());
///     Ok(y)
/// };
/// let inputs = Tensors::from([("x".to_string(), array![3.0, 4.0].into_dyn())]);
/// let (y, gradients) = gradient(&inputs, &ArrayD::from_elem(vec![], 10.0), sum_of_squares)?;
/// assert_eq!((y[[]], &gradients["x"]), (25.0, &array![60.0, 80.0].into_dyn()));
/// # Ok::<(), woracle::Error>(())
/// ```
pub fn block(results: ArrayD<f64>, backward: impl FnOnce(&ArrayD<f64>, &mut Adjoints) + 'static) -> ArrayD<Traced> {
    TAPE.with_borrow_mut(|tape| {
        let first = tape.nodes.len();
        let (shape, backward) = (results.shape().to_vec(), Box::new(backward));
        let traced = results.mapv(|value| Traced { value, node: tape.push([CONSTANT; 2], [0.0; 2]) });
        if !traced.is_empty() {
            tape.blocks.push(Block { results: first..tape.nodes.len(), shape, backward });
        }
        traced
    })
}

impl Traced {
    fn new(value: f64, parents: [u32; 2], partials: [f64; 2]) -> Self {
        if parents == [CONSTANT; 2] {
            return Self { value, node: CONSTANT };
        }
        Self { value, node: TAPE.with_borrow_mut(|tape| tape.push(parents, partials)) }
    }

    fn variable(value: f64) -> Self {
        Self { value, node: TAPE.with_borrow_mut(|tape| tape.push([CONSTANT; 2], [0.0; 2])) }
    }

    /// Whether it depends on no input.
    pub fn is_constant(self) -> bool {
        self.node == CONSTANT
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
    fn exp(self) -> Self {
        let value = self.value.exp();
        Self::new(value, [self.node, CONSTANT], [value, 0.0])
    }
    fn ln(self) -> Self {
        Self::new(self.value.ln(), [self.node, CONSTANT], [1.0 / self.value, 0.0])
    }
    fn erf(self) -> Self {
        Self::new(Real::erf(self.value), [self.node, CONSTANT], [erf_slope(self.value), 0.0])
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
    // A thread that waits within a function for others may be given another function meanwhile.
    let suspended = TAPE.take();
    let traced = inputs.iter().map(|(name, values)| (name.clone(), values.mapv(Traced::variable)));
    let traced: TracedTensors = traced.collect();
    let y = function(&traced);
    let Tape { nodes, mut blocks } = TAPE.replace(suspended);
    let y = y?;
    let mut adjoints = Adjoints(vec![0.0; nodes.len()]);
    adjoints.add(&y, cotangent.iter().copied());
    for (node, Node { parents, partials }) in nodes.iter().enumerate().rev() {
        // All uses of a block's results come after it: at its first node its cotangent is complete.
        if let Some(Block { results, shape, backward }) = blocks.pop_if(|block| block.results.start == node) {
            let cotangent = ArrayD::from_shape_vec(shape, adjoints.0[results].to_vec()).expect("as many as results");
            if cotangent.iter().any(|&cotangent| cotangent != 0.0) {
                backward(&cotangent, &mut adjoints);
            }
            continue;
        }
        let adjoint = adjoints.0[node];
        // Times what is not finite, none is no number, as elsewhere.
        if adjoint == 0.0 && partials.iter().all(|partial| partial.is_finite()) {
            continue;
        }
        for (&parent, partial) in parents.iter().zip(partials).filter(|(parent, _)| **parent != CONSTANT) {
            adjoints.0[parent as usize] += partial * adjoint;
        }
    }
    let of = |values: &ArrayD<Traced>| values.mapv(|value| adjoints.0[value.node as usize]);
    let gradients = traced.iter().map(|(name, values)| (name.clone(), of(values))).collect();
    Ok((y.mapv(Traced::value), gradients))
}
