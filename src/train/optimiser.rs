//! What turns gradients into steps: SGD with momentum, and AdamW. SPEC.md, section 14.2.

use super::place::Misfit;
use crate::error::check_shape;
use crate::simd::sum_of_squares;
use crate::wora::Method;
use crate::{Error, Result, Scalar};
use multiversion::multiversion;
use ndarray::{ArrayD, ArrayViewMutD, Zip};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The learning rates of a kind of parameter, where they are not that of all.
///
/// ```
/// use woracle::train::{OptimiserTable, Rates};
/// let table: OptimiserTable = toml::from_str(
///     "type = 'adamw'\nlearning_rate = 1e-3\nlearning_rates = { lora_b = 1.6e-2, alpha_beta = 1e-4 }", // as LoRA+
/// )
/// .unwrap();
/// let OptimiserTable::AdamW(adamw) = table else { panic!("AdamW") };
/// assert_eq!((adamw.learning_rates.lora_b, adamw.learning_rates.lora_a), (Some(1.6e-2), None)); // A has that of all
/// assert_eq!(adamw.betas, [0.9, 0.999]);
/// # let _: Rates = adamw.learning_rates;
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rates {
    /// Of A.
    pub lora_a: Option<f64>,
    /// Of B.
    pub lora_b: Option<f64>,
    /// Of the magnitude.
    pub magnitude: Option<f64>,
    /// Of WoRA's alpha and beta.
    pub alpha_beta: Option<f64>,
}

/// How gradients are turned into steps, E135 to E139. What a step is multiplied by is the schedule's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum OptimiserTable {
    /// PyTorch's `optim.SGD`.
    Sgd(Sgd),
    /// PyTorch's `optim.AdamW`.
    AdamW(AdamW),
}

/// Stochastic gradient descent with momentum.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sgd {
    /// Positive.
    pub learning_rate: f64,
    /// Those of some kinds of parameters.
    #[serde(default)]
    pub learning_rates: Rates,
    /// From 0 to below 1.
    #[serde(default)]
    pub momentum: f64,
    /// Added to the gradient, times the parameter: 0 or more. None for biases, magnitudes, alpha, beta and norms.
    #[serde(default)]
    pub weight_decay: f64,
}

/// Adam with decay that is not part of the gradient.
#[doc = include_str!("../../docs/adamw.md")]
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamW {
    /// Positive.
    pub learning_rate: f64,
    /// Those of some kinds of parameters.
    #[serde(default)]
    pub learning_rates: Rates,
    /// How slowly the two means forget: from 0 to below 1 each.
    #[serde(default = "usual_betas")]
    pub betas: [f64; 2],
    /// Added to the root: positive.
    #[serde(default = "usual_eps")]
    pub eps: f64,
    /// Of the parameter, times the rate: 0 or more. None for biases, magnitudes, alpha, beta and norms.
    #[serde(default = "usual_decay")]
    pub weight_decay: f64,
}

fn usual_betas() -> [f64; 2] {
    [0.9, 0.999]
}

fn usual_eps() -> f64 {
    1e-8
}

fn usual_decay() -> f64 {
    0.01
}

impl OptimiserTable {
    fn learning_rate(&self) -> (f64, &Rates) {
        match self {
            Self::Sgd(Sgd { learning_rate, learning_rates, .. })
            | Self::AdamW(AdamW { learning_rate, learning_rates, .. }) => (*learning_rate, learning_rates),
        }
    }

