//! One self-contained page of HTML: no script, no request, light and dark, on a phone and printed.
//!
//! ```
//! let page = woracle::page::Page::new("A report").section("Norms", &woracle::page::formula(r"n = \lVert V\rVert"));
//! let html = page.to_html();
//! assert!(html.contains("<math") && !html.contains("<script"));
//! ```

use crate::Result;
use crate::aside::replace;
use pulldown_latex::config::{DisplayMode, RenderConfig};
use pulldown_latex::mathml::push_mathml;
use pulldown_latex::{Parser, Storage};
use std::path::Path;

/// A page that is being written.
#[derive(Clone, Debug)]
pub struct Page {
    title: String,
    /// Title and content of each section, as HTML.
    sections: Vec<(String, String)>,
}

const STYLE: &str = include_str!("page.css");

impl Page {
    /// An empty one.
    pub fn new(title: &str) -> Self {
        Self { title: title.into(), sections: Vec::new() }
    }

    /// With one more section; its content is HTML.
    pub fn section(mut self, title: &str, content: &str) -> Self {
        self.sections.push((title.into(), content.into()));
        self
    }

    /// Writes the page to a file, which is there as a whole or as it was before.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        replace(path, |out| out.write_all(self.to_html().as_bytes()))
    }

    /// The page as text.
    pub fn to_html(&self) -> String {
        let title = escape(&self.title);
        let entry = |(number, (title, _)): (usize, &(String, String))| {
            format!("<li><a href=\"#section-{number}\">{}</a></li>", escape(title))
        };
        let contents: String = self.sections.iter().enumerate().map(entry).collect();
        let section = |(number, (title, content)): (usize, &(String, String))| {
            format!("<section id=\"section-{number}\">\n<h2>{}</h2>\n{content}\n</section>\n", escape(title))
        };
        let sections: String = self.sections.iter().enumerate().map(section).collect();
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n\
             <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n\
             <nav aria-label=\"Contents\"><ol>{contents}</ol></nav>\n{sections}</main>\n</body>\n</html>\n"
        )
    }
}

/// Text as HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A formula in LaTeX, as in SPEC.md, as a block of MathML.
pub fn formula(latex: &str) -> String {
    math(latex, DisplayMode::Block)
}

/// The same within a line.
pub fn inline_formula(latex: &str) -> String {
    math(latex, DisplayMode::Inline)
}

fn math(latex: &str, display_mode: DisplayMode) -> String {
    // Markdown takes one backslash away before LaTeX sees it; within text an underscore is one.
    // A prime is written as what it stands for, so that an index goes below its letter.
    let latex = latex.replace("\\\\_", "_").replace("\\_", "_").replace('\'', "^{\\prime}");
    // A plain space would be shown as the name of an entity.
    let latex = latex.replace("\\ ", "\\;");
    let storage = Storage::new();
    let mut mathml = String::new();
    let config = RenderConfig { display_mode, ..RenderConfig::default() };
    push_mathml(&mut mathml, Parser::new(&latex, &storage), config).expect("a string takes all that is written");
    // Attributes are parted by a space.
    mathml.replace("\"minsize", "\" minsize")
}

/// A picture in SVG with its caption below it; the picture's own title and description are its text alternative.
pub fn figure(svg: &str, caption: &str) -> String {
    // The declaration of an XML file has no place within a page.
    let start = svg.find("<svg").unwrap_or(0);
    format!("<figure>\n{}\n<figcaption>{}</figcaption>\n</figure>\n", &svg[start..], escape(caption))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::TEXT;

    #[test]
    fn every_formula_of_the_spec_can_be_shown() {
        let fenced = TEXT.split("```math\n").skip(1).filter_map(|rest| rest.split("```").next());
        let displayed = TEXT.split("$$").skip(1).step_by(2).chain(fenced);
        let mut shown = 0;
        for latex in displayed {
            let latex = latex.split("\\tag").next().unwrap_or_default();
            let mathml = formula(latex.trim());
            assert!(!mathml.contains("<merror") && !mathml.contains("&amp;"), "{latex}: {mathml}");
            shown += 1;
        }
        assert!(shown > 100, "{shown}");
    }
}
