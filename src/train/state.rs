//! What an interrupted run goes on from: one file, written to the side and renamed.

use super::blame::Sizes;
use super::config::StageTable;
use super::files::replace_tensors;
use super::optimiser::Optimiser;
use super::run::Summary;
use super::stage::{Best, Position};
use super::{Evaluation, Model};
use crate::error::check_shape;
use crate::tensor_file::TensorFile;
use crate::{Error, Result, Scalar};
use ndarray::ArrayD;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The file's name in a run's directory.
pub const STATE_FILE: &str = "state.safetensors";
/// The entry of its metadata.
const ENTRY: &str = "run";

/// What a state says beside its tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct About {
    /// The digest of configuration and data: a run goes on as it was begun.
    pub configuration: String,
    /// `"pretrain"`, `"adapt"`, or `"done"`.
    pub stage: String,
    /// Bytes of the metrics.
    pub metrics: u64,
    /// What is known of the result so far.
    pub summary: Summary,
    step: usize,
    worse: usize,
    best: Option<(usize, Evaluation)>,
    first: Option<(f64, Sizes)>,
}

/// Writes a state.
pub(super) fn save<T: Scalar>(
    directory: &Path,
    (configuration, stage, metrics): (&str, &str, u64),
    summary: &Summary,
    model: Option<&Model<T>>,
    position: Option<&Position<T>>,
) -> Result<()> {
    let mut tensors = BTreeMap::new();
    let mut add = |kind: &str, values: &BTreeMap<String, ArrayD<T>>| {
        tensors.extend(values.iter().map(|(name, values)| (format!("{kind}{name}"), values.clone())));
    };
    if let Some(model) = model {
        add("trained.", &model.trained());
    }
    if let Some(position) = position {
        add("memory.", position.optimiser.memory());
        if let Some(best) = &position.best {
            add("best.", &best.trained);
        }
    }
    let about = About {
        configuration: configuration.into(),
        stage: stage.into(),
        metrics,
        summary: summary.clone(),
        step: position.map_or(0, |position| position.step),
        worse: position.map_or(0, |position| position.worse),
        best: position.and_then(|position| position.best.as_ref()).map(|best| (best.step, best.validation)),
        first: position.and_then(|position| position.first.clone()),
    };
    let about = serde_json::to_string(&about).expect("plain data");
    replace_tensors(&directory.join(STATE_FILE), &tensors, &BTreeMap::from([(ENTRY.to_string(), about)]))
}

/// A state that has been read.
pub(super) struct State<T> {
    path: PathBuf,
    pub about: About,
    pub trained: BTreeMap<String, ArrayD<T>>,
    best: BTreeMap<String, ArrayD<T>>,
    memory: BTreeMap<String, ArrayD<T>>,
}

impl<T: Scalar> State<T> {
    /// Reads a state; `None` where there is none yet.
    pub fn read(directory: &Path, configuration: &str) -> Result<Option<Self>> {
        let path = directory.join(STATE_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let refuse = |message: String| Error::File { path: path.clone(), message };
        let file = TensorFile::open(&path)?;
        let entry = file.metadata().and_then(|metadata| metadata.get(ENTRY));
        let entry = entry.ok_or_else(|| refuse(format!("expected metadata {ENTRY:?}, found none")))?;
        let about: About =
            serde_json::from_str(entry).map_err(|error| refuse(format!("metadata {ENTRY:?}: {error}")))?;
        if about.configuration != configuration {
            let message =
                "expected the configuration and the data that the run was begun with, found others (begin a new run)";
            return Err(refuse(message.into()));
        }
        let mut state = Self { path, about, trained: BTreeMap::new(), best: BTreeMap::new(), memory: BTreeMap::new() };
        for name in file.in_order() {
            let values = file.values(&name)?.0.mapv(T::from_f64);
            let kinds = [("trained.", &mut state.trained), ("best.", &mut state.best), ("memory.", &mut state.memory)];
            for (kind, into) in kinds {
                if let Some(name) = name.strip_prefix(kind) {
                    into.insert(name.to_string(), values.clone());
                }
            }
        }
        Ok(Some(state))
    }

    /// Fails unless it is of a model that trains these tensors. C1, C7
    pub fn check(&self, trained: &BTreeMap<String, ArrayD<T>>) -> Result<()> {
        let fits = |tensor: String, values: Option<&ArrayD<T>>, like: &ArrayD<T>| {
            let expected = "a tensor to go on from".into();
            let values = values.ok_or_else(|| Error::Missing { tensor: tensor.clone(), expected })?; // C7
            check_shape(&tensor, like.shape(), values.shape()) // C1
        };
        let all = || -> Result<()> {
            for (name, like) in trained {
                fits(format!("trained.{name}"), self.trained.get(name), like)?;
                if self.about.best.is_some() {
                    fits(format!("best.{name}"), self.best.get(name), like)?;
                }
            }
            for (name, values) in &self.memory {
                let like = name.split_once('.').and_then(|(_, parameter)| trained.get(parameter));
                let (tensor, reason) = (format!("memory.{name}"), "expected one of what is trained".into());
                let like = like.ok_or_else(|| Error::Unexpected { tensor: tensor.clone(), reason })?; // C7
                fits(tensor, Some(values), like)?;
            }
            Ok(())
        };
        all().map_err(|error| error.in_file(&self.path))
    }

    /// What the stage goes on from.
    pub fn position(&self, table: &StageTable) -> Position<T> {
        let About { step, worse, best, first, .. } = &self.about;
        let best = best.map(|(step, validation)| Best { step, validation, trained: self.best.clone() });
        let optimiser = Optimiser::resumed(table.optimiser, *step as u64, self.memory.clone());
        Position { step: *step, optimiser, best, worse: *worse, first: first.clone() }
    }
}
