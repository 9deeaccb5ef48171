//! The layer: a frozen weight and an adapter over an operator. Its forward and backward are in `passes.rs`.

use super::adapter::{as_matrix, check_tensors};
use super::direction::{Direction, Factors, norm, squared_norms};
use super::{Adapter, Base, Config, LoraInit, NormAxis};
use crate::error::check_finite;
use crate::operators::{Operator, in_standard_layout};
use crate::{Error, Result, Scalar};
use ndarray::{Array1, ArrayView1, ArrayView2};
use rand::Rng;

/// A frozen layer with an adapter: LoRA, DoRA or WoRA over the operator `O`.
///
/// ```
/// use ndarray::array;
/// use woracle::wora::{Base, Config, Layer, LoraInit, Method, RequiresGrad};
/// use woracle::operators::Linear;
/// # use rand::SeedableRng;
/// let operator = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
/// let base = Base { weight: array![[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]].into_dyn().into(), bias: None };
/// let mut rng = rand_pcg::Pcg64::seed_from_u64(1);
/// let layer = Layer::init(operator, Config::new(Method::Wora, 2.0), base, 1, LoraInit::default(), &mut rng)?;
/// let x = array![[1.0, 1.0, 1.0]].into_dyn(); // [1, 3]
/// let (y, cache) = layer.forward(x.view().into(), None)?;
/// assert_eq!(y, array![[5.0, 7.0]].into_dyn()); // B is zero: still the base layer
/// let dy = array![[1.0, -1.0]].into_dyn();
/// let gradients = layer.backward(cache, dy.view(), RequiresGrad::default())?;
/// assert_eq!(gradients.adapter.magnitude.unwrap(), array![5.0 / 3.0, -7.0 / 5.0].into_dyn());
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Layer<O, T> {
    pub(super) operator: O,
    pub(super) config: Config,
    pub(super) base: Base<T>,
    pub(super) adapter: Adapter<T>,
    /// `||W0_i||^2` along the norm axis: `[units]` or `[fan_in]`. Kept because W0 is frozen.
    pub(super) base_sq: Array1<T>,
}

impl<O: Operator, T: Scalar> Layer<O, T> {
    /// A layer from its tensors.
    ///
    /// # Errors
    ///
    /// A tensor whose shape does not fit (C1) or that the method does not have (C7), a rank of 0 (C3), a
    /// setting out of range (C4), or `norm_axis = "input"` over another operator than linear (C8).
    pub fn new(operator: O, config: Config, base: Base<T>, adapter: Adapter<T>) -> Result<Self> {
        config.check()?;
        if let (NormAxis::Input, Some(reason)) = (config.norm_axis, O::COLUMNS_ARE_NOT_FEATURES) {
            let expected = format!("output ({reason})");
            return Err(Error::Setting { name: "norm_axis", expected, found: "input".into() }); // C8
        }
        check_tensors(&operator, &config, &base, &adapter)?;
        let base = Base { weight: in_standard_layout(base.weight), bias: base.bias };
        let adapter = Adapter {
            lora_a: in_standard_layout(adapter.lora_a),
            lora_b: in_standard_layout(adapter.lora_b),
            magnitude: adapter.magnitude.map(in_standard_layout),
            ..adapter
        };
        let weight = operator.weight_matrix(base.weight.view());
        let base_sq = match config.norm_axis {
            NormAxis::Output => squared_norms(weight),
            NormAxis::Input => squared_norms(weight.reversed_axes()),
        };
        // Squares that add up to a number are of numbers.
        if !base_sq.iter().all(|sum| sum.is_finite()) {
            check_finite("base.weight", base.weight.view())?; // C2
        }
        Ok(Self { operator, config, base, adapter, base_sq })
    }

