//! What the formats have in common: opening, refusing, and classes.

use crate::{Error, Result};
use flate2::read::MultiGzDecoder;
use std::fs::File;
use std::io::{BufReader, Read};
use std::num::NonZeroUsize;
use std::path::Path;

/// So many classes there may be unless the configuration declares more: one wrong label must not size a model.
const MOST_CLASSES: usize = 1 << 16;

/// What is wrong with a file.
pub(super) fn refuse(path: &Path, message: impl Into<String>) -> Error {
    Error::File { path: path.into(), message: message.into() }
}

/// A file and its length; the length is none where what is read is not what lies there, as in a `.gz`.
pub(super) fn open(path: &Path) -> Result<(Box<dyn Read>, Option<u64>)> {
    let file = File::open(path).map_err(|error| Error::io(path, &error))?;
    let about = file.metadata().map_err(|error| Error::io(path, &error))?;
    let file = BufReader::new(file);
    if path.extension().is_some_and(|extension| extension == "gz") {
        return Ok((Box::new(MultiGzDecoder::new(file)), None));
    }
    Ok((Box::new(file), about.is_file().then_some(about.len())))
}

/// What was found where a file could not be read on.
pub(super) fn found(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => "found the end of the file".into(),
        _ => format!("found {error}"),
    }
}

/// Fails with what was expected unless the label is a class.
pub(super) fn check_class(label: i64, declared: Option<NonZeroUsize>) -> std::result::Result<(), String> {
    let classes = declared.map_or(MOST_CLASSES, NonZeroUsize::get);
    if usize::try_from(label).is_ok_and(|label| label < classes) {
        return Ok(());
    }
    let hint = if declared.is_none() && label >= 0 { " (`classes` may declare more)" } else { "" };
    Err(format!("expected a class from 0 to {}, found {label}{hint}", classes - 1))
}

/// How many classes there are: as declared, or up to the largest label.
pub(super) fn count_classes<'a>(labels: impl IntoIterator<Item = &'a i64>, declared: Option<NonZeroUsize>) -> usize {
    let seen = || labels.into_iter().max().map_or(0, |&largest| largest as usize + 1);
    declared.map_or_else(seen, NonZeroUsize::get)
}

/// A text from a file, made fit for one line of an error.
pub(super) fn shown(text: &[u8]) -> String {
    const LONGEST: usize = 40;
    let text = String::from_utf8_lossy(text);
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_beyond_reason_must_be_declared() {
        assert!(check_class(65_535, None).is_ok());
        assert!(check_class(65_536, None).unwrap_err().ends_with("found 65536 (`classes` may declare more)"));
        assert!(check_class(65_536, NonZeroUsize::new(65_537)).is_ok());
        assert_eq!(check_class(-1, None).unwrap_err(), "expected a class from 0 to 65535, found -1");
        assert_eq!(count_classes(&[0, 4, 2], None), 5);
        assert_eq!(count_classes(&[0, 4, 2], NonZeroUsize::new(7)), 7);
    }

    #[test]
    fn what_is_shown_of_a_file_is_one_short_line() {
        assert_eq!(shown(b"a\nb"), "\"a\\nb\"");
        assert!(shown("ä".repeat(100).as_bytes()).chars().count() < 50);
    }
}
