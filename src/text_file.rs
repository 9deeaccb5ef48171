//! Texts that somebody hands in: read as a whole, and no further than anybody writes.

use crate::{Error, Result};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// A configuration is at most so long, as the header of a safetensors file is.
pub(crate) const LONGEST_CONFIGURATION: u64 = 100_000_000;

/// Reads a file of at most so many bytes. One without an end, such as a device, is not read to it.
pub(crate) fn read_text(path: &Path, most: u64) -> Result<String> {
    let refuse = |message: String| Error::File { path: path.into(), message };
    let failed = |error: std::io::Error| Error::io(path, &error);
    let mut bytes = vec![];
    File::open(path).map_err(failed)?.take(most + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > most {
        return Err(refuse(format!("expected a text of at most {most} bytes, found more")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let byte = error.utf8_error().valid_up_to();
        refuse(format!("expected UTF-8, found something else at byte {byte}"))
    })
}
