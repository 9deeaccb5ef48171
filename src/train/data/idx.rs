//! Images and labels as MNIST keeps them: a magic number, the lengths of the axes, then bytes.

use super::read::{check_class, count_classes, found, open, refuse};
use super::{Dataset, Features, Targets};
use crate::{Error, Result};
use ndarray::{ArrayD, IxDyn};
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// Bytes of three axes, and of one.
const IMAGES: u32 = 0x803;
const LABELS: u32 = 0x801;

/// The keys of `format = "idx"`. Files that end in `.gz` are decompressed.
#[derive(Clone, Debug, PartialEq)]
pub struct IdxFiles {
    /// Bytes `[samples, rows, columns]`.
    pub images: PathBuf,
    /// Bytes `[samples]`.
    pub labels: PathBuf,
    /// How many classes there are; `None` counts up to the largest label.
    pub classes: Option<NonZeroUsize>,
}

/// Features `[samples, 1, rows, columns]` from 0 to 255.
pub(super) fn load(files: &IdxFiles, directory: &Path) -> Result<Dataset> {
    let path = directory.join(&files.images);
    let ([samples, rows, columns], pixels) = read::<3>(&path, IMAGES)?;
    if pixels.is_empty() {
        return Err(refuse(&path, format!("expected images, found the shape {:?}", [samples, rows, columns])));
    }
    let values = pixels.into_iter().map(f64::from).collect();
    let values = ArrayD::from_shape_vec(IxDyn(&[samples, 1, rows, columns]), values);
    let values = values.map_err(|error| refuse(&path, error.to_string()))?;

    let path = directory.join(&files.labels);
    let ([count], labels) = read::<1>(&path, LABELS)?;
    if count != samples {
        return Err(refuse(&path, format!("expected {samples} labels, as there are images, found {count}")));
    }
    let labels: Vec<i64> = labels.into_iter().map(i64::from).collect();
    for (sample, &label) in labels.iter().enumerate() {
        check_class(label, files.classes).map_err(|message| refuse(&path, format!("label {sample}: {message}")))?;
    }
    let classes = count_classes(&labels, files.classes);
    let targets = Targets::Classes(ArrayD::from_shape_vec(IxDyn(&[samples]), labels).expect("a label a sample"));
    Ok(Dataset::independent(Features::Values(values), targets, Some(classes)))
}

/// The lengths of the axes, and the bytes.
fn read<const AXES: usize>(path: &Path, magic: u32) -> Result<([usize; AXES], Vec<u8>)> {
    let (mut file, length) = open(path)?;
    let mut word = || {
        let mut bytes = [0; 4];
        file.read_exact(&mut bytes)
            .map_err(|error| refuse(path, format!("expected a header of IDX, {}", found(&error))))?;
        Ok::<u32, Error>(u32::from_be_bytes(bytes))
    };
    let found = word()?;
    if found != magic {
        return Err(refuse(path, format!("expected the magic number {magic:#x}, found {found:#x}")));
    }
    let mut shape = [0; AXES];
    for axis in &mut shape {
        *axis = word()? as usize;
    }
    let claimed = shape.iter().try_fold(1_u64, |product, &axis| product.checked_mul(axis as u64));
    let claimed = claimed.unwrap_or(u64::MAX);
    let wrong =
        |found: String| refuse(path, format!("expected {claimed} bytes for the shape {shape:?}, found {found}"));
    if let Some(length) = length {
        let found = length.saturating_sub(4 + 4 * AXES as u64);
        if found != claimed {
            return Err(wrong(found.to_string()));
        }
    }
    // Grows with what is there, not with what is claimed; one byte more shows a file that goes on.
    let mut bytes = vec![];
    file.take(claimed.saturating_add(1)).read_to_end(&mut bytes).map_err(|error| Error::io(path, &error))?;
    match (bytes.len() as u64).cmp(&claimed) {
        std::cmp::Ordering::Less => Err(wrong(bytes.len().to_string())),
        std::cmp::Ordering::Greater => Err(wrong("more".into())),
        std::cmp::Ordering::Equal => Ok((shape, bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write;

    fn idx(magic: u32, shape: &[u32], bytes: &[u8]) -> Vec<u8> {
        let words = std::iter::once(&magic).chain(shape);
        words.flat_map(|word| word.to_be_bytes()).chain(bytes.iter().copied()).collect()
    }

    fn load_bytes(images: &[u8], labels: &[u8], gz: bool) -> Result<Dataset> {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = PathBuf::from(if gz { format!("{name}.gz") } else { name.into() });
            let mut file = std::fs::File::create(directory.path().join(&path)).unwrap();
            if gz {
                GzEncoder::new(file, Compression::fast()).write_all(bytes).unwrap();
            } else {
                file.write_all(bytes).unwrap();
            }
            path
        };
        let files = IdxFiles { images: write("images", images), labels: write("labels", labels), classes: None };
        load(&files, directory.path())
    }

    #[test]
    fn images_become_one_channel_with_or_without_compression() {
        let images = idx(IMAGES, &[2, 1, 3], &[0, 1, 2, 3, 4, 255]);
        for gz in [false, true] {
            let set = load_bytes(&images, &idx(LABELS, &[2], &[3, 0]), gz).unwrap();
            assert_eq!((set.sample_shape(), set.classes), (&[1, 1, 3][..], Some(4)));
            let Features::Values(values) = set.features else { panic!("ids") };
            assert_eq!(values.into_raw_vec_and_offset().0, [0.0, 1.0, 2.0, 3.0, 4.0, 255.0]);
        }
    }

    #[test]
    fn files_that_are_not_what_they_claim_are_refused() {
        let images = idx(IMAGES, &[2, 1, 1], &[0, 1]);
        let labels = idx(LABELS, &[2], &[0, 1]);
        let huge = idx(IMAGES, &[u32::MAX; 3], &[0]);
        let short = idx(IMAGES, &[1 << 30, 1, 1], &[0, 1]);
        for gz in [false, true] {
            for (images, labels, expected) in [
                (&labels, &labels, "expected the magic number 0x803, found 0x801"),
                (&images, &idx(LABELS, &[1], &[0]), "expected 2 labels, as there are images, found 1"),
                (&images, &idx(LABELS, &[2], &[0]), "expected 2 bytes for the shape [2], found 1"),
                (&images, &labels[..3].to_vec(), "expected a header of IDX, found the end of the file"),
                (&huge, &labels, "for the shape [4294967295, 4294967295, 4294967295], found 1"),
                (&short, &labels, "expected 1073741824 bytes for the shape [1073741824, 1, 1], found 2"),
                (&idx(IMAGES, &[0, 1, 1], &[]), &labels, "expected images, found the shape [0, 1, 1]"),
            ] {
                let error = load_bytes(images, labels, gz).unwrap_err().to_string();
                assert!(error.ends_with(expected), "{error}");
            }
        }
        let long = idx(IMAGES, &[2, 1, 1], &[0, 1, 2]);
        assert!(load_bytes(&long, &labels, false).unwrap_err().to_string().ends_with("found 3"));
        assert!(load_bytes(&long, &labels, true).unwrap_err().to_string().ends_with("found more"));
    }
}
