//! What it takes to undo a merge, beside the merged model: norms, hashes, and where asked for what was changed.

use super::checkpoint::{ADAPTER_FILE, Checkpoint};
use super::config::CONFIG_FILE;
use super::rewrite::Staged;
use crate::dtype::Dtype;
use crate::tensor_file::TensorFile;
use crate::tensor_writer::{Planned, TensorWriter};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// What it takes to undo a merge, beside the merged model.
pub const RECORD_FILE: &str = "wora_merge.safetensors";
const RECORD_KEY: &str = "wora_merge";
/// The newest record that is understood.
pub(super) const FORMAT: u64 = 1;
/// In front of the bytes of the base's own tensors in the record.
pub(super) const BASE: &str = "base.";
/// After a module's name, of its norms.
pub(super) const NORM: &str = ".weight_norm";

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
pub(super) struct Record {
    pub format: u64,
    /// The SHA-256 of every adapter's weights and of its configuration.
    pub adapters: Vec<[String; 2]>,
    pub tensors: Vec<Changed>,
}

pub(super) fn hexadecimal(digest: Sha256) -> String {
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

pub(super) fn hash_adapter(adapter: &Checkpoint) -> Result<[String; 2]> {
    let [weights, config] = [ADAPTER_FILE, CONFIG_FILE].map(|name| hash_file(&adapter.directory().join(name)));
    Ok([weights?, config?])
}

/// Whether the base's own bytes of everything that was changed are there.
pub(super) fn is_kept(file: &TensorFile<'_>, record: &Record) -> bool {
    let own = record.tensors.iter().filter(|changed| changed.base_sha256.is_some());
    own.into_iter().all(|changed| file.info(&format!("{BASE}{}", changed.tensor)).is_some())
}

pub(super) fn read_record(file: &TensorFile<'_>) -> Result<Record> {
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

pub(super) fn write_record(
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
