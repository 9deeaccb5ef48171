//! The command line: one file a subcommand. Exit codes: 0 all well, 1 something is wrong with what was
//! checked, 2 it could not be checked.

mod bench;
mod check;
mod compare;
mod escape;
mod explain;
mod golden;
mod inspect;
mod merge;
mod mistakes;
mod report;
mod train;
mod unmerge;
mod verify;

use clap::error::ErrorKind as Misuse;
use clap::{Parser, Subcommand};
use comfy_table::{ContentArrangement, Table, presets::UTF8_FULL_CONDENSED};
use indicatif::{ProgressBar, ProgressStyle};
use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// The oracle for WoRA: is a layer's forward and backward right?
#[derive(Parser)]
#[command(name = "wora", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench(bench::Args),
    Check(check::Args),
    Compare(compare::Args),
    Explain(explain::Args),
    Golden(golden::Args),
    Inspect(inspect::Args),
    Merge(merge::Args),
    Report(report::Args),
    Train(train::Args),
    Unmerge(unmerge::Args),
    Verify(verify::Args),
}

/// How a command ended that could do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All well: exit code 0.
    Good,
    /// Something that was checked is wrong: exit code 1.
    Wrong,
    /// Something could not be checked, which has been said: exit code 2.
    Unreadable,
}

/// Has a write beyond a limit on file sizes fail like any other, instead of ending the process.
fn outlive_file_size_limit() {
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, std::sync::Arc::default());
}

/// A command line, understood and not run.
pub fn parse<A: Into<OsString> + Clone>(arguments: impl IntoIterator<Item = A>) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(arguments)
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    outlive_file_size_limit();
    let command = match parse(std::env::args_os()) {
        Ok(cli) => cli.command,
        Err(error) => return refuse(&error),
    };
    let done = match command {
        Command::Bench(args) => bench::run(args),
        Command::Check(args) => check::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Explain(args) => explain::run(args),
        Command::Golden(args) => golden::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Report(args) => report::run(args),
        Command::Train(args) => train::run(args),
        Command::Unmerge(args) => unmerge::run(args),
        Command::Verify(args) => verify::run(args),
    };
    match done {
        Ok(Outcome::Good) => ExitCode::SUCCESS,
        Ok(Outcome::Wrong) => ExitCode::from(1),
        Ok(Outcome::Unreadable) => ExitCode::from(2),
        Err(error) => {
            complain(&error);
            ExitCode::from(2)
        }
    }
}

/// Says what is wrong on standard error, in one line.
fn complain(error: &dyn std::fmt::Display) {
    say(&error.to_string());
}

/// A line on standard error. Where that is full or closed there is nobody to tell; the exit code says it.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "wora: {}", printable(line));
}

/// Says what is wrong with the arguments in one line too; help and version are what was asked for.
fn refuse(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == Misuse::DisplayHelpOnMissingArgumentOrSubcommand {
        error.exit();
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    // Behind it stand the usage and where there is help.
    let said = ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|end| text.rfind(end)).min();
    let lines = text[..said.unwrap_or(text.len())].lines().map(str::trim).filter(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join(" ").replace(" tip: ", "; ");
    complain(&format!("{line} (--help tells more)"));
    ExitCode::from(2)
}

/// Text that may come from a file, without what could break a line, turn it around or steer a terminal.
fn printable(text: &str) -> String {
    let harmless = |c: char| {
        !c.is_control()
            && !matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    text.chars().flat_map(|c| if harmless(c) { vec![c] } else { c.escape_default().collect() }).collect()
}

/// Writes to standard output. A reader that has seen enough, as `head` does, is no error.
fn print(text: &str) -> crate::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(crate::Error::io("standard output".as_ref(), &error))
        }
        _ => Ok(()),
    }
}

/// Prints names, one a line or as a JSON array.
fn list<'a>(names: impl Iterator<Item = &'a str>, as_json: bool) -> crate::Result<Outcome> {
    let names: Vec<_> = names.collect();
    print(&if as_json { serde_json::json!(names).to_string() } else { names.join("\n") })?;
    Ok(Outcome::Good)
}

/// A progress bar on a terminal; nothing in a pipe.
fn progress(length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta}").expect("a template"));
    bar
}

/// A progress bar in bytes on a terminal; nothing in a pipe.
fn progress_in_bytes(length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.set_style(style.expect("a template"));
    bar
}

/// Becomes true when a signal asks for an end. A second signal ends the process at once.
fn stop_signal() -> std::sync::Arc<AtomicBool> {
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    #[cfg(unix)]
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        // Where a signal cannot be taken the process ends by it.
        let _ = signal_hook::flag::register_conditional_shutdown(signal, 2, stop.clone());
        let _ = signal_hook::flag::register(signal, stop.clone());
    }
    stop
}

/// More threads than any machine has cores would only wait for each other.
const MOST_THREADS: usize = 1024;

/// Runs work on so many threads; on all there are where nothing is said.
fn on_threads<Out: Send>(threads: Option<usize>, work: impl FnOnce() -> Out + Send) -> crate::Result<Out> {
    // Within the pool no product waits for a thread to wake.
    let Some(threads) = threads else { return Ok(rayon::scope(|_| work())) };
    let refuse = |found: String| {
        let expected = format!("a number from 1 to {MOST_THREADS}");
        crate::Error::Setting { name: "--threads", expected, found }
    };
    if !(1..=MOST_THREADS).contains(&threads) {
        return Err(refuse(threads.to_string()));
    }
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| refuse(error.to_string()))?;
    Ok(pool.install(work))
}

/// Counts written bytes on a bar, until a signal asks for an end: what is half written is then taken away.
fn counting<'b>(bar: &'b ProgressBar, out: &'b Path) -> impl Fn(u64) -> crate::Result<()> + Sync + 'b {
    let stop = stop_signal();
    move |bytes| {
        bar.inc(bytes);
        if stop.load(Ordering::Relaxed) {
            let message = "interrupted, nothing is written".into();
            return Err(crate::Error::File { path: out.into(), message });
        }
        Ok(())
    }
}

/// What is to be considered, on standard error.
fn warn(warnings: impl IntoIterator<Item = String>) {
    for warning in warnings {
        say(&format!("warning: {warning}"));
    }
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header.to_vec());
    table
}
