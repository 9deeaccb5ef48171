//! Merging adapters into a base model, a tensor at a time. SPEC.md, section 7.

use super::checkpoint::{ADAPTER_FILE, Checkpoint};
use super::model::{Found, Model, Naming};
use super::module::{Module, has_norms, in_parallel};
use super::record::{Change, Changed, FORMAT, Kept, RECORD_FILE, Record, write_record};
use super::rewrite::{Make, Output, Outputs, Sink, Staged, round, round_rows, write_model};
use crate::digest::{hexadecimal, sha256};
use crate::dtype::Dtype;
use crate::error::{check_finite, check_shape};
use crate::tensor_file::{TensorFile, floating_point};
use crate::tensor_writer::Planned;
use crate::wora::ZeroNorm;
use crate::{Error, Result};
use ndarray::{ArrayD, ArrayView1};
use safetensors::tensor::TensorInfo;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// How a model is merged.
///
/// ```
/// use woracle::oracle::Dtype;
/// use woracle::peft::{self, Change, Checkpoint, MergeOptions, Model};
/// # let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/linear-wora-pr2872");
/// # let directory = tempfile::tempdir().expect("a temporary directory");
/// let adapters = [Checkpoint::open(&data.join("adapter"))?];
/// let base = Model::open(&data.join("model.safetensors"))?;
/// assert!(peft::warnings(&base, &adapters)?.is_empty());
/// let options = MergeOptions { dtype: Some(Dtype::Bf16), keep_base: true, ..Default::default() };
/// let (out, back) = (directory.path().join("merged"), directory.path().join("base"));
/// let changed = peft::merge(&base, &adapters, options, &out, &|_bytes| Ok(()))?;
/// let fc1 = changed.iter().find(|changed| changed.tensor == "fc1.weight").unwrap();
/// assert_eq!(fc1.change, Change::Merged);
/// assert!(out.join(peft::RECORD_FILE).exists()); // what it takes to go back
///
/// peft::unmerge(&out, &adapters[0], &back, &|_| Ok(()))?;
/// let weight = |model: &Model| Ok::<_, woracle::Error>(model.tensor("fc1.weight")?.0.values("fc1.weight")?.0);
/// assert_eq!(weight(&Model::open(&back)?)?, weight(&base)?); // to the bit, as it was kept
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct MergeOptions {
    /// The type of every floating-point tensor; each its own where there is none.
    pub dtype: Option<Dtype>,
    /// What becomes of a unit without a direction.
    pub zero_norm: ZeroNorm,
    /// Whether what is changed is kept, to be restored to the bit.
    pub keep_base: bool,
}

/// What hears how many bytes have been written, and may say that it is enough.
pub type Progress<'p> = dyn Fn(u64) -> Result<()> + Sync + 'p;

/// What is going to be done to one tensor: it is replaced, then adapted, then added to, or any of these.
pub(super) struct Plan {
    found: Found,
    /// The tensor's name in an adapter, which has it in the base's place.
    replaced: Option<(usize, String)>,
    /// As many as adapt it.
    pub modules: Vec<Module>,
    /// `s b_B` of as many as add to it.
    pub biases: Vec<ArrayD<f64>>,
    /// The module that it is of, where it is of one.
    module: Option<String>,
}

impl Plan {
    fn new(found: Found) -> Self {
        Self { found, replaced: None, modules: vec![], biases: vec![], module: None }
    }

    /// Where its values are before they are adapted.
    fn source<'a>(&'a self, model: &'a Model, adapters: &'a [Checkpoint]) -> Result<Source<'a>> {
        let (name, path, (file, info)) = match &self.replaced {
            None => (self.found.name(), model.path_of(self.found.name()).into(), model.tensor(self.found.name())?),
            Some((adapter, name)) => {
                let file = adapters[*adapter].file();
                let path = adapters[*adapter].directory().join(ADAPTER_FILE);
                (name.as_str(), path, (file, file.info(name).expect("a tensor of the adapter")))
            }
        };
        Ok(Source { name, path, file, info })
    }

    fn change(&self) -> Change {
        match (&self.replaced, self.modules.is_empty(), self.biases.is_empty()) {
            (_, false, _) => Change::Merged,
            (_, _, false) => Change::Bias,
            (Some(_), ..) => Change::Replaced,
            (None, ..) => Change::Rounded,
        }
    }
}

/// A tensor of some file.
struct Source<'a> {
    name: &'a str,
    /// For what goes wrong.
    path: PathBuf,
    file: &'a TensorFile<'static>,
    info: &'a TensorInfo,
}

/// The plans of all adapters, by the names that tensors have in the merged model.
pub(super) type Plans = BTreeMap<String, Plan>;

