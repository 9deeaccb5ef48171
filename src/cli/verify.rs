//! `wora verify PATH...`: somebody's results, in case files or in a merged model, against the oracle's, and what they did
//! wrong.

use super::{Outcome, complain, escape, print, printable, progress, table};
use crate::oracle::diagnose::{self, Candidate, Diagnosis};
use crate::oracle::verify::{self, TensorVerdict, Tolerance, Verdict};
use crate::oracle::{CaseFile, case_file};
use crate::peft::{ADAPTER_FILE, Checkpoint, Model, compare};
use crate::{Error, Result};
use indicatif::ProgressBar;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Judge results that another implementation wrote into case files, and name the mistake that explains wrong ones.
#[derive(clap::Args)]
pub struct Args {
    /// Case files, or directories of them
    #[arg(required_unless_present = "merged", conflicts_with = "merged")]
    paths: Vec<PathBuf>,
    /// Judge a merged model instead: somebody's merge of this adapter, a directory of PEFT's
    #[arg(long, requires_all = ["base", "merged"])]
    adapter: Option<PathBuf>,
    /// The base that the adapter was merged into: a safetensors file, or a directory
    #[arg(long, requires_all = ["adapter", "merged"])]
    base: Option<PathBuf>,
    /// What came of it: a safetensors file, or a directory
    #[arg(long, requires_all = ["adapter", "base"])]
    merged: Option<PathBuf>,
    /// Accept what is off by this part of the expected number, instead of the rounding bound of its type
    #[arg(long, value_parser = tolerance)]
    rtol: Option<f64>,
    /// Accept what is off by this much, instead of the rounding bound of its type
    #[arg(long, value_parser = tolerance)]
    atol: Option<f64>,
    /// Print the whole report as JSON
    #[arg(long, conflicts_with_all = ["markdown", "junit"])]
    json: bool,
    /// Print a summary in Markdown, for a pull request or a CI job
    #[arg(long, conflicts_with = "junit")]
    markdown: bool,
    /// Print a summary in JUnit's XML, for CI
    #[arg(long)]
    junit: bool,
}

fn tolerance(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a finite number, 0 or more".into()),
    }
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
    /// Answers that the file does not have.
    unanswered: Vec<String>,
    /// Empty where nothing is wrong.
    #[serde(flatten)]
    diagnosis: Diagnosis,
    /// Why it could not be judged.
    error: Option<String>,
}

pub fn run(args: Args) -> Result<Outcome> {
    let tolerance = Tolerance { rtol: args.rtol, atol: args.atol };
    let cases = match (&args.adapter, &args.base, &args.merged) {
        (Some(adapter), Some(base), Some(merged)) => judge_merge(adapter, base, merged, tolerance)?,
        _ => judge_files(&args.paths, tolerance),
    };
    let passed = cases.iter().filter(|case| case.verdict == Verdict::Pass).count();
    let report = Report { passed, failed: cases.len() - passed, cases };
    print(&match (args.json, args.markdown, args.junit) {
        (true, ..) => serde_json::to_string(&report).expect("plain data"),
        (_, true, _) => as_markdown(&report),
        (_, _, true) => as_junit(&report),
        _ => as_table(&report),
    })?;
    let any = |verdict| report.cases.iter().any(|case| case.verdict == verdict);
    Ok(if any(Verdict::Error) {
        Outcome::Unreadable
    } else if any(Verdict::Fail) {
        Outcome::Wrong
    } else {
        Outcome::Good
    })
}

/// The adapted weights of a merged model, one case each, and what else of it has changed.
fn judge_merge(adapter: &Path, base: &Path, merged: &Path, tolerance: Tolerance) -> Result<Vec<CaseVerdict>> {
    let (checkpoint, base, theirs) = (Checkpoint::open(adapter)?, Model::open(base)?, Model::open(merged)?);
    compare::fit(&checkpoint, &base, &theirs)?;
    let modules: Vec<&str> = checkpoint.modules().collect();
    let bar = progress(modules.len());
    let mut cases = vec![];
    for module in modules {
        bar.set_message(module.to_string());
        let judged = compare::case(&checkpoint, &base, &theirs, module);
        let judged = judged.map_err(|error| error.in_file(&adapter.join(ADAPTER_FILE)));
        cases.push(match judged {
            // A merged model answers nothing but weights.
            Ok(file) => CaseVerdict { unanswered: vec![], ..judge_case(file, merged, tolerance, &bar) },
            Err(error) => CaseVerdict { name: module.into(), ..refuse(merged, &error, &bar) },
        });
        bar.inc(1);
    }
    bar.finish_and_clear();
    for (name, line) in compare::others(&checkpoint, &base, &theirs)? {
        cases.push(CaseVerdict {
            name: name.clone(),
            file: merged.display().to_string(),
            verdict: Verdict::Fail,
            tensors: vec![],
            unanswered: vec![],
            diagnosis: Diagnosis {
                first_diverging: Some(name.clone()),
                facts: vec![format!("{name}: {line}")],
                ..Diagnosis::default()
            },
            error: None,
        });
    }
    Ok(cases)
}

