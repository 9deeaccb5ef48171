//! The base of a merged model. SPEC.md, section 7.

use super::checkpoint::{ADAPTER_FILE, Checkpoint};
use super::merge::{Progress, planned};
use super::model::Model;
use super::module::{Module, has_norms, in_parallel};
use super::record::{BASE, Change, Changed, NORM, RECORD_FILE, Record, read_record};
use super::rewrite::{Make, Output, Outputs, Sink, Staged, round, round_rows, write_model};
use crate::digest::{hexadecimal, sha256};
use crate::dtype::Dtype;
use crate::tensor_file::{TensorFile, floating_point};
use crate::tensor_writer::Planned;
use crate::wora::ZeroNorm;
use crate::{Error, Result};
use ndarray::Array1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Restores the base of a merged model: to the bit where it was kept, and by E37 elsewhere.
///
/// # Errors
///
/// A directory without its record, or whose tensors, norms or adapter are not those of the merge; W' that does not hold W0
/// any more (C6), unless the base was kept; several adapters, unless the base was kept.
pub fn unmerge(merged: &Path, adapter: &Checkpoint, out: &Path, progress: &Progress<'_>) -> Result<Vec<Changed>> {
    let model = Model::open(merged)?;
    let path = merged.join(RECORD_FILE);
    let file = TensorFile::open(&path)?;
    let record = read_record(&file).map_err(|error| error.in_file(&path))?;
    let refuse = |message: String| Error::File { path: path.clone(), message };
    if !record.adapters.contains(&adapter.hashes()?) {
        let found = adapter.directory().display();
        return Err(refuse(format!("expected an adapter that was merged, found another in {found}")));
    }
    let kept = |changed: &Changed| file.info(&format!("{BASE}{}", changed.tensor)).is_some();
    let is_kept = record.tensors.iter().filter(|changed| changed.base_sha256.is_some()).all(kept);
    if record.adapters.len() > 1 && !is_kept {
        let count = record.adapters.len();
        return Err(refuse(format!(
            "expected one adapter, or a merge with --keep-base, found {count} adapters merged"
        )));
    }
    let back = Back { model: &model, file: &file, record: &path, adapter };
    back.check(&record).map_err(|error| error.in_file(&path))?;
    let staged = Staged::new(out)?;
    let by_name: BTreeMap<&str, &Changed> =
        record.tensors.iter().map(|changed| (changed.tensor.as_str(), changed)).collect();
    let mut outputs: Outputs<'_> = vec![];
    for shard in model.shards() {
        let mut of_shard = vec![];
        for name in shard.file.in_order() {
            let info = shard.file.info(&name).expect("a tensor of the file");
            match by_name.get(name.as_str()) {
                None => of_shard.push(Output { planned: planned(&name, info, None), make: Make::Base }),
                // It shared another's tensor, which is there.
                Some(changed) if changed.base_sha256.is_none() => {}
                Some(&changed) => {
                    let info = file.info(&format!("{BASE}{name}")).unwrap_or(info);
                    let planned = planned(&name, info, None);
                    let (back, of) = (&back, planned.clone());
                    of_shard.push(Output {
                        planned,
                        make: Make::New(Box::new(move |sink| {
                            let written = back.write(changed, &of, sink);
                            written.map_err(|error| error.in_file(back.model.path_of(&of.name)))
                        })),
                    });
                }
            }
        }
        outputs.push(of_shard);
    }
    let separated = record.tensors.iter().any(|changed| changed.shared_with.is_some());
    staged.copy_companions(&model, separated.then_some(true))?;
    write_model(&model, &outputs, &staged, progress)?;
    staged.finish()?;
    drop(outputs);
    Ok(record.tensors)
}

/// What tensors are restored of.
struct Back<'a> {
    model: &'a Model,
    /// The record, and where it is.
    file: &'a TensorFile<'static>,
    record: &'a Path,
    adapter: &'a Checkpoint,
}

