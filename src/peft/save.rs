//! Layers from an adapter over a base, and adapters from layers.

use super::checkpoint::{ADAPTER_FILE, Checkpoint, LORA_NAMES, MAGNITUDE_OF_WORA, PREFIX};
use super::config::{AdapterConfig, CONFIG_FILE};
use super::model::Model;
use super::rewrite::{Staged, round};
use crate::dtype::Dtype;
use crate::operators::Operator;
use crate::tensor_writer::{Planned, TensorWriter};
use crate::wora::{Adapter, Base, Config, Layer, SCALE_NAMES};
use crate::{Error, Result, Scalar};
use ndarray::{ArcArray, ArrayD, IxDyn};
use std::collections::BTreeMap;
use std::path::Path;

/// The layer of a module, ready to be trained or used. `settings` are the operator's, which an adapter does not say:
/// stride, padding, `fan_in_fan_out`, ...
///
/// # Errors
///
/// A module that the adapter does not have or a weight that the base does not have (C7); shapes that do not fit (C1); a
/// B with a bias, which no layer here has: it can be merged.
pub fn load<O: Operator, T: Scalar>(
    checkpoint: &Checkpoint,
    model: &Model,
    module: &str,
    settings: O::Settings,
) -> Result<Layer<O, T>> {
    if checkpoint.lora_bias(module)?.is_some() {
        let expected = "it off, as no layer has a bias of B; merge the adapter instead".into();
        return Err(Error::Setting { name: "lora_bias", expected, found: "it on".into() });
    }
    let names = checkpoint.tensors_of_base().collect::<Vec<_>>();
    let naming = model.naming(&names)?;
    let cast = |values: ArrayD<f64>| values.mapv(T::from_f64);
    // What the adapter has in the base's place comes first.
    let read = |tensor: &str| -> Result<ArrayD<f64>> {
        match checkpoint.replaced().get(tensor) {
            Some(name) => Ok(checkpoint.file().values(name)?.0),
            None => {
                let name = naming.find(tensor)?;
                Ok(model.tensor(name.name())?.0.values(name.name())?.0)
            }
        }
    };
    let weight: ArcArray<T, IxDyn> = cast(read(&format!("{module}.weight"))?).into();
    let bias = match read(&format!("{module}.bias")) {
        Err(Error::Missing { .. }) => None,
        bias => Some(cast(bias?)),
    };
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

/// Writes an adapter that PEFT loads: a directory with its configuration and its tensors, rounded to `dtype`. One that
/// has been read is written as it was by [`Checkpoint::write`].
///
/// `modules` are the learned tensors by the names that the modules have in the base model, and whether a module is an
/// embedding.
///
/// # Errors
///
/// A rank that is not the configuration's (C3), a configuration with a bias of B, a number that the type does not hold
/// (C2), a directory that has something in it or cannot be written.
///
/// ```
/// use ndarray::array;
/// use std::collections::BTreeMap;
/// use woracle::oracle::Dtype;
/// use woracle::peft::{AdapterConfig, Checkpoint, save};
/// use woracle::wora::{Adapter, Method};
/// # let directory = tempfile::tempdir().expect("a temporary directory");
/// let adapter = Adapter {
///     lora_a: array![[1.0, 2.0, 3.0]].into_dyn(), // [rank, in]
///     lora_b: array![[4.0], [5.0]].into_dyn(), // [out, rank]
///     magnitude: Some(array![6.0, 7.0].into_dyn()), // [out]
///     alpha: None,
///     beta: None,
/// };
/// let config = AdapterConfig::new(Method::Dora, 1, 2.0, &["fc"])?;
/// let modules = BTreeMap::from([("fc".to_string(), (adapter.clone(), false))]);
/// let out = directory.path().join("adapter");
/// save(&out, &config, &modules, Dtype::F32)?; // for `PeftModel.from_pretrained`
/// assert_eq!(Checkpoint::open(&out)?.adapter("fc")?, adapter);
/// # Ok::<(), woracle::Error>(())
/// ```
pub fn save(
    directory: &Path,
    config: &AdapterConfig,
    modules: &BTreeMap<String, (Adapter<f64>, bool)>,
    dtype: Dtype,
) -> Result<()> {
    if config.lora_bias() {
        return Err(Error::Setting { name: "lora_bias", expected: "it off".into(), found: "it on".into() });
    }
    let [of_magnitude, ..] = SCALE_NAMES;
    let mut tensors = BTreeMap::new();
    for (module, (adapter, embedding)) in modules {
        if adapter.rank() != config.rank(module) {
            let (tensor, expected) =
                (module.clone(), format!("[{}, ...] of A, the rank in {CONFIG_FILE}", config.rank(module)));
            return Err(Error::Shape { tensor, expected, found: adapter.lora_a.shape().to_vec() }); // C3
        }
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
    let bytes = tensors.iter().map(|(name, values)| round(name, dtype, values.as_slice().expect("standard layout"), 0));
    write_adapter(directory, config, &planned, bytes)
}

/// Writes an adapter's two files.
pub(super) fn write_adapter(
    directory: &Path,
    config: &AdapterConfig,
    planned: &[Planned],
    bytes: impl Iterator<Item = Result<Vec<u8>>>,
) -> Result<()> {
    let path = directory.join(ADAPTER_FILE);
    let failed = |error: std::io::Error| Error::io(&path, &error);
    let staged = Staged::new(directory)?;
    staged.write(ADAPTER_FILE, |file| {
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let mut writer = TensorWriter::new(file, planned, &metadata).map_err(failed)?;
        for bytes in bytes {
            writer.write(&bytes?).map_err(failed)?;
        }
        writer.finish().map(drop).map_err(failed)
    })?;
    staged.write_all(CONFIG_FILE, config.to_json().as_bytes())?;
    staged.finish()
}
