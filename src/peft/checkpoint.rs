//! `adapter_model.safetensors`: which tensors are whose, under PEFT's names.

use super::config::{AdapterConfig, CONFIG_FILE};
use super::save::write_adapter;
use crate::digest::sha256;
use crate::error::check_finite;
use crate::tensor_file::TensorFile;
use crate::tensor_writer::Planned;
use crate::text_file::{LONGEST_CONFIGURATION, read_text};
use crate::wora::{Adapter, Method, SCALE_NAMES};
use crate::{Error, Result};
use ndarray::{ArrayD, IxDyn};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The file's name in an adapter's directory.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts in front of every name.
pub(super) const PREFIX: &str = "base_model.model.";
/// What A and B are called: in an embedding, and elsewhere.
pub(super) const LORA_NAMES: [[&str; 2]; 2] =
    [["lora_embedding_A", "lora_embedding_B"], ["lora_A.weight", "lora_B.weight"]];
const LORA_BIAS: &str = "lora_B.bias";
/// The pull request's name for m; a released PEFT has it without the end.
pub(super) const MAGNITUDE_OF_WORA: &str = "lora_magnitude_vector.weight";

/// A trained adapter: its configuration, and its tensors by module.
///
/// ```
/// use woracle::peft::Checkpoint;
/// # let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/text-wora-pr2872");
/// let checkpoint = Checkpoint::open(&data.join("adapter"))?;
/// assert!(checkpoint.is_embedding("embed") && !checkpoint.is_embedding("fc1"));
/// let adapter = checkpoint.adapter("fc1")?;
/// assert_eq!((adapter.lora_a.shape(), adapter.lora_b.shape()), (&[4, 16][..], &[20, 4][..]));
/// assert_eq!(adapter.alpha.unwrap().ndim(), 0); // a learned scalar
/// assert!(checkpoint.lora_bias("fc1")?.is_none() && checkpoint.replaced().is_empty());
/// assert!(checkpoint.tensors_of_base().any(|name| name == "fc1.weight"));
/// # Ok::<(), woracle::Error>(())
/// ```
pub struct Checkpoint {
    directory: PathBuf,
    config: AdapterConfig,
    config_hash: String,
    file: TensorFile<'static>,
    modules: BTreeMap<String, ModuleTensors>,
    replaced: BTreeMap<String, String>,
}

/// The names of a module's tensors in the file, by role.
#[derive(Clone, Debug, Default)]
pub(super) struct ModuleTensors {
    /// A and B of an embedding.
    embedding: [Option<String>; 2],
    /// A and B of another layer.
    lora: [Option<String>; 2],
    /// m, alpha, beta.
    scales: [Option<String>; 3],
    /// What is added to the bias before it is scaled.
    bias: Option<String>,
}

impl Checkpoint {
    /// Opens an adapter's directory.
    ///
    /// # Errors
    ///
    /// A file that is not there or not what it should be; a tensor that no adapter of this method has (C7).
    pub fn open(directory: &Path) -> Result<Self> {
        let (config_path, path) = (directory.join(CONFIG_FILE), directory.join(ADAPTER_FILE));
        let text = read_text(&config_path, LONGEST_CONFIGURATION)?;
        let config = AdapterConfig::parse(&text).map_err(|error| error.in_file(&config_path))?;
        let file = TensorFile::open(&path)?;
        let (mut modules, mut replaced) = (BTreeMap::<String, ModuleTensors>::new(), BTreeMap::new());
        for name in file.in_order() {
            let plain = name.strip_prefix(PREFIX).unwrap_or(&name);
            match role(plain) {
                Some((module, place)) => {
                    if let Some(other) = place(modules.entry(module.into()).or_default()).replace(name.clone()) {
                        let reason = format!("expected it once, found it as {other} too");
                        return Err(Error::Unexpected { tensor: name, reason }.in_file(&path)); // C7
                    }
                }
                None if plain.contains("lora_") => {
                    let reason = "expected lora_A, lora_B, lora_embedding_A, lora_embedding_B, lora_magnitude_vector, \
                                  lora_wora_alpha or lora_wora_beta of a module";
                    let error = Error::Unexpected { tensor: name, reason: reason.into() }; // C7
                    return Err(error.in_file(&path));
                }
                None => {
                    let tensor = plain.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".");
                    if let Some(other) = replaced.insert(tensor, name.clone()) {
                        let reason = format!("expected it once, found it as {other} too");
                        return Err(Error::Unexpected { tensor: name, reason }.in_file(&path)); // C7
                    }
                }
            }
        }
        if modules.is_empty() && replaced.is_empty() {
            let message = "expected a tensor of an adapter, found none".into();
            return Err(Error::File { path, message }); // C7
        }
        let (directory, config_hash) = (directory.into(), sha256(text));
        let checkpoint = Self { directory, config, config_hash, file, modules, replaced };
        checkpoint
            .modules
            .keys()
            .try_for_each(|module| checkpoint.check(module))
            .map_err(|error| error.in_file(&path))?;
        Ok(checkpoint)
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The SHA-256 of its weights and of its configuration, as they were when it was opened.
    pub(super) fn hashes(&self) -> Result<[String; 2]> {
        let weights = self.file.sha256().map_err(|error| Error::io(&self.directory.join(ADAPTER_FILE), &error))?;
        Ok([weights, self.config_hash.clone()])
    }

