//! Every mutant of cargo-mutants in one build: each is planted beside what it replaces, behind a switch that is read from
//! the environment, so that trying one costs a run and not a build.
//!
//! `woracle-mutants TREE LIST RESULTS [SAMPLE]` works in TREE, a copy of the repository that it changes; LIST is what
//! `cargo mutants --list --json` says of it; RESULTS gets a line of JSON for every mutant, and those that are in it already are
//! not tried again. With SAMPLE only so many are tried, the same ones every time.

mod build;
mod plant;
mod run;

use serde::Deserialize;
use std::path::Path;

/// A place in a file: lines and columns from 1, columns in characters.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    line: usize,
    column: usize,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Span {
    start: Place,
}

/// A mutant as cargo-mutants lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct Mutant {
    file: String,
    genre: String,
    name: String,
    replacement: String,
    span: Span,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (tree, list, results, sample) = match arguments.as_slice() {
        [tree, list, results] => (tree, list, results, None),
        [tree, list, results, sample] => (tree, list, results, Some(sample.parse().expect("SAMPLE: a number"))),
        _ => {
            eprintln!("usage: woracle-mutants TREE LIST RESULTS [SAMPLE]");
            std::process::exit(2);
        }
    };
    let (tree, results) = (Path::new(tree), Path::new(results));
    let list = std::fs::read_to_string(list).expect("LIST");
    let mut mutants: Vec<Mutant> = serde_json::from_str(&list).expect("the list of cargo mutants --list --json");
    if let Some(sample) = sample {
        mutants.sort_by_key(|mutant| hash(&mutant.name));
        mutants.truncate(sample);
    }
    let dropped = build::until_it_compiles(tree, &mutants);
    run::all(tree, &mutants, &dropped, results);
}

/// FNV-1a, which is the same everywhere.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
