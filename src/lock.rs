//! One run at a time in a directory.
//!
//! ```
//! use woracle::lock::Lock;
//! let directory = tempfile::tempdir().unwrap();
//! let lock = Lock::of(directory.path())?;
//! let other = Lock::of(directory.path()).err().unwrap().to_string();
//! assert!(other.ends_with("expected no other run in this directory, found one"), "{other}");
//! assert!(Lock::check_free(directory.path()).is_err());
//! drop(lock);
//! assert!(Lock::of(directory.path()).is_ok());
//! # Ok::<(), woracle::Error>(())
//! ```

use crate::aside::{PREFIX, check_directory};
use crate::{Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

/// Held as long as a run writes into a directory. The system lets go of it however the process ends; a file that a killed
/// one leaves hinders nobody. A directory that was made for it and is still empty in the end goes with it.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    /// The directories that were not there before, the innermost first.
    made: Vec<PathBuf>,
    /// What holds it, while it is open.
    _file: File,
}

impl Lock {
    /// Takes a directory, which is made where there is none.
    ///
    /// # Errors
    ///
    /// A directory that another run has taken, or that cannot be made or written into.
    pub fn of(directory: &Path) -> Result<Self> {
        check_directory(directory)?;
        let made = directory.ancestors().take_while(|part| *part != Path::new("") && !part.exists());
        let made = made.map(Path::to_path_buf).collect();
        std::fs::create_dir_all(directory).map_err(|error| Error::io(directory, &error))?;
        let path = lock_of(directory);
        loop {
            let file = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
            let file = file.map_err(|error| Error::io(&path, &error))?;
            take(&file, directory)?;
            // Between opening and locking, whoever held it may have ended and taken the file away: it keeps nobody out then.
            if is_at(&file, &path) {
                return Ok(Self { path, made, _file: file });
            }
        }
    }

    /// Fails if another run has taken a directory, and takes nothing.
    ///
    /// # Errors
    ///
    /// A directory that another run has taken.
    pub fn check_free(directory: &Path) -> Result<()> {
        File::open(lock_of(directory)).map_or(Ok(()), |file| take(&file, directory))
    }
}

fn lock_of(directory: &Path) -> PathBuf {
    directory.join(format!("{PREFIX}lock"))
}

fn take(file: &File, directory: &Path) -> Result<()> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => {
            let message = "expected no other run in this directory, found one".into();
            Error::File { path: directory.into(), message }
        }
        TryLockError::Error(error) => Error::io(&lock_of(directory), &error),
    })
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Without a way to see that a file has been taken away it must stay.
        if cfg!(unix) {
            let _ = std::fs::remove_file(&self.path);
        }
        // Only those that are empty are taken away.
        let _ = self.made.iter().try_for_each(std::fs::remove_dir);
    }
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |about: std::fs::Metadata| (about.dev(), about.ino());
    matches!((file.metadata().map(place), std::fs::metadata(path).map(place)), (Ok(ours), Ok(theirs)) if ours == theirs)
}

#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn however_many_come_and_go_one_holds_it() {
        let directory = tempfile::tempdir().unwrap();
        let (inside, taken) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20000 {
                        let Ok(_lock) = Lock::of(directory.path()) else { continue };
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two at once");
                        taken.fetch_add(1, Ordering::SeqCst);
                        // Long enough for another to come in where it can.
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(taken.load(Ordering::SeqCst) > 0);
        let left = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, usize::from(!cfg!(unix)), "nothing is left");
    }
}
