//! The weighted direction: everything that is WoRA, written once over any operator.
//!
//! `W' = m V / ||V||`, `V = beta W0 + alpha s B A`. SPEC.md, sections 4 to 7.
//!
//! A layer of one unit over two features, followed by hand from V to y:
//!
//! ```
//! use ndarray::{ArrayD, array};
//! use woracle::operators::Linear;
//! use woracle::wora::{Adapter, Base, Config, Layer, Method};
//! let operator = Linear { in_features: 2, out_features: 1, fan_in_fan_out: false };
//! let base = Base { weight: array![[3.0, 2.0]].into_dyn().into(), bias: None }; // W0 [out, in]
//! let adapter = Adapter {
//!     lora_a: array![[0.0, 1.0]].into_dyn(), // A [rank, in]
//!     lora_b: array![[2.0]].into_dyn(), // B [out, rank]
//!     magnitude: Some(array![10.0].into_dyn()), // m [out]
//!     alpha: Some(ArrayD::from_elem(vec![], 1.0)),
//!     beta: Some(ArrayD::from_elem(vec![], 1.0)),
//! };
//! let mut layer = Layer::new(operator, Config::new(Method::Wora, 1.0), base, adapter)?; // s = 1
//! assert_eq!(layer.weighted(), array![[3.0, 4.0]].into_dyn()); // V = W0 + B A
//! let direction = layer.direction()?.expect("WoRA has norms");
//! assert_eq!((direction.weight_norm[0], direction.gain[0]), (5.0, 2.0)); // n = ||V||, g = m / n
//! assert_eq!(layer.merge()?.weight, array![[6.0, 8.0]].into_dyn()); // W' = g V
//! let x = array![[1.0, 1.0]].into_dyn();
//! assert_eq!(layer.forward(x.view().into(), None)?.0, array![[14.0]].into_dyn()); // y = x W'^T
//!
//! // What an optimiser does between two steps.
//! for (name, mut values) in layer.adapter_mut() {
//!     if name == "lora_magnitude_vector" {
//!         values.fill(5.0);
//!     }
//! }
//! assert_eq!(layer.forward(x.view().into(), None)?.0, array![[7.0]].into_dyn()); // half of it
//! # Ok::<(), woracle::Error>(())
//! ```

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
