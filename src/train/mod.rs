//! Training small models on a CPU: a base model is trained, frozen and adapted, in one command. SPEC.md, section 14.
//!
//! ```no_run
//! use std::path::Path;
//! use woracle::train::{Run, Unwatched, Start, read};
//! let config = read(Path::new("examples/digits-cnn.toml"))?;
//! let summary = Run::new(&config, Path::new("runs/digits-cnn"), Start::Fresh)?.finish(&Unwatched)?;
//! println!("{summary}");
//! # Ok::<(), woracle::Error>(())
//! ```

mod adapting;
mod blame;
pub mod compare;
mod config;
mod curves;
pub mod data;
mod evaluation;
mod files;
mod fitting;
mod metrics;
mod model;
mod optimiser;
mod place;
mod prepared;
mod run;
mod schedule;
mod seeds;
mod stage;
mod state;

pub use adapting::AdapterTable;
pub(crate) use config::parse;
pub use config::{Config, Monitor, ReadConfig, SplitTable, StageTable, read};
pub use curves::curves;
pub(crate) use curves::{Points, losses, scales, validations};
pub use evaluation::Evaluation;
pub(crate) use metrics::records;
pub use metrics::{METRICS_FILE, Record};
pub use model::Model;
pub use optimiser::{Optimiser, OptimiserTable, Rates};
pub use prepared::Prepared;
pub use run::{Run, Start, Summary};
pub use schedule::{Decay, Schedule};
pub use stage::{Observer, Progress, Unwatched};
pub use state::STATE_FILE;
