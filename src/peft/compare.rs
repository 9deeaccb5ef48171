//! Somebody's merged model against the oracle's, as cases with one answer, which can be judged and diagnosed as all others.

use super::checkpoint::Checkpoint;
use super::model::Model;
use super::module::{Kind, Module};
use crate::Result;
use crate::case::{Case, Tensor};
use crate::dtype::Dtype;
use crate::oracle::CaseFile;
use crate::tensor_file::floating_point;
use crate::wora::ZeroNorm;
use ndarray::{ArcArray, ArrayD, IxDyn};
use serde_json::{Map, json};
use std::collections::{BTreeMap, BTreeSet};

/// An adapted weight of a merged model as a case whose answer is `merged_weight`.
///
/// # Errors
///
/// An adapter that does not fit the base, a merged model that lacks the weight or has another shape of it (C1, C7).
pub fn case(checkpoint: &Checkpoint, base: &Model, merged: &Model, module: &str) -> Result<CaseFile> {
    let about = Module::new(checkpoint, base, module, ZeroNorm::Zero)?;
    let (layer, lora) = match about.kind {
        Kind::Linear | Kind::LinearFanInFanOut => ("linear", ["lora_A", "lora_B"]),
        Kind::Embedding => ("embedding", ["lora_embedding_A", "lora_embedding_B"]),
        Kind::Conv1d => ("conv1d", ["lora_A", "lora_B"]),
        Kind::Conv2d => ("conv2d", ["lora_A", "lora_B"]),
        Kind::Conv3d => ("conv3d", ["lora_A", "lora_B"]),
    };
    let read = |model: &Model, name: &str| -> Result<(ArrayD<f64>, Dtype)> {
        let found = model.find(name)?;
        model.tensor(found.name())?.0.values(found.name())
    };
    let (weight, _) = read(base, &about.weight)?;
    let (theirs, dtype) = read(merged, &about.weight)?;
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut put = |name: &str, values: ArrayD<f64>| tensors.insert(name.into(), Tensor::Float(values.into()));
    for (name, values) in checkpoint.adapter(module)?.named(lora) {
        put(name, values.as_standard_layout().into_owned());
    }
    // Any input will do: only the weight is asked for.
    let x = match about.kind {
        Kind::Embedding => Tensor::Int(ArrayD::zeros(IxDyn(&[1]))),
        Kind::LinearFanInFanOut => Tensor::Float(ArcArray::zeros(IxDyn(&[1, about.shape[0]]))),
        _ => Tensor::Float(ArcArray::zeros(IxDyn(&[&[1], &about.shape[1..]].concat()))),
    };
    put("base.weight", weight);
    put("merged_weight", theirs);
    tensors.insert("x".into(), x);
    let mut settings = Map::from_iter([
        ("scaling".to_string(), json!(about.config.scaling)),
        ("method".into(), json!(about.config.method)),
        ("zero_norm".into(), json!(ZeroNorm::Zero)),
    ]);
    if about.kind == Kind::LinearFanInFanOut {
        settings.insert("fan_in_fan_out".into(), json!(true));
    }
    let case = Case { name: module.into(), layer: layer.into(), settings, tensors };
    let mut file = CaseFile::new(case, Dtype::F64);
    file.dtypes.insert("merged_weight".into(), dtype);
    Ok(file)
}

/// Tensors that no adapter touches and that a merged model has otherwise than its base, which is rounded to the merged
/// model's type, or does not have at all: a line each, by name.
///
/// # Errors
///
/// What cannot be read.
pub fn changed_otherwise(checkpoint: &Checkpoint, base: &Model, merged: &Model) -> Result<BTreeMap<String, String>> {
    let mut touched = BTreeSet::new();
    for module in checkpoint.modules() {
        touched.insert(base.find(&format!("{module}.weight"))?.name().to_string());
        if checkpoint.lora_bias(module)?.is_some() {
            touched.insert(base.find(&format!("{module}.bias"))?.name().to_string());
        }
    }
    for tensor in checkpoint.replaced().keys() {
        touched.insert(base.find(tensor)?.name().to_string());
    }
    let mut lines = BTreeMap::new();
    for shard in base.shards() {
        for name in shard.file.in_order().into_iter().filter(|name| !touched.contains(name)) {
            let Ok(found) = merged.find(&name) else {
                lines.insert(name, "expected as in the base, found none".to_string());
                continue;
            };
            let (ours, theirs) = (base.tensor(&name)?, merged.tensor(found.name())?);
            if ours.1.shape != theirs.1.shape {
                let line = format!("expected shape {:?} as in the base, found {:?}", ours.1.shape, theirs.1.shape);
                lines.insert(name, line);
                continue;
            }
            let whole =
                |(file, info): (&crate::tensor_file::TensorFile<'static>, &safetensors::tensor::TensorInfo),
                 name: &str| { file.bytes(name, info, 0..info.data_offsets.1 - info.data_offsets.0) };
            let (mut expected, actual) = (whole(ours, &name)?, whole(theirs, found.name())?);
            if ours.1.dtype != theirs.1.dtype {
                let types = (floating_point(&name, ours.1), floating_point(found.name(), theirs.1));
                let (Ok(from), Ok(to)) = types else {
                    lines.insert(name, format!("expected {} as in the base, found {}", ours.1.dtype, theirs.1.dtype));
                    continue;
                };
                expected = to.encode(&from.decode(&expected));
            }
            if expected != actual {
                lines.insert(name, "expected as in the base, as no adapter touches it, found other numbers".into());
            }
        }
    }
    Ok(lines)
}
