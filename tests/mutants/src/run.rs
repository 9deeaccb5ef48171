//! Trying mutants: the tests in stages, the quick ones first; the first that fails has killed it.

use crate::Mutant;
use crate::build::Dropped;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Test targets and how many cases a property gets, the quick ones first: most mutants get no further.
const STAGES: &[(&str, &[&str])] = &[
    ("4", &["laws", "operators", "bounds"]),
    ("40", &["layer", "workspace", "laws", "explain", "peft", LIBRARY]),
    ("16", &["matmul", "golden", "bad_input", "bad_inputs", "modules", "rounding", "diagnose", "gradcheck"]),
    ("16", &["mistakes", "train", "report", "summaries", "bench", "spec", "memory"]),
];

/// The unit tests.
const LIBRARY: &str = "woracle";

/// A mutant that takes this many times as long as no mutant hangs.
const PATIENCE: u32 = 10;

struct Test {
    name: String,
    program: PathBuf,
    cases: String,
    limit: Duration,
}

/// Tries every mutant that is not dropped and has no result yet.
pub fn all(tree: &Path, mutants: &[Mutant], dropped: &BTreeMap<usize, Dropped>, results: &Path) {
    let known = std::fs::read_to_string(results).unwrap_or_default();
    let known: BTreeSet<String> = known
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).expect("a line of RESULTS")["name"].as_str().expect("a name").into()
        })
        .collect();
    let file = std::fs::OpenOptions::new().create(true).append(true).open(results).expect("RESULTS");
    let file = Mutex::new(file);
    let say = |mutant: &Mutant, outcome: Value| {
        let mut line = json!({ "name": mutant.name });
        line.as_object_mut().expect("an object").extend(outcome.as_object().expect("an object").clone());
        writeln!(file.lock().expect("a file"), "{line}").expect("RESULTS");
    };
    for (number, mutant) in (1..).zip(mutants).filter(|(_, mutant)| !known.contains(&mutant.name)) {
        match dropped.get(&number) {
            Some(Dropped::Unviable(why)) => say(mutant, json!({ "outcome": "unviable", "by": why })),
            Some(Dropped::Unplanted(why)) => say(mutant, json!({ "outcome": "unplanted", "by": why })),
            None => {}
        }
    }
    let mut left: Vec<(usize, &Mutant)> = (1..)
        .zip(mutants)
        .filter(|(number, mutant)| !dropped.contains_key(number) && !known.contains(&mutant.name))
        .collect();
    for tests in stages(tree) {
        if left.is_empty() {
            break;
        }
        let (next, survivors) = (AtomicUsize::new(0), Mutex::new(vec![]));
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    while let Some(&(number, mutant)) = left.get(next.fetch_add(1, Ordering::Relaxed)) {
                        match tests.iter().find_map(|test| Some((test, fails(tree, test, number)?))) {
                            Some((test, how)) => {
                                say(mutant, json!({ "outcome": "killed", "by": test.name, "how": how }))
                            }
                            None => survivors.lock().expect("survivors").push((number, mutant)),
                        }
                    }
                });
            }
        });
        let survivors = survivors.into_inner().expect("survivors");
        let names: Vec<&str> = tests.iter().map(|test| test.name.as_str()).collect();
        eprintln!("{}: {} of {} mutants survive", names.join(", "), survivors.len(), left.len());
        left = survivors;
    }
    left.into_iter().for_each(|(_, mutant)| say(mutant, json!({ "outcome": "missed" })));
}

/// How a test fails with this mutant, if it does.
fn fails(tree: &Path, test: &Test, number: usize) -> Option<String> {
    let mut command = Command::new(&test.program);
    command.arg("--test-threads=1").current_dir(tree).stdout(Stdio::null()).stderr(Stdio::null());
    command.envs([
        ("MUTANT", number.to_string().as_str()),
        ("PROPTEST_CASES", &test.cases),
        ("RAYON_NUM_THREADS", "2"),
    ]);
    command.envs([("PROPTEST_MAX_SHRINK_ITERS", "0"), ("RUST_BACKTRACE", "0")]);
    let started = Instant::now();
    let mut child = command.spawn().expect("a test");
    loop {
        match child.try_wait().expect("a child") {
            Some(status) if status.success() => return None,
            Some(status) => return Some(status.to_string()),
            None if started.elapsed() > test.limit => {
                child.kill().and_then(|()| child.wait()).expect("a child");
                return Some("takes too long".into());
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Builds the tests, and stage by stage, as it is reached, sees that each passes without a mutant, in what time.
fn stages(tree: &Path) -> impl Iterator<Item = Vec<Test>> {
    let mut command = Command::new("cargo");
    command.args(["test", "--no-run", "--message-format=json"]).current_dir(tree);
    let names: BTreeSet<&str> = STAGES.iter().flat_map(|(_, names)| names.iter().copied()).collect();
    command.arg("--lib").args(names.iter().filter(|name| **name != LIBRARY).flat_map(|name| ["--test", name]));
    let output = command.stderr(Stdio::inherit()).output().expect("cargo test");
    assert!(output.status.success(), "the tests do not build");
    let text = String::from_utf8(output.stdout).expect("JSON");
    let artifacts = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let programs: BTreeMap<String, PathBuf> = artifacts
        .filter_map(|line| Some((line["target"]["name"].as_str()?.to_string(), line["executable"].as_str()?.into())))
        .collect();
    let timed = move |cases: &str, name: &str| {
        let limit = Duration::from_secs(3600);
        let mut test = Test { name: name.into(), program: programs[name].clone(), cases: cases.into(), limit };
        let started = Instant::now();
        assert!(fails(tree, &test, 0).is_none(), "{name} fails without a mutant");
        test.limit = (started.elapsed() * PATIENCE).max(Duration::from_secs(5));
        eprintln!("{name} with {cases} cases: {:.1} s", started.elapsed().as_secs_f64());
        test
    };
    STAGES.iter().map(move |(cases, names)| names.iter().map(|name| timed(cases, name)).collect())
}
