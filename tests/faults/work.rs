//! A command, what it reads, and what it makes of it when nothing goes wrong.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use woracle::oracle::Dtype;
use woracle::peft::{AdapterConfig, INDEX_FILE, save};
use woracle::tensor_writer::{Planned, TensorWriter};
use woracle::wora::{Adapter, Method};

/// What every name begins with that is nobody's once a run is over.
const ASIDE: &str = ".wora-";
const METRICS: &str = "metrics.jsonl";
const STATE: &str = "state.safetensors";
const MANIFEST: &str = "manifest.json";

/// The files of a directory and of those in it, by their names.
pub type Files = BTreeMap<String, Vec<u8>>;

/// Every file below a directory, as it is.
pub fn raw(directory: &Path) -> Files {
    fn add(root: &Path, directory: &Path, files: &mut Files) {
        let Ok(entries) = std::fs::read_dir(directory) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                add(root, &path, files);
            } else if let Ok(bytes) = std::fs::read(&path) {
                files.insert(path.strip_prefix(root).unwrap().to_str().unwrap().into(), bytes);
            }
        }
    }
    let mut files = Files::new();
    add(directory, directory, &mut files);
    files
}

fn is_aside(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with(ASIDE))
}

/// The files of a result: without times, and without what was on its way.
pub fn results(directory: &Path) -> Files {
    let untimed = |(name, bytes): (String, Vec<u8>)| {
        let bytes = match name.as_str() {
            METRICS => untimed_lines(&bytes),
            "summary.json" => {
                let mut summary: Value = serde_json::from_slice(&bytes).unwrap();
                for stage in ["/pretrain", "/adapt/trained"] {
                    summary.pointer_mut(stage).unwrap().as_object_mut().unwrap().remove("milliseconds").unwrap();
                }
                summary.to_string().into_bytes()
            }
            "compare.json" => {
                let mut ways: Value = serde_json::from_slice(&bytes).unwrap();
                for way in ways.as_array_mut().unwrap() {
                    way.as_object_mut().unwrap().remove("milliseconds").unwrap();
                }
                ways.to_string().into_bytes()
            }
            // Times are in it too; that it is whole is all.
            STATE => {
                SafeTensors::deserialize(&bytes).unwrap();
                vec![]
            }
            _ => bytes,
        };
        (name, bytes)
    };
    raw(directory).into_iter().filter(|(name, _)| !is_aside(name)).map(untimed).collect()
}

/// The lines of the metrics without times; of one that is not whole, nothing but that it is there.
fn untimed_lines(bytes: &[u8]) -> Vec<u8> {
    let mut lines = String::new();
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        match line.strip_suffix(b"\n") {
            Some(line) => {
                let mut line: Value = serde_json::from_slice(line).unwrap();
                line.as_object_mut().unwrap().remove("seconds").expect("a time");
                lines += &format!("{line}\n");
            }
            None => lines += "torn",
        }
    }
    lines.into_bytes()
}

/// How a process ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stderr: String,
}

impl Ended {
    pub fn of(child: Child) -> Self {
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        Self { code: output.status.code(), signal: output.status.signal(), stderr }
    }
    pub fn is_good(&self) -> bool {
        self.code == Some(0) && self.stderr.is_empty()
    }
    /// Fails unless it is one line that names something below this directory, and exit code 2.
    pub fn complains_of(&self, path: &Path) {
        assert_eq!((self.code, self.stderr.lines().count()), (Some(2), 1), "{self:?}");
        assert!(self.stderr.starts_with("wora: ") && self.stderr.contains(path.to_str().unwrap()), "{self:?}");
    }
}

/// How far a command came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// Nothing has changed.
    Nowhere,
    /// To no result; what there is, is whole.
    Between,
    /// To its result.
    ToTheEnd,
}

pub struct Work {
    pub name: &'static str,
    directory: TempDir,
    /// With IN and OUT for the directories; what makes it go on where it was killed is added.
    arguments: &'static str,
    pub again: &'static [&'static str],
    /// What is in the directory before.
    pub before: Files,
    /// What is in it then.
    pub expected: Files,
    /// How long that takes.
    pub took: Duration,
    inputs: Files,
}

