//! `wora verify` on files of which some cannot be judged, and on answers that are wrong, which is another thing: exit code
//! 1. What is said of each file that cannot be judged is in `tests/bad_inputs.toml`.

use assert_cmd::cargo::cargo_bin_cmd;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

fn golden_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden")
}

fn golden_file(name: &str) -> PathBuf {
    golden_directory().join(format!("{name}.safetensors"))
}

fn golden_bytes(name: &str) -> Vec<u8> {
    std::fs::read(golden_file(name)).unwrap()
}

fn golden_files() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(golden_directory()).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries.filter(|file| file.extension().is_some_and(|e| e == "safetensors")).collect();
    files.sort();
    files
}

/// A case file taken apart, to be put together again with something wrong.
#[derive(Clone)]
struct CaseFile {
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl CaseFile {
    fn golden(name: &str) -> Self {
        let bytes = golden_bytes(name);
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter();
        Self {
            metadata: header.metadata().clone().unwrap(),
            tensors: tensors
                .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
                .collect(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        safetensors::serialize(views, Some(self.metadata.clone())).unwrap()
    }

    fn number(&mut self, tensor: &str, element: usize) -> &mut [u8] {
        &mut self.tensors.get_mut(tensor).unwrap().2[element * 8..][..8]
    }
    fn put(&mut self, tensor: &str, element: usize, value: f64) {
        self.number(tensor, element).copy_from_slice(&value.to_le_bytes());
    }
    fn add(&mut self, tensor: &str, element: usize, value: f64) {
        let before = f64::from_le_bytes(self.number(tensor, element).try_into().unwrap());
        self.put(tensor, element, before + value);
    }
    fn is_answer(name: &str) -> bool {
        name != "grad.y"
            && (name.starts_with("grad.") || ["y", "weighted", "weight_norm", "gain", "merged_weight"].contains(&name))
    }
}

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn wora<A: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = A>) -> Run {
    let output = cargo_bin_cmd!("wora").args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let run = Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    run
}

fn verify<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>, json: bool) -> Run {
    let paths = paths.into_iter().map(|path| path.as_ref().as_os_str().to_owned());
    wora(["verify".into()].into_iter().chain(json.then(|| "--json".into())).chain(paths))
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort();
    keys
}

/// The report of `wora verify --json`, in whose schema nothing is missing or too much.
fn report(run: &Run) -> Value {
    let report: Value =
        serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error} in stdout {:?}", run.stdout));
    assert_eq!(keys(&report), ["cases", "failed", "passed"]);
    let cases = report["cases"].as_array().unwrap();
    for case in cases {
        let fields =
            ["diagnosis", "error", "facts", "file", "first_diverging", "name", "tensors", "unanswered", "verdict"];
        assert_eq!(keys(case), fields);
        assert_eq!(case["error"].is_string(), case["verdict"] == "error", "{case}");
        assert_eq!(case["first_diverging"].is_string(), case["verdict"] == "fail", "{case}");
        assert!(case["name"].is_string() && case["file"].is_string(), "{case}");
        assert!(["pass", "fail", "error"].contains(&case["verdict"].as_str().unwrap()), "{case}");
        for tensor in case["tensors"].as_array().unwrap() {
            let numbers = [
                "actual",
                "beyond",
                "bound",
                "error_over_bound",
                "expected",
                "max_abs_error",
                "max_rel_error",
                "max_ulps",
            ];
            let others = ["dtype", "name", "verdict", "worst_index"];
            let mut fields: Vec<&str> = numbers.iter().chain(&others).copied().collect();
            fields.sort();
            assert_eq!(keys(tensor), fields);
            assert!(["F64", "F32", "BF16", "F16"].contains(&tensor["dtype"].as_str().unwrap()), "{tensor}");
            assert!(tensor["name"].is_string() && tensor["worst_index"].is_array(), "{tensor}");
            assert!(["pass", "fail"].contains(&tensor["verdict"].as_str().unwrap()), "{tensor}");
            for number in numbers {
                assert!(tensor[number].is_number() || tensor[number].is_null(), "{number}: {tensor}");
            }
        }
    }
    let passed = cases.iter().filter(|case| case["verdict"] == "pass").count();
    assert_eq!(report["passed"], passed);
    assert_eq!(report["failed"], cases.len() - passed);
    report
}

