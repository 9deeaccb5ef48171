//! Somebody's merged model against the oracle's: adapted weights as cases with one answer, which can be judged and
//! diagnosed as all others, and everything else of it.
//!
//! ```
//! use woracle::oracle::verify::{Tolerance, Verdict, verify};
//! use woracle::peft::{Checkpoint, Model, compare};
//! # let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/text-dora");
//! let adapter = Checkpoint::open(&data.join("adapter"))?;
//! let base = Model::open(&data.join("model.safetensors"))?;
//! let merged = Model::open(&data.join("merged.safetensors"))?; // by PEFT's `merge_and_unload`
//! let verdicts = verify(&compare::case(&adapter, &base, &merged, "fc1")?, Tolerance::default())?;
//! assert_eq!((verdicts[0].name.as_str(), verdicts[0].verdict), ("merged_weight", Verdict::Pass));
//! assert!(compare::others(&adapter, &base, &merged)?.is_empty());
//! # Ok::<(), woracle::Error>(())
//! ```

use super::checkpoint::Checkpoint;
use super::merge::{planned, plans};
use super::model::Model;
use super::module::{Kind, Module};
use crate::case::{Case, Tensor};
use crate::dtype::Dtype;
use crate::error::check_shape;
use crate::operators::{Embedding, Linear, Operator};
use crate::oracle::CaseFile;
use crate::oracle::verify::SLACK;
use crate::wora::ZeroNorm;
use crate::{Error, Result};
use ndarray::{ArcArray, ArrayD, IxDyn};
use serde_json::{Map, json};
use std::collections::{BTreeMap, BTreeSet};

/// Fails where nothing can be judged: unless the adapter fits the base, and the merged model has what it changes.
///
/// # Errors
///
/// An adapter that cannot be merged into the base; a tensor that the merged model does not have (C7).
pub fn fit(checkpoint: &Checkpoint, base: &Model, merged: &Model) -> Result<()> {
    let tensors = checkpoint.tensors_of_base().collect::<Vec<_>>();
    plans(base, std::slice::from_ref(checkpoint), ZeroNorm::Zero)?;
    merged.naming(&tensors).map(drop).map_err(|error| match error {
        Error::Missing { tensor, .. } => {
            let expected = "a tensor of the merged model".into();
            Error::Missing { tensor, expected }.in_file(merged.path_of(""))
        }
        error => error.in_file(merged.path_of("")),
    })
}

/// An adapted weight of a merged model as a case whose answer is `merged_weight`.
///
/// # Errors
///
/// An adapter that does not fit the base, a merged model that lacks the weight or has another shape of it (C1, C7).
pub fn case(checkpoint: &Checkpoint, base: &Model, merged: &Model, module: &str) -> Result<CaseFile> {
    let about = Module::new(checkpoint, base, module, ZeroNorm::Zero)?;
    let (layer, lora) = match about.kind {
        Kind::Linear | Kind::LinearFanInFanOut => ("linear", Linear::LORA_NAMES),
        Kind::Embedding => ("embedding", Embedding::LORA_NAMES),
        Kind::Conv1d => ("conv1d", Linear::LORA_NAMES),
        Kind::Conv2d => ("conv2d", Linear::LORA_NAMES),
        Kind::Conv3d => ("conv3d", Linear::LORA_NAMES),
    };
    let weight = match checkpoint.replaced().get(&about.weight) {
        Some(name) => checkpoint.file().values(name)?.0,
        None => base.tensor(about.found.name())?.0.values(about.found.name())?.0,
    };
    let found = merged.naming(&checkpoint.tensors_of_base().collect::<Vec<_>>())?.find(&about.weight)?;
    let (file, info) = merged.tensor(found.name())?;
    let theirs = check_shape(found.name(), &about.shape, &info.shape).and_then(|()| file.values(found.name())); // C1
    let (theirs, dtype) = theirs.map_err(|error| error.in_file(merged.path_of(found.name())))?;
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut put = |name: &str, values: ArrayD<f64>| tensors.insert(name.into(), Tensor::Float(values.into()));
    for (name, values) in checkpoint.adapter(module)?.named(lora) {
        put(name, values.as_standard_layout().into_owned());
    }
    put("base.weight", weight);
    put("merged_weight", theirs);
    // Any input will do: only the weight is asked for.
    let x = match about.kind {
        Kind::Embedding => Tensor::Int(ArrayD::zeros(IxDyn(&[1]))),
        Kind::LinearFanInFanOut => Tensor::Float(ArcArray::zeros(IxDyn(&[1, about.shape[0]]))),
        _ => Tensor::Float(ArcArray::zeros(IxDyn(&[&[1], &about.shape[1..]].concat()))),
    };
    tensors.insert("x".into(), x);
    let mut settings = Map::from_iter([
        ("scaling".to_string(), json!(about.config.scaling)),
        ("method".into(), json!(about.config.method)),
        ("zero_norm".into(), json!(ZeroNorm::Zero)),
    ]);
    if about.kind == Kind::LinearFanInFanOut {
        settings.insert("fan_in_fan_out".into(), json!(true));
    }
    let mut file = CaseFile::new(Case { name: module.into(), layer: layer.into(), settings, tensors }, Dtype::F64);
    file.dtypes.insert("merged_weight".into(), dtype);
    Ok(file)
}

