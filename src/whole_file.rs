//! Files that are there as a whole or as they were before.

use crate::{Error, Result};
use std::io::{BufWriter, Write};
use std::path::Path;
use tempfile::NamedTempFile;

/// Writes a file to the side, and puts it in its place when it is whole.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(path, &error);
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let aside: NamedTempFile = builder.prefix(".wora-").tempfile_in(directory).map_err(failed)?;
    let mut buffered = BufWriter::new(aside);
    write(&mut buffered).map_err(failed)?;
    let aside = buffered.into_inner().map_err(|error| Error::io(path, error.error()))?;
    aside.persist(path).map_err(|error| Error::io(path, &error.error)).map(drop)
}
