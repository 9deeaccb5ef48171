//! Whether a configuration, its data and its model fit together, before anything is trained or written.

use super::config::ReadConfig;
use super::data::Split;
use super::place::Misfit;
use super::run::Samples;
use super::{AdapterTable, Model, Monitor, Prepared};
use crate::modules::{Loss, Pass};
use crate::{Error, Result, Scalar};

/// Fails where a stage could not be run.
pub(super) fn check<T: Scalar>(read: &ReadConfig, samples: &Samples<T>) -> Result<()> {
    let config = &read.config;
    let mut model = Model::<T>::new(&config.model.modules, config.seed).map_err(|error| read.locate(error))?;
    let stages = [("pretrain", &config.pretrain, &samples.pretrain), ("adapt", &config.adapt, &samples.adapt)];
    for (name, table, (data, split)) in stages {
        let Some(table) = table else { continue };
        if table.monitor == Monitor::Accuracy && data.loss() != Loss::CrossEntropy {
            let message = "expected \"loss\", as the targets are values, found \"accuracy\"";
            return Err(read.complain(Misfit::new(format!("{name}.monitor"), message)));
        }
        fits(read, &model, data, split, samples.classes)?;
    }
    config.adapter.as_ref().map_or(Ok(()), |adapter| adapt(read, &mut model, adapter, config.seed))
}

/// Fails unless samples go through the model, and there are as many scores as classes.
fn fits<T: Scalar>(
    read: &ReadConfig,
    model: &Model<T>,
    data: &Prepared<T>,
    split: &Split,
    classes: Option<usize>,
) -> Result<()> {
    let complain = |message: String| read.complain(Misfit::new("model.modules", message));
    for sample in [split.train[0]].into_iter().chain(data.extremes()) {
        let (x, targets) = data.batch(&[sample]);
        let forward = model.forward(x, &Pass::evaluation()).map_err(|error| match error {
            Error::Module { module, source } if matches!(*source, Error::IdOutOfRange { .. }) => {
                read.locate(Error::Module { module: module.clone(), source: Box::new(of_sample(sample, *source)) })
            }
            error => read.locate(error),
        });
        let (y, _) = forward?;
        let scores = y.shape().last().copied().unwrap_or(0);
        if let Some(classes) = classes.filter(|&classes| scores < classes) {
            return Err(complain(format!(
                "expected scores of {classes} classes, as the data have them, found {scores}"
            )));
        }
        data.loss().evaluate(y, &targets).map_err(|error| complain(error.to_string()))?;
    }
    Ok(())
}

fn of_sample(sample: usize, error: Error) -> Error {
    Error::Unexpected { tensor: format!("sample {sample}"), reason: error.to_string() }
}

/// Puts the adapters on a model.
pub(super) fn adapt<T: Scalar>(
    read: &ReadConfig,
    model: &mut Model<T>,
    adapter: &AdapterTable,
    seed: u64,
) -> Result<()> {
    model.adapt(adapter, seed).map(drop).map_err(|error| match error {
        Error::Setting { name, expected, found } => {
            let message = format!("expected {expected}, found {found}");
            read.complain(Misfit::new(format!("adapter.{name}"), message))
        }
        error => read.locate(error),
    })
}
