//! The arguments of `wora`, a line each: understood or refused; nothing is run.

pub fn run(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let understood = woracle::cli::parse(std::iter::once("wora").chain(text.lines()));
    understood.map_err(|error| assert!(!error.to_string().is_empty())).is_ok()
}
