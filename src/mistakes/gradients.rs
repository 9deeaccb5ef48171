//! The gradients of a formula, by dual numbers, and the ways in which right ones are spoilt.

use super::Parameter::{Alpha, Beta, Bias, LoraA, LoraB, Magnitude, Weight};
use super::{Evaluate, Formula, Parameter, Path, RIGHT};
use crate::case::{Case, Tensor, Tensors};
use crate::{Dual, DualTensors, Real, Result};
use ndarray::ArrayD;

/// The gradient of `<dy, y>` of a formula with respect to one tensor, an element at a time on dual numbers.
pub(super) fn gradient(
    formula: &Formula,
    case: &Case,
    name: &str,
    evaluate: Evaluate<'_>,
) -> Result<Option<ArrayD<f64>>> {
    let Some(Tensor::Float(values)) = case.tensors.get(name) else { return Ok(None) };
    let Some(forward) = evaluate(formula, case)? else { return Ok(None) };
    let cotangent = case.values("grad.y")?;
    let mut inputs = DualTensors::from([(name.to_string(), values.mapv(Dual::constant))]);
    let mut gradient = ArrayD::zeros(values.raw_dim());
    for (element, derivative) in gradient.iter_mut().enumerate() {
        let moving = |inputs: &mut DualTensors, speed: f64| {
            let values = inputs.get_mut(name).expect("the tensor").as_slice_mut().expect("standard layout");
            values[element].eps = speed;
        };
        moving(&mut inputs, 1.0);
        let y = forward(&inputs)?;
        moving(&mut inputs, 0.0);
        *derivative = y.iter().zip(cotangent).map(|(y, dy)| y.eps * dy).sum();
    }
    Ok(Some(gradient))
}

/// The gradients of a mistake's forward in a case, to be changed.
pub struct Gradients<'a> {
    /// The case.
    pub case: &'a Case,
    /// What A and B are called.
    pub(super) lora: [&'static str; 2],
    /// The definition's `weight_norm`, where there is one.
    pub(super) weight_norm: Option<&'a ArrayD<f64>>,
    pub(super) evaluate: Evaluate<'a>,
    pub(super) gradients: Tensors,
}

impl Gradients<'_> {
    /// The gradient with respect to this tensor, where there is one.
    fn get(&mut self, parameter: Parameter) -> Option<&mut ArrayD<f64>> {
        self.gradients.get_mut(&format!("grad.{}", parameter.name(self.lora)))
    }

    /// A scalar parameter's value; 1 where it is not learned.
    pub(super) fn scalar(&self, parameter: Parameter) -> f64 {
        let value = self.case.values(parameter.name(self.lora)).ok();
        value.and_then(|value| value.first().copied()).unwrap_or(1.0)
    }

    /// s.
    pub(super) fn scaling(&self) -> f64 {
        self.case.settings.get("scaling").and_then(serde_json::Value::as_f64).unwrap_or(1.0)
    }

    /// Multiplies gradients by a number.
    pub(super) fn scale(&mut self, parameters: &[Parameter], factor: f64) -> Result<()> {
        for &parameter in parameters {
            if let Some(gradient) = self.get(parameter) {
                *gradient *= factor;
            }
        }
        Ok(())
    }

    /// Takes a factor out of gradients; one that is 0 cannot be taken out.
    pub(super) fn without(&mut self, factor: f64, parameters: &[Parameter]) -> Result<()> {
        self.scale(parameters, if factor == 0.0 { 1.0 } else { 1.0 / factor })
    }

    /// The gradient of another function, or of the same in another case.
    fn of(&self, formula: &Formula, case: &Case, parameter: Parameter) -> Result<Option<ArrayD<f64>>> {
        let name = parameter.name(self.lora);
        match self.gradients.contains_key(&format!("grad.{name}")) {
            true => gradient(formula, case, name, self.evaluate),
            false => Ok(None),
        }
    }
    /// Multiplies every element of dm by a function of m and n.
    pub(super) fn scale_magnitude(&mut self, factor: impl Fn(f64, f64) -> f64) -> Result<()> {
        let m = self.case.values(Magnitude.name(self.lora)).ok().cloned();
        if let (Some(m), Some(n), Some(gradient)) = (m, self.weight_norm, self.get(Magnitude)) {
            gradient.iter_mut().zip(&m).zip(n).for_each(|((dm, &m), &n)| *dm *= factor(m, n));
        }
        Ok(())
    }

    /// Multiplies the path through the norm, which is all that differs between the two gradients.
    pub(super) fn scale_norm_path(&mut self, factor: f64) -> Result<()> {
        for parameter in Parameter::ALL {
            let held = self.of(&Formula { norm_gradient: Path::Held, ..RIGHT }, self.case, parameter)?;
            if let (Some(held), Some(gradient)) = (held, self.get(parameter)) {
                gradient.zip_mut_with(&held, |full, &held| *full = held + factor * (*full - held));
            }
        }
        Ok(())
    }

    /// Divides the gradients of parameters by the first dimension of x.
    pub(super) fn average(&mut self) -> Result<()> {
        let first = self.case.tensors["x"].shape().first().copied().unwrap_or(1);
        self.scale(&[Weight, Bias, LoraA, LoraB, Magnitude, Alpha, Beta], 1.0 / first as f64)
    }

    /// Takes the gradients of the sum of y.
    pub(super) fn ignore_cotangent(&mut self) -> Result<()> {
        let mut ones = self.case.clone();
        if let Some(Tensor::Float(dy)) = ones.tensors.get_mut("grad.y") {
            dy.fill(1.0);
        }
        for parameter in Parameter::ALL {
            if let (Some(other), Some(gradient)) = (self.of(&RIGHT, &ones, parameter)?, self.get(parameter)) {
                gradient.assign(&other);
            }
        }
        Ok(())
    }

    /// Exchanges dalpha and dbeta.
    pub(super) fn swap_alpha_beta(&mut self) -> Result<()> {
        if let (Some(alpha), Some(beta)) = (self.get(Alpha).cloned(), self.get(Beta).cloned()) {
            self.get(Alpha).into_iter().for_each(|gradient| gradient.assign(&beta));
            self.get(Beta).into_iter().for_each(|gradient| gradient.assign(&alpha));
        }
        Ok(())
    }

    /// Transposes dB where it is square.
    pub(super) fn transpose_b(&mut self) -> Result<()> {
        if let Some(gradient) = self.get(LoraB)
            && gradient.shape()[0] == gradient.shape()[1]
        {
            *gradient = gradient.t().as_standard_layout().into_owned();
        }
        Ok(())
    }
}
