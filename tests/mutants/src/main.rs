//! Every mutant of cargo-mutants in one build: each is planted beside what it replaces, behind a switch that is read from
//! the environment, so that trying one costs a run and not a build.
//!
//! `woracle-mutants TREE LIST RESULTS` works in TREE, a copy of the repository that it changes; LIST is what
//! `cargo mutants --list --json` says of it; RESULTS gets a line of JSON for every mutant, and those that are in it already are
//! not tried again.

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
    let [tree, list, results] = arguments.as_slice() else {
        eprintln!("usage: woracle-mutants TREE LIST RESULTS");
        std::process::exit(2);
    };
    let (tree, results) = (Path::new(tree), Path::new(results));
    let list = std::fs::read_to_string(list).expect("LIST");
    let mutants: Vec<Mutant> = serde_json::from_str(&list).expect("the list of cargo mutants --list --json");
    let dropped = build::until_it_compiles(tree, &mutants);
    run::all(tree, &mutants, &dropped, results);
}
