//! Case files for others to check themselves by, and the manifest that says what is in each. SPEC.md, section 11.
//!
//! Answers come from the definition alone, in f64 and in a fixed order, rounded once at the end: the same seed gives
//! the same bytes on every machine.
//!
//! ```
//! use woracle::oracle::golden::{Options, cases};
//! let (entry, bytes) = cases("linear-plain", Options::default())?.next().expect("a case")?;
//! assert_eq!(entry.file, "linear-plain.safetensors");
//! assert!(entry.catches.iter().any(|id| *id == "bias-scaled"));
//! # let _ = bytes;
//! # Ok::<(), woracle::Error>(())
//! ```

use super::case_file::FORMAT;
use super::diagnose::is_result;
use super::verify::{SLACK, Tolerance, Verdict, expected};
use super::{CaseFile, Dtype};
use crate::Result;
use crate::cases::{Spec, Twist};
use crate::digest::sha256;
use crate::mistakes::{of_layer, results};
use crate::registry::{Subject, choose, specs, with_mistakes};
use serde::Serialize;
use serde_json::{Map, Value};

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// The type of every floating-point tensor.
    pub dtype: Dtype,
    /// The seed of the cases' numbers.
    pub seed: u64,
    /// Whether the answers are written beside the inputs; without, it is a blind test.
    pub answers: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { dtype: Dtype::F64, seed: 0, answers: true }
    }
}

/// What a directory of case files holds: `manifest.json`.
///
/// ```
/// use woracle::oracle::golden::{Judged, Manifest, Options, cases};
/// let options = Options::default();
/// let all = cases("linear-exact", options)?;
/// assert_eq!(all.names().next(), Some("linear-exact"));
/// let entries = all.map(|case| Ok(case?.0)).collect::<woracle::Result<Vec<_>>>()?;
/// let manifest = Manifest::new(options, entries);
/// assert!(matches!(manifest.cases[0].tolerance, Judged::Exact)); // bit for bit
/// assert!(manifest.to_json().contains(r#""file": "linear-exact.safetensors""#));
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct Manifest {
    /// The version of the case files and of this.
    pub format: u64,
    /// What wrote it.
    pub generator: String,
    /// The version of what wrote it.
    pub generator_version: String,
    /// The seed of the cases' numbers.
    pub seed: u64,
    /// The type of every floating-point tensor.
    pub dtype: Dtype,
    /// Whether the files hold answers.
    pub answers: bool,
    /// One entry a file.
    pub cases: Vec<Entry>,
}

/// One case file.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// The file's name.
    pub file: String,
    /// The SHA-256 of its bytes, in hexadecimal digits.
    pub sha256: String,
    /// The layer.
    pub layer: &'static str,
    /// The settings in its metadata.
    pub settings: Map<String, Value>,
    /// Why the case exists: what sets it apart.
    pub why: String,
    /// The ids of the mistakes that `wora verify` rejects in it.
    pub catches: Vec<&'static str>,
    /// How an answer is judged.
    pub tolerance: Judged,
}

/// How an answer is judged.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "tier", rename_all = "lowercase")]
pub enum Judged {
    /// As a number, bit for bit.
    Exact,
    /// `slack (u + 2^-53) epsilon`, with the epsilon of SPEC.md, section 8.5.
    Rounded {
        /// The slack.
        slack: f64,
        /// u.
        unit_roundoff: f64,
    },
}

impl Manifest {
    /// The manifest of these files.
    pub fn new(options: Options, cases: Vec<Entry>) -> Self {
        let Options { dtype, seed, answers } = options;
        let (generator, generator_version) = ("woracle".into(), env!("CARGO_PKG_VERSION").into());
        Self { format: FORMAT, generator, generator_version, seed, dtype, answers, cases }
    }

    /// The text of `manifest.json`.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data") + "\n"
    }
}

/// The cases that `wora check` calls large are for this crate's own thresholds; nor is what underflows a case in f16.
fn is_written(spec: &Spec, dtype: Dtype) -> bool {
    !spec.name.contains("large") && (dtype != Dtype::F16 || spec.twist != Twist::Tiny)
}

/// Every case whose name is `filter`, or contains it: its entry and the bytes of its file, one after the other.
///
/// # Errors
///
/// A filter that selects nothing.
pub fn cases(filter: &str, options: Options) -> Result<Cases> {
    let written = specs().filter(|(_, spec)| is_written(spec, options.dtype)).collect();
    let chosen = choose(written, filter, |(_, spec)| spec.name, "a case's name (wora check --list)")?;
    Ok(Cases { options, left: chosen.into_iter() })
}

/// The cases that are to be written, each made when it is asked for.
pub struct Cases {
    options: Options,
    left: std::vec::IntoIter<(&'static dyn Subject, &'static Spec)>,
}

impl Cases {
    /// The names of those that are left.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.left.as_slice().iter().map(|(_, spec)| spec.name)
    }
}

impl Iterator for Cases {
    type Item = Result<(Entry, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left.next().map(|(layer, spec)| one(layer, spec, self.options))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.left.size_hint()
    }
}

impl ExactSizeIterator for Cases {}

fn one(layer: &'static dyn Subject, spec: &Spec, options: Options) -> Result<(Entry, Vec<u8>)> {
    let Options { dtype, seed, answers } = options;
    let blind = CaseFile::rounded(layer.draw(spec, seed), dtype);
    let mut case = blind.case.clone();
    case.extend(layer.define(&case)?);
    let answered = CaseFile::rounded(case, dtype);
    let catches = catches(layer, &answered)?;
    let file = if answers { answered } else { blind };
    let bytes = file.to_bytes();
    let entry = Entry {
        file: format!("{}.safetensors", spec.name),
        sha256: sha256(&bytes),
        layer: layer.name(),
        settings: file.case.settings,
        why: spec.why(),
        catches,
        tolerance: match spec.twist {
            Twist::Exact => Judged::Exact,
            _ => Judged::Rounded { slack: SLACK, unit_roundoff: dtype.unit_roundoff() },
        },
    };
    Ok((entry, bytes))
}

/// The mistakes whose y and gradients, rounded to the file's type, are rejected.
fn catches(layer: &dyn Subject, file: &CaseFile) -> Result<Vec<&'static str>> {
    let expected = expected(file, Tolerance::default())?;
    with_mistakes(layer, &file.case, &layer.define(&file.case)?, |spoiling| {
        let mut caught = vec![];
        for mistake in of_layer(layer.name()) {
            let Some(mut theirs) = results(&[mistake], spoiling)? else { continue };
            theirs.retain(|name, _| is_result(name));
            let mut case = file.case.clone();
            case.extend(theirs);
            let judged = expected.judge(&CaseFile::rounded(case, file.dtype("y")));
            let rejected = judged.iter().any(|tensor| tensor.verdict != Verdict::Pass);
            caught.extend(rejected.then_some(mistake.id));
        }
        Ok(caught)
    })
}
