//! A changed copy of a model, written to the side a tensor at a time and put in its place when it is whole.

use super::merge::Progress;
use super::model::{INDEX_FILE, MODEL_FILE, Model, Shard};
use crate::aside::{PREFIX, check_directory};
use crate::dtype::Dtype;
use crate::simd::{all_finite, magnitudes};
use crate::tensor_file::floating_point;
use crate::tensor_writer::{Planned, TensorWriter};
use crate::{Error, Result};
use ndarray::ArrayView2;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A model's configuration, and its field that has the output layer share the input embedding's weight.
const CONFIG_FILE: &str = "config.json";
const TIE: &str = "tie_word_embeddings";

/// What takes bytes on their way to a file.
pub(super) type Sink<'s> = dyn FnMut(&[u8]) -> Result<()> + Send + 's;

/// What hands the bytes of a tensor on, piece by piece.
pub(super) type Writes<'a> = dyn Fn(&mut Sink<'_>) -> Result<()> + Sync + 'a;

/// A tensor of the copy.
pub(super) struct Output<'a> {
    pub planned: Planned,
    pub make: Make<'a>,
}

/// What its bytes are made of.
pub(super) enum Make<'a> {
    /// Those of the base's tensor of the same name, in the same type or rounded to another.
    Base,
    /// Whatever this writes.
    New(Box<Writes<'a>>),
}

/// The outputs of every shard of a model.
pub(super) type Outputs<'a> = Vec<Vec<Output<'a>>>;

/// Fails if there is something where a directory is to be.
fn check_vacant(out: &Path) -> Result<()> {
    let refuse = |found: &dyn std::fmt::Display| {
        let message = format!("expected a directory that is empty or not there, found {found}");
        Error::File { path: out.into(), message }
    };
    if let Ok(mut entries) = std::fs::read_dir(out) {
        if let Some(entry) = entries.next() {
            return Err(refuse(&entry.map_err(|error| Error::io(out, &error))?.file_name().display()));
        }
    } else if out.symlink_metadata().is_ok() {
        return Err(refuse(&"a file"));
    }
    Ok(())
}

/// A directory that takes its name when everything is in it.
pub(super) struct Staged {
    aside: TempDir,
    out: PathBuf,
}

impl Staged {
    /// # Errors
    ///
    /// A directory that has something in it already, or that cannot be made.
    pub fn new(out: &Path) -> Result<Self> {
        check_vacant(out)?;
        let failed = |error: std::io::Error| Error::io(out, &error);
        check_directory(out)?;
        // The directory itself where it is reached by a link, and in full where it is this one.
        let out = std::fs::canonicalize(out).or_else(|_| std::path::absolute(out)).map_err(failed)?;
        // Aside is where there is something already, so that nothing else is made before all is well.
        let there = out.ancestors().skip(1).find(|ancestor| ancestor.is_dir()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let aside = builder.prefix(PREFIX).tempdir_in(there).map_err(|error| Error::io(there, &error.kind().into()))?;
        Ok(Self { aside, out })
    }

    /// What the directory is going to be called.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// A file without a name, gone when it is closed.
    pub fn scratch(&self) -> std::io::Result<File> {
        tempfile::tempfile_in(self.aside.path())
    }

    /// Writes a file.
    ///
    /// # Errors
    ///
    /// What cannot be written.
    pub fn write(&self, name: &str, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
        let path = self.out.join(name);
        let failed = |error: std::io::Error| Error::io(&path, &error);
        let mut file = BufWriter::new(File::create(self.aside.path().join(name)).map_err(failed)?);
        write(&mut file)?;
        file.flush().map_err(failed)
    }

    /// Copies what a model's directory has beside its weights: configurations and tokenizers. `tied` is what the model's
    /// configuration is to say of its embeddings, where it says otherwise.
    ///
    /// # Errors
    ///
    /// What cannot be read or written.
    pub fn copy_companions(&self, model: &Model, tied: Option<bool>) -> Result<()> {
        let Some(directory) = model.directory() else { return Ok(()) };
        let failed = |error: std::io::Error| Error::io(directory, &error);
        for entry in std::fs::read_dir(directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let kind = path.extension().map(|extension| extension.to_string_lossy().into_owned());
            let companion = matches!(kind.as_deref(), Some("json" | "txt" | "model" | "jinja" | "md"));
            if companion && path.is_file() && name != INDEX_FILE {
                let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, &error))?;
                let changed = tied.filter(|_| name == CONFIG_FILE).and_then(|tied| saying_tied(&bytes, tied));
                self.write_all(&name, changed.as_deref().unwrap_or(&bytes))?;
            }
        }
        Ok(())
    }

    /// Writes a file whose bytes are there.
    ///
    /// # Errors
    ///
    /// What cannot be written.
    pub fn write_all(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write(name, |file| file.write_all(bytes).map_err(|error| Error::io(&self.out.join(name), &error)))
    }

    /// Puts the directory in its place.
    ///
    /// # Errors
    ///
    /// A name that has been taken meanwhile.
    pub fn finish(self) -> Result<()> {
        let failed = |error: std::io::Error| Error::io(&self.out, &error);
        if let Some(parent) = self.out.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        // An empty directory of this name makes room, on Unix without a moment at which there is neither.
        if cfg!(not(unix)) && self.out.is_dir() {
            std::fs::remove_dir(&self.out).map_err(failed)?;
        }
        std::fs::rename(self.aside.path(), &self.out).or_else(|error| {
            check_vacant(&self.out)?;
            Err(failed(error))
        })?;
        // What was aside is there no more.
        let _ = self.aside.keep();
        Ok(())
    }
}