fn judge_files(paths: &[PathBuf], tolerance: Tolerance) -> Vec<CaseVerdict> {
    let mut files = Vec::new();
    for path in paths {
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
                judge(file, tolerance, &bar)
            }
            Err((path, error)) => refuse(path, error, &bar),
        });
        bar.inc(1);
    }
    bar.finish_and_clear();
    cases
}

fn judge(path: &Path, tolerance: Tolerance, bar: &ProgressBar) -> CaseVerdict {
    match case_file::read(path) {
        Ok(file) => judge_case(file, path, tolerance, bar),
        Err(error) => refuse(path, &error, bar),
    }
}

fn judge_case(file: CaseFile, path: &Path, tolerance: Tolerance, bar: &ProgressBar) -> CaseVerdict {
    let judged = diagnose::judge(&file, tolerance);
    match judged.and_then(|(tensors, diagnosis)| Ok((tensors, diagnosis, verify::unanswered(&file)?))) {
        Ok((tensors, diagnosis, unanswered)) => {
            let verdict = if diagnosis.is_some() { Verdict::Fail } else { Verdict::Pass };
            let diagnosis = diagnosis.unwrap_or_default();
            let (name, file) = (file.case.name, path.display().to_string());
            CaseVerdict { name, file, verdict, tensors, unanswered, diagnosis, error: None }
        }
        Err(error) => CaseVerdict { name: file.case.name, ..refuse(path, &error.in_file(path), bar) },
    }
}

/// What could not be judged: said on standard error at once, and counted.
fn refuse(path: &Path, error: &Error, bar: &ProgressBar) -> CaseVerdict {
    bar.suspend(|| complain(error));
    CaseVerdict {
        name: path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        file: path.display().to_string(),
        verdict: Verdict::Error,
        tensors: vec![],
        unanswered: vec![],
        diagnosis: Diagnosis::default(),
        error: Some(error.to_string()),
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass",
        Verdict::Fail => "FAIL",
        Verdict::Error => "ERROR",
    }
}

const HEADER: [&str; 10] =
    ["case", "tensor", "dtype", "error / bound", "ulps", "beyond", "worst at", "expected", "actual", "verdict"];

fn row(case: &CaseVerdict, tensor: &TensorVerdict) -> [String; 10] {
    [
        printable(&case.name),
        printable(&tensor.name),
        tensor.dtype.to_string(),
        format!("{:.2e}", tensor.error_over_bound),
        format!("{:.1e}", tensor.max_ulps),
        tensor.beyond.to_string(),
        format!("{:?}", tensor.worst_index),
        format!("{:.6e}", tensor.expected),
        format!("{:.6e}", tensor.actual),
        word(tensor.verdict).into(),
    ]
}

/// What is to be said of a case, a line each: of one that passes only what it does not answer.
fn explanation(case: &CaseVerdict) -> Vec<String> {
    let Diagnosis { first_diverging, candidates, facts, too_large } = &case.diagnosis;
    let mut lines = vec![];
    if !case.unanswered.is_empty() {
        let names: Vec<_> = case.unanswered.iter().map(|name| printable(name)).collect();
        lines.push(format!("not answered: {}", names.join(", ")));
    }
    lines.extend(first_diverging.as_ref().map(|name| format!("first diverging: {}", printable(name))));
    let explained = candidates.first().map(|best| best.residual);
    let ties = candidates.iter().take_while(|one| Some(one.residual) == explained).count();
    for (place, Candidate { id, title, seen, section, residual, runner_up_ratio, .. }) in candidates.iter().enumerate()
    {
        let how_well = match *residual {
            0.0 => "explains every number".to_string(),
            residual => format!("leaves an error of {residual:.1e} bounds"),
        };
        let tied = if place < ties && ties > 1 { " (tied)" } else { "" };
        let ahead =
            runner_up_ratio.map_or_else(String::new, |ratio| format!(", {ratio:.1e} times better than the next"));
        lines.push(format!("{}. {id}{tied}: {title}", place + 1));
        lines.push(format!("   {how_well}{ahead}; seen: {seen}; SPEC.md, section {section}"));
    }
    if case.verdict == Verdict::Fail && candidates.is_empty() && !too_large {
        lines.push("no known mistake, nor a pair of them, explains these numbers".into());
    }
    lines.extend(facts.iter().map(|fact| format!("   {}", printable(fact))));
    lines
}

