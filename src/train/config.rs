//! The configuration of a run, as a TOML file has it.

use super::data::DataConfig;
use super::place::{Misfit, at};
use super::{AdapterTable, Decay, OptimiserTable, Schedule};
use crate::digest::sha256;
use crate::modules::{Loss, Named, Sequential, Settings};
use crate::registry::Precision;
use crate::text_file::{LONGEST_CONFIGURATION, read_text};
use crate::{Error, Result};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};
use serde_path_to_error::Segment;
use std::path::{Path, PathBuf};

/// A run: data, a model, how it is trained, how it is adapted.
///
/// ```toml
/// seed = 0
/// [data]
/// format = "digits"
/// [model]
/// modules = [{ type = "flatten" }, { name = "fc", type = "linear", in_features = 64, out_features = 10 }]
/// [pretrain]
/// epochs = 5
/// batch_size = 32
/// optimiser = { type = "adamw", learning_rate = 1e-3 }
/// [adapt]
/// epochs = 5
/// batch_size = 32
/// optimiser = { type = "adamw", learning_rate = 1e-2 }
/// data = { format = "digits", transform = "rotate90" }
/// [adapter]
/// method = "wora"
/// rank = 4
/// lora_alpha = 8.0
/// target_modules = ["fc"]
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What fresh weights, the order of samples and dropout are drawn from.
    #[serde(default)]
    pub seed: u64,
    /// The numbers it computes with: `"f32"` or `"f64"`.
    #[serde(default)]
    pub dtype: Precision,
    /// The loss; cross-entropy where the targets are classes, and mean squared error where they are values.
    #[serde(default)]
    pub loss: Option<Loss>,
    /// The samples, of every stage that has no others.
    pub data: DataConfig,
    /// What part of the samples is kept apart.
    #[serde(default)]
    pub split: SplitTable,
    /// The model.
    pub model: ModelTable,
    /// Weights of the base model; where there are none, it is trained first.
    #[serde(default)]
    pub base: Option<PathBuf>,
    /// How the base model is trained.
    #[serde(default)]
    pub pretrain: Option<StageTable>,
    /// The adapter; with it goes `[adapt]`.
    #[serde(default)]
    pub adapter: Option<AdapterTable>,
    /// How the adapter is trained on the frozen base model.
    #[serde(default)]
    pub adapt: Option<StageTable>,
    /// What `wora compare` compares.
    #[serde(default)]
    pub compare: CompareTable,
}

/// The `[split]` table.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SplitTable {
    /// What the split is drawn from: the same for every seed of the run.
    pub seed: u64,
    /// The part that early stopping and the best model are judged by.
    pub validation: f64,
    /// The part that nothing but the result is judged by.
    pub test: f64,
}

impl Default for SplitTable {
    fn default() -> Self {
        Self { seed: 0, validation: 0.1, test: 0.2 }
    }
}

/// The `[model]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelTable {
    /// Modules, one after the other.
    pub modules: Vec<Named>,
}

/// What a stage's best model is judged by, on the validation part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Monitor {
    /// The least loss.
    #[default]
    Loss,
    /// The highest accuracy.
    Accuracy,
}

/// The `[pretrain]` and the `[adapt]` table: how a stage is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageTable {
    /// How often every sample is seen; this or `steps`.
    #[serde(default)]
    pub epochs: Option<usize>,
    /// How many steps are taken; this or `epochs`.
    #[serde(default)]
    pub steps: Option<usize>,
    /// Samples of a batch.
    pub batch_size: usize,
    /// Batches whose gradients make one step.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// The optimiser and its learning rates.
    pub optimiser: OptimiserTable,
    /// How they go up and down.
    #[serde(default)]
    pub schedule: Schedule,
    /// The norm of all gradients that is not exceeded.
    #[serde(default)]
    pub clip: Option<f64>,
    /// Steps between evaluations; those of an epoch where nothing is said.
    #[serde(default)]
    pub evaluate_every: Option<usize>,
    /// So many evaluations without a better one end the stage.
    #[serde(default)]
    pub patience: Option<usize>,
    /// What is better.
    #[serde(default)]
    pub monitor: Monitor,
    /// The samples of this stage.
    #[serde(default)]
    pub data: Option<DataConfig>,
}

fn one() -> usize {
    1
}

/// The `[compare]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CompareTable {
    /// Every method is run once a seed.
    pub seeds: Vec<u64>,
    /// The optimiser of full fine-tuning, where it is not that of the adapters.
    pub full: Option<OptimiserTable>,
}

