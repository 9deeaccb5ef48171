//! All cases as a heat map: how much of its budget the worst error of every tensor takes.

use super::{labelled, spoken};
use crate::chart::scientific;
use crate::gradcheck::{CaseReport, Comparison, Identity, Options, TensorReport, Verdict, check_entry};
use crate::mistakes::Parameter;
use crate::page::escape;
use crate::registry::{Entry, LAYERS};
use rayon::prelude::*;
use serde::Serialize;

/// All cases, layer by layer.
#[derive(Clone, Debug, Serialize)]
pub struct HeatMap {
    /// Layers in the order of the registry, then modules and losses; those without a case are left out.
    pub groups: Vec<Group>,
}

/// The cases of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// The layer.
    pub layer: &'static str,
    /// What the witnesses say.
    pub cases: Vec<CaseReport>,
}

/// Those that are no cases of a layer.
const MODULES: &str = "modules and losses";

/// A column: what is at its head, what that is called, and the tensors that stand in it.
struct Column {
    head: &'static str,
    words: &'static str,
    tensors: Vec<String>,
}

impl HeatMap {
    /// Checks cases, side by side; `watch` is told the name of each.
    pub fn gather(cases: &[Entry], seed: u64, watch: &(dyn Fn(&str) + Sync)) -> Self {
        let one = |entry: &Entry| {
            let report = check_entry(*entry, Options { seed, ..Options::default() });
            watch(&report.name);
            let layer = match entry {
                Entry::Layer(layer, _) => layer.name(),
                Entry::Module(_) => MODULES,
            };
            (layer, report)
        };
        let reports: Vec<(&'static str, CaseReport)> = cases.par_iter().map(one).collect();
        Self::of(reports)
    }

    /// Cases that have been checked, each with its layer.
    pub fn of(reports: Vec<(&'static str, CaseReport)>) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        for (layer, report) in reports {
            match groups.iter_mut().find(|group| group.layer == layer) {
                Some(group) => group.cases.push(report),
                None => groups.push(Group { layer, cases: vec![report] }),
            }
        }
        Self { groups }
    }

    fn cases(&self) -> impl Iterator<Item = &CaseReport> {
        self.groups.iter().flat_map(|group| &group.cases)
    }

    /// Whether every case agrees, and there is one.
    pub fn agrees(&self) -> bool {
        self.cases().next().is_some() && self.cases().all(CaseReport::agrees)
    }

    /// How many there are, and what is said of them.
    pub fn summary(&self) -> String {
        let count = |verdict| self.cases().flat_map(|case| &case.tensors).filter(|one| one.verdict == verdict).count();
        let [agree, disagree, unresolved] = [Verdict::Agree, Verdict::Disagree, Verdict::Unresolved].map(count);
        let wrong = self.cases().filter(|case| !case.agrees()).count();
        let cases = self.cases().count();
        format!(
            "{} of {cases} cases agree; of their tensors {agree} agree, {disagree} disagree, {unresolved} are unresolved",
            cases - wrong
        )
    }

    /// What is seen, and the tables.
    pub fn to_html(&self) -> String {
        let legend = [
            ("e0", "=", "no error at all"),
            ("e1", "\u{2212}2.5", "below 1/100"),
            ("e2", "\u{2212}1.5", "below 1/10"),
            ("e3", "\u{2212}0.7", "below 1/2"),
            ("e4", "\u{2212}0.1", "within the budget"),
            ("unresolved", "?", "unresolved"),
            ("disagree", "+2", "disagree"),
        ];
        let entry = |(class, number, words): (&str, &str, &str)| {
            format!("<span><span class=\"chip {class}\">{number}</span> {words}</span>")
        };
        let groups: String = self.groups.iter().map(Group::to_html).collect();
        format!(
            "<p>A row is a case: a layer with one setting changed, or at the edge of what is allowed. A column is a result of \
             the layer. Each result has a <em>budget</em>: how far off it may be by rounding alone, estimated for every \
             element from the terms that it is the sum of. A cell shows log<sub>10</sub>(error / budget) at the worst element \
             of the witness that is hardest to please: \u{2212}1 means that the error took a tenth of what it may be. Where a case has no such result, there is no cell.</p>\
             <p>All cells pale or blue is how it should be. A red cell is an error beyond rounding: a formula is wrong. A red \
             column would be a wrong backward line, a red row a setting that is not handled. An unresolved cell is no pass: \
             the budget is too wide to tell. <em>identities</em> are relations between the gradients that need no step, \
             such as</p>{}<p><em>laws</em> are what must hold beside: the same bits twice, inputs left as they were, and that the \
             detached and the full gradient differ.</p>\n<div class=\"legend\">{}</div>\n{groups}",
            labelled("E49"),
            legend.map(entry).concat(),
        )
    }
}

/// How SPEC.md writes the gradient of a parameter.
fn head_of(parameter: Parameter) -> &'static str {
    match parameter {
        Parameter::X => "dx",
        Parameter::Weight => "dW\u{2080}",
        Parameter::Bias => "db",
        Parameter::LoraA => "dA",
        Parameter::LoraB => "dB",
        Parameter::Magnitude => "dm",
        Parameter::Alpha => "d\u{3b1}",
        Parameter::Beta => "d\u{3b2}",
    }
}

