//! Arrays of NumPy, a file each or together in an .npz.

use super::npy_array::{Array, array};
use super::read::{check_class, count_classes, open, refuse};
use super::{Dataset, Features, Targets, zip};
use crate::{Error, Result};
use ndarray::{Axis, Dimension};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// The keys of `format = "npy"`.
#[derive(Clone, Debug, PartialEq)]
pub struct NpyFiles {
    /// `[samples, ..]`.
    pub features: PathBuf,
    /// Integers `[samples]` are classes, floating-point numbers `[samples]` or `[samples, outputs]` a regression.
    pub targets: PathBuf,
    /// Whether the features are ids of an embedding; integer targets may then be `[samples, length]`.
    pub ids: bool,
    /// How many classes there are; `None` counts up to the largest label.
    pub classes: Option<NonZeroUsize>,
}

/// The keys of `format = "npz"`.
#[derive(Clone, Debug, PartialEq)]
pub struct NpzFile {
    /// The archive.
    pub path: PathBuf,
    /// The name of the array within: as [`NpyFiles::features`].
    pub features: String,
    /// The name of the array within: as [`NpyFiles::targets`].
    pub targets: String,
    /// As [`NpyFiles::ids`].
    pub ids: bool,
    /// As [`NpyFiles::classes`].
    pub classes: Option<NonZeroUsize>,
}

pub(super) fn load(files: &NpyFiles, directory: &Path) -> Result<Dataset> {
    let (features, targets) = (directory.join(&files.features), directory.join(&files.targets));
    let read = |path: &Path| {
        let (mut reader, length) = open(path)?;
        array(&mut reader, length).map_err(|message| refuse(path, message))
    };
    dataset(
        read(&features)?,
        read(&targets)?,
        files.ids,
        files.classes,
        |message| refuse(&features, message),
        |message| refuse(&targets, message),
    )
}

pub(super) fn load_npz(file: &NpzFile, directory: &Path) -> Result<Dataset> {
    let path = directory.join(&file.path);
    let in_array = |name: &str, message: String| refuse(&path, format!("{name}: {message}"));
    let read = |name: &str| {
        let mut entry = zip::entry(&path, name)?;
        let length = entry.length;
        let array = array(&mut entry.reader, Some(length)).map_err(|message| in_array(name, message))?;
        if entry.is_intact() {
            Ok(array)
        } else {
            Err(in_array(name, "expected the checksum of the archive, found another".into()))
        }
    };
    dataset(
        read(&file.features)?,
        read(&file.targets)?,
        file.ids,
        file.classes,
        |message| in_array(&file.features, message),
        |message| in_array(&file.targets, message),
    )
}

