//! What a merge leaves behind to be undone: a merged model, its record and the adapter of it, taken apart again.

use super::base_shards::CONFIG;
use super::files::{parts, with_files};
use woracle::peft::{ADAPTER_FILE, CONFIG_FILE, Checkpoint, RECORD_FILE, unmerge};

pub fn run(bytes: &[u8]) -> bool {
    let [record, merged, adapter] = parts(bytes);
    let files = [
        (CONFIG_FILE, CONFIG.as_bytes()),
        (ADAPTER_FILE, adapter),
        (RECORD_FILE, record),
        ("model.safetensors", merged),
    ];
    with_files(&files, |directory| {
        let Ok(checkpoint) = Checkpoint::open(directory) else { return false };
        unmerge(directory, &checkpoint, &directory.join("out"), &|_| Ok(())).is_ok()
    })
}
