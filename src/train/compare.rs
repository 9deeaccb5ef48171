//! The same model adapted in five ways, over several seeds.
//!
//! ```no_run
//! use std::path::Path;
//! use woracle::train::{Unwatched, compare::{WAYS, compare}, read};
//! let config = read(Path::new("examples/digits-mlp.toml"))?;
//! let ways = compare(&config, Path::new("runs/compare"), &Unwatched)?; // takes minutes, and writes files
//! assert_eq!(ways.len(), WAYS.len());
//! for way in ways {
//!     println!("{}: {} {:.2} of {} numbers", way.way, way.metric, way.mean, way.parameters);
//! }
//! # Ok::<(), woracle::Error>(())
//! ```

use super::config::ReadConfig;
use super::curves::comparison;
use super::data::Split;
use super::files::replace;
use super::fitting::{adapt, check};
use super::metrics::Metrics;
use super::place::Misfit;
use super::run::{Samples, median_milliseconds};
use super::stage::{Keeper, Observer, Position, Stage};
use super::{AdapterTable, Evaluation, Model, Prepared, StageTable};
use crate::lock::Lock;
use crate::registry::Precision;
use crate::tensor_file::TensorFile;
use crate::wora::{Method, NormGradient};
use crate::{Error, Result, Scalar};
use serde::Serialize;
use std::path::Path;

/// The ways, and what people call them.
pub const WAYS: [(&str, Option<(Method, NormGradient)>); 5] = [
    ("full fine-tuning", None),
    ("LoRA", Some((Method::Lora, NormGradient::Detached))),
    ("DoRA", Some((Method::Dora, NormGradient::Detached))),
    ("WoRA, detached", Some((Method::Wora, NormGradient::Detached))),
    ("WoRA, full gradient", Some((Method::Wora, NormGradient::Full))),
];

/// What came of one way.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// The way.
    pub way: &'static str,
    /// How many numbers were trained.
    pub parameters: usize,
    /// The test part before, seed by seed.
    pub before: Vec<Evaluation>,
    /// The test part, seed by seed.
    pub test: Vec<Evaluation>,
    /// The mean of what people look at, and its standard deviation over seeds.
    pub mean: f64,
    /// 0 where there is one seed.
    pub deviation: f64,
    /// What the mean is of.
    pub metric: &'static str,
    /// The median time of a step, and the median of that over seeds.
    pub milliseconds: f64,
}

/// Trains the base model once a seed, adapts it in every way, and writes `compare.json` and `compare.svg`.
///
/// # Errors
///
/// As [`Run::finish`](super::Run::finish); a configuration without an adapter; a directory that another run writes into.
pub fn compare(config: &ReadConfig, directory: &Path, observer: &dyn Observer) -> Result<Vec<Compared>> {
    // Taken before the work: it takes minutes, and its two files are to be of one run.
    let _lock = Lock::of(directory)?;
    let all = match config.config.dtype {
        Precision::F32 => compare_in::<f32>(config, observer),
        Precision::F64 => compare_in::<f64>(config, observer),
    };
    let all = all.map_err(|error| match error {
        Error::Interrupted { stage, step } => {
            let message = format!("interrupted in {stage}, after step {step}: nothing is written");
            Error::File { path: directory.into(), message }
        }
        error => error,
    })?;
    let json = serde_json::to_string_pretty(&all).expect("plain data") + "\n";
    replace(&directory.join("compare.json"), |out| out.write_all(json.as_bytes()))?;
    let values: Vec<Vec<f64>> = all.iter().map(|one| one.test.iter().map(|test| test.headline().1).collect()).collect();
    let rows: Vec<(&str, &[f64])> = all.iter().zip(&values).map(|(one, values)| (one.way, &values[..])).collect();
    let path = directory.join("compare.svg");
    let svg = comparison(all.first().map_or("", |one| one.metric), &rows);
    replace(&path, |out| out.write_all(svg.as_bytes()))?;
    Ok(all)
}