impl Work {
    fn new(
        name: &'static str,
        arguments: &'static str,
        again: &'static [&'static str],
        make: impl FnOnce(&Path),
        before: Files,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let input = directory.path().join("in");
        std::fs::create_dir(&input).unwrap();
        make(&input);
        let (inputs, expected, took) = (raw(&input), Files::new(), Duration::ZERO);
        let mut work = Self { name, directory, arguments, again, before, expected, took, inputs };
        let attempt = work.attempt();
        let started = Instant::now();
        let ended = attempt.run(&[]);
        let (expected, took) = (attempt.results(), started.elapsed());
        assert!(ended.is_good(), "{name}: {ended:?}");
        assert_eq!(attempt.left(), BTreeSet::new(), "{name}: nothing is left");
        drop(attempt);
        (work.expected, work.took) = (expected, took);
        work
    }

    /// The inputs of all attempts.
    pub fn input(&self) -> PathBuf {
        self.directory.path().join("in")
    }

    /// The same work in a directory of its own.
    pub fn attempt(&self) -> Attempt<'_> {
        let directory = tempfile::tempdir().unwrap();
        let attempt = Attempt { work: self, directory };
        for (name, bytes) in &self.before {
            std::fs::create_dir_all(attempt.out()).unwrap();
            std::fs::write(attempt.out().join(name), bytes).unwrap();
        }
        attempt
    }

    pub fn arguments(&self, input: &Path, out: &Path) -> Vec<String> {
        let [input, out] = [input, out].map(|path| path.to_str().unwrap());
        self.arguments.split(' ').map(|word| word.replace("IN", input).replace("OUT", out)).collect()
    }

    pub fn assert_inputs_are_as_they_were(&self) {
        assert!(raw(&self.input()) == self.inputs, "{}: the inputs have changed", self.name);
    }

    pub fn train(seed: u64) -> Self {
        let arguments = if seed == 0 {
            "train IN/run.toml --out OUT --threads 2"
        } else {
            "train IN/run.toml --out OUT --threads 2 --seed 1"
        };
        Self::new("train", arguments, &["--resume"], write_training, Files::new())
    }

    pub fn compare() -> Self {
        Self::new("compare", "compare IN/run.toml --out OUT --threads 2", &[], write_training, Files::new())
    }

    /// Over the cases of another seed: what is killed midway must not pass for either.
    pub fn golden(seed: u64) -> Self {
        let (ours, theirs) = ("golden OUT linear-o --seed 1", "golden OUT linear-o --seed 2");
        let (ours, theirs) = if seed == 1 { (ours, theirs) } else { (theirs, ours) };
        let before = Self::new("golden", theirs, &[], |_| (), Files::new()).expected;
        Self::new("golden", ours, &[], |_| (), before)
    }

    pub fn merge(dtype: &str) -> Self {
        let arguments = match dtype {
            "keep" => "merge --base IN/base --adapter IN/adapter --out OUT",
            _ => "merge --base IN/base --adapter IN/adapter --out OUT --dtype bf16",
        };
        Self::new("merge", arguments, &[], |input| write_model(input, FEATURES), Files::new())
    }

    /// Of weights so small that a file beside them is the largest, and still fits in a buffer.
    pub fn small_merge() -> Self {
        let arguments = "merge --base IN/base --adapter IN/adapter --out OUT";
        Self::new("merge", arguments, &[], |input| write_model(input, 8), Files::new())
    }

    pub fn unmerge() -> Self {
        let merge = |input: &Path| {
            write_model(input, FEATURES);
            let at = |name: &str| input.join(name).to_str().unwrap().to_string();
            let [base, adapter, merged] = ["base", "adapter", "merged"].map(at);
            let (code, _, stderr) =
                crate::command::wora(&["merge", "--base", &base, "--adapter", &adapter, "--out", &merged]);
            assert_eq!(code, Some(0), "{stderr}");
        };
        let arguments = "unmerge --merged IN/merged --adapter IN/adapter --out OUT";
        Self::new("unmerge", arguments, &[], merge, Files::new())
    }
}

/// One run of it.
pub struct Attempt<'w> {
    work: &'w Work,
    pub directory: TempDir,
}

