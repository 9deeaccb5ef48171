//! `wora check [FILTER]`: the hand-derived backward of every layer and module against its witnesses.

use super::{Outcome, list, mistakes, print, progress, table};
use crate::Result;
use crate::gradcheck::{CaseReport, Identity, Options, Verdict, Witness, check_entry};
use crate::registry::{Entry, choose, entries};
use rayon::prelude::*;
use serde_json::json;

/// Check every layer's and module's forward and backward against the definition, differences, dual numbers and identities.
#[derive(clap::Args)]
pub struct Args {
    /// Only the case of this name, or the cases whose names contain this
    filter: Option<String>,
    /// Put the checker itself on trial: every known mistake in every layer's place, to see who contradicts it.
    /// FILTER is part of a mistake's id
    #[arg(long)]
    mistakes: bool,
    /// List the cases, or the mistakes, one a line, and check nothing
    #[arg(long)]
    list: bool,
    /// The seed of the cases' numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print what every witness says of the worst element of every tensor
    #[arg(long, short)]
    verbose: bool,
    /// Print the whole report as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let filter = args.filter.as_deref().unwrap_or("");
    if args.mistakes && args.list {
        return mistakes::list(filter, args.json);
    }
    if args.mistakes {
        return mistakes::run(filter, args.seed, args.verbose, args.json);
    }
    let chosen = choose(entries().collect(), filter, |entry| entry.name(), "a case's name (wora check --list)")?;
    if args.list {
        return list(chosen.iter().map(Entry::name), args.json);
    }
    let bar = progress(chosen.len());
    let one = |entry: Entry| {
        let report = check_entry(entry, Options { seed: args.seed, ..Options::default() });
        bar.set_message(report.name.clone());
        bar.inc(1);
        report
    };
    let reports: Vec<CaseReport> = chosen.into_par_iter().map(one).collect();
    bar.finish_and_clear();
    print(&if args.json { as_json(&reports, args.seed) } else { as_text(&reports, &args) })?;
    Ok(if reports.iter().all(CaseReport::agrees) { Outcome::Good } else { Outcome::Wrong })
}

fn count(reports: &[CaseReport], verdict: Verdict) -> usize {
    reports.iter().flat_map(|report| &report.tensors).filter(|tensor| tensor.verdict == verdict).count()
}

fn as_text(reports: &[CaseReport], args: &Args) -> String {
    let mut text = if args.verbose { details(reports) } else { as_table(reports) };
    for report in reports.iter().filter(|report| !report.agrees()) {
        text += &format!("\n{report}\n  again: {}", again(report, args.seed));
    }
    let [agree, disagree, unresolved] =
        [Verdict::Agree, Verdict::Disagree, Verdict::Unresolved].map(|verdict| count(reports, verdict));
    let failed = reports.iter().filter(|report| report.failure.is_some()).count();
    if failed > 0 {
        text += &format!("\n{failed} cases could not be run");
    }
    let laws = reports.iter().flat_map(|report| &report.laws).filter(|law| !law.holds).count();
    if laws > 0 {
        text += &format!("\n{laws} laws do not hold");
    }
    let broken = identities(reports).filter(|identity| identity.verdict != Verdict::Agree).count();
    if broken > 0 {
        text += &format!("\n{broken} identities do not hold");
    }
    let cases = if reports.len() == 1 { "1 case".into() } else { format!("{} cases", reports.len()) };
    text + &format!("\n{cases}, {agree} tensors agree, {disagree} disagree, {unresolved} unresolved")
}

fn identities(reports: &[CaseReport]) -> impl Iterator<Item = &Identity> {
    reports.iter().flat_map(|report| &report.identities)
}

/// The command that checks just this case.
fn again(report: &CaseReport, seed: u64) -> String {
    format!("wora check {} --seed {seed} --verbose", report.name)
}