/// What came of one way with one seed.
#[derive(Clone, Copy)]
struct OfSeed {
    parameters: usize,
    before: Evaluation,
    test: Evaluation,
    milliseconds: f64,
}

fn compare_in<T: Scalar>(read: &ReadConfig, observer: &dyn Observer) -> Result<Vec<Compared>> {
    let config = &read.config;
    let (Some(adapter), Some(table)) = (&config.adapter, &config.adapt) else {
        return Err(read.complain(Misfit::new("", "expected tables [adapter] and [adapt] to compare with, found none")));
    };
    let samples = Samples::<T>::read(read)?;
    check(read, &samples)?;
    let mut results: Vec<Vec<OfSeed>> = vec![Vec::new(); WAYS.len()];
    for &seed in &config.compare.seeds {
        let mut base = Model::<T>::new(&config.model.modules, seed).map_err(|error| read.locate(error))?;
        if let Some(table) = &config.pretrain {
            train("pretrain", table, &samples.pretrain, seed, &mut base, observer)?;
        } else if let Some(path) = config.base.as_ref().map(|base| read.directory().join(base)) {
            base.load(&TensorFile::open(&path)?).map_err(|error| error.in_file(&path))?;
        }
        let weights = base.trained();
        for ((way, how), results) in WAYS.iter().zip(&mut results) {
            let mut model = Model::<T>::new(&config.model.modules, seed)?;
            model.set_trained(&weights)?;
            let (data, split) = &samples.adapt;
            let before = Evaluation::of(&model, data, split.judge().1)?;
            let full = StageTable { optimiser: config.compare.full.unwrap_or(table.optimiser), ..table.clone() };
            let table = match how {
                None => &full,
                Some((method, norm_gradient)) => {
                    let adapter = AdapterTable { method: *method, norm_gradient: *norm_gradient, ..adapter.clone() };
                    adapt(read, &mut model, &adapter, seed)?;
                    table
                }
            };
            let milliseconds = train(way, table, &samples.adapt, !seed, &mut model, observer)?;
            let test = Evaluation::of(&model, data, split.judge().1)?;
            results.push(OfSeed { parameters: model.count_trained(), before, test, milliseconds });
        }
    }
    let compared = |(&(way, _), results): (&(&'static str, _), Vec<OfSeed>)| {
        let test: Vec<Evaluation> = results.iter().map(|result| result.test).collect();
        let values: Vec<f64> = test.iter().map(|test| test.headline().1).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = if values.len() > 1 { (squares / (values.len() - 1) as f64).sqrt() } else { 0.0 };
        let mut times: Vec<f64> = results.iter().map(|result| result.milliseconds).collect();
        times.sort_by(f64::total_cmp);
        Compared {
            way,
            parameters: results[0].parameters,
            before: results.iter().map(|result| result.before).collect(),
            metric: test[0].headline().0,
            test,
            mean,
            deviation,
            milliseconds: times[times.len() / 2],
        }
    };
    Ok(WAYS.iter().zip(results).map(compared).collect())
}

/// Runs a stage and leaves the model at its best; the median time of a step.
fn train<T: Scalar>(
    name: &str,
    table: &StageTable,
    (data, split): &(Prepared<T>, Split),
    seed: u64,
    model: &mut Model<T>,
    observer: &dyn Observer,
) -> Result<f64> {
    let aside = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
    let stage = Stage { name, table, data, split, seed, observer };
    let mut discarding = Discarding { metrics: Metrics::open(aside.path(), 0)? };
    stage.run(model, &mut Position::start(table), &mut discarding)?;
    Ok(median_milliseconds(&super::metrics::records(aside.path())?, name))
}

/// Keeps lines only, and those only for as long as the stage.
struct Discarding {
    metrics: Metrics,
}

impl<T> Keeper<T> for Discarding {
    fn metrics(&mut self) -> &mut Metrics {
        &mut self.metrics
    }
    fn keep(&mut self, _: &Model<T>, _: &Position<T>) -> Result<()> {
        Ok(())
    }
}
