//! An explanation as a page of HTML, its formulas those of SPEC.md.

use super::numbers::{number, shape};
use super::text::{NO_IDENTITIES, OF_THE_SURROGATE};
use super::{Chapter, Explanation, Given, Step};
use crate::gradcheck::{Identity, Slope, Slopes, Verdict};
use crate::page::{Page, escape, formula};
use crate::spec;
use ndarray::{ArrayViewD, Axis};

impl Explanation {
    /// The explanation as one self-contained page.
    pub fn page(&self) -> Page {
        let walk = &self.walk;
        let settings = serde_json::Value::from(walk.settings.clone()).to_string();
        let given: String = walk.given.iter().map(of_given).collect();
        let given = table(&["tensor", "shape", "numbers"], &given);
        let notes: String = walk.notes.iter().map(|note| format!("<p>{}</p>\n", escape(note))).collect();
        let given = format!("<p>Settings: <code>{}</code></p>\n{given}{notes}", escape(&settings));
        let mut page = Page::new(&format!("WoRA, {}: one forward and backward", walk.layer)).section("Given", &given);
        for chapter in Chapter::ALL {
            let steps: String = walk.steps.iter().filter(|step| step.chapter == chapter).map(of_step).collect();
            if !steps.is_empty() {
                let steps = table(&["", "line", "in SPEC.md", "shape", "numbers"], &steps);
                page = page.section(chapter.title(), &steps);
            }
        }
        let identities = match &self.identities[..] {
            [] => format!("<p>{NO_IDENTITIES}</p>\n"),
            identities => of_identities(identities),
        };
        page = page.section("Identities (section 8.3)", &identities);
        let whose = if self.surrogate { format!("<p>{OF_THE_SURROGATE}</p>\n") } else { String::new() };
        let slopes = whose + &self.slopes.iter().map(of_slopes).collect::<String>();
        page.section("Gradients by hand, by differences, by dual numbers (section 8.2)", &slopes)
    }
}

fn of_given(given: &Given) -> String {
    let Given { name, values, .. } = given;
    let (shape, numbers) = (shape(values.shape(), " × "), tables(values.view()));
    format!("<tr><td><code>{}</code></td><td>{shape}</td><td>{numbers}</td></tr>\n", escape(name))
}

/// The line as it reads here, the formula of its label, and the numbers.
fn of_step(step: &Step) -> String {
    let Step { label, formula: line, values, .. } = step;
    let derived = spec::formula(label).map(formula).unwrap_or_default();
    let (line, shape, numbers) = (escape(line), shape(values.shape(), " × "), tables(values.view()));
    format!("<tr><td>{label}</td><td>{line}</td><td>{derived}</td><td>{shape}</td><td>{numbers}</td></tr>\n")
}

/// Matrices as tables, one after the other.
fn tables(values: ArrayViewD<'_, f64>) -> String {
    if values.ndim() > 2 {
        return values.axis_iter(Axis(0)).map(tables).collect::<Vec<_>>().join("<br>\n");
    }
    let cell = |value: &f64| format!("<td class=\"number\">{}</td>", number(*value));
    let row = |row: ArrayViewD<'_, f64>| format!("<tr>{}</tr>", row.iter().map(cell).collect::<String>());
    let rows: String = if values.ndim() == 2 { values.axis_iter(Axis(0)).map(row).collect() } else { row(values) };
    format!("<table class=\"numbers\">{rows}</table>")
}

fn of_identities(identities: &[Identity]) -> String {
    let row = |identity: &Identity| {
        let Identity { label, equation, left, right, error, verdict, .. } = identity;
        let class = if *verdict == Verdict::Agree { "good" } else { "bad" };
        format!(
            "<tr><td>{label}</td><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td>\
             <td class=\"number\">{error:.0e}</td><td class=\"{class}\">{verdict}</td></tr>\n",
            escape(equation),
            number(*left),
            number(*right)
        )
    };
    let rows: String = identities.iter().map(row).collect();
    table(&["label", "identity", "left", "right", "off by", "verdict"], &rows)
}

fn of_slopes(Slopes { tensor, elements }: &Slopes) -> String {
    let row = |Slope { index, ours, difference, uncertainty, dual }: &Slope| {
        let numbers = [number(*ours), number(*difference), format!("{uncertainty:.0e}"), number(*dual)];
        let cells: String = numbers.iter().map(|text| format!("<td class=\"number\">{text}</td>")).collect();
        format!("<tr><td>{index:?}</td>{cells}</tr>\n")
    };
    let rows: String = elements.iter().map(row).collect();
    let columns = ["at", "by hand", "by differences", "±", "by dual numbers"];
    format!("<h3><code>grad.{}</code></h3>\n{}", escape(tensor), table(&columns, &rows))
}

fn table(columns: &[&str], rows: &str) -> String {
    let columns: String = columns.iter().map(|column| format!("<th>{column}</th>")).collect();
    format!("<div class=\"scroll\"><table><thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n")
}
