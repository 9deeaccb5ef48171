//! Which layers are adapted, and how.

use super::place::Misfit;
use crate::modules::Adapting;
use crate::peft::AdapterConfig;
use crate::wora::{Config, LoraInit, Method, NormGradient};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The `[adapter]` table: PEFT's words, and WoRA's.
///
/// ```
/// use woracle::train::AdapterTable;
/// use woracle::wora::Method;
/// let table: AdapterTable = toml::from_str(
///     r#"
///     method = "wora"
///     rank = 4
///     lora_alpha = 8.0
///     target_modules = ["fc"]
///     rank_pattern = { "head.fc" = 2 }
///     "#,
/// )
/// .unwrap();
/// let peft = table.to_peft()?;
/// assert_eq!((peft.method(), peft.rank("body.fc"), peft.rank("head.fc")), (Method::Wora, 4, 2));
/// assert_eq!(peft.scaling("head.fc")?, 4.0); // lora_alpha / rank
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterTable {
    /// `"lora"`, `"dora"` or `"wora"`.
    pub method: Method,
    /// The rank.
    pub rank: usize,
    /// The fixed hyper-parameter in `scaling = lora_alpha / rank`, not WoRA's learned alpha.
    pub lora_alpha: f64,
    /// Whether the scaling is `lora_alpha / sqrt(rank)`.
    #[serde(default)]
    pub use_rslora: bool,
    /// Names, or ends of names, of modules; or one regular expression for whole names.
    pub target_modules: Targets,
    /// Ranks of some modules, by regular expressions for the ends of their names.
    #[serde(default)]
    pub rank_pattern: serde_json::Map<String, serde_json::Value>,
    /// `lora_alpha` of some modules.
    #[serde(default)]
    pub alpha_pattern: serde_json::Map<String, serde_json::Value>,
    /// The probability that an element of the correction's input is dropped: from 0 to below 1.
    #[serde(default)]
    pub lora_dropout: f64,
    /// Whether the gradient flows through the norm.
    #[serde(default)]
    pub norm_gradient: NormGradient,
    /// Whether A starts normal instead of uniform: PEFT's `init_lora_weights = "gaussian"`.
    #[serde(default)]
    pub gaussian: bool,
}

/// A rank beyond this is a mistake: it would only take memory.
const MOST_RANKS: usize = 1 << 12;

/// Modules: a list of names, or one regular expression.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of names or one regular expression")]
pub enum Targets {
    /// A regular expression for whole names.
    Pattern(String),
    /// Names, or ends of names.
    Names(Vec<String>),
}

impl AdapterTable {
    /// The same as PEFT has it.
    ///
    /// # Errors
    ///
    /// As [`AdapterConfig::parse`].
    pub fn to_peft(&self) -> Result<AdapterConfig> {
        let mut fields = json!({
            "base_model_name_or_path": null,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": if self.gaussian { json!("gaussian") } else { json!(true) },
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "target_modules": self.target_modules,
            "task_type": null,
            "use_dora": self.method == Method::Dora,
            "use_rslora": self.use_rslora,
        });
        if self.method == Method::Wora {
            fields["use_wora"] = true.into();
        }
        AdapterConfig::parse(&fields.to_string())
    }

    pub(super) fn check(&self, key: &str) -> std::result::Result<(), Misfit> {
        if !(0.0..1.0).contains(&self.lora_dropout) {
            let message = format!("expected a probability from 0 to below 1, found {}", self.lora_dropout);
            return Err(Misfit::new(format!("{key}.lora_dropout"), message));
        }
        if !(1..=MOST_RANKS).contains(&self.rank) {
            let message = format!("expected 1 or more, up to {MOST_RANKS}, found {}", self.rank);
            return Err(Misfit::new(format!("{key}.rank"), message));
        }
        if !self.lora_alpha.is_finite() {
            let message = format!("expected a finite number, found {}", self.lora_alpha);
            return Err(Misfit::new(format!("{key}.lora_alpha"), message));
        }
        if self.method == Method::Lora && self.norm_gradient == NormGradient::Full {
            let message = "expected none, as LoRA has no norm, found \"full\"";
            return Err(Misfit::new(format!("{key}.norm_gradient"), message));
        }
        match self.to_peft() {
            Ok(_) => Ok(()),
            Err(Error::Setting { name, expected, found }) => {
                let name = if name == "r" { "rank" } else { name };
                Err(Misfit::new(format!("{key}.{name}"), format!("expected {expected}, found {found}")))
            }
            Err(error) => Err(Misfit::new(key, error.to_string())),
        }
    }

    /// How this module is adapted.
    pub(super) fn of(&self, peft: &AdapterConfig, module: &str) -> Result<Adapting> {
        let config = Config { norm_gradient: self.norm_gradient, ..Config::new(self.method, peft.scaling(module)?) };
        let init = if self.gaussian { LoraInit::Gaussian } else { LoraInit::KaimingUniform };
        let rank = peft.rank(module);
        if rank > MOST_RANKS {
            let expected = format!("ranks up to {MOST_RANKS}");
            return Err(Error::Setting { name: "rank_pattern", expected, found: rank.to_string() }); // C3
        }
        Ok(Adapting { config, rank, init, dropout: self.lora_dropout })
    }
}
