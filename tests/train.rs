//! `wora train` and `wora compare`, run as a user would: what they promise. What they say of configurations that are wrong is
//! in `tests/bad_inputs.toml`.

mod command;

use command::{wora, wora_on};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// A small run over both stages, with dropout in the model and in the adapter.
const SMALL: &str = r#"
seed = 3
[data]
format = "digits"
scale = 0.0625
[split]
validation = 0.1
test = 0.7
[model]
modules = [
    { name = "conv", type = "conv2d", in_channels = 1, out_channels = 16, kernel_size = 3, padding = 1 },
    { type = "relu" },
    { type = "max_pool2d", kernel_size = 2 },
    { type = "flatten" },
    { type = "dropout", p = 0.1 },
    { name = "head", type = "linear", in_features = 256, out_features = 10 },
]
[pretrain]
epochs = 4
batch_size = 32
optimiser = { type = "sgd", learning_rate = 0.05, momentum = 0.9, weight_decay = 1e-4 }
schedule = { warmup = 3, decay = "linear" }
clip = 5.0
[adapter]
method = "wora"
rank = 2
lora_alpha = 4.0
lora_dropout = 0.1
target_modules = ["conv", "head"]
[adapt]
steps = 40
batch_size = 16
accumulate = 2
optimiser = { type = "adamw", learning_rate = 1e-2 }
evaluate_every = 7
data = { format = "digits", scale = 0.0625, transform = "invert" }
"#;

fn with(config: &str, from: &str, to: &str) -> String {
    assert!(config.contains(from), "{from:?} is not in the configuration");
    config.replacen(from, to, 1)
}

/// A configuration in a directory of its own, and where its run is to go.
struct Written {
    directory: TempDir,
}

impl Written {
    fn new(config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("run.toml"), config).unwrap();
        Self { directory }
    }
    fn config(&self) -> String {
        self.directory.path().join("run.toml").to_str().unwrap().into()
    }
    fn out(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
    fn train(&self, threads: usize, name: &str, more: &[&str]) -> (Option<i32>, String, String) {
        let (config, out) = (self.config(), self.out(name));
        let arguments = ["train", &config, "--out", out.to_str().unwrap()];
        wora_on(threads, &[&arguments, more].concat())
    }
}

/// Every line of the metrics without the times.
fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let untimed = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("seconds").expect("a time");
        line
    };
    text.lines().map(untimed).collect()
}

/// What a run leaves beside times.
fn results(run: &Path) -> Vec<Vec<u8>> {
    let files = ["base/model.safetensors", "adapter/adapter_model.safetensors", "merged/model.safetensors"];
    files.iter().map(|file| std::fs::read(run.join(file)).unwrap()).collect()
}

fn summary(run: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(run.join("summary.json")).unwrap()).unwrap()
}

#[test]
fn results_depend_on_the_seed_and_not_on_the_number_of_threads() {
    let written = Written::new(SMALL);
    for (threads, name) in [(1, "one"), (2, "two"), (3, "three")] {
        let (code, _, complaint) = written.train(threads, name, &[]);
        assert_eq!((code, complaint.as_str()), (Some(0), ""));
    }
    let (code, ..) = written.train(2, "other", &["--seed", "4"]);
    assert_eq!(code, Some(0));
    let [one, two, three, other] = ["one", "two", "three", "other"].map(|name| written.out(name));
    assert!(metrics(&one).len() > 70, "few lines");
    for same in [two, three] {
        assert_eq!(metrics(&one), metrics(&same));
        assert_eq!(results(&one), results(&same));
    }
    assert_ne!(results(&one), results(&other));
}

