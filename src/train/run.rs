//! A run: the base model, the adapter on it, and what came of it.

use super::config::ReadConfig;
use super::curves::curves;
use super::data::{Dataset, Split, load, split, vocabulary};
use super::files::{replace, replace_tensors};
use super::fitting::{adapt, check};
use super::metrics::{Metrics, Record, records};
use super::place::Misfit;
use super::stage::{Keeper, Observer, Position, Stage};
use super::state::{STATE_FILE, State, save};
use super::{AdapterTable, Evaluation, Model, Prepared};
use crate::aside::{PREFIX, check_directory};
use crate::digest::hexadecimal;
use crate::dtype::Dtype;
use crate::lock::Lock;
use crate::peft;
use crate::registry::Precision;
use crate::tensor_file::TensorFile;
use crate::wora::Method;
use crate::{Error, Result, Scalar};
use ndarray::ArrayD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// What is written into a run's directory.
const BASE: &str = "base";
const ADAPTER: &str = "adapter";
const MERGED: &str = "merged";

/// Whether a run begins or goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It begins: the directory is empty or not there.
    Fresh,
    /// It goes on, or begins where there is nothing to go on from.
    Resume,
}

/// What came of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The seed.
    pub seed: u64,
    /// The part that results are judged by: `"test"`, which has no say in training; where there is none `"validation"`,
    /// which chooses the best model, or `"train"`.
    pub judged_by: String,
    /// What became of the base model; `None` where it was read.
    pub pretrain: Option<Trained>,
    /// What became of the adapter; `None` without one.
    pub adapt: Option<Adapted>,
}

/// A stage, by its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// How many numbers were trained.
    pub parameters: usize,
    /// Steps taken.
    pub steps: usize,
    /// The step whose model was best, and is kept.
    pub best_step: usize,
    /// On the part that results are judged by.
    pub test: Evaluation,
    /// The median time of a step.
    pub milliseconds: f64,
}

/// An adapter, by its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adapted {
    /// The method.
    pub method: Method,
    /// The stage.
    pub trained: Trained,
    /// The base model on the same test part.
    pub base: Evaluation,
    /// The model with the adapter merged into its weights, read back from the files.
    pub merged: Evaluation,
    /// Whether merged and unmerged model are as good.
    pub equal: bool,
    /// Whether the base weights are the same bits as before.
    pub base_unchanged: bool,
}

/// A run in its directory.
///
/// ```
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// use woracle::train::{METRICS_FILE, Observer, Progress, Run, STATE_FILE, Start, Unwatched, read};
/// use woracle::Error;
/// # let directory = tempfile::tempdir().expect("a temporary directory");
/// # let path = directory.path().join("run.toml");
/// std::fs::write(
///     &path,
///     r#"
///     data = { format = "digits", scale = 0.0625 }
///     [model]
///     modules = [{ type = "flatten" }, { name = "fc", type = "linear", in_features = 64, out_features = 10 }]
///     [pretrain]
///     steps = 6
///     batch_size = 16
///     optimiser = { type = "sgd", learning_rate = 0.1 }
///     "#,
/// )
/// .expect("a file");
/// let config = read(&path)?;
///
/// /// Stops a run after so many steps.
/// struct Impatient(AtomicUsize);
/// impl Observer for Impatient {
///     fn watch(&self, progress: &Progress<'_>) {
///         self.0.store(progress.step, Ordering::Relaxed);
///     }
///     fn stops(&self) -> bool {
///         self.0.load(Ordering::Relaxed) >= 3
///     }
/// }
/// let out = directory.path().join("out");
/// let stopped = Run::new(&config, &out, Start::Fresh)?.finish(&Impatient(AtomicUsize::new(0)));
/// assert!(matches!(stopped, Err(Error::Interrupted { step: 4, .. }))); // asked before it sees a step
/// assert!(out.join(STATE_FILE).exists());
///
/// let summary = Run::new(&config, &out, Start::Resume)?.finish(&Unwatched)?; // the two steps that are left
/// assert_eq!(summary.pretrain.as_ref().unwrap().steps, 6);
/// let lines = std::fs::read_to_string(out.join(METRICS_FILE)).expect("a file");
/// assert!(lines.lines().filter(|line| line.contains("gradient_norm")).count() == 6);
/// # Ok::<(), Error>(())
/// ```
pub struct Run<'c> {
    config: &'c ReadConfig,
    directory: PathBuf,
    start: Start,
    trace: usize,
}

