//! A case like a layer's worked example, with other numbers or other shapes.

use super::{Example, READABLE, numbers};
use crate::case::Case;
use crate::cases::{Spec, Twist};
use crate::registry;
use crate::{Error, Result};

/// The shapes of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// x.
    pub x: Vec<usize>,
    /// The base weight, as stored.
    pub weight: Vec<usize>,
    /// The rank.
    pub rank: usize,
}

impl Shape {
    /// Of a case.
    fn of(case: &Case, lora_a: &str) -> Self {
        let shape = |name: &str| case.tensors.get(name).map_or_else(Vec::new, |tensor| tensor.shape().to_vec());
        let rank = shape(lora_a).first().copied().unwrap_or(1);
        Self { x: shape("x"), weight: shape("base.weight"), rank }
    }

    fn check(&self) -> Result<()> {
        let elements = |shape: &[usize]| shape.iter().try_fold(1_usize, |all, &length| all.checked_mul(length));
        let readable = |shape: &[usize]| elements(shape).is_some_and(|elements| (1..=READABLE).contains(&elements));
        if [&self.x[..], &self.weight, &[self.rank]].into_iter().all(readable) {
            return Ok(());
        }
        let expected = format!("three shapes of 1 to {READABLE} numbers, such as 2x4 3x4 1");
        let found = [&self.x[..], &self.weight, &[self.rank]].map(|lengths| numbers::shape(lengths, "x")).join(" ");
        Err(Error::Setting { name: "--shape", expected, found })
    }
}

/// A case with the settings of an example, random numbers in it, and these shapes or its own.
///
/// # Errors
///
/// Shapes that do not fit the layer, or hold more numbers than are read.
pub fn drawn(example: &Example, shape: Option<Shape>, seed: u64) -> Result<Case> {
    let case = example.case()?;
    let subject = registry::layer(&case.layer)?;
    let shape = shape.unwrap_or_else(|| Shape::of(&case, subject.lora_names()[0]));
    shape.check()?;
    let operator = serde_json::Value::from(case.settings.clone()).to_string();
    // A spec is usually written down in the program and lives as long as it does; so does this one.
    let spec = Spec {
        x: shape.x.leak(),
        weight: shape.weight.leak(),
        rank: shape.rank,
        bias: case.tensors.contains_key("base.bias"),
        dropout: case.tensors.contains_key("dropout_mask").then_some(0.5),
        config: case.settings()?,
        twist: Twist::None,
        operator: operator.leak(),
        ..Spec::plain(example.layer())
    };
    let mut drawn = subject.try_draw(&spec, seed)?;
    drawn.settings = case.settings;
    Ok(drawn)
}
