//! `wora train CONFIG.toml`: read, and its model built and adapted where it is small.

use super::files::with_files;
use woracle::train::{Model, read};

pub fn run(bytes: &[u8]) -> bool {
    with_files(&[("train.toml", bytes)], |directory| {
        let Ok(read) = read(&directory.join("train.toml")) else { return false };
        let Ok(mut model) = Model::<f32>::new(&read.config.model.modules, read.config.seed) else { return false };
        read.config.adapter.as_ref().is_none_or(|adapter| model.adapt(adapter, 0).is_ok())
    })
}
