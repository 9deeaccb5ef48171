//! The factored layer against the definition: any layer, shape and settings, every result within its rounding.

use super::any_case::{Choices, any_case};
use woracle::oracle::verify::{Tolerance, verify};
use woracle::oracle::{CaseFile, Dtype};
use woracle::registry::Precision;

/// The bound is a root of summed squares, which a search for the worst case exceeds. What is wrong exceeds it by millions.
const BEYOND: f64 = 32.0;

pub fn run(bytes: &[u8]) -> bool {
    let Some((layer, case)) = any_case(&mut Choices::new(bytes)) else { return false };
    for (precision, dtype) in [(Precision::F64, Dtype::F64), (Precision::F32, Dtype::F32)] {
        // A unit without a direction is refused, by the definition too.
        let results = match (layer.evaluate(&case, precision), layer.define(&case)) {
            (Ok(results), Ok(_)) => results,
            (Err(_), Err(_)) => return false,
            (ours, defined) => panic!("{:?}, defined: {:?}, of {:?}", ours.err(), defined.err(), case.settings),
        };
        let mut answered = case.clone();
        answered.extend(results);
        for tensor in verify(&CaseFile::new(answered, dtype), Tolerance::default()).expect("a whole case") {
            assert!(tensor.error_over_bound <= BEYOND, "{tensor:?} of {:?}", case.settings);
        }
    }
    true
}
