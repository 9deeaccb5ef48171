//! The base of a merged model. SPEC.md, section 7.

use super::checkpoint::Checkpoint;
use super::merge::planned;
use super::model::Model;
use super::module::{Module, has_norms, in_parallel};
use super::record::{BASE, Change, Changed, NORM, RECORD_FILE, hash_adapter, hexadecimal, is_kept, read_record};
use super::rewrite::{Make, Output, Outputs, Sink, Staged, round, round_rows, write_model};
use crate::tensor_file::{TensorFile, floating_point};
use crate::tensor_writer::Planned;
use crate::wora::ZeroNorm;
use crate::{Error, Result};
use ndarray::Array1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Restores the base of a merged model. E37
///
/// # Errors
///
/// A directory without its record, or whose tensors or adapter are not those of the merge; W' that does not hold W0 any
/// more (C6), unless the base was kept.
pub fn unmerge(
    merged: &Path,
    adapter: &Checkpoint,
    out: &Path,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<Changed>> {
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
                let one = |rows: &Range<usize>| {
                    let (merged, bytes) = module.read(rows, name, at)?;
                    let range = module.norms(rows);
                    let of_rows =
                        norms.as_ref().map(|norms| norms.iter().skip(range.start).take(range.len()).copied().collect());
                    let base = module.unmerge(rows, merged, of_rows)?;
                    Ok((bytes, round_rows(name, dtype, base.view(), rows.start * module.dim().1)?))
                };
                in_parallel(&module.blocks(), one, |done: Vec<(Vec<u8>, Vec<u8>)>| {
                    let hash = || done.iter().for_each(|(bytes, _)| of_merged.update(bytes));
                    rayon::join(hash, || done.iter().try_for_each(|(_, rounded)| sink(rounded))).1
                })?;
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