    /// `adapter_config.json`.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The names of the adapted modules, as in the base model.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.keys().map(String::as_str)
    }

    /// Tensors that take the place of the base's, by its names, and their names in the adapter's file: those of
    /// `modules_to_save`, and trained biases.
    pub fn replaced(&self) -> &BTreeMap<String, String> {
        &self.replaced
    }

    /// The names in the base of everything that is adapted or replaced.
    pub fn tensors_of_base(&self) -> impl Iterator<Item = String> {
        self.modules.keys().map(|module| format!("{module}.weight")).chain(self.replaced.keys().cloned())
    }

    /// The adapter's tensors.
    pub fn file(&self) -> &TensorFile<'static> {
        &self.file
    }

    /// Whether a module is an embedding.
    pub fn is_embedding(&self, module: &str) -> bool {
        self.modules.get(module).is_some_and(|tensors| tensors.embedding.iter().any(Option::is_some))
    }

    /// A module's learned tensors, in f64 and in the shapes in which they are stored.
    ///
    /// # Errors
    ///
    /// A module that the adapter does not have (C7); a tensor that cannot be read, or is not finite (C2); a scalar that
    /// is none (C1).
    pub fn adapter(&self, module: &str) -> Result<Adapter<f64>> {
        let missing = || Error::Missing { tensor: module.into(), expected: "a module of the adapter".into() };
        let tensors = self.modules.get(module).ok_or_else(missing)?; // C7
        let read = |name: &String| -> Result<ArrayD<f64>> {
            let (values, _) = self.file.values(name)?;
            check_finite(name, values.view())?; // C2
            Ok(values)
        };
        let scalar = |name: &String| -> Result<ArrayD<f64>> {
            let values = read(name)?;
            let (shape, expected) = (values.shape().to_vec(), "[]".into());
            let one = values.into_shape_with_order(IxDyn(&[]));
            one.map_err(|_| Error::Shape { tensor: name.clone(), expected, found: shape }) // C1
        };
        let lora = if self.is_embedding(module) { &tensors.embedding } else { &tensors.lora };
        let [a, b] = lora.each_ref().map(|name| name.as_ref().expect("checked when it was opened"));
        let [magnitude, alpha, beta] = &tensors.scales;
        Ok(Adapter {
            lora_a: read(a)?,
            lora_b: read(b)?,
            magnitude: magnitude.as_ref().map(read).transpose()?,
            alpha: alpha.as_ref().map(scalar).transpose()?,
            beta: beta.as_ref().map(scalar).transpose()?,
        })
    }

    /// The shapes of a module's A and B, as stored.
    pub(super) fn lora_shapes(&self, module: &str) -> Option<[&[usize]; 2]> {
        let tensors = self.modules.get(module)?;
        let [a, b] = if self.is_embedding(module) { &tensors.embedding } else { &tensors.lora };
        let shape = |name: &Option<String>| Some(self.file.info(name.as_ref()?)?.shape.as_slice());
        Some([shape(a)?, shape(b)?])
    }

    /// What B adds to a module's bias before it is multiplied by s: `[out]`; `None` where B has no bias.
    ///
    /// # Errors
    ///
    /// A tensor that cannot be read.
    pub fn lora_bias(&self, module: &str) -> Result<Option<ArrayD<f64>>> {
        let Some(name) = self.modules.get(module).and_then(|tensors| tensors.bias.as_ref()) else { return Ok(None) };
        let (values, _) = self.file.values(name)?;
        check_finite(name, values.view())?; // C2
        Ok(Some(values))
    }

    /// The name in the file of what plays a role in a module, for what is said of it.
    pub(super) fn tensor_name(&self, module: &str, role: &str) -> String {
        let tensors = &self.modules[module];
        let [a, b] = if self.is_embedding(module) { &tensors.embedding } else { &tensors.lora };
        let [magnitude, alpha, beta] = &tensors.scales;
        let [of_magnitude, of_alpha, _] = SCALE_NAMES;
        let name = match role {
            role if role.ends_with("_A") => a,
            role if role.ends_with("_B") => b,
            role if role == of_magnitude => magnitude,
            role if role == of_alpha => alpha,
            _ => beta,
        };
        name.clone().unwrap_or_else(|| format!("{module}.{role}"))
    }

    /// Fails unless a module has the tensors of its method, and A the rank of the configuration. C3, C7
    fn check(&self, module: &str) -> Result<()> {
        let (tensors, method) = (&self.modules[module], self.config.method());
        let unexpected = |name: &String, expected: &str| {
            Err(Error::Unexpected { tensor: name.clone(), reason: format!("expected {expected}") })
        };
        if let (Some(a), Some(b)) = (&tensors.embedding[0], &tensors.lora[0]) {
            return unexpected(a, &format!("an embedding or another layer, found both: {b}")); // C7
        }
        let embedding = self.is_embedding(module);
        let (names, lora) =
            if embedding { (LORA_NAMES[0], &tensors.embedding) } else { (LORA_NAMES[1], &tensors.lora) };
        let [magnitude, alpha, beta] = &tensors.scales;
        let (norm, scales) = (method != Method::Lora, method == Method::Wora);
        let roles = [
            (names[0], &lora[0], true),
            (names[1], &lora[1], true),
            (SCALE_NAMES[0], magnitude, norm),
            (SCALE_NAMES[1], alpha, scales),
            (SCALE_NAMES[2], beta, scales),
            (LORA_BIAS, &tensors.bias, self.config.lora_bias() && !embedding),
        ];
        for (role, name, needed) in roles {
            match (name, needed) {
                (None, true) => {
                    let expected = format!("a tensor, as {CONFIG_FILE} says {method}");
                    return Err(Error::Missing { tensor: format!("{module}.{role}"), expected }); // C7
                }
                (Some(name), false) => {
                    return unexpected(name, &format!("none, as {CONFIG_FILE} says {method}")); // C7
                }
                _ => {}
            }
        }
        if embedding && self.config.lora_bias() {
            let (name, expected) = ("lora_bias", format!("it off, as {module} is an embedding"));
            return Err(Error::Setting { name, expected, found: "it on".into() });
        }
        let [a, b] = lora.each_ref().map(|name| name.as_ref().expect("looked at above"));
        let [shape_a, shape_b] = [a, b].map(|name| &self.file.info(name).expect("a tensor of the file").shape);
        let rank = self.config.rank(module);
        if shape_a.len() < 2 || shape_a[0] != rank {
            let expected = format!("[{rank}, ...], the rank in {CONFIG_FILE}");
            return Err(Error::Shape { tensor: a.clone(), expected, found: shape_a.clone() }); // C3
        }
        // Beside a grouped convolution B has only the ranks of a group.
        if shape_b.len() < 2 || shape_b[1] == 0 || !rank.is_multiple_of(shape_b[1]) {
            let expected = format!("[..., {rank}], the rank in {CONFIG_FILE}");
            return Err(Error::Shape { tensor: b.clone(), expected, found: shape_b.clone() }); // C3
        }
        Ok(())
    }

    /// Writes the same adapter, its tensors byte for byte, into another directory.
    ///
    /// # Errors
    ///
    /// A directory that has something in it or cannot be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let infos = self.file.in_order().into_iter().map(|name| {
            let info = self.file.info(&name).expect("a tensor of the file");
            (Planned { name, dtype: info.dtype, shape: info.shape.clone() }, info)
        });
        let tensors: Vec<_> = infos
            .map(|(planned, info)| Ok((self.file.all_bytes(&planned.name, info)?, planned)))
            .collect::<Result<_>>()?;
        let (bytes, planned): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
        write_adapter(directory, &self.config, &planned, bytes.into_iter().map(Ok))
    }
}

type Place = fn(&mut ModuleTensors) -> &mut Option<String>;

/// The module that a tensor belongs to, and its place there; `None` for one that is no adapter's.
fn role(name: &str) -> Option<(&str, Place)> {
    let [[embedding_a, embedding_b], [a, b]] = LORA_NAMES;
    let [magnitude, alpha, beta] = SCALE_NAMES;
    let places: [(&str, Place); 9] = [
        (embedding_a, |tensors| &mut tensors.embedding[0]),
        (embedding_b, |tensors| &mut tensors.embedding[1]),
        (a, |tensors| &mut tensors.lora[0]),
        (b, |tensors| &mut tensors.lora[1]),
        (magnitude, |tensors| &mut tensors.scales[0]),
        (MAGNITUDE_OF_WORA, |tensors| &mut tensors.scales[0]),
        (alpha, |tensors| &mut tensors.scales[1]),
        (beta, |tensors| &mut tensors.scales[2]),
        (LORA_BIAS, |tensors| &mut tensors.bias),
    ];
    let of = |(end, place): (&str, Place)| Some((name.strip_suffix(end)?.strip_suffix('.')?, place));
    places.into_iter().find_map(of)
}
