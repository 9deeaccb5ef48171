//! `adapter_config.json`: what of it changes numbers is understood, the rest is kept and written back.

use crate::wora::{Method, scaling};
use crate::{Error, Result};
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// The file's name in an adapter's directory.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// Fields that say nothing of what an adapter computes once it is trained, or that are checked by its tensors.
const OF_NO_CONSEQUENCE: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
];

/// What `adapter_config.json` says.
///
/// ```
/// use woracle::peft::AdapterConfig;
/// let config = AdapterConfig::parse(
///     r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_wora": true, "rank_pattern": {"fc2": 2}}"#,
/// )?;
/// assert_eq!((config.rank("encoder.fc1"), config.rank("encoder.fc2")), (4, 2));
/// assert_eq!(config.scaling("encoder.fc2")?, 4.0); // lora_alpha / rank
/// # Ok::<(), woracle::Error>(())
/// ```
///
/// ```
/// use woracle::peft::AdapterConfig;
/// use woracle::wora::Method;
/// let config = AdapterConfig::new(Method::Wora, 4, 8.0, &["q_proj", "v_proj"])?;
/// assert_eq!((config.method(), config.target_modules().len()), (Method::Wora, 2));
/// assert!(config.targets("model.layers.0.q_proj")? && !config.targets("model.layers.0.k_proj")?);
/// assert_eq!(config.fields()["lora_alpha"], 8.0);
/// assert!(config.warnings().is_empty());
/// let same = AdapterConfig::parse(&config.to_json())?;
/// assert_eq!(same.rank("model.layers.0.q_proj"), 4);
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    fields: Map<String, Value>,
    known: Known,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
}

/// The fields that change numbers.
#[derive(Clone, Debug, Deserialize)]
struct Known {
    peft_type: String,
    r: i64,
    lora_alpha: f64,
    #[serde(default, deserialize_with = "or_default")]
    use_rslora: bool,
    #[serde(default, deserialize_with = "or_default")]
    use_dora: bool,
    #[serde(default, deserialize_with = "or_default")]
    use_wora: bool,
    #[serde(default, deserialize_with = "or_default")]
    use_qalora: bool,
    #[serde(default, deserialize_with = "or_default")]
    lora_bias: bool,
    #[serde(default, deserialize_with = "or_default")]
    fan_in_fan_out: bool,
    #[serde(default, deserialize_with = "or_default")]
    rank_pattern: InOrder,
    #[serde(default, deserialize_with = "or_default")]
    alpha_pattern: InOrder,
    #[serde(default)]
    target_modules: Option<Names>,
    #[serde(default)]
    modules_to_save: Option<Names>,
    #[serde(default)]
    alora_invocation_tokens: Value,
    #[serde(default)]
    megatron_config: Value,
}

/// Modules: a list of names, or one regular expression.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "neither a list of names nor one regular expression")]
enum Names {
    Pattern(String),
    List(Vec<String>),
}

