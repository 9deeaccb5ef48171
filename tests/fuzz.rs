//! The fuzzer's targets on their seeds, every crash that was found among them, and on seeded mutations of them.
//!
//! `fuzz/README.md` says how to search further; a longer search here: `WORA_FUZZ=100000 cargo test --test fuzz`.

// Not all of it is of use here.
#[allow(dead_code)]
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use fuzz::TARGETS;
use peak_alloc::PeakAlloc;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What no input may need more of, in MB.
const MOST_MEMORY: f32 = 512.0;

/// What no input may take longer than.
const MOST_TIME: Duration = Duration::from_secs(20);

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(directory().join("seeds").join(target)).expect("a directory of seeds");
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| std::fs::read(path).expect("a seed")).collect()
}

/// A few changes of the kinds that a fuzzer makes.
fn mutated(seed: &[u8], other: &[u8], rng: &mut Pcg64) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..=bytes.len());
        match rng.random_range(0..7) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, rng.random()),
            2 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            3 if at < bytes.len() => {
                bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'9', b'-', b'"', b'}'][rng.random_range(0..9)]
            }
            4 => drop(bytes.drain(at..(at + rng.random_range(0..9)).min(bytes.len()))),
            5 => drop(bytes.splice(
                at..at,
                ["99999999999999999999", "-1", "1e999", "null", "[", "\u{0}"][rng.random_range(0..6)].bytes(),
            )),
            _ => {
                let from = rng.random_range(0..=other.len());
                let to = (from + rng.random_range(0..40)).min(other.len());
                drop(bytes.splice(at..at, other[from..to].iter().copied()));
            }
        }
    }
    bytes
}

/// Whatever fails is left where it can be looked at.
fn run(target: fuzz::Target, name: &str, bytes: &[u8]) -> bool {
    MEMORY.reset_peak_usage();
    let started = Instant::now();
    let outcome = std::panic::catch_unwind(|| target(bytes));
    let (took, memory) = (started.elapsed(), MEMORY.peak_usage_as_mb());
    match outcome {
        Ok(tried) if memory <= MOST_MEMORY && took <= MOST_TIME => tried,
        outcome => {
            let path = std::env::temp_dir().join(format!("fuzz-{name}"));
            std::fs::write(&path, bytes).expect("a file");
            let how = if outcome.is_ok() { format!("takes {took:?} and {memory} MB") } else { "panics".into() };
            panic!("{name} {how} on {}", path.display());
        }
    }
}

#[test]
fn every_target_bears_its_seeds_and_mutations_of_them() {
    let mutations = std::env::var("WORA_FUZZ").map_or(300, |count| count.parse().expect("WORA_FUZZ: a number"));
    for &(name, target) in TARGETS {
        let seeds = seeds(name);
        let tried = seeds.iter().filter(|seed| run(target, name, seed)).count();
        assert!(tried > 1, "{name}: only {tried} seeds get any further than the reader");
        let rng = &mut Pcg64::seed_from_u64(0);
        let mut further = 0;
        for _ in 0..mutations {
            let [seed, other] = [(); 2].map(|()| &seeds[rng.random_range(0..seeds.len())]);
            further += usize::from(run(target, name, &mutated(seed, other, rng)));
        }
        println!("{name}: {tried} of {} seeds and {further} of {mutations} mutations", seeds.len());
    }
}

#[test]
fn every_target_is_a_binary_of_the_fuzzer() {
    let manifest: toml::Table =
        std::fs::read_to_string(directory().join("Cargo.toml")).expect("a file").parse().expect("TOML");
    let binaries = manifest["bin"].as_array().expect("binaries").iter();
    let names: BTreeSet<&str> = binaries.map(|binary| binary["name"].as_str().expect("a name")).collect();
    assert_eq!(names, TARGETS.iter().map(|&(name, _)| name).collect());
    for name in names {
        let text = std::fs::read_to_string(directory().join(format!("fuzz_targets/{name}.rs"))).expect("a file");
        assert!(text.contains(&format!("target(\"{name}\")")), "{name}");
    }
}
