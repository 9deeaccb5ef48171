//! The weights of a base model: one safetensors file, or shards and their index.

use super::record::RECORD_FILE;
use crate::tensor_file::TensorFile;
use crate::text_file::{LONGEST_CONFIGURATION, read_text};
use crate::{Error, Result};
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The only file of a model that has one.
pub const MODEL_FILE: &str = "model.safetensors";
/// Which tensor is in which shard.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Names under which a model has its input embedding and its output layer, of which a tied model stores one.
const TIED: [&[&str]; 2] =
    [&["embed_tokens", "wte", "word_embeddings", "embed_in", "shared"], &["lm_head", "embed_out"]];

/// What models are wrapped in, so that names begin otherwise in the file of the model inside.
const WRAPPERS: &[&str] = &["model", "base_model", "transformer", "language_model", "bert", "roberta", "distilbert"];

/// A model's weights, read a tensor at a time.
///
/// ```
/// use woracle::peft::{Found, Model};
/// # let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/text-dora");
/// let model = Model::open(&data.join("model.safetensors"))?;
/// let (file, info) = model.tensor("fc1.weight")?;
/// assert_eq!(info.shape, [20, 16]); // [out, in]
/// assert_eq!(file.values("fc1.weight")?.0.shape(), [20, 16]);
/// assert_eq!((model.shards().len(), model.place("fc1.weight"), model.directory()), (1, Some(0), None));
/// // An adapter's names, which may begin otherwise than the model's.
/// let naming = model.naming(&["base_model.fc1.weight".to_string(), "base_model.fc2.weight".to_string()])?;
/// assert_eq!(naming.find("base_model.fc1.weight")?, Found::Itself("fc1.weight".into()));
/// assert!(!naming.shared_with("fc1.weight"));
/// # Ok::<(), woracle::Error>(())
/// ```
pub struct Model {
    /// The directory that has everything, where the model is not a file alone.
    directory: Option<PathBuf>,
    shards: Vec<Shard>,
    /// What the index says beside where tensors are; `None` where there is one file.
    index: Option<Map<String, Value>>,
    /// In which shard a tensor is.
    places: BTreeMap<String, usize>,
}

/// A file of a model.
pub struct Shard {
    /// Where it is.
    pub path: PathBuf,
    /// Its tensors.
    pub file: TensorFile<'static>,
}

/// Where a module's tensor is found in a base model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Under this name.
    Itself(String),
    /// The model stores it once for two modules, under the other's name.
    Tied {
        /// The name that it would have.
        own: String,
        /// The name that it has.
        shared: String,
    },
}

impl Found {
    /// The name in the base model.
    pub fn name(&self) -> &str {
        match self {
            Self::Itself(name) | Self::Tied { shared: name, .. } => name,
        }
    }

    /// The name that it has once it is changed.
    pub fn own_name(&self) -> &str {
        match self {
            Self::Itself(name) | Self::Tied { own: name, .. } => name,
        }
    }
}

impl Model {
    /// Opens a model: a safetensors file, or a directory with one or with shards and their index.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is no whole safetensors file; an index that names a shard that is not there or a
    /// tensor that its shard does not have.
    pub fn open(path: &Path) -> Result<Self> {
        let about = std::fs::metadata(path).map_err(|error| Error::io(path, &error))?;
        if !about.is_dir() {
            return Self::of_file(None, path);
        }
        let (single, index) = (path.join(MODEL_FILE), path.join(INDEX_FILE));
        if index.is_file() {
            return Self::of_index(path, &index);
        }
        if single.is_file() {
            return Self::of_file(Some(path), &single);
        }
        let message = format!("expected {MODEL_FILE} or {INDEX_FILE}, found neither");
        Err(Error::File { path: path.into(), message })
    }

    fn of_file(directory: Option<&Path>, path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let places = file.tensors().into_keys().map(|name| (name, 0)).collect();
        let shards = vec![Shard { path: path.into(), file }];
        Ok(Self { directory: directory.map(Into::into), shards, index: None, places })
    }

