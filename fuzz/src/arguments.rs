//! The arguments of `wora`, a line each: understood or refused; nothing is run.

use super::cli::Cli;
use clap::Parser;

pub fn run(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let understood = Cli::try_parse_from(std::iter::once("wora").chain(text.lines()));
    understood.map_err(|error| assert!(!error.to_string().is_empty())).is_ok()
}