impl Attempt<'_> {
    pub fn out(&self) -> PathBuf {
        self.directory.path().join("out")
    }

    pub fn command_on(&self, input: &Path, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wora"));
        command.env("RAYON_NUM_THREADS", "2").args(self.work.arguments(input, &self.out())).args(more);
        // What it writes into a directory of the system is to be looked at too.
        command.env("TMPDIR", self.directory.path()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    pub fn start(&self, more: &[&str]) -> Child {
        self.command_on(&self.work.input(), more).spawn().unwrap()
    }

    pub fn run(&self, more: &[&str]) -> Ended {
        Ended::of(self.start(more))
    }

    /// The same where no file can have more than so many bytes.
    pub fn run_limited(&self, bytes: usize) -> Ended {
        let command = self.command_on(&self.work.input(), &[]);
        let mut limited = Command::new("prlimit");
        limited.arg(format!("--fsize={bytes}")).arg(command.get_program());
        limited.args(command.get_args()).envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Ended::of(limited.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }

    pub fn results(&self) -> Files {
        results(&self.out())
    }

    /// The names of what was on its way when it ended.
    pub fn left(&self) -> BTreeSet<String> {
        fn add(directory: &Path, left: &mut BTreeSet<String>) {
            for path in std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()) {
                let name = path.file_name().unwrap().to_str().unwrap();
                if name.starts_with(ASIDE) {
                    left.insert(name.into());
                } else if path.is_dir() {
                    add(&path, left);
                }
            }
        }
        let names = std::fs::read_dir(self.directory.path()).unwrap().flatten().map(|entry| entry.file_name());
        let mut left: BTreeSet<_> =
            names.map(|name| name.into_string().unwrap()).filter(|name| name != "out").collect();
        add(self.directory.path(), &mut left);
        left
    }

    /// Whether it has begun to write: anything but the lock has come or gone.
    pub fn is_writing(&self) -> bool {
        let names = |files: Files| files.into_keys().collect::<BTreeSet<_>>();
        let begun = self.left().iter().any(|name| name != ".wora-lock");
        begun || names(results_or_less(&self.out())) != names(self.work.before.clone())
    }

    /// How far it came. Fails if anything is not whole, or is a mixture.
    pub fn came(&self) -> Came {
        let (Work { name: work, before, expected, .. }, found) = (self.work, self.results());
        if found == *expected {
            return Came::ToTheEnd;
        }
        if found == *before {
            return Came::Nowhere;
        }
        assert!(matches!(*work, "train" | "golden"), "{work}: half of a result: {:?}", found.keys());
        assert!(!found.contains_key(MANIFEST), "{work}: a manifest of files that are others");
        for (name, bytes) in &found {
            let is_whole = match name.as_str() {
                STATE => true,
                METRICS => expected[METRICS].starts_with(bytes.strip_suffix(b"torn").unwrap_or(bytes)),
                _ => expected.get(name) == Some(bytes) || before.get(name) == Some(bytes),
            };
            assert!(is_whole, "{work}: {name} is neither as it was nor as it is to be");
        }
        Came::Between
    }
}

/// The names alone, while somebody writes.
fn results_or_less(directory: &Path) -> Files {
    raw(directory).into_keys().filter(|name| !is_aside(name)).map(|name| (name, vec![])).collect()
}

/// A classification of a table, over both stages.
fn write_training(input: &Path) {
    let mut rng = Pcg64::seed_from_u64(5);
    let mut table = String::from("a,b,c,d,label\n");
    for row in 0..240 {
        let label = row % 3;
        let features: Vec<_> =
            (0..4).map(|at| format!("{:.4}", f64::from(label * at) + rng.random_range(-1.0..1.0))).collect();
        table += &format!("{},{label}\n", features.join(","));
    }
    std::fs::write(input.join("table.csv"), table).unwrap();
    std::fs::write(input.join("run.toml"), TRAINING).unwrap();
}

const TRAINING: &str = r#"
[data]
format = "csv"
path = "table.csv"
classes = 3
[split]
validation = 0.2
test = 0.2
[model]
modules = [
    { name = "fc1", type = "linear", in_features = 4, out_features = 32 },
    { type = "relu" },
    { name = "fc2", type = "linear", in_features = 32, out_features = 3 },
]
[pretrain]
steps = 30
batch_size = 16
evaluate_every = 3
optimiser = { type = "adamw", learning_rate = 1e-2 }
[adapter]
method = "wora"
rank = 2
lora_alpha = 4.0
lora_dropout = 0.1
target_modules = ["fc1", "fc2"]
[adapt]
steps = 30
batch_size = 16
evaluate_every = 3
optimiser = { type = "adamw", learning_rate = 1e-2 }
[compare]
seeds = [0]
"#;

/// Features of a square weight.
const FEATURES: usize = 160;
const WEIGHTS: usize = 6;
const RANK: usize = 4;

/// A base in two shards, with a configuration and a tokenizer beside, and an adapter of half of its weights.
fn write_model(input: &Path, features: usize) {
    let mut rng = Pcg64::seed_from_u64(7);
    let (base, mut map) = (input.join("base"), Map::new());
    std::fs::create_dir(&base).unwrap();
    for shard in 0..2 {
        let file = format!("part-{shard}.safetensors");
        let of_shard = (0..WEIGHTS).filter(|weight| weight % 2 == shard).map(|weight| Planned {
            name: format!("layers.{weight}.weight"),
            dtype: safetensors::Dtype::F32,
            shape: vec![features, features],
        });
        let planned: Vec<_> = of_shard.collect();
        let mut writer = TensorWriter::new(vec![], &planned, &BTreeMap::new()).unwrap();
        for planned in &planned {
            map.insert(planned.name.clone(), json!(file));
            for _ in 0..features * features {
                writer.write(&rng.random_range(-1.0_f32..1.0).to_le_bytes()).unwrap();
            }
        }
        std::fs::write(base.join(file), writer.finish().unwrap()).unwrap();
    }
    std::fs::write(base.join(INDEX_FILE), json!({ "weight_map": map }).to_string()).unwrap();
    std::fs::write(base.join("config.json"), "{}").unwrap();
    std::fs::write(base.join("tokenizer.json"), vec![b' '; 5000]).unwrap();
    let mut draw =
        |shape: &[usize]| ndarray::ArrayD::from_shape_fn(shape, |_| f64::from(rng.random_range(-1.0_f32..1.0)));
    let modules = (0..WEIGHTS).step_by(2).chain([1]).map(|weight| {
        let adapter = Adapter {
            lora_a: draw(&[RANK, features]),
            lora_b: draw(&[features, RANK]),
            magnitude: Some(draw(&[features])),
            alpha: None,
            beta: None,
        };
        (format!("layers.{weight}"), (adapter, false))
    });
    let modules: BTreeMap<_, _> = modules.collect();
    let config = AdapterConfig::new(Method::Dora, RANK, 8.0, &["0", "1", "2", "4"]).unwrap();
    save(&input.join("adapter"), &config, &modules, Dtype::F32).unwrap();
}