    fn of_index(directory: &Path, path: &Path) -> Result<Self> {
        let refuse = |message: String| Error::File { path: path.into(), message };
        let text = read_text(path, LONGEST_CONFIGURATION)?;
        let mut index: Map<String, Value> =
            serde_json::from_str(&text).map_err(|error| refuse(format!("expected a JSON object, found {error}")))?;
        let map = match index.remove("weight_map") {
            Some(Value::Object(map)) => map,
            other => {
                let found = other.map_or_else(|| "none".into(), |value| value.to_string());
                return Err(refuse(format!("weight_map: expected an object, found {found}")));
            }
        };
        let mut by_shard: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, shard) in map {
            // A shard lies beside its index, and nowhere else.
            let name = shard.as_str().filter(|name| Path::new(name).file_name().is_some_and(|file| file == *name));
            let name =
                name.ok_or_else(|| refuse(format!("weight_map: {tensor}: expected a file's name, found {shard}")))?;
            by_shard.entry(name.into()).or_default().push(tensor);
        }
        if by_shard.contains_key(RECORD_FILE) {
            return Err(refuse(format!("weight_map: expected shards, found {RECORD_FILE}")));
        }
        let (mut shards, mut places) = (vec![], BTreeMap::new());
        for (name, tensors) in by_shard {
            let shard = directory.join(&name);
            if !shard.is_file() {
                return Err(refuse(format!("weight_map: expected the shard {name}, found no such file")));
            }
            let file = TensorFile::open(&shard)?;
            let there = file.tensors();
            if let Some(missing) = tensors.iter().find(|tensor| !there.contains_key(*tensor)) {
                return Err(refuse(format!("weight_map: {missing}: expected in {name}, found none")));
            }
            for tensor in there.into_keys() {
                if places.insert(tensor.clone(), shards.len()).is_some() {
                    return Err(refuse(format!("{tensor}: expected in one shard, found in {name} too")));
                }
            }
            shards.push(Shard { path: shard, file });
        }
        Ok(Self { directory: Some(directory.into()), shards, index: Some(index), places })
    }

    /// The directory of a model that is one.
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// Its files.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// What the index says beside where tensors are; `None` where there is one file.
    pub fn index(&self) -> Option<&Map<String, Value>> {
        self.index.as_ref()
    }

    /// Which shard a tensor is in.
    pub fn place(&self, tensor: &str) -> Option<usize> {
        self.places.get(tensor).copied()
    }

    /// The file that a tensor is in, or the model's own place.
    pub(super) fn path_of(&self, tensor: &str) -> &Path {
        let shard = self.place(tensor).or((self.shards.len() == 1).then_some(0));
        shard.map_or_else(|| self.directory.as_deref().unwrap_or(Path::new("")), |shard| &self.shards[shard].path)
    }

    /// A tensor's file, type and shape.
    ///
    /// # Errors
    ///
    /// A tensor that is not there (C7).
    pub fn tensor(&self, name: &str) -> Result<(&TensorFile<'static>, &TensorInfo)> {
        let missing = || Error::Missing { tensor: name.into(), expected: "a tensor of the base model".into() }; // C7
        let file = &self.shards[self.place(name).ok_or_else(missing)?].file;
        Ok((file, file.info(name).ok_or_else(missing)?))
    }

    /// How these tensors of an adapter are named here: as they are, or all with the same beginning put before or taken
    /// away.
    ///
    /// # Errors
    ///
    /// Tensors that are not all there under any such naming, or under several (C7).
    pub fn naming(&self, tensors: &[String]) -> Result<Naming<'_>> {
        let plain = Naming { model: self, prefix: Prefix::None };
        let Some(missing) = tensors.iter().find(|tensor| plain.find(tensor).is_err()) else { return Ok(plain) };
        let longer = self.places.keys().filter_map(|name| Some(Prefix::Before(beginning(name, missing)?.into())));
        let shorter = self.places.keys().filter_map(|name| Some(Prefix::Away(beginning(missing, name)?.into())));
        // One module alone proves nothing unless its wrapper is a known one.
        let modules: BTreeSet<&str> = tensors.iter().filter_map(|tensor| Some(tensor.rsplit_once('.')?.0)).collect();
        let proves = |prefix: &Prefix| modules.len() > 1 || prefix.is_known();
        let fits = |naming: &Naming<'_>| tensors.iter().all(|tensor| naming.find(tensor).is_ok());
        let namings = longer.chain(shorter).filter(proves).map(|prefix| Naming { model: self, prefix }).filter(fits);
        let mut namings: Vec<Naming<'_>> = namings.collect();
        namings.dedup_by(|one, other| one.prefix == other.prefix);
        match namings.len() {
            0 => Err(plain.find(missing).expect_err("a tensor that is missing")),
            1 => Ok(namings.remove(0)),
            _ => {
                let names: Vec<_> = namings.iter().filter_map(|naming| naming.find(missing).ok()).collect();
                let names: Vec<_> = names.iter().map(Found::name).collect();
                let reason = format!(
                    "expected one tensor of the base model, found several that may be meant: {}",
                    names.join(", ")
                );
                Err(Error::Unexpected { tensor: missing.clone(), reason })
            }
        }
    }
}

