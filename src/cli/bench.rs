//! `wora bench [FILTER]`: how long a training step takes, beside a bare matrix product.

use super::{Outcome, list, on_threads, print, progress, table};
use crate::bench::{CASES, Timing, time};
use crate::registry::{Precision, choose};
use crate::{Error, Result};
use std::num::NonZeroUsize;

/// Time one training step (forward, and every gradient but dW0) of each kind of layer.
#[derive(clap::Args)]
pub struct Args {
    /// Only the case of this name, or the cases whose names contain this
    filter: Option<String>,
    /// The type of numbers; both where none is given
    #[arg(long, value_parser = precision)]
    dtype: Option<Precision>,
    /// How many threads; as many as there are cores where none is given
    #[arg(long)]
    threads: Option<usize>,
    /// How many steps are timed, of which the median is reported
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// List the cases, one a line, and time nothing
    #[arg(long)]
    list: bool,
    /// Print one line of JSON a case
    #[arg(long)]
    json: bool,
}

fn precision(text: &str) -> std::result::Result<Precision, String> {
    let found = Precision::ALL.into_iter().find(|precision| precision.name() == text);
    found.ok_or_else(|| "expected f32 or f64".into())
}

/// More would take days and say nothing new.
const MOST_RUNS: usize = 1_000_000;

pub fn run(args: Args) -> Result<Outcome> {
    let filter = args.filter.as_deref().unwrap_or("");
    let cases = choose(CASES.iter().collect(), filter, |case| case.name, "a case's name (wora bench --list)")?;
    if args.list {
        return list(cases.iter().map(|case| case.name), args.json);
    }
    let runs = NonZeroUsize::new(args.runs).filter(|runs| runs.get() <= MOST_RUNS).ok_or_else(|| Error::Setting {
        name: "--runs",
        expected: format!("a number from 1 to {MOST_RUNS}"),
        found: args.runs.to_string(),
    })?;
    let precisions = args.dtype.map_or_else(|| Precision::ALL.to_vec(), |precision| vec![precision]);
    let bar = progress(cases.len() * precisions.len());
    let timed = on_threads(args.threads, || {
        let mut timings = Vec::new();
        for case in cases {
            for &precision in &precisions {
                bar.set_message(case.name);
                let timing = time(case, precision, runs)?;
                bar.inc(1);
                if args.json {
                    bar.suspend(|| print(&serde_json::to_string(&timing).expect("numbers and names")))?;
                }
                timings.push(timing);
            }
        }
        Ok(timings)
    })?;
    bar.finish_and_clear();
    let timings: Vec<Timing> = timed?;
    if !args.json {
        print(&as_table(&timings))?;
    }
    Ok(Outcome::Good)
}

fn as_table(timings: &[Timing]) -> String {
    let mut table = table(&["case", "dtype", "threads", "min ms", "median ms", "GF/s", "matmul GF/s", "% of matmul"]);
    table.add_rows(timings.iter().map(|timing| {
        let Timing { name, dtype, threads, min_ms, median_ms, gflops, matmul_gflops, percent_of_matmul } = timing;
        [
            name.to_string(),
            dtype.to_string(),
            threads.to_string(),
            format!("{min_ms:.3}"),
            format!("{median_ms:.3}"),
            format!("{gflops:.1}"),
            format!("{matmul_gflops:.1}"),
            format!("{percent_of_matmul:.0}"),
        ]
    }));
    table.to_string()
}