pub(super) fn plans(model: &Model, adapters: &[Checkpoint], zero_norm: ZeroNorm) -> Result<Plans> {
    let mut plans = Plans::new();
    for (nth, adapter) in adapters.iter().enumerate() {
        add_plans(&mut plans, model, nth, adapter, zero_norm)
            .map_err(|error| error.in_file(&adapter.directory().join(ADAPTER_FILE)))?;
    }
    Ok(plans)
}

fn add_plans(plans: &mut Plans, model: &Model, nth: usize, adapter: &Checkpoint, zero_norm: ZeroNorm) -> Result<()> {
    let naming = model.naming(&adapter.tensors_of_base().collect::<Vec<_>>())?;
    let mut of_this = Plans::new();
    for (tensor, name) in adapter.replaced() {
        let plan = plan(&mut of_this, &naming, tensor)?;
        let (shape, theirs) = (&model.tensor(plan.found.name())?.1.shape, adapter.file().info(name).expect("its own"));
        check_shape(name, shape, &theirs.shape)?; // C1
        if Dtype::of(theirs.dtype).is_some() {
            check_finite(name, adapter.file().values(name)?.0.view())?; // C2
        }
        plan.replaced = Some((nth, name.clone()));
    }
    for name in adapter.modules() {
        let module = Module::of_naming(adapter, model, &naming, name, zero_norm)?;
        let units = module.adapter.lora_b.shape()[0];
        let bias = adapter.lora_bias(name)?.map(|bias| bias * module.config.scaling);
        let of_weight = plan(&mut of_this, &naming, &module.weight)?;
        if let Some(other) = &of_weight.module {
            let reason = format!("expected a weight of its own, found that of {other}");
            return Err(Error::Unexpected { tensor: format!("{name}.weight"), reason });
        }
        (of_weight.module, of_weight.modules) = (Some(name.into()), vec![module]);
        let Some(bias) = bias else { continue };
        let of_bias = plan(&mut of_this, &naming, &format!("{name}.bias"))?;
        check_shape(&format!("{name}.lora_B.bias"), &[units], bias.shape())?; // C1
        check_shape(of_bias.found.name(), &[units], &model.tensor(of_bias.found.name())?.1.shape)?; // C1
        (of_bias.module, of_bias.biases) = (Some(name.into()), vec![bias]);
    }
    for (tensor, theirs) in of_this {
        let Some(ours) = plans.get_mut(&tensor) else {
            plans.insert(tensor, theirs);
            continue;
        };
        if theirs.replaced.is_some() || ours.replaced.is_some() {
            let reason = "expected one adapter to replace it and no other to change it, found several".into();
            return Err(Error::Unexpected { tensor, reason });
        }
        ours.modules.extend(theirs.modules);
        ours.biases.extend(theirs.biases);
    }
    Ok(())
}

/// The plan of a tensor, which is made where there is none.
fn plan<'p>(plans: &'p mut Plans, naming: &Naming<'_>, tensor: &str) -> Result<&'p mut Plan> {
    let found = naming.find(tensor)?;
    Ok(plans.entry(found.own_name().into()).or_insert_with(|| Plan::new(found)))
}

/// What is worth saying of a merge before it is made: a line each.
///
/// # Errors
///
/// As [`merge`].
pub fn warnings(model: &Model, adapters: &[Checkpoint]) -> Result<Vec<String>> {
    let mut shared = BTreeSet::new();
    for adapter in adapters {
        let tensors = adapter.tensors_of_base().collect::<Vec<_>>();
        let naming = model.naming(&tensors).map_err(|error| error.in_file(&adapter.directory().join(ADAPTER_FILE)))?;
        let names = tensors.iter().filter_map(|tensor| Some(naming.find(tensor).ok()?.own_name().to_string()));
        shared.extend(names.filter(|name| naming.shared_with(name)));
    }
    let line = |name| format!("{name}: where the model shares it between its first and its last module, both change");
    Ok(shared.into_iter().map(line).collect())
}

/// What is learned while tensors are written.
#[derive(Default)]
pub(super) struct Learned {
    pub changed: BTreeMap<String, Changed>,
    /// By module.
    pub norms: BTreeMap<String, Vec<f64>>,
}

/// What tensors are made of.
pub(super) struct Work<'a> {
    pub model: &'a Model,
    pub adapters: &'a [Checkpoint],
    pub plans: &'a Plans,
    pub options: MergeOptions,
    pub learned: &'a Mutex<Learned>,
    /// Where the base's own bytes are kept; `None` where they are not.
    pub kept: Option<&'a Mutex<Kept>>,
}

