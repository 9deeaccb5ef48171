//! `wora` on files and arguments that are wrong: exit code 2, one line that says what, and no panic.
//! And on answers that are wrong, which is another thing: exit code 1.

use assert_cmd::cargo::cargo_bin_cmd;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::path::{Path, PathBuf};

const METADATA_KEY: &str = "wora_case";

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

    fn edit_settings(&mut self, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let json = self.metadata.get_mut(METADATA_KEY).unwrap();
        let mut settings = serde_json::from_str(json).unwrap();
        edit(&mut settings);
        *json = serde_json::to_string(&settings).unwrap();
    }
    fn set(&mut self, field: &str, value: impl Into<Value>) {
        self.edit_settings(|settings| drop(settings.insert(field.into(), value.into())));
    }
    fn unset(&mut self, field: &str) {
        self.edit_settings(|settings| assert!(settings.remove(field).is_some(), "{field}"));
    }
    fn raw_settings(&mut self, text: &str) {
        self.metadata.insert(METADATA_KEY.into(), text.into());
    }

    fn remove(&mut self, tensor: &str) {
        assert!(self.tensors.remove(tensor).is_some(), "{tensor}");
    }
    fn fill(&mut self, tensor: &str, shape: &[usize]) {
        self.encode(tensor, Dtype::F64, shape, &0.5_f64.to_le_bytes());
    }
    fn encode(&mut self, tensor: &str, dtype: Dtype, shape: &[usize], element: &[u8]) {
        let data = element.repeat(shape.iter().product());
        self.tensors.insert(tensor.into(), (dtype, shape.to_vec(), data));
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

/// What is wrong with how `wora verify PATH` takes a path that cannot be judged; nothing if all is well.
fn complaints(path: &Path, fragments: &[&str]) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut expect = |what: &str, expected: &dyn Debug, found: &dyn Debug| {
        let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
        if expected != found {
            complaints.push(format!("{what}: expected {expected}, found {found}"));
        }
    };
    let [plain, json] = [false, true].map(|json| verify([path], json));
    for run in [&plain, &json] {
        expect("exit code", &Some(2), &run.code);
        expect("lines on stderr", &1, &run.stderr.lines().count());
        let path = path.to_string_lossy();
        for fragment in fragments.iter().copied().chain([&*path]) {
            expect(&format!("{fragment:?} in {:?}", run.stderr), &true, &run.stderr.contains(fragment));
        }
    }
    if json.stdout.is_empty() {
        expect("stdout with --json", &"a report", &"nothing");
        return complaints;
    }
    let report = report(&json);
    expect("cases in JSON", &1, &report["cases"].as_array().unwrap().len());
    let case = &report["cases"][0];
    expect("verdict", &"error", &case["verdict"].as_str().unwrap());
    expect("file", &path.to_string_lossy(), &case["file"].as_str().unwrap());
    expect("tensors", &json!([]), &case["tensors"]);
    complaints
}

