//! `wora report OUT.html`: what the oracle finds, as one page.

use super::{Outcome, on_threads, print, progress};
use crate::Result;
use crate::aside::{Aside, replace};
use crate::report::{Plan, Report};
use std::path::PathBuf;

/// Check everything and write one page of it: verdicts, V curves, mistakes, training, the plane of alpha and beta
#[derive(clap::Args)]
pub struct Args {
    /// The page to write
    out: PathBuf,
    /// An element whose error is drawn against the step, as linear-full/lora_A or linear-full/lora_A/1,2; may be repeated
    #[arg(long = "path", value_name = "CASE/TENSOR[/ELEMENT]")]
    paths: Vec<String>,
    /// The seed of the cases' numbers and of the training
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads; the results do not depend on it
    #[arg(long)]
    threads: Option<usize>,
    /// A part of it: the linear layer, its own mistakes, a short training
    #[arg(long)]
    quick: bool,
    /// Print all that the page shows as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let mut plan = if args.quick { Plan::quick(args.seed) } else { Plan::everything(args.seed) };
    if !args.paths.is_empty() {
        plan.paths = args.paths;
    }
    // Whether it can be written is found out before the minutes of work, during which nothing lies about.
    drop(Aside::of(&args.out)?);
    let bar = progress(plan.parts());
    let watch = |what: &str| {
        bar.set_message(what.to_string());
        bar.inc(1);
    };
    let report = on_threads(args.threads, || Report::gather(&plan, &watch))?;
    bar.finish_and_clear();
    let report = report?;
    replace(&args.out, |out| out.write_all(report.to_html().as_bytes()))?;
    print(&if args.json {
        serde_json::to_string(&report).expect("plain data")
    } else {
        format!("{}\n{}", args.out.display(), report.summary().replace("; ", "\n"))
    })?;
    Ok(if report.is_right() { Outcome::Good } else { Outcome::Wrong })
}