    /// What is remembered of every parameter, by the names that it is kept under.
    fn remembered(&self) -> &'static [&'static str] {
        match self {
            Self::Sgd(Sgd { momentum, .. }) if *momentum > 0.0 => &["momentum"],
            Self::Sgd(_) => &[],
            Self::AdamW(_) => &["first", "second"],
        }
    }

    /// The learning rate of a parameter, by its name.
    fn rate(&self, name: &str) -> f64 {
        let (all, rates) = self.learning_rate();
        let own = match name.rsplit('.').next().unwrap_or(name) {
            "lora_A" | "lora_embedding_A" => rates.lora_a,
            "lora_B" | "lora_embedding_B" => rates.lora_b,
            "lora_magnitude_vector" => rates.magnitude,
            "lora_wora_alpha" | "lora_wora_beta" => rates.alpha_beta,
            _ => None,
        };
        own.unwrap_or(all)
    }

    /// Refuses learning rates of what a method does not train; without a method there is no adapter.
    pub(super) fn check_kinds(&self, key: &str, method: Option<Method>) -> std::result::Result<(), Misfit> {
        let Rates { lora_a, lora_b, magnitude, alpha_beta } = *self.learning_rate().1;
        let trained = [
            ("lora_a", lora_a, method.is_some()),
            ("lora_b", lora_b, method.is_some()),
            ("magnitude", magnitude, method.is_some_and(|method| method != Method::Lora)),
            ("alpha_beta", alpha_beta, method == Some(Method::Wora)),
        ];
        match trained.into_iter().find(|(_, rate, trained)| rate.is_some() && !trained) {
            Some((name, ..)) => {
                let message = "expected none, as nothing of that kind is trained, found one";
                Err(Misfit::new(format!("{key}.learning_rates.{name}"), message))
            }
            None => Ok(()),
        }
    }

    pub(super) fn check(&self, key: &str) -> std::result::Result<(), Misfit> {
        let (all, rates) = self.learning_rate();
        let Rates { lora_a, lora_b, magnitude, alpha_beta } = *rates;
        let own = [("lora_a", lora_a), ("lora_b", lora_b), ("magnitude", magnitude), ("alpha_beta", alpha_beta)];
        let own = own.into_iter().filter_map(|(name, rate)| Some((format!("learning_rates.{name}"), rate?)));
        for (name, rate) in own.chain([("learning_rate".to_string(), all)]) {
            if !(rate.is_finite() && rate > 0.0) {
                return Err(Misfit::new(format!("{key}.{name}"), format!("expected a positive number, found {rate}")));
            }
        }
        let within = |name: &str, value: f64, fits: bool, expected: &str| match fits {
            true => Ok(()),
            false => Err(Misfit::new(format!("{key}.{name}"), format!("expected {expected}, found {value}"))),
        };
        let fraction = "a number from 0 to below 1";
        let decays =
            |decay: f64| within("weight_decay", decay, decay.is_finite() && decay >= 0.0, "a number of 0 or more");
        match *self {
            Self::Sgd(Sgd { momentum, weight_decay, .. }) => {
                within("momentum", momentum, (0.0..1.0).contains(&momentum), fraction)?;
                decays(weight_decay)
            }
            Self::AdamW(AdamW { betas, eps, weight_decay, .. }) => {
                for beta in betas {
                    within("betas", beta, (0.0..1.0).contains(&beta), fraction)?;
                }
                within("eps", eps, eps.is_finite() && eps > 0.0, "a positive number")?;
                decays(weight_decay)
            }
        }
    }
}

/// Whether a parameter of this name and number of axes is drawn towards 0.
fn decays(name: &str, axes: usize) -> bool {
    axes >= 2 && name.rsplit('.').next() != Some("lora_magnitude_vector")
}

/// An optimiser, and what it remembers of every parameter.
///
/// ```
/// use ndarray::array;
/// use std::collections::BTreeMap;
/// use woracle::train::{Optimiser, OptimiserTable};
/// let table: OptimiserTable = toml::from_str("type = 'sgd'\nlearning_rate = 0.5").unwrap();
/// let mut optimiser = Optimiser::<f64>::new(table);
/// let mut bias = array![1.0].into_dyn();
/// let gradients = BTreeMap::from([("bias".to_string(), array![4.0].into_dyn())]);
/// optimiser.step(vec![("bias".into(), bias.view_mut())], &gradients, 1.0)?;
/// assert_eq!(bias[0], -1.0);
/// # Ok::<(), woracle::Error>(())
/// ```
pub struct Optimiser<T> {
    table: OptimiserTable,
    /// How many steps have been taken.
    steps: u64,
    /// `momentum.NAME`; `first.NAME` and `second.NAME`.
    memory: BTreeMap<String, ArrayD<T>>,
}

impl<T: Scalar> Optimiser<T> {
    /// One that remembers nothing.
    pub fn new(table: OptimiserTable) -> Self {
        Self { table, steps: 0, memory: BTreeMap::new() }
    }

    /// One that goes on.
    pub(super) fn resumed(table: OptimiserTable, steps: u64, memory: BTreeMap<String, ArrayD<T>>) -> Self {
        Self { table, steps, memory }
    }