/// Every row is tried, so that a change shows everything that it breaks.
fn refuses(rows: impl IntoIterator<Item = (impl ToString, Vec<u8>, impl AsRef<[&'static str]>)>) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("case.safetensors");
    let mut failures = Vec::new();
    for (row, bytes, fragments) in rows {
        std::fs::write(&file, bytes).unwrap();
        let complaints = complaints(&file, fragments.as_ref());
        failures.extend(complaints.into_iter().map(|complaint| format!("{}: {complaint}", row.to_string())));
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

type Row = (&'static str, fn(&mut CaseFile), &'static [&'static str]);

/// Golden files with one thing changed.
fn refuses_changed(rows: &[(&str, Row)]) {
    refuses(rows.iter().map(|&(golden, (row, change, fragments))| {
        let mut file = CaseFile::golden(golden);
        assert_eq!(file.bytes().len(), golden_bytes(golden).len(), "a golden file survives being taken apart");
        change(&mut file);
        (row, file.bytes(), fragments)
    }));
}

fn refuses_plain(rows: &[Row]) {
    refuses_changed(&rows.iter().map(|&row| ("linear-plain", row)).collect::<Vec<_>>());
}

#[test]
fn a_file_cut_short_is_refused() {
    let whole = golden_bytes("linear-plain");
    let lengths = [0, 1, 4, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1];
    refuses(lengths.map(|length| (length, whole[..length].to_vec(), ["safetensors", "expected a whole file"])));
}

#[test]
fn the_line_about_a_file_cut_short_says_how_much_there_is() {
    refuses([("half", golden_bytes("linear-plain")[..2300].to_vec(), ["found 2300 bytes"])]);
}

#[test]
fn what_is_no_safetensors_file_is_refused() {
    let with_header = |header: &str| [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    let claiming = |length: u64| {
        let mut bytes = golden_bytes("linear-plain");
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        bytes
    };
    let longer = [golden_bytes("linear-plain"), vec![0; 8]].concat();
    let expected = ["safetensors", "expected a whole file"];
    refuses([
        ("a header of 4 TB", claiming(1 << 42), expected),
        ("a header of 2^64 - 1 bytes", claiming(u64::MAX), expected),
        ("a header of no bytes", claiming(0), expected),
        ("text", b"this is a text, and no safetensors file at all\n".repeat(20), expected),
        ("zeros", vec![0; 4096], expected),
        ("a header that is no JSON", with_header("{]"), expected),
        ("a header that is a list", with_header("[]"), expected),
        ("a header nested without end", with_header(&"[".repeat(100_000)), expected),
        ("bytes after the last tensor", longer, expected),
        (
            "a tensor of more elements than can be counted",
            with_header(r#"{"x":{"dtype":"F64","shape":[9223372036854775807,9],"data_offsets":[0,0]}}"#),
            expected,
        ),
        (
            "a tensor that ends before it starts",
            with_header(r#"{"x":{"dtype":"F64","shape":[1],"data_offsets":[8,0]}}"#),
            expected,
        ),
    ]);
}

#[test]
fn an_empty_tensor_whose_shape_no_memory_holds_is_refused() {
    let header = concat!(
        r#"{"__metadata__":{"wora_case":"{\"format\":1,\"layer\":\"linear\",\"scaling\":1}"},"#,
        r#""x":{"dtype":"F64","shape":[0,9223372036854775807,9],"data_offsets":[0,0]}}"#
    );
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    refuses([("x", bytes, ["x: expected"])]);
}

#[test]
fn metadata_that_is_not_that_of_a_case_is_refused() {
    refuses_plain(&[
        ("no metadata", |file| file.metadata.clear(), &["wora_case", "expected a metadata key", "found none"]),
        ("another key", |file| file.metadata = [("format".into(), "pt".into())].into(), &["wora_case", "found none"]),
        ("no JSON", |file| file.raw_settings("format=1"), &["wora_case", "expected a JSON object"]),
        ("empty", |file| file.raw_settings(""), &["wora_case", "expected a JSON object"]),
        ("a list", |file| file.raw_settings("[1]"), &["wora_case", "expected a JSON object"]),
        ("two objects", |file| file.raw_settings("{}{}"), &["wora_case", "expected a JSON object"]),
        ("nested without end", |file| file.raw_settings(&"[".repeat(100_000)), &["expected a JSON object"]),
        (
            "a number too large",
            |file| file.raw_settings(r#"{"format":1,"layer":"linear","scaling":1e999}"#),
            &["wora_case", "expected a JSON object", "out of range"],
        ),
        ("no format", |file| file.unset("format"), &["format", "found none"]),
        ("format 2", |file| file.set("format", 2), &["a format up to 1", "found format 2"]),
        ("format 0", |file| file.set("format", 0), &["a format up to 1", "found format 0"]),
        ("format -1", |file| file.set("format", -1), &["a format up to 1", "found format -1"]),
        ("format 1.5", |file| file.set("format", 1.5), &["a format up to 1", "found format 1.5"]),
        ("format \"1\"", |file| file.set("format", "1"), &["a format up to 1", "found format \"1\""]),
        ("no layer", |file| file.unset("layer"), &["expected a field \"layer\"", "found none"]),
        ("layer 3", |file| file.set("layer", 3), &["text in the field \"layer\"", "found 3"]),
        ("unknown layer", |file| file.set("layer", "quadratic"), &["layer: expected linear", "found \"quadratic\""]),
        ("name 3", |file| file.set("name", 3), &["text in the field \"name\"", "found 3"]),
    ]);
}

/// C4.
#[test]
fn settings_that_no_layer_has_are_refused() {
    refuses_plain(&[
        ("no scaling", |file| file.unset("scaling"), &["scaling"]),
        ("scaling null", |file| file.set("scaling", Value::Null), &["scaling", "null"]),
        ("scaling a text", |file| file.set("scaling", "twice"), &["scaling", "twice"]),
        ("norm_eps negative", |file| file.set("norm_eps", -0.5), &["norm_eps", "0 or more", "found -0.5"]),
        ("norm_eps a text", |file| file.set("norm_eps", "none"), &["norm_eps", "none"]),
        ("norm_gradient", |file| file.set("norm_gradient", "half"), &["norm_gradient", "half", "detached", "full"]),
        ("norm_axis", |file| file.set("norm_axis", "both"), &["norm_axis", "both", "output", "input"]),
        ("zero_norm", |file| file.set("zero_norm", "maybe"), &["zero_norm", "maybe", "error", "zero"]),
        ("method", |file| file.set("method", "qlora"), &["method", "qlora", "lora", "dora", "wora"]),
        ("fan_in_fan_out", |file| file.set("fan_in_fan_out", "yes"), &["fan_in_fan_out", "yes"]),
        ("tier", |file| file.set("tier", "Exact"), &["tier", "\"rounded\" or \"exact\"", "found \"Exact\""]),
        ("tier a number", |file| file.set("tier", 1), &["tier", "found 1"]),
    ]);
    refuses_changed(&[(
        "conv2d-plain",
        ("more outputs than memory", |file| file.set("padding", 30000), &["y: expected shape", "60005"]),
    )]);
}

#[test]
fn inputs_that_are_missing_are_named() {
    refuses_plain(&[
        ("x", |file| file.remove("x"), &[" x: expected a tensor, found none"]),
        ("base.weight", |file| file.remove("base.weight"), &[" base.weight: expected a tensor, found none"]),
        ("lora_A", |file| file.remove("lora_A"), &[" lora_A: expected a tensor, found none"]),
        ("lora_B", |file| file.remove("lora_B"), &[" lora_B: expected a tensor, found none"]),
        ("m", |file| file.remove("lora_magnitude_vector"), &[" lora_magnitude_vector: expected a tensor, found none"]),
        ("alpha", |file| file.remove("lora_wora_alpha"), &[" lora_wora_alpha: expected a tensor, found none"]),
        ("beta", |file| file.remove("lora_wora_beta"), &[" lora_wora_beta: expected a tensor, found none"]),
        ("grad.y", |file| file.remove("grad.y"), &[" grad.y: expected the cotangent", "found none"]),
        (
            "base.bias, though it has a gradient",
            |file| file.remove("base.bias"),
            &[" grad.base.bias: expected none", "linear"],
        ),
        (
            "every answer",
            |file| file.tensors.retain(|name, _| !CaseFile::is_answer(name)),
            &[" y: expected an answer", "found none"],
        ),
        ("every tensor", |file| file.tensors.clear(), &[": expected a tensor, found none"]),
    ]);
}

/// C1, C3.
#[test]
fn shapes_that_do_not_fit_are_refused() {
    refuses_plain(&[
        ("x too narrow", |file| file.fill("x", &[5, 6]), &[" x: expected shape [..., 7], found [5, 6]"]),
        ("x a scalar", |file| file.fill("x", &[]), &[" x: expected shape [..., 7], found []"]),
        ("x no features", |file| file.fill("x", &[5, 0]), &[" x: expected shape [..., 7], found [5, 0]"]),
        (
            "W0 with three axes",
            |file| file.fill("base.weight", &[6, 7, 1]),
            &[" base.weight: expected shape [out, in]", "found [6, 7, 1]"],
        ),
        ("W0 a scalar", |file| file.fill("base.weight", &[]), &[" base.weight: expected shape [out, in]", "found []"]),
        (
            "W0 without rows",
            |file| file.fill("base.weight", &[0, 7]),
            &[" base.weight: expected shape [out, in], neither 0, found [0, 7]"],
        ),
        (
            "W0 without columns",
            |file| file.fill("base.weight", &[6, 0]),
            &[" base.weight: expected shape [out, in], neither 0, found [6, 0]"],
        ),
        ("b", |file| file.fill("base.bias", &[7]), &[" base.bias: expected shape [6], found [7]"]),
        ("A transposed", |file| file.fill("lora_A", &[7, 3]), &[" lora_A: expected shape [7, 7], found [7, 3]"]),
        ("A with one axis", |file| file.fill("lora_A", &[7]), &[" lora_A: expected shape [7, 7], found [7]"]),
        ("A a scalar", |file| file.fill("lora_A", &[]), &[" lora_A: expected shape [rank, 7]", "found []"]),
        ("B transposed", |file| file.fill("lora_B", &[3, 6]), &[" lora_B: expected shape [6, 3], found [3, 6]"]),
        (
            "rank 0",
            |file| {
                file.fill("lora_A", &[0, 7]);
                file.fill("lora_B", &[6, 0]);
            },
            &[" lora_A: expected shape [rank, 7], rank 1 or more, found [0, 7]"],
        ),
        (
            "m one an input",
            |file| file.fill("lora_magnitude_vector", &[7]),
            &[" lora_magnitude_vector: expected shape [6], found [7]"],
        ),
        (
            "m a row",
            |file| file.fill("lora_magnitude_vector", &[1, 6]),
            &[" lora_magnitude_vector: expected shape [6], found [1, 6]"],
        ),
        ("alpha", |file| file.fill("lora_wora_alpha", &[1]), &[" lora_wora_alpha: expected shape [], found [1]"]),
        ("beta", |file| file.fill("lora_wora_beta", &[0]), &[" lora_wora_beta: expected shape [], found [0]"]),
        ("dy", |file| file.fill("grad.y", &[6, 5]), &[" grad.y: expected shape [5, 6], found [6, 5]"]),
        ("y", |file| file.fill("y", &[6, 5]), &[" y: expected shape [5, 6], found [6, 5]"]),
        ("y with one axis", |file| file.fill("y", &[30]), &[" y: expected shape [5, 6], found [30]"]),
        ("dA", |file| file.fill("grad.lora_A", &[7, 3]), &[" grad.lora_A: expected shape [3, 7], found [7, 3]"]),
        (
            "dalpha",
            |file| file.fill("grad.lora_wora_alpha", &[1]),
            &[" grad.lora_wora_alpha: expected shape [], found [1]"],
        ),
        ("norms", |file| file.fill("weight_norm", &[6, 1]), &[" weight_norm: expected shape [6], found [6, 1]"]),
        ("mask", |file| file.fill("dropout_mask", &[7, 5]), &[" dropout_mask: expected shape [5, 7], found [7, 5]"]),
        ("mask of a row", |file| file.fill("dropout_mask", &[7]), &[" dropout_mask: expected shape [5, 7], found [7]"]),
    ]);
}

#[test]
fn shapes_that_do_not_fit_other_settings_are_refused() {
    refuses_changed(&[
        (
            "linear-fan-in-fan-out",
            (
                "W0 with three axes",
                |file| file.fill("base.weight", &[7, 6, 1]),
                &[" base.weight: expected shape [in, out]", "found [7, 6, 1]"],
            ),
        ),
        (
            "linear-fan-in-fan-out",
            (
                "dW0 as if stored the usual way",
                |file| file.fill("grad.base.weight", &[6, 7]),
                &[" grad.base.weight: expected shape [7, 6], found [6, 7]"],
            ),
        ),
        (
            "linear-norm-per-input",
            (
                "m one an output",
                |file| file.fill("lora_magnitude_vector", &[6]),
                &[" lora_magnitude_vector: expected shape [7], found [6]"],
            ),
        ),
        (
            "linear-batched-3d-input",
            (
                "dy without the batch",
                |file| file.fill("grad.y", &[8, 6]),
                &[" grad.y: expected shape [2, 4, 6], found [8, 6]"],
            ),
        ),
        (
            "linear-dropout",
            (
                "mask",
                |file| file.fill("dropout_mask", &[5, 6]),
                &[" dropout_mask: expected shape [5, 7], found [5, 6]"],
            ),
        ),
    ]);
}

/// C2.
#[test]
fn numbers_that_are_not_finite_are_refused_in_inputs() {
    refuses_plain(&[
        ("x", |file| file.put("x", 9, f64::NAN), &[" x[1, 2]: expected a finite number, found NaN"]),
        ("W0", |file| file.put("base.weight", 41, -f64::INFINITY), &[" base.weight[5, 6]", "found -inf"]),
        ("b", |file| file.put("base.bias", 5, f64::NAN), &[" base.bias[5]", "found NaN"]),
        ("A", |file| file.put("lora_A", 7, f64::NAN), &[" lora_A[1, 0]", "found NaN"]),
        ("B", |file| file.put("lora_B", 4, f64::INFINITY), &[" lora_B[1, 1]: expected a finite number, found inf"]),
        ("m", |file| file.put("lora_magnitude_vector", 0, f64::NAN), &[" lora_magnitude_vector[0]", "found NaN"]),
        ("alpha", |file| file.put("lora_wora_alpha", 0, f64::NAN), &[" lora_wora_alpha[]", "found NaN"]),
        ("dy", |file| file.put("grad.y", 29, f64::NAN), &[" grad.y[4, 5]: expected a finite number, found NaN"]),
        (
            "what the oracle itself cannot hold in f64",
            |file| file.put("lora_wora_beta", 0, f64::MAX),
            &["expected a finite number, found inf"],
        ),
    ]);
}

#[test]
fn types_that_do_not_belong_are_refused() {
    refuses_plain(&[
        (
            "x of ids",
            |file| file.encode("x", Dtype::I64, &[5, 7], &1_i64.to_le_bytes()),
            &[" x: expected floating-point values, found integers"],
        ),
        (
            "A of integers",
            |file| file.encode("lora_A", Dtype::I32, &[3, 7], &1_i32.to_le_bytes()),
            &[" lora_A: expected floating-point values, found integers"],
        ),
        (
            "y of integers",
            |file| file.encode("y", Dtype::U8, &[5, 6], &[1]),
            &[" y: expected floating-point values, found integers"],
        ),
        (
            "f8",
            |file| file.encode("lora_B", Dtype::F8_E5M2, &[6, 3], &[0]),
            &[" lora_B: expected F64, F32, BF16 or F16", "found F8_E5M2"],
        ),
        ("complex", |file| file.encode("y", Dtype::C64, &[5, 6], &[0; 8]), &[" y: expected F64", "found C64"]),
        ("booleans", |file| file.encode("dropout_mask", Dtype::BOOL, &[5, 7], &[1]), &[" dropout_mask", "found BOOL"]),
    ]);
}

/// C7.
#[test]
fn tensors_that_no_case_has_are_refused() {
    refuses_plain(&[
        ("grad.foo", |file| file.fill("grad.foo", &[1]), &[" grad.foo: expected none", "linear"]),
        ("a name misspelt", |file| file.fill("lora_a", &[3, 7]), &[" lora_a: expected none", "linear"]),
        ("no name", |file| file.fill("", &[1]), &[": expected none", "linear"]),
        ("alpha beside DoRA", |file| file.set("method", "dora"), &[" grad.lora_wora_alpha: expected none"]),
    ]);
}

/// C5.
#[test]
fn a_unit_without_a_direction_is_named() {
    refuses_plain(&[(
        "row 2",
        |file| {
            (0..7).for_each(|column| file.put("base.weight", 2 * 7 + column, 0.0));
            (0..3).for_each(|column| file.put("lora_B", 2 * 3 + column, 0.0));
        },
        &[" weight_norm[2]: expected ||V|| > 0, found 0", "zero_norm"],
    )]);
}

#[test]
fn what_a_file_says_cannot_break_the_line() {
    refuses_plain(&[
        ("a tensor's name", |file| file.fill("grad.two\nlines", &[1]), &["expected none"]),
        ("a tensor's name, of a wrong type", |file| file.encode("a\nb", Dtype::C64, &[1], &[0; 8]), &["found C64"]),
        ("a layer", |file| file.set("layer", "line\near"), &["layer: expected linear"]),
        ("a setting", |file| file.set("norm_gradient", "de\ntached"), &["tached"]),
        ("a setting of another type", |file| file.set("scaling", "two\nlines"), &["lines"]),
        ("metadata", |file| file.raw_settings("{\n\"format\": 1,\n}"), &["expected a JSON object"]),
    ]);
}

#[test]
fn a_path_that_leads_nowhere_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let found = complaints(&directory.path().join("nothing.safetensors"), &["No such file"]);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn an_empty_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let found = complaints(directory.path(), &["expected at least one *.safetensors, found none"]);
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn arguments_that_select_nothing_are_refused() {
    let filter = wora(["check", "nothing-of-this-name"]);
    assert_eq!((filter.code, filter.stdout.as_str()), (Some(2), ""));
    assert_eq!(filter.stderr.lines().count(), 1, "{}", filter.stderr);
    assert!(filter.stderr.contains("FILTER") && filter.stderr.contains("nothing-of-this-name"), "{}", filter.stderr);
    for (args, fragment) in [
        (&["nonsense"][..], "nonsense"),
        (&[], "Usage"),
        (&["verify"], "PATH"),
        (&["verify", "--nonsense"], "--nonsense"),
    ] {
        let run = wora(args);
        assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{args:?}");
        assert!(run.stderr.contains(fragment), "{args:?}: {}", run.stderr);
    }
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
