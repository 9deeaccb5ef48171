//! Samples in the numbers of a run, batch by batch.

use super::data::{Dataset, Features, Targets as DataTargets};
use crate::modules::Loss;
use crate::modules::{Signal, Targets};
use crate::operators::in_standard_layout;
use crate::{Error, Result, Scalar};
use ndarray::{ArrayD, Axis};

/// A data set in the numbers that a model computes with.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Loss, Signal, Targets};
/// use woracle::train::{Prepared, data};
/// let dataset = data::Dataset {
///     features: data::Features::Values(array![[1.0], [2.0], [3.0]].into_dyn()), // [samples, features]
///     targets: data::Targets::Values(array![[10.0], [20.0], [30.0]].into_dyn()), // [samples, outputs]
///     classes: None,
///     blocks: vec![0, 1, 2],
/// };
/// let prepared = Prepared::<f32>::new(dataset, None)?;
/// assert_eq!(prepared.loss(), Loss::MeanSquaredError); // as targets are values
/// let (Signal::Values(x), Targets::Values(t)) = prepared.batch(&[2, 0]) else { panic!("values") };
/// assert_eq!((x, t), (array![[3.0], [1.0]].into_dyn(), array![[30.0], [10.0]].into_dyn()));
/// # Ok::<(), woracle::Error>(())
/// ```
pub struct Prepared<T> {
    x: Signal<T>,
    targets: Targets<T>,
    loss: Loss,
}

impl<T: Scalar> Prepared<T> {
    /// A data set, cast; `loss` is what its targets suggest where nothing is said.
    ///
    /// # Errors
    ///
    /// A loss that its targets do not have.
    pub fn new(dataset: Dataset, loss: Option<Loss>) -> Result<Self> {
        let cast = |values: ArrayD<f64>| in_standard_layout(values.mapv(T::from_f64));
        let x = match dataset.features {
            Features::Values(values) => Signal::Values(cast(values)),
            Features::Ids(ids) => Signal::Ids(in_standard_layout(ids)),
        };
        let (targets, natural) = match dataset.targets {
            DataTargets::Classes(classes) => (Targets::Classes(in_standard_layout(classes)), Loss::CrossEntropy),
            DataTargets::Values(values) => (Targets::Values(cast(values)), Loss::MeanSquaredError),
        };
        match loss.filter(|&loss| loss != natural) {
            None => Ok(Self { x, targets, loss: natural }),
            Some(loss) => {
                let found = format!("{:?}, where the data suggest {:?}", loss.name(), natural.name());
                Err(Error::Setting { name: "loss", expected: "a loss for these targets".into(), found })
            }
        }
    }

    /// The loss.
    pub fn loss(&self) -> Loss {
        self.loss
    }

    /// The samples that have the least and the largest id, where the features are ids.
    pub(super) fn extremes(&self) -> Vec<usize> {
        let Signal::Ids(ids) = &self.x else { return Vec::new() };
        let of_sample = ids.len() / ids.len_of(Axis(0)).max(1);
        let by_id = |(_, id): &(usize, &i64)| **id;
        let ends = [ids.iter().enumerate().min_by_key(by_id), ids.iter().enumerate().max_by_key(by_id)];
        ends.into_iter().flatten().map(|(element, _)| element / of_sample).collect()
    }

    /// Everything, for a digest: numbers in f64, little-endian.
    pub(super) fn bytes(&self) -> impl Iterator<Item = [u8; 8]> {
        let ids = |ids: &ArrayD<i64>| ids.iter().map(|id| id.to_le_bytes()).collect::<Vec<_>>();
        let numbers = |values: &ArrayD<T>| values.iter().map(|value| value.as_f64().to_le_bytes()).collect::<Vec<_>>();
        let x = match &self.x {
            Signal::Values(values) => numbers(values),
            Signal::Ids(x) => ids(x),
        };
        let targets = match &self.targets {
            Targets::Values(values) => numbers(values),
            Targets::Classes(classes) => ids(classes),
        };
        x.into_iter().chain(targets)
    }

    /// Some of the samples, and what is to be said of them.
    pub fn batch(&self, samples: &[usize]) -> (Signal<T>, Targets<T>) {
        let x = match &self.x {
            Signal::Values(values) => Signal::Values(select(values, samples)),
            Signal::Ids(ids) => Signal::Ids(select(ids, samples)),
        };
        let targets = match &self.targets {
            Targets::Classes(classes) => Targets::Classes(select(classes, samples)),
            Targets::Values(values) => Targets::Values(select(values, samples)),
        };
        (x, targets)
    }
}

/// Some of the samples along the first axis. ndarray's `select` looks at each of them as an array.
fn select<E: Copy>(all: &ArrayD<E>, samples: &[usize]) -> ArrayD<E> {
    let of_sample = all.len() / all.len_of(Axis(0)).max(1);
    let elements = all.as_slice().expect("standard layout");
    let mut selected = Vec::with_capacity(samples.len() * of_sample);
    samples.iter().for_each(|sample| selected.extend_from_slice(&elements[sample * of_sample..][..of_sample]));
    let shape: Vec<usize> = [samples.len()].iter().chain(&all.shape()[1..]).copied().collect();
    ArrayD::from_shape_vec(shape, selected).expect("as many elements as the samples have")
}
