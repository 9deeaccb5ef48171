//! The `[data]` table of a configuration: one format, the keys of that format, and those that every format has.

use super::table::Table;
use super::{CsvFile, IdxFiles, NpyFiles, NpzFile, TextFiles, Transform};
use serde::{Deserialize, Serialize};

/// The `[data]` table: where the samples are, and what is done to them once they are read.
///
/// Its keys lie side by side in the file, as in `format = "csv"`, `path = "iris.csv"`, `scale = 0.1`. A key that
/// nobody knows, or that another format has, is refused.
///
/// ```
/// use woracle::train::data::{Column, DataConfig, Label, Source, Task, Transform};
/// use woracle::train::data::{IdxFiles, NpyFiles, NpzFile, TextFiles};
/// let read = |text: &str| toml::from_str::<DataConfig>(text);
/// let table = read("format = 'csv'\npath = 'iris.csv'\nlabel = 'species'\nheader = true\nscale = 0.1").unwrap();
/// let Source::Csv(csv) = &table.source else { panic!("a table") };
/// assert_eq!(csv.label, Some(Label::One(Column::Name("species".into()))));
/// assert_eq!((csv.task, table.scale), (Task::Classification, 0.1));
///
/// let arrays = read("format = 'npy'\nfeatures = 'x.npy'\ntargets = 'y.npy'").unwrap();
/// assert!(matches!(arrays.source, Source::Npy(NpyFiles { ids: false, .. })));
/// let archive = read("format = 'npz'\npath = 'all.npz'\nfeatures = 'x'\ntargets = 'y'").unwrap();
/// assert!(matches!(archive.source, Source::Npz(NpzFile { classes: None, .. })));
/// let images = read("format = 'idx'\nimages = 'images.gz'\nlabels = 'labels.gz'\ntransform = ['rotate90']").unwrap();
/// assert!(matches!(images.source, Source::Idx(IdxFiles { .. })) && images.transform == [Transform::Rotate90]);
/// let text = read("format = 'text'\npaths = ['src']\nextensions = ['rs']\ncontext = 64").unwrap();
/// assert!(matches!(text.source, Source::Text(TextFiles { stride: None, .. }))); // half the context
/// assert!(read("format = 'digits'\npath = 'iris.csv'").is_err()); // a key of another format
/// ```
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(try_from = "Table", into = "Table")]
pub struct DataConfig {
    /// `format` and its keys.
    pub source: Source,
    /// Values are multiplied by it, after the transforms.
    pub scale: f64,
    /// The shape of a sample; `None` leaves it as the format has it.
    pub shape: Option<Vec<usize>>,
    /// What is done to every sample, in this order.
    pub transform: Vec<Transform>,
}

/// Where the samples are. Paths are relative to the directory of the configuration.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The set that is part of the program: features `[1797, 1, 8, 8]` from 0 to 16, 10 classes.
    Digits,
    /// A table of numbers.
    Csv(CsvFile),
    /// Two arrays of NumPy, a file each.
    Npy(NpyFiles),
    /// Two arrays of NumPy in one archive.
    Npz(NpzFile),
    /// Images and labels as MNIST keeps them.
    Idx(IdxFiles),
    /// Characters of texts.
    Text(TextFiles),
}

impl From<Source> for DataConfig {
    fn from(source: Source) -> Self {
        Self { source, scale: 1.0, shape: None, transform: vec![] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::{Column, Label, Task};

    fn parse(text: &str) -> Result<DataConfig, String> {
        toml::from_str(text).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn every_format_is_read_and_written_back() {
        for text in [
            "format = 'digits'\nscale = 0.0625\nshape = [64]",
            "format = 'csv'\npath = 'a.csv'\nlabel = 'y'\ntransform = 'invert'",
            "format = 'csv'\npath = 'a.csv'\nlabel = [0, 'y']\ntask = 'regression'\nheader = false",
            "format = 'npy'\nfeatures = 'x.npy'\ntargets = 'y.npy'\nids = true",
            "format = 'npz'\npath = 'a.npz'\nfeatures = 'x'\ntargets = 'y'\nclasses = 3",
            "format = 'idx'\nimages = 'i.gz'\nlabels = 'l.gz'\ntransform = ['rotate90', 'invert']",
            "format = 'text'\npaths = ['src']\nextensions = ['rs']\ncontext = 8\nstride = 2",
        ] {
            let config = parse(text).unwrap();
            let written = toml::to_string(&config).unwrap();
            assert_eq!(parse(&written).unwrap(), config, "{written}");
        }
    }

    #[test]
    fn defaults_are_what_the_documentation_says() {
        let config = parse("format = 'csv'\npath = 'a.csv'").unwrap();
        let file =
            CsvFile { path: "a.csv".into(), label: None, header: true, task: Task::Classification, classes: None };
        assert_eq!(config, Source::Csv(file).into());
        let one = parse("format = 'csv'\npath = 'a.csv'\nlabel = 2").unwrap();
        assert!(matches!(one.source, Source::Csv(CsvFile { label: Some(Label::One(Column::Number(2))), .. })));
    }

    #[test]
    fn a_key_that_does_not_belong_is_named() {
        let refused = |text| parse(text).unwrap_err();
        for (text, expected) in [
            ("format = 'csv'\npath = 'a'\nlable = 1", "unknown field `lable`"),
            (
                "format = 'digits'\npath = 'a'",
                "unexpected key `path`: format \"digits\" has scale, shape and transform",
            ),
            ("format = 'text'\npaths = ['a']\ncontext = 4\nheader = true", "unexpected key `header`"),
            ("format = 'npz'\npath = 'a'\nfeatures = 'x'", "missing key `targets`: format \"npz\" needs it"),
            (
                "format = 'csv'\npath = 'a'\ntask = 'regression'\nclasses = 2",
                "unexpected key `classes`: task \"regression\" has none",
            ),
            ("format = 'parquet'", "unknown variant `parquet`"),
            ("path = 'a'", "missing field `format`"),
            ("format = 'text'\npaths = ['a']\ncontext = 0", "nonzero"),
            ("format = 'digits'\ntransform = 'rotate45'", "expected one of rotate90"),
            ("format = 'csv'\npath = 'a'\nlabel = -1", "expected a column"),
        ] {
            assert!(refused(text).contains(expected), "{text}: {}", refused(text));
        }
    }
}
