//! Merging adapters into a base model, a tensor at a time. SPEC.md, section 7.

use super::checkpoint::{ADAPTER_FILE, Checkpoint};
use super::model::{Found, Model};
use super::module::{Module, has_norms, in_parallel};
use super::record::{BASE, Change, Changed, FORMAT, Record, hash_adapter, hexadecimal, write_record};
use super::rewrite::{Make, Output, Outputs, Staged, round, round_rows, write_model};
use crate::dtype::Dtype;
use crate::error::check_shape;
use crate::tensor_file::floating_point;
use crate::tensor_writer::Planned;
use crate::wora::ZeroNorm;
use crate::{Error, Result};
use ndarray::{Array1, ArrayD};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

/// How a model is merged.
#[derive(Clone, Copy, Debug, Default)]
pub struct MergeOptions {
    /// The type of every floating-point tensor; each its own where there is none.
    pub dtype: Option<Dtype>,
    /// What becomes of a unit without a direction.
    pub zero_norm: ZeroNorm,
    /// Whether what is changed is kept, to be restored to the bit.
    pub keep_base: bool,
}

/// What is going to be done to one tensor of the base.
pub(super) enum Plan {
    /// By the modules of one adapter or more.
    Weight(Vec<Module>),
    /// `s b_B` of one adapter or more.
    Bias(Vec<ArrayD<f64>>),
    /// The adapter, and the tensor's name in it.
    Replace(usize, String),
}

/// The plans of all adapters, by the names that tensors have in the merged model.
pub(super) fn plans(
    model: &Model,
    adapters: &[Checkpoint],
    zero_norm: ZeroNorm,
) -> Result<BTreeMap<String, (Plan, Option<Found>)>> {
    let mut plans = BTreeMap::<String, (Plan, Option<Found>)>::new();
    for (nth, adapter) in adapters.iter().enumerate() {
        let in_file = |error: Error| error.in_file(&adapter.directory().join(ADAPTER_FILE));
        for name in adapter.modules() {
            let module = Module::new(adapter, model, name, zero_norm).map_err(in_file)?;
            let tensor = match &module.found {
                Found::Itself(name) => name.clone(),
                Found::Tied(_) => module.weight.clone(),
            };
            let bias = adapter.lora_bias(name)?.map(|bias| bias * module.config.scaling);
            let units = if bias.is_some() { module.adapter.lora_b.shape()[0] } else { 0 };
            match plans.entry(tensor).or_insert_with(|| (Plan::Weight(vec![]), Some(module.found.clone()))) {
                (Plan::Weight(modules), _) => modules.push(module),
                (_, _) => return Err(in_file(twice(&format!("{name}.weight")))),
            }
            let Some(bias) = bias else { continue };
            let tensor = format!("{name}.bias");
            let found = model.find(&tensor).map_err(in_file)?;
            check_shape(&format!("{name}.lora_B.bias"), &[units], bias.shape()).map_err(in_file)?; // C1
            check_shape(found.name(), &[units], &model.tensor(found.name())?.1.shape).map_err(in_file)?; // C1
            match plans.entry(found.name().into()).or_insert_with(|| (Plan::Bias(vec![]), Some(found.clone()))) {
                (Plan::Bias(biases), _) => biases.push(bias),
                (_, _) => return Err(in_file(twice(&tensor))),
            }
        }
        for (tensor, name) in adapter.replaced() {
            let found = model.find(tensor).map_err(in_file)?;
            let (shape, theirs) =
                (&model.tensor(found.name())?.1.shape, &adapter.file().info(name).expect("its own").shape);
            check_shape(name, shape, theirs).map_err(in_file)?; // C1
            let plan = (Plan::Replace(nth, name.clone()), Some(found.clone()));
            if plans.insert(found.name().into(), plan).is_some() {
                return Err(in_file(twice(tensor)));
            }
        }
    }
    Ok(plans)
}

fn twice(tensor: &str) -> Error {
    let reason = "expected to be adapted or replaced, found both, or by two adapters".into();
    Error::Unexpected { tensor: tensor.into(), reason }
}

