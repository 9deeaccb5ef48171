//! `wora train CONFIG.toml`: read, and its model built and adapted where it is small.

use super::files::with_files;
use woracle::train::{Model, read};

/// So many parameters are built: a larger model that is no mistake takes what memory it says.
const SMALL: usize = 1 << 20;

pub fn run(bytes: &[u8]) -> bool {
    with_files(&[("train.toml", bytes)], |directory| {
        let Ok(read) = read(&directory.join("train.toml")) else { return false };
        let modules = &read.config.model.modules;
        let elements: Result<Vec<_>, _> = modules.iter().map(|module| module.settings.elements()).collect();
        // What is a mistake, beyond 2^27, is to be refused before memory is asked for; ranks are, beyond 2^12.
        if elements.is_ok_and(|elements| (SMALL..1 << 27).contains(&elements.into_iter().sum())) {
            return false;
        }
        let Ok(mut model) = Model::<f32>::new(modules, read.config.seed) else { return false };
        let Some(adapter) = &read.config.adapter else { return true };
        let ranks = adapter.rank_pattern.values().filter_map(|rank| rank.as_u64());
        let largest = ranks.chain([adapter.rank as u64]).max().expect("one at least");
        if (64..1 << 12).contains(&largest) {
            return false;
        }
        model.adapt(adapter, 0).is_ok()
    })
}
