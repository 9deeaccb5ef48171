//! Case files: read, and judged where that is quick.

use woracle::case::Case;
use woracle::oracle::{case_file, verify};

pub fn run(bytes: &[u8]) -> bool {
    let Ok(file) = case_file::parse(bytes, "fuzzed") else { return false };
    let elements =
        |case: &Case| case.tensors.values().map(|tensor| tensor.shape().iter().product::<usize>()).sum::<usize>();
    if elements(&file.case) < 2_000 {
        let _ = verify::verify(&file, verify::Tolerance::default());
    }
    let again = case_file::parse(&file.to_bytes(), "fuzzed").expect("what was written");
    assert_eq!(again.case.settings, file.case.settings);
    true
}
