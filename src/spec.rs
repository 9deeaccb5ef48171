//! SPEC.md itself, which is part of the crate: its formulas by label, and its worked examples.
//!
//! ```
//! assert_eq!(woracle::spec::formula("E9"), Some(r"V = \beta W_0 + \alpha s B A"));
//! assert_eq!(woracle::spec::formula("E0"), None);
//! ```

/// The whole text.
pub const TEXT: &str = include_str!("../SPEC.md");

/// The formula of a label, as LaTeX without its tag.
pub fn formula(label: &str) -> Option<&'static str> {
    let tag = format!("\\tag{{{label}}}");
    let (before, _) = TEXT.split_once(&tag)?;
    // Rows of a formula are parted by what Markdown would take away outside of such a fence.
    let starts = ["$$", "```math\n"].into_iter().filter_map(|start| Some(before.rfind(start)? + start.len()));
    Some(before[starts.max()?..].trim())
}

/// The text of every fenced block that begins with these words after its fence.
pub fn blocks(info: &str) -> impl Iterator<Item = &'static str> {
    let fence = format!("```{info}\n");
    let ends: Vec<&str> = TEXT.split(&fence).skip(1).filter_map(|rest| Some(rest.split_once("\n```")?.0)).collect();
    ends.into_iter()
}