    /// What it remembers.
    pub(super) fn memory(&self) -> &BTreeMap<String, ArrayD<T>> {
        &self.memory
    }

    /// Moves every parameter against its gradient, which has its shape; `factor` multiplies all learning rates. E135 to
    /// E139
    ///
    /// # Errors
    ///
    /// A parameter without a gradient (C7), or with one of another shape (C1).
    pub fn step(
        &mut self,
        parameters: Vec<(String, ArrayViewMutD<'_, T>)>,
        gradients: &BTreeMap<String, ArrayD<T>>,
        factor: f64,
    ) -> Result<()> {
        let moves = parameters.into_iter().map(|(name, parameter)| {
            let missing = || Error::Missing { tensor: format!("grad.{name}"), expected: "a gradient".into() };
            let gradient = gradients.get(&name).ok_or_else(missing)?; // C7
            check_shape(&format!("grad.{name}"), parameter.shape(), gradient.shape())?; // C1
            let (rate, decays) = (self.table.rate(&name) * factor, decays(&name, parameter.ndim()));
            Ok(Move { name, parameter, gradient, rate, decays, memory: Vec::new() })
        });
        let mut moves = moves.collect::<Result<Vec<_>>>()?;
        self.steps += 1;
        let (table, steps, kinds) = (self.table, self.steps, self.table.remembered());
        for Move { name, gradient, memory, .. } in &mut moves {
            let kept = |kind| self.memory.remove(&format!("{kind}.{name}"));
            memory.extend(kinds.iter().map(kept).map(|kept| kept.unwrap_or_else(|| ArrayD::zeros(gradient.raw_dim()))));
        }
        moves.par_iter_mut().for_each(|one| match table {
            OptimiserTable::Sgd(sgd) => one.descend(&sgd),
            OptimiserTable::AdamW(adam) => one.adapt(&adam, steps),
        });
        for Move { name, memory, .. } in moves {
            self.memory.extend(kinds.iter().zip(memory).map(|(kind, kept)| (format!("{kind}.{name}"), kept)));
        }
        Ok(())
    }
}

/// Elements of a parameter that one task moves.
const CHUNK: usize = 1 << 13;

/// One parameter's step.
struct Move<'a, T> {
    name: String,
    parameter: ArrayViewMutD<'a, T>,
    gradient: &'a ArrayD<T>,
    rate: f64,
    decays: bool,
    /// What the optimiser remembers of it.
    memory: Vec<ArrayD<T>>,
}

impl<T: Scalar> Move<'_, T> {
    fn descend(&mut self, sgd: &Sgd) {
        let Self { parameter, gradient, memory, .. } = self;
        let [rate, momentum, decay] =
            [self.rate, sgd.momentum, if self.decays { sgd.weight_decay } else { 0.0 }].map(T::from_f64);
        let Some(velocity) = memory.first_mut() else {
            return Zip::from(parameter).and(*gradient).for_each(|p, &g| *p -= rate * (g + decay * *p)); // E136
        };
        Zip::from(parameter).and(velocity).and(*gradient).for_each(|p, v, &g| {
            *v = momentum * *v + (g + decay * *p); // E135
            *p -= rate * *v; // E136
        });
    }

    fn adapt(&mut self, adam: &AdamW, steps: u64) {
        let Self { parameter, gradient, memory, .. } = self;
        let [first, second] = &mut memory[..] else { unreachable!("two means") };
        let steps = i32::try_from(steps).unwrap_or(i32::MAX);
        let [of_first, of_second] = adam.betas.map(|beta| 1.0 - beta.powi(steps));
        let [forget_first, forget_second] = adam.betas.map(|beta| T::from_f64(1.0 - beta));
        let keep_second = T::from_f64(adam.betas[1]);
        let shrink = T::from_f64(if self.decays { 1.0 - self.rate * adam.weight_decay } else { 1.0 });
        let [step, root, eps] = [self.rate / of_first, of_second.sqrt(), adam.eps].map(T::from_f64);
        let factors = AdamFactors { forget_first, keep_second, forget_second, shrink, step, root, eps };
        let means = [first, second].map(|mean| mean.as_slice_mut().expect("standard layout"));
        let gradient = gradient.as_standard_layout();
        let gradient = gradient.as_slice().expect("standard layout");
        let adapt = |parameter: &mut [T]| {
            let [first, second] = means.map(|mean| mean.par_chunks_mut(CHUNK));
            let chunks = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).zip(first.zip(second));
            chunks.for_each(|((parameter, gradient), (first, second))| {
                adapt_each(factors, parameter, [first, second], gradient);
            });
        };
        match parameter.as_slice_mut() {
            Some(parameter) => adapt(parameter),
            None => {
                let mut copy = parameter.as_standard_layout().into_owned();
                adapt(copy.as_slice_mut().expect("standard layout"));
                parameter.assign(&copy);
            }
        }
    }
}

