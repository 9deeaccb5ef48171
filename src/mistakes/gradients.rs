//! What a formula comes to in a case, and the ways in which right gradients are spoilt.

use super::Parameter::{Alpha, Beta, Bias, LoraA, LoraB, Magnitude, Weight};
use super::{Formula, FormulaResults, Parameter, Path, RIGHT, TracedForward};
use crate::case::{Case, Tensor, Tensors};
use crate::traced::{TracedTensors, gradient};
use crate::{Real, Result};
use ndarray::ArrayD;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A formula, and what it came to; `None` where it asks for other shapes.
type Known = (Formula, Option<Arc<Tensors>>);

/// A case in which mistakes are made, and what formulas come to in it.
pub(crate) struct Spoiling<'a> {
    pub case: &'a Case,
    /// What A and B are called.
    pub lora: [&'static str; 2],
    /// The right results; a gradient or a stage that they lack is not wanted.
    pub right: &'a Tensors,
    /// A formula at a case; `None` where it asks for other shapes.
    pub formula: &'a (dyn Fn(&Formula, &Case) -> Result<Option<TracedForward>> + Sync),
    /// What has been evaluated in the case.
    pub known: Mutex<Vec<Known>>,
}

impl Spoiling<'_> {
    fn all_known(&self) -> MutexGuard<'_, Vec<Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a formula came to, where it has been evaluated.
    fn known(&self, formula: &Formula) -> Option<Option<Arc<Tensors>>> {
        self.all_known().iter().find(|(other, _)| other == formula).map(|(_, results)| results.clone())
    }

    /// y, the stages of the weight, and the gradients of `<dy, y>` of a formula.
    pub fn evaluate(&self, formula: &Formula) -> Result<Option<Arc<Tensors>>> {
        if let Some(results) = self.known(formula) {
            return Ok(results);
        }
        let results = self.at(formula, self.case)?.map(Arc::new);
        self.all_known().push((*formula, results.clone()));
        Ok(results)
    }

    /// y alone.
    pub fn value(&self, formula: &Formula) -> Result<Option<ArrayD<f64>>> {
        if let Some(y) = self.right.get("y").filter(|_| *formula == RIGHT) {
            return Ok(Some(y.clone()));
        }
        if let Some(results) = self.known(formula) {
            return Ok(results.map(|results| results["y"].clone()));
        }
        let Some(forward) = (self.formula)(formula, self.case)? else { return Ok(None) };
        Ok(Some(forward(&TracedTensors::new())?.y.mapv(Real::value)))
    }

    /// The same in another case.
    fn at(&self, formula: &Formula, case: &Case) -> Result<Option<Tensors>> {
        let Some(forward) = (self.formula)(formula, case)? else { return Ok(None) };
        let differentiated = case.tensors.iter().filter_map(|(name, tensor)| match tensor {
            Tensor::Float(values) if self.right.contains_key(&format!("grad.{name}")) => {
                Some((name.clone(), values.to_owned()))
            }
            _ => None,
        });
        let mut results = Tensors::new();
        let cotangent = match case.optional("grad.y")? {
            Some(cotangent) => cotangent.to_owned(),
            None => ArrayD::zeros(vec![0]),
        };
        let (y, gradients) = gradient(&differentiated.collect(), &cotangent, |inputs| {
            let FormulaResults { y, stages } = forward(inputs)?;
            let wanted = stages.into_iter().filter(|(name, _)| self.right.contains_key(*name));
            results.extend(wanted.map(|(name, stage)| (name.to_string(), stage)));
            Ok(y)
        })?;
        results.insert("y".into(), y);
        results.extend(gradients.into_iter().map(|(name, gradient)| (format!("grad.{name}"), gradient)));
        Ok(Some(results))
    }
}

/// The results of mistakes, to be changed.
pub struct Gradients<'a> {
    pub(super) spoiling: &'a Spoiling<'a>,
    /// Everything, in y and in the stages too.
    pub(super) results: Tensors,
    /// What the gradients are those of, by their names.
    pub(super) formulas: BTreeMap<String, Formula>,
}

impl Gradients<'_> {
    /// The gradient with respect to this tensor, where there is one.
    fn get(&mut self, parameter: Parameter) -> Option<&mut ArrayD<f64>> {
        self.results.get_mut(&format!("grad.{}", parameter.name(self.spoiling.lora)))
    }

    /// A scalar parameter's value; 1 where it is not learned.
    pub(super) fn scalar(&self, parameter: Parameter) -> f64 {
        let value = self.spoiling.case.values(parameter.name(self.spoiling.lora)).ok();
        value.and_then(|value| value.first().copied()).unwrap_or(1.0)
    }

    /// s.
    pub(super) fn scaling(&self) -> f64 {
        self.spoiling.case.settings.get("scaling").and_then(serde_json::Value::as_f64).unwrap_or(1.0)
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

    /// Multiplies every element of dm by a function of m and n.
    pub(super) fn scale_magnitude(&mut self, factor: impl Fn(f64, f64) -> f64) -> Result<()> {
        let m = self.spoiling.case.values(Magnitude.name(self.spoiling.lora)).ok().cloned();
        let n = self.results.get("weight_norm").cloned();
        if let (Some(m), Some(n), Some(gradient)) = (m, n, self.get(Magnitude)) {
            gradient.iter_mut().zip(&m).zip(&n).for_each(|((dm, &m), &n)| *dm *= factor(m, n));
        }
        Ok(())
    }

    /// Multiplies the path through the norm, which is all that differs between the two gradients.
    pub(super) fn scale_norm_path(&mut self, factor: f64) -> Result<()> {
        for (name, &formula) in &self.formulas {
            let held = self.spoiling.evaluate(&Formula { norm_gradient: Path::Held, ..formula })?;
            let (Some(held), Some(gradient)) = (held, self.results.get_mut(name)) else { continue };
            gradient.zip_mut_with(&held[name], |full, &held| *full = held + factor * (*full - held));
        }
        Ok(())
    }

    /// Divides the gradients of parameters by the first dimension of x.
    pub(super) fn average(&mut self) -> Result<()> {
        let first = self.spoiling.case.tensors["x"].shape().first().copied().unwrap_or(1);
        self.scale(&[Weight, Bias, LoraA, LoraB, Magnitude, Alpha, Beta], 1.0 / first as f64)
    }

    /// Takes the gradients of the sum of y.
    pub(super) fn ignore_cotangent(&mut self) -> Result<()> {
        let mut ones = self.spoiling.case.clone();
        if let Some(Tensor::Float(dy)) = ones.tensors.get_mut("grad.y") {
            dy.fill(1.0);
        }
        if let Some(others) = self.spoiling.at(&RIGHT, &ones)? {
            self.results.extend(others.into_iter().filter(|(name, _)| name.starts_with("grad.")));
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
            gradient.swap_axes(0, 1);
            *gradient = gradient.as_standard_layout().into_owned();
        }
        Ok(())
    }
}
