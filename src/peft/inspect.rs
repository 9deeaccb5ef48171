//! What an adapter does to its base, module by module, in numbers.

use super::checkpoint::Checkpoint;
use super::model::Model;
use super::module::Module;
use crate::wora::{Method, ZeroNorm};
use crate::{Error, Result};
use faer::Mat;
use ndarray::{Array2, ArrayD, ArrayView2, Axis, Ix2};
use serde::Serialize;

/// One module.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleReport {
    /// Its name in the base model.
    pub module: String,
    /// Which layer it is; without a base an embedding or not.
    pub kind: String,
    /// LoRA, DoRA or WoRA.
    pub method: Method,
    /// The shapes of A and B, as stored.
    pub lora_shapes: [Vec<usize>; 2],
    /// The shape of the weight, as stored; `None` without a base.
    pub shape: Option<Vec<usize>>,
    /// The rank of A and B.
    pub rank: usize,
    /// s
    pub scaling: f64,
    /// The learned alpha; 1 where it is not learned.
    pub alpha: f64,
    /// The learned beta; 1 where it is not learned.
    pub beta: f64,
    /// The norm of `alpha s B A`.
    pub delta_norm: f64,
    /// The effective rank of B A: the exponential of the entropy of its squared singular values, as parts of their sum. E80
    pub effective_rank: f64,
    /// `||alpha s B A|| / ||W0||`; `None` without a base.
    pub delta_over_base: Option<f64>,
    /// `||W' - W0|| / ||W0||`; `None` without a base.
    pub change_over_base: Option<f64>,
    /// The smallest and the largest gain, of units that have a direction; `None` for LoRA and without a base.
    pub gains: Option<[f64; 2]>,
    /// Units with `||V|| = 0`; `None` without a base.
    pub zero_norm_units: Option<usize>,
}

/// What an adapter does, and with a base what it does to it.
///
/// # Errors
///
/// An adapter that does not fit the base (C1, C7); numbers that are not finite (C2).
pub fn inspect(checkpoint: &Checkpoint, base: Option<&Model>) -> Result<Vec<ModuleReport>> {
    checkpoint.modules().map(|module| one(checkpoint, base, module)).collect()
}

fn one(checkpoint: &Checkpoint, base: Option<&Model>, name: &str) -> Result<ModuleReport> {
    let adapter = checkpoint.adapter(name)?;
    let scalar =
        |values: &Option<ArrayD<f64>>| values.as_ref().and_then(|values| values.first().copied()).unwrap_or(1.0);
    let (alpha, beta, scaling) = (scalar(&adapter.alpha), scalar(&adapter.beta), checkpoint.config().scaling(name)?);
    let matrix = |values: &ArrayD<f64>| -> Result<Array2<f64>> {
        let rows = values.len_of(Axis(0));
        let columns = values.len() / rows.max(1);
        let values = values.to_shape((rows, columns)).map_err(|_| Error::Shape {
            tensor: name.into(),
            expected: "two axes or more".into(),
            found: values.shape().to_vec(),
        })?;
        Ok(values.into_owned())
    };
    let (a, b) = (matrix(&adapter.lora_a)?, matrix(&adapter.lora_b)?);
    let singular = singular_values(b.view(), a.view())?;
    let squares: f64 = singular.iter().map(|value| value * value).sum();
    let parts = singular.iter().map(|value| value * value / squares).filter(|part| *part > 0.0);
    let entropy: f64 = parts.map(|part| -part * part.ln()).sum(); // E80
    let delta_norm = (alpha * scaling).abs() * squares.sqrt();
    let mut report = ModuleReport {
        module: name.into(),
        kind: if checkpoint.is_embedding(name) { "embedding" } else { "linear or convolution" }.into(),
        method: checkpoint.config().method(),
        lora_shapes: [adapter.lora_a.shape().to_vec(), adapter.lora_b.shape().to_vec()],
        shape: None,
        rank: adapter.rank(),
        scaling,
        alpha,
        beta,
        delta_norm,
        effective_rank: if squares > 0.0 { entropy.exp() } else { 0.0 },
        delta_over_base: None,
        change_over_base: None,
        gains: None,
        zero_norm_units: None,
    };
    let Some(base) = base else { return Ok(report) };
    let module = Module::new(checkpoint, base, name, ZeroNorm::Zero)?;
    let at = base.tensor(module.found.name())?;
    let (mut of_base, mut of_change, mut zeros) = (0.0, 0.0, 0);
    let mut gains = [f64::INFINITY, f64::NEG_INFINITY];
    for rows in module.blocks() {
        let (weight, _) = module.read(&rows, module.found.name(), at)?;
        let layer = module.layer(&rows, weight.clone())?;
        let (merged, norms) = module.merge(&rows, weight.clone())?;
        of_base += weight.iter().map(|w| w * w).sum::<f64>();
        of_change += merged.iter().zip(&weight).map(|(merged, w)| (merged - w).powi(2)).sum::<f64>();
        let norms = norms.unwrap_or_else(|| norms_of(&layer.weighted(), &module));
        zeros += norms.iter().filter(|&&norm| norm == 0.0).count();
        for (magnitude, norm) in
            layer.adapter().magnitude.iter().flatten().zip(&norms).filter(|(_, norm)| **norm != 0.0)
        {
            gains = [gains[0].min(magnitude / norm), gains[1].max(magnitude / norm)];
        }
    }
    report.kind = module.kind.name().into();
    report.shape = Some(module.shape.clone());
    report.delta_over_base = Some(delta_norm / of_base.sqrt());
    report.change_over_base = Some((of_change / of_base).sqrt());
    report.gains = (gains[0] <= gains[1]).then_some(gains);
    report.zero_norm_units = Some(zeros);
    Ok(report)
}

/// The norms of V's units.
fn norms_of(weighted: &ArrayD<f64>, module: &Module) -> ndarray::Array1<f64> {
    let weighted = weighted.view().into_dimensionality::<Ix2>().expect("a matrix");
    let weighted = if module.norms(&(0..0)).is_empty() { weighted } else { weighted.reversed_axes() };
    weighted.rows().into_iter().map(|row| row.dot(&row).sqrt()).collect()
}

/// The singular values of B A, of which there are no more than ranks: those of `R_B R_A^T`, where `B = Q_B R_B` and
/// `A^T = Q_A R_A`.
fn singular_values(b: ArrayView2<'_, f64>, a: ArrayView2<'_, f64>) -> Result<Vec<f64>> {
    let triangle = |matrix: ArrayView2<'_, f64>| {
        let matrix = Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[(i, j)]);
        matrix.qr().thin_R().to_owned()
    };
    let core = triangle(b) * triangle(a.t()).transpose();
    core.singular_values().map_err(|_| Error::Unexpected {
        tensor: "B A".into(),
        reason: "expected singular values, found none: a number is not finite".into(),
    })
}