impl Group {
    fn columns(&self) -> Vec<Column> {
        let column = |head, words, tensors: Vec<String>| Column { head, words, tensors };
        let mut columns = vec![
            column("y", "the output", vec!["y".into()]),
            column("V", "the weighted direction", vec!["weighted".into()]),
            column("n", "the norms", vec!["weight_norm".into()]),
            column("g", "the gains m / n", vec!["gain".into()]),
            column("W\u{2032}", "the merged weight", vec!["merged_weight".into()]),
        ];
        // A layer's own names for A and B.
        let lora = LAYERS.iter().find(|layer| layer.name() == self.layer).map(|layer| layer.lora_names());
        for parameter in Parameter::ALL {
            let head = head_of(parameter);
            let name = parameter.name(lora.unwrap_or(["lora_A", "lora_B"]));
            columns.push(column(head, name, vec![format!("grad.{name}")]));
        }
        let all = || self.cases.iter().flat_map(|case| &case.tensors);
        columns.retain(|column| all().any(|tensor| column.tensors.contains(&tensor.name)));
        let mut others: Vec<String> = Vec::new();
        for tensor in all() {
            let known = columns.iter().any(|column| column.tensors.contains(&tensor.name));
            if !known && !others.contains(&tensor.name) {
                others.push(tensor.name.clone());
            }
        }
        if !others.is_empty() {
            columns.push(column("parameters", "gradients of the parameters", others));
        }
        columns
    }

    fn to_html(&self) -> String {
        let columns = self.columns();
        let head = |column: &Column| {
            format!("<th scope=\"col\" title=\"{}\">{}</th>", escape(column.words), escape(column.head))
        };
        let heads: String = columns.iter().map(head).collect();
        let rows: String = self.cases.iter().map(|case| row(case, &columns)).collect();
        format!(
            "<h3>{} <span class=\"label\">{} cases</span></h3>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" \
             aria-label=\"Cases of {}\"><table class=\"heat\"><thead><tr><th scope=\"col\">case</th>{heads}\
             <th scope=\"col\">identities</th><th scope=\"col\">laws</th></tr></thead>\n<tbody>{rows}</tbody></table></div>\n",
            escape(self.layer),
            self.cases.len(),
            escape(self.layer),
        )
    }
}

fn row(case: &CaseReport, columns: &[Column]) -> String {
    let name = escape(&case.name);
    if let Some(failure) = &case.failure {
        let span = columns.len() + 2;
        return format!(
            "<tr><th scope=\"row\">{name}</th><td class=\"disagree\" colspan=\"{span}\">failed: {}</td></tr>\n",
            escape(failure)
        );
    }
    let cell = |column: &Column| {
        let here: Vec<&TensorReport> =
            case.tensors.iter().filter(|tensor| column.tensors.contains(&tensor.name)).collect();
        match here[..] {
            [] => "<td></td>".into(),
            [tensor] if column.tensors.len() == 1 => Cell::of(tensor).to_html("td", None),
            _ => {
                let chip = |tensor: &&TensorReport| {
                    let name = tensor.name.strip_prefix("grad.").unwrap_or(&tensor.name);
                    Cell::of(tensor).to_html("span", Some(name))
                };
                format!("<td class=\"chips\">{}</td>", here.iter().map(chip).collect::<Vec<_>>().join(" "))
            }
        }
    };
    let cells: String = columns.iter().map(cell).collect();
    let identities = Cell::of_identities(&case.identities).map_or("<td></td>".into(), |cell| cell.to_html("td", None));
    let words = case.laws.iter().map(|law| format!("{}: {}", law.name, if law.holds { "holds" } else { "broken" }));
    let words = escape(&words.collect::<Vec<_>>().join("; "));
    let broken = case.laws.iter().filter(|law| !law.holds).count();
    let laws = match (broken, case.laws.len()) {
        (0, all) => format!("<td class=\"e0\" title=\"{words}\">{all} hold</td>"),
        (broken, _) => format!("<td class=\"disagree\" title=\"{words}\">{broken} broken</td>"),
    };
    format!("<tr><th scope=\"row\">{name}</th>{cells}{identities}{laws}</tr>\n")
}

