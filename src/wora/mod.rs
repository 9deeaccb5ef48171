//! The weighted direction: everything that is WoRA, written once over any operator.
//!
//! `W' = m V / ||V||`, `V = beta W0 + alpha s B A`. SPEC.md, sections 4 to 7.

mod adapter;
mod config;
mod definition;
mod direction;
mod layer;
mod merge;
mod passes;
mod rounding;
mod watch;
mod workspace;

pub use adapter::{Adapter, Base, LoraInit};
pub(crate) use adapter::{SCALE_NAMES, as_matrix, magnitude_shape};
pub use config::{Config, Method, NormAxis, NormGradient, ZeroNorm, scaling};
pub use definition::{Definition, Evaluation};
pub use direction::{CANCELLATION, Direction};
pub use layer::Layer;
pub use merge::Merged;
pub(crate) use passes::check_mask;
pub use passes::{Cache, Gradients, RequiresGrad};
pub use rounding::Storage;
pub(crate) use watch::watched;
pub use watch::{Line, Watch};
pub use workspace::Workspace;