/// Merges adapters into a base, each against the base itself: `W0 + sum (W'_q - W0)`. E12, E79
///
/// `out` becomes a directory with the merged model and [`RECORD_FILE`].
///
/// # Errors
///
/// Adapters that do not fit the base; a base that is itself a merge; a unit without a direction (C5); a result that the
/// type does not hold (C2); an `out` that has something in it or cannot be written. Nothing is left of what was written
/// then.
pub fn merge(
    model: &Model,
    adapters: &[Checkpoint],
    options: MergeOptions,
    out: &Path,
    progress: &Progress<'_>,
) -> Result<Vec<Changed>> {
    if let Some(record) =
        model.directory().map(|directory| directory.join(RECORD_FILE)).filter(|record| record.exists())
    {
        let message =
            "expected a base, found one that has been merged: unmerge it, or give all adapters at once".into();
        return Err(Error::File { path: record, message });
    }
    let hashes = adapters.iter().map(Checkpoint::hashes).collect::<Result<Vec<_>>>()?;
    if let Some(twice) = (1..hashes.len()).find(|&nth| hashes[..nth].contains(&hashes[nth])) {
        let message = "expected every adapter once, found it twice".into();
        return Err(Error::File { path: adapters[twice].directory().into(), message });
    }
    let plans = plans(model, adapters, options.zero_norm)?;
    let staged = Staged::new(out)?;
    let (learned, kept) = (Mutex::new(Learned::default()), Mutex::new(Kept::new(&staged)?));
    let work =
        Work { model, adapters, plans: &plans, options, learned: &learned, kept: options.keep_base.then_some(&kept) };
    let separates = plans.values().any(|plan| matches!(plan.found, Found::Tied { .. }));
    staged.copy_companions(model, separates.then_some(false))?;
    write_model(model, &work.outputs()?, &staged, progress)?;
    let Learned { changed, norms } = learned.into_inner().expect("no thread has failed");
    let record = Record { format: FORMAT, adapters: hashes, tensors: changed.into_values().collect() };
    write_record(&staged, out, &record, &norms, kept.into_inner().expect("no thread has failed"))?;
    staged.finish()?;
    Ok(record.tensors)
}

/// How many bytes a merged model has.
pub fn merged_bytes(model: &Model, options: MergeOptions) -> u64 {
    let infos = model.shards().iter().flat_map(|shard| shard.file.tensors().into_values());
    infos.map(|info| planned("", info, options.dtype).bytes() as u64).sum()
}

/// A tensor in its own type, or floating-point ones in another.
pub(super) fn planned(name: &str, info: &TensorInfo, dtype: Option<Dtype>) -> Planned {
    let dtype = dtype.filter(|_| Dtype::of(info.dtype).is_some()).map_or(info.dtype, Into::into);
    Planned { name: name.into(), dtype, shape: info.shape.clone() }
}

