//! Merging adapters into a base model, and unmerging them, a tensor at a time. SPEC.md, section 7.

use super::checkpoint::{ADAPTER_FILE, Checkpoint};
use super::config::CONFIG_FILE;
use super::model::{Found, Model};
use super::module::{Module, has_norms};
use super::rewrite::{Make, Output, Outputs, Sink, Staged, round, round_rows, write_model};
use crate::dtype::Dtype;
use crate::error::check_shape;
use crate::tensor_file::{TensorFile, floating_point};
use crate::tensor_writer::{Planned, TensorWriter};
use crate::wora::ZeroNorm;
use crate::{Error, Result};
use ndarray::{Array1, ArrayD};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;

/// What it takes to undo a merge, beside the merged model.
pub const RECORD_FILE: &str = "wora_merge.safetensors";
const RECORD_KEY: &str = "wora_merge";
/// The newest record that is understood.
const FORMAT: u64 = 1;
/// In front of the bytes of the base's own tensors in the record.
const BASE: &str = "base.";
/// After a module's name, of its norms.
const NORM: &str = ".weight_norm";

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

/// What became of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Changed {
    /// Its name in the merged model.
    pub tensor: String,
    /// What was done to it.
    pub change: Change,
    /// Which layer it is of, where it is an adapted weight.
    pub kind: Option<String>,
    /// Where the base has it, if under another name.
    pub base: Option<String>,
    /// The SHA-256 of its bytes in the base; `None` where the base has no such tensor.
    pub base_sha256: Option<String>,
    /// The SHA-256 of its bytes in the merged model.
    pub merged_sha256: String,
}

/// What is done to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// An adapted weight.
    Merged,
    /// A bias to which that of B is added.
    Bias,
    /// The adapter has a tensor in its place.
    Replaced,
}

/// What `wora_merge.safetensors` says beside its tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format: u64,
    /// The SHA-256 of every adapter's weights and of its configuration.
    adapters: Vec<[String; 2]>,
    tensors: Vec<Changed>,
}

fn hexadecimal(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hash_file(path: &Path) -> Result<String> {
    let failed = |error: std::io::Error| Error::io(path, &error);
    let (mut file, mut digest) = (std::fs::File::open(path).map_err(failed)?, Sha256::new());
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hexadecimal(digest)),
            count => digest.update(&buffer[..count]),
        }
    }
}

