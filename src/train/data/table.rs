//! The `[data]` table as it is written: all keys side by side, each of which one format or several know.

use super::{CsvFile, DataConfig, IdxFiles, Label, NpyFiles, NpzFile, Source, Task, TextFiles, Transform};
use serde::{Deserialize, Serialize};
use std::num::NonZeroUsize;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Format {
    #[default]
    Digits,
    Csv,
    Npy,
    Npz,
    Idx,
    Text,
}

/// One word or a list of words.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(
    untagged,
    expecting = "expected one of rotate90, rotate180, rotate270, transpose, flip, invert, or a list of them"
)]
enum Transforms {
    One(Transform),
    Many(Vec<Transform>),
}

/// The table as it is written: serde cannot both flatten an enum and refuse unknown keys.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Table {
    format: Format,
    path: Option<PathBuf>,
    label: Option<Label>,
    header: Option<bool>,
    task: Option<Task>,
    classes: Option<NonZeroUsize>,
    features: Option<String>,
    targets: Option<String>,
    ids: Option<bool>,
    images: Option<PathBuf>,
    labels: Option<PathBuf>,
    paths: Option<Vec<PathBuf>>,
    extensions: Option<Vec<String>>,
    context: Option<NonZeroUsize>,
    stride: Option<NonZeroUsize>,
    scale: Option<f64>,
    shape: Option<Vec<usize>>,
    transform: Option<Transforms>,
}

impl Table {
    /// A key that no format has taken.
    fn left(&self) -> Option<&'static str> {
        let keys = [
            ("path", self.path.is_some()),
            ("label", self.label.is_some()),
            ("header", self.header.is_some()),
            ("task", self.task.is_some()),
            ("classes", self.classes.is_some()),
            ("features", self.features.is_some()),
            ("targets", self.targets.is_some()),
            ("ids", self.ids.is_some()),
            ("images", self.images.is_some()),
            ("labels", self.labels.is_some()),
            ("paths", self.paths.is_some()),
            ("extensions", self.extensions.is_some()),
            ("context", self.context.is_some()),
            ("stride", self.stride.is_some()),
        ];
        keys.into_iter().find_map(|(key, is_there)| is_there.then_some(key))
    }
}

impl Format {
    fn word(self) -> &'static str {
        match self {
            Self::Digits => "digits",
            Self::Csv => "csv",
            Self::Npy => "npy",
            Self::Npz => "npz",
            Self::Idx => "idx",
            Self::Text => "text",
        }
    }

    fn keys(self) -> &'static str {
        match self {
            Self::Digits => "",
            Self::Csv => "path, label, header, task, classes, ",
            Self::Npy => "features, targets, ids, classes, ",
            Self::Npz => "path, features, targets, ids, classes, ",
            Self::Idx => "images, labels, classes, ",
            Self::Text => "paths, extensions, context, stride, ",
        }
    }
}

impl TryFrom<Table> for DataConfig {
    type Error = String;

    fn try_from(mut table: Table) -> Result<Self, String> {
        fn needed<T>(format: Format, key: &str, value: Option<T>) -> Result<T, String> {
            value.ok_or_else(|| format!("missing key `{key}`: format \"{}\" needs it", format.word()))
        }
        let format = table.format;
        let source = match format {
            Format::Digits => Source::Digits,
            Format::Csv => Source::Csv(CsvFile {
                path: needed(format, "path", table.path.take())?,
                label: table.label.take(),
                header: table.header.take().unwrap_or(true),
                task: table.task.take().unwrap_or_default(),
                classes: table.classes.take(),
            }),
            Format::Npy => Source::Npy(NpyFiles {
                features: needed(format, "features", table.features.take())?.into(),
                targets: needed(format, "targets", table.targets.take())?.into(),
                ids: table.ids.take().unwrap_or(false),
                classes: table.classes.take(),
            }),
            Format::Npz => Source::Npz(NpzFile {
                path: needed(format, "path", table.path.take())?,
                features: needed(format, "features", table.features.take())?,
                targets: needed(format, "targets", table.targets.take())?,
                ids: table.ids.take().unwrap_or(false),
                classes: table.classes.take(),
            }),
            Format::Idx => Source::Idx(IdxFiles {
                images: needed(format, "images", table.images.take())?,
                labels: needed(format, "labels", table.labels.take())?,
                classes: table.classes.take(),
            }),
            Format::Text => Source::Text(TextFiles {
                paths: needed(format, "paths", table.paths.take())?,
                extensions: table.extensions.take(),
                context: needed(format, "context", table.context.take())?,
                stride: table.stride.take(),
            }),
        };
        if let Source::Csv(CsvFile { task: Task::Regression, classes: Some(_), .. }) = source {
            return Err("unexpected key `classes`: task \"regression\" has none".into());
        }
        if let Some(key) = table.left() {
            let (word, keys) = (format.word(), format.keys());
            return Err(format!("unexpected key `{key}`: format \"{word}\" has {keys}scale, shape and transform"));
        }
        let transform = match table.transform {
            None => vec![],
            Some(Transforms::One(transform)) => vec![transform],
            Some(Transforms::Many(transforms)) => transforms,
        };
        Ok(Self { source, scale: table.scale.unwrap_or(1.0), shape: table.shape, transform })
    }
}

impl From<DataConfig> for Table {
    fn from(config: DataConfig) -> Self {
        let table = Self {
            scale: Some(config.scale),
            shape: config.shape,
            transform: Some(Transforms::Many(config.transform)),
            ..Self::default()
        };
        match config.source {
            Source::Digits => table,
            Source::Csv(CsvFile { path, label, header, task, classes }) => Self {
                format: Format::Csv,
                path: Some(path),
                label,
                header: Some(header),
                task: Some(task),
                classes,
                ..table
            },
            Source::Npy(NpyFiles { features, targets, ids, classes }) => Self {
                format: Format::Npy,
                features: Some(features.to_string_lossy().into()),
                targets: Some(targets.to_string_lossy().into()),
                ids: Some(ids),
                classes,
                ..table
            },
            Source::Npz(NpzFile { path, features, targets, ids, classes }) => Self {
                format: Format::Npz,
                path: Some(path),
                features: Some(features),
                targets: Some(targets),
                ids: Some(ids),
                classes,
                ..table
            },
            Source::Idx(IdxFiles { images, labels, classes }) => {
                Self { format: Format::Idx, images: Some(images), labels: Some(labels), classes, ..table }
            }
            Source::Text(TextFiles { paths, extensions, context, stride }) => {
                Self { format: Format::Text, paths: Some(paths), extensions, context: Some(context), stride, ..table }
            }
        }
    }
}
