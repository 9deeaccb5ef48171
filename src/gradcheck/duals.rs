//! The derivative along a direction by one evaluation on dual numbers: exact to rounding.

use super::Estimate;
use super::function::{Along, Direction, Function, sum};
use crate::case::Tensors;
use crate::{Dual, DualTensors, Real, Result};
use ndarray::ArrayD;

/// Dual numbers through a function's forward, `<dy, y>` at one point.
pub(super) struct Duals<'a> {
    pub function: &'a dyn Function,
    pub inputs: &'a Tensors,
    pub cotangent: &'a ArrayD<f64>,
}

impl Duals<'_> {
    /// The derivative along a direction through a tensor, exact but for rounding; `None` where the function has no
    /// forward on dual numbers.
    pub fn along(&self, tensor: &str, direction: &Direction) -> Result<Option<Along>> {
        let mut inputs: DualTensors =
            self.inputs.iter().map(|(name, values)| (name.clone(), values.mapv(Dual::constant))).collect();
        let moving = inputs.get_mut(tensor).expect("an input").as_slice_mut().expect("standard layout");
        direction.iter().for_each(|&(element, speed)| moving[element].eps = speed);
        let Some(y) = self.function.forward_dual(&inputs)? else { return Ok(None) };
        let outputs = y.iter().zip(self.cotangent).map(|(y, dy)| y.eps * dy);
        let terms = outputs.clone().map(|term| term * term).sum::<f64>().sqrt();
        Ok(Some(Along { estimate: Estimate { value: sum(outputs), uncertainty: 0.0 }, terms }))
    }
}
