//! As much of a ZIP archive as an .npz is: entries by name, stored or deflated, below 4 GB.

use super::read::refuse;
use crate::{Error, Result};
use flate2::CrcReader;
use flate2::bufread::DeflateDecoder;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Take};
use std::path::Path;

const END: &[u8] = b"PK\x05\x06";
/// The end of an archive without its comment, and with the longest.
const END_BYTES: usize = 22;
const LONGEST_END: u64 = 22 + 0xffff;
const ENTRY: &[u8] = b"PK\x01\x02";
const ENTRY_BYTES: usize = 46;
const LOCAL: &[u8] = b"PK\x03\x04";
const LOCAL_BYTES: usize = 30;

/// An entry, ready to be read.
pub(super) struct Entry {
    /// Never more bytes than `length`.
    pub(super) reader: CrcReader<Take<Box<dyn Read>>>,
    /// How many bytes the archive claims.
    pub(super) length: u64,
    crc: u32,
}

impl Entry {
    /// Whether what has been read is what was written.
    pub(super) fn is_intact(&self) -> bool {
        self.reader.crc().sum() == self.crc
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u64 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]]).into()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The bytes of a range that lies within the file.
fn bytes_at(file: &mut File, path: &Path, start: u64, count: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    file.seek(SeekFrom::Start(start)).map_err(|error| Error::io(path, &error))?;
    file.take(count).read_to_end(&mut bytes).map_err(|error| Error::io(path, &error))?;
    if bytes.len() as u64 == count {
        return Ok(bytes);
    }
    Err(refuse(path, format!("expected {count} bytes of a ZIP archive at byte {start}, found {}", bytes.len())))
}

/// The entry `name.npy`, or `name`.
pub(super) fn entry(path: &Path, name: &str) -> Result<Entry> {
    let mut file = File::open(path).map_err(|error| Error::io(path, &error))?;
    let directory = directory(&mut file, path)?;
    let mut names = vec![];
    let mut rest = &directory[..];
    while rest.len() >= ENTRY_BYTES && rest.starts_with(ENTRY) {
        let (about, after) = rest.split_at(ENTRY_BYTES);
        let [name_length, extra, comment] = [28, 30, 32].map(|at| u16_at(about, at) as usize);
        let Some(found) = after.get(..name_length) else { break };
        let found = String::from_utf8_lossy(found);
        let found = found.strip_suffix(".npy").unwrap_or(&found).to_owned();
        if found == name || found == name.strip_suffix(".npy").unwrap_or(name) {
            return open(file, path, name, about);
        }
        names.push(found);
        rest = after.get(name_length + extra + comment..).unwrap_or(&[]);
    }
    Err(refuse(path, format!("expected an array {name:?}, found {names:?}")))
}

/// The central directory, which lists the entries.
fn directory(file: &mut File, path: &Path) -> Result<Vec<u8>> {
    let length = file.metadata().map_err(|error| Error::io(path, &error))?.len();
    let tail_length = length.min(LONGEST_END);
    let tail = bytes_at(file, path, length - tail_length, tail_length)?;
    let end = tail.windows(END_BYTES).rev().find(|window| window.starts_with(END));
    let end = end.ok_or_else(|| refuse(path, "expected a ZIP archive of arrays, found no end of one"))?;
    let (size, start) = (u32_at(end, 12), u32_at(end, 16));
    if start == u32::MAX || size == u32::MAX {
        return Err(refuse(path, "expected an archive below 4 GB, found the format for larger ones"));
    }
    bytes_at(file, path, start.into(), size.into())
}

/// Opens an entry of the central directory.
fn open(mut file: File, path: &Path, name: &str, about: &[u8]) -> Result<Entry> {
    let refuse = |message: String| refuse(path, format!("{name}: {message}"));
    let (crc, compressed, length, start) = (u32_at(about, 16), u32_at(about, 20), u32_at(about, 24), u32_at(about, 42));
    if u16_at(about, 8) & 1 != 0 {
        return Err(refuse("expected an array, found one that is encrypted".into()));
    }
    if [compressed, length, start].contains(&u32::MAX) {
        return Err(refuse("expected an array below 4 GB, found the format for larger ones".into()));
    }
    let local = bytes_at(&mut file, path, start.into(), LOCAL_BYTES as u64)?;
    if !local.starts_with(LOCAL) {
        return Err(refuse(format!("expected an entry of a ZIP archive at byte {start}, found none")));
    }
    let start = u64::from(start) + LOCAL_BYTES as u64 + u16_at(&local, 26) + u16_at(&local, 28);
    file.seek(SeekFrom::Start(start)).map_err(|error| Error::io(path, &error))?;
    let raw = BufReader::new(file.take(compressed.into()));
    let reader: Box<dyn Read> = match u16_at(about, 10) {
        0 => Box::new(raw),
        8 => Box::new(DeflateDecoder::new(raw)),
        method => return Err(refuse(format!("expected the compression 0 or 8 (deflate), found {method}"))),
    };
    Ok(Entry { reader: CrcReader::new(reader.take(length.into())), length: length.into(), crc })
}

#[cfg(test)]
mod tests {
    use crate::train::data::{NpzFile, npy::load_npz};

    const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/train/compressed.npz");

    #[test]
    fn a_damaged_archive_is_refused_and_never_a_panic() {
        let file = |targets: &str| NpzFile {
            path: "a.npz".into(),
            features: "x".into(),
            targets: targets.into(),
            ids: false,
            classes: None,
        };
        let read = |bytes: &[u8], targets| {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join("a.npz"), bytes).unwrap();
            load_npz(&file(targets), directory.path()).map_err(|error| error.to_string())
        };
        let whole = std::fs::read(FIXTURE).unwrap();
        assert!(read(&whole, "z").unwrap_err().ends_with("expected an array \"z\", found [\"x\", \"y\"]"));
        assert!(read(b"no archive", "y").unwrap_err().ends_with("found no end of one"));
        let good = read(&whole, "y").unwrap();
        for at in 0..whole.len() {
            assert!(read(&whole[..at], "y").is_err(), "{at} bytes");
            for byte in [0, 1, 127, 255] {
                let mut damaged = whole.clone();
                damaged[at] = byte;
                if let Ok(set) = read(&damaged, "y") {
                    assert_eq!(set, good, "byte {at}");
                }
            }
        }
    }
}
