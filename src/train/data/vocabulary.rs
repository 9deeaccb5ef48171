//! Characters and their ids.

use std::collections::BTreeSet;

/// The characters of a text, sorted; the id of one is its place.
///
/// ```
/// use woracle::train::data::Vocabulary;
/// let vocabulary = Vocabulary::of(["beta", "bet"]);
/// assert_eq!(vocabulary.chars(), ['a', 'b', 'e', 't']);
/// assert_eq!(vocabulary.ids("tab?"), [3, 0, 1, -1]); // no embedding has -1
/// assert_eq!(vocabulary.text(&[3, 0, 1]), "tab");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vocabulary(Vec<char>);

impl Vocabulary {
    /// Every character that occurs.
    pub fn of<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        Self(texts.into_iter().flat_map(str::chars).collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// How many characters there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no character.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The characters in the order of their ids.
    pub fn chars(&self) -> &[char] {
        &self.0
    }

    /// The id of a character; `None` where it is not in the vocabulary.
    pub fn id(&self, character: char) -> Option<i64> {
        self.0.binary_search(&character).ok().map(|id| id as i64)
    }

    /// The ids of a text; -1, which no embedding accepts, for a character that is not in the vocabulary.
    pub fn ids(&self, text: &str) -> Vec<i64> {
        text.chars().map(|character| self.id(character).unwrap_or(-1)).collect()
    }

    /// The text of ids; U+FFFD for an id that is not in the vocabulary.
    pub fn text(&self, ids: &[i64]) -> String {
        let char = |&id: &i64| usize::try_from(id).ok().and_then(|id| self.0.get(id)).copied();
        ids.iter().map(|id| char(id).unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vocabulary_is_sorted_and_reads_both_ways() {
        let vocabulary = Vocabulary::of(["beta", "äb"]);
        assert_eq!(vocabulary.chars(), ['a', 'b', 'e', 't', 'ä']);
        assert_eq!(vocabulary.ids("tab?"), [3, 0, 1, -1]);
        assert_eq!(vocabulary.text(&[4, 1, 5, -1]), "äb\u{fffd}\u{fffd}");
        assert!(Vocabulary::of([]).is_empty());
    }
}
