//! `wora merge`: a base model with adapters merged into it.

use super::{Outcome, counting, print, printable, progress_in_bytes, table, warn};
use crate::oracle::Dtype;
use crate::peft::{Change, Changed, Checkpoint, MergeOptions, Model, merge, merged_bytes, warnings};
use crate::wora::ZeroNorm;
use crate::{Error, Result};
use std::path::PathBuf;

/// Merge adapters in PEFT's files into their base model: in float64, rounded once.
#[derive(clap::Args)]
pub struct Args {
    /// The base model: a safetensors file, or a directory with one or with shards and their index
    #[arg(long)]
    base: PathBuf,
    /// The adapter's directory; several are each merged against the base itself
    #[arg(long, required = true)]
    adapter: Vec<PathBuf>,
    /// The directory to write; it must be empty or not there
    #[arg(long)]
    out: PathBuf,
    /// The type of every floating-point tensor: keep, f64, f32, bf16 or f16
    #[arg(long, default_value = "keep", value_parser = dtype)]
    dtype: Stored,
    /// What becomes of a unit with ||V|| = 0: error, or zero, a row of zeros
    #[arg(long, default_value = "error", value_parser = zero_norm)]
    zero_norm: ZeroNorm,
    /// Keep what is changed beside the merged model, so that unmerge restores it to the bit
    #[arg(long)]
    keep_base: bool,
    /// Print what was done to each changed tensor as a JSON array
    #[arg(long)]
    json: bool,
}

/// A type, or each tensor's own.
#[derive(Clone, Copy)]
struct Stored(Option<Dtype>);

fn dtype(text: &str) -> std::result::Result<Stored, String> {
    match text {
        "keep" => Ok(Stored(None)),
        _ => text.parse().map(|dtype| Stored(Some(dtype))).map_err(|error: String| format!("{error}, or keep")),
    }
}

fn zero_norm(text: &str) -> std::result::Result<ZeroNorm, String> {
    match text {
        "error" => Ok(ZeroNorm::Error),
        "zero" => Ok(ZeroNorm::Zero),
        _ => Err("expected error or zero".into()),
    }
}

pub fn run(args: Args) -> Result<Outcome> {
    let adapters = args.adapter.iter().map(|path| Checkpoint::open(path)).collect::<Result<Vec<_>>>()?;
    let base = Model::open(&args.base)?;
    warn(adapters.iter().flat_map(|adapter| adapter.config().warnings()).chain(warnings(&base, &adapters)?));
    let options = MergeOptions { dtype: args.dtype.0, zero_norm: args.zero_norm, keep_base: args.keep_base };
    let bar = progress_in_bytes(merged_bytes(&base, options));
    let done = merge(&base, &adapters, options, &args.out, &counting(&bar, &args.out));
    bar.finish_and_clear();
    let changed = done.map_err(|error| match error {
        file @ Error::File { .. } => file,
        other => other.in_file(&args.base),
    })?;
    print(&if args.json {
        serde_json::to_string(&changed).expect("plain data")
    } else {
        format!("{}\n{} tensors changed, in {}", as_table(&changed), changed.len(), args.out.display())
    })?;
    Ok(Outcome::Good)
}

pub(super) fn as_table(changed: &[Changed]) -> String {
    let mut table = table(&["tensor", "change", "layer", "was shared with"]);
    table.add_rows(changed.iter().map(|changed| {
        let change = match changed.change {
            Change::Merged => "merged",
            Change::Bias => "bias added",
            Change::Replaced => "replaced",
            Change::Rounded => "rounded",
        };
        let [kind, shared] = [&changed.kind, &changed.shared_with].map(|text| text.clone().unwrap_or_default());
        [printable(&changed.tensor), change.into(), kind, printable(&shared)]
    }));
    table.to_string()
}
