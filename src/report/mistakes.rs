//! The bank of mistakes as a matrix: who contradicts which, and in which layers.

use super::spoken;
use crate::Result;
use crate::gradcheck::{Tried, Witness};
use crate::mistakes::Mistake;
use crate::page::escape;
use crate::registry::LAYERS;
use rayon::prelude::*;
use serde::Serialize;

/// Every mistake by every witness.
#[derive(Clone, Serialize)]
pub struct Matrix {
    /// A row a mistake.
    pub rows: Vec<Tried>,
}

impl Matrix {
    /// Puts mistakes in the place of every layer they can be made in, side by side; `watch` is told each.
    ///
    /// # Errors
    ///
    /// As [`Tried::new`].
    pub fn gather(mistakes: &[&'static Mistake], seed: u64, watch: &(dyn Fn(&str) + Sync)) -> Result<Self> {
        let one = |mistake: &&'static Mistake| {
            let tried = Tried::new(mistake, seed)?;
            watch(mistake.id);
            Ok(tried)
        };
        Ok(Self { rows: mistakes.par_iter().map(one).collect::<Result<_>>()? })
    }

    fn killed(&self) -> usize {
        self.rows.iter().filter(|row| row.is_killed()).count()
    }

    /// Whether none survives.
    pub fn all_killed(&self) -> bool {
        self.killed() == self.rows.len()
    }

    /// How many there are and are seen.
    pub fn summary(&self) -> String {
        format!("{} of {} known mistakes are seen in every layer they can be made in", self.killed(), self.rows.len())
    }

    /// What is seen, and the matrix.
    pub fn to_html(&self) -> String {
        let names = || LAYERS.iter().map(|layer| layer.name());
        let heads: String =
            Tried::WITNESSES.iter().map(|witness| format!("<th scope=\"col\">{witness}</th>")).collect();
        let rows: String = self.rows.iter().map(row).collect();
        let seen = |witness: &Witness| {
            let count = self.rows.iter().filter(|row| row.contradicted_by(*witness) > 0).count();
            format!("<td>{count}</td>")
        };
        let totals: String = Tried::WITNESSES.iter().map(seen).collect();
        format!(
            "<p>A checker that has never said no has not been checked. Each row is a way to get this layer wrong, many of them \
             seen in other people\u{2019}s code. It is put in the place of the right layer, and the witnesses are asked. A mistake \
             in y must be contradicted by the definition; one in the backward alone by differences <em>and</em> by dual \
             numbers, each by itself.</p>\
             <p>A square stands for a layer, in the order {}: <span class=\"squares\">\u{25a0}</span> the witness contradicts the \
             mistake there, <span class=\"squares\">\u{25a1}</span> it does not, <span class=\"squares\">\u{b7}</span> the mistake \
             cannot be made there. Gaps are to be expected: the gradients of a wrong y are right for that y, so that differences \
             have nothing to object to (dual numbers have: they go through the right definition), and identities see only some of what can go wrong. In every layer a mistake in y must be \
             seen by the definition, and one in the backward by differences and by dual numbers; otherwise it passes, and the verdict says so.</p>\n\
             <div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Mistakes by witness\"><table class=\"matrix\">\
             <thead><tr><th scope=\"col\">mistake</th><th scope=\"col\">in</th>{heads}<th scope=\"col\">verdict</th></tr></thead>\n\
             <tbody>{rows}</tbody>\n<tfoot><tr><th scope=\"row\">mistakes seen, of {}</th><td></td>{totals}<td>{}</td></tr></tfoot>\
             </table></div>\n",
            names().collect::<Vec<_>>().join(", "),
            self.rows.len(),
            self.killed(),
        )
    }
}

fn row(row: &Tried) -> String {
    let Mistake { id, wrong, seen, section, .. } = row.mistake;
    let cells: String = Tried::WITNESSES.iter().map(|witness| cell(row, *witness)).collect();
    let verdict = match row.is_killed() {
        true => "<td class=\"good\">seen</td>",
        false => "<td class=\"disagree\">survives</td>",
    };
    format!(
        "<tr><th scope=\"row\" title=\"{}; SPEC.md, section {section}\"><code>{id}</code><br>{}</th><td>{}</td>{cells}{verdict}</tr>\n",
        escape(seen),
        escape(wrong),
        row.mistake.place(),
    )
}

fn cell(row: &Tried, witness: Witness) -> String {
    let contradicted = |name: &str| {
        let trial = row.trials.iter().find(|trial| trial.layer == name)?;
        Some(trial.killed_by.contains(&witness))
    };
    let square = |layer: &&dyn crate::registry::Subject| match contradicted(layer.name()) {
        Some(true) => '\u{25a0}',
        Some(false) => '\u{25a1}',
        None => '\u{b7}',
    };
    let squares: String = LAYERS.iter().map(square).collect();
    let named: Vec<&str> =
        LAYERS.iter().map(|layer| layer.name()).filter(|name| contradicted(name) == Some(true)).collect();
    let words = if named.is_empty() { "in none".into() } else { format!("in {}", named.join(", ")) };
    let class = match row.contradicted_by(witness) {
        0 => "none",
        count if count == row.trials.len() => "all",
        _ => "some",
    };
    format!(
        "<td class=\"{class}\" title=\"{witness}: {words}\"><span class=\"squares\" aria-hidden=\"true\">{squares}</span>{}</td>",
        spoken(&words)
    )
}