/// A model's configuration that says this of its embeddings; `None` where it says so already, or is none.
fn saying_tied(config: &[u8], tied: bool) -> Option<Vec<u8>> {
    let mut config: Map<String, Value> = serde_json::from_slice(config).ok()?;
    if config.insert(TIE.into(), tied.into()) == Some(tied.into()) {
        return None;
    }
    Some((serde_json::to_string_pretty(&config).expect("plain data") + "\n").into_bytes())
}

/// Writes the weights of a model: as many files as it has, of the same names, and their index.
pub(super) fn write_model(
    model: &Model,
    outputs: &Outputs<'_>,
    staged: &Staged,
    progress: &Progress<'_>,
) -> Result<()> {
    let name = |shard: &Shard| match model.index() {
        None => MODEL_FILE.into(),
        Some(_) => shard.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
    };
    let shards: Vec<_> = model.shards().iter().zip(outputs).collect();
    // Copying, hashing and writing are done by one thread a file.
    shards.par_iter().try_for_each(|(shard, outputs)| {
        let (name, metadata) = (name(shard), shard.file.metadata().into_iter().flatten());
        let metadata = metadata.map(|(key, value)| (key.clone(), value.clone())).collect();
        let path = staged.out.join(&name);
        staged.write(&name, |file| write_tensors(file, &path, model, outputs, &metadata, progress))
    })?;
    let all = shards.iter().flat_map(|(shard, outputs)| outputs.iter().map(|output| (&output.planned, name(shard))));
    let total: usize = all.clone().map(|(planned, _)| planned.bytes()).sum();
    let map: BTreeMap<_, _> = all.map(|(planned, shard)| (planned.name.clone(), shard)).collect();
    if let Some(index) = model.index() {
        let mut index = index.clone();
        let metadata = index.entry("metadata").or_insert_with(|| json!({}));
        if let Some(metadata) = metadata.as_object_mut() {
            metadata.insert("total_size".into(), total.into());
        }
        index.insert("weight_map".into(), json!(map));
        let text = serde_json::to_string_pretty(&index).expect("plain data") + "\n";
        staged.write_all(INDEX_FILE, text.as_bytes())?;
    }
    Ok(())
}

/// Writes one file; `path` is for what goes wrong.
pub(super) fn write_tensors(
    out: &mut (impl Write + Send),
    path: &Path,
    model: &Model,
    outputs: &[Output<'_>],
    metadata: &BTreeMap<String, String>,
    progress: &Progress<'_>,
) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(path, &error);
    let planned: Vec<Planned> = outputs.iter().map(|output| output.planned.clone()).collect();
    let mut writer = TensorWriter::new(out, &planned, metadata).map_err(failed)?;
    for Output { planned, make } in outputs {
        let mut sink = |bytes: &[u8]| {
            progress(bytes.len() as u64)?;
            writer.write(bytes).map_err(failed)
        };
        match make {
            Make::New(write) => write(&mut sink)?,
            Make::Base => {
                let (file, info) = model.tensor(&planned.name)?;
                file.in_pieces(&planned.name, info, |bytes, first| {
                    if info.dtype == planned.dtype {
                        return sink(bytes);
                    }
                    let values = floating_point(&planned.name, info.dtype)?.decode(bytes);
                    let dtype = Dtype::of(planned.dtype).expect("a type to round to");
                    sink(&round(&planned.name, dtype, &values, first)?)
                })
                .map_err(|error| error.in_file(model.path_of(&planned.name)))?;
            }
        }
    }
    writer.finish().map_err(failed)?;
    Ok(())
}

/// The bytes of numbers rounded to a type, `first` being the place of the first among the tensor's elements.
///
/// # Errors
///
/// A number that the type does not hold, or that is none (C2).
pub(super) fn round(name: &str, dtype: Dtype, values: &[f64], first: usize) -> Result<Vec<u8>> {
    let [_, most] = magnitudes(values);
    if !(all_finite(values) && dtype.round(most).is_finite()) {
        let at = values.iter().position(|&value| !dtype.round(value).is_finite()).expect("one that is not finite");
        let found = values[at];
        return Err(match found.is_finite() {
            false => Error::NotFinite { tensor: name.into(), index: vec![first + at], found },
            true => Error::Unexpected {
                tensor: name.into(),
                reason: format!("expected numbers that {dtype} holds, found {found:e} at element {}", first + at),
            },
        }); // C2
    }
    Ok(dtype.encode(values))
}

/// The same of a matrix in whatever order.
pub(super) fn round_rows(name: &str, dtype: Dtype, values: ArrayView2<'_, f64>, first: usize) -> Result<Vec<u8>> {
    let values = values.as_standard_layout();
    round(name, dtype, values.as_slice().expect("standard layout"), first)
}
