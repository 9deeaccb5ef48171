//! SPEC.md, the code and each other: every label is defined once, cited, and known.

use ndarray::ArrayD;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use woracle::explain::{Chapter, Walk, examples};
use woracle::operators::{Conv1d, Operator};
use woracle::registry::{LAYERS, Precision, layer};
use woracle::{page, spec};

/// A source, or those in a folder.
fn sources(path: &Path, into: &mut Vec<String>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("a folder of sources") {
            sources(&entry.expect("an entry").path(), into);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        into.push(fs::read_to_string(path).expect("a source"));
    }
}

fn number_after(text: &str, letter: char) -> Option<String> {
    let digits: String = text.strip_prefix(letter)?.chars().take_while(char::is_ascii_digit).collect();
    // E0382 and its like are the compiler's.
    (!digits.is_empty() && !digits.starts_with('0')).then(|| format!("{letter}{digits}"))
}

/// The lines of these sources, and of every one below these folders.
fn lines(folders: &[&str]) -> Vec<String> {
    let mut files = Vec::new();
    for folder in folders {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut files);
    }
    files.iter().flat_map(|file| file.lines()).map(Into::into).collect()
}

fn labels<'a>(words: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let label = |word: &str| {
        let label = number_after(word, 'E').or_else(|| number_after(word, 'C'))?;
        (label == word).then_some(label)
    };
    words.filter_map(label).collect()
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric())
}

/// Labels in comments, `// E9`, `/// ... E5`, `(C1 to C8)`.
fn commented(folders: &[&str]) -> BTreeSet<String> {
    let lines = lines(folders);
    labels(lines.iter().filter_map(|line| Some(line.split_once("//")?.1)).flat_map(words))
}

/// Labels that are data, `"E49"`.
fn written(folders: &[&str]) -> BTreeSet<String> {
    labels(lines(folders).iter().flat_map(|line| line.split('"').skip(1).step_by(2)))
}

/// The folders and files that compute what SPEC.md derives; what only tells of it is none of them, nor are identities,
/// whose labels are data.
const COMPUTING: &[&str] = &[
    "src/bench",
    "src/cases",
    "src/cli",
    "src/gradcheck",
    "src/mistakes",
    "src/modules",
    "src/operators",
    "src/oracle",
    "src/peft",
    "src/simd.rs",
    "src/train",
    "src/wora",
];

/// Labels that a test says it would see broken, `/// E55 to E73`, and those of worked examples.
fn tested() -> BTreeSet<String> {
    let mut tested = labels(spec::blocks("walk").flat_map(|text| text.split_whitespace()));
    let mut above = String::new();
    for line in lines(&["tests", "src"]) {
        match line.trim().strip_prefix("///") {
            Some(comment) => above += comment,
            None if line.trim() == "#[test]" => {
                tested.extend(labels(words(&above)));
                for (first, rest) in above.split(" to ").zip(above.split(" to ").skip(1)) {
                    let ends = [words(first).last(), words(rest).next()];
                    let [Some(first), Some(last)] = ends.map(|word| word?.strip_prefix('E')?.parse::<usize>().ok())
                    else {
                        continue;
                    };
                    tested.extend((first..=last).map(|number| format!("E{number}")));
                }
                above.clear();
            }
            None => above.clear(),
        }
    }
    tested
}

/// `\tag{E9}` defines a formula, `| C4 |` a condition.
fn defined() -> Vec<String> {
    let spec = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("SPEC.md")).expect("SPEC.md");
    let formulas = spec.split("\\tag{").skip(1).filter_map(|rest| number_after(rest, 'E'));
    let conditions = spec.lines().filter_map(|line| number_after(line.strip_prefix("| ")?, 'C'));
    formulas.chain(conditions).collect()
}