#[test]
fn without_a_command_the_usage_is_told() {
    let run = wora::<&str>([]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""));
    assert!(run.stderr.contains("Usage") && run.stderr.contains("Commands"), "{}", run.stderr);
}

#[test]
fn one_file_that_cannot_be_read_leaves_the_others_judged() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::copy(golden_file("linear-plain"), path("a.safetensors")).unwrap();
    std::fs::write(path("b.safetensors"), &golden_bytes("linear-plain")[..1000]).unwrap();
    std::fs::copy(golden_file("linear-dropout"), path("c.safetensors")).unwrap();
    let mut wrong = CaseFile::golden("linear-rank-1");
    wrong.add("y", 0, 1.0);
    std::fs::write(path("d.safetensors"), wrong.bytes()).unwrap();

    for paths in [vec![path("")], ["a", "b", "c", "d"].map(|name| path(&format!("{name}.safetensors"))).to_vec()] {
        let run = verify(&paths, true);
        assert_eq!(run.code, Some(2));
        assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
        assert!(run.stderr.contains("b.safetensors"), "{}", run.stderr);
        let report = report(&run);
        let verdicts: Vec<_> = report["cases"].as_array().unwrap().iter().map(|case| &case["verdict"]).collect();
        assert_eq!(verdicts, ["pass", "error", "pass", "fail"]);
        assert_eq!(report["cases"][1]["name"], "b");
        assert_eq!(report["cases"][2]["name"], "linear-dropout");

        let run = verify(&paths, false);
        assert_eq!(run.code, Some(2));
        assert!(run.stdout.contains("ERROR") && run.stdout.contains("FAIL"), "{}", run.stdout);
        assert!(run.stdout.ends_with("2 passed, 2 failed\n"), "{}", run.stdout);
    }
}

#[test]
fn one_path_that_leads_nowhere_leaves_the_others_judged() {
    let nowhere = tempfile::tempdir().unwrap().path().join("nothing.safetensors");
    let run = verify([golden_file("linear-plain"), nowhere, golden_file("linear-dropout")], true);
    assert_eq!(run.code, Some(2));
    let report = report(&run);
    let verdicts: Vec<_> = report["cases"].as_array().unwrap().iter().map(|case| &case["verdict"]).collect();
    assert_eq!(verdicts, ["pass", "error", "pass"]);
}

#[test]
fn what_is_no_case_file_in_a_directory_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["linear-plain", "linear-rank-1"] {
        std::fs::copy(golden_file(name), directory.path().join(format!("{name}.safetensors"))).unwrap();
    }
    for name in ["README.md", "generate.py", "linear-plain.safetensors.bak", "safetensors", ".hidden"] {
        std::fs::write(directory.path().join(name), "no case").unwrap();
    }
    let run = verify([directory.path()], true);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
    assert_eq!(report(&run)["passed"], 2);
}

#[test]
fn every_golden_file_passes() {
    let files = golden_files();
    assert!(files.len() >= 17, "{files:?}");
    for paths in [files.clone(), vec![golden_directory()]] {
        let run = verify(&paths, true);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
        let report = report(&run);
        for (file, case) in files.iter().zip(report["cases"].as_array().unwrap()) {
            assert_eq!(case["file"], file.to_str().unwrap());
            assert_eq!(case["name"], file.file_stem().unwrap().to_str().unwrap());
            let answers: Vec<_> = case["tensors"].as_array().unwrap().iter().map(|tensor| &tensor["name"]).collect();
            let tensors = CaseFile::golden(case["name"].as_str().unwrap()).tensors;
            assert_eq!(answers, tensors.keys().filter(|name| CaseFile::is_answer(name)).collect::<Vec<_>>());
        }
        assert_eq!(report["passed"], files.len());
        assert_eq!(report["failed"], 0);
    }
    for file in files {
        assert_eq!(verify([file], false).code, Some(0));
    }
}

