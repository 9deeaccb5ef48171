//! `adapter_model.safetensors` beside a configuration that is right: opened, and every module of it read.

use super::files::with_files;
use woracle::peft::{ADAPTER_FILE, CONFIG_FILE, Checkpoint, inspect};

const CONFIG: &str = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc", "emb", "conv"],
    "use_dora": true, "rank_pattern": {"conv": 4}}"#;

pub fn run(bytes: &[u8]) -> bool {
    with_files(&[(CONFIG_FILE, CONFIG.as_bytes()), (ADAPTER_FILE, bytes)], |directory| {
        let Ok(checkpoint) = Checkpoint::open(directory) else { return false };
        for module in checkpoint.modules() {
            let _ = (checkpoint.adapter(module), checkpoint.lora_bias(module));
        }
        inspect(&checkpoint, None).is_ok()
    })
}
