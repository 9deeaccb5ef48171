//! SPEC.md, the code and each other: every label is defined once, cited, and known.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn sources(folder: &Path, into: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(fs::read_to_string(path).expect("a source"));
        }
    }
}

fn number_after(text: &str, letter: char) -> Option<String> {
    let digits: String = text.strip_prefix(letter)?.chars().take_while(char::is_ascii_digit).collect();
    // E0382 and its like are the compiler's.
    (!digits.is_empty() && !digits.starts_with('0')).then(|| format!("{letter}{digits}"))
}

/// Labels in comments, `// E9`, `/// ... E5`, `(C1 to C8)`, and those that are data, `"E49"`.
fn cited() -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    let lines = || files.iter().flat_map(|file| file.lines());
    let comments = lines().filter_map(|line| Some(line.split_once("//")?.1));
    let words = comments.flat_map(|comment| comment.split(|c: char| !c.is_ascii_alphanumeric()));
    let literals = lines().flat_map(|line| line.split('"').skip(1).step_by(2));
    words
        .chain(literals)
        .filter_map(|word| {
            let label = number_after(word, 'E').or_else(|| number_after(word, 'C'))?;
            (label == word).then_some(label)
        })
        .collect()
}

/// `\tag{E9}` defines a formula, `| C4 |` a condition.
fn defined() -> Vec<String> {
    let spec = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("SPEC.md")).expect("SPEC.md");
    let formulas = spec.split("\\tag{").skip(1).filter_map(|rest| number_after(rest, 'E'));
    let conditions = spec.lines().filter_map(|line| number_after(line.strip_prefix("| ")?, 'C'));
    formulas.chain(conditions).collect()
}

#[test]
fn every_label_of_the_spec_is_cited_and_none_is_unknown() {
    let defined = defined();
    let unique: BTreeSet<String> = defined.iter().cloned().collect();
    assert_eq!(unique.len(), defined.len(), "a label is defined twice");
    assert!(unique.contains("E9") && unique.contains("C4"), "the labels were not found at all");
    let cited = cited();
    assert_eq!(unique.difference(&cited).collect::<Vec<_>>(), Vec::<&String>::new(), "defined but never cited");
    assert_eq!(cited.difference(&unique).collect::<Vec<_>>(), Vec::<&String>::new(), "cited but never defined");
}
