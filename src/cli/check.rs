//! `wora check [FILTER]`: the hand-derived backward of every layer against its witnesses.

use super::{Outcome, print, table};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use woracle::gradcheck::{CaseReport, Options, Verdict, check};
use woracle::registry::{LAYERS, Subject};
use woracle::{Error, Result};

/// Check every layer's forward and backward against the definition, differences and f32.
#[derive(clap::Args)]
pub struct Args {
    /// Only the cases whose name contains this
    filter: Option<String>,
    /// List the cases, one a line, and check nothing
    #[arg(long)]
    list: bool,
    /// The seed of the cases' numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the whole report as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let filter = args.filter.as_deref().unwrap_or("");
    let all = LAYERS.iter().flat_map(|&layer| layer.specs().iter().map(move |spec| (layer, spec)));
    let chosen: Vec<_> = all.filter(|(_, spec)| spec.name.contains(filter)).collect();
    if chosen.is_empty() {
        let expected = "part of a case's name (wora check --list)".into();
        return Err(Error::Unknown { what: "FILTER", expected, found: filter.into() });
    }
    if args.list {
        let names: Vec<_> = chosen.iter().map(|(_, spec)| spec.name).collect();
        print(&names.join("\n"))?;
        return Ok(Outcome::Good);
    }
    let bar = ProgressBar::new(chosen.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta}").expect("a template"));
    let mut reports = Vec::new();
    for (layer, spec) in chosen {
        bar.set_message(spec.name);
        let options = Options { seed: args.seed, ..Options::default() };
        reports.push(check(layer, &Subject::draw(layer, spec, args.seed), options));
        bar.inc(1);
    }
    bar.finish_and_clear();
    print(&if args.json { as_json(&reports) } else { as_table(&reports) })?;
    Ok(if reports.iter().all(CaseReport::agrees) { Outcome::Good } else { Outcome::Wrong })
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Agree => "agree",
        Verdict::Unresolved => "UNRESOLVED",
        Verdict::Disagree => "DISAGREE",
    }
}

fn count(reports: &[CaseReport], verdict: Verdict) -> usize {
    reports.iter().flat_map(|report| &report.tensors).filter(|tensor| tensor.verdict() == verdict).count()
}

fn as_table(reports: &[CaseReport]) -> String {
    let mut table = table(&["case", "tensor", "worst error", "budget", "against", "verdict"]);
    for report in reports {
        for tensor in &report.tensors {
            // Where all agree, differences are the most telling: they know least of what they check.
            let differences = tensor.witnesses.iter().find(|witness| witness.witness == "differences");
            let telling = differences.filter(|_| tensor.verdict() == Verdict::Agree);
            let Some(worst) = telling.or_else(|| tensor.worst()) else { continue };
            table.add_row([
                report.name.clone(),
                tensor.name.clone(),
                format!("{:.1e}", worst.worst.error),
                format!("{:.1e}", worst.worst.budget),
                worst.witness.into(),
                word(tensor.verdict()).into(),
            ]);
        }
    }
    let mut text = table.to_string();
    for report in reports {
        if let Some(failure) = &report.failure {
            text += &format!("\n{}: FAILED: {failure}", report.name);
        }
        for tensor in &report.tensors {
            for witness in tensor.witnesses.iter().filter(|witness| witness.verdict != Verdict::Agree) {
                let worst = &witness.worst;
                text += &format!(
                    "\n{}: {} {:?}: {:e}, {} says {:e}: {}",
                    report.name,
                    tensor.name,
                    worst.index,
                    worst.ours,
                    witness.witness,
                    worst.theirs,
                    word(witness.verdict)
                );
            }
        }
    }
    let [agree, disagree, unresolved] =
        [Verdict::Agree, Verdict::Disagree, Verdict::Unresolved].map(|verdict| count(reports, verdict));
    let failed = reports.iter().filter(|report| report.failure.is_some()).count();
    if failed > 0 {
        text += &format!("\n{failed} cases could not be run");
    }
    text + &format!("\n{} cases, {agree} tensors agree, {disagree} disagree, {unresolved} unresolved", reports.len())
}

fn as_json(reports: &[CaseReport]) -> String {
    let cases: Vec<_> = reports
        .iter()
        .map(|report| {
            let tensors = report.tensors.iter().map(
                |tensor| json!({ "name": tensor.name, "verdict": tensor.verdict(), "witnesses": tensor.witnesses }),
            );
            json!({ "name": report.name, "agrees": report.agrees(), "failure": report.failure, "tensors": tensors.collect::<Vec<_>>() })
        })
        .collect();
    json!({
        "cases": cases,
        "agree": count(reports, Verdict::Agree),
        "disagree": count(reports, Verdict::Disagree),
        "unresolved": count(reports, Verdict::Unresolved),
    })
    .to_string()
}