impl<'c> Run<'c> {
    /// A run that is going to write into this directory, once it is known that it can be run.
    ///
    /// # Errors
    ///
    /// A directory that has something in it where the run begins; a path that is none of a directory.
    pub fn new(config: &'c ReadConfig, directory: &Path, start: Start) -> Result<Self> {
        let run = Self { config, directory: directory.into(), start, trace: 0 };
        check_directory(directory)?;
        // Another that is at it is no run to go on with.
        Lock::check_free(directory)?;
        run.check_vacant()?;
        Ok(run)
    }

    fn check_vacant(&self) -> Result<()> {
        // What a run that was killed has left hinders nobody.
        let is_result = |entry: &std::io::Result<std::fs::DirEntry>| {
            entry.as_ref().map_or(true, |entry| !entry.file_name().to_string_lossy().starts_with(PREFIX))
        };
        let mut results = std::fs::read_dir(&self.directory).into_iter().flatten().filter(is_result);
        let (Start::Fresh, Some(entry)) = (self.start, results.next()) else { return Ok(()) };
        let found = entry.map_err(|error| Error::io(&self.directory, &error))?.file_name();
        let message =
            format!("expected a directory that is empty or not there, found {} (--resume goes on)", found.display());
        Err(Error::File { path: self.directory.clone(), message })
    }

    /// Takes the directory, as long as the run: two runs do not write into one.
    fn begin(&self) -> Result<Lock> {
        let lock = Lock::of(&self.directory)?;
        // Another may have begun and ended since.
        self.check_vacant()?;
        Ok(lock)
    }

    /// The same, writing the first steps of every stage down for others to repeat: the tensors they start from and the
    /// batches, in `trace-STAGE.safetensors`.
    pub fn tracing(self, steps: usize) -> Self {
        Self { trace: steps, ..self }
    }

    /// Takes every step that is left, and writes everything down.
    ///
    /// # Errors
    ///
    /// Data or a base that cannot be read or do not fit the model, before anything is written; a directory that cannot be
    /// made or that another run writes into; a loss that diverges; a file that cannot be written; an observer that stops
    /// it.
    pub fn finish(&self, observer: &dyn Observer) -> Result<Summary> {
        match self.config.config.dtype {
            Precision::F32 => self.run::<f32>(observer),
            Precision::F64 => self.run::<f64>(observer),
        }
    }

    fn run<T: Scalar>(&self, observer: &dyn Observer) -> Result<Summary> {
        let config = &self.config.config;
        let samples = Samples::<T>::read(self.config)?;
        check(self.config, &samples)?;
        let begun = self.directory.join(STATE_FILE).exists();
        let base = config.base.as_ref().filter(|_| !begun).map(|base| self.config.directory().join(base));
        let base = base.map(|path| self.base_model::<T>(&path)).transpose()?;
        let digest = format!("{}-{}", self.config.digest(), samples.digest());
        self.state::<T>(&digest)?;
        let _lock = self.begin()?;
        // Another may have gone on until the lock was free.
        let state = self.state::<T>(&digest)?;
        let mut keeper = InDirectory::<T> {
            run: self,
            digest,
            stage: if config.pretrain.is_some() { "pretrain" } else { "adapt" },
            summary: Summary {
                seed: config.seed,
                judged_by: samples.pretrain.1.judge().0.into(),
                ..Summary::default()
            },
            metrics: Metrics::open(&self.directory, state.as_ref().map_or(0, |state| state.about.metrics))?,
            numbers: std::marker::PhantomData,
        };
        let mut resumed = state;
        if let Some(state) = &resumed {
            keeper.summary = state.about.summary.clone();
            match state.about.stage.as_str() {
                "done" => return Ok(keeper.summary),
                "adapt" => keeper.stage = "adapt",
                _ => {}
            }
        }
        let base_path = self.directory.join(BASE).join(peft::MODEL_FILE);
        if let Some(table) = &config.pretrain
            && resumed.as_ref().is_none_or(|state| state.about.stage == "pretrain")
        {
            let mut model = Model::<T>::new(&config.model.modules, config.seed)?;
            let (data, split) = &samples.pretrain;
            let stage = Stage { name: "pretrain", table, data, split, seed: config.seed, observer };
            let mut position = go_on(resumed.take(), table, &mut model)?;
            self.trace(&stage, &model)?;
            stage.run(&mut model, &mut position, &mut keeper)?;
            keeper.summary.pretrain = Some(self.trained(&stage, &model, &position)?);
            self.write_base(&model)?;
            keeper.next(if config.adapt.is_some() { "adapt" } else { "done" })?;
        } else if let Some(base) = base.filter(|_| resumed.is_none()) {
            self.write_base(&base)?;
        }
        if let (Some(table), Some(adapter)) = (&config.adapt, &config.adapter) {
            let (data, split) = &samples.adapt;
            let mut model = self.base_model::<T>(&base_path)?;
            let base = Evaluation::of(&model, data, split.judge().1)?;
            adapt(self.config, &mut model, adapter, config.seed)?;
            let stage = Stage { name: "adapt", table, data, split, seed: !config.seed, observer };
            let mut position = go_on(resumed.take(), table, &mut model)?;
            self.trace(&stage, &model)?;
            stage.run(&mut model, &mut position, &mut keeper)?;
            let trained = self.trained(&stage, &model, &position)?;
            self.write_adapter(&mut model, adapter)?;
            let base_unchanged = self.is_unchanged(&model, &base_path)?;
            let merged = self.merged::<T>()?;
            let merged = Evaluation::of(&merged, data, split.judge().1)?;
            let equal = as_good::<T>(&trained.test, &merged);
            let method = adapter.method;
            keeper.summary.adapt = Some(Adapted { method, trained, base, merged, equal, base_unchanged });
        }
        self.write_results(&keeper.summary)?;
        keeper.next("done")?;
        Ok(keeper.summary)
    }

