//! The digits that are part of the program; where they come from stands in the documentation of the folder.

use super::{Column, CsvFile, Dataset, Features, Label, Task, csv};
use crate::Result;
use flate2::read::GzDecoder;
use ndarray::IxDyn;
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::Path;

const DIGITS: &[u8] = include_bytes!("digits.csv.gz");
const PIXELS: usize = 64;

/// Features `[1797, 1, 8, 8]`, 10 classes.
pub(super) fn load() -> Result<Dataset> {
    let path = Path::new("digits.csv.gz");
    let file = CsvFile {
        path: path.into(),
        label: Some(Label::One(Column::Number(PIXELS))),
        header: false,
        task: Task::Classification,
        classes: NonZeroUsize::new(10),
    };
    let mut bytes = vec![];
    GzDecoder::new(DIGITS).read_to_end(&mut bytes).expect("the embedded digits");
    let mut digits = csv::parse(&bytes, &file, path)?;
    if let Features::Values(values) = digits.features {
        let shape = [values.len() / PIXELS, 1, 8, 8];
        digits.features = Features::Values(values.into_shape_with_order(IxDyn(&shape)).expect("64 pixels"));
    }
    Ok(digits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::Targets;

    #[test]
    fn the_digits_are_the_known_ones() {
        let digits = load().unwrap();
        assert_eq!((digits.len(), digits.sample_shape(), digits.classes), (1797, &[1, 8, 8][..], Some(10)));
        let (Features::Values(values), Targets::Classes(classes)) = (&digits.features, &digits.targets) else {
            panic!("{digits:?}")
        };
        assert_eq!(values.iter().take(8).copied().collect::<Vec<_>>(), [0.0, 0.0, 5.0, 13.0, 9.0, 1.0, 0.0, 0.0]);
        // Both sums are those that NumPy takes of the same file.
        assert_eq!((values.sum(), classes.sum()), (561_718.0, 8070));
        assert_eq!(values.iter().copied().fold(0.0, f64::max), 16.0);
    }
}
