//! `wora check --mistakes [FILTER]`: the checker on trial.

use super::{Outcome, print, progress, table};
use crate::Result;
use crate::gradcheck::{Tried, Witness};
use crate::mistakes::{MISTAKES, Mistake};
use crate::registry::{LAYERS, choose};
use rayon::prelude::*;
use serde_json::json;

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
        let tried = Tried::new(mistake, seed)?;
        bar.set_message(mistake.id);
        bar.inc(1);
        Ok(tried)
    };
    let rows: Vec<Tried> = chosen.into_par_iter().map(one).collect::<Result<_>>()?;
    bar.finish_and_clear();
    print(&if as_json { json_of(&rows, seed) } else { text_of(&rows, verbose) })?;
    Ok(if rows.iter().all(Tried::is_killed) { Outcome::Good } else { Outcome::Wrong })
}

fn text_of(rows: &[Tried], verbose: bool) -> String {
    let witnesses = Tried::WITNESSES.map(|witness| witness.to_string());
    let names = || witnesses.iter().map(String::as_str);
    let header: Vec<_> =
        ["mistake", "in", "layers", "first case"].into_iter().chain(names()).chain(["verdict"]).collect();
    let mut each = table(&header);
    for row in rows {
        let killed = row.trials.iter().filter(|trial| trial.case.is_some());
        let first = killed.clone().find_map(|trial| trial.case).unwrap_or("");
        let by = Tried::WITNESSES.map(|witness| {
            let layers = row.contradicted_by(witness);
            if layers == 0 { String::new() } else { layers.to_string() }
        });
        let layers = format!("{} of {}", killed.count(), row.trials.len());
        let start = [row.mistake.id.to_string(), row.mistake.place().into(), layers, first.to_string()];
        let verdict = if row.is_killed() { "killed" } else { "SURVIVES" };
        each.add_row(start.into_iter().chain(by).chain([verdict.to_string()]));
    }
    let header: Vec<_> = ["layer", "mistakes"].into_iter().chain(names()).chain(["killed"]).collect();
    let mut by_layer = table(&header);
    for layer in LAYERS {
        let trials: Vec<_> = rows.iter().flat_map(|row| &row.trials).filter(|t| t.layer == layer.name()).collect();
        let by = Tried::WITNESSES.map(|witness| trials.iter().filter(|t| t.killed_by.contains(&witness)).count());
        let killed = trials.iter().filter(|trial| trial.case.is_some()).count();
        let start = [layer.name().to_string(), trials.len().to_string()];
        by_layer.add_row(start.into_iter().chain(by.map(|count| count.to_string())).chain([killed.to_string()]));
    }
    let mut text = format!("{each}\nUnder each witness: in how many layers it contradicts the mistake.\n{by_layer}");
    for row in rows.iter().filter(|row| verbose || !row.is_killed()) {
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
    text + &format!("\n{} / {} mistakes killed", rows.iter().filter(|row| row.is_killed()).count(), rows.len())
}

fn json_of(rows: &[Tried], seed: u64) -> String {
    json!({
        "seed": seed,
        "mistakes": rows,
        "killed": rows.iter().filter(|row| row.is_killed()).count(),
        "total": rows.len(),
    })
    .to_string()
}