/// What is learned while tensors are written.
#[derive(Default)]
pub(super) struct Learned {
    changed: BTreeMap<String, Changed>,
    /// By module.
    norms: BTreeMap<String, Vec<f64>>,
    /// The base's own bytes.
    kept: BTreeMap<String, (Planned, Vec<u8>)>,
}

/// Merges adapters into a base, each against the base itself: `W0 + sum (W'_q - W0)`. E12, E79
///
/// `out` becomes a directory with the merged model and [`RECORD_FILE`](super::RECORD_FILE); `progress` hears how many bytes have been
/// written.
///
/// # Errors
///
/// Adapters that do not fit the base; a unit without a direction (C5); a result that the type does not hold (C2); an
/// `out` that has something in it or cannot be written. Nothing is left of what was written then.
pub fn merge(
    model: &Model,
    adapters: &[Checkpoint],
    options: MergeOptions,
    out: &Path,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<Changed>> {
    let plans = plans(model, adapters, options.zero_norm)?;
    let staged = Staged::new(out)?;
    let learned = Mutex::new(Learned::default());
    let outputs = merged_outputs(model, adapters, &plans, options, &learned)?;
    staged.copy_companions(model)?;
    write_model(model, &outputs, &staged, progress)?;
    drop(outputs);
    let Learned { changed, norms, kept } = learned.into_inner().expect("no thread has failed");
    let adapters = adapters.iter().map(hash_adapter).collect::<Result<Vec<_>>>()?;
    let record = Record { format: FORMAT, adapters, tensors: changed.values().cloned().collect() };
    write_record(&staged, out, &record, &norms, &kept)?;
    staged.finish()?;
    Ok(record.tensors)
}

/// How many bytes a merged model has.
pub fn merged_bytes(model: &Model, options: MergeOptions) -> u64 {
    let stored = |shard: &super::model::Shard| -> u64 {
        let of = |info: &safetensors::tensor::TensorInfo| planned("", info, options.dtype).bytes() as u64;
        shard.file.tensors().values().map(|info| of(info)).sum()
    };
    model.shards().iter().map(stored).sum()
}

/// A tensor in its own type, or floating-point ones in another.
pub(super) fn planned(name: &str, info: &safetensors::tensor::TensorInfo, dtype: Option<Dtype>) -> Planned {
    let dtype = dtype.filter(|_| Dtype::of(info.dtype).is_some()).map_or(info.dtype, Into::into);
    Planned { name: name.into(), dtype, shape: info.shape.clone() }
}

pub(super) fn merged_outputs<'a>(
    model: &'a Model,
    adapters: &'a [Checkpoint],
    plans: &'a BTreeMap<String, (Plan, Option<Found>)>,
    options: MergeOptions,
    learned: &'a Mutex<Learned>,
) -> Result<Outputs<'a>> {
    let mut outputs: Outputs<'a> = vec![];
    for (nth, shard) in model.shards().iter().enumerate() {
        let mut of_shard = vec![];
        for name in shard.file.in_order() {
            let planned = planned(&name, shard.file.info(&name).expect("a tensor of the file"), options.dtype);
            let make = match plans.get(&name) {
                None => Make::Base,
                Some((plan, found)) => {
                    let source = found.as_ref().map(|found| found.name().to_string());
                    changed(model, adapters, plan, planned.clone(), source, options.keep_base, learned)
                }
            };
            of_shard.push(Output { planned, make });
        }
        // A module that shares another's tensor gets its own.
        for (name, (plan, found)) in plans {
            let Some(Found::Tied(source)) = found else { continue };
            if model.place(source) == Some(nth) {
                let planned = planned(name, model.tensor(source)?.1, options.dtype);
                let make = changed(model, adapters, plan, planned.clone(), Some(source.clone()), false, learned);
                of_shard.push(Output { planned, make });
            }
        }
        outputs.push(of_shard);
    }
    Ok(outputs)
}