/// What a cell says of a tensor, or of all identities of a case.
struct Cell {
    verdict: Verdict,
    /// The error in parts of the budget.
    part: f64,
    words: String,
}

/// 0 where there is no error, whatever the budget.
fn part(error: f64, budget: f64) -> f64 {
    let part = if error == 0.0 { 0.0 } else { error / budget };
    if part.is_nan() { f64::INFINITY } else { part }
}

impl Cell {
    fn of(tensor: &TensorReport) -> Self {
        let worst = |comparison: &Comparison| part(comparison.worst.error, comparison.worst.budget);
        let by = tensor.witnesses.iter().max_by(|one, other| {
            (one.verdict, worst(one)).partial_cmp(&(other.verdict, worst(other))).expect("a part is a number")
        });
        let (part, words) = match (&tensor.mismatch, by) {
            (Some(mismatch), _) => (f64::INFINITY, mismatch.clone()),
            (None, None) => (0.0, "it has no elements".into()),
            (None, Some(comparison)) => {
                let worst_of = &comparison.worst;
                let (error, budget) = (scientific(worst_of.error), scientific(worst_of.budget));
                let words = format!("worst by {} at {}: error {error} of {budget}", comparison.witness, worst_of.place);
                (worst(comparison), words)
            }
        };
        let words = format!("{}: {}, {words}", tensor.name, word(tensor.verdict));
        Self { verdict: tensor.verdict, part, words }
    }

    fn of_identities(identities: &[Identity]) -> Option<Self> {
        let verdict = identities.iter().map(|identity| identity.verdict).max()?;
        let part = identities.iter().map(|identity| part(identity.error, identity.budget)).fold(0.0, f64::max);
        let said =
            |identity: &Identity| format!("{} {}: {}", identity.label, identity.equation, word(identity.verdict));
        Some(Self { verdict, part, words: identities.iter().map(said).collect::<Vec<_>>().join("; ") })
    }

    fn class(&self) -> &'static str {
        match self.verdict {
            Verdict::Disagree => "disagree",
            Verdict::Unresolved => "unresolved",
            Verdict::Agree if self.part == 0.0 => "e0",
            Verdict::Agree if self.part < 1e-2 => "e1",
            Verdict::Agree if self.part < 1e-1 => "e2",
            Verdict::Agree if self.part < 0.5 => "e3",
            Verdict::Agree => "e4",
        }
    }

    fn number(&self) -> String {
        match self.part.log10() {
            part if part == f64::NEG_INFINITY => "=".into(),
            part if part == f64::INFINITY => "\u{221e}".into(),
            // What is nearly used up is not shown as if it were.
            part if part.abs() < 0.05 => format!("{part:.3}").replace('-', "\u{2212}"),
            part => format!("{part:.1}").replace('-', "\u{2212}"),
        }
    }

    fn to_html(&self, element: &str, name: Option<&str>) -> String {
        let (style, name) = match name {
            Some(name) => ("chip ", format!("{} ", escape(name))),
            None => ("", String::new()),
        };
        format!(
            "<{element} class=\"{style}{}\" title=\"{}\">{name}{}{}</{element}>",
            self.class(),
            escape(&self.words),
            spoken(&format!("{} ", word(self.verdict))),
            self.number()
        )
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Agree => "agree",
        Verdict::Unresolved => "unresolved",
        Verdict::Disagree => "disagree",
    }
}
