//! `wora check --mistakes [FILTER]`: the checker on trial.

use super::{Outcome, print, progress, table};
use rayon::prelude::*;
use serde_json::json;
use woracle::Result;
use woracle::gradcheck::{Trial, Witness, try_mistake};
use woracle::mistakes::{MISTAKES, Mistake};
use woracle::registry::{LAYERS, choose};

/// Who can speak: a mistake is the same in f32.
const WITNESSES: [Witness; 4] = [Witness::Definition, Witness::Differences, Witness::Duals, Witness::Identities];

/// One mistake in every layer that it can be made in.
struct Row {
    mistake: &'static Mistake,
    trials: Vec<Trial>,
}

impl Row {
    fn killed(&self) -> bool {
        !self.trials.is_empty() && self.trials.iter().all(|trial| trial.case.is_some())
    }
    fn place(&self) -> &'static str {
        match (self.mistake.is_in_forward(), self.mistake.is_in_backward()) {
            (true, true) => "both",
            (true, false) => "forward",
            _ => "backward",
        }
    }
}

fn chosen(filter: &str) -> Result<Vec<&'static Mistake>> {
    let what = "a mistake's id (wora check --mistakes --list)";
    choose(MISTAKES.iter().collect(), filter, |mistake| mistake.id, what)
}

/// Prints the ids.
pub fn list(filter: &str, as_json: bool) -> Result<Outcome> {
    super::list(chosen(filter)?.iter().map(|mistake| mistake.id), as_json)
}

pub fn run(filter: &str, seed: u64, verbose: bool, as_json: bool) -> Result<Outcome> {
    let chosen = chosen(filter)?;
    let bar = progress(chosen.len());
    let one = |mistake: &'static Mistake| {
        let trials = mistake.layers.iter().map(|layer| try_mistake(mistake, layer, seed)).collect::<Result<_>>()?;
        bar.set_message(mistake.id);
        bar.inc(1);
        Ok(Row { mistake, trials })
    };
    let rows: Vec<Row> = chosen.into_par_iter().map(one).collect::<Result<_>>()?;
    bar.finish_and_clear();
    print(&if as_json { json_of(&rows, seed) } else { text_of(&rows, verbose) })?;
    Ok(if rows.iter().all(Row::killed) { Outcome::Good } else { Outcome::Wrong })
}

fn text_of(rows: &[Row], verbose: bool) -> String {
    let witnesses = WITNESSES.map(|witness| witness.to_string());
    let names = || witnesses.iter().map(String::as_str);
    let header: Vec<_> =
        ["mistake", "in", "layers", "first case"].into_iter().chain(names()).chain(["verdict"]).collect();
    let mut each = table(&header);
    for row in rows {
        let killed = row.trials.iter().filter(|trial| trial.case.is_some());
        let first = killed.clone().find_map(|trial| trial.case).unwrap_or("");
        let by = WITNESSES.map(|witness| {
            let layers = row.trials.iter().filter(|trial| trial.killed_by.contains(&witness)).count();
            if layers == 0 { String::new() } else { layers.to_string() }
        });
        let layers = format!("{} of {}", killed.count(), row.trials.len());
        let start = [row.mistake.id.to_string(), row.place().into(), layers, first.to_string()];
        let verdict = if row.killed() { "killed" } else { "SURVIVES" };
        each.add_row(start.into_iter().chain(by).chain([verdict.to_string()]));
    }
    let header: Vec<_> = ["layer", "mistakes"].into_iter().chain(names()).chain(["killed"]).collect();
    let mut by_layer = table(&header);
    for layer in LAYERS {
        let trials: Vec<_> = rows.iter().flat_map(|row| &row.trials).filter(|t| t.layer == layer.name()).collect();
        let by = WITNESSES.map(|witness| trials.iter().filter(|t| t.killed_by.contains(&witness)).count());
        let killed = trials.iter().filter(|trial| trial.case.is_some()).count();
        let start = [layer.name().to_string(), trials.len().to_string()];
        by_layer.add_row(start.into_iter().chain(by.map(|count| count.to_string())).chain([killed.to_string()]));
    }
    let mut text = format!("{each}\nUnder each witness: in how many layers it contradicts the mistake.\n{by_layer}");
    for row in rows.iter().filter(|row| verbose || !row.killed()) {
        let Mistake { id, wrong, seen, section, .. } = row.mistake;
        text += &format!("\n{id}: {wrong}\n  seen: {seen}; SPEC.md, section {section}");
        for trial in &row.trials {
            let by = trial.killed_by.iter().map(Witness::to_string).collect::<Vec<_>>().join(", ");
            text += &match trial.case {
                Some(case) => format!("\n  {}: killed in {case} by {by}", trial.layer),
                None => format!("\n  {}: SURVIVES {} cases that it changes", trial.layer, trial.tried),
            };
        }
    }
    text + &format!("\n{} / {} mistakes killed", rows.iter().filter(|row| row.killed()).count(), rows.len())
}

fn json_of(rows: &[Row], seed: u64) -> String {
    let mistakes = rows.iter().map(|row| {
        let Mistake { id, wrong, seen, section, .. } = row.mistake;
        json!({
            "id": id, "wrong": wrong, "seen": seen, "section": section, "in": row.place(),
            "killed": row.killed(), "trials": row.trials,
        })
    });
    json!({
        "seed": seed,
        "mistakes": mistakes.collect::<Vec<_>>(),
        "killed": rows.iter().filter(|row| row.killed()).count(),
        "total": rows.len(),
    })
    .to_string()
}
