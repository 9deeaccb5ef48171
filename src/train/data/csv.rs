//! Tables of numbers: a row is a sample, one column its label, or several the values of a regression.

use super::columns::Columns;
use super::read::{check_class, count_classes, open, refuse, shown};
use super::{Dataset, Features, Label, Targets};
use crate::{Error, Result};
use ::csv::{ByteRecord, ReaderBuilder, Trim};
use ndarray::{ArrayD, IxDyn};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

/// The keys of `format = "csv"`.
#[derive(Clone, Debug, PartialEq)]
pub struct CsvFile {
    /// The file; one that ends in `.gz` is decompressed.
    pub path: PathBuf,
    /// What is to be said, every other column is a feature; `None` is the last column.
    pub label: Option<Label>,
    /// Whether the first row names the columns.
    pub header: bool,
    /// What the label is.
    pub task: Task,
    /// How many classes there are; `None` counts up to the largest label.
    pub classes: Option<NonZeroUsize>,
}

/// What is to be said.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// One column of integers from 0.
    #[default]
    Classification,
    /// One column of numbers or more.
    Regression,
}

/// A table is held as a whole: a small .gz may claim to be as large as any disk.
const MOST_BYTES: u64 = 1 << 30;

pub(super) fn load(file: &CsvFile, directory: &Path) -> Result<Dataset> {
    let path = directory.join(&file.path);
    let mut bytes = vec![];
    open(&path)?.0.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(|error| Error::io(&path, &error))?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(refuse(&path, format!("expected at most {MOST_BYTES} bytes, found more")));
    }
    parse(&bytes, file, &path)
}

/// Features `[rows, columns that are no label]`; the path is for what goes wrong.
pub(super) fn parse(bytes: &[u8], file: &CsvFile, path: &Path) -> Result<Dataset> {
    let refuse = |message: String| refuse(path, message);
    // Rows of another length are found below, where their line is known.
    let mut reader = ReaderBuilder::new().has_headers(file.header).flexible(true).trim(Trim::All).from_reader(bytes);
    let first = reader.byte_headers().map_err(|error| refuse(error.to_string()))?.clone();
    let columns = Columns { first: &first, named: file.header };
    let labels = columns.labels(file).map_err(refuse)?;
    let is_label: Vec<bool> = (0..first.len()).map(|column| labels.contains(&column)).collect();

    let (mut values, mut classes, mut outputs) = (vec![], vec![], vec![]);
    let mut record = ByteRecord::new();
    let mut rows = 0;
    while reader.read_byte_record(&mut record).map_err(|error| refuse(error.to_string()))? {
        let refuse = |message: String| refuse(format!("line {}: {message}", line_of(&record, bytes)));
        if record.len() != first.len() {
            return Err(refuse(format!("expected {} columns, found {}", first.len(), record.len())));
        }
        let number = |column: usize| {
            finite(&record[column]).ok_or_else(|| {
                let (name, found) = (columns.name(column), shown(&record[column]));
                refuse(format!("{name}: expected a finite number, found {found}"))
            })
        };
        for column in (0..first.len()).filter(|&column| !is_label[column]) {
            values.push(number(column)?);
        }
        for &column in &labels {
            let label = number(column)?;
            if file.task == Task::Regression {
                outputs.push(label);
                continue;
            }
            let at = |expected: String| refuse(format!("{}: {expected}", columns.name(column)));
            if label.fract() != 0.0 {
                return Err(at(format!("expected an integer from 0, found {label}")));
            }
            check_class(label as i64, file.classes).map_err(at)?;
            classes.push(label as i64);
        }
        rows += 1;
    }
    if rows == 0 {
        return Err(refuse("expected at least one row of numbers, found none".into()));
    }
    let array = |values: Vec<f64>| {
        let shape = IxDyn(&[rows, values.len() / rows]);
        ArrayD::from_shape_vec(shape, values).map_err(|error| refuse(error.to_string()))
    };
    let features = Features::Values(array(values)?);
    Ok(match file.task {
        Task::Regression => Dataset::independent(features, Targets::Values(array(outputs)?), None),
        Task::Classification => {
            let count = count_classes(&classes, file.classes);
            let classes = Targets::Classes(ArrayD::from_shape_vec(IxDyn(&[rows]), classes).expect("a label a row"));
            Dataset::independent(features, classes, Some(count))
        }
    })
}

