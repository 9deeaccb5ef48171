//! `wora train CONFIG.toml`: a base model, an adapter on it, and what came of it.

use super::{Outcome, on_threads, print, stop_signal};
use crate::Result;
use crate::train::{Observer, Progress, Run, Start, read};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Train a model, freeze it, adapt it, and write a PEFT adapter, curves and metrics. Ctrl-C saves and stops.
#[derive(clap::Args)]
pub struct Args {
    /// The configuration
    config: PathBuf,
    /// The directory that everything is written into; runs/NAME where nothing is said
    #[arg(long)]
    out: Option<PathBuf>,
    /// Go on where an earlier run of the same configuration stopped
    #[arg(long)]
    resume: bool,
    /// The seed, instead of the configuration's
    #[arg(long)]
    seed: Option<u64>,
    /// Threads; the results do not depend on it
    #[arg(long)]
    threads: Option<usize>,
    /// Write down what every stage starts from and its first N batches, for another implementation to repeat
    #[arg(long, value_name = "N", default_value_t = 0)]
    trace: usize,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

/// Where a configuration's results go where nothing is said.
pub(super) fn usual_directory(config: &Path) -> PathBuf {
    Path::new("runs").join(config.file_stem().unwrap_or_default())
}

/// A bar on a terminal, and the signals that stop a run.
pub(super) struct Watcher {
    bar: ProgressBar,
    stop: Arc<AtomicBool>,
}

impl Watcher {
    pub(super) fn new() -> Self {
        let bar = ProgressBar::new(0);
        let template = "{prefix} {bar:24} {pos}/{len} {msg} {eta} left";
        bar.set_style(ProgressStyle::with_template(template).expect("a template"));
        Self { bar, stop: stop_signal() }
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Observer for Watcher {
    fn watch(&self, progress: &Progress<'_>) {
        let Progress { stage, step, steps, loss, validation } = progress;
        if *step == 1 {
            self.bar.reset();
        }
        self.bar.set_length(*steps as u64);
        self.bar.set_position(*step as u64);
        self.bar.set_prefix(stage.to_string());
        let validation = validation.map_or_else(String::new, |validation| format!(", validation {validation}"));
        self.bar.set_message(format!("loss {loss:.4}{validation}"));
    }
    fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

pub fn run(args: Args) -> Result<Outcome> {
    let mut config = read(&args.config)?;
    if let Some(seed) = args.seed {
        config.set_seed(seed);
    }
    let out = args.out.unwrap_or_else(|| usual_directory(&args.config));
    let start = if args.resume { Start::Resume } else { Start::Fresh };
    let run = Run::new(&config, &out, start)?.tracing(args.trace);
    let watcher = Watcher::new();
    let summary = on_threads(args.threads, || run.finish(&watcher))?;
    watcher.finish();
    let summary = summary?;
    let text = format!("{}\n{summary}", out.display());
    print(&if args.json { serde_json::to_string(&summary).expect("plain data") } else { text })?;
    let good = summary.adapt.is_none_or(|adapt| adapt.equal && adapt.base_unchanged);
    Ok(if good { Outcome::Good } else { Outcome::Wrong })
}
