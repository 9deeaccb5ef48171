//! The columns of a table, and which of them are to be said.

use super::read::shown;
use super::{CsvFile, Task};
use ::csv::ByteRecord;
use serde::{Deserialize, Serialize};

/// The columns that are to be said.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(untagged, expecting = "expected a column, its name or its number from 0, or a list of columns")]
pub enum Label {
    /// One column.
    One(Column),
    /// The columns of a regression.
    Many(Vec<Column>),
}

/// A column of a table.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(untagged, expecting = "expected a column, its name or its number from 0")]
pub enum Column {
    /// Its place, from 0.
    Number(usize),
    /// Its name in the header.
    Name(String),
}

/// The columns as the first row has them.
pub(super) struct Columns<'a> {
    pub(super) first: &'a ByteRecord,
    /// Whether the first row is a header.
    pub(super) named: bool,
}

impl Columns<'_> {
    /// A column, as errors call it.
    pub(super) fn name(&self, column: usize) -> String {
        if self.named { format!("column {}", shown(&self.first[column])) } else { format!("column {column}") }
    }

    /// The places of the labels.
    pub(super) fn labels(&self, file: &CsvFile) -> Result<Vec<usize>, String> {
        let last = self.first.len().checked_sub(1).ok_or("expected at least one row of numbers, found none")?;
        let labels = match &file.label {
            None => vec![last],
            Some(Label::One(column)) => vec![self.find(column)?],
            Some(Label::Many(columns)) => columns.iter().map(|column| self.find(column)).collect::<Result<_, _>>()?,
        };
        if let Some(twice) =
            labels.iter().enumerate().find_map(|(at, label)| labels[..at].contains(label).then_some(label))
        {
            return Err(format!("label: expected different columns, found {} twice", self.name(*twice)));
        }
        if labels.is_empty() || file.task == Task::Classification && labels.len() != 1 {
            let task = if file.task == Task::Regression { "at least one column" } else { "one column of classes" };
            return Err(format!("label: expected {task}, found {}", labels.len()));
        }
        if labels.len() == self.first.len() {
            return Err("expected at least one column beside the label, found none".into());
        }
        Ok(labels)
    }

    fn find(&self, column: &Column) -> Result<usize, String> {
        match column {
            Column::Number(number) if *number < self.first.len() => Ok(*number),
            Column::Number(number) => {
                Err(format!("label: expected a column from 0 to {}, found {number}", self.first.len() - 1))
            }
            Column::Name(name) if !self.named => {
                Err(format!("label: expected a column's number, as `header` is false, found {name:?}"))
            }
            Column::Name(name) => {
                let mut places = (0..self.first.len()).filter(|&place| &self.first[place] == name.trim().as_bytes());
                match (places.next(), places.next()) {
                    (Some(place), None) => Ok(place),
                    (None, _) => Err(format!("label: expected a column {name:?}, found none of that name")),
                    (Some(_), Some(_)) => Err(format!("label: expected one column {name:?}, found several")),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::csv;
    use std::path::Path;

    #[test]
    fn a_label_that_is_no_column_is_refused() {
        let file =
            |label, task| CsvFile { path: "a.csv".into(), label: Some(label), header: true, task, classes: None };
        let refused =
            |text: &str, file: &CsvFile| csv::parse(text.as_bytes(), file, Path::new("a.csv")).unwrap_err().to_string();
        let one = |column| file(Label::One(column), Task::Classification);
        let name = |name: &str| Column::Name(name.into());
        let many = |columns, task| file(Label::Many(columns), task);
        for (file, expected) in [
            (one(name("z")), "label: expected a column \"z\", found none of that name"),
            (one(name("a")), "label: expected one column \"a\", found several"),
            (one(Column::Number(3)), "label: expected a column from 0 to 2, found 3"),
            (
                CsvFile { header: false, ..one(name("y")) },
                "label: expected a column's number, as `header` is false, found \"y\"",
            ),
            (
                many(vec![name("y"), Column::Number(0)], Task::Classification),
                "label: expected one column of classes, found 2",
            ),
            (
                many(vec![name("y"), Column::Number(2)], Task::Regression),
                "label: expected different columns, found column \"y\" twice",
            ),
            (many(vec![], Task::Regression), "label: expected at least one column, found 0"),
        ] {
            assert_eq!(refused("a,a,y\n1,2,0\n", &file), format!("a.csv: {expected}"));
        }
    }
}