/// The bytes of a changed tensor.
fn changed<'a>(
    model: &'a Model,
    adapters: &'a [Checkpoint],
    plan: &'a Plan,
    planned: Planned,
    source: Option<String>,
    keep: bool,
    learned: &'a Mutex<Learned>,
) -> Make<'a> {
    Make::New(Box::new(move |sink| {
        let source = source.as_deref().unwrap_or(&planned.name);
        let at = model.tensor(source)?;
        let whole = 0..at.1.data_offsets.1 - at.1.data_offsets.0;
        let (mut of_base, mut of_merged) = (Sha256::new(), Sha256::new());
        let mut kept = Vec::new();
        let mut keep_base = |bytes: &[u8]| {
            of_base.update(bytes);
            if keep {
                kept.extend_from_slice(bytes);
            }
        };
        let mut write = |bytes: &[u8]| {
            of_merged.update(bytes);
            sink(bytes)
        };
        let dtype = floating_point(&planned.name, at.1).map(|dtype| Dtype::of(planned.dtype).unwrap_or(dtype));
        let (change, kind) = match plan {
            Plan::Weight(modules) => {
                let dtype = dtype?;
                let first = &modules[0];
                let columns = first.dim().1;
                let whole = modules.iter().any(|module| module.blocks().len() == 1);
                let all = 0..first.dim().0;
                let blocks = if whole { Vec::from([all]) } else { first.blocks() };
                let mut norms = vec![];
                let one = |rows: &Range<usize>| {
                    let (base, bytes) = first.read(rows, source, at)?;
                    let (mut merged, of_rows) = first.merge(rows, base.clone())?;
                    for other in &modules[1..] {
                        merged += &other.merge(rows, base.clone())?.0;
                        merged -= &base; // E79
                    }
                    let rounded = round_rows(&planned.name, dtype, merged.view(), rows.start * columns)?;
                    Ok((bytes, rounded, of_rows))
                };
                in_parallel(&blocks, one, |done: Vec<(Vec<u8>, Vec<u8>, _)>| {
                    let of_base = || done.iter().for_each(|(bytes, ..)| keep_base(bytes));
                    let (_, written) =
                        rayon::join(of_base, || done.iter().try_for_each(|(_, rounded, _)| write(rounded)));
                    norms.extend(done.into_iter().flat_map(|(.., of_rows)| of_rows.into_iter().flatten()));
                    written
                })?;
                if has_norms(first) && modules.len() == 1 {
                    learned.lock().expect("no thread has failed").norms.insert(first.name.clone(), norms);
                }
                (Change::Merged, Some(first.kind.name().to_string()))
            }
            Plan::Bias(biases) => {
                let bytes = at.0.bytes(source, at.1, whole)?;
                keep_base(&bytes);
                let base = Array1::from(floating_point(source, at.1)?.decode(&bytes));
                let sum = biases.iter().fold(base, |sum, bias| sum + bias.iter().copied().collect::<Array1<f64>>());
                write(&round(&planned.name, dtype?, sum.as_slice().expect("one axis"), 0)?)?;
                (Change::Bias, None)
            }
            Plan::Replace(adapter, name) => {
                keep_base(&at.0.bytes(source, at.1, whole)?);
                let file = adapters[*adapter].file();
                let info = file.info(name).expect("a tensor of the adapter");
                let bytes = file.bytes(name, info, 0..info.data_offsets.1 - info.data_offsets.0)?;
                if info.dtype == planned.dtype {
                    write(&bytes)?;
                } else {
                    write(&round(&planned.name, dtype?, &floating_point(name, info)?.decode(&bytes), 0)?)?;
                }
                (Change::Replaced, None)
            }
        };
        let is_itself = source == planned.name;
        let changed = Changed {
            tensor: planned.name.clone(),
            change,
            kind,
            base: (!is_itself).then(|| source.into()),
            base_sha256: is_itself.then(|| hexadecimal(of_base)),
            merged_sha256: hexadecimal(of_merged),
        };
        let mut learned = learned.lock().expect("no thread has failed");
        learned.changed.insert(planned.name.clone(), changed);
        if keep {
            let planned = Planned { name: format!("{BASE}{source}"), dtype: at.1.dtype, shape: at.1.shape.clone() };
            learned.kept.insert(source.into(), (planned, kept));
        }
        Ok(())
    }))
}
