//! Texts as windows of characters: what a model sees is a window, what it is to say is the same one character later.

use super::read::refuse;
use super::{Dataset, Features, Targets, Vocabulary};
use crate::text_file::read_text;
use crate::{Error, Result};
use ndarray::{ArrayD, IxDyn};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// So many windows make up a block, were they laid side by side.
const WINDOWS: usize = 16;
/// So many characters all windows may have together: 2^30 ids of 8 bytes.
const MOST_CHARACTERS: usize = 1 << 30;

/// The keys of `format = "text"`.
#[derive(Clone, Debug, PartialEq)]
pub struct TextFiles {
    /// Files, and directories that are searched to the bottom; their texts are one, in this order.
    pub paths: Vec<PathBuf>,
    /// Which files of a directory are read; `None` is all but the hidden ones.
    pub extensions: Option<Vec<String>>,
    /// How many characters a window has.
    pub context: NonZeroUsize,
    /// How many characters after a window the next begins; `None` is half the context.
    pub stride: Option<NonZeroUsize>,
}

/// Every file and its text, a newline at the end of all but the last.
pub(super) fn read(files: &TextFiles, directory: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut paths = vec![];
    for path in &files.paths {
        let path = directory.join(path);
        if path.is_dir() {
            let before = paths.len();
            walk(&path, files.extensions.as_deref(), &mut paths)?;
            if paths.len() == before {
                return Err(match &files.extensions {
                    Some(extensions) => {
                        refuse(&path, format!("expected files that end in one of {extensions:?}, found none"))
                    }
                    None => refuse(&path, "expected files, found none"),
                });
            }
        } else {
            paths.push(path);
        }
    }
    let last = paths.len().saturating_sub(1);
    let read = |(place, path): (usize, PathBuf)| {
        let mut text = read_text(&path, MOST_CHARACTERS as u64)?;
        if place < last && !text.ends_with('\n') {
            text.push('\n');
        }
        Ok((path, text))
    };
    paths.into_iter().enumerate().map(read).collect()
}

/// The files of a directory, sorted. Links to directories are not followed, as they may lead in a circle.
fn walk(directory: &Path, extensions: Option<&[String]>, found: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(directory, &error);
    let mut entries =
        std::fs::read_dir(directory).map_err(failed)?.collect::<std::io::Result<Vec<_>>>().map_err(failed)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type().map_err(failed)?.is_dir() {
            walk(&path, extensions, found)?;
        } else if path.is_file() {
            let extension = path.extension().unwrap_or_default();
            let is_one = |wanted: &String| extension == wanted.trim_start_matches('.');
            if extensions.is_none_or(|extensions| extensions.iter().any(is_one)) {
                found.push(path);
            }
        }
    }
    Ok(())
}

/// Features and targets `[windows, context]`.
pub(super) fn load(files: &TextFiles, directory: &Path, vocabulary: Option<&Vocabulary>) -> Result<Dataset> {
    let texts = read(files, directory)?;
    let own = || Vocabulary::of(texts.iter().map(|(_, text)| text.as_str()));
    let vocabulary = vocabulary.cloned().unwrap_or_else(own);
    let mut ids = vec![];
    for (path, text) in &texts {
        for (line, text) in text.split_inclusive('\n').enumerate() {
            for character in text.chars() {
                ids.push(vocabulary.id(character).ok_or_else(|| {
                    let (line, count) = (line + 1, vocabulary.len());
                    refuse(path, format!("line {line}: expected one of {count} characters, found {character:?}"))
                })?);
            }
        }
    }
    windows(&ids, files, vocabulary.len())
}