    /// The state that there is, if any, once it is known that the run can go on from it.
    fn state<T: Scalar>(&self, digest: &str) -> Result<Option<State<T>>> {
        let config = &self.config.config;
        let state = State::<T>::read(&self.directory, digest)?;
        if let Some(state) = state.as_ref().filter(|state| !state.trained.is_empty()) {
            let mut model = Model::<T>::new(&config.model.modules, config.seed)?;
            if let Some(adapter) = config.adapter.as_ref().filter(|_| state.about.stage == "adapt") {
                adapt(self.config, &mut model, adapter, config.seed)?;
            }
            state.check(&model.trained())?;
        }
        Ok(state)
    }

    /// The base model from its file.
    fn base_model<T: Scalar>(&self, path: &Path) -> Result<Model<T>> {
        let mut model = Model::new(&self.config.config.model.modules, self.config.config.seed)?;
        model.load(&TensorFile::open(path)?).map_err(|error| error.in_file(path))?;
        Ok(model)
    }

    fn write_base<T: Scalar>(&self, model: &Model<T>) -> Result<()> {
        let directory = self.directory.join(BASE);
        std::fs::create_dir_all(&directory).map_err(|error| Error::io(&directory, &error))?;
        let weights = model.parameters().into_iter().map(|parameter| (parameter.name, parameter.values.to_owned()));
        let format = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        replace_tensors(&directory.join(peft::MODEL_FILE), &weights.collect(), &format)
    }

    fn write_adapter<T: Scalar>(&self, model: &mut Model<T>, adapter: &AdapterTable) -> Result<()> {
        let directory = self.directory.join(ADAPTER);
        clear(&directory)?;
        peft::save(&directory, &adapter.to_peft()?, &model.adapters(), Dtype::of_scalar::<T>())
    }