/// What is wrong with the tensors of a merged model that are no adapted weights, a line each by name: those that no
/// adapter touches must be the base's, replaced ones the adapter's, biases the sums that they are, and there may be no
/// others.
///
/// # Errors
///
/// What cannot be read.
pub fn others(checkpoint: &Checkpoint, base: &Model, merged: &Model) -> Result<BTreeMap<String, String>> {
    let plans = plans(base, std::slice::from_ref(checkpoint), ZeroNorm::Zero)?;
    let names: BTreeSet<String> = base.shards().iter().flat_map(|shard| shard.file.in_order()).collect();
    let all: Vec<String> = names.iter().chain(plans.keys()).cloned().collect();
    let present: Vec<String> = all.iter().filter(|name| merged.place(name).is_some()).cloned().collect();
    let naming = merged.naming(if present.is_empty() { &all } else { &present })?;
    let (mut lines, mut known) = (BTreeMap::new(), BTreeSet::new());
    for name in all.iter().collect::<BTreeSet<_>>() {
        let Ok(found) = naming.find(name) else {
            lines.insert(name.clone(), "expected, found none".to_string());
            continue;
        };
        known.insert(found.name().to_string());
        let plan = plans.get(name);
        if plan.is_some_and(|plan| !plan.modules.is_empty()) {
            continue;
        }
        let (file, info) = match checkpoint.replaced().iter().find(|(tensor, _)| *tensor == name) {
            Some((_, theirs)) => {
                (checkpoint.file(), planned(theirs, checkpoint.file().info(theirs).expect("its own"), None))
            }
            None => (base.tensor(name)?.0, planned(name, base.tensor(name)?.1, None)),
        };
        let theirs = merged.tensor(found.name())?;
        if info.shape != theirs.1.shape {
            lines.insert(name.clone(), format!("expected shape {:?}, found {:?}", info.shape, theirs.1.shape));
            continue;
        }
        let is_float = Dtype::of(info.dtype).is_some() && Dtype::of(theirs.1.dtype).is_some();
        let same = if is_float {
            let (ours, _) = file.values(&info.name)?;
            let (actual, dtype) = theirs.0.values(found.name())?;
            let added = plan.and_then(|plan| plan.biases.first());
            let unit = SLACK * dtype.unit_roundoff().max(Dtype::F32.unit_roundoff());
            ours.indexed_iter().all(|(at, &ours)| match added.map(|added| added[&at]) {
                None => actual[&at].to_bits() == dtype.round(ours).to_bits(),
                Some(added) => (actual[&at] - (ours + added)).abs() <= unit * (ours.abs() + added.abs()),
            })
        } else {
            let ours = file.all_bytes(&info.name, file.info(&info.name).expect("a tensor of the file"))?;
            info.dtype == theirs.1.dtype && ours == theirs.0.all_bytes(found.name(), theirs.1)?
        };
        if !same {
            let what = plan.map_or("the base's numbers", |plan| match plan.biases.is_empty() {
                true => "the adapter's numbers",
                false => "the base's and s times the adapter's",
            });
            lines.insert(name.clone(), format!("expected {what}, found others"));
        }
    }
    for name in merged.shards().iter().flat_map(|shard| shard.file.in_order()).filter(|name| !known.contains(name)) {
        lines.insert(name, "expected none of this name, found one".into());
    }
    Ok(lines)
}