/// One row a tensor, its worst element and by how much each witness differs there and may; one row an identity.
fn as_table(reports: &[CaseReport]) -> String {
    let witnesses = Witness::ALL.map(|witness| witness.to_string());
    let columns = ["case", "tensor", "worst at", "ours"].into_iter().chain(witnesses.iter().map(String::as_str));
    let mut table = table(&columns.chain(["verdict"]).collect::<Vec<_>>());
    let off = |error: f64, budget: f64| format!("{error:.0e} of {budget:.0e}");
    for report in reports {
        for tensor in &report.tensors {
            let worst = tensor.worst.as_ref();
            let place = worst.map_or_else(String::new, |worst| worst.place.to_string());
            let ours = worst.map_or_else(String::new, |worst| format!("{:.6e}", worst.ours));
            let said = Witness::ALL.map(|witness| {
                let said = worst.and_then(|worst| worst.says.iter().find(|said| said.witness == witness));
                said.map_or_else(String::new, |said| off(said.error, said.budget))
            });
            let row = [report.name.clone(), tensor.name.clone(), place, ours].into_iter().chain(said);
            table.add_row(row.chain([tensor.verdict.to_string()]));
        }
        for Identity { label, equation, left, error, budget, verdict, .. } in &report.identities {
            let side = equation.split(" = ").next().unwrap_or_default();
            let start = [report.name.clone(), format!("{label}: {side}"), String::new(), format!("{left:.6e}")];
            let said = Witness::ALL.map(|witness| match witness {
                Witness::Identities => off(*error, *budget),
                _ => String::new(),
            });
            table.add_row(start.into_iter().chain(said).chain([verdict.to_string()]));
        }
    }
    let furthest = |parts: &mut dyn Iterator<Item = f64>| {
        format!("{:.0e}", parts.filter(|part| !part.is_nan()).fold(0.0, f64::max))
    };
    let of = |witness| {
        let all = reports.iter().flat_map(|report| &report.tensors).filter_map(move |tensor| tensor.witness(witness));
        furthest(&mut all.map(|says| says.worst.error / says.worst.size))
    };
    format!(
        "{table}\nEach witness: the error at the worst element, of the budget for it; --verbose has the values. \
         E49 to E54 and E125 to E131: the identities of SPEC.md, sections 8.3 and 13.11.\n\
         Largest error in parts of the terms that a number is the sum of: \
         differences {}, duals {}, identities {}.",
        of(Witness::Differences),
        of(Witness::Duals),
        furthest(&mut identities(reports).map(|identity| identity.error / identity.size))
    )
}

/// Every tensor's worst element, every identity and every law in full.
fn details(reports: &[CaseReport]) -> String {
    let lines = |report: &CaseReport| {
        let tensors = report.tensors.iter().map(|tensor| tensor.to_string());
        let identities = report.identities.iter().map(|identity| identity.to_string());
        let laws =
            report.laws.iter().map(|law| format!("{}: {}", law.name, if law.holds { "holds" } else { "BROKEN" }));
        let all = tensors.chain(identities).chain(laws);
        all.map(|text| format!("{}: {text}", report.name)).collect::<Vec<_>>().join("\n")
    };
    reports.iter().map(lines).collect::<Vec<_>>().join("\n")
}

fn as_json(reports: &[CaseReport], seed: u64) -> String {
    /// A report, and the command that makes it again.
    #[derive(serde::Serialize)]
    struct Again<'a> {
        #[serde(flatten)]
        report: &'a CaseReport,
        agrees: bool,
        again: String,
    }
    let again = |report| Again { report, agrees: report.agrees(), again: again(report, seed) };
    json!({
        "seed": seed,
        "cases": reports.iter().map(again).collect::<Vec<_>>(),
        "agree": count(reports, Verdict::Agree),
        "disagree": count(reports, Verdict::Disagree),
        "unresolved": count(reports, Verdict::Unresolved),
    })
    .to_string()
}
