//! The tree with every mutant that compiles.

use crate::Mutant;
use crate::plant::{Planted, SWITCH, plant};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::process::Command;

/// Why a mutant is not tried.
#[derive(Clone, Debug)]
pub enum Dropped {
    /// It does not compile.
    Unviable(String),
    /// No rule plants it, or it does not compile because of how it is planted.
    Unplanted(String),
}

/// Plants all of them, takes out what the compiler complains of, and again until it does not.
pub fn until_it_compiles(tree: &Path, mutants: &[Mutant]) -> BTreeMap<usize, Dropped> {
    let numbered = || (1..).zip(mutants);
    let files: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.file.as_str()).collect();
    let read = |file: &str| std::fs::read_to_string(tree.join(file)).expect("a file of the tree");
    let texts: BTreeMap<&str, String> = files.iter().map(|&file| (file, read(file))).collect();
    let library = read("src/lib.rs");
    std::fs::write(tree.join("src/lib.rs"), library + SWITCH).expect("src/lib.rs");

    let elsewhere = numbered().filter(|(_, mutant)| mutant.file == "src/main.rs");
    let mut dropped: BTreeMap<_, _> =
        elsewhere.map(|(number, _)| (number, Dropped::Unplanted("not in the library".into()))).collect();
    loop {
        let mut all = BTreeMap::new();
        for (&file, text) in &texts {
            let here = numbered().filter(|(number, mutant)| mutant.file == file && !dropped.contains_key(number));
            let (planted, missing) = plant(text, &here.collect::<Vec<_>>());
            std::fs::write(tree.join(file), &planted.text).expect("a file of the tree");
            dropped.extend(missing.into_iter().map(|number| (number, Dropped::Unplanted("no rule covers it".into()))));
            all.insert(file.to_string(), planted);
        }
        let complaints = check(tree);
        eprintln!("{} mutants, {} left out so far, {} complaints", mutants.len(), dropped.len(), complaints.len());
        if complaints.is_empty() {
            return dropped;
        }
        let before = dropped.len();
        for complaint in &complaints {
            dropped.extend(blamed(complaint, &all));
        }
        assert!(dropped.len() > before, "nobody is to blame for {complaints:#?}");
    }
}

fn check(tree: &Path) -> Vec<Value> {
    let mut command = Command::new("cargo");
    command.args(["check", "--lib", "--profile", "test", "--message-format=json"]).current_dir(tree);
    let output = command.output().expect("cargo check");
    let text = String::from_utf8(output.stdout).expect("JSON");
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let errors: Vec<Value> =
        messages.map(|line| line["message"].clone()).filter(|message| message["level"] == "error").collect();
    assert!(output.status.success() || !errors.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    errors.into_iter().filter(|error| error["spans"].as_array().is_some_and(|spans| !spans.is_empty())).collect()
}

/// The mutants that an error is about: those whose code it points into, or else all of the innermost place.
fn blamed(error: &Value, files: &BTreeMap<String, Planted>) -> Vec<(usize, Dropped)> {
    let why = error["message"].as_str().unwrap_or_default().to_string();
    let spans = error["spans"].as_array().expect("spans");
    let points: Vec<(&Planted, Range<usize>)> = [true, false]
        .into_iter()
        .flat_map(|primary| spans.iter().filter(move |span| span["is_primary"] == primary))
        // A span in a macro, and where that was called.
        .flat_map(|span| std::iter::successors(Some(span), |span| span["expansion"].get("span")))
        .filter_map(|span| {
            let planted = files.get(span["file_name"].as_str()?)?;
            Some((planted, span["byte_start"].as_u64()? as usize..span["byte_end"].as_u64()? as usize))
        })
        .collect();
    let within = |inner: &Range<usize>, outer: &Range<usize>| outer.start <= inner.start && inner.end <= outer.end;
    for (planted, span) in &points {
        if let Some((_, number)) = planted.arms.iter().find(|(range, _)| within(span, range)) {
            return vec![(*number, Dropped::Unviable(why))];
        }
    }
    let outside =
        points.iter().flat_map(|(planted, span)| planted.places.iter().filter(|(range, _)| within(span, range)));
    let inside =
        points.iter().flat_map(|(planted, span)| planted.places.iter().filter(|(range, _)| within(range, span)));
    let innermost =
        outside.min_by_key(|(range, _)| range.len()).or_else(|| inside.min_by_key(|(range, _)| range.len()));
    let numbers = innermost.map_or(&[][..], |(_, numbers)| numbers);
    numbers.iter().map(|&number| (number, Dropped::Unplanted(why.clone()))).collect()
}
