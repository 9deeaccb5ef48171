//! `wora compare CONFIG.toml`: full fine-tuning, LoRA, DoRA and WoRA on the same base models.

use super::train::{Watcher, usual_directory};
use super::{Outcome, on_threads, print, table};
use crate::Result;
use crate::train::compare::{Compared, compare};
use crate::train::read;
use std::path::PathBuf;

/// Compare full fine-tuning, LoRA, DoRA and WoRA (detached and full norm gradient) over several seeds
#[derive(clap::Args)]
pub struct Args {
    /// The configuration
    config: PathBuf,
    /// The directory for compare.json and compare.svg; runs/NAME-compare where nothing is said
    #[arg(long)]
    out: Option<PathBuf>,
    /// Threads; the results do not depend on it
    #[arg(long)]
    threads: Option<usize>,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let config = read(&args.config)?;
    let out = args.out.unwrap_or_else(|| {
        let usual = usual_directory(&args.config);
        usual.with_file_name(format!("{}-compare", usual.file_name().unwrap_or_default().display()))
    });
    let watcher = Watcher::new();
    let all = on_threads(args.threads, || compare(&config, &out, &watcher))?;
    watcher.finish();
    let all = all?;
    print(&if args.json { serde_json::to_string(&all).expect("plain data") } else { as_table(&all) })?;
    Ok(Outcome::Good)
}

/// One row a way.
fn as_table(all: &[Compared]) -> String {
    let metric = all.first().map_or("", |one| one.metric);
    let name = format!("test, {metric}");
    let mut table = table(&["way", "trained", &name, "deviation", "seeds", "ms a step"]);
    for Compared { way, parameters, test, mean, deviation, milliseconds, .. } in all {
        let [mean, deviation] = [mean, deviation].map(|value| format!("{value:.3}"));
        let seeds = test.len().to_string();
        table.add_row([way.to_string(), parameters.to_string(), mean, deviation, seeds, format!("{milliseconds:.2}")]);
    }
    table.to_string()
}
