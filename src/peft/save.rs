//! Layers from an adapter over a base, and adapters from layers.

use super::checkpoint::{ADAPTER_FILE, Checkpoint, LORA_NAMES, MAGNITUDE_OF_WORA, PREFIX};
use super::config::{AdapterConfig, CONFIG_FILE};
use super::model::Model;
use super::rewrite::Staged;
use crate::dtype::Dtype;
use crate::operators::Operator;
use crate::tensor_writer::{Planned, TensorWriter};
use crate::wora::{Adapter, Base, Config, Layer, SCALE_NAMES};
use crate::{Error, Result, Scalar};
use ndarray::{ArcArray, ArrayD, IxDyn};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// The layer of a module, ready to be trained or used. `settings` are the operator's, which an adapter does not say:
/// stride, padding, ...
///
/// # Errors
///
/// A module that the adapter does not have or a weight that the base does not have (C7); shapes that do not fit (C1).
pub fn load<O: Operator, T: Scalar>(
    checkpoint: &Checkpoint,
    model: &Model,
    module: &str,
    settings: O::Settings,
) -> Result<Layer<O, T>> {
    let cast = |values: ArrayD<f64>| values.mapv(T::from_f64);
    let read = |tensor: &str| -> Result<ArrayD<f64>> {
        let found = model.find(tensor)?;
        Ok(model.tensor(found.name())?.0.values(found.name())?.0)
    };
    let weight: ArcArray<T, IxDyn> = cast(read(&format!("{module}.weight"))?).into();
    // A layer without a bias has no such tensor.
    let bias = read(&format!("{module}.bias")).ok().map(cast);
    let operator = O::from_weight_shape(settings, weight.shape())?;
    let Adapter { lora_a, lora_b, magnitude, alpha, beta } = checkpoint.adapter(module)?;
    let adapter = Adapter {
        lora_a: cast(lora_a),
        lora_b: cast(lora_b),
        magnitude: magnitude.map(cast),
        alpha: alpha.map(cast),
        beta: beta.map(cast),
    };
    let config = Config::new(checkpoint.config().method(), checkpoint.config().scaling(module)?);
    Layer::new(operator, config, Base { weight, bias }, adapter)
}

/// Writes an adapter that PEFT loads: a directory with its configuration and its tensors, rounded to `dtype`.
///
/// `modules` are the learned tensors by the names that the modules have in the base model, and whether a module is an
/// embedding.
///
/// # Errors
///
/// A directory that has something in it or cannot be written.
pub fn save(
    directory: &Path,
    config: &AdapterConfig,
    modules: &BTreeMap<String, (Adapter<f64>, bool)>,
    dtype: Dtype,
) -> Result<()> {
    let [of_magnitude, ..] = SCALE_NAMES;
    let mut tensors = BTreeMap::new();
    for (module, (adapter, embedding)) in modules {
        let lora = LORA_NAMES[usize::from(!embedding)];
        for (name, values) in adapter.named(lora) {
            let wora = adapter.alpha.is_some() && name == of_magnitude;
            let name = if wora { MAGNITUDE_OF_WORA } else { name };
            tensors.insert(format!("{PREFIX}{module}.{name}"), values.as_standard_layout().into_owned());
        }
    }
    let planned: Vec<Planned> = tensors
        .iter()
        .map(|(name, values)| Planned { name: name.clone(), dtype: dtype.into(), shape: values.shape().to_vec() })
        .collect();
    let path = directory.join(ADAPTER_FILE);
    let failed = |error: std::io::Error| Error::io(&path, &error);
    let staged = Staged::new(directory)?;
    staged.write(ADAPTER_FILE, |file| {
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let mut writer = TensorWriter::new(file, &planned, &metadata).map_err(failed)?;
        for (name, values) in &tensors {
            let values = values.as_slice().expect("standard layout");
            writer.write(&super::rewrite::round(name, dtype, values, 0)?).map_err(failed)?;
        }
        writer.finish().map(drop).map_err(failed)
    })?;
    staged.write(CONFIG_FILE, |file| file.write_all(config.to_json().as_bytes()).map_err(failed))?;
    staged.finish()
}
