//! What is fixed while a layer is trained: the method, the scaling, and how the norm is taken.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Which parameters an adapter has beside A and B. Forward and backward are the same code for all three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// `W' = W0 + s B A`: no norm, no magnitude.
    Lora,
    /// `W' = m V / ||V||` with alpha = beta = 1, not trained.
    Dora,
    /// `W' = m V / ||V||` with alpha and beta trained.
    #[default]
    Wora,
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Lora => "LoRA",
            Self::Dora => "DoRA",
            Self::Wora => "WoRA",
        })
    }
}

/// Whether the gradient flows through `||V||`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormGradient {
    /// `||V||` counts as a constant in the backward: PEFT's choice. Not the gradient of the loss.
    #[default]
    Detached,
    /// The gradient of the loss.
    Full,
}

/// What one norm is taken over.
///
/// ```
/// use ndarray::array;
/// use rand::SeedableRng;
/// use woracle::operators::Linear;
/// use woracle::wora::{Base, Config, Layer, LoraInit, Method, NormAxis};
/// let operator = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
/// let base = Base { weight: array![[3.0, 0.0, 2.0], [4.0, 5.0, 0.0]].into_dyn().into(), bias: None };
/// let config = Config { norm_axis: NormAxis::Input, ..Config::new(Method::Wora, 2.0) };
/// let mut rng = rand_pcg::Pcg64::seed_from_u64(1);
/// let layer = Layer::init(operator, config, base, 1, LoraInit::default(), &mut rng)?;
/// let magnitude = layer.adapter().magnitude.clone().expect("WoRA has one");
/// assert_eq!(magnitude, array![5.0, 5.0, 2.0].into_dyn()); // a norm a column of W0
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormAxis {
    /// One norm an output unit, over its weights: PEFT's choice. m has one entry an output unit.
    #[default]
    Output,
    /// One norm an input column, over the output units: the published Filtering-WoRA code. Linear only.
    Input,
}

/// What becomes of a unit with `||V|| = 0`, which has no direction.
///
/// ```
/// use ndarray::array;
/// use rand::SeedableRng;
/// use woracle::{Error, operators::Linear};
/// use woracle::wora::{Base, Config, Layer, LoraInit, Method, ZeroNorm};
/// let init = |zero_norm| {
///     let operator = Linear { in_features: 2, out_features: 2, fan_in_fan_out: false };
///     let base = Base { weight: array![[3.0, 4.0], [0.0, 0.0]].into_dyn().into(), bias: None };
///     let config = Config { zero_norm, ..Config::new(Method::Dora, 2.0) }; // the second unit of W0 is zero
///     Layer::init(operator, config, base, 1, LoraInit::default(), &mut rand_pcg::Pcg64::seed_from_u64(1))
/// };
/// assert!(matches!(init(ZeroNorm::Error), Err(Error::ZeroNorm { unit: 1 })));
/// assert_eq!(init(ZeroNorm::Zero)?.merge()?.weight, array![[3.0, 4.0], [0.0, 0.0]].into_dyn());
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZeroNorm {
    /// An error that names the unit.
    #[default]
    Error,
    /// A zero row of W' and zero gradients.
    Zero,
}

/// The settings of the weighted direction.
///
/// ```
/// use woracle::wora::{Config, Method, NormGradient, scaling};
/// let config = Config { norm_gradient: NormGradient::Full, ..Config::new(Method::Wora, scaling(16.0, 8, false)?) };
/// assert_eq!(config.scaling, 2.0);
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Which parameters there are.
    #[serde(default)]
    pub method: Method,
    /// s: what B A is multiplied by, beside alpha. See [`scaling`]. Any finite number.
    pub scaling: f64,
    /// Whether the gradient flows through `||V||`.
    #[serde(default)]
    pub norm_gradient: NormGradient,
    /// What one norm is taken over.
    #[serde(default)]
    pub norm_axis: NormAxis,
    /// Added to `||V||`; finite, not negative. 0 in PEFT; the machine epsilon in LyCORIS and OneTrainer.
    #[serde(default)]
    pub norm_eps: f64,
    /// What becomes of a unit with `||V|| = 0`.
    #[serde(default)]
    pub zero_norm: ZeroNorm,
}

impl Config {
    /// PEFT's settings: norm detached, one an output unit, nothing added.
    pub fn new(method: Method, scaling: f64) -> Self {
        Self {
            method,
            scaling,
            norm_gradient: NormGradient::default(),
            norm_axis: NormAxis::default(),
            norm_eps: 0.0,
            zero_norm: ZeroNorm::default(),
        }
    }

    /// Whether there is a norm, and so a magnitude.
    pub fn has_norm(&self) -> bool {
        self.method != Method::Lora
    }

    /// Fails on a number that no layer can have. C4
    pub(crate) fn check(&self) -> Result<()> {
        let setting = |name, expected: &str, found: f64| {
            Err(Error::Setting { name, expected: expected.into(), found: found.to_string() })
        };
        if !self.scaling.is_finite() {
            return setting("scaling", "a finite number", self.scaling);
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            return setting("norm_eps", "a finite number, 0 or more", self.norm_eps);
        }
        Ok(())
    }
}

/// s = lora_alpha / rank, or lora_alpha / sqrt(rank) with rslora. E8
///
/// `lora_alpha` is the fixed hyper-parameter of LoRA, not WoRA's learned alpha.
///
/// # Errors
///
/// If the rank is 0 (C3) or `lora_alpha` is not finite (C4).
pub fn scaling(lora_alpha: f64, rank: usize, rslora: bool) -> Result<f64> {
    if rank == 0 {
        return Err(Error::Setting { name: "rank", expected: "1 or more".into(), found: "0".into() });
    }
    if !lora_alpha.is_finite() {
        let found = lora_alpha.to_string();
        return Err(Error::Setting { name: "lora_alpha", expected: "a finite number".into(), found });
    }
    Ok(lora_alpha / if rslora { (rank as f64).sqrt() } else { rank as f64 }) // E8
}
