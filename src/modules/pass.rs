//! How a model is run: to be trained or to be used, and who looks on.

use super::prefixed;
use crate::operators::PARALLEL_ELEMENTS;
use crate::wora::Workspace;
use crate::{Error, Result, Scalar};
use ndarray::{Array, ArrayD, ArrayViewD, Dimension, IxDyn, Zip};
use rand::SeedableRng;
use rand_pcg::Pcg64;

/// Sees every module's output under the module's name.
pub type Watch<'w, T> = &'w (dyn Fn(&str, ArrayViewD<'_, T>) + Sync);

/// One run through a model, or the part of it that a module sees.
///
/// ```
/// use ndarray::array;
/// use std::sync::Mutex;
/// use woracle::modules::{Module, Named, Pass, Sequential, Signal};
/// let modules = r#"[{"type": "relu"}, {"name": "drop", "type": "dropout", "p": 0.5}]"#;
/// let modules: Vec<Named> = serde_json::from_str(modules).unwrap();
/// let model = Sequential::<f64>::build(&modules, &mut rand::SeedableRng::seed_from_u64(0))?;
/// let seen = Mutex::new(Vec::new());
/// let watch = |name: &str, y: ndarray::ArrayViewD<'_, f64>| seen.lock().unwrap().push((name.to_string(), y.sum()));
/// let x = || Signal::Values(array![[-1.0, 3.0]].into_dyn());
/// model.forward(x(), &Pass::evaluation().watched(&watch))?;
/// let relu_and_drop = [("0".to_string(), 3.0), ("drop".to_string(), 3.0)]; // a module without a name has a number
/// assert!(relu_and_drop.iter().all(|output| seen.lock().unwrap().contains(output)));
///
/// // What is dropped depends on the seed and on the module's name, and on nothing else.
/// let pass = Pass::<f64>::training(7);
/// let mask = pass.inside("drop").mask(&[100], 0.5).expect("it is a step of training");
/// assert!(mask.iter().all(|&k| k == 0.0 || k == 2.0));
/// assert_eq!(pass.inside("drop").mask(&[100], 0.5).unwrap(), mask);
/// assert_ne!(pass.inside("other").mask(&[100], 0.5).unwrap(), mask);
/// assert!(Pass::<f64>::evaluation().mask(&[100], 0.5).is_none());
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone)]
pub struct Pass<'p, T> {
    /// What dropout is drawn from; `None` where nothing is dropped.
    dropout: Option<u64>,
    /// Whether the gradient of the input is wanted.
    requires_grad_x: bool,
    workspace: Option<&'p Workspace<T>>,
    watch: Option<Watch<'p, T>>,
    place: String,
}

impl<'p, T: Scalar> Pass<'p, T> {
    /// A model as it is used: nothing is dropped.
    pub fn evaluation() -> Self {
        Self { dropout: None, requires_grad_x: true, workspace: None, watch: None, place: String::new() }
    }

    /// A step of training: what is dropped depends on this seed and on the module's name alone.
    pub fn training(seed: u64) -> Self {
        Self { dropout: Some(seed), ..Self::evaluation() }
    }

    /// The same in memory that an earlier step has left: outputs and gradients that have been used are to be given back
    /// with [`Workspace::recycle`].
    pub fn within(self, workspace: &'p Workspace<T>) -> Self {
        Self { workspace: Some(workspace), ..self }
    }

    /// The same, seen by somebody.
    pub fn watched(self, watch: Watch<'p, T>) -> Self {
        Self { watch: Some(watch), ..self }
    }

    /// The same, with what another pass drops.
    pub fn dropping_as(self, other: &Pass<'_, T>) -> Self {
        Self { dropout: other.dropout, ..self }
    }

    /// The same, for a module whose input's gradient is wanted or not: PyTorch's `x.requires_grad`.
    pub fn requiring_grad_x(&self, wanted: bool) -> Self {
        Self { requires_grad_x: wanted, ..self.clone() }
    }

    /// The same, within a part of this name.
    pub fn inside(&self, part: &str) -> Self {
        Self { place: prefixed(&self.place, part), ..self.clone() }
    }

    /// Whether the gradient of the input is wanted.
    pub fn requires_grad_x(&self) -> bool {
        self.requires_grad_x
    }

    /// An array whose values are whatever was there. A module leaves no more arrays than it takes, so that memory does
    /// not grow from step to step.
    pub(super) fn array(&self, shape: &[usize]) -> ArrayD<T> {
        self.workspace.map_or_else(|| ArrayD::zeros(shape), |workspace| workspace.array(IxDyn(shape)))
    }

    /// A copy in such an array.
    pub(super) fn copy(&self, values: &ArrayD<T>) -> ArrayD<T> {
        let mut copy = self.array(values.shape());
        if values.len() < PARALLEL_ELEMENTS {
            copy.assign(values);
        } else {
            Zip::from(&mut copy).and(values).par_for_each(|copy, &value| *copy = value);
        }
        copy
    }

    /// Leaves an array to whoever needs one next.
    pub(super) fn recycle<D: Dimension>(&self, array: Array<T, D>) {
        if let Some(workspace) = self.workspace {
            workspace.recycle(array);
        }
    }

    /// Leaves an input of the module that is run. One whose gradient is not wanted was made by no module, and would add to
    /// that memory in every step.
    pub(super) fn recycle_input(&self, x: ArrayD<T>) {
        if self.requires_grad_x {
            self.recycle(x);
        }
    }

    /// Runs `step` in the memory of earlier steps, where there is such.
    pub(super) fn with_workspace<Out>(&self, step: impl FnOnce(&Workspace<T>) -> Out) -> Out {
        match self.workspace {
            Some(workspace) => step(workspace),
            None => step(&Workspace::default()),
        }
    }