#[test]
fn every_label_of_the_spec_is_cited_in_code_and_in_a_test_and_none_is_unknown() {
    let defined = defined();
    let unique: BTreeSet<String> = defined.iter().cloned().collect();
    assert_eq!(unique.len(), defined.len(), "a label is defined twice");
    assert!(unique.contains("E9") && unique.contains("C4"), "the labels were not found at all");
    let cited = &commented(COMPUTING) | &written(&["src/gradcheck"]);
    assert_eq!(unique.difference(&cited).collect::<Vec<_>>(), Vec::<&String>::new(), "defined but never cited");
    let anywhere = &commented(&["src", "tests"]) | &written(&["src"]);
    assert_eq!(anywhere.difference(&unique).collect::<Vec<_>>(), Vec::<&String>::new(), "cited but never defined");
    let tested = tested();
    assert_eq!(unique.difference(&tested).collect::<Vec<_>>(), Vec::<&String>::new(), "in no test");
}

/// With `WORA_KEEP=1` the blocks are written anew from what is given in them.
#[test]
fn every_number_of_the_worked_examples_is_what_is_computed() {
    let examples = examples();
    for layer in LAYERS {
        assert!(examples.iter().any(|example| example.layer() == layer.name()), "no example of {}", layer.name());
    }
    let mut spec = spec::TEXT.to_string();
    for example in &examples {
        let walk = Walk::of(&example.case().expect("what is given")).expect("a case");
        let worked_out = walk.to_string();
        // What is printed is the number itself, not what it is rounded to.
        let dyadic = |value: &f64| (value * 1024.0).fract() == 0.0 && value.abs() < 1000.0;
        assert!(walk.steps.iter().all(|step| step.values.iter().all(dyadic)), "{walk}");
        if std::env::var_os("WORA_KEEP").is_some() {
            spec = spec.replace(example.text, worked_out.trim_end());
            continue;
        }
        for (nth, (found, expected)) in example.text.lines().zip(worked_out.lines()).enumerate() {
            assert_eq!(found, expected, "line {} of the example of {}", nth + 1, example.layer());
        }
        assert_eq!(example.text.lines().count(), worked_out.lines().count());
    }
    if std::env::var_os("WORA_KEEP").is_some() {
        fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("SPEC.md"), spec).expect("SPEC.md");
    }
}

/// What the lines of the definition and of the factored layer end in is what the layer hands out, without a rounding. E2 to
/// E4.
#[test]
fn both_ways_through_the_worked_examples_end_in_the_layers_results() {
    use Chapter::{Definition, DefinitionBackward, Factored, FactoredBackward, ThroughNorm};
    for example in examples() {
        let case = example.case().expect("what is given");
        let subject = layer(&case.layer).expect("a layer");
        let walk = Walk::of(&case).expect("a case");
        let results = subject.evaluate(&case, Precision::F64).expect("results");
        let [a, b] = subject.lora_names();
        let quantities = [
            ("y", "y"),
            ("dx", "grad.x"),
            ("dm", "grad.lora_magnitude_vector"),
            ("dalpha", "grad.lora_wora_alpha"),
            ("dbeta", "grad.lora_wora_beta"),
            ("dA", &format!("grad.{a}")),
            ("dB", &format!("grad.{b}")),
        ];
        for (quantity, name) in quantities {
            let Some(expected) = results.get(name) else { continue };
            for chapters in [&[Definition, DefinitionBackward][..], &[Factored, FactoredBackward, ThroughNorm]] {
                let step = walk.last(quantity, chapters).unwrap_or_else(|| panic!("{quantity} in {}", case.layer));
                assert!(step.values.iter().eq(expected.iter()), "{quantity} by {} in {}", step.label, case.layer);
            }
        }
    }
}