    /// Whether what is frozen is what was in the file.
    fn is_unchanged<T: Scalar>(&self, model: &Model<T>, path: &Path) -> Result<bool> {
        let file = TensorFile::open(path)?;
        for parameter in model.parameters().into_iter().filter(|parameter| !parameter.trained) {
            let before = file.values(&parameter.name)?.0;
            let same = before.iter().zip(parameter.values).all(|(a, b)| a.to_bits() == b.as_f64().to_bits());
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The model whose weights `wora merge` makes of the files.
    fn merged<T: Scalar>(&self) -> Result<Model<T>> {
        let out = self.directory.join(MERGED);
        clear(&out)?;
        let base = peft::Model::open(&self.directory.join(BASE).join(peft::MODEL_FILE))?;
        let adapter = peft::Checkpoint::open(&self.directory.join(ADAPTER))?;
        peft::merge(&base, &[adapter], peft::MergeOptions::default(), &out, &|_| Ok(()))?;
        self.base_model(&out.join(peft::MODEL_FILE))
    }

    fn trained<T: Scalar>(&self, stage: &Stage<'_, T>, model: &Model<T>, position: &Position<T>) -> Result<Trained> {
        Ok(Trained {
            parameters: model.count_trained(),
            steps: position.step,
            best_step: position.best.as_ref().map_or(position.step, |best| best.step),
            test: Evaluation::of(model, stage.data, stage.split.judge().1)?,
            milliseconds: median_milliseconds(&records(&self.directory)?, stage.name),
        })
    }

    fn write_results(&self, summary: &Summary) -> Result<()> {
        let svg = curves(&records(&self.directory)?);
        replace(&self.directory.join("curves.svg"), |out| out.write_all(svg.as_bytes()))?;
        replace(&self.directory.join("config.toml"), |out| out.write_all(self.config.text.as_bytes()))?;
        let json = serde_json::to_string_pretty(summary).expect("plain data") + "\n";
        replace(&self.directory.join("summary.json"), |out| out.write_all(json.as_bytes()))
    }

    /// Writes down what a stage starts from and its first batches.
    fn trace<T: Scalar>(&self, stage: &Stage<'_, T>, model: &Model<T>) -> Result<()> {
        if self.trace == 0 {
            return Ok(());
        }
        let mut tensors: BTreeMap<String, ArrayD<T>> = model
            .parameters()
            .into_iter()
            .map(|parameter| {
                let kind = if parameter.trained { "trained" } else { "frozen" };
                (format!("{kind}.{}", parameter.name), parameter.values.to_owned())
            })
            .collect();
        let mut order = None;
        for step in 0..self.trace.min(stage.steps()) {
            for (number, samples) in stage.batches(step, &mut order).iter().enumerate() {
                let (x, targets) = stage.data.batch(samples);
                // Ids and classes are numbers small enough to be exact.
                let ids = |ids: ArrayD<i64>| ids.mapv(|id| T::from_f64(id as f64));
                let x = match x {
                    crate::modules::Signal::Values(values) => values,
                    crate::modules::Signal::Ids(x) => ids(x),
                };
                let targets = match targets {
                    crate::modules::Targets::Values(values) => values,
                    crate::modules::Targets::Classes(classes) => ids(classes),
                };
                tensors.insert(format!("batch.{step}.{number}.x"), x);
                tensors.insert(format!("batch.{step}.{number}.targets"), targets);
            }
        }
        let path = self.directory.join(format!("trace-{}.safetensors", stage.name));
        replace_tensors(&path, &tensors, &BTreeMap::new())
    }
}

/// Takes away what an earlier end of the same run has left.
fn clear(directory: &Path) -> Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(directory, &error)),
        _ => Ok(()),
    }
}

/// The position that a state has of this stage, or the start.
fn go_on<T: Scalar>(state: Option<State<T>>, table: &super::StageTable, model: &mut Model<T>) -> Result<Position<T>> {
    match state {
        Some(state) if !state.trained.is_empty() => {
            model.set_trained(&state.trained)?;
            Ok(state.position(table))
        }
        _ => Ok(Position::start(table)),
    }
}

/// What is merged rounds otherwise: losses are the same but for that. The accuracy of single samples is the same
/// number; of the many characters of a text, one in a thousand batches may be a tie.
fn as_good<T: Scalar>(unmerged: &Evaluation, merged: &Evaluation) -> bool {
    let near = (unmerged.loss - merged.loss).abs() <= 1000.0 * T::UNIT_ROUNDOFF * unmerged.loss.abs().max(1e-3);
    near && (unmerged.bits.is_some() || unmerged.accuracy == merged.accuracy)
}

pub(super) fn median_milliseconds(records: &[Record], of: &str) -> f64 {
    let seconds = records.iter().filter_map(|record| match record {
        Record::Step { stage, seconds, .. } if stage == of => Some(*seconds),
        _ => None,
    });
    let mut seconds: Vec<f64> = seconds.collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).map_or(0.0, |seconds| 1e3 * seconds)
}

/// The samples of a run, and how they are split.
pub(super) struct Samples<T> {
    pub pretrain: (Prepared<T>, Split),
    pub adapt: (Prepared<T>, Split),
    pub classes: Option<usize>,
}

impl<T: Scalar> Samples<T> {
    /// What tells them from any others.
    fn digest(&self) -> String {
        let mut hash = Sha256::new();
        let all = self.pretrain.0.bytes().chain(self.adapt.0.bytes());
        all.for_each(|number| hash.update(number));
        hexadecimal(hash)
    }

