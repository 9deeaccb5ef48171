//! `wora golden OUT_DIR [FILTER]`: case files for others, and the manifest of what is in them.

use super::{Outcome, print, progress, stop_signal};
use crate::aside::{remove, replace};
use crate::lock::Lock;
use crate::oracle::Dtype;
use crate::oracle::golden::{Cases, Entry, Manifest, Options, cases};
use crate::{Error, Result};
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Write case files for another implementation to be checked by, and a manifest of them.
#[derive(clap::Args)]
pub struct Args {
    /// The directory to write to; made where there is none
    out_dir: PathBuf,
    /// Only the case of this name, or the cases whose names contain this
    filter: Option<String>,
    /// The type of every floating-point tensor
    #[arg(long, default_value = "f64")]
    dtype: Dtype,
    /// The seed of the cases' numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the inputs alone, for a blind test
    #[arg(long)]
    without_answers: bool,
    /// Print the manifest
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let options = Options { dtype: args.dtype, seed: args.seed, answers: !args.without_answers };
    let chosen = cases(args.filter.as_deref().unwrap_or(""), options)?;
    let bar = progress(chosen.len());
    let _lock = Lock::of(&args.out_dir)?;
    refuse_others(&args.out_dir, &chosen)?;
    // From here to its end no manifest says what is not so, whenever that comes.
    let (path, stop) = (args.out_dir.join("manifest.json"), stop_signal());
    remove(&path)?;
    let one = |case: Result<(Entry, Vec<u8>)>| {
        let (entry, bytes) = case?;
        if stop.load(Ordering::Relaxed) {
            let message = "interrupted: some cases are not written, nor is the manifest".into();
            return Err(Error::File { path: args.out_dir.clone(), message });
        }
        replace(&args.out_dir.join(&entry.file), |out| out.write_all(&bytes))?;
        bar.set_message(entry.file.clone());
        bar.inc(1);
        Ok(entry)
    };
    let mut entries: Vec<Entry> = chosen.par_bridge().map(one).collect::<Result<_>>()?;
    entries.sort_by(|one, other| one.file.cmp(&other.file));
    bar.finish_and_clear();
    let manifest = Manifest::new(options, entries);
    replace(&path, |out| out.write_all(manifest.to_json().as_bytes()))?;
    let count = manifest.cases.len();
    print(&if args.json {
        manifest.to_json().trim_end().to_string()
    } else {
        format!("{count} case files and manifest.json in {}", args.out_dir.display())
    })?;
    Ok(Outcome::Good)
}

/// Fails if the directory has case files that the manifest would not name.
fn refuse_others(out_dir: &Path, written: &Cases) -> Result<()> {
    let entries = std::fs::read_dir(out_dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let files = entries.map_err(|error| Error::io(out_dir, &error))?.into_iter().map(|entry| entry.path());
    let is_other = |file: &PathBuf| {
        let is_case = file.extension().is_some_and(|extension| extension == "safetensors");
        is_case && !written.names().any(|name| file.file_stem().is_some_and(|stem| stem == name))
    };
    match files.filter(is_other).min() {
        None => Ok(()),
        Some(other) => {
            let message = format!("expected no case files but those to be written, found {}", other.display());
            Err(Error::File { path: out_dir.into(), message })
        }
    }
}
