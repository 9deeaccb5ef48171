//! `wora verify PATH...`: somebody's results, in case files, against the oracle's.

use super::{Outcome, complain, print, printable, progress, table};
use indicatif::ProgressBar;
use serde::Serialize;
use std::path::{Path, PathBuf};
use woracle::oracle::case_file;
use woracle::oracle::verify::{TensorVerdict, Tolerance, Verdict, verify};
use woracle::{Error, Result};

/// Judge results that another implementation wrote into case files.
#[derive(clap::Args)]
pub struct Args {
    /// Case files, or directories of them
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Print the whole report as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    cases: Vec<CaseVerdict>,
    passed: usize,
    failed: usize,
}

#[derive(Serialize)]
struct CaseVerdict {
    name: String,
    file: String,
    verdict: Verdict,
    tensors: Vec<TensorVerdict>,
}

pub fn run(args: Args) -> Result<Outcome> {
    let mut files = Vec::new();
    for path in &args.paths {
        match case_file::find(path) {
            Ok(found) => files.extend(found.into_iter().map(Ok)),
            Err(error) => files.push(Err((path.clone(), error))),
        }
    }
    let bar = progress(files.len());
    let mut cases = Vec::new();
    for file in &files {
        cases.push(match file {
            Ok(file) => {
                bar.set_message(file.display().to_string());
                judge(file, &bar)
            }
            Err((path, error)) => refuse(path, error, &bar),
        });
        bar.inc(1);
    }
    bar.finish_and_clear();
    let passed = cases.iter().filter(|case| case.verdict == Verdict::Pass).count();
    let report = Report { passed, failed: cases.len() - passed, cases };
    print(&if args.json { serde_json::to_string(&report).expect("plain data") } else { as_table(&report) })?;
    let any = |verdict| report.cases.iter().any(|case| case.verdict == verdict);
    Ok(if any(Verdict::Error) {
        Outcome::Unreadable
    } else if any(Verdict::Fail) {
        Outcome::Wrong
    } else {
        Outcome::Good
    })
}

fn judge(file: &Path, bar: &ProgressBar) -> CaseVerdict {
    let case = match case_file::read(file) {
        Ok(case) => case,
        Err(error) => return refuse(file, &error, bar),
    };
    match verify(&case, Tolerance::default()) {
        Ok(tensors) => {
            let failed = tensors.iter().any(|tensor| tensor.verdict != Verdict::Pass);
            let verdict = if failed { Verdict::Fail } else { Verdict::Pass };
            CaseVerdict { name: case.case.name, file: file.display().to_string(), verdict, tensors }
        }
        Err(error) => CaseVerdict { name: case.case.name, ..refuse(file, &error.in_file(file), bar) },
    }
}

/// What could not be judged: said on standard error at once, and counted.
fn refuse(path: &Path, error: &Error, bar: &ProgressBar) -> CaseVerdict {
    bar.suspend(|| complain(error));
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    CaseVerdict { name, file: path.display().to_string(), verdict: Verdict::Error, tensors: vec![] }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Fail => "FAIL",
        Verdict::Error => "ERROR",
    }
}

fn as_table(report: &Report) -> String {
    let mut table = table(&["case", "tensor", "max abs error", "max rel error", "at", "expected", "actual", "verdict"]);
    for case in &report.cases {
        if case.verdict == Verdict::Error {
            table.add_row([printable(&case.name).as_str(), "", "", "", "", "", "", word(case.verdict)]);
        }
        for tensor in &case.tensors {
            table.add_row([
                printable(&case.name),
                printable(&tensor.name),
                format!("{:.1e}", tensor.max_abs_error),
                format!("{:.1e}", tensor.max_rel_error),
                format!("{:?}", tensor.worst_index),
                format!("{:.6e}", tensor.expected),
                format!("{:.6e}", tensor.actual),
                word(tensor.verdict).into(),
            ]);
        }
    }
    format!("{table}\n{} passed, {} failed", report.passed, report.failed)
}
