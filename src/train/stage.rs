//! A stage: the same model on the same samples, step by step. SPEC.md, section 14.1.

use super::blame;
use super::config::StageTable;
use super::data::{Split, shuffled};
use super::metrics::{Metrics, Record};
use super::optimiser::{Optimiser, clip};
use super::seeds::seed_of;
use super::{Evaluation, Model, Prepared};
use crate::modules::Pass;
use crate::wora::Workspace;
use crate::{Error, Result, Scalar};
use ndarray::ArrayD;
use std::collections::BTreeMap;
use std::time::Instant;

/// How far a stage has come.
#[derive(Clone, Debug)]
pub struct Progress<'a> {
    /// `"pretrain"` or `"adapt"`.
    pub stage: &'a str,
    /// Steps taken.
    pub step: usize,
    /// Steps that there are.
    pub steps: usize,
    /// The loss of the last step.
    pub loss: f64,
    /// The last evaluation.
    pub validation: Option<Evaluation>,
}

/// Who watches a run, and may stop it.
pub trait Observer: Sync {
    /// Sees how far a stage has come, after every step.
    fn watch(&self, _progress: &Progress<'_>) {}
    /// Whether the run is to be saved and stopped: asked after every step, before [`Observer::watch`] sees it.
    fn stops(&self) -> bool {
        false
    }
}

/// Nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Observer for Unwatched {}

/// A loss this many times as large as the first is an explosion.
const EXPLOSION: f64 = 1000.0;

/// The best model so far.
#[derive(Clone)]
pub(super) struct Best<T> {
    pub step: usize,
    pub validation: Evaluation,
    pub trained: BTreeMap<String, ArrayD<T>>,
}

/// Everything that a stage goes on from.
pub(super) struct Position<T> {
    /// Steps taken.
    pub step: usize,
    pub optimiser: Optimiser<T>,
    pub best: Option<Best<T>>,
    /// Evaluations since the best.
    pub worse: usize,
    /// The loss of the first step, and how large the outputs were.
    pub first: Option<(f64, blame::Sizes)>,
}

impl<T: Scalar> Position<T> {
    /// The start.
    pub fn start(table: &StageTable) -> Self {
        Self { step: 0, optimiser: Optimiser::new(table.optimiser), best: None, worse: 0, first: None }
    }
}

/// A stage of a run.
pub(super) struct Stage<'r, T> {
    pub name: &'r str,
    pub table: &'r StageTable,
    pub data: &'r Prepared<T>,
    pub split: &'r Split,
    /// What the order of samples and dropout are drawn from.
    pub seed: u64,
    pub observer: &'r dyn Observer,
}

/// Where a stage leaves what it has done: its lines, and all that it goes on from.
pub(super) trait Keeper<T> {
    fn metrics(&mut self) -> &mut Metrics;
    fn keep(&mut self, model: &Model<T>, position: &Position<T>) -> Result<()>;
}