/// The verdict of `wora verify --json` on a case with wrong answers.
fn failing_case(file: &CaseFile) -> Value {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("case.safetensors");
    std::fs::write(&path, file.bytes()).unwrap();
    let run = verify([&path], true);
    assert_eq!((run.code, run.stderr.as_str()), (Some(1), ""));
    assert_eq!(verify([&path], false).code, Some(1));
    let case = report(&run)["cases"][0].take();
    assert_eq!(case["verdict"], "fail");
    case
}

fn split_index(element: usize, shape: &[usize]) -> Vec<usize> {
    let strides = (0..shape.len()).map(|axis| shape[axis + 1..].iter().product::<usize>());
    strides.zip(shape).map(|(stride, length)| element / stride % length).collect()
}

#[test]
fn one_changed_element_fails_its_tensor_alone_and_is_found() {
    for golden in ["linear-full-norm-gradient", "linear-batched-3d-input", "linear-fan-in-fan-out"] {
        let right = CaseFile::golden(golden);
        for (name, (_, shape, _)) in right.tensors.iter().filter(|(name, _)| CaseFile::is_answer(name)) {
            let element = shape.iter().product::<usize>() * 2 / 3;
            let mut wrong = right.clone();
            wrong.add(name, element, 1e-9);
            let case = failing_case(&wrong);
            for tensor in case["tensors"].as_array().unwrap() {
                let verdict = if tensor["name"] == **name { "fail" } else { "pass" };
                assert_eq!(tensor["verdict"], verdict, "{golden}, {name} changed: {tensor}");
            }
            let tensor = case["tensors"].as_array().unwrap().iter().find(|tensor| tensor["name"] == **name).unwrap();
            assert_eq!(tensor["worst_index"], json!(split_index(element, shape)), "{golden}: {tensor}");
            let number = |field: &str| tensor[field].as_f64().unwrap();
            assert!((number("max_abs_error") - 1e-9).abs() < 1e-12, "{golden}: {tensor}");
            assert!((number("actual") - number("expected") - 1e-9).abs() < 1e-12, "{golden}: {tensor}");
            let relative = number("max_abs_error") / number("expected").abs();
            assert!(number("max_rel_error") >= relative * (1.0 - 1e-9), "{golden}: {tensor}");
        }
    }
}

#[test]
fn an_answer_that_is_no_number_fails_and_is_null_in_json() {
    for (name, value) in [("y", f64::NAN), ("grad.x", f64::INFINITY), ("weight_norm", -f64::INFINITY)] {
        let mut file = CaseFile::golden("linear-plain");
        file.put(name, 3, value);
        let case = failing_case(&file);
        let tensor = case["tensors"].as_array().unwrap().iter().find(|tensor| tensor["name"] == name).unwrap();
        assert_eq!(tensor["verdict"], "fail", "{tensor}");
        assert_eq!(tensor["worst_index"], json!(if name == "weight_norm" { vec![3] } else { vec![0, 3] }), "{tensor}");
        for field in ["actual", "max_abs_error", "max_rel_error"] {
            assert!(tensor[field].is_null(), "{field}: {tensor}");
        }
        assert!(tensor["expected"].is_number(), "{tensor}");
    }
}

#[test]
fn an_input_without_rows_is_judged() {
    let mut file = CaseFile::golden("linear-plain");
    for (name, (_, shape, data)) in &mut file.tensors {
        match name.as_str() {
            "x" | "y" | "grad.x" | "grad.y" => {
                shape[0] = 0;
                data.clear();
            }
            _ if name.starts_with("grad.") => data.fill(0),
            _ => {}
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("case.safetensors");
    std::fs::write(&path, file.bytes()).unwrap();
    let run = verify([&path], true);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{}", run.stdout);
    report(&run);
}