    pub fn read(read: &ReadConfig) -> Result<Self> {
        let config = &read.config;
        let of = |stage: &Option<super::StageTable>| {
            stage.as_ref().and_then(|stage| stage.data.clone()).unwrap_or_else(|| config.data.clone())
        };
        let tables = [of(&config.pretrain), of(&config.adapt)];
        let keys = ["pretrain.data", "adapt.data"].map(|key| {
            let own = if key == "adapt.data" { &config.adapt } else { &config.pretrain };
            if own.as_ref().is_some_and(|stage| stage.data.is_some()) { key } else { "data" }
        });
        let complain = |key: &str, error: Error| match error {
            Error::File { .. } => error,
            error => read.complain(Misfit::new(key, error.to_string())),
        };
        let vocabulary = vocabulary(&tables.each_ref(), read.directory()).map_err(|error| complain("data", error))?;
        let mut sets = Vec::new();
        for (table, key) in tables.iter().zip(keys) {
            let set = load(table, read.directory(), vocabulary.as_ref());
            sets.push(set.map_err(|error| complain(key, error))?);
        }
        let classes = sets.iter().filter_map(|set| set.classes).max();
        let mut prepared = sets.into_iter().map(|set: Dataset| {
            let parts = split(&set, config.split.validation, config.split.test, config.split.seed);
            let parts = parts.map_err(|error| complain("split", error))?;
            Ok((Prepared::new(set, config.loss).map_err(|error| complain("loss", error))?, parts))
        });
        let mut next = || prepared.next().expect("two sets");
        Ok(Self { pretrain: next()?, adapt: next()?, classes })
    }
}

impl Split {
    /// What a result is judged by: the test part, or where there is none the best there is; and its name.
    pub(super) fn judge(&self) -> (&'static str, &[usize]) {
        let parts = [("test", &self.test), ("validation", &self.validation), ("train", &self.train)];
        let judge = parts.into_iter().find(|(_, part)| !part.is_empty());
        judge.map_or(("nothing", &[]), |(name, part)| (name, part))
    }
}

/// Keeps what a stage does in the run's directory.
struct InDirectory<'r, T> {
    run: &'r Run<'r>,
    digest: String,
    stage: &'static str,
    summary: Summary,
    metrics: Metrics,
    numbers: std::marker::PhantomData<fn() -> T>,
}

impl<T: Scalar> InDirectory<'_, T> {
    /// The stage is over, and this one is next.
    fn next(&mut self, stage: &'static str) -> Result<()> {
        self.stage = stage;
        let about = (self.digest.as_str(), stage, self.metrics.length());
        save::<T>(&self.run.directory, about, &self.summary, None, None)
    }
}

impl<T: Scalar> Keeper<T> for InDirectory<'_, T> {
    fn metrics(&mut self) -> &mut Metrics {
        &mut self.metrics
    }
    fn keep(&mut self, model: &Model<T>, position: &Position<T>) -> Result<()> {
        let about = (self.digest.as_str(), self.stage, self.metrics.length());
        save(&self.run.directory, about, &self.summary, Some(model), Some(position))
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = &self.judged_by;
        if let Some(Trained { parameters, steps, test, milliseconds, .. }) = &self.pretrain {
            writeln!(f, "pretrain: {parameters} parameters, {steps} steps of {milliseconds:.2} ms, {by} {test}")?;
        }
        let Some(Adapted { method, trained, base, merged, equal, base_unchanged }) = &self.adapt else {
            return write!(
                f,
                "{by} {}",
                self.pretrain.as_ref().map_or_else(String::new, |trained| trained.test.to_string())
            );
        };
        let Trained { parameters, steps, test, milliseconds, .. } = trained;
        writeln!(
            f,
            "adapt: {method}, {parameters} parameters, {steps} steps of {milliseconds:.2} ms, test {base} before"
        )?;
        let unchanged = if *base_unchanged { "unchanged to the bit" } else { "CHANGED" };
        writeln!(f, "base weights: {unchanged}")?;
        let relation = if *equal { "equal" } else { "NOT EQUAL" };
        write!(f, "{by}: unmerged {test}, merged {merged}: {relation}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merged_model_is_as_good_where_it_only_rounds_otherwise() {
        let of = |loss: f64, accuracy: f64, bits: Option<f64>| Evaluation { loss, accuracy: Some(accuracy), bits };
        let unmerged = of(2.0, 0.5, None);
        for (merged, good) in [
            (of(2.0 + 500.0 * f64::EPSILON, 0.5, None), true),
            (of(2.0 + 4000.0 * f64::EPSILON, 0.5, None), false),
            (of(2.0, 0.75, None), false),
        ] {
            assert_eq!(as_good::<f64>(&unmerged, &merged), good, "{merged:?}");
        }
        assert!(as_good::<f32>(&unmerged, &of(2.0 + 1e-5, 0.5, None)));
        assert!(as_good::<f64>(&of(2.0, 0.5, Some(3.0)), &of(2.0, 0.501, Some(3.0))), "a tie of many characters");
    }
}