/// The fields of an object in the order of the file: the first pattern that fits wins.
#[derive(Clone, Debug, Default)]
struct InOrder(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for InOrder {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Fields;
        impl<'de> serde::de::Visitor<'de> for Fields {
            type Value = InOrder;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> std::result::Result<InOrder, A::Error> {
                std::iter::from_fn(|| map.next_entry().transpose()).collect::<std::result::Result<_, _>>().map(InOrder)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// A field that may be null.
fn or_default<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(
    field: D,
) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(field)?.unwrap_or_default())
}

fn setting(name: &'static str, expected: impl Into<String>, found: impl ToString) -> Error {
    Error::Setting { name, expected: expected.into(), found: found.to_string() }
}

impl AdapterConfig {
    /// What a fresh adapter's file says.
    ///
    /// # Errors
    ///
    /// As [`AdapterConfig::parse`].
    pub fn new(method: Method, rank: usize, lora_alpha: f64, target_modules: &[&str]) -> Result<Self> {
        let mut fields = json!({
            "base_model_name_or_path": null,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": lora_alpha,
            "lora_dropout": 0.0,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": rank,
            "target_modules": target_modules,
            "task_type": null,
            "use_dora": method == Method::Dora,
            "use_rslora": false,
        });
        if method == Method::Wora {
            // A PEFT without the pull request refuses a field that it does not know.
            fields["use_wora"] = true.into();
        }
        Self::parse(&fields.to_string())
    }

    /// From the text of the file.
    ///
    /// # Errors
    ///
    /// What is no JSON object, lacks a field or has one of another type; combinations that PEFT refuses.
    pub fn parse(text: &str) -> Result<Self> {
        let fields: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| setting("adapter_config", "a JSON object", error))?;
        let known: Known = serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text))
            .map_err(|error| setting("adapter_config", "the fields of a LoRA adapter", error))?;
        known.check()?;
        let number = |name: &'static str, value: &Value| {
            value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| setting(name, "finite numbers", value))
        };
        let rank = |value: &Value| {
            let rank = value.as_u64().filter(|&rank| rank > 0);
            rank.map(|rank| rank as usize).ok_or_else(|| setting("rank_pattern", "ranks of 1 or more", value))
        };
        let rank_pattern = patterns("rank_pattern", &known.rank_pattern, rank)?;
        let alpha_pattern = patterns("alpha_pattern", &known.alpha_pattern, |value| number("alpha_pattern", value))?;
        Ok(Self { fields, known, rank_pattern, alpha_pattern })
    }

    /// Every field, as it is written back.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The text of the file.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(&self.fields).expect("plain data") + "\n"
    }

    /// LoRA, DoRA or WoRA.
    pub fn method(&self) -> Method {
        match (self.known.use_dora, self.known.use_wora) {
            (_, true) => Method::Wora,
            (true, _) => Method::Dora,
            _ => Method::Lora,
        }
    }

    /// Whether B has a bias.
    pub fn lora_bias(&self) -> bool {
        self.known.lora_bias
    }

    /// Whether weights of linear modules are stored `[in, out]`, where their shapes do not say.
    pub fn fan_in_fan_out(&self) -> bool {
        self.known.fan_in_fan_out
    }

    /// The names in `target_modules`; empty where it is a regular expression or not there.
    pub fn target_modules(&self) -> &[String] {
        names(&self.known.target_modules)
    }

    /// The regular expression in `target_modules`; `None` where it is a list or not there.
    pub fn target_pattern(&self) -> Option<&str> {
        match &self.known.target_modules {
            Some(Names::Pattern(pattern)) => Some(pattern),
            _ => None,
        }
    }

    /// The names in `modules_to_save`.
    pub fn modules_to_save(&self) -> &[String] {
        names(&self.known.modules_to_save)
    }

    /// The patterns of modules that have ranks of their own.
    pub(crate) fn rank_patterns(&self) -> impl Iterator<Item = &Regex> {
        self.rank_pattern.iter().map(|(pattern, _)| pattern)
    }

    /// The patterns of modules that have a `lora_alpha` of their own.
    pub(crate) fn alpha_patterns(&self) -> impl Iterator<Item = &Regex> {
        self.alpha_pattern.iter().map(|(pattern, _)| pattern)
    }

    /// A pattern as it stands in the file.
    pub(crate) fn written(pattern: &Regex) -> &str {
        let whole = pattern.as_str();
        whole.strip_prefix(BEGINNING).and_then(|rest| rest.strip_suffix(END)).unwrap_or(whole)
    }

    /// The rank of a module.
    pub fn rank(&self, module: &str) -> usize {
        first(&self.rank_pattern, module).unwrap_or(self.known.r as usize)
    }

    /// s of a module: `lora_alpha / rank`, or `lora_alpha / sqrt(rank)` with `use_rslora`. E8
    ///
    /// # Errors
    ///
    /// A `lora_alpha` that is not finite (C4).
    pub fn scaling(&self, module: &str) -> Result<f64> {
        let lora_alpha = first(&self.alpha_pattern, module).unwrap_or(self.known.lora_alpha);
        scaling(lora_alpha, self.rank(module), self.known.use_rslora)
    }

    /// What is switched on, is not understood and may change numbers: a line each.
    pub fn warnings(&self) -> Vec<String> {
        let understood = |name: &str| OF_NO_CONSEQUENCE.contains(&name) || KNOWN.contains(&name);
        let mut lines: Vec<String> = self
            .fields
            .iter()
            .filter(|(name, value)| !understood(name) && is_on(value))
            .map(|(name, value)| format!("{CONFIG_FILE}: {name} = {value} is not understood and left out of account"))
            .collect();
        if is_on(&self.known.megatron_config) {
            lines.push(format!("{CONFIG_FILE}: megatron_config is not understood and left out of account"));
        }
        let init = self.fields.get("init_lora_weights").and_then(Value::as_str);
        // These take something off the base weight when they start.
        let changes_base = ["pissa", "olora", "corda", "loftq", "lora_ga"];
        if let Some(init) = init.filter(|init| changes_base.iter().any(|start| init.starts_with(start))) {
            lines.push(format!("{CONFIG_FILE}: init_lora_weights = {init:?}: the base must be the one it has changed"));
        }
        lines
    }
}

