//! The oracle for other implementations: cases for them, and their results, read from files and held against this
//! crate's.

pub mod case_file;
pub mod diagnose;
mod dtype;
mod facts;
pub mod golden;
pub mod verify;

pub use case_file::CaseFile;
pub use dtype::Dtype;