impl<T: Scalar> Stage<'_, T> {
    /// Samples that make a step, and steps of an epoch.
    fn shape(&self) -> (usize, usize) {
        let samples = self.table.batch_size.saturating_mul(self.table.accumulate).min(self.split.train.len());
        (samples, self.split.train.len().div_ceil(samples))
    }

    /// How many steps there are.
    pub fn steps(&self) -> usize {
        let of_epochs = |epochs: usize| epochs.saturating_mul(self.shape().1);
        self.table.steps.unwrap_or_else(|| self.table.epochs.map_or(0, of_epochs))
    }

    /// The samples of a step, counted from 0, in batches; `order` is kept from one step to the next.
    pub fn batches(&self, step: usize, order: &mut Option<(usize, Vec<usize>)>) -> Vec<Vec<usize>> {
        let (samples, steps_of_epoch) = self.shape();
        let epoch = step / steps_of_epoch;
        if order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            *order = Some((epoch, shuffled(&self.split.train, self.seed, epoch as u64)));
        }
        let (_, order) = order.as_ref().expect("an order");
        let of_step = order.chunks(samples).nth(step % steps_of_epoch).expect("a step of the epoch");
        of_step.chunks(self.table.batch_size).map(<[usize]>::to_vec).collect()
    }

    /// Takes every step that is left, and leaves the model at its best.
    pub fn run(&self, model: &mut Model<T>, position: &mut Position<T>, keeper: &mut dyn Keeper<T>) -> Result<()> {
        let (steps, (_, steps_of_epoch)) = (self.steps(), self.shape());
        let every = self.table.evaluate_every.unwrap_or(steps_of_epoch);
        let (mut order, workspace) = (None, Workspace::default());
        let mut validation = position.best.as_ref().map(|best| best.validation);
        if position.step == 0 && position.best.is_none() {
            validation = self.evaluate(model, position, keeper)?;
            keeper.keep(model, position)?;
        }
        while position.step < steps && !self.is_over(position) {
            let started = Instant::now();
            let batches = self.batches(position.step, &mut order);
            let (loss, mut gradients) = self.gradients(model, position, &batches, &workspace)?;
            let gradient_norm = clip(&mut gradients, self.table.clip); // E140
            if !gradient_norm.is_finite() {
                let tensor = blame::gradient(model, &gradients).unwrap_or_else(|| "their norm".into());
                return Err(self.diverged(
                    position.step,
                    loss,
                    format!("the gradient of {tensor} is the first that is not finite"),
                ));
            }
            let factor = self.table.schedule.factor(position.step, steps);
            position.optimiser.step(model.parameters_mut(), &gradients, factor)?;
            position.step += 1;
            let (stage, seconds) = (self.name.to_string(), started.elapsed().as_secs_f64());
            let epoch = (position.step - 1) / steps_of_epoch;
            let record = Record::Step { stage, step: position.step, epoch, loss, rate: factor, gradient_norm, seconds };
            keeper.metrics().write(&record)?;
            let stops = self.observer.stops();
            if position.step.is_multiple_of(every) || position.step == steps {
                validation = self.evaluate(model, position, keeper)?;
                keeper.keep(model, position)?;
            } else if stops {
                keeper.keep(model, position)?;
            }
            self.observer.watch(&Progress { stage: self.name, step: position.step, steps, loss, validation });
            if stops {
                return Err(Error::Interrupted { stage: self.name.into(), step: position.step });
            }
        }
        if let Some(best) = &position.best {
            model.set_trained(&best.trained)?;
        }
        blame::parameter(model).map_or(Ok(()), |what| Err(self.diverged(position.step, f64::NAN, what)))
    }

    /// Whether there has been nothing better for too long.
    fn is_over(&self, position: &Position<T>) -> bool {
        self.table.patience.is_some_and(|patience| position.worse >= patience)
    }

    /// The mean loss of a step's samples and its gradients: what one large batch would have. E141
    fn gradients(
        &self,
        model: &Model<T>,
        position: &mut Position<T>,
        batches: &[Vec<usize>],
        workspace: &Workspace<T>,
    ) -> Result<(f64, BTreeMap<String, ArrayD<T>>)> {
        let all: usize = batches.iter().map(Vec::len).sum();
        let (mut loss, mut gradients) = (0.0, BTreeMap::<String, ArrayD<T>>::new());
        for (number, samples) in batches.iter().enumerate() {
            let seed = seed_of("dropout", self.seed, &[position.step as u64, number as u64]);
            let pass = Pass::training(seed).within(workspace);
            let (x, targets) = self.data.batch(samples);
            if position.first.is_none() {
                let sizes =
                    blame::sizes(model, x.clone(), &pass).map_err(|error| self.blamed(error, model, position))?;
                position.first = Some((f64::INFINITY, sizes));
            }
            let forward = model.forward(x, &pass);
            let (y, backward) = forward.map_err(|error| self.blamed(error, model, position))?;
            let (of_batch, mut dy) = self.data.loss().evaluate(y, &targets)?;
            let (part, of_batch) = (samples.len() as f64 / all as f64, of_batch.as_f64());
            let (first, before) = position.first.as_ref().expect("sizes of the first step");
            if !of_batch.is_finite() || of_batch > EXPLOSION * first {
                let now = blame::sizes(model, self.data.batch(samples).0, &pass)?;
                return Err(self.diverged(position.step, of_batch, blame::forward(model, before, &now)));
            }
            if part < 1.0 {
                dy *= T::from_f64(part);
            }
            loss += part * of_batch;
            for (name, gradient) in backward(dy)?.parameters {
                match gradients.get_mut(&name) {
                    Some(sum) => *sum += &gradient,
                    None => drop(gradients.insert(name, gradient)),
                }
            }
        }
        if let Some((first @ f64::INFINITY, _)) = &mut position.first {
            // A first loss of nearly nothing would make any other an explosion.
            *first = loss.max(1e-3);
        }
        Ok((loss, gradients))
    }

    /// A layer refuses parameters that are not finite, or whose norm is not. What it took at the first step and refuses
    /// later is where training went wrong.
    fn blamed(&self, error: Error, model: &Model<T>, position: &Position<T>) -> Error {
        match blame::parameter(model) {
            Some(what) => self.diverged(position.step, f64::NAN, what),
            None if position.step > 0 => self.diverged(position.step, f64::NAN, error.to_string()),
            None => error,
        }
    }

    fn diverged(&self, step: usize, loss: f64, what: String) -> Error {
        Error::Diverged { stage: self.name.into(), step: step + 1, loss, what }
    }

    /// Looks at the validation part, where there is one, and remembers the best.
    fn evaluate(
        &self,
        model: &mut Model<T>,
        position: &mut Position<T>,
        keeper: &mut dyn Keeper<T>,
    ) -> Result<Option<Evaluation>> {
        if self.split.validation.is_empty() {
            return Ok(None);
        }
        let started = Instant::now();
        let evaluated = Evaluation::of(model, self.data, &self.split.validation);
        let validation = evaluated.map_err(|error| self.blamed(error, model, position))?;
        if !validation.loss.is_finite() {
            let what = blame::parameter(model).unwrap_or_else(|| "the parameters are finite".into());
            return Err(self.diverged(position.step, validation.loss, what));
        }
        let better = position.best.as_ref().is_none_or(|best| validation.beats(&best.validation, self.table.monitor));
        if better {
            position.best = Some(Best { step: position.step, validation, trained: model.trained() });
        }
        position.worse = if better { 0 } else { position.worse + 1 };
        let scales = scales(model);
        let (stage, seconds) = (self.name.to_string(), started.elapsed().as_secs_f64());
        keeper.metrics().write(&Record::Evaluation { stage, step: position.step, validation, scales, seconds })?;
        Ok(Some(validation))
    }
}

/// alpha, beta and the mean magnitude of every adapted module.
fn scales<T: Scalar>(model: &mut Model<T>) -> BTreeMap<String, BTreeMap<String, f64>> {
    let mut scales = BTreeMap::new();
    for (module, (adapter, _)) in model.adapters() {
        let named = [("alpha", adapter.alpha), ("beta", adapter.beta), ("magnitude", adapter.magnitude)];
        let means = named.into_iter().filter_map(|(name, values)| Some((name.to_string(), values?.mean()?)));
        let means: BTreeMap<_, _> = means.collect();
        if !means.is_empty() {
            scales.insert(module, means);
        }
    }
    scales
}
