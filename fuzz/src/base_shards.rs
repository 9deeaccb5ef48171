//! A base model of two shards and their index, and an adapter for it: opened, inspected and merged.

use super::files::{parts, with_files};
use woracle::peft::{ADAPTER_FILE, CONFIG_FILE, Checkpoint, INDEX_FILE, MergeOptions, Model, inspect, merge};

pub(super) const CONFIG: &str =
    r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"], "use_dora": true}"#;

pub fn run(bytes: &[u8]) -> bool {
    let [index, one, two, adapter] = parts(bytes);
    let files = [
        (CONFIG_FILE, CONFIG.as_bytes()),
        (ADAPTER_FILE, adapter),
        (INDEX_FILE, index),
        ("model-00001-of-00002.safetensors", one),
        ("model-00002-of-00002.safetensors", two),
    ];
    with_files(&files, |directory| {
        let Ok(model) = Model::open(directory) else { return false };
        let Ok(checkpoint) = Checkpoint::open(directory) else { return false };
        let _ = inspect(&checkpoint, Some(&model));
        let options = MergeOptions { keep_base: true, ..MergeOptions::default() };
        merge(&model, &[checkpoint], options, &directory.join("out"), &|_| Ok(())).is_ok()
    })
}
