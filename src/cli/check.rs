//! `wora check [FILTER]`: the hand-derived backward of every layer against its witnesses.

use super::{Outcome, choose, mistakes, print, progress, table};
use rayon::prelude::*;
use serde_json::json;
use woracle::Result;
use woracle::gradcheck::{CaseReport, Options, TensorReport, Verdict, Witness, check};
use woracle::registry::{LAYERS, Subject};

/// Check every layer's forward and backward against the definition, differences, dual numbers and identities.
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
        return mistakes::list(filter);
    }
    if args.mistakes {
        return mistakes::run(filter, args.seed, args.verbose, args.json);
    }
    let all = LAYERS.iter().flat_map(|&layer| layer.specs().iter().map(move |spec| (layer, spec)));
    let chosen = choose(all.collect(), filter, |(_, spec)| spec.name, "a case's name (wora check --list)")?;
    if args.list {
        let names: Vec<_> = chosen.iter().map(|(_, spec)| spec.name).collect();
        print(&names.join("\n"))?;
        return Ok(Outcome::Good);
    }
    let bar = progress(chosen.len());
    let one = |(layer, spec): (&dyn Subject, _)| {
        let report = check(layer, &layer.draw(spec, args.seed), Options { seed: args.seed, ..Options::default() });
        bar.set_message(report.name.clone());
        bar.inc(1);
        report
    };
    let reports: Vec<CaseReport> = chosen.into_par_iter().map(one).collect();
    bar.finish_and_clear();
    print(&if args.json { as_json(&reports) } else { as_text(&reports, &args) })?;
    Ok(if reports.iter().all(CaseReport::agrees) { Outcome::Good } else { Outcome::Wrong })
}

fn count(reports: &[CaseReport], verdict: Verdict) -> usize {
    reports.iter().flat_map(|report| &report.tensors).filter(|tensor| tensor.verdict == verdict).count()
}

fn as_text(reports: &[CaseReport], args: &Args) -> String {
    let mut text = if args.verbose { details(reports) } else { as_table(reports) };
    for report in reports.iter().filter(|report| !report.agrees()) {
        text += &format!("\n{report}\n  again: wora check {} --seed {} --verbose", report.name, args.seed);
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
    let cases = if reports.len() == 1 { "1 case".into() } else { format!("{} cases", reports.len()) };
    text + &format!("\n{cases}, {agree} tensors agree, {disagree} disagree, {unresolved} unresolved")
}

/// One row a tensor: its worst element, and by how much each witness differs there and may.
fn as_table(reports: &[CaseReport]) -> String {
    let witnesses = Witness::ALL.map(|witness| witness.to_string());
    let columns = ["case", "tensor", "worst at", "ours"].into_iter().chain(witnesses.iter().map(String::as_str));
    let mut table = table(&columns.chain(["verdict"]).collect::<Vec<_>>());
    for report in reports {
        for tensor in &report.tensors {
            let (place, ours) = tensor
                .worst
                .as_ref()
                .map_or_else(Default::default, |worst| (format!("{:?}", worst.index), format!("{:.6e}", worst.ours)));
            let said = Witness::ALL.map(|witness| {
                let says = tensor.witness(witness);
                says.map_or_else(String::new, |says| format!("{:.0e} of {:.0e}", says.worst.error, says.worst.budget))
            });
            let row = [report.name.clone(), tensor.name.clone(), place, ours].into_iter().chain(said);
            table.add_row(row.chain([tensor.verdict.to_string()]));
        }
    }
    let furthest = |witness| {
        let all = reports.iter().flat_map(|report| &report.tensors).filter_map(|tensor| tensor.witness(witness));
        let relative = all.map(|says| says.worst.error / says.worst.size).filter(|relative| !relative.is_nan());
        format!("{witness} {:.0e}", relative.fold(0.0, f64::max))
    };
    format!(
        "{table}\nEach witness: the error nearest to its budget, of that budget.\n\
         Largest of these errors in parts of the terms that an element is the sum of: {}, {}, {}.",
        furthest(Witness::Differences),
        furthest(Witness::Duals),
        furthest(Witness::Identities)
    )
}

/// Every tensor's worst element in full: the value, what each witness makes of it, and how sure it is.
fn details(reports: &[CaseReport]) -> String {
    let lines = |(report, tensor): (&CaseReport, &TensorReport)| {
        let Some(worst) = &tensor.worst else { return String::new() };
        let says = worst.says.iter().map(|said| format!("\n{said}")).collect::<String>();
        format!("{}: {} {:?}: {}\n{worst}{says}", report.name, tensor.name, worst.index, tensor.verdict)
    };
    let all = reports.iter().flat_map(|report| report.tensors.iter().map(move |tensor| (report, tensor)));
    all.map(lines).collect::<Vec<_>>().join("\n")
}

fn as_json(reports: &[CaseReport]) -> String {
    json!({
        "cases": reports,
        "agree": count(reports, Verdict::Agree),
        "disagree": count(reports, Verdict::Disagree),
        "unresolved": count(reports, Verdict::Unresolved),
    })
    .to_string()
}
