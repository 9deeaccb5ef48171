//! One error for the whole crate: what is wrong, what was expected, what was found. One line each.

use crate::operators::PARALLEL_ELEMENTS;
use crate::simd::all_finite;
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// Everything that can be wrong with what a caller hands in.
///
/// ```
/// use std::path::Path;
/// use ndarray::array;
/// use woracle::{Error, operators::{Linear, Operator}};
/// let linear = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
/// let error = linear.output_shape::<f64>(&array![[1.0, 2.0]].into_dyn().into()).unwrap_err(); // C1
/// assert!(matches!(&error, Error::Shape { tensor, found, .. } if tensor == "x" && *found == [1, 2]));
/// assert_eq!(error.to_string(), "x: expected shape [..., 3], found [1, 2]");
/// let error = error.in_file(Path::new("case.safetensors"));
/// assert_eq!(error.to_string(), "case.safetensors: x: expected shape [..., 3], found [1, 2]");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another shape than its role demands.
    #[error("{tensor}: expected shape {expected}, found {found:?}")]
    Shape {
        /// The tensor's name in a case file.
        tensor: String,
        /// The shape that was expected, `*` standing for any length and `...` for any axes.
        expected: String,
        /// The shape that was found.
        found: Vec<usize>,
    },
    /// A tensor that is needed is not there.
    #[error("{tensor}: expected {expected}, found none")]
    Missing {
        /// The tensor's name in a case file.
        tensor: String,
        /// Why it is needed.
        expected: String,
    },
    /// A tensor is there that has no business to be.
    #[error("{}: {reason}", named(tensor))]
    Unexpected {
        /// The tensor's name.
        tensor: String,
        /// Why it is refused.
        reason: String,
    },
    /// A tensor holds NaN or an infinity.
    #[error("{tensor}{index:?}: expected a finite number, found {found}")]
    NotFinite {
        /// The tensor's name in a case file.
        tensor: String,
        /// Where.
        index: Vec<usize>,
        /// What stands there.
        found: f64,
    },
    /// A setting has a value that it cannot have.
    #[error("setting {name}: expected {expected}, found {found}")]
    Setting {
        /// The setting's name in a case file.
        name: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// An id that the embedding does not have (SPEC.md, C9).
    #[error("x{index:?}: expected an id from 0 to {}, found {found}", num_embeddings - 1)]
    IdOutOfRange {
        /// Where.
        index: Vec<usize>,
        /// How many there are.
        num_embeddings: usize,
        /// What stands there.
        found: i64,
    },
    /// A class that the model does not know (SPEC.md, C9).
    #[error("targets{index:?}: expected a class from 0 to below {classes}, found {found}")]
    ClassOutOfRange {
        /// Where.
        index: Vec<usize>,
        /// How many there are.
        classes: usize,
        /// What stands there.
        found: i64,
    },
    /// `||V|| = 0`: the unit has no direction (SPEC.md, C5).
    #[error(
        "weight_norm[{unit}]: expected ||V|| > 0, found 0: the unit has no direction (zero_norm = \"zero\" makes it a zero row)"
    )]
    ZeroNorm {
        /// The output unit, or the input column with `norm_axis = "input"`.
        unit: usize,
    },
    /// A square of a norm is no normal number, and the full gradient needs it (SPEC.md, C11).
    #[error(
        "weight_norm[{unit}]: expected a norm whose square is a normal {number}, as norm_gradient is \"full\", found {found:e}"
    )]
    Range {
        /// The output unit, or the input column with `norm_axis = "input"`.
        unit: usize,
        /// Its norm.
        found: f64,
        /// `f32` or `f64`.
        number: &'static str,
    },
    /// `W0` cannot be recovered from `W'` (SPEC.md, C6).
    #[error("unmerge: expected {expected}, found {found}: W0 cannot be recovered from the merged weight")]
    Unmerge {
        /// What unmerging divides by.
        expected: String,
        /// Its value.
        found: String,
    },
    /// Something is wrong with or within a module of a model.
    #[error("{module}: {source}")]
    Module {
        /// The module's name in the model.
        module: String,
        /// What is wrong.
        source: Box<Error>,
    },
    /// Training went wrong: the loss is not finite, or many times what it was.
    #[error("{stage}, step {step}: expected a loss that is finite and does not explode, found {loss}: {what}")]
    Diverged {
        /// The stage.
        stage: String,
        /// The step, counted from 1.
        step: usize,
        /// The loss.
        loss: f64,
        /// The first tensor that is wrong.
        what: String,
    },
    /// Somebody stopped a run, which is saved.
    #[error("{stage}: interrupted after step {step}, which is saved (--resume goes on)")]
    Interrupted {
        /// The stage.
        stage: String,
        /// Steps taken.
        step: usize,
    },
    /// A file cannot be read, or is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A name that the registry does not know, or a filter that selects nothing.
    #[error("{what}: expected {expected}, found {found:?}")]
    Unknown {
        /// What was looked up.
        what: &'static str,
        /// What there is.
        expected: String,
        /// What was asked for.
        found: String,
    },
}

/// `Result` with this crate's [`Error`](enum@Error).
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What the system says of a file.
    pub fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::File { path: path.into(), message: error.to_string() }
    }

    /// The same complaint, with the file it is about in front.
    pub fn in_file(self, path: &Path) -> Self {
        match self {
            Self::File { .. } => self,
            other => Self::File { path: path.to_path_buf(), message: other.to_string() },
        }
    }
}

/// A name that can be seen.
fn named(tensor: &str) -> &str {
    if tensor.is_empty() { "\"\"" } else { tensor }
}

/// Fails unless `found` is `expected` (SPEC.md, C1).
pub(crate) fn check_shape(tensor: &str, expected: &[usize], found: &[usize]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape { tensor: tensor.into(), expected: format!("{expected:?}"), found: found.to_vec() })
}

/// Fails at the first element that is NaN or infinite (SPEC.md, C2).
pub(crate) fn check_finite<T: crate::Scalar>(tensor: &str, values: ndarray::ArrayViewD<'_, T>) -> Result<()> {
    let finite = match values.as_slice_memory_order() {
        Some(values) => values.par_chunks(PARALLEL_ELEMENTS).all(all_finite),
        None => values.iter().all(|value| value.is_finite()),
    };
    // The index is looked for only where there is one.
    if finite {
        return Ok(());
    }
    let (index, found) = values
        .indexed_iter()
        .find(|(_, value)| !value.is_finite())
        .map(|(index, value)| (ndarray::Dimension::slice(&index).to_vec(), value.as_f64()))
        .expect("an element that is not finite");
    Err(Error::NotFinite { tensor: tensor.into(), index, found })
}