/// The fields of [`Known`].
const KNOWN: &[&str] = &[
    "alora_invocation_tokens",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_alpha",
    "lora_bias",
    "megatron_config",
    "r",
    "rank_pattern",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "use_wora",
];

impl Known {
    /// Refuses what PEFT refuses.
    fn check(&self) -> Result<()> {
        let refuse = |name, with: &str| Err(setting(name, format!("it off together with {with}"), "it on"));
        if self.peft_type != "LORA" {
            return Err(setting("peft_type", "\"LORA\"", format!("{:?}", self.peft_type)));
        }
        if self.r <= 0 {
            return Err(setting("r", "1 or more", self.r)); // C3
        }
        if !self.lora_alpha.is_finite() {
            return Err(setting("lora_alpha", "a finite number", self.lora_alpha)); // C4
        }
        let method = if self.use_wora { "use_wora" } else { "use_dora" };
        if self.use_wora && self.use_dora {
            return refuse("use_dora", "use_wora");
        }
        if self.use_wora && self.use_qalora {
            return refuse("use_qalora", "use_wora");
        }
        if self.use_wora && is_on(&self.alora_invocation_tokens) {
            return refuse("alora_invocation_tokens", "use_wora");
        }
        if (self.use_wora || self.use_dora) && is_on(&self.megatron_config) {
            return refuse("megatron_config", method);
        }
        if (self.use_wora || self.use_dora) && self.lora_bias {
            return refuse("lora_bias", method);
        }
        if self.use_qalora {
            return Err(setting("use_qalora", "it off: its A sees averages of inputs", "it on"));
        }
        if is_on(&self.alora_invocation_tokens) {
            return Err(setting("alora_invocation_tokens", "none: it adapts some tokens and not others", "some"));
        }
        Ok(())
    }
}

/// Whether a field says anything but no.
fn is_on(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(values) => !values.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}

/// What has a pattern fit the end of a module's name.
const BEGINNING: &str = r"^(?:.*\.)?(?:";
const END: &str = ")$";

/// Regular expressions for the ends of modules' names.
fn patterns<V>(name: &'static str, pattern: &InOrder, read: impl Fn(&Value) -> Result<V>) -> Result<Vec<(Regex, V)>> {
    let one = |(key, value): &(String, Value)| {
        let regex = Regex::new(&format!("{BEGINNING}{key}{END}"));
        let last = |error: regex::Error| error.to_string().lines().last().unwrap_or_default().to_string();
        Ok((
            regex.map_err(|error| setting(name, "regular expressions", format!("{key:?}: {}", last(error))))?,
            read(value)?,
        ))
    };
    pattern.0.iter().map(one).collect()
}

fn names(names: &Option<Names>) -> &[String] {
    match names {
        Some(Names::List(names)) => names,
        Some(Names::Pattern(_)) | None => &[],
    }
}

/// The value of the first pattern that fits.
fn first<V: Copy>(patterns: &[(Regex, V)], module: &str) -> Option<V> {
    patterns.iter().find(|(regex, _)| regex.is_match(module)).map(|(_, value)| *value)
}
