//! The reference implementation of WoRA (weighted-direction low-rank adaptation).
//!
//! A frozen weight W0 gets a correction of low rank, and of both together only the direction is kept; its length is learned:
//!
#![doc = include_str!("../docs/front_page.md")]
//!
//! From the equation to the code in five links:
//!
//! 1. A, B, m, alpha and beta are a [`wora::Adapter`]; s, and how the norm is taken, a [`wora::Config`]. Alpha = beta = 1 is
//!    DoRA, no norm is LoRA.
//! 2. The equation in plain loops, forward and backward, one line a formula: [`wora::Definition`].
//! 3. What op is, and its adjoints: an [`operators::Operator`] such as [`operators::Linear`]. It knows nothing of adapters.
//! 4. The same without forming V, W' or dW', fast: [`wora::Layer`], its forward right above its backward.
//! 5. Who says that this is right: [`gradcheck`], with the definition, differences, dual numbers and identities.
//!
//! Beside: [`explain`] walks through one forward and backward with numbers; [`oracle`] judges other implementations by files,
//! and knows the [`mistakes`] that they make; [`peft`] reads, merges, unmerges and writes adapters as PEFT keeps them on
//! disk; [`modules`] and [`train`] build and train small models; [`report`] is what is found, as a page.
//!
//! Programs to begin with, in `examples/`: `check_your_own_layer.rs`, `verify_a_file.rs`, `merge_an_adapter.rs`, and for training
//! `digits_cnn.rs`, `digits_mlp.rs` and `chars_transformer.rs`.
//!
//! The derivation of every line is in SPEC.md, whose text is [`spec::TEXT`]; `// E9` beside a line is the label of its formula there,
//! `// C1` the constraint that a check enforces.

pub mod aside;
pub mod bench;
pub mod case;
pub mod cases;
pub mod chart;
// The command `wora`; its documentation is `--help`.
#[doc(hidden)]
pub mod cli;
pub mod explain;
pub mod gradcheck;
pub mod lock;
pub mod matmul;
pub mod mistakes;
pub mod modules;
pub mod operators;
pub mod oracle;
pub mod page;
pub mod peft;
pub mod registry;
pub mod report;
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
mod text_file;

pub use counted::Counted;
pub use dual::{Dual, DualForward, DualTensors};
pub use error::{Error, Result};
pub use rounded::Rounded;
pub use scalar::{Real, Scalar};
pub use wora::{NormAxis, NormGradient};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExamples;
