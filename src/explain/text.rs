//! An explanation as text, for a terminal of 80 columns; and what is given in one, read back.

use super::numbers::{lines, number, parse, shape};
use super::{Chapter, Explanation, Given, Step, Walk};
use crate::case::{Case, Tensor};
use crate::gradcheck::{Identity, Slope, Slopes};
use crate::{Error, Result};
use ndarray::ArrayD;
use std::fmt;

/// Columns of a terminal.
const WIDTH: usize = 80;
const TILDE: char = '\u{303}';
/// What stands before numbers.
const INDENT: &str = "        ";

fn of_shape(lengths: &[usize]) -> String {
    shape(lengths, " x ")
}

/// A heading with a shape at the right margin, and the numbers below it.
fn with_numbers(f: &mut fmt::Formatter<'_>, heading: &str, shape: &str, values: &ArrayD<f64>) -> fmt::Result {
    // A tilde stands above the letter before it.
    let columns = heading.chars().filter(|&letter| letter != TILDE).count();
    let space = WIDTH.saturating_sub(columns + shape.len()).max(2);
    writeln!(f, "{heading}{:space$}{shape}", "")?;
    lines(values.view(), WIDTH - INDENT.len()).iter().try_for_each(|line| writeln!(f, "{INDENT}{line}"))
}

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.ids { "ids " } else { "" };
        with_numbers(f, &format!("  {}", self.name), &format!("{kind}{}", of_shape(self.values.shape())), &self.values)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { label, formula, values, .. } = self;
        with_numbers(f, &format!("  {label:6}{formula}"), &of_shape(values.shape()), values)
    }
}

/// The layer, and below it its settings as a JSON object.
fn head(layer: &str, settings: &serde_json::Map<String, serde_json::Value>) -> String {
    let entries = settings.iter().map(|(name, value)| format!("{}: {value}", serde_json::Value::from(name.as_str())));
    let object = format!("{{{}}}", entries.collect::<Vec<_>>().join(", "));
    format!("{layer}\n{}", filled(&object, WIDTH).join("\n"))
}

const GIVEN: &str = "Given";
/// Why there may be none.
pub(super) const NO_IDENTITIES: &str = "none is asked: what a lookup holds back (E41) leaves no gradient of a loss";
/// What differences are taken of where the backward is not that of y itself.
pub(super) const OF_THE_SURROGATE: &str = "of the surrogate (sections 2 and 3.3): what is held stays where it is";

impl fmt::Display for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n\n{GIVEN}", head(&self.layer, &self.settings))?;
        self.given.iter().try_for_each(|given| write!(f, "{given}"))?;
        if !self.notes.is_empty() {
            writeln!(f)?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "{note}"))?;
        for chapter in Chapter::ALL {
            let mut steps = self.steps.iter().filter(|step| step.chapter == chapter).peekable();
            if steps.peek().is_some() {
                writeln!(f, "\n{}", chapter.title())?;
            }
            steps.try_for_each(|step| write!(f, "{step}"))?;
        }
        Ok(())
    }
}

/// A case from the text of a [`Walk`]: what stands above its first chapter; the rest is not looked at.
pub(super) fn read_case(text: &str) -> Result<Case> {
    let refuse = |expected: &str, found: &str| Error::Setting {
        name: "worked example",
        expected: expected.into(),
        found: format!("{found:?}"),
    };
    let (head, given) = text.split_once(&format!("\n\n{GIVEN}\n")).ok_or_else(|| refuse("what is given", text))?;
    let (layer, settings) = head.split_once('\n').ok_or_else(|| refuse("a layer and its settings", head))?;
    let settings = serde_json::from_str(settings).map_err(|_| refuse("settings as a JSON object", settings))?;
    let given = given.split("\n\n").next().unwrap_or_default();
    let mut tensors: Vec<(String, bool, String)> = Vec::new();
    for line in given.lines() {
        match (line.strip_prefix(INDENT), tensors.last_mut()) {
            (Some(numbers), Some((_, _, all))) => all.push_str(numbers),
            _ => {
                let words: Vec<&str> = line.split_whitespace().collect();
                let [name, shape @ ..] = &words[..] else { return Err(refuse("a tensor's name", line)) };
                tensors.push((name.to_string(), shape.first() == Some(&"ids"), String::new()));
            }
        }
    }
    let tensor = |(name, ids, numbers): (String, bool, String)| {
        let values = parse(&numbers).ok_or_else(|| refuse(&format!("the numbers of {name} in brackets"), &numbers))?;
        let tensor = if ids { Tensor::Int(values.mapv(|id| id as i64)) } else { Tensor::Float(values.into_shared()) };
        Ok((name, tensor))
    };
    let tensors = tensors.into_iter().map(tensor).collect::<Result<_>>()?;
    Ok(Case { name: layer.into(), layer: layer.into(), settings, tensors })
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.walk)?;
        writeln!(f, "\nIdentities (section 8.3): both sides by the backward under test")?;
        if self.identities.is_empty() {
            writeln!(f, "  {NO_IDENTITIES}")?;
        }
        for Identity { label, equation, left, right, error, verdict, .. } in &self.identities {
            let equation = filled(equation, WIDTH - INDENT.len());
            writeln!(f, "  {label:6}{}", equation.join(&format!("\n{INDENT}")))?;
            let sides = format!("{} = {}", number(*left), number(*right));
            writeln!(f, "{INDENT}{sides:44}off by {error:.0e}, {verdict}")?;
        }
        writeln!(f, "\nGradients by hand, by differences, by dual numbers (section 8.2)")?;
        if self.surrogate {
            writeln!(f, "  {OF_THE_SURROGATE}")?;
        }
        self.slopes.iter().try_for_each(|slopes| write_slopes(f, slopes))
    }
}

/// Text broken between words into lines of so many columns.
fn filled(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.last_mut().expect("a line");
        if !last.is_empty() && last.len() + 1 + word.len() > width {
            lines.push(word.into());
        } else {
            last.push_str(if last.is_empty() { "" } else { " " });
            last.push_str(word);
        }
    }
    lines
}

fn write_slopes(f: &mut fmt::Formatter<'_>, Slopes { tensor, elements }: &Slopes) -> fmt::Result {
    let heading = format!("  grad.{tensor}");
    writeln!(f, "{heading:32}{:>12}{:>14}{:>10}{:>12}", "by hand", "difference", "+-", "dual")?;
    for Slope { index, ours, difference, uncertainty, dual } in elements {
        let index = format!("{index:?}");
        let [ours, difference, dual] = [*ours, *difference, *dual].map(number);
        writeln!(f, "{INDENT}{index:24}{ours:>12}{difference:>14}{:>10}{dual:>12}", format!("{uncertainty:.0e}"))?;
    }
    Ok(())
}
