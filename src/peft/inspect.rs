//! What an adapter does to its base, module by module, in numbers.

use super::checkpoint::Checkpoint;
use super::model::Model;
use super::module::{Module, in_parallel};
use crate::wora::{Method, ZeroNorm, as_matrix};
use crate::{Error, Result};
use faer::Mat;
use ndarray::{Array1, ArrayD, ArrayView2, Axis, IxDyn};
use serde::Serialize;
use std::ops::Range;

/// One module.
///
/// What [`inspect`] says of `fc1` without the base, of which only A and B are known:
///
/// ```
/// use woracle::peft::{Checkpoint, inspect};
/// # let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/text-dora");
/// let reports = inspect(&Checkpoint::open(&data.join("adapter"))?, None)?;
/// let fc1 = reports.iter().find(|report| report.module == "fc1").unwrap();
/// assert_eq!(fc1.lora_shapes, [[4, 16], [20, 4]]); // A [rank, in], B [out, rank]
/// assert!(fc1.delta_norm.is_some() && fc1.delta_over_base.is_none());
/// # Ok::<(), woracle::Error>(())
/// ```
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
    /// The norm of `alpha s B A`; `None` where B does not multiply A, beside a grouped convolution.
    pub delta_norm: Option<f64>,
    /// The effective rank of B A: the exponential of the entropy of its squared singular values, as parts of their sum.
    /// E80
    pub effective_rank: Option<f64>,
    /// `||alpha s B A|| / ||W0||`; `None` without a base or over zeros.
    pub delta_over_base: Option<f64>,
    /// `||W' - W0|| / ||W0||`; `None` without a base or over zeros.
    pub change_over_base: Option<f64>,
    /// The smallest and the largest gain, of units that have a direction; `None` for LoRA and without a base.
    pub gains: Option<[f64; 2]>,
    /// Units with `||V|| = 0`; `None` without a base.
    pub zero_norm_units: Option<usize>,
}

/// What an adapter does, and with a base what it does to it.
///
/// ```
/// use woracle::peft::{Checkpoint, Model, inspect};
/// # let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/text-dora");
/// let adapter = Checkpoint::open(&data.join("adapter"))?;
/// let base = Model::open(&data.join("model.safetensors"))?;
/// let reports = inspect(&adapter, Some(&base))?;
/// let fc1 = reports.iter().find(|report| report.module == "fc1").unwrap();
/// assert_eq!((fc1.rank, fc1.shape.as_deref()), (4, Some(&[20, 16][..])));
/// assert!((1.0..=4.0).contains(&fc1.effective_rank.unwrap())); // E80: no more than the rank
/// assert!(fc1.change_over_base.unwrap() > 0.0);
/// let [smallest, largest] = fc1.gains.unwrap();
/// assert!(smallest <= largest);
/// assert!(inspect(&adapter, None)?.iter().all(|report| report.gains.is_none())); // norms need W0
/// # Ok::<(), woracle::Error>(())
/// ```
///
/// # Errors
///
/// An adapter that does not fit the base (C1, C7); numbers that are not finite (C2).
pub fn inspect(checkpoint: &Checkpoint, base: Option<&Model>) -> Result<Vec<ModuleReport>> {
    checkpoint.modules().map(|module| one(checkpoint, base, module)).collect()
}