    /// Shows the output of the module that is run.
    pub(super) fn show(&self, y: &ArrayD<T>) {
        if let Some(watch) = self.watch {
            watch(&self.place, y.view());
        }
    }

    /// The same complaint, with the module in front.
    pub(super) fn complain(&self, error: Error) -> Error {
        match error {
            Error::Module { .. } => error,
            error => Error::Module { module: self.place.clone(), source: Box::new(error) },
        }
    }

    /// A mask of this shape: 0 with probability p, `1 / (1 - p)` otherwise; `None` where nothing is dropped. E103
    pub fn mask(&self, shape: &[usize], p: f64) -> Option<ArrayD<T>> {
        use rand_pcg::rand_core::Rng;
        let seed = self.dropout.filter(|_| p > 0.0)?;
        let of_place =
            self.place.bytes().fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut rng = Pcg64::seed_from_u64(of_place);
        let kept = T::from_f64(1.0 / (1.0 - p));
        let threshold = (p * 2f64.powi(53)) as u64;
        Some(ArrayD::from_shape_simple_fn(shape, || if rng.next_u64() >> 11 < threshold { T::zero() } else { kept }))
    }

    /// Fails unless p is a probability below 1. C4
    pub(super) fn check_probability(name: &'static str, p: f64) -> Result<()> {
        if (0.0..1.0).contains(&p) {
            return Ok(());
        }
        Err(Error::Setting { name, expected: "a probability from 0 to below 1".into(), found: p.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::{Loss, Named, Signal, Targets};
    use crate::train::{AdapterTable, Model};

    /// What each of some steps leaves to the next, in elements.
    fn left(model: &Model<f64>, x: &Signal<f64>, targets: &Targets<f64>) -> Vec<usize> {
        let workspace = Workspace::default();
        let step = |seed| {
            let (y, backward) = model.forward(x.clone(), &Pass::training(seed).within(&workspace)).expect("y");
            let (_, dy) = Loss::CrossEntropy.evaluate(y, targets).expect("a loss");
            backward(dy).expect("gradients");
            workspace.elements()
        };
        (0..6).map(step).collect()
    }

    #[test]
    fn copies_of_many_elements_are_whole() {
        let values = ArrayD::from_shape_fn(IxDyn(&[3, PARALLEL_ELEMENTS]), |at| (at[0] + 7 * at[1]) as f64);
        let (workspace, columns) = (Workspace::default(), values.view().reversed_axes().to_owned());
        let pass = Pass::evaluation().within(&workspace);
        assert_eq!(pass.copy(&values), values);
        assert_eq!(pass.copy(&columns), columns);
    }

    #[test]
    fn memory_does_not_grow_from_step_to_step() {
        let of_images = r#"[
            {"name": "conv", "type": "conv2d", "in_channels": 1, "out_channels": 2, "kernel_size": 3}, {"type": "relu"},
            {"type": "avg_pool2d", "kernel_size": 2}, {"type": "max_pool2d", "kernel_size": 2}, {"type": "flatten"},
            {"name": "up", "type": "linear", "in_features": 8, "out_features": 6}, {"type": "tanh"},
            {"type": "dropout", "p": 0.5}, {"name": "head", "type": "linear", "in_features": 6, "out_features": 3}
        ]"#;
        let of_text = r#"[
            {"type": "embedding", "num_embeddings": 3, "embedding_dim": 4},
            {"type": "position_embedding", "max_length": 5, "embedding_dim": 4},
            {"type": "residual", "modules": [
                {"type": "layer_norm", "features": 4},
                {"type": "self_attention", "embed_dim": 4, "num_heads": 2, "dropout": 0.1}
            ]},
            {"name": "up", "type": "linear", "in_features": 4, "out_features": 6}, {"type": "gelu"},
            {"type": "mean", "dim": 1}, {"name": "head", "type": "linear", "in_features": 6, "out_features": 3}
        ]"#;
        let of_pools = r#"[
            {"type": "avg_pool2d", "kernel_size": 2}, {"type": "max_pool2d", "kernel_size": 2}, {"type": "flatten"},
            {"name": "head", "type": "linear", "in_features": 4, "out_features": 6}, {"type": "relu"},
            {"name": "up", "type": "linear", "in_features": 6, "out_features": 3}
        ]"#;
        let images = Signal::Values(ArrayD::from_elem(IxDyn(&[2, 1, 10, 10]), 0.5));
        let text = Signal::Ids(ArrayD::from_elem(IxDyn(&[2, 5]), 1));
        let targets = Targets::Classes(ArrayD::zeros(IxDyn(&[2])));
        let all = [(of_images, images.clone(), "conv"), (of_pools, images, "head"), (of_text, text, "v_proj")];
        for (modules, x, inner) in all {
            let modules: Vec<Named> = serde_json::from_str(modules).expect("modules");
            let mut model = Model::new(&modules, 1).expect("a model");
            let adapter =
                format!(r#"{{"method": "wora", "rank": 2, "lora_alpha": 4.0, "target_modules": ["{inner}", "up"]}}"#);
            let adapter: AdapterTable = serde_json::from_str(&adapter).expect("a table");
            for adapted in [false, true] {
                if adapted {
                    model.adapt(&adapter, 1).expect("layers");
                }
                let left = left(&model, &x, &targets);
                // In the first ones, arrays find their places.
                assert!(left[0] > 0 && left[2..].iter().all(|elements| *elements == left[2]), "{adapted}: {left:?}");
            }
        }
    }
}
