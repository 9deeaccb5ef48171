//! What it takes to undo a merge, beside the merged model: norms, hashes, and where asked for what was changed.

use super::merge::planned;
use super::rewrite::Staged;
use crate::dtype::Dtype;
use crate::tensor_file::TensorFile;
use crate::tensor_writer::{Planned, TensorWriter};
use crate::{Error, Result};
use safetensors::tensor::TensorInfo;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

/// What it takes to undo a merge, beside the merged model.
pub const RECORD_FILE: &str = "wora_merge.safetensors";
const RECORD_KEY: &str = "wora_merge";
/// The newest record that is understood.
pub(super) const FORMAT: u64 = 1;
/// In front of the names of the base's own tensors in the record.
pub(super) const BASE: &str = "base.";
/// After a module's name, of its norms.
pub(super) const NORM: &str = ".weight_norm";
/// So many bytes are copied in one piece.
const PIECE: usize = 1 << 20;

/// What became of a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Changed {
    /// Its name in the merged model.
    pub tensor: String,
    /// What was done to it.
    pub change: Change,
    /// The adapter's module that it is of; of `None` nothing is adapted.
    pub module: Option<String>,
    /// Which layer it is of, where it is an adapted weight.
    pub kind: Option<String>,
    /// The base's tensor that it shared with another module, and does not any more.
    pub shared_with: Option<String>,
    /// The SHA-256 of its bytes in the base; `None` where the base has no such tensor.
    pub base_sha256: Option<String>,
    /// The SHA-256 of its norms in the record; `None` where there are none.
    pub norms_sha256: Option<String>,
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
    /// Nothing but that it is stored in another type.
    Rounded,
}

/// What `wora_merge.safetensors` says beside its tensors.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub format: u64,
    /// The SHA-256 of every adapter's weights and of its configuration.
    pub adapters: Vec<[String; 2]>,
    pub tensors: Vec<Changed>,
}

/// Everything that there is to be read, piece by piece.
fn in_pieces(from: &mut impl Read, path: &Path, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        match from.read(&mut buffer).map_err(|error| Error::io(path, &error))? {
            0 => return Ok(()),
            count => each(&buffer[..count])?,
        }
    }
}

/// The base's own tensors on their way to the record, whose header says more than is known before they are all there.
pub(super) struct Kept {
    file: File,
    tensors: Vec<Planned>,
    out: std::path::PathBuf,
}

impl Kept {
    /// # Errors
    ///
    /// A file that cannot be made.
    pub fn new(staged: &Staged) -> Result<Self> {
        let out = staged.out().join(RECORD_FILE);
        let file = staged.scratch().map_err(|error| Error::io(&out, &error))?;
        Ok(Self { file, tensors: vec![], out })
    }

    /// The bytes that follow are a tensor's.
    pub fn begin(&mut self, name: &str, info: &TensorInfo) {
        self.tensors.push(planned(&format!("{BASE}{name}"), info, None));
    }

    /// # Errors
    ///
    /// What cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::io(&self.out, &error))
    }
}

pub(super) fn write_record(
    staged: &Staged,
    out: &Path,
    record: &Record,
    norms: &BTreeMap<String, Vec<f64>>,
    mut kept: Kept,
) -> Result<()> {
    let path = out.join(RECORD_FILE);
    let failed = |error: std::io::Error| Error::io(&path, &error);
    let planned = norms.iter().map(|(module, norms)| Planned {
        name: format!("{module}{NORM}"),
        dtype: safetensors::Dtype::F64,
        shape: vec![norms.len()],
    });
    let planned: Vec<_> = planned.chain(kept.tensors).collect();
    let metadata = BTreeMap::from([(RECORD_KEY.to_string(), serde_json::to_string(record).expect("plain data"))]);
    kept.file.rewind().map_err(failed)?;
    staged.write(RECORD_FILE, |file| {
        let mut writer = TensorWriter::new(file, &planned, &metadata).map_err(failed)?;
        for norms in norms.values() {
            writer.write(&Dtype::F64.encode(norms)).map_err(failed)?;
        }
        in_pieces(&mut kept.file, &path, |bytes| writer.write(bytes).map_err(failed))?;
        writer.finish().map(drop).map_err(failed)
    })
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