fn one(checkpoint: &Checkpoint, base: Option<&Model>, name: &str) -> Result<ModuleReport> {
    let adapter = checkpoint.adapter(name)?;
    let scalar = |values: &Option<ArrayD<f64>>| values.as_ref().map_or(1.0, |values| values[IxDyn(&[])]);
    let (alpha, beta, scaling) = (scalar(&adapter.alpha), scalar(&adapter.beta), checkpoint.config().scaling(name)?);
    let singular = singular_values(as_matrix(&adapter.lora_b), as_matrix(&adapter.lora_a));
    let squares = singular.as_ref().map(|values| values.iter().map(|value| value * value).sum::<f64>());
    let delta_norm = squares.map(|squares| (alpha * scaling).abs() * squares.sqrt());
    let effective_rank = singular.as_ref().zip(squares).map(|(values, squares)| {
        let parts = values.iter().map(|value| value * value / squares).filter(|part| *part > 0.0);
        let entropy: f64 = parts.map(|part| -part * part.ln()).sum(); // E80
        if squares > 0.0 { entropy.exp() } else { 0.0 }
    });
    let report = ModuleReport {
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
        effective_rank,
        delta_over_base: None,
        change_over_base: None,
        gains: None,
        zero_norm_units: None,
    };
    let Some(base) = base else { return Ok(report) };
    let module = Module::new(checkpoint, base, name, ZeroNorm::Zero)?;
    let at = base.tensor(module.found.name())?;
    let read = |rows: &Range<usize>| Ok(module.read(rows, module.found.name(), at)?.0);
    // The adapter's own numbers have been looked at: what is wrong from here on is the base's.
    let of_file = |error: Error| error.in_file(base.path_of(module.found.name()));
    let of_columns = module.column_norms(read).map_err(of_file)?;
    let mut sums = [0.0; 2];
    let mut norms = Array1::zeros(module.adapter.lora_b.len_of(Axis(0)));
    let one = |rows: &Range<usize>| {
        let weight = read(rows)?;
        let (merged, _) = module.merge(rows, weight.clone(), of_columns.as_ref())?;
        let of_rows = match &of_columns {
            Some(_) => None,
            None => Some(module.layer(rows, weight.clone())?.squared_weighted_norms().mapv_into(f64::sqrt)),
        };
        let of_base: f64 = weight.iter().map(|w| w * w).sum();
        let of_change: f64 = merged.iter().zip(&weight).map(|(merged, w)| (merged - w).powi(2)).sum();
        Ok((rows.clone(), [of_base, of_change], of_rows))
    };
    in_parallel(&module.blocks(), one, |some| {
        for (rows, of_rows, norms_of_rows) in some {
            sums = [sums[0] + of_rows[0], sums[1] + of_rows[1]];
            if let Some(of_rows) = norms_of_rows {
                norms.slice_axis_mut(Axis(0), rows.into()).assign(&of_rows);
            }
        }
        Ok(())
    })
    .map_err(of_file)?;
    let norms = of_columns.unwrap_or(norms);
    let ratio = |part: f64| if sums[0] > 0.0 { Some(part / sums[0].sqrt()) } else { None };
    let directed = module.adapter.magnitude.iter().flatten().zip(&norms).filter(|(_, norm)| **norm != 0.0);
    let gains = directed.map(|(magnitude, norm)| magnitude / norm);
    let range = gains.fold([f64::INFINITY, f64::NEG_INFINITY], |[least, most], gain| [least.min(gain), most.max(gain)]);
    Ok(ModuleReport {
        kind: module.kind.name().into(),
        shape: Some(module.shape.clone()),
        delta_over_base: report.delta_norm.and_then(ratio),
        change_over_base: ratio(sums[1].sqrt()),
        gains: (range[0] <= range[1]).then_some(range),
        zero_norm_units: Some(norms.iter().filter(|&&norm| norm == 0.0).count()),
        ..report
    })
}

/// The singular values of B A, of which there are no more than ranks: those of `R_B R_A^T`, where `B = Q_B R_B` and
/// `A^T = Q_A R_A`. `None` where B does not multiply A, as beside a grouped convolution, or where they are beyond f64.
fn singular_values(b: ArrayView2<'_, f64>, a: ArrayView2<'_, f64>) -> Option<Vec<f64>> {
    let triangle = |matrix: ArrayView2<'_, f64>| {
        let matrix = Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[(i, j)]);
        matrix.qr().thin_R().to_owned()
    };
    if b.ncols() != a.nrows() {
        return None;
    }
    let core = triangle(b) * triangle(a.t()).transpose();
    core.singular_values().ok().filter(|values| values.iter().all(|value| (value * value).is_finite()))
}
