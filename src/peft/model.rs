//! The weights of a base model: one safetensors file, or shards and their index.

use crate::tensor_file::TensorFile;
use crate::{Error, Result};
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The only file of a model that has one.
pub const MODEL_FILE: &str = "model.safetensors";
/// Which tensor is in which shard.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Names under which a model has its input embedding and its output layer, of which a tied model stores one.
const TIED: [&[&str]; 2] =
    [&["embed_tokens", "wte", "word_embeddings", "embed_in", "shared"], &["lm_head", "embed_out"]];

/// A model's weights, read a tensor at a time.
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
    /// The model stores it once for two modules: under this name, which is the other's.
    Tied(String),
}

impl Found {
    /// The name in the base model.
    pub fn name(&self) -> &str {
        match self {
            Self::Itself(name) | Self::Tied(name) => name,
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
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, &error))?;
        let mut index: Map<String, Value> =
            serde_json::from_str(&text).map_err(|error| refuse(format!("expected a JSON object, found {error}")))?;
        let Some(Value::Object(map)) = index.remove("weight_map") else {
            return Err(refuse("weight_map: expected an object, found none".into()));
        };
        let mut by_shard: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, shard) in map {
            // A shard lies beside its index, and nowhere else.
            let name = shard.as_str().filter(|name| Path::new(name).file_name().is_some_and(|file| file == *name));
            let name =
                name.ok_or_else(|| refuse(format!("weight_map: {tensor}: expected a file's name, found {shard}")))?;
            by_shard.entry(name.into()).or_default().push(tensor);
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
            places.extend(there.into_keys().map(|tensor| (tensor, shards.len())));
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

    /// Where a tensor is: under its own name, under one that differs by a prefix, or under that of the module that it is
    /// tied to.
    ///
    /// # Errors
    ///
    /// One that is nowhere, or may be in several places (C7).
    pub fn find(&self, tensor: &str) -> Result<Found> {
        if self.places.contains_key(tensor) {
            return Ok(Found::Itself(tensor.into()));
        }
        let is_end = |of: &str, end: &str| of.strip_suffix(end).is_some_and(|start| start.ends_with('.'));
        let prefixed: Vec<&String> =
            self.places.keys().filter(|name| is_end(name, tensor) || is_end(tensor, name)).collect();
        match prefixed.as_slice() {
            [one] => return Ok(Found::Itself((*one).clone())),
            [] => {}
            [one, other, ..] => {
                let expected = format!("one tensor of the base model, found several that may be meant: {one}, {other}");
                return Err(Error::Unexpected { tensor: tensor.into(), reason: format!("expected {expected}") });
            }
        }
        let module = |name: &str| -> Option<String> { Some(name.strip_suffix(".weight")?.rsplit('.').next()?.into()) };
        let among = |names: &[&str], name: &str| module(name).is_some_and(|module| names.contains(&module.as_str()));
        let [inputs, outputs] = TIED;
        let others = if among(inputs, tensor) { outputs } else { inputs };
        let tied: Vec<&String> = match among(inputs, tensor) || among(outputs, tensor) {
            true => self.places.keys().filter(|name| among(others, name)).collect(),
            false => vec![],
        };
        match tied.as_slice() {
            [one] => Ok(Found::Tied((*one).clone())),
            _ => {
                let expected = "a tensor of the base model".into();
                Err(Error::Missing { tensor: tensor.into(), expected }) // C7
            }
        }
    }
}
