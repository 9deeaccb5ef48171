//! The oracle for other implementations: cases for them, and their results, read from files and held against this
//! crate's.

pub mod case_file;
pub mod diagnose;
mod facts;
pub mod golden;
pub mod verify;

pub use crate::dtype::Dtype;
pub use case_file::CaseFile;
