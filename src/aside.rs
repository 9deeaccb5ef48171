//! Files that are written to the side and put in their place when they are whole: never half of one.
//!
//! ```
//! use std::io::Write;
//! let directory = tempfile::tempdir().unwrap();
//! let path = directory.path().join("page.html");
//! let mut aside = woracle::aside::Aside::of(&path)?;
//! aside.write_all(b"<p>").unwrap();
//! assert!(!path.exists());
//! aside.finish()?;
//! assert!(path.exists());
//! # Ok::<(), woracle::Error>(())
//! ```

use crate::{Error, Result};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// What every name begins with that is gone when a run is over; after a kill such a file or directory may stay, and is
/// nobody's.
pub(crate) const PREFIX: &str = ".wora-";

/// A file on its way. Dropped before it is finished, it leaves nothing behind and what was there as it was.
#[derive(Debug)]
pub struct Aside {
    path: PathBuf,
    file: BufWriter<NamedTempFile>,
}

impl Aside {
    /// One that is to stand at this path: whether it can is found out now, not when the work is done.
    ///
    /// # Errors
    ///
    /// A directory that is not there or cannot be written into; a path that is a directory's.
    pub fn of(path: &Path) -> Result<Self> {
        let complain = |path: &Path, message: &str| Error::File { path: path.into(), message: message.into() };
        let directory = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        if path.is_dir() {
            return Err(complain(path, "expected the path of a file to write, found a directory"));
        }
        if !directory.is_dir() {
            return Err(complain(
                path,
                &format!("expected a directory {} to write into, found none", directory.display()),
            ));
        }
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.prefix(PREFIX).tempfile_in(directory).map_err(|error| Error::io(path, &error))?;
        Ok(Self { path: path.into(), file: BufWriter::new(file) })
    }

    /// Puts it in its place.
    ///
    /// # Errors
    ///
    /// What cannot be written.
    pub fn finish(self) -> Result<()> {
        let Self { path, file } = self;
        let file = file.into_inner().map_err(|error| Error::io(&path, error.error()))?;
        file.persist(&path).map_err(|error| Error::io(&path, &error.error)).map(drop)
    }
}

impl Write for Aside {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Fails unless there is a directory at this path, or nothing in the way of one.
///
/// # Errors
///
/// A path that is a file's, or leads through a file.
pub fn check_directory(path: &Path) -> Result<()> {
    match path.ancestors().find(|part| part.symlink_metadata().is_ok()) {
        Some(part) if !part.is_dir() => {
            let message = "expected a directory to write into, found a file".into();
            Err(Error::File { path: part.into(), message })
        }
        _ => Ok(()),
    }
}

/// Takes a file away where there is one.
///
/// # Errors
///
/// One that cannot be taken away.
pub fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, &error)),
        _ => Ok(()),
    }
}

/// Writes a file that is either there as a whole or as it was before.
///
/// # Errors
///
/// As [`Aside::of`]; what cannot be written.
pub fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let mut aside = Aside::of(path)?;
    write(&mut aside).map_err(|error| Error::io(path, &error))?;
    aside.finish()
}
