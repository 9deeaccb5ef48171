//! The oracle for other implementations: somebody's results, read from files and held against this crate's.

pub mod case_file;
pub mod verify;