impl Back<'_> {
    /// Fails unless the record is about tensors of this model, and of every module of the adapter.
    fn check(&self, record: &Record) -> Result<()> {
        let missing =
            |tensor: &str, expected: &str| Error::Missing { tensor: tensor.into(), expected: expected.into() };
        for changed in &record.tensors {
            if self.model.place(&changed.tensor).is_none() {
                return Err(missing(&changed.tensor, "a tensor of the merged model"));
            }
        }
        let merged: Vec<&str> = record.tensors.iter().filter_map(|changed| changed.module.as_deref()).collect();
        match self.adapter.modules().find(|module| !merged.contains(module)) {
            None => Ok(()),
            Some(module) => Err(missing(module, "what became of the module")),
        }
    }

    fn write(&self, changed: &Changed, planned: &Planned, sink: &mut Sink<'_>) -> Result<()> {
        let name = planned.name.as_str();
        let (file, info) = self.model.tensor(name)?;
        let kept = format!("{BASE}{name}");
        let mut of_merged = Sha256::new();
        match (self.file.info(&kept), changed.change, &changed.module) {
            (Some(of_kept), ..) => {
                if of_kept.shape != info.shape {
                    let expected = format!("{:?}", info.shape);
                    return Err(Error::Shape { tensor: kept, expected, found: of_kept.shape.clone() });
                }
                let mut of_base = Sha256::new();
                let read = self.file.in_pieces(&kept, of_kept, |bytes, _| {
                    of_base.update(bytes);
                    sink(bytes)
                });
                read.map_err(|error| error.in_file(self.record))?;
                if Some(hexadecimal(of_base)) != changed.base_sha256 {
                    return Err(changed_since(&kept));
                }
                file.in_pieces(name, info, |bytes, _| {
                    of_merged.update(bytes);
                    Ok(())
                })?;
            }
            (None, Change::Merged, Some(module)) => self.write_weight(changed, module, name, sink, &mut of_merged)?,
            (None, Change::Bias, Some(module)) => {
                let bytes = file.all_bytes(name, info)?;
                of_merged.update(&bytes);
                let dtype = floating_point(name, info.dtype)?;
                let mut base = Array1::from(dtype.decode(&bytes));
                let bias = self.adapter.lora_bias(module)?.filter(|bias| bias.len() == base.len());
                let missing =
                    || Error::Missing { tensor: format!("{module}.lora_B.bias"), expected: "what was added".into() };
                base.scaled_add(-self.adapter.config().scaling(module)?, &bias.ok_or_else(missing)?.flatten());
                sink(&round(name, dtype, base.as_slice().expect("one axis"), 0)?)?;
            }
            _ => {
                let expected =
                    "its bytes in the record, which a merge with --keep-base has, as the adapter replaced it".into();
                return Err(Error::Missing { tensor: name.into(), expected });
            }
        }
        if hexadecimal(of_merged) != changed.merged_sha256 {
            return Err(changed_since(name));
        }
        Ok(())
    }

    /// E37
    fn write_weight(
        &self,
        changed: &Changed,
        module: &str,
        name: &str,
        sink: &mut Sink<'_>,
        of_merged: &mut Sha256,
    ) -> Result<()> {
        let module = Module::new(self.adapter, self.model, module, ZeroNorm::Zero)
            .map_err(|error| error.in_file(&self.adapter.directory().join(ADAPTER_FILE)))?;
        let at = self.model.tensor(name)?;
        let dtype = floating_point(name, at.1.dtype)?;
        let norm_name = format!("{}{NORM}", module.name);
        let norms = has_norms(&module).then(|| Ok(self.file.values(&norm_name)?.0.flatten().to_vec())).transpose();
        let norms: Option<Vec<f64>> = norms.map_err(|error: Error| error.in_file(self.record))?;
        let hash = norms.as_ref().map(|norms| sha256(Dtype::F64.encode(norms)));
        if hash != changed.norms_sha256 {
            return Err(changed_since(&norm_name));
        }
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
        })
    }
}

fn changed_since(tensor: &str) -> Error {
    let reason = "expected the bytes of the merge, found others: it has been changed since".into();
    Error::Unexpected { tensor: tensor.into(), reason }
}
