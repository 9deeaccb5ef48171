//! Case files: one safetensors file a case, its settings as JSON in the one metadata key `wora_case`.
//! SPEC.md, section 11.
//!
//! ```
//! use woracle::{oracle::{CaseFile, Dtype, case_file}, registry};
//! let linear = registry::layer("linear")?;
//! let case = linear.draw(&linear.specs()[0], 0);
//! let bytes = CaseFile::new(case, Dtype::F32).to_bytes();
//! let file = case_file::parse(&bytes, "linear-plain")?;
//! assert_eq!((file.case.layer.as_str(), file.dtype("x")), ("linear", Dtype::F32));
//! # Ok::<(), woracle::Error>(())
//! ```

use super::Dtype;
use crate::case::{Case, Tensor};
use crate::tensor_file::TensorFile;
use crate::{Error, Result};
use ndarray::ArrayD;
use safetensors::tensor::{TensorInfo, TensorView};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// The newest format that is understood. A newer one may mean something else by the same words.
pub const FORMAT: u64 = 1;
/// The metadata key that holds the settings.
pub const METADATA_KEY: &str = "wora_case";

/// A case, and the types in which its file holds its numbers.
///
/// ```
/// use woracle::oracle::{CaseFile, Dtype, case_file};
/// use woracle::registry;
/// let linear = registry::layer("linear")?;
/// let case = linear.draw(&linear.specs()[0], 0);
/// let file = CaseFile::rounded(case.clone(), Dtype::Bf16);
/// assert_ne!(file.case, case); // 8 digits of 20
/// assert_eq!(case_file::parse(&file.to_bytes(), "")?.case, file.case); // which lose nothing more
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct CaseFile {
    /// The case, its numbers as stored, exactly.
    pub case: Case,
    /// The type of every floating-point tensor.
    pub dtypes: BTreeMap<String, Dtype>,
}

impl CaseFile {
    /// A case whose tensors are all stored in one type. Numbers that it does not hold are rounded when they are
    /// written, not here.
    pub fn new(case: Case, dtype: Dtype) -> Self {
        let floats = case.tensors.iter().filter(|(_, tensor)| matches!(tensor, Tensor::Float(_)));
        let dtypes = floats.map(|(name, _)| (name.clone(), dtype)).collect();
        Self { case, dtypes }
    }

    /// A case whose numbers are rounded to the one type that its tensors are stored in.
    pub fn rounded(mut case: Case, dtype: Dtype) -> Self {
        for tensor in case.tensors.values_mut() {
            if let Tensor::Float(values) = tensor {
                values.mapv_inplace(|value| dtype.round(value));
            }
        }
        Self::new(case, dtype)
    }

    /// The type of a tensor.
    pub fn dtype(&self, tensor: &str) -> Dtype {
        self.dtypes.get(tensor).copied().unwrap_or(Dtype::F64)
    }

    /// The file: the same bytes for the same case, everywhere.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Case { name, layer, settings, tensors } = &self.case;
        let mut fields = settings.clone();
        fields.extend([
            ("format".to_string(), json!(FORMAT)),
            ("name".to_string(), json!(name)),
            ("layer".to_string(), json!(layer)),
        ]);
        let metadata = HashMap::from([(METADATA_KEY.to_string(), Value::from(fields).to_string())]);
        let stored: Vec<_> = tensors
            .iter()
            .map(|(name, tensor)| {
                let (dtype, data): (safetensors::Dtype, Vec<u8>) = match tensor {
                    Tensor::Float(values) => {
                        let dtype = self.dtype(name);
                        let values = values.as_standard_layout();
                        (dtype.into(), dtype.encode(values.as_slice().expect("standard layout")))
                    }
                    Tensor::Int(ids) => (safetensors::Dtype::I64, ids.iter().flat_map(|id| id.to_le_bytes()).collect()),
                };
                (name, dtype, tensor.shape().to_vec(), data)
            })
            .collect();
        let views = stored.iter().map(|(name, dtype, shape, data)| {
            (name, TensorView::new(*dtype, shape.clone(), data).expect("as many bytes as the shape says"))
        });
        safetensors::serialize(views, Some(metadata)).expect("tensors of one file")
    }
}

/// The case files of a path: itself, or a directory's `*.safetensors` in order of name.
///
/// # Errors
///
/// A path that cannot be read, or a directory without a case file.
pub fn find(path: &Path) -> Result<Vec<PathBuf>> {
    let failed = |error: std::io::Error| Error::io(path, &error);
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
pub fn read(path: &Path) -> Result<CaseFile> {
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    from_tensors(&TensorFile::open(path)?, &stem).map_err(|error| error.in_file(path))
}

/// A case from the bytes of its file. `stem` is its name where the metadata has none.
///
/// # Errors
///
/// As [`read`].
pub fn parse(bytes: &[u8], stem: &str) -> Result<CaseFile> {
    from_tensors(&TensorFile::from_bytes(bytes)?, stem)
}

fn from_tensors(file: &TensorFile<'_>, stem: &str) -> Result<CaseFile> {
    let field = |expected: &str, found: &dyn std::fmt::Display| Error::Setting {
        name: METADATA_KEY,
        expected: expected.into(),
        found: found.to_string(),
    };
    let json = file.metadata().and_then(|metadata| metadata.get(METADATA_KEY));
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

    let (mut tensors, mut dtypes) = (BTreeMap::new(), BTreeMap::new());
    for (name, info) in file.tensors() {
        let (tensor, dtype) = tensor(file, &name, info)?;
        dtypes.extend(dtype.map(|dtype| (name.clone(), dtype)));
        tensors.insert(name, tensor);
    }
    Ok(CaseFile { case: Case { name, layer, settings, tensors }, dtypes })
}

/// A tensor, and its type where it is a floating-point one.
fn tensor(file: &TensorFile<'_>, name: &str, info: &TensorInfo) -> Result<(Tensor, Option<Dtype>)> {
    use safetensors::Dtype as Stored;
    let int = |ids: Result<ArrayD<i64>>| Ok((Tensor::Int(ids?), None));
    match info.dtype {
        Stored::F64 | Stored::F32 | Stored::BF16 | Stored::F16 => {
            let (values, dtype) = file.values(name)?;
            Ok((Tensor::Float(values.into()), Some(dtype)))
        }
        Stored::I64 => int(file.elements(name, info, i64::from_le_bytes)),
        Stored::I32 => int(file.elements(name, info, |bytes| i32::from_le_bytes(bytes).into())),
        Stored::I16 => int(file.elements(name, info, |bytes| i16::from_le_bytes(bytes).into())),
        Stored::I8 => int(file.elements(name, info, |bytes| i8::from_le_bytes(bytes).into())),
        Stored::U32 => int(file.elements(name, info, |bytes| u32::from_le_bytes(bytes).into())),
        Stored::U16 => int(file.elements(name, info, |bytes| u16::from_le_bytes(bytes).into())),
        Stored::U8 => int(file.elements(name, info, |bytes| u8::from_le_bytes(bytes).into())),
        other => {
            let reason = format!("expected F64, F32, BF16 or F16, or an integer type for ids, found {other:?}");
            Err(Error::Unexpected { tensor: name.into(), reason })
        }
    }
}
