//! The worked examples of SPEC.md, section 15: blocks of text that are what `Walk` prints for what is given in them.

use super::text::read_case;
use crate::case::Case;
use crate::{Result, spec};

/// How a block of SPEC.md begins that is a worked example.
const FENCE: &str = "walk";

/// A worked example.
#[derive(Clone, Copy, Debug)]
pub struct Example {
    /// The block, as it stands in SPEC.md.
    pub text: &'static str,
}

impl Example {
    /// What is given in it.
    ///
    /// # Errors
    ///
    /// A block that does not begin with a layer, its settings, and tensors.
    pub fn case(&self) -> Result<Case> {
        read_case(self.text)
    }

    /// The layer's name.
    pub fn layer(&self) -> &'static str {
        self.text.lines().next().unwrap_or_default()
    }
}

/// Every worked example, the first of a layer the one that it is explained by.
pub fn examples() -> Vec<Example> {
    spec::blocks(FENCE).map(|text| Example { text }).collect()
}