/// Features and targets that fit each other.
fn dataset(
    features: Array,
    targets: Array,
    ids: bool,
    declared: Option<NonZeroUsize>,
    in_features: impl Fn(String) -> Error,
    in_targets: impl Fn(String) -> Error,
) -> Result<Dataset> {
    let features = match (features, ids) {
        (Array::Float(_), true) => {
            return Err(in_features("expected integers, as `ids` is true, found floating-point numbers".into()));
        }
        (Array::Int(ids), true) => {
            if let Some((index, id)) = ids.indexed_iter().find(|(_, id)| **id < 0) {
                let index = Dimension::slice(&index).to_vec();
                return Err(in_features(format!("{index:?}: expected an id from 0, found {id}")));
            }
            Features::Ids(ids)
        }
        (Array::Float(values), false) => Features::Values(values),
        (Array::Int(values), false) => Features::Values(values.mapv(|value| value as f64)),
    };
    let shape = features.shape();
    if shape.is_empty() || shape.contains(&0) {
        return Err(in_features(format!("expected [samples, ..] with at least one value, found the shape {shape:?}")));
    }
    let samples = shape[0];
    let check = |found: &[usize], expected: &str, most: usize| {
        if found.first() == Some(&samples) && found.len() <= most && !found.contains(&0) {
            return Ok(());
        }
        Err(in_targets(format!(
            "expected the shape {expected} with {samples} samples, as in the features, found {found:?}"
        )))
    };
    match targets {
        Array::Float(values) => {
            check(values.shape(), "[samples] or [samples, outputs]", 2)?;
            let values = if values.ndim() == 1 { values.insert_axis(Axis(1)) } else { values };
            Ok(Dataset::independent(features, Targets::Values(values), None))
        }
        Array::Int(classes) => {
            let (shape, most) = if ids { ("[samples] or [samples, length]", 2) } else { ("[samples]", 1) };
            check(classes.shape(), shape, most)?;
            for (index, &label) in classes.indexed_iter() {
                check_class(label, declared)
                    .map_err(|message| in_targets(format!("{:?}: {message}", Dimension::slice(&index))))?;
            }
            let count = count_classes(&classes, declared);
            Ok(Dataset::independent(features, Targets::Classes(classes), Some(count)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::npy_array::tests::npy;
    use ndarray::{ArrayD, array};

    const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/train");

    fn bytes_of(values: &[f64]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn load_bytes(features: &[u8], targets: &[u8], ids: bool) -> Result<Dataset> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("x.npy"), features).unwrap();
        std::fs::write(directory.path().join("y.npy"), targets).unwrap();
        let files = NpyFiles { features: "x.npy".into(), targets: "y.npy".into(), ids, classes: None };
        load(&files, directory.path())
    }

    fn npz(path: &str, targets: &str) -> NpzFile {
        NpzFile { path: path.into(), features: "x".into(), targets: targets.into(), ids: false, classes: None }
    }

    #[test]
    fn an_array_in_the_order_of_fortran_is_the_same_array() {
        let files =
            NpyFiles { features: "fortran.npy".into(), targets: "fortran.npy".into(), ids: false, classes: None };
        let refused = load(&files, Path::new(FIXTURES)).unwrap_err().to_string();
        assert!(
            refused.ends_with(
                "expected the shape [samples] or [samples, outputs] with 3 samples, as in the features, found [3, 2, 4]"
            ),
            "{refused}"
        );
        let same = load_npz(&npz("compressed.npz", "y"), Path::new(FIXTURES)).unwrap();
        let bytes = std::fs::read(Path::new(FIXTURES).join("fortran.npy")).unwrap();
        let set = load_bytes(&bytes, &npy("|u1", "(3,)", &[2, 0, 1]), false).unwrap();
        assert_eq!(set, same);
        let Features::Values(values) = &set.features else { panic!("ids") };
        assert_eq!(values, &ArrayD::from_shape_fn(vec![3, 2, 4], |at| (at[0] * 8 + at[1] * 4 + at[2]) as f64 / 4.0));
        assert!(values.is_standard_layout());
        assert_eq!((set.targets, set.classes), (Targets::Classes(array![2, 0, 1].into_dyn()), Some(3)));
    }

    #[test]
    fn numbers_are_a_regression_and_ids_stay_ids() {
        let x = npy("<i4", "(2, 1)", &[1, 0, 0, 0, 2, 0, 0, 0]);
        let set = load_bytes(&x, &npy("<f8", "(2,)", &bytes_of(&[0.5, -1.0])), true).unwrap();
        assert_eq!(set.features, Features::Ids(array![[1], [2]].into_dyn()));
        assert_eq!((set.targets, set.classes), (Targets::Values(array![[0.5], [-1.0]].into_dyn()), None));
    }

    #[test]
    fn arrays_that_do_not_fit_are_refused() {
        let x = npy("<f8", "(2, 1)", &bytes_of(&[1.0, 2.0]));
        let y = npy("|u1", "(2,)", &[0, 1]);
        for (x, y, ids, expected) in [
            (&x, &y, true, "x.npy: expected integers, as `ids` is true, found floating-point numbers"),
            (
                &x,
                &npy("|u1", "(1,)", &[0]),
                false,
                "y.npy: expected the shape [samples] with 2 samples, as in the features, found [1]",
            ),
            (
                &x,
                &npy("|u1", "(2, 1)", &[0, 1]),
                false,
                "y.npy: expected the shape [samples] with 2 samples, as in the features, found [2, 1]",
            ),
            (
                &x,
                &npy("<i4", "(2,)", &[0, 0, 0, 0, 255, 255, 255, 255]),
                false,
                "y.npy: [1]: expected a class from 0 to 65535, found -1",
            ),
            (
                &npy("<f8", "(2,)", &bytes_of(&[1.0, f64::NAN])),
                &y,
                false,
                "x.npy: [1]: expected a finite number, found NaN",
            ),
            (&npy("<f8", "()", &bytes_of(&[1.0])), &y, false, "found the shape []"),
            (&npy("<f8", "(0, 4)", &[]), &y, false, "found the shape [0, 4]"),
            (&npy("<i4", "(1,)", &[255; 4]), &y, true, "x.npy: [0]: expected an id from 0, found -1"),
        ] {
            let error = load_bytes(x, y, ids).unwrap_err().to_string();
            assert!(error.ends_with(expected), "{error}");
        }
    }
}