impl Default for CompareTable {
    fn default() -> Self {
        Self { seeds: vec![0, 1, 2], full: None }
    }
}

/// A configuration, and where it was read.
///
/// ```
/// use woracle::train::{Monitor, read};
/// # let directory = tempfile::tempdir().expect("a temporary directory");
/// # let path = directory.path().join("run.toml");
/// let text = r#"
/// seed = 3
/// data = { format = "digits", scale = 0.0625 }
/// split = { test = 0.2 }
/// model = { modules = [{ type = "flatten" }, { name = "fc", type = "linear", in_features = 64, out_features = 10 }] }
///
/// [pretrain]
/// epochs = 5
/// batch_size = 32
/// optimiser = { type = "adamw", learning_rate = 1e-3 }
/// monitor = "accuracy"
/// "#;
/// std::fs::write(&path, text).expect("a file");
/// let mut read_config = read(&path)?;
/// assert_eq!((read_config.config.seed, read_config.config.split.test), (3, 0.2));
/// let stage = read_config.config.pretrain.as_ref().unwrap();
/// assert_eq!((stage.epochs, stage.accumulate, stage.monitor), (Some(5), 1, Monitor::Accuracy));
/// assert_eq!(read_config.directory(), directory.path()); // what paths are relative to
/// read_config.set_seed(4);
/// assert_eq!(read_config.config.seed, 4);
///
/// std::fs::write(&path, text.replace("batch_size", "batchsize")).expect("a file");
/// let error = read(&path).err().unwrap().to_string();
/// assert!(error.contains("batchsize"), "{error}"); // a key that there is not, and its line
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ReadConfig {
    /// What it says.
    pub config: Config,
    /// The file.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
}

/// Reads a configuration, and checks what can be checked before there are data.
///
/// # Errors
///
/// A file that cannot be read or is no TOML; a key that there is not; a value that does not fit (C4): each with its
/// line.
pub fn read(path: &Path) -> Result<ReadConfig> {
    let text = read_text(path, LONGEST_CONFIGURATION)?;
    parse(path, text)
}

pub(crate) fn parse(path: &Path, text: String) -> Result<ReadConfig> {
    let document = toml::Deserializer::parse(&text).map_err(|error| at(path, &text, error.span(), error.message()))?;
    let config: Config = serde_path_to_error::deserialize(document).map_err(|error| {
        let part = |segment: &Segment| match segment {
            Segment::Map { key } => Some(key.clone()),
            Segment::Seq { index } => Some(index.to_string()),
            Segment::Enum { variant } => Some(variant.clone()),
            Segment::Unknown => None,
        };
        let key = error.path().iter().filter_map(part).collect::<Vec<_>>().join(".");
        let inner = error.into_inner();
        let misfit = Misfit::new(key, inner.message()).with_found(&text);
        // The key says more than the span, which may be that of a whole table.
        if misfit.key.is_empty() { at(path, &text, inner.span(), inner.message()) } else { misfit.within(path, &text) }
    })?;
    config.check().map_err(|misfit| misfit.within(path, &text))?;
    Ok(ReadConfig { config, path: path.into(), text })
}

impl ReadConfig {
    /// What paths in it are relative to.
    pub fn directory(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }

    /// Has another seed than the file says.
    pub fn set_seed(&mut self, seed: u64) {
        self.config.seed = seed;
    }

    /// What tells it from any other.
    pub(super) fn digest(&self) -> String {
        sha256(format!("{}\n{}", self.config.seed, self.text))
    }

    /// A complaint about a key of it.
    pub(super) fn complain(&self, misfit: Misfit) -> Error {
        misfit.within(&self.path, &self.text)
    }

    /// The same complaint, at the module that it is about.
    pub(super) fn locate(&self, error: Error) -> Error {
        match error {
            Error::Module { module, source } => {
                let key = key_of(&self.config.model.modules, &module);
                self.complain(Misfit::new(format!("model.modules{key}"), format!("{module}: {source}")))
            }
            error => error,
        }
    }
}

/// The key of a module within `model.modules`, by its name in the model.
fn key_of(modules: &[Named], name: &str) -> String {
    let (first, rest) = name.split_once('.').unwrap_or((name, ""));
    let own = |(number, module): (usize, &Named)| module.name.clone().unwrap_or_else(|| number.to_string()) == first;
    let Some(number) = modules.iter().enumerate().position(own) else { return String::new() };
    match &modules[number].settings {
        Settings::Residual(residual) if !rest.is_empty() => {
            format!(".{number}.modules{}", key_of(&residual.modules, rest))
        }
        _ => format!(".{number}"),
    }
}

