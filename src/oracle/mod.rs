//! The oracle for other implementations: cases for them, and their results, read from files and held against this
//! crate's.
//!
//! One round: a file of inputs, somebody's answers, the verdict.
//!
//! ```
//! use woracle::case::Tensors;
//! use woracle::oracle::verify::{Tolerance, Verdict, unanswered, verify};
//! use woracle::oracle::{CaseFile, Dtype, case_file, golden};
//! use woracle::registry::{self, Precision};
//! let blind = golden::Options { dtype: Dtype::F32, answers: false, ..Default::default() };
//! let (_, bytes) = golden::cases("linear-plain", blind)?.next().expect("one case")?;
//!
//! // Here somebody else's program would read the file, and write y into it.
//! let mut case = case_file::parse(&bytes, "linear-plain")?.case;
//! let y = registry::layer("linear")?.evaluate(&case, Precision::F32)?.remove("y").expect("a result");
//! case.extend(Tensors::from([("y".to_string(), y)]));
//! let file = CaseFile::new(case, Dtype::F32);
//!
//! let tensors = verify(&file, Tolerance::default())?;
//! assert_eq!(tensors.len(), 1);
//! assert_eq!((tensors[0].name.as_str(), tensors[0].verdict), ("y", Verdict::Pass));
//! assert!(tensors[0].max_abs_error > 0.0 && tensors[0].error_over_bound < 1.0); // off by roundings of f32
//! assert!(unanswered(&file)?.contains(&"grad.lora_A".to_string()));
//! # Ok::<(), woracle::Error>(())
//! ```

pub mod case_file;
pub mod diagnose;
mod facts;
pub mod golden;
mod judge;
pub mod verify;

pub use crate::dtype::Dtype;
pub use case_file::CaseFile;
