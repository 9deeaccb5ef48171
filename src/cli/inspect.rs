//! `wora inspect ADAPTER`: what an adapter in PEFT's files does, module by module.

use super::{Outcome, print, printable, table, warn};
use crate::Result;
use crate::peft::{ADAPTER_FILE, Checkpoint, Model, ModuleReport, inspect};
use std::path::PathBuf;

/// Show what an adapter in PEFT's files does: kinds, ranks, scalars, gains, and how much it changes.
#[derive(clap::Args)]
pub struct Args {
    /// The adapter's directory
    adapter: PathBuf,
    /// The base model: a safetensors file, or a directory
    #[arg(long)]
    base: Option<PathBuf>,
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Outcome> {
    let adapter = Checkpoint::open(&args.adapter)?;
    let base = args.base.as_ref().map(|base| Model::open(base)).transpose()?;
    let reports = inspect(&adapter, base.as_ref()).map_err(|error| error.in_file(&args.adapter.join(ADAPTER_FILE)))?;
    warn(adapter.config().warnings());
    print(&if args.json { serde_json::to_string(&reports).expect("plain data") } else { as_table(&reports) })?;
    Ok(Outcome::Good)
}

fn as_table(reports: &[ModuleReport]) -> String {
    let mut table = table(&[
        "module",
        "kind",
        "method",
        "shape",
        "rank",
        "s",
        "alpha",
        "beta",
        "gains",
        "||dW||/||W0||",
        "change",
        "eff. rank",
        "no direction",
    ]);
    let optional = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2e}"));
    table.add_rows(reports.iter().map(|report| {
        let [a, b] = &report.lora_shapes;
        [
            printable(&report.module),
            report.kind.clone(),
            report.method.to_string(),
            report.shape.as_ref().map_or_else(|| format!("A {a:?}, B {b:?}"), |shape| format!("{shape:?}")),
            report.rank.to_string(),
            format!("{:.4}", report.scaling),
            format!("{:.4}", report.alpha),
            format!("{:.4}", report.beta),
            report.gains.map_or_else(String::new, |[least, most]| format!("{least:.4} to {most:.4}")),
            optional(report.delta_over_base),
            optional(report.change_over_base),
            report.effective_rank.map_or_else(String::new, |rank| format!("{rank:.2}")),
            report.zero_norm_units.map_or_else(String::new, |units| units.to_string()),
        ]
    }));
    format!("{table}\ndW = alpha s B A; change = ||W' - W0|| / ||W0||")
}