impl Config {
    fn check(&self) -> std::result::Result<(), Misfit> {
        let SplitTable { validation, test, .. } = self.split;
        for (name, share) in [("validation", validation), ("test", test)] {
            if !(0.0..1.0).contains(&share) || validation + test >= 1.0 {
                let message = format!("expected shares from 0 that leave something to train with, found {share}");
                return Err(Misfit::new(format!("split.{name}"), message));
            }
        }
        if self.model.modules.is_empty() {
            return Err(Misfit::new("model.modules", "expected modules, found none"));
        }
        // What does not depend on data: names and settings of modules.
        if let Err(error) = Sequential::<f32>::build(&self.model.modules, &mut Pcg64::seed_from_u64(0)) {
            let (module, message) = match error {
                Error::Module { module, source } => (module.clone(), format!("{module}: {source}")),
                error => (String::new(), error.to_string()),
            };
            return Err(Misfit::new(format!("model.modules{}", key_of(&self.model.modules, &module)), message));
        }
        match (&self.base, &self.pretrain) {
            (None, None) => {
                return Err(Misfit::new(
                    "",
                    "expected base = \"MODEL.safetensors\" or a table [pretrain], found neither",
                ));
            }
            (Some(_), Some(_)) => return Err(Misfit::new("base", "expected none beside [pretrain], found both")),
            _ => {}
        }
        match (&self.adapter, &self.adapt) {
            (Some(_), None) => return Err(Misfit::new("adapter", "expected a table [adapt] beside it, found none")),
            (None, Some(_)) => return Err(Misfit::new("adapt", "expected a table [adapter] beside it, found none")),
            (None, None) if self.base.is_some() => {
                return Err(Misfit::new("base", "expected something to be trained: [adapter] and [adapt]"));
            }
            _ => {}
        }
        if let Some(adapter) = &self.adapter {
            adapter.check("adapter")?;
        }
        for (name, stage, method) in [
            ("pretrain", &self.pretrain, None),
            ("adapt", &self.adapt, self.adapter.as_ref().map(|table| table.method)),
        ] {
            if let Some(stage) = stage {
                stage.optimiser.check_kinds(&format!("{name}.optimiser"), method)?;
            }
            stage.as_ref().map_or(Ok(()), |stage| stage.check(name, validation > 0.0))?;
        }
        let seeds = &self.compare.seeds;
        if seeds.is_empty() {
            return Err(Misfit::new("compare.seeds", "expected seeds, found none"));
        }
        if let Some(twice) = (1..seeds.len()).find(|&nth| seeds[..nth].contains(&seeds[nth])) {
            return Err(Misfit::new(
                "compare.seeds",
                format!("expected every seed once, found {} twice", seeds[twice]),
            ));
        }
        self.compare.full.as_ref().map_or(Ok(()), |full| full.check("compare.full"))
    }
}

impl StageTable {
    fn check(&self, key: &str, validated: bool) -> std::result::Result<(), Misfit> {
        let misfit = |name: &str, message: String| Err(Misfit::new(format!("{key}.{name}"), message));
        match (self.epochs, self.steps) {
            (None, None) => return Err(Misfit::new(key, "expected epochs or steps, found neither")),
            (Some(_), Some(_)) => return misfit("steps", "expected none beside epochs, found both".into()),
            _ => {}
        }
        let counts = [
            ("epochs", self.epochs),
            ("steps", self.steps),
            ("batch_size", Some(self.batch_size)),
            ("accumulate", Some(self.accumulate)),
            ("evaluate_every", self.evaluate_every),
            ("patience", self.patience),
        ];
        for (name, count) in counts {
            // What is counted is counted in 32 bits.
            if let Some(count) = count.filter(|count| !(1..=u32::MAX as usize).contains(count)) {
                return misfit(name, format!("expected 1 or more, up to {}, found {count}", u32::MAX));
            }
        }
        if self.patience.is_some() && !validated {
            return misfit("patience", "expected split.validation above 0 to judge by, found 0".into());
        }
        if let Some(clip) = self.clip.filter(|clip| !(clip.is_finite() && *clip > 0.0)) {
            return misfit("clip", format!("expected a positive number, found {clip}"));
        }
        if self.schedule.floor != 0.0 && self.schedule.decay == Decay::Constant {
            return misfit("schedule.floor", "expected none, as the decay is constant, found one".into());
        }
        if !(0.0..=1.0).contains(&self.schedule.floor) {
            return misfit("schedule.floor", format!("expected a number from 0 to 1, found {}", self.schedule.floor));
        }
        self.optimiser.check(&format!("{key}.optimiser"))
    }
}
