//! Where in a configuration something stands, for whoever has to mend it.

use crate::Error;
use std::ops::Range;
use std::path::Path;
use toml::de::{DeTable, DeValue};

/// A complaint about a key, such as `adapt.optimiser.learning_rate` or `model.modules.2`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Misfit {
    pub key: String,
    pub message: String,
}

impl Misfit {
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), message: message.into() }
    }

    /// The same with what stands there, where it says no more than what was expected.
    pub fn with_found(mut self, text: &str) -> Self {
        const LONGEST: usize = 40;
        let found = span(text, &self.key).and_then(|span| text.get(span));
        if let Some(found) = found.filter(|_| self.message.starts_with("expected") && !self.message.contains("found")) {
            let line = found.split_whitespace().collect::<Vec<_>>().join(" ");
            let end = line.char_indices().nth(LONGEST).map_or(line.len(), |(end, _)| end);
            let more = if end < line.len() { "..." } else { "" };
            self.message += &format!(", found {}{more}", &line[..end]);
        }
        self
    }

    /// The complaint with its place in the file.
    pub fn within(self, path: &Path, text: &str) -> Error {
        let Self { key, message } = self;
        let message = if key.is_empty() { message } else { format!("{key}: {message}") };
        at(path, text, span(text, &key), &message)
    }
}

/// A complaint about a part of a file.
pub(super) fn at(path: &Path, text: &str, span: Option<Range<usize>>, message: &str) -> Error {
    let message = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(", ");
    let Some(start) = span.map(|span| span.start.min(text.len())) else {
        return Error::File { path: path.into(), message };
    };
    let before = text.get(..start).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    Error::File { path: path.into(), message: format!("line {line}, column {column}: {message}") }
}

/// Where the value of a key stands, or of as much of it as there is.
fn span(text: &str, key: &str) -> Option<Range<usize>> {
    let document = DeTable::parse(text).ok()?;
    let mut parts = key.split('.').filter(|part| !part.is_empty());
    let first = parts.next()?;
    let mut value = document.get_ref().get(first)?;
    let mut found = value.span();
    for part in parts {
        let next = match value.get_ref() {
            DeValue::Table(table) => table.get(part),
            DeValue::Array(values) => part.parse().ok().and_then(|number: usize| values.get(number)),
            _ => None,
        };
        let Some(next) = next else { break };
        value = next;
        found = value.span();
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_names_the_line_of_its_key() {
        let text = "seed = 1\n[model]\nmodules = [\n  { type = \"relu\" },\n  { type = \"tanh\", p = 3 },\n]\n";
        let error = Misfit::new("model.modules.1.p", "expected none").within(Path::new("a.toml"), text);
        assert_eq!(error.to_string(), "a.toml: line 5, column 24: model.modules.1.p: expected none");
        // A key that is not there is about what it would be in.
        let error = Misfit::new("model.modules.0.p", "expected one").within(Path::new("a.toml"), text);
        assert_eq!(error.to_string(), "a.toml: line 4, column 3: model.modules.0.p: expected one");
    }
}