fn finite(field: &[u8]) -> Option<f64> {
    std::str::from_utf8(field).ok()?.parse().ok().filter(|number: &f64| number.is_finite())
}

/// The line on which a row begins, from 1. The reader's own count is that of the blank lines in front of it.
fn line_of(record: &ByteRecord, bytes: &[u8]) -> usize {
    let start = record.position().map_or(0, |position| position.byte() as usize).min(bytes.len());
    let blank = bytes[start..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    1 + bytes[..start + blank].iter().filter(|&&byte| byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::Column;
    use ndarray::array;

    fn file(label: Option<Label>, task: Task) -> CsvFile {
        CsvFile { path: "a.csv".into(), label, header: true, task, classes: None }
    }

    fn refused(text: &str, file: &CsvFile) -> String {
        parse(text.as_bytes(), file, Path::new("a.csv")).unwrap_err().to_string()
    }

    #[test]
    fn the_last_column_is_the_label() {
        let text = "\u{feff}a, b, y\r\n1,2,0\r\n\r\n3,4.5,2\r\n";
        let set = parse(text.as_bytes(), &file(None, Task::Classification), Path::new("")).unwrap();
        assert_eq!(set.features, Features::Values(array![[1.0, 2.0], [3.0, 4.5]].into_dyn()));
        assert_eq!(set.targets, Targets::Classes(array![0, 2].into_dyn()));
        assert_eq!((set.classes, set.blocks), (Some(3), vec![0, 1]));
    }

    #[test]
    fn a_regression_has_its_columns_in_the_order_of_the_list() {
        let label = Label::Many(vec![Column::Name("b".into()), Column::Number(0)]);
        let set = parse(b"a,b,c\n1,-2,3\n", &file(Some(label), Task::Regression), Path::new("")).unwrap();
        assert_eq!(set.features, Features::Values(array![[3.0]].into_dyn()));
        assert_eq!((set.targets, set.classes), (Targets::Values(array![[-2.0, 1.0]].into_dyn()), None));
    }

    #[test]
    fn a_bad_row_is_named_by_the_line_of_an_editor() {
        let plain = file(None, Task::Classification);
        for (text, expected) in [
            ("a,y\n1,0\n\n\nx,1\n", "a.csv: line 5: column \"a\": expected a finite number, found \"x\""),
            ("a,y\r\n1,0\r\n\r\n\r\nx,1", "a.csv: line 5: column \"a\": expected a finite number, found \"x\""),
            ("a,y\n\"1\n\",0\nx,1", "a.csv: line 4: column \"a\": expected a finite number, found \"x\""),
            ("a,y\n1,0\n1,2,3\n", "a.csv: line 3: expected 2 columns, found 3"),
            ("a,y\nNaN,0\n", "a.csv: line 2: column \"a\": expected a finite number, found \"NaN\""),
            ("a,y\n1,inf\n", "a.csv: line 2: column \"y\": expected a finite number, found \"inf\""),
            ("a,y\n1,-1\n", "a.csv: line 2: column \"y\": expected a class from 0 to 65535, found -1"),
            ("a,y\n1,0.5\n", "a.csv: line 2: column \"y\": expected an integer from 0, found 0.5"),
            (
                "a,y\n1,1e300\n",
                "a.csv: line 2: column \"y\": expected a class from 0 to 65535, found 9223372036854775807 (`classes` may declare more)",
            ),
            ("a,y\n", "a.csv: expected at least one row of numbers, found none"),
            ("", "a.csv: expected at least one row of numbers, found none"),
            ("y\n1\n", "a.csv: expected at least one column beside the label, found none"),
        ] {
            assert_eq!(refused(text, &plain), expected, "{text:?}");
        }
        let declared = CsvFile { classes: NonZeroUsize::new(2), header: false, ..plain };
        assert_eq!(refused("1,1\n1,2\n", &declared), "a.csv: line 2: column 1: expected a class from 0 to 1, found 2");
    }
}
