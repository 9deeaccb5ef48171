//! Text that may come from a file, written so that it is only text in another language.

/// For a cell or a line of Markdown.
pub fn markdown(text: &str) -> String {
    let special = |c: char| matches!(c, '|' | '`' | '*' | '_' | '<' | '>' | '[' | ']' | '#' | '\\');
    text.chars().flat_map(|c| if special(c) { vec!['\\', c] } else { vec![c] }).collect()
}

/// For an attribute or the content of an element of XML.
pub fn xml(text: &str) -> String {
    let escaped = |c: char| match c {
        '&' => "&amp;".into(),
        '<' => "&lt;".into(),
        '>' => "&gt;".into(),
        '"' => "&quot;".into(),
        _ => c.to_string(),
    };
    text.chars().map(escaped).collect()
}