/// What stands before an end, with the dot between them.
fn beginning<'n>(name: &'n str, end: &str) -> Option<&'n str> {
    name.strip_suffix(end).filter(|start| start.ends_with('.'))
}

/// How an adapter's names become a model's.
pub struct Naming<'m> {
    model: &'m Model,
    prefix: Prefix,
}

#[derive(Clone, Debug, PartialEq)]
enum Prefix {
    None,
    /// The model has this before every name.
    Before(String),
    /// The model has every name without this.
    Away(String),
}

impl Prefix {
    /// Whether this is what models are wrapped in, and no module that happens to end alike.
    fn is_known(&self) -> bool {
        let (Self::Before(prefix) | Self::Away(prefix)) = self else { return true };
        prefix.trim_end_matches('.').split('.').all(|part| WRAPPERS.contains(&part))
    }
}

impl Naming<'_> {
    /// Where a tensor is: under its name, or under that of the module that it is tied to.
    ///
    /// # Errors
    ///
    /// One that is not there (C7).
    pub fn find(&self, tensor: &str) -> Result<Found> {
        let missing = || Error::Missing { tensor: tensor.into(), expected: "a tensor of the base model".into() }; // C7
        let name = match &self.prefix {
            Prefix::None => tensor.to_string(),
            Prefix::Before(prefix) => format!("{prefix}{tensor}"),
            Prefix::Away(prefix) => tensor.strip_prefix(prefix).ok_or_else(missing)?.to_string(),
        };
        let places = &self.model.places;
        if places.contains_key(&name) {
            return Ok(Found::Itself(name));
        }
        let [inputs, outputs] = TIED;
        let others = if is_among(inputs, &name) { outputs } else { inputs };
        let may_be_tied = is_among(inputs, &name) || is_among(outputs, &name);
        let tied: Vec<&String> = places.keys().filter(|other| may_be_tied && is_among(others, other)).collect();
        match tied.as_slice() {
            [one] => Ok(Found::Tied { own: name, shared: (*one).clone() }),
            _ => Err(missing()),
        }
    }

    /// The modules that share a tensor with this one where the model stores it once: it changes with it.
    pub fn shared_with(&self, name: &str) -> bool {
        let [inputs, outputs] = TIED;
        let others = if is_among(inputs, name) { outputs } else { inputs };
        let may_be_tied = is_among(inputs, name) || is_among(outputs, name);
        may_be_tied && !self.model.places.keys().any(|other| is_among(others, other))
    }
}

/// Whether a weight is that of a module of one of these names.
fn is_among(names: &[&str], weight: &str) -> bool {
    let module = weight.strip_suffix(".weight").and_then(|module| module.rsplit('.').next());
    module.is_some_and(|module| names.contains(&module))
}
