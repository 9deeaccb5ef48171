//! A merge of a base of 1 GB in shards: how much memory it holds.
#![cfg(target_os = "linux")]

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use safetensors::Dtype;
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::process::{Command, Stdio};
use woracle::peft::{ADAPTER_FILE, CONFIG_FILE, INDEX_FILE};
use woracle::tensor_writer::{Planned, TensorWriter};

/// Features of a square weight: 64 MiB in f32.
const FEATURES: usize = 4096;
const WEIGHTS: usize = 16;
const SHARDS: usize = 4;
const RANK: usize = 16;

fn write(path: &Path, tensors: &[(String, Vec<usize>)], rng: &mut Pcg64) {
    let planned =
        tensors.iter().map(|(name, shape)| Planned { name: name.clone(), dtype: Dtype::F32, shape: shape.clone() });
    let planned: Vec<_> = planned.collect();
    let file = BufWriter::new(File::create(path).unwrap());
    let mut writer = TensorWriter::new(file, &planned, &BTreeMap::new()).unwrap();
    for tensor in &planned {
        for _ in 0..tensor.bytes() / 4096 {
            let row: Vec<u8> = (0..1024).flat_map(|_| rng.random_range(-1.0_f32..1.0).to_le_bytes()).collect();
            writer.write(&row).unwrap();
        }
    }
    writer.finish().unwrap();
}

/// The most that a process ever held, in MB of 10^6 bytes, as the system counts it.
fn peak(process: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kib| kib * 1024.0 / 1e6)
}

#[test]
fn a_base_of_1_gb_in_shards_is_merged_in_less_than_400_mb() {
    let directory = tempfile::tempdir().unwrap();
    let (base, adapter, out) =
        (directory.path().join("base"), directory.path().join("adapter"), directory.path().join("out"));
    std::fs::create_dir(&base).unwrap();
    std::fs::create_dir(&adapter).unwrap();
    let mut rng = Pcg64::seed_from_u64(3);
    let mut map = Map::new();
    for shard in 0..SHARDS {
        let name = format!("model-{shard}.safetensors");
        let weights = (0..WEIGHTS).filter(|weight| weight % SHARDS == shard);
        let tensors: Vec<_> =
            weights.map(|weight| (format!("layers.{weight}.weight"), vec![FEATURES, FEATURES])).collect();
        map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
        write(&base.join(name), &tensors, &mut rng);
    }
    std::fs::write(base.join(INDEX_FILE), json!({ "weight_map": map }).to_string()).unwrap();
    let of_module = |weight: usize| {
        let at = |end: &str| format!("base_model.model.layers.{weight}.{end}");
        [
            (at("lora_A.weight"), vec![RANK, FEATURES]),
            (at("lora_B.weight"), vec![FEATURES, RANK]),
            (at("lora_magnitude_vector"), vec![FEATURES]),
        ]
    };
    // Half of the weights are adapted, the others copied.
    let tensors: Vec<_> = (0..WEIGHTS).step_by(2).flat_map(of_module).collect();
    write(&adapter.join(ADAPTER_FILE), &tensors, &mut rng);
    let config = json!({ "peft_type": "LORA", "r": RANK, "lora_alpha": 32, "use_dora": true });
    std::fs::write(adapter.join(CONFIG_FILE), config.to_string()).unwrap();

    let merge = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wora"));
        command.args(["merge", "--json", "--base"]).arg(&base).arg("--adapter").arg(&adapter).arg("--out").arg(&out);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let entries = || std::fs::read_dir(directory.path()).unwrap().count();

    // Interrupted when something has been written aside.
    let mut wora = merge();
    while entries() == 2 {
        assert!(wora.try_wait().unwrap().is_none(), "it has ended before it was interrupted");
    }
    Command::new("kill").args(["-INT", &wora.id().to_string()]).status().unwrap();
    let ended = wora.wait_with_output().unwrap();
    let stderr = String::from_utf8(ended.stderr).unwrap();
    assert_eq!((ended.status.code(), stderr.lines().count()), (Some(2), 1), "{stderr}");
    assert!(stderr.contains("interrupted"), "{stderr}");
    assert_eq!(entries(), 2, "nothing is left");

    let mut wora = merge();
    let mut most = 0.0_f64;
    let status = loop {
        most = most.max(peak(wora.id()).unwrap_or(0.0));
        if let Some(status) = wora.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    println!("{most:.0} MB");
    assert!(status.success());
    assert!(most > 10.0 && most < 400.0, "{most:.0} MB resident");
    let sizes = |directory: &Path| -> u64 {
        let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("model-"))
            .map(|entry| entry.metadata().unwrap().len())
            .sum()
    };
    assert!(sizes(&base) > 1 << 30 && sizes(&out).abs_diff(sizes(&base)) < 1 << 16, "{} {}", sizes(&base), sizes(&out));
}