/// Which formulas stand in which page of the documentation.
const SHOWN: &[(&str, &[&str])] = &[
    ("front_page", &["E9", "E10", "E11", "E12", "E13"]),
    ("operator", &["E1"]),
    ("linear", &["E2", "E3", "E4"]),
    ("embedding", &["E39", "E40", "E41"]),
    ("conv", &["E42", "E43", "E44", "E45", "E46", "E47", "E48"]),
    ("definition", &["E142", "E143", "E144", "E145", "E146", "E147", "E148", "E149", "E150"]),
    ("direction", &["E14", "E31", "E32", "E33", "E34", "E35", "E36"]),
    ("layer_forward", &["E15", "E16", "E17"]),
    ("layer_backward", &["E18", "E19", "E20", "E21", "E22", "E23", "E24", "E25", "E26", "E27", "E28", "E29", "E30"]),
    ("merge", &["E37", "E79"]),
    ("identities", &["E49", "E50", "E51", "E52", "E53", "E54"]),
    ("adamw", &["E137", "E138", "E139"]),
];

/// Pages of the documentation show formulas as MathML, which browsers draw by themselves. With `WORA_KEEP=1` the files are
/// written anew.
#[test]
fn formulas_of_the_documentation_are_those_of_the_spec() {
    for (name, labels) in SHOWN {
        let row = |label: &&str| {
            let latex = spec::formula(label).unwrap_or_else(|| panic!("{label} has no formula"));
            format!(
                "<div title=\"{label}\" style=\"margin: 0.6em 0; overflow: visible\">{}</div>\n",
                page::formula(latex)
            )
        };
        let expected = labels.iter().map(row).collect::<String>() + &format!("\nSPEC.md, {}.\n", between(labels));
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(format!("{name}.md"));
        if std::env::var_os("WORA_KEEP").is_some() {
            fs::write(&path, &expected).expect("a file");
        }
        let found = fs::read_to_string(&path).expect("a file of formulas");
        assert!(found == expected, "docs/{name}.md does not show the formulas of SPEC.md: WORA_KEEP=1 writes it anew");
    }
}

fn between(labels: &[&str]) -> String {
    match labels {
        [one] => one.to_string(),
        [first, .., last] => {
            let numbers: Vec<usize> = labels.iter().filter_map(|label| label[1..].parse().ok()).collect();
            let consecutive = numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]);
            if consecutive { format!("{first} to {last}") } else { labels.join(", ") }
        }
        [] => String::new(),
    }
}

/// The example with dimensions of section 3.4: what it says of dx and dW, with numbers in the place of its letters.
#[test]
fn the_unfolded_example_is_what_a_convolution_does() {
    let said = |start: &str| -> Vec<f64> {
        let (_, rest) = spec::TEXT.split_once(start).unwrap_or_else(|| panic!("{start} is not there"));
        let (tuple, _) = rest.split_once(")$").expect("the end of a tuple");
        let value = |letter: &str| match letter.split_once('_').expect("a letter and its index") {
            ("x", index) => [2.0, -3.0, 5.0, 7.0][index.parse::<usize>().expect("an index")],
            ("w", index) => [11.0, -13.0, 17.0][index.parse::<usize>().expect("an index")],
            ("d", index) => [19.0, -23.0][index.parse::<usize>().expect("an index")],
            (letter, _) => panic!("{letter} is none of x, w and d"),
        };
        let product = |term: &str| term.split_whitespace().map(value).product::<f64>();
        tuple.replace('\\', " ").split(',').map(|sum| sum.split('+').map(product).sum()).collect()
    };
    let settings = serde_json::from_str(r#"{"stride": 2, "padding": 1}"#).expect("settings");
    let conv = Conv1d::from_weight_shape(settings, &[1, 1, 3]).expect("a convolution");
    let x = ArrayD::from_shape_vec(vec![1, 1, 4], vec![2.0, -3.0, 5.0, 7.0]).expect("x").into();
    let weight = ndarray::array![[11.0, -13.0, 17.0]];
    let dy = ndarray::array![[[19.0, -23.0]]];
    let dx = conv.adjoint_input(&x, &[(dy.view(), weight.view())]).expect("values");
    assert_eq!(said("E47 reads\n$dx = ("), dx.into_iter().collect::<Vec<_>>());
    assert_eq!(said("E48 reads\n$dW = ("), conv.adjoint_weight(&x, dy.view()).into_iter().collect::<Vec<_>>());
}