    /// A fresh adapter as PEFT makes it: A random, B zero, `m = ||V||`, alpha = beta = 1, so that the layer
    /// still computes what its base does (where `norm_eps` is 0). E38
    ///
    /// # Errors
    ///
    /// As [`Layer::new`]; also a row of W0 that is zero (C5) unless `zero_norm` allows it.
    pub fn init(
        operator: O,
        config: Config,
        base: Base<T>,
        rank: usize,
        init: LoraInit,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        let adapter = Adapter::init(&operator, &config, rank, init, rng)?;
        let mut layer = Self::new(operator, config, base, adapter)?;
        if let Some(magnitude) = &layer.adapter.magnitude {
            let shape = magnitude.raw_dim();
            let norm = layer.direction()?.expect("a method with a magnitude").norm;
            layer.adapter.magnitude = Some(norm.into_shape_with_order(shape).expect("one norm a magnitude")); // E38
        }
        Ok(layer)
    }

    /// The operator.
    pub fn operator(&self) -> &O {
        &self.operator
    }
    /// The settings.
    pub fn config(&self) -> &Config {
        &self.config
    }
    /// The frozen tensors.
    pub fn base(&self) -> &Base<T> {
        &self.base
    }
    /// The learned tensors.
    pub fn adapter(&self) -> &Adapter<T> {
        &self.adapter
    }
    /// The learned tensors by name, to be changed; their shapes cannot be.
    pub fn adapter_mut(&mut self) -> Vec<(&'static str, ndarray::ArrayViewMutD<'_, T>)> {
        self.adapter.named_mut(O::LORA_NAMES)
    }

    pub(crate) fn alpha(&self) -> T {
        self.adapter.alpha_or(T::one())
    }
    pub(crate) fn beta(&self) -> T {
        self.adapter.beta_or(T::one())
    }
    pub(crate) fn scaling(&self) -> T {
        T::from_f64(self.config.scaling)
    }
    /// W0: `[units, fan_in]`
    pub(crate) fn weight(&self) -> ArrayView2<'_, T> {
        self.operator.weight_matrix(self.base.weight.view())
    }
    /// A: `[rank, fan_in]`
    pub(crate) fn a(&self) -> ArrayView2<'_, T> {
        as_matrix(&self.adapter.lora_a)
    }
    /// B: `[units, rank / groups]`
    pub(crate) fn b(&self) -> ArrayView2<'_, T> {
        as_matrix(&self.adapter.lora_b)
    }
    /// m: `[units]` or `[fan_in]`
    pub(crate) fn magnitude(&self) -> Option<ArrayView1<'_, T>> {
        let magnitude = self.adapter.magnitude.as_ref()?;
        Some(magnitude.view().into_shape_with_order(magnitude.len()).expect("a magnitude in standard layout"))
    }

    /// V as the norm sees it: rows are what a norm is taken of.
    pub(super) fn factors(&self) -> Factors<'_, T> {
        let (base, left, right) = match self.config.norm_axis {
            NormAxis::Output => (self.weight(), self.b(), self.a()),
            NormAxis::Input => (self.weight().reversed_axes(), self.a().reversed_axes(), self.b().reversed_axes()),
        };
        let (alpha, beta, scaling) = (self.alpha(), self.beta(), self.scaling());
        Factors {
            base,
            left,
            right,
            groups: self.operator.groups(),
            base_sq: self.base_sq.view(),
            alpha,
            beta,
            scaling,
        }
    }

    /// Norms and gains at the present parameters; `None` for LoRA, which has none.
    ///
    /// # Errors
    ///
    /// A unit with `||V|| = 0` (C5), unless `zero_norm` allows it; a norm that overflows (C2).
    pub fn direction(&self) -> Result<Option<Direction<T>>> {
        self.magnitude().map(|magnitude| Direction::new(&self.factors(), magnitude, &self.config)).transpose()
    }

    /// `||V||` of the materialised rows or columns of V `[units, fan_in]`, along the norm axis.
    pub(crate) fn norms_of(&self, weighted: ArrayView2<'_, T>) -> Array1<T> {
        match self.config.norm_axis {
            NormAxis::Output => weighted.rows().into_iter().map(norm).collect(),
            NormAxis::Input => weighted.columns().into_iter().map(norm).collect(),
        }
    }
}