/// The numbers that are the same for every element of a parameter in one step of [`AdamW`].
#[derive(Clone, Copy)]
struct AdamFactors<T> {
    forget_first: T,
    keep_second: T,
    forget_second: T,
    shrink: T,
    step: T,
    root: T,
    eps: T,
}

#[multiversion(targets("x86_64+avx2"))]
fn adapt_each<T: Scalar>(factors: AdamFactors<T>, parameter: &mut [T], [first, second]: [&mut [T]; 2], gradient: &[T]) {
    let AdamFactors { forget_first, keep_second, forget_second, shrink, step, root, eps } = factors;
    for (((p, m), v), &g) in parameter.iter_mut().zip(first).zip(second).zip(gradient) {
        *m += forget_first * (g - *m); // E137
        *v = keep_second * *v + forget_second * g * g; // E138
        *p = *p * shrink - step * *m / (v.sqrt() / root + eps); // E139
    }
}

/// Scales gradients so that their norm over all of them is at most `most`; the norm they had. E140
pub(super) fn clip<T: Scalar>(gradients: &mut BTreeMap<String, ArrayD<T>>, most: Option<f64>) -> f64 {
    let squares = |(_, gradient): (_, &ArrayD<T>)| {
        sum_of_squares(gradient.as_standard_layout().as_slice().expect("standard layout"))
    };
    let norm = gradients.par_iter().map(squares).collect::<Vec<_>>().iter().sum::<f64>().sqrt();
    // PyTorch's `clip_grad_norm_`, with its small number.
    if let Some(factor) = most.map(|most| most / (norm + 1e-6)).filter(|&factor| factor < 1.0) {
        let factor = T::from_f64(factor);
        gradients.par_iter_mut().for_each(|(_, gradient)| gradient.mapv_inplace(|g| g * factor));
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array, ArrayView2};

    #[test]
    fn a_parameter_moves_by_its_gradient_however_both_lie_in_memory() {
        let table = r#"type = "adamw"
            learning_rate = 0.1
            weight_decay = 0.5"#;
        let draw = |salt: f64| Array::from_shape_fn((5, 7), |(i, j)| (salt * (7 * i + j) as f64).sin());
        let moved = |by_columns: [bool; 2]| {
            let lie = |values: ArrayView2<'_, f64>, by_columns: bool| match by_columns {
                true => values.t().as_standard_layout().into_owned().reversed_axes().into_dyn(),
                false => values.to_owned().into_dyn(),
            };
            let mut optimiser = Optimiser::new(toml::from_str(table).expect("a table"));
            let mut parameter = lie(draw(1.0).view(), by_columns[0]);
            for step in 1..4 {
                let gradient = lie(draw(step.into()).view(), by_columns[1]);
                let gradients = BTreeMap::from([("w".to_string(), gradient)]);
                optimiser.step(vec![("w".into(), parameter.view_mut())], &gradients, 1.0).expect("a step");
            }
            parameter
        };
        let expected = moved([false, false]);
        assert_ne!(expected, draw(1.0).into_dyn());
        for by_columns in [[false, true], [true, false], [true, true]] {
            assert_eq!(moved(by_columns), expected, "{by_columns:?}");
        }
    }

    #[test]
    fn a_gradient_of_another_shape_is_refused() {
        let table = toml::from_str("type = 'adamw'\nlearning_rate = 0.1").expect("a table");
        let mut parameter = ArrayD::<f64>::zeros(vec![4]);
        let gradients = BTreeMap::from([("w".to_string(), ArrayD::zeros(vec![2]))]);
        let refused = Optimiser::new(table).step(vec![("w".into(), parameter.view_mut())], &gradients, 1.0);
        assert_eq!(refused.expect_err("C1").to_string(), "grad.w: expected shape [4], found [2]");
    }
}
