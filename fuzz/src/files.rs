//! A directory for what is read from files.

use std::path::Path;
use tempfile::TempDir;

/// Calls this with a directory of these files, in memory where there is a file system for that.
pub fn with_files(files: &[(&str, &[u8])], read: impl FnOnce(&Path) -> bool) -> bool {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
    let directory = directory.expect("a directory");
    for (name, bytes) in files {
        std::fs::write(directory.path().join(name), bytes).expect("a file");
    }
    read(directory.path())
}

/// The parts of an input, each but the last after its length as two bytes, least significant first.
pub fn parts<const N: usize>(mut bytes: &[u8]) -> [&[u8]; N] {
    std::array::from_fn(|index| {
        let last = index + 1 == N;
        let Some((length, rest)) = bytes.split_first_chunk().filter(|_| !last) else {
            return std::mem::take(&mut bytes);
        };
        let part;
        (part, bytes) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
        part
    })
}