fn windows(ids: &[i64], files: &TextFiles, classes: usize) -> Result<Dataset> {
    let context = files.context.get();
    let stride = files.stride.map_or((context / 2).max(1), NonZeroUsize::get);
    let setting =
        |name, expected: String, found: usize| Err(Error::Setting { name, expected, found: found.to_string() });
    if ids.len() <= context {
        return setting("context", format!("fewer characters than the text has, which are {}", ids.len()), context);
    }
    let starts: Vec<(usize, usize)> = ids
        .chunks(context.saturating_mul(WINDOWS))
        .enumerate()
        .flat_map(|(block, text)| {
            let first = block * context * WINDOWS;
            (0..text.len().saturating_sub(context)).step_by(stride).map(move |start| (block, first + start))
        })
        .collect();
    if starts.len().saturating_mul(context) > MOST_CHARACTERS {
        let expected = format!("one that makes at most {MOST_CHARACTERS} characters of windows of {context}");
        return setting("stride", expected, stride);
    }
    let array = |offset: usize| {
        let windows = starts.iter().flat_map(|(_, start)| &ids[start + offset..start + offset + context]);
        let shape = IxDyn(&[starts.len(), context]);
        ArrayD::from_shape_vec(shape, windows.copied().collect()).expect("windows of one length")
    };
    Ok(Dataset {
        features: Features::Ids(array(0)),
        targets: Targets::Classes(array(1)),
        classes: Some(classes),
        blocks: starts.iter().map(|&(block, _)| block).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};

    fn files(paths: &[&str], context: usize) -> TextFiles {
        let context = NonZeroUsize::new(context).unwrap();
        TextFiles { paths: paths.iter().map(PathBuf::from).collect(), extensions: None, context, stride: None }
    }

    fn tree(entries: &[(&str, &[u8])]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (path, bytes) in entries {
            let path = directory.path().join(path);
            create_dir_all(path.parent().unwrap()).unwrap();
            write(path, bytes).unwrap();
        }
        directory
    }

    #[test]
    fn a_target_is_its_window_one_character_later() {
        let tree = tree(&[("a.txt", b"abcdef")]);
        let set = load(&files(&["a.txt"], 2), tree.path(), None).unwrap();
        assert_eq!(set.features, Features::Ids(ndarray::array![[0, 1], [1, 2], [2, 3], [3, 4]].into_dyn()));
        assert_eq!(set.targets, Targets::Classes(ndarray::array![[1, 2], [2, 3], [3, 4], [4, 5]].into_dyn()));
        assert_eq!((set.classes, set.blocks), (Some(6), vec![0; 4]));
    }

    #[test]
    fn no_window_reaches_into_another_block() {
        let text: String = (0..2 * 32 + 2).map(|place| char::from_u32(0x4e00 + place).unwrap()).collect();
        let tree = tree(&[("a.txt", text.as_bytes())]);
        let set = load(&files(&["a.txt"], 2), tree.path(), None).unwrap();
        // 30 windows of 2 and a target in each block of 32; the last two characters are too few for one.
        assert_eq!(set.blocks, [vec![0; 30], vec![1; 30]].concat());
        let Targets::Classes(targets) = set.targets else { panic!("values") };
        for (target, block) in targets.outer_iter().zip(set.blocks) {
            assert!(target.iter().all(|&id| id as usize / 32 == block));
        }
    }

    #[test]
    fn directories_are_read_in_order_without_what_is_hidden() {
        let tree = tree(&[
            ("d/b.rs", b"b"),
            ("d/a/z.rs", b"a\n"),
            ("d/.hidden.rs", b"h"),
            ("d/.git/x.rs", b"h"),
            ("d/c.txt", b"c"),
            ("e.md", b"e"),
        ]);
        let text = |files: &TextFiles| -> String {
            read(files, tree.path()).unwrap().into_iter().map(|(_, text)| text).collect()
        };
        let all = files(&["d", "e.md"], 1);
        assert_eq!(text(&all), "a\nb\nc\ne");
        assert_eq!(text(&TextFiles { extensions: Some(vec![".rs".into()]), ..all.clone() }), "a\nb\ne");
        let none = TextFiles { extensions: Some(vec!["py".into()]), ..all };
        let error = read(&none, tree.path()).unwrap_err().to_string();
        assert!(error.ends_with("d: expected files that end in one of [\"py\"], found none"), "{error}");
    }

    #[test]
    fn a_text_that_cannot_be_read_is_refused() {
        let tree = tree(&[("a.txt", b"ab\nc"), ("b.txt", b"ab\xffc")]);
        let refused = |files: &TextFiles, vocabulary| load(files, tree.path(), vocabulary).unwrap_err().to_string();
        let vocabulary = Vocabulary::of(["ab\n"]);
        let error = refused(&files(&["a.txt"], 1), Some(&vocabulary));
        assert!(error.ends_with("a.txt: line 2: expected one of 3 characters, found 'c'"), "{error}");
        let error = refused(&files(&["b.txt"], 1), None);
        assert!(error.ends_with("b.txt: expected UTF-8, found something else at byte 2"), "{error}");
        let error = refused(&files(&["a.txt"], 4), None);
        assert_eq!(error, "setting context: expected fewer characters than the text has, which are 4, found 4");
        refused(&files(&["none.txt"], 1), None);
        refused(&files(&["a.txt"], usize::MAX), None);
    }
}
