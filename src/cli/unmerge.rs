//! `wora unmerge`: the base model of a merged one.

use super::merge::as_table;
use super::{Outcome, counting, print, progress_in_bytes};
use crate::Result;
use crate::peft::{Checkpoint, MergeOptions, Model, merged_bytes, unmerge};
use std::path::PathBuf;

/// Restore the base of a model that wora has merged.
#[derive(clap::Args)]
pub struct Args {
    /// The directory that wora merge wrote
    #[arg(long)]
    merged: PathBuf,
    /// The directory of the adapter that was merged
    #[arg(long)]
    adapter: PathBuf,
    /// The directory to write; it must be empty or not there
    #[arg(long)]
    out: PathBuf,
    /// Print what had been done to each changed tensor as a JSON array
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let adapter = Checkpoint::open(&args.adapter)?;
    let bar = progress_in_bytes(merged_bytes(&Model::open(&args.merged)?, MergeOptions::default()));
    let done = unmerge(&args.merged, &adapter, &args.out, &counting(&bar, &args.out));
    bar.finish_and_clear();
    let changed = done.map_err(|error| error.in_file(&args.merged))?;
    print(&if args.json {
        serde_json::to_string(&changed).expect("plain data")
    } else {
        format!("{}\n{} tensors restored, in {}", as_table(&changed), changed.len(), args.out.display())
    })?;
    Ok(Outcome::Good)
}