impl<'a> Work<'a> {
    /// Every tensor of every shard, in the order of the base; one that shares another's gets its own behind them.
    pub fn outputs(&self) -> Result<Outputs<'_>> {
        let mut outputs: Outputs<'_> = vec![];
        for (nth, shard) in self.model.shards().iter().enumerate() {
            let mut of_shard = vec![];
            for name in shard.file.in_order() {
                let info = shard.file.info(&name).expect("a tensor of the file");
                let planned = planned(&name, info, self.options.dtype);
                let is_rounded = planned.dtype != info.dtype && self.kept.is_some();
                let make = match self.plans.get(&name) {
                    Some(plan) => self.changed(plan, planned.clone()),
                    None if is_rounded => Make::New(Box::new({
                        let planned = planned.clone();
                        move |sink| self.write(&Plan::new(Found::Itself(planned.name.clone())), &planned, sink)
                    })),
                    None => Make::Base,
                };
                of_shard.push(Output { planned, make });
            }
            for (name, plan) in self.plans {
                if let Found::Tied { shared, .. } = &plan.found
                    && self.model.place(shared) == Some(nth)
                {
                    let planned = planned(name, self.model.tensor(shared)?.1, self.options.dtype);
                    of_shard.push(Output { planned: planned.clone(), make: self.changed(plan, planned) });
                }
            }
            outputs.push(of_shard);
        }
        Ok(outputs)
    }

    fn changed<'w>(&'w self, plan: &'w Plan, planned: Planned) -> Make<'w> {
        Make::New(Box::new(move |sink| self.write(plan, &planned, sink)))
    }

    /// Writes a changed tensor, and takes down what it takes to undo it.
    fn write(&self, plan: &Plan, planned: &Planned, sink: &mut Sink<'_>) -> Result<()> {
        let source = plan.source(self.model, self.adapters)?;
        let mut merged = Sha256::new();
        let mut write = |bytes: &[u8]| {
            merged.update(bytes);
            sink(bytes)
        };
        let write_new = || match (plan.modules.as_slice(), plan.biases.as_slice()) {
            ([], []) => self.write_values(&source, planned, &mut write),
            ([], biases) => self.write_bias(&source, planned, biases, &mut write),
            (modules, _) => self.write_weight(&source, planned, modules, &mut write),
        };
        let hash_base = || match &plan.found {
            Found::Tied { .. } => Ok(None),
            Found::Itself(name) => self.hash_base(name).map(Some),
        };
        let (norms, base) = rayon::join(write_new, hash_base);
        let (norms, base) = (norms.map_err(|error| error.in_file(&source.path))?, base?);
        let mut learned = self.learned.lock().expect("no thread has failed");
        let mut norms_sha256 = None;
        if let (Some(module), Some(norms)) = (&plan.module, norms) {
            norms_sha256 = Some(sha256(Dtype::F64.encode(&norms)));
            learned.norms.insert(module.clone(), norms);
        }
        let changed = Changed {
            tensor: planned.name.clone(),
            change: plan.change(),
            module: plan.module.clone(),
            kind: plan.modules.first().map(|module| module.kind.name().into()),
            shared_with: matches!(plan.found, Found::Tied { .. }).then(|| plan.found.name().into()),
            base_sha256: base,
            norms_sha256,
            merged_sha256: hexadecimal(merged),
        };
        learned.changed.insert(planned.name.clone(), changed);
        Ok(())
    }

    /// The hash of a tensor of the base, which is kept where asked for.
    fn hash_base(&self, name: &str) -> Result<String> {
        let ((file, info), mut digest) = (self.model.tensor(name)?, Sha256::new());
        let mut keep = self.kept.map(|kept| kept.lock().expect("no thread has failed"));
        if let Some(kept) = &mut keep {
            kept.begin(name, info);
        }
        file.in_pieces(name, info, |bytes, _| {
            digest.update(bytes);
            keep.as_mut().map_or(Ok(()), |kept| kept.write(bytes))
        })
        .map_err(|error| error.in_file(self.model.path_of(name)))?;
        Ok(hexadecimal(digest))
    }

    fn write_values(&self, source: &Source<'_>, planned: &Planned, write: &mut Sink<'_>) -> Result<Option<Vec<f64>>> {
        let Source { name, file, info, .. } = *source;
        file.in_pieces(name, info, |bytes, first| match info.dtype == planned.dtype {
            true => write(bytes),
            false => {
                let values = floating_point(name, info.dtype)?.decode(bytes);
                write(&round(&planned.name, floating_point(&planned.name, planned.dtype)?, &values, first)?)
            }
        })?;
        Ok(None)
    }

    fn write_bias(
        &self,
        source: &Source<'_>,
        planned: &Planned,
        biases: &[ArrayD<f64>],
        write: &mut Sink<'_>,
    ) -> Result<Option<Vec<f64>>> {
        let (mut sum, _) = source.file.values(source.name)?;
        biases.iter().for_each(|bias| sum += bias);
        let sum = sum.as_slice().expect("standard layout");
        write(&round(&planned.name, floating_point(&planned.name, planned.dtype)?, sum, 0)?)?;
        Ok(None)
    }

    /// Returns the norms of one adapter that has them.
    fn write_weight(
        &self,
        source: &Source<'_>,
        planned: &Planned,
        modules: &[Module],
        write: &mut Sink<'_>,
    ) -> Result<Option<Vec<f64>>> {
        let (first, dtype) = (&modules[0], floating_point(&planned.name, planned.dtype)?);
        let columns = first.dim().1;
        let read = |rows: &Range<usize>| Ok(first.read(rows, source.name, (source.file, source.info))?.0);
        let of_columns = modules.iter().map(|module| module.column_norms(read)).collect::<Result<Vec<_>>>()?;
        let one = |rows: &Range<usize>| {
            let base = read(rows)?;
            let (mut merged, norms) = first.merge(rows, base.clone(), of_columns[0].as_ref())?;
            for (other, of_columns) in modules[1..].iter().zip(&of_columns[1..]) {
                merged += &other.merge(rows, base.clone(), of_columns.as_ref())?.0;
                merged -= &base; // E79
            }
            Ok((round_rows(&planned.name, dtype, merged.view(), rows.start * columns)?, norms))
        };
        let mut norms = vec![0.0; first.adapter.lora_b.shape()[0]];
        let mut blocks = first.blocks().into_iter();
        in_parallel(&first.blocks(), one, |done| {
            for ((rounded, of_rows), rows) in done.iter().zip(&mut blocks) {
                let of_rows = of_rows.as_ref().map_or(ArrayView1::from(&[]), |norms| norms.view());
                norms[first.norms(&rows)].iter_mut().zip(of_rows).for_each(|(norm, of_rows)| *norm = *of_rows);
                write(rounded)?;
            }
            Ok(())
        })?;
        Ok(Some(norms).filter(|_| has_norms(first) && modules.len() == 1))
    }
}