fn as_table(report: &Report) -> String {
    let mut table = table(&HEADER);
    let mut below = String::new();
    for case in &report.cases {
        if case.verdict == Verdict::Error {
            let mut cells = HEADER.map(|_| String::new());
            (cells[0], cells[9]) = (printable(&case.name), word(case.verdict).into());
            table.add_row(cells);
        }
        table.add_rows(case.tensors.iter().map(|tensor| row(case, tensor)));
        let lines = explanation(case);
        if !lines.is_empty() {
            below += &format!("\n{}:\n  {}", printable(&case.name), lines.join("\n  "));
        }
    }
    format!("{table}{below}\n{} passed, {} failed", report.passed, report.failed)
}

/// The failures in full, the rest in a line.
fn as_markdown(report: &Report) -> String {
    let mut text = format!("**{} passed, {} failed**", report.passed, report.failed);
    for case in report.cases.iter().filter(|case| case.verdict != Verdict::Pass) {
        text += &format!("\n\n### {}: {}\n", escape::markdown(&printable(&case.name)), word(case.verdict));
        text += &case
            .error
            .as_ref()
            .map_or_else(String::new, |error| format!("\n{}\n", escape::markdown(&printable(error))));
        let failed: Vec<_> = case.tensors.iter().filter(|tensor| tensor.verdict != Verdict::Pass).collect();
        if !failed.is_empty() {
            text += &format!("\n| {} |\n|{}", HEADER[1..].join(" | "), " --- |".repeat(HEADER.len() - 1));
            for tensor in failed {
                let cells = row(case, tensor).map(|cell| escape::markdown(&cell));
                text += &format!("\n| {} |", cells[1..].join(" | "));
            }
            text += "\n";
        }
        for line in explanation(case) {
            text += &format!("\n- {}", escape::markdown(line.trim_start()));
        }
    }
    for case in report.cases.iter().filter(|case| case.verdict == Verdict::Pass) {
        for line in explanation(case) {
            text += &format!("\n- {}", escape::markdown(&format!("{}: {line}", printable(&case.name))));
        }
    }
    text
}

/// One test a case, as JUnit has them.
fn as_junit(report: &Report) -> String {
    let count = |verdict| report.cases.iter().filter(|case| case.verdict == verdict).count();
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"wora verify\" tests=\"{}\" failures=\"{}\" errors=\"{}\">",
        report.cases.len(),
        count(Verdict::Fail),
        count(Verdict::Error)
    );
    for case in &report.cases {
        let (name, file) = (escape::xml(&printable(&case.name)), escape::xml(&printable(&case.file)));
        text += &format!("\n  <testcase name=\"{name}\" classname=\"{file}\"");
        text += &match case.verdict {
            Verdict::Pass if case.unanswered.is_empty() => "/>".into(),
            Verdict::Pass => {
                let lines = escape::xml(&explanation(case).join("\n"));
                format!(">\n    <system-out>{lines}</system-out>\n  </testcase>")
            }
            Verdict::Fail => {
                let failed = case.tensors.iter().filter(|tensor| tensor.verdict != Verdict::Pass);
                let names: Vec<_> = failed.map(|tensor| printable(&tensor.name)).collect();
                let lines = escape::xml(&explanation(case).join("\n"));
                let message = escape::xml(&format!("wrong: {}", names.join(", ")));
                format!(">\n    <failure message=\"{message}\">{lines}</failure>\n  </testcase>")
            }
            Verdict::Error => {
                let message = escape::xml(&printable(case.error.as_deref().unwrap_or_default()));
                format!(">\n    <error message=\"{message}\"/>\n  </testcase>")
            }
        };
    }
    text + "\n</testsuite>"
}
