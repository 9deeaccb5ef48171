//! One training step: forward, and every gradient but dW0.

use crate::operators::{Input, Operator};
use crate::wora::{Layer, RequiresGrad, Workspace};
use crate::{Result, Scalar};
use ndarray::ArrayD;

/// A step that can be timed again and again.
///
/// ```
/// use woracle::{bench, registry::Precision};
/// let case = bench::CASES.iter().find(|case| case.name.starts_with("linear-n256")).unwrap(); // 256 x 256, rank 8
/// let mut step = bench::training_step(case, Precision::F32)?;
/// step.run()?;
/// step.update(); // norms have changed: the next run computes all of them again
/// step.run()?;
/// assert!(step.flops()? > 2 * 2 * 256 * 256 * 256); // the products with W0, forward and backward, and smaller ones
/// assert!(step.kept_bytes()? >= 4 * 2 * 256 * 256); // y and dx in f32
/// # Ok::<(), woracle::Error>(())
/// ```
pub trait TrainingStep: Send {
    /// Changes A, B, m, alpha and beta, as an optimiser does between two steps: nothing that depends on them can be
    /// kept.
    fn update(&mut self);
    /// Forward, then the gradients of x, A, B, m, alpha and beta.
    ///
    /// # Errors
    ///
    /// A unit without a direction (C5).
    fn run(&mut self) -> Result<()>;
    /// The floating-point operations that the factored path needs: its products, and no elementwise pass.
    ///
    /// # Errors
    ///
    /// An input that does not fit (C1).
    fn flops(&self) -> Result<usize>;
    /// The bytes of what a step cannot do without beside what it is given: y and dx, and of the cache P and U.
    ///
    /// # Errors
    ///
    /// An input that does not fit (C1).
    fn kept_bytes(&self) -> Result<usize>;
}

/// A layer at one input and cotangent.
pub(crate) struct StepOf<O: Operator, T: Scalar> {
    layer: Layer<O, T>,
    x: O::Input<'static, T>,
    dy: ArrayD<T>,
    workspace: Workspace<T>,
    updates: usize,
}

impl<O: Operator, T: Scalar> StepOf<O, T> {
    pub fn new(layer: Layer<O, T>, x: O::Input<'static, T>, dy: ArrayD<T>) -> Self {
        Self { layer, x, dy, workspace: Workspace::default(), updates: 0 }
    }
}

impl<O: Operator, T: Scalar> TrainingStep for StepOf<O, T> {
    fn update(&mut self) {
        self.updates += 1;
        // There and back, so that however many steps leave the numbers in their range.
        let factor = T::from_f64(if self.updates.is_multiple_of(2) { 1.0 / 1.001 } else { 1.001 });
        for (_, mut values) in self.layer.adapter_mut() {
            values.mapv_inplace(|value| value * factor);
        }
    }

    fn run(&mut self) -> Result<()> {
        let (y, cache) = self.layer.forward_in(&self.workspace, O::lend(&self.x), None)?;
        let gradients = self.layer.backward_in(&self.workspace, cache, self.dy.view(), RequiresGrad::default())?;
        self.workspace.recycle(y);
        gradients.x.into_iter().for_each(|dx| self.workspace.recycle(dx));
        Ok(())
    }

    fn flops(&self) -> Result<usize> {
        let operator = self.layer.operator();
        let outputs: usize = operator.output_shape(&self.x)?.iter().product();
        let (units, fan_in, rank) = (operator.units(), operator.fan_in(), self.layer.adapter().rank());
        let (places, per_group) = (outputs / units, rank / operator.groups());
        // A lookup multiplies nothing.
        let is_product = usize::from(self.x.values().is_some());
        let base = 2 * is_product * places * units * fan_in; // forward, dx
        let pair = 3 * is_product * places * rank * fan_in; // forward, dx, dA
        let mixing = 3 * places * units * per_group; // forward, S, T
        let norms = units * fan_in * per_group;
        Ok(2 * (base + pair + mixing + norms)) // E76
    }

    fn kept_bytes(&self) -> Result<usize> {
        let operator = self.layer.operator();
        let outputs: usize = operator.output_shape(&self.x)?.iter().product();
        let lora_outputs = outputs / operator.units() * self.layer.adapter().rank();
        let inputs = self.x.values().map_or(0, |x| x.len());
        Ok((2 * outputs + lora_outputs + inputs) * size_of::<T>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operators::Linear;
    use crate::wora::{Base, Config, LoraInit, Method};
    use rand::SeedableRng;

    #[test]
    fn updates_change_every_tensor_and_stay_in_range() {
        let operator = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
        let base = Base { weight: ArrayD::<f64>::ones(vec![2, 3]).into(), bias: None };
        let rng = &mut rand_pcg::Pcg64::seed_from_u64(1);
        let layer =
            Layer::init(operator, Config::new(Method::Wora, 1.0), base, 1, LoraInit::default(), rng).expect("a layer");
        let before = layer.adapter().clone();
        let mut step = StepOf::new(layer, ArrayD::ones(vec![1, 3]).into(), ArrayD::ones(vec![1, 2]));
        step.update();
        let names = Linear::LORA_NAMES;
        for ((_, now), (name, then)) in step.layer.adapter().named(names).into_iter().zip(before.named(names)) {
            assert!(name == "lora_B" || now != then, "{name}");
        }
        (0..999).for_each(|_| step.update());
        for ((_, now), (name, then)) in step.layer.adapter().named(names).into_iter().zip(before.named(names)) {
            assert!(now.iter().zip(&then).all(|(now, then)| (now - then).abs() <= 1e-12 * then.abs()), "{name}");
        }
    }
}
