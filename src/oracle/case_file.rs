//! Case files: one safetensors file a case, its settings as JSON in the one metadata key `wora_case`.
//!
//! ```no_run
//! let case = woracle::oracle::case_file::read("linear-plain.safetensors".as_ref())?;
//! assert_eq!(case.layer, "linear");
//! # Ok::<(), woracle::Error>(())
//! ```

use crate::case::{Case, Tensor};
use crate::{Error, Result};
use ndarray::ArrayD;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The newest format that is understood. A newer one may mean something else by the same words.
pub const FORMAT: u64 = 1;
/// The metadata key that holds the settings.
pub const METADATA_KEY: &str = "wora_case";

/// The case files of a path: itself, or a directory's `*.safetensors` in order of name.
///
/// # Errors
///
/// A path that cannot be read, or a directory without a case file.
pub fn find(path: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error: std::io::Error| Error::File { path: path.into(), message: error.to_string() };
    if !std::fs::metadata(path).map_err(failed)?.is_dir() {
        return Ok(vec![path.into()]);
    }
    let entries = std::fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(failed)?;
    let mut files: Vec<PathBuf> = entries
        .into_iter()
        .map(|entry| entry.path())
        .filter(|file| file.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    files.sort();
    if files.is_empty() {
        let message = "expected at least one *.safetensors, found none".into();
        return Err(Error::File { path: path.into(), message });
    }
    Ok(files)
}

/// Reads one case.
///
/// # Errors
///
/// A file that is no safetensors file, holds a type of tensor that is not supported, or lacks the metadata;
/// each names the file, and the tensor or field where there is one.
pub fn read(path: &Path) -> Result<Case> {
    let bytes = std::fs::read(path).map_err(|error| Error::File { path: path.into(), message: error.to_string() })?;
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    parse(&bytes, &stem).map_err(|error| error.in_file(path))
}

/// A case from the bytes of its file. `stem` is its name where the metadata has none.
///
/// # Errors
///
/// As [`read`].
pub fn parse(bytes: &[u8], stem: &str) -> Result<Case> {
    let broken = |error: safetensors::SafeTensorError| Error::Unexpected {
        tensor: "safetensors".into(),
        reason: format!("expected a whole file, found {} bytes: {error}", bytes.len()),
    };
    let file = SafeTensors::deserialize(bytes).map_err(broken)?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let field = |expected: &str, found: &dyn std::fmt::Display| Error::Setting {
        name: METADATA_KEY,
        expected: expected.into(),
        found: found.to_string(),
    };
    let json = header.metadata().as_ref().and_then(|metadata| metadata.get(METADATA_KEY));
    let json = json.ok_or_else(|| field("a metadata key of this name", &"none"))?;
    let mut settings: Map<String, Value> =
        serde_json::from_str(json).map_err(|error| field("a JSON object", &error))?;

    match settings.remove("format") {
        Some(Value::Number(format)) if format.as_u64().is_some_and(|format| (1..=FORMAT).contains(&format)) => {}
        Some(format) => return Err(field(&format!("a format up to {FORMAT}"), &format!("format {format}"))),
        None => return Err(field("a field \"format\"", &"none")),
    }
    let mut text = |name: &str| match settings.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(field(&format!("text in the field {name:?}"), &other)),
    };
    let name = text("name")?.unwrap_or_else(|| stem.into());
    let layer = text("layer")?.ok_or_else(|| field("a field \"layer\"", &"none"))?;

    let tensors = file.tensors().into_iter().map(|(name, view)| Ok((name.clone(), tensor(&name, &view)?)));
    Ok(Case { name, layer, settings, tensors: tensors.collect::<Result<_>>()? })
}

fn tensor(name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    /// The elements, `N` bytes each.
    fn elements<const N: usize, E>(view: &TensorView<'_>, read: impl Fn([u8; N]) -> E) -> Option<ArrayD<E>> {
        let (chunks, _) = view.data().as_chunks::<N>();
        ArrayD::from_shape_vec(view.shape(), chunks.iter().copied().map(read).collect()).ok()
    }
    let ids = match view.dtype() {
        Dtype::F64 => {
            return elements(view, f64::from_le_bytes).map(Tensor::Float).ok_or_else(|| too_large(name, view));
        }
        Dtype::I64 => elements(view, i64::from_le_bytes),
        Dtype::I32 => elements(view, |bytes| i32::from_le_bytes(bytes).into()),
        Dtype::I16 => elements(view, |bytes| i16::from_le_bytes(bytes).into()),
        Dtype::I8 => elements(view, |bytes| i8::from_le_bytes(bytes).into()),
        Dtype::U32 => elements(view, |bytes| u32::from_le_bytes(bytes).into()),
        Dtype::U16 => elements(view, |bytes| u16::from_le_bytes(bytes).into()),
        Dtype::U8 => elements(view, |bytes| u8::from_le_bytes(bytes).into()),
        other => {
            let reason = format!("expected F64, or an integer type for ids, found {other:?}");
            return Err(Error::Unexpected { tensor: name.into(), reason });
        }
    };
    ids.map(Tensor::Int).ok_or_else(|| too_large(name, view))
}

fn too_large(name: &str, view: &TensorView<'_>) -> Error {
    Error::Shape { tensor: name.into(), expected: "one that fits in memory".into(), found: view.shape().to_vec() }
}
