//! Data sets, one target a format: a first part of settings, as `wora train` has them under `[data]`, then the file.

use super::files::{parts, with_files};
use woracle::train::data::{load, split};

fn read(format: &str, bytes: &[u8]) -> bool {
    let [settings, first, second] = parts(bytes);
    let settings = format!("format = '{format}'\n{}", String::from_utf8_lossy(settings));
    let Ok(config) = toml::from_str(&settings) else { return false };
    let files = [("first", first), ("second", second), ("first.gz", first), ("second.gz", second)];
    with_files(&files, |directory| {
        let Ok(set) = load(&config, directory, None) else { return false };
        assert_eq!(set.features.shape()[0], set.len());
        let _ = split(&set, 0.25, 0.25, 0);
        true
    })
}

pub fn csv(bytes: &[u8]) -> bool {
    read("csv", bytes)
}

pub fn idx(bytes: &[u8]) -> bool {
    read("idx", bytes)
}

pub fn npy(bytes: &[u8]) -> bool {
    read("npy", bytes)
}

pub fn npz(bytes: &[u8]) -> bool {
    read("npz", bytes)
}

pub fn text(bytes: &[u8]) -> bool {
    read("text", bytes)
}
