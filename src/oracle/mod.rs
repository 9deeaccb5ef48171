//! The oracle for other implementations: cases for them, and their results, read from files and held against this
//! crate's.

pub mod case_file;
mod dtype;
pub mod verify;

pub use case_file::CaseFile;
pub use dtype::Dtype;
