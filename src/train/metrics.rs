//! `metrics.jsonl`: a line a step, a line an evaluation.

use super::Evaluation;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The file's name in a run's directory.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// A line of the file. All but `seconds` is the same in every run of the same configuration.
///
/// ```
/// use woracle::train::Record;
/// let line = r#"{"stage":"adapt","step":1,"epoch":0,"loss":0.5,"rate":1.0,"gradient_norm":2.0,"seconds":0.01}"#;
/// let record: Record = serde_json::from_str(line).unwrap();
/// assert!(matches!(&record, Record::Step { step: 1, loss, .. } if *loss == 0.5));
/// assert_eq!(serde_json::to_string(&record).unwrap(), line);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// A step.
    Step {
        /// `"pretrain"` or `"adapt"`.
        stage: String,
        /// Counted from 1.
        step: usize,
        /// Counted from 0.
        epoch: usize,
        /// The mean loss of the step's samples, before the step.
        loss: f64,
        /// What the learning rates were multiplied by.
        rate: f64,
        /// The norm of all gradients, before it is clipped.
        gradient_norm: f64,
        /// How long the step took.
        seconds: f64,
    },
    /// An evaluation on the validation part.
    Evaluation {
        /// `"pretrain"` or `"adapt"`.
        stage: String,
        /// The steps before it.
        step: usize,
        /// What was found.
        validation: Evaluation,
        /// alpha, beta and the mean of the magnitude of every adapted module, as far as it has them.
        scales: BTreeMap<String, BTreeMap<String, f64>>,
        /// How long it took.
        seconds: f64,
    },
}

/// The file while it is written.
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Metrics {
    /// The file as it was when it had this many bytes: what came later is done again.
    pub fn open(directory: &Path, length: u64) -> Result<Self> {
        let path = directory.join(METRICS_FILE);
        let failed = |error: std::io::Error| Error::io(&path, &error);
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?.len();
        if found < length {
            let message = format!("expected the {length} bytes that were there, found {found}");
            return Err(Error::File { path, message });
        }
        file.set_len(length).map_err(failed)?;
        Ok(Self { path, file, length })
    }

    /// Adds a line.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let line = serde_json::to_string(record).expect("plain data") + "\n";
        self.file.write_all(line.as_bytes()).map_err(|error| Error::io(&self.path, &error))?;
        self.length += line.len() as u64;
        Ok(())
    }

    /// How many bytes there are.
    pub fn length(&self) -> u64 {
        self.length
    }
}

/// Every record of a run.
pub(crate) fn records(directory: &Path) -> Result<Vec<Record>> {
    let path = directory.join(METRICS_FILE);
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, &error))?;
    let parse = |(number, line): (usize, &str)| {
        let refuse = |error| Error::File { path: path.clone(), message: format!("line {}: {error}", number + 1) };
        serde_json::from_str(line).map_err(refuse)
    };
    text.lines().enumerate().map(parse).collect()
}
