//! Whatever the bytes are: an answer or a clear error, never a panic, a hang or memory that they only claim to need.
//!
//! A target is a function of bytes, so that the fuzzer and the tests of the product (`tests/fuzz.rs`) run the same.

mod adapter_config;
mod adapter_tensors;
mod arguments;
mod base_shards;
mod case_file;
mod configuration;
mod convolution;
mod data;
mod factored;
mod files;
mod product;
mod record;

// Shared with the tests of laws.
#[allow(dead_code)]
#[path = "../../tests/any_case/mod.rs"]
mod any_case;

/// A target: whether there was anything in the bytes to try.
pub type Target = fn(&[u8]) -> bool;

/// Every target, by the name of its binary and of its directory of seeds.
pub static TARGETS: &[(&str, Target)] = &[
    ("adapter_config", adapter_config::run),
    ("adapter_tensors", adapter_tensors::run),
    ("arguments", arguments::run),
    ("base_shards", base_shards::run),
    ("record", record::run),
    ("case_file", case_file::run),
    ("configuration", configuration::run),
    ("csv", data::csv),
    ("idx", data::idx),
    ("npy", data::npy),
    ("npz", data::npz),
    ("text", data::text),
    ("convolution", convolution::run),
    ("factored", factored::run),
    ("product", product::run),
];

/// The target of this name.
///
/// # Panics
///
/// If there is none.
pub fn target(name: &str) -> Target {
    TARGETS.iter().find(|(known, _)| *known == name).expect("a target of this name").1
}
