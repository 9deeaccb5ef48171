//! Data sets: what a model sees and what it is to say, read from files that are checked to the last byte.
//!
//! One set is part of the program: 1,797 digits of 8x8 pixels, "Optical Recognition of Handwritten Digits" of the UCI
//! Machine Learning Repository, E. Alpaydin and C. Kaynak 1998, DOI 10.24432/C50P49, CC BY 4.0.
//!
//! ```
//! use std::path::Path;
//! use woracle::train::data::{DataConfig, Source, Transform, load, split};
//!
//! // format = "digits", transform = "rotate90", scale = 0.0625
//! let config = DataConfig { transform: vec![Transform::Rotate90], scale: 0.0625, ..Source::Digits.into() };
//! let digits = load(&config, Path::new("."), None)?;
//! assert_eq!((digits.len(), digits.sample_shape(), digits.classes), (1797, &[1, 8, 8][..], Some(10)));
//!
//! let parts = split(&digits, 0.1, 0.1, 0)?;
//! assert_eq!((parts.train.len(), parts.validation.len(), parts.test.len()), (1437, 180, 180));
//! let test = digits.select(&parts.test);
//! assert_eq!(test.len(), 180);
//! # Ok::<(), woracle::Error>(())
//! ```

mod columns;
mod config;
mod csv;
mod digits;
mod idx;
mod load;
mod npy;
mod npy_array;
mod read;
mod split;
mod table;
mod text;
mod transform;
mod vocabulary;
mod zip;

pub use self::columns::{Column, Label};
pub use self::config::{DataConfig, Source};
pub use self::csv::{CsvFile, Task};
pub use self::idx::IdxFiles;
pub use self::load::{load, vocabulary};
pub use self::npy::{NpyFiles, NpzFile};
pub use self::split::{Split, shuffled, split};
pub use self::text::TextFiles;
pub use self::transform::Transform;
pub use self::vocabulary::Vocabulary;

use ndarray::{ArrayD, Axis};

/// What a model sees: the first axis counts samples.
#[derive(Clone, Debug, PartialEq)]
pub enum Features {
    /// Numbers, `[samples, ..]`.
    Values(ArrayD<f64>),
    /// Ids of an embedding, `[samples, ..]`.
    Ids(ArrayD<i64>),
}

/// What it is to say.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// `[samples]`, or `[samples, length]` for text: each from 0 to classes - 1.
    Classes(ArrayD<i64>),
    /// `[samples, outputs]` of a regression.
    Values(ArrayD<f64>),
}

/// Samples and their targets.
///
/// ```
/// use ndarray::array;
/// use woracle::train::data::{CsvFile, Features, Source, Targets, Task, load};
/// # let directory = tempfile::tempdir().expect("a temporary directory");
/// std::fs::write(directory.path().join("table.csv"), "0.5,1.5,0\n2.5,3.5,2\n").expect("a file");
/// let file = CsvFile { path: "table.csv".into(), label: None, header: false, task: Task::default(), classes: None };
/// let set = load(&Source::Csv(file).into(), directory.path(), None)?; // the last column is the label
/// assert_eq!(set.features, Features::Values(array![[0.5, 1.5], [2.5, 3.5]].into_dyn())); // [samples, features]
/// assert_eq!((&set.targets, set.classes), (&Targets::Classes(array![0, 2].into_dyn()), Some(3)));
/// assert_eq!(set.select(&[1]).targets, Targets::Classes(array![2].into_dyn()));
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// What a model sees.
    pub features: Features,
    /// What it is to say.
    pub targets: Targets,
    /// How many classes there are; `None` for a regression.
    pub classes: Option<usize>,
    /// Samples of one block are never divided between the parts of a split: windows of a text overlap within a block.
    /// One entry a sample.
    pub blocks: Vec<usize>,
}

impl Features {
    /// `[samples, ..]`.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Values(values) => values.shape(),
            Self::Ids(ids) => ids.shape(),
        }
    }
}

impl Targets {
    /// `[samples, ..]`.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Classes(classes) => classes.shape(),
            Self::Values(values) => values.shape(),
        }
    }
}

impl Dataset {
    /// A set whose samples have nothing to do with each other: every one is its own block.
    fn independent(features: Features, targets: Targets, classes: Option<usize>) -> Self {
        let blocks = (0..features.shape().first().copied().unwrap_or(0)).collect();
        Self { features, targets, classes, blocks }
    }

    /// How many samples there are.
    pub fn len(&self) -> usize {
        self.features.shape().first().copied().unwrap_or(0)
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of one sample: that of the features without the first axis.
    pub fn sample_shape(&self) -> &[usize] {
        self.features.shape().get(1..).unwrap_or(&[])
    }

    /// These samples in this order.
    ///
    /// # Panics
    ///
    /// If there is no such sample.
    pub fn select(&self, samples: &[usize]) -> Self {
        Self {
            features: match &self.features {
                Features::Values(values) => Features::Values(values.select(Axis(0), samples)),
                Features::Ids(ids) => Features::Ids(ids.select(Axis(0), samples)),
            },
            targets: match &self.targets {
                Targets::Classes(classes) => Targets::Classes(classes.select(Axis(0), samples)),
                Targets::Values(values) => Targets::Values(values.select(Axis(0), samples)),
            },
            classes: self.classes,
            blocks: samples.iter().map(|&sample| self.blocks[sample]).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn selected_samples_come_in_the_order_asked_for() {
        let set = Dataset {
            features: Features::Ids(array![[1, 2], [3, 4], [5, 6]].into_dyn()),
            targets: Targets::Values(array![[0.1], [0.2], [0.3]].into_dyn()),
            classes: None,
            blocks: vec![0, 0, 1],
        };
        let two = set.select(&[2, 0]);
        assert_eq!(two.features, Features::Ids(array![[5, 6], [1, 2]].into_dyn()));
        assert_eq!(two.targets, Targets::Values(array![[0.3], [0.1]].into_dyn()));
        assert_eq!((two.blocks.as_slice(), two.len(), two.sample_shape()), (&[1, 0][..], 2, &[2][..]));
        assert!(set.select(&[]).is_empty());
    }
}
