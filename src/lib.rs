//! The reference implementation of WoRA (weighted-direction low-rank adaptation).
//!
//! ```text
//! V  = beta W0 + alpha s B A          one row of V an output unit
//! W' = m V / ||V||                    y = op(x, W') + b
//! ```
//!
//! A way through the house, from the equation to the code:
//!
//! 1. [`wora::Config`]: the settings; alpha = beta = 1 is DoRA, no norm is LoRA.
//! 2. [`wora::Definition`]: the equation in plain loops, forward and backward.
//! 3. [`operators`]: what x and W do to each other. They know nothing of adapters.
//! 4. [`wora::Layer`]: the fast path, which never forms V, W' or dW'.
//! 5. [`peft`]: adapters as PEFT keeps them on disk, read, merged, unmerged and written.
//! 6. [`gradcheck`] and [`oracle`]: who says that all this is right. [`mistakes`]: what they must see.
//!
//! The derivation of every line is in SPEC.md; `// E9` beside a line is the label of its formula there,
//! `// C1` the constraint that a check enforces.

pub mod bench;
pub mod case;
pub mod cases;
pub mod explain;
pub mod gradcheck;
pub mod matmul;
pub mod mistakes;
pub mod modules;
pub mod operators;
pub mod oracle;
pub mod page;
pub mod peft;
pub mod registry;
pub mod spec;
pub mod tensor_file;
pub mod tensor_writer;
pub mod traced;
pub mod train;
pub mod wora;

mod counted;
mod digest;
mod dtype;
mod dual;
mod error;
mod rounded;
mod scalar;
mod simd;
mod whole_file;

pub use counted::Counted;
pub use dual::{Dual, DualForward, DualTensors};
pub use error::{Error, Result};
pub use rounded::Rounded;
pub use scalar::{Real, Scalar};
pub use wora::{NormAxis, NormGradient};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;