#[test]
fn a_run_that_is_killed_anywhere_goes_on_to_the_same_bits() {
    let written = Written::new(SMALL);
    let started = std::time::Instant::now();
    assert_eq!(written.train(2, "whole", &[]).0, Some(0));
    let whole = started.elapsed();
    let killed = written.out("killed");
    let mut kills = 0;
    for nth in 0_u32.. {
        let mut run = Command::new(env!("CARGO_BIN_EXE_wora"))
            .args(["train", &written.config(), "--resume", "--out", killed.to_str().unwrap()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Moments that are spread over the run, and that do not repeat.
        std::thread::sleep(whole.mul_f64(0.2 + 0.1 * f64::from(nth * 7 % 5)) + Duration::from_millis(u64::from(nth)));
        let _ = run.kill();
        if run.wait().unwrap().success() {
            break;
        }
        kills += 1;
        // Whatever there is, is whole.
        if killed.join("state.safetensors").exists() {
            let bytes = std::fs::read(killed.join("state.safetensors")).unwrap();
            safetensors::SafeTensors::deserialize(&bytes).unwrap();
        }
        if nth == 20 {
            assert_eq!(written.train(2, "killed", &["--resume"]).0, Some(0));
            break;
        }
    }
    assert!(kills > 0, "the run was never killed");
    assert_eq!(metrics(&written.out("whole")), metrics(&killed));
    assert_eq!(results(&written.out("whole")), results(&killed));
    let known = |run: &Path| {
        let mut summary = summary(run);
        for stage in ["/pretrain", "/adapt/trained"] {
            summary.pointer_mut(stage).unwrap().as_object_mut().unwrap().remove("milliseconds");
        }
        summary
    };
    assert_eq!(known(&written.out("whole")), known(&killed));
}

/// Starts a run, interrupts it once the metrics have so many lines of a stage, and hands out what it complains of.
#[cfg(unix)]
fn interrupt(written: &Written, name: &str, more: &[&str], stage: &str, lines: usize) -> String {
    let out = written.out(name);
    let mut run = Command::new(env!("CARGO_BIN_EXE_wora"))
        .args(["train", &written.config(), "--out", out.to_str().unwrap()])
        .args(more)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let there = || {
        let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter(|line| line.contains(&format!("\"stage\":{stage:?}"))).count()
    };
    while there() < lines {
        assert!(run.try_wait().unwrap().is_none(), "the run has ended by itself");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap().success());
    let output = run.wait_with_output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{complaint}");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
    complaint
}

#[cfg(unix)]
#[test]
fn a_run_that_is_interrupted_in_either_stage_is_saved_and_goes_on_to_the_same_bits() {
    let written = Written::new(&with(&with(SMALL, "epochs = 4", "epochs = 40"), "steps = 40", "steps = 400"));
    assert_eq!(written.train(2, "whole", &[]).0, Some(0));
    let complaint = interrupt(&written, "run", &[], "pretrain", 20);
    assert!(complaint.starts_with("wora: pretrain: interrupted after step "), "{complaint}");
    let steps = metrics(&written.out("run")).iter().filter(|line| line.get("loss").is_some()).count();
    let step: usize = complaint.split_whitespace().nth(5).unwrap().trim_matches(',').parse().unwrap();
    assert_eq!(steps, step, "every step that was taken is saved");
    let (_, _, refused) = written.train(2, "run", &[]);
    assert!(refused.contains("expected a directory that is empty or not there"), "{refused}");
    let complaint = interrupt(&written, "run", &["--resume"], "adapt", 20);
    assert!(complaint.starts_with("wora: adapt: interrupted after step "), "{complaint}");
    assert_eq!(written.train(1, "run", &["--resume"]).0, Some(0));
    let [whole, run] = ["whole", "run"].map(|name| written.out(name));
    assert_eq!(metrics(&whole), metrics(&run));
    assert_eq!(results(&whole), results(&run));
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    let exact = with(&with(SMALL, "seed = 3", "seed = 3\ndtype = \"f64\""), "{ type = \"dropout\", p = 0.1 },", "");
    let exact = with(&exact, "lora_dropout = 0.1", "lora_dropout = 0.0");
    let one = Written::new(&with(&exact, "batch_size = 16\naccumulate = 2", "batch_size = 32"));
    let two = Written::new(&exact);
    assert_eq!((one.train(2, "run", &[]).0, two.train(2, "run", &[]).0), (Some(0), Some(0)));
    let (one, two) = (metrics(&one.out("run")), metrics(&two.out("run")));
    assert_eq!(one.len(), two.len());
    let mut compared = 0;
    for (one, two) in one.iter().zip(&two) {
        if let (Some(a), Some(b)) = (one["loss"].as_f64(), two["loss"].as_f64()) {
            assert!((a - b).abs() <= 1e-11 * a.abs(), "{one} and {two}");
            compared += 1;
        }
    }
    assert!(compared > 40);
}

/// E132 to E141.
#[test]
fn both_stages_take_the_steps_that_pytorch_takes() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/train");
    let theirs: Value = serde_json::from_str(&std::fs::read_to_string(data.join("torch.json")).unwrap()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (config, out) = (data.join("torch.toml"), directory.path().join("run"));
    let (code, _, complaint) = wora(&["train", config.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert_eq!((code, complaint.as_str()), (Some(0), ""));
    for stage in ["pretrain", "adapt"] {
        let of_stage = metrics(&out).into_iter().filter(|line| line["stage"] == stage && line.get("loss").is_some());
        let ours: Vec<f64> = of_stage.map(|line| line["loss"].as_f64().unwrap()).collect();
        let theirs: Vec<f64> = theirs[stage].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect();
        assert_eq!((ours.len(), theirs.len()), (15, 15));
        for (step, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert!((ours - theirs).abs() < 1e-9, "{stage}, step {step}: {ours} and {theirs}");
        }
    }
}

#[test]
fn the_digits_example_adapts_to_turned_digits_and_leaves_its_base_alone() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits-cnn.toml");
    let directory = tempfile::tempdir().unwrap();
    let (mut before, mut after) = (vec![], vec![]);
    for seed in ["0", "1", "2"] {
        let out = directory.path().join(seed);
        let (code, text, complaint) =
            wora(&["train", example.to_str().unwrap(), "--seed", seed, "--out", out.to_str().unwrap()]);
        assert_eq!((code, complaint.as_str()), (Some(0), ""));
        let last = text.lines().last().unwrap();
        assert!(last.starts_with("test: unmerged ") && last.ends_with(": equal"), "{last}");
        let summary = summary(&out);
        let adapt = &summary["adapt"];
        assert_eq!(adapt["trained"]["test"]["accuracy"], adapt["merged"]["accuracy"]);
        assert_eq!((&adapt["equal"], &adapt["base_unchanged"]), (&Value::Bool(true), &Value::Bool(true)));
        before.push(adapt["base"]["accuracy"].as_f64().unwrap());
        after.push(adapt["trained"]["test"]["accuracy"].as_f64().unwrap());
        let svg = std::fs::read_to_string(out.join("curves.svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("<title>") && svg.contains("conv1 alpha"), "a picture");
        assert!(svg.contains("accuracy in %"), "the metric");
        assert!(last.contains(" %"), "{last}");
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    assert!(mean(&before) < 0.5, "{before:?}");
    assert!(mean(&after) >= 0.95, "{after:?}");
}

#[test]
fn the_merged_model_is_what_wora_merge_makes_of_the_written_files() {
    let written = Written::new(SMALL);
    assert_eq!(written.train(2, "run", &[]).0, Some(0));
    let out = written.out("run");
    let (base, adapter) = (out.join("base/model.safetensors"), out.join("adapter"));
    let (code, text, _) = wora(&["inspect", adapter.to_str().unwrap(), "--base", base.to_str().unwrap()]);
    assert_eq!(code, Some(0));
    assert!(text.contains("conv") && text.contains("head"), "{text}");
    let again = written.out("again");
    let arguments = ["merge", "--base", base.to_str().unwrap(), "--adapter", adapter.to_str().unwrap(), "--out"];
    assert_eq!(wora(&[&arguments[..], &[again.to_str().unwrap()]].concat()).0, Some(0));
    let [ours, theirs] =
        [out.join("merged"), again].map(|merged| std::fs::read(merged.join("model.safetensors")).unwrap());
    assert_eq!(ours, theirs);
}

#[test]
fn a_base_that_is_read_is_adapted_as_one_that_was_trained() {
    let written = Written::new(SMALL);
    assert_eq!(written.train(2, "run", &[]).0, Some(0));
    let start = SMALL.find("[pretrain]").unwrap();
    let end = SMALL.find("[adapter]").unwrap();
    let config = format!("base = \"run/base/model.safetensors\"\n{}{}", &SMALL[..start], &SMALL[end..]);
    std::fs::write(written.directory.path().join("run.toml"), config).unwrap();
    let (code, _, complaint) = written.train(2, "read", &[]);
    assert_eq!((code, complaint.as_str()), (Some(0), ""));
    assert_eq!(results(&written.out("run")), results(&written.out("read")));
}

#[test]
fn a_loss_that_explodes_stops_the_run_and_names_the_tensor() {
    let config = with(&with(SMALL, "learning_rate = 0.05", "learning_rate = 1e30"), "clip = 5.0\n", "");
    let written = Written::new(&config);
    let (code, _, complaint) = written.train(2, "run", &[]);
    assert_eq!(code, Some(2));
    assert_eq!(complaint.lines().count(), 1);
    let what = "expected a loss that is finite and does not explode, found NaN: the output of head is the first tensor";
    assert!(complaint.contains("pretrain, step 2: ") && complaint.contains(what), "{complaint}");
}

#[test]
fn an_adapter_that_goes_wrong_is_named_too() {
    for method in ["lora", "dora", "wora"] {
        let config = with(SMALL, "method = \"wora\"", &format!("method = {method:?}"));
        let written = Written::new(&with(&config, "learning_rate = 1e-2", "learning_rate = 1e30"));
        let (code, _, complaint) = written.train(2, "run", &[]);
        assert_eq!((code, complaint.lines().count()), (Some(2), 1), "{complaint}");
        assert!(complaint.contains("adapt, step 2: expected a loss that is finite"), "{complaint}");
        assert!(["conv", "head"].iter().any(|module| complaint.contains(module)), "{complaint}");
    }
    // The step that goes wrong is the last one.
    let last = with(&with(SMALL, "steps = 40", "steps = 1"), "learning_rate = 1e-2", "learning_rate = 1e300");
    let (code, _, complaint) = Written::new(&last).train(2, "run", &[]);
    assert_eq!((code, complaint.lines().count()), (Some(2), 1), "{complaint}");
    assert!(complaint.contains("adapt, step ") && complaint.contains("is the first tensor"), "{complaint}");
}

#[test]
fn what_cannot_be_run_is_said_before_anything_is_trained_and_leaves_the_directory_free() {
    let turned = "data = { format = \"digits\", scale = 0.0625, transform = \"invert\" }";
    let wrong = [
        (turned, "data = { format = \"digits\", shape = [64] }", "model.modules.0: conv: x: expected shape"),
        (
            "[\"conv\", \"head\"]",
            "[\"conv\", \"hed\"]",
            "adapter.target_modules: expected some of conv, head, found \"hed\"",
        ),
        (
            "rank = 2",
            "rank = 2\nrank_pattern = { fc = 3 }",
            "adapter.rank_pattern: expected a pattern that fits some of conv, head",
        ),
        ("rank = 2", "rank = 2000000000", "adapter.rank: expected 1 or more, up to 4096"),
        ("out_features = 10", "out_features = 4000000000", "setting out_features: expected 1 or more, up to"),
        (
            "method = \"wora\"",
            "method = \"lora\"\nnorm_gradient = \"full\"",
            "adapter.norm_gradient: expected none, as LoRA has no norm",
        ),
    ];
    for (from, to, expected) in wrong {
        let written = Written::new(&with(SMALL, from, to));
        for command in ["train", "compare"] {
            let out = written.out("run");
            let (code, _, complaint) = wora(&[command, &written.config(), "--out", out.to_str().unwrap()]);
            assert_eq!((code, complaint.lines().count()), (Some(2), 1), "{command} {to}: {complaint}");
            assert!(
                complaint.contains("run.toml: line ") && complaint.contains(expected),
                "{command} {to}: {complaint}"
            );
            assert!(!out.join("metrics.jsonl").exists(), "{to}: something was begun");
        }
        std::fs::write(written.directory.path().join("run.toml"), SMALL).unwrap();
        assert_eq!(written.train(2, "run", &[]).0, Some(0));
    }
}

#[test]
fn a_run_does_not_go_on_with_other_data() {
    let table = |first: f64| {
        let row = |nth: u32| format!("{},{},{}\n", f64::from(nth % 7) + first, f64::from(nth % 5), nth % 2);
        (0..60).map(row).collect::<String>()
    };
    let config = "[data]\nformat = \"csv\"\npath = \"table.csv\"\nheader = false\n[model]\n\
        modules = [{ name = \"fc\", type = \"linear\", in_features = 2, out_features = 2 }]\n\
        [pretrain]\nepochs = 3000\nbatch_size = 4\noptimiser = { type = \"adamw\", learning_rate = 1e-3 }\n";
    let written = Written::new(config);
    let path = written.directory.path().join("table.csv");
    std::fs::write(&path, table(0.0)).unwrap();
    #[cfg(unix)]
    interrupt(&written, "run", &[], "pretrain", 20);
    std::fs::write(&path, table(1.0)).unwrap();
    let (code, _, complaint) = written.train(2, "run", &["--resume"]);
    assert_eq!((code, complaint.lines().count()), (Some(2), 1));
    assert!(complaint.contains("expected the configuration and the data that the run was begun with"), "{complaint}");
}

#[test]
fn a_regression_of_a_table_is_trained_and_merged() {
    let rows: String = (0..200)
        .map(|nth| {
            let (a, b) = (f64::from(nth % 17) / 17.0, f64::from(nth % 23) / 23.0);
            format!("{a},{b},{}\n", 2.0 * a - b)
        })
        .collect();
    let config = r#"
dtype = "f64"
[data]
format = "csv"
path = "table.csv"
task = "regression"
label = "y"
[model]
modules = [
    { name = "fc1", type = "linear", in_features = 2, out_features = 8 },
    { type = "tanh" },
    { name = "fc2", type = "linear", in_features = 8, out_features = 1 },
]
[pretrain]
epochs = 30
batch_size = 20
optimiser = { type = "adamw", learning_rate = 1e-2 }
[adapter]
method = "dora"
rank = 1
lora_alpha = 1.0
target_modules = "fc[12]"
[adapt]
epochs = 3
batch_size = 20
optimiser = { type = "adamw", learning_rate = 1e-3 }
"#;
    let written = Written::new(config);
    std::fs::write(written.directory.path().join("table.csv"), format!("a,b,y\n{rows}")).unwrap();
    let (code, _, complaint) = written.train(2, "run", &[]);
    assert_eq!((code, complaint.as_str()), (Some(0), ""));
    let summary = summary(&written.out("run"));
    let loss = summary["adapt"]["trained"]["test"]["loss"].as_f64().unwrap();
    assert!(loss < 0.01, "{loss}");
    std::fs::write(
        written.directory.path().join("run.toml"),
        config.replace("epochs = 3\n", "epochs = 3\nmonitor = \"accuracy\"\n"),
    )
    .unwrap();
    let (code, _, complaint) = written.train(2, "again", &[]);
    assert_eq!(code, Some(2));
    assert!(complaint.contains("adapt.monitor: expected \"loss\", as the targets are values"), "{complaint}");
}

#[test]
fn every_way_is_compared() {
    let written = Written::new(&format!("{SMALL}\n[compare]\nseeds = [0, 1]\n"));
    let out = written.out("compared");
    let (code, text, complaint) = wora(&["compare", &written.config(), "--out", out.to_str().unwrap(), "--json"]);
    assert_eq!((code, complaint.as_str()), (Some(0), ""));
    let all: Value = serde_json::from_str(&text).unwrap();
    let ways: Vec<_> = all.as_array().unwrap().iter().map(|one| one["way"].as_str().unwrap()).collect();
    assert_eq!(ways, ["full fine-tuning", "LoRA", "DoRA", "WoRA, detached", "WoRA, full gradient"]);
    let parameters: Vec<_> = all.as_array().unwrap().iter().map(|one| one["parameters"].as_u64().unwrap()).collect();
    // A and B, then m, then alpha and beta of two layers.
    let lora = 2 * (9 + 16) + 2 * (256 + 10);
    assert_eq!(parameters, [16 * 10 + 2570, lora, lora + 26, lora + 30, lora + 30]);
    for one in all.as_array().unwrap() {
        assert_eq!(one["test"].as_array().unwrap().len(), 2);
        assert_eq!(one["before"], all[0]["before"], "every way starts from the same base models");
    }
    let tests: Vec<_> = all.as_array().unwrap().iter().map(|one| &one["test"]).collect();
    assert!((1..5).all(|nth| tests[nth] != tests[nth - 1]), "two ways are the same: {tests:?}");
    assert!(std::fs::read_to_string(out.join("compare.svg")).unwrap().contains("WoRA, full gradient"));
}