fn hash_adapter(adapter: &Checkpoint) -> Result<[String; 2]> {
    let [weights, config] = [ADAPTER_FILE, CONFIG_FILE].map(|name| hash_file(&adapter.directory().join(name)));
    Ok([weights?, config?])
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
/// `out` becomes a directory with the merged model and [`RECORD_FILE`]; `progress` hears how many bytes have been
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
    progress: &dyn Fn(u64),
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
fn planned(name: &str, info: &safetensors::tensor::TensorInfo, dtype: Option<Dtype>) -> Planned {
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
                for rows in blocks {
                    let (base, bytes) = first.read(&rows, source, at)?;
                    keep_base(&bytes);
                    let (mut merged, of_rows) = first.merge(&rows, base.clone())?;
                    norms.extend(of_rows.into_iter().flatten());
                    for other in &modules[1..] {
                        merged += &other.merge(&rows, base.clone())?.0;
                        merged -= &base; // E79
                    }
                    write(&round_rows(&planned.name, dtype, merged.view(), rows.start * columns)?)?;
                }
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

fn write_record(
    staged: &Staged,
    out: &Path,
    record: &Record,
    norms: &BTreeMap<String, Vec<f64>>,
    kept: &BTreeMap<String, (Planned, Vec<u8>)>,
) -> Result<()> {
    let path = out.join(RECORD_FILE);
    let failed = |error: std::io::Error| Error::io(&path, &error);
    let of_norms = norms.iter().map(|(module, norms)| {
        let planned =
            Planned { name: format!("{module}{NORM}"), dtype: safetensors::Dtype::F64, shape: vec![norms.len()] };
        (planned, Dtype::F64.encode(norms))
    });
    let (planned, bytes): (Vec<_>, Vec<_>) = of_norms.chain(kept.values().cloned()).unzip();
    let metadata = BTreeMap::from([(RECORD_KEY.to_string(), serde_json::to_string(record).expect("plain data"))]);
    staged.write(RECORD_FILE, |file| {
        let mut writer = TensorWriter::new(file, &planned, &metadata).map_err(failed)?;
        bytes.iter().try_for_each(|bytes| writer.write(bytes)).map_err(failed)?;
        writer.finish().map(drop).map_err(failed)
    })
}

/// Restores the base of a merged model. E37
///
/// # Errors
///
/// A directory without its record, or whose tensors or adapter are not those of the merge; W' that does not hold W0 any
/// more (C6), unless the base was kept.
pub fn unmerge(merged: &Path, adapter: &Checkpoint, out: &Path, progress: &dyn Fn(u64)) -> Result<Vec<Changed>> {
    let model = Model::open(merged)?;
    let path = merged.join(RECORD_FILE);
    let file = TensorFile::open(&path)?;
    let record = read_record(&file).map_err(|error| error.in_file(&path))?;
    let hashes = hash_adapter(adapter)?;
    if record.adapters.first() != Some(&hashes) || record.adapters.len() > 1 && !is_kept(&file, &record) {
        let message = match record.adapters.len() {
            1 => format!("expected the adapter that was merged, found another in {}", adapter.directory().display()),
            count => format!("expected one adapter, or a merge with --keep-base, found {count} adapters merged"),
        };
        return Err(Error::File { path, message });
    }
    let mut modules = BTreeMap::new();
    for name in adapter.modules() {
        // A kept base needs no module; one that was tied has a tensor of its own now.
        let module = Module::new(adapter, &model, name, ZeroNorm::Zero)?;
        modules.insert(module.found.name().to_string(), module);
    }
    let staged = Staged::new(out)?;
    let by_name: BTreeMap<&str, &Changed> =
        record.tensors.iter().map(|changed| (changed.tensor.as_str(), changed)).collect();
    let mut outputs: Outputs<'_> = vec![];
    for shard in model.shards() {
        let mut of_shard = vec![];
        for name in shard.file.in_order() {
            let info = shard.file.info(&name).expect("a tensor of the file");
            let Some(changed) = by_name.get(name.as_str()) else {
                of_shard.push(Output { planned: planned(&name, info, None), make: Make::Base });
                continue;
            };
            if changed.base_sha256.is_none() {
                continue;
            }
            let kept = format!("{BASE}{name}");
            let planned = match file.info(&kept) {
                Some(info) => planned(&name, info, None),
                None => planned(&name, info, None),
            };
            let make = restored(&model, &file, changed, adapter, modules.get(&name), planned.clone());
            of_shard.push(Output { planned, make });
        }
        outputs.push(of_shard);
    }
    staged.copy_companions(&model)?;
    write_model(&model, &outputs, &staged, progress)?;
    drop(outputs);
    staged.finish()?;
    Ok(record.tensors)
}

fn is_kept(file: &TensorFile<'_>, record: &Record) -> bool {
    let own = record.tensors.iter().filter(|changed| changed.base_sha256.is_some());
    own.into_iter().all(|changed| file.info(&format!("{BASE}{}", changed.tensor)).is_some())
}

fn read_record(file: &TensorFile<'_>) -> Result<Record> {
    let field = |expected: String, found: String| Error::Setting { name: RECORD_KEY, expected, found };
    let json = file.metadata().and_then(|metadata| metadata.get(RECORD_KEY));
    let json = json.ok_or_else(|| field("a metadata key of this name".into(), "none".into()))?;
    let record: Record =
        serde_json::from_str(json).map_err(|error| field("a record of a merge".into(), error.to_string()))?;
    if record.format > FORMAT {
        return Err(field(format!("a format up to {FORMAT}"), format!("format {}", record.format)));
    }
    Ok(record)
}

/// The bytes of a tensor as the base had it.
fn restored<'a>(
    model: &'a Model,
    record: &'a TensorFile<'static>,
    changed: &'a Changed,
    adapter: &'a Checkpoint,
    module: Option<&'a Module>,
    planned: Planned,
) -> Make<'a> {
    Make::New(Box::new(move |sink: &mut Sink<'_>| {
        let name = planned.name.as_str();
        let kept = format!("{BASE}{name}");
        if let Some(info) = record.info(&kept) {
            return sink(&record.bytes(&kept, info, 0..info.data_offsets.1 - info.data_offsets.0)?);
        }
        let at = model.tensor(name)?;
        let whole = 0..at.1.data_offsets.1 - at.1.data_offsets.0;
        let dtype = floating_point(name, at.1)?;
        let mut of_merged = Sha256::new();
        match (changed.change, module) {
            (Change::Merged, Some(module)) => {
                let norm_name = format!("{}{NORM}", module.name);
                let norms = has_norms(module).then(|| Ok(record.values(&norm_name)?.0)).transpose();
                let norms = norms.map_err(|error: Error| error.in_file(Path::new(RECORD_FILE)))?;
                for rows in module.blocks() {
                    let (merged, bytes) = module.read(&rows, name, at)?;
                    of_merged.update(&bytes);
                    let range = module.norms(&rows);
                    let of_rows =
                        norms.as_ref().map(|norms| norms.iter().skip(range.start).take(range.len()).copied().collect());
                    let base = module.unmerge(&rows, merged, of_rows)?;
                    sink(&round_rows(name, dtype, base.view(), rows.start * module.dim().1)?)?;
                }
            }
            (Change::Bias, _) => {
                let bytes = at.0.bytes(name, at.1, whole)?;
                of_merged.update(&bytes);
                let mut base = Array1::from(dtype.decode(&bytes));
                let of_module = name.strip_suffix(".bias").unwrap_or(name);
                let bias = adapter.modules().find(|module| of_module.ends_with(module) || module.ends_with(of_module));
                let bias = bias
                    .map(|module| Ok((adapter.lora_bias(module)?, adapter.config().scaling(module)?)))
                    .transpose()?;
                if let Some((Some(bias), scaling)) = bias {
                    base.iter_mut().zip(&bias).for_each(|(base, bias)| *base -= scaling * bias);
                }
                sink(&round(name, dtype, base.as_slice().expect("one axis"), 0)?)?;
            }
            _ => {
                let expected =
                    "its bytes in the record, which a merge with --keep-base has, as the adapter replaced it".into();
                return Err(Error::Missing { tensor: name.into(), expected });
            }
        }
        if hexadecimal(of_merged) != changed.merged_sha256 {
            let reason = "expected the bytes that were merged, found others: it has been changed since".into();
            return Err(Error::Unexpected { tensor: name.into(), reason });
        }
        Ok(())
    }))
}
