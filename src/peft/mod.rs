//! Adapters as PEFT keeps them on disk: `adapter_config.json` and `adapter_model.safetensors`, over the weights of a base
//! model. Read, inspected, merged, unmerged, and written so that PEFT loads them.
//!
//! ```
//! use woracle::peft::Checkpoint;
//! use woracle::{operators::Linear, peft};
//! # let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/text-dora");
//! let adapter = Checkpoint::open(&data.join("adapter"))?;
//! assert_eq!(adapter.modules().collect::<Vec<_>>(), ["conv", "embed", "fc1", "fc2"]);
//! let base = peft::Model::open(&data.join("model.safetensors"))?;
//! let layer = peft::load::<Linear, f32>(&adapter, &base, "fc1", Default::default())?; // ready to train
//! assert_eq!(layer.adapter().rank(), 4);
//! # Ok::<(), woracle::Error>(())
//! ```

mod checkpoint;
pub mod compare;
mod config;
mod inspect;
mod merge;
mod model;
mod module;
mod record;
mod rewrite;
mod save;
#[cfg(test)]
mod tests;
mod unmerge;

pub use checkpoint::{ADAPTER_FILE, Checkpoint};
pub use config::{AdapterConfig, CONFIG_FILE};
pub use inspect::{ModuleReport, inspect};
pub use merge::{MergeOptions, Progress, merge, merged_bytes, warnings};
pub use model::{Found, INDEX_FILE, MODEL_FILE, Model, Naming, Shard};
pub use module::{Kind, Module};
pub use record::{Change, Changed, RECORD_FILE};
pub use save::{load, save};
pub use unmerge::unmerge;
