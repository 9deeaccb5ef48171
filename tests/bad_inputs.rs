//! The table of bad inputs, `tests/bad_inputs.toml`, row by row: what `wora` says of each, word for word, and that it
//! leaves everything as it was.

// What the system says of a file that it cannot open is Unix's.
#![cfg(unix)]

use assert_cmd::Command;
use flate2::{Compression, write::GzEncoder};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the issue asks for.
const FEWEST_ROWS: usize = 60;
/// No row may take more memory, whatever its input claims: a refused allocation ends the process without a line.
const KIBIBYTES: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// `tests/bad_inputs.toml`, whose head says what the keys mean.
#[derive(Deserialize)]
struct Table {
    given: BTreeMap<String, File>,
    #[serde(flatten)]
    kinds: BTreeMap<String, Vec<Row>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: String,
    run: String,
    from: Option<String>,
    #[serde(default)]
    file: BTreeMap<String, File>,
    line: String,
    #[serde(default = "two")]
    code: i32,
}

fn two() -> i32 {
    2
}

#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum File {
    Text(String),
    Made(Box<Made>),
}

/// A file that is made: what it starts from, then what is changed, in this order.
#[derive(Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Made {
    of: Option<String>,
    hex: String,
    npy: Option<String>,
    header: Option<String>,
    text: Option<String>,
    times: Option<usize>,
    replace: Vec<[String; 2]>,
    metadata: Option<HashMap<String, String>>,
    settings: Option<String>,
    unset: Vec<String>,
    without: Vec<String>,
    tensors: BTreeMap<String, String>,
    put: BTreeMap<String, f64>,
    at: BTreeMap<String, String>,
    cut: Option<usize>,
    append: String,
    gzip: bool,
    absent: bool,
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn hexadecimal(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
    digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
}

/// Tensors that can be changed, and the metadata beside them.
struct Tensors {
    metadata: Option<HashMap<String, String>>,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Tensors {
    fn of(bytes: &[u8]) -> Self {
        if bytes.is_empty() {
            return Self { metadata: None, tensors: BTreeMap::new() };
        }
        let metadata =
            SafeTensors::read_metadata(bytes).expect("a safetensors file to be changed").1.metadata().clone();
        let views = SafeTensors::deserialize(bytes).unwrap().tensors().into_iter();
        let tensors = views.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())));
        Self { metadata, tensors: tensors.collect() }
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
        safetensors::serialize(views, self.metadata.clone()).unwrap()
    }

    fn edit_settings(&mut self, made: &Made) {
        let text = self.metadata.as_mut().and_then(|metadata| metadata.get_mut("wora_case")).expect("a case file");
        let mut settings: Map<String, Value> = serde_json::from_str(text).unwrap();
        for field in &made.unset {
            assert!(settings.remove(field).is_some(), "no setting {field}");
        }
        let more: Map<String, Value> =
            made.settings.as_ref().map_or_else(Map::new, |json| serde_json::from_str(json).unwrap());
        settings.extend(more);
        *text = serde_json::to_string(&settings).unwrap();
    }

    /// `F32 [5, 6]`, all halves, or all ones where the numbers are integers.
    fn fill(&mut self, name: &str, about: &str) {
        let (dtype, shape) = about.split_once(' ').expect("a type and a shape");
        let dtype: Dtype = serde_json::from_value(dtype.into()).unwrap();
        let shape: Vec<usize> = serde_json::from_str(shape).unwrap();
        let element = match dtype {
            Dtype::F64 => 0.5_f64.to_le_bytes().to_vec(),
            Dtype::F32 => 0.5_f32.to_le_bytes().to_vec(),
            Dtype::I64 => 1_i64.to_le_bytes().to_vec(),
            Dtype::I32 => 1_i32.to_le_bytes().to_vec(),
            other => vec![1; other.bitsize().div_ceil(8)],
        };
        let data = element.repeat(shape.iter().product());
        self.tensors.insert(name.into(), (dtype, shape, data));
    }

    /// `x[1, 2]`, or `x[1, *]`.
    fn put(&mut self, place: &str, value: f64) {
        let (name, index) = place.strip_suffix(']').and_then(|place| place.split_once('[')).expect("an index");
        let (dtype, shape, data) = self.tensors.get_mut(name).expect("a tensor");
        let index: Vec<Option<usize>> =
            index.split(", ").filter(|at| !at.is_empty()).map(|at| (at != "*").then(|| at.parse().unwrap())).collect();
        assert_eq!(index.len(), shape.len(), "{place} of {shape:?}");
        let bytes = match dtype {
            Dtype::F64 => value.to_le_bytes().to_vec(),
            Dtype::F32 => (value as f32).to_le_bytes().to_vec(),
            Dtype::I64 => (value as i64).to_le_bytes().to_vec(),
            other => panic!("{place}: {other} is not put"),
        };
        for (element, there) in data.chunks_mut(bytes.len()).enumerate() {
            let mut rest = element;
            let fits = index.iter().zip(&*shape).rev().all(|(at, length)| {
                let found = rest % length;
                rest /= length;
                at.is_none_or(|at| at == found)
            });
            if fits {
                there.copy_from_slice(&bytes);
            }
        }
    }
}

impl Made {
    fn starts_afresh(&self) -> bool {
        self.text.is_some() || self.npy.is_some() || self.header.is_some() || !self.hex.is_empty()
    }

    fn bytes(&self, there: Option<Vec<u8>>, given: &BTreeMap<String, File>) -> Vec<u8> {
        let mut bytes = match (&self.of, there) {
            (Some(name), _) if given.contains_key(name) => given[name].bytes(None, given),
            (Some(path), _) => std::fs::read(data().join(path)).unwrap_or_else(|error| panic!("{path}: {error}")),
            (None, Some(there)) if !self.starts_afresh() => there,
            (None, _) => vec![],
        };
        if let Some(text) = &self.text {
            bytes.extend(text.as_bytes());
        }
        if let Some(header) = &self.npy {
            let length = u16::try_from(header.len()).unwrap();
            bytes.extend([b"\x93NUMPY\x01\x00", &length.to_le_bytes()[..], header.as_bytes()].concat());
        }
        bytes.extend(hexadecimal(&self.hex));
        bytes = bytes.repeat(self.times.unwrap_or(1));
        if let Some(header) = &self.header {
            bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes].concat();
        }
        if !self.replace.is_empty() {
            let mut text = String::from_utf8(bytes).expect("a text to replace something in");
            for [from, to] in &self.replace {
                assert!(text.contains(from), "{from:?} is not there");
                text = text.replacen(from, to, 1);
            }
            bytes = text.into_bytes();
        }
        let changes = [&self.unset, &self.without].iter().any(|list| !list.is_empty()) || self.settings.is_some();
        if changes || self.metadata.is_some() || !self.tensors.is_empty() || !self.put.is_empty() {
            let mut tensors = Tensors::of(&bytes);
            tensors.metadata = self.metadata.clone().or(tensors.metadata);
            if self.settings.is_some() || !self.unset.is_empty() {
                tensors.edit_settings(self);
            }
            for name in &self.without {
                let before = tensors.tensors.len();
                let goes =
                    |tensor: &str| name.strip_suffix('*').map_or(tensor == name, |start| tensor.starts_with(start));
                tensors.tensors.retain(|tensor, _| !goes(tensor));
                assert!(tensors.tensors.len() < before, "no tensor {name}");
            }
            self.tensors.iter().for_each(|(name, about)| tensors.fill(name, about));
            self.put.iter().for_each(|(place, &value)| tensors.put(place, value));
            bytes = tensors.bytes();
        }
        for (place, hex) in &self.at {
            let (place, hex): (usize, _) = (place.parse().unwrap(), hexadecimal(hex));
            bytes[place..][..hex.len()].copy_from_slice(&hex);
        }
        if let Some(length) = self.cut {
            assert!(length < bytes.len(), "nothing is cut from {} bytes", bytes.len());
            bytes.truncate(length);
        }
        bytes.extend(hexadecimal(&self.append));
        if self.gzip {
            let mut packed = GzEncoder::new(vec![], Compression::fast());
            packed.write_all(&bytes).unwrap();
            bytes = packed.finish().unwrap();
        }
        bytes
    }
}

impl File {
    fn bytes(&self, there: Option<Vec<u8>>, given: &BTreeMap<String, File>) -> Vec<u8> {
        match self {
            Self::Text(text) => text.clone().into_bytes(),
            Self::Made(made) => made.bytes(there, given),
        }
    }

    fn write(&self, path: &Path, given: &BTreeMap<String, File>) {
        let there = std::fs::read(path).ok();
        if matches!(self, Self::Made(made) if made.absent) {
            return std::fs::remove_file(path).unwrap();
        }
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return std::fs::create_dir_all(path).unwrap();
        }
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, self.bytes(there, given)).unwrap();
    }
}

/// Everything in a directory: the bytes of its files.
fn contents(directory: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        }
        let bytes = path.is_file().then(|| std::fs::read(&path).unwrap());
        found.insert(path, bytes);
    }
    found
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            std::fs::copy(&path, to).unwrap();
        }
    }
}

/// Words between spaces, or between quotation marks.
fn words(command: &str) -> Vec<String> {
    let parts = command.split('"').enumerate();
    let words = parts.flat_map(|(nth, part)| match nth % 2 {
        0 => part.split(' ').filter(|word| !word.is_empty()).map(String::from).collect(),
        _ => vec![part.to_string()],
    });
    words.collect()
}

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn wora(directory: &Path, words: &[String]) -> Run {
    // A limit on addresses is known to work under Linux alone.
    let limit = if cfg!(target_os = "linux") { format!("ulimit -v {KIBIBYTES}; ") } else { String::new() };
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{limit}exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_wora")]).args(words);
    let output = command.env("RAYON_NUM_THREADS", "2").current_dir(directory).timeout(PATIENCE).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// What is wrong with how a row is taken; nothing if all is well.
fn complaints(row: &Row, given: &BTreeMap<String, File>) -> Vec<String> {
    let directory = tempfile::tempdir().unwrap();
    if let Some(from) = &row.from {
        copy(&data().join(from), directory.path());
    }
    for (name, file) in &row.file {
        file.write(&directory.path().join(name), given);
    }
    let before = contents(directory.path());
    let words = words(&row.run);
    let run = wora(directory.path(), &words);

    let mut complaints = vec![];
    let mut expect = |what: &str, expected: &str, found: &str| {
        if expected != found {
            complaints.push(format!("{what}\n    expected: {expected}\n    found:    {found}"));
        }
    };
    let code = |code: Option<i32>| code.map_or("none: it was ended".to_string(), |code| code.to_string());
    expect("standard error", &row.line, run.stderr.strip_suffix('\n').unwrap_or(&run.stderr));
    expect("exit code", &row.code.to_string(), &code(run.code));
    // A report says what became of every case, and so of one that cannot be judged.
    if words[0] == "verify"
        && words.len() == 2
        && !words[1].is_empty()
        && !words.iter().any(|word| word.starts_with("--"))
    {
        let (verdict, word) = if row.code == 2 { ("error", "ERROR") } else { ("fail", "FAIL") };
        expect("the last line of the table", "0 passed, 1 failed", run.stdout.lines().last().unwrap_or_default());
        expect("the table's verdict", word, if run.stdout.contains(word) { word } else { &run.stdout });
        let json = wora(directory.path(), &[&words[..], &["--json".into()]].concat());
        expect("standard error with --json", &run.stderr, &json.stderr);
        expect("exit code with --json", &row.code.to_string(), &code(json.code));
        let report: Value = serde_json::from_str(&json.stdout).unwrap_or_default();
        let case = &report["cases"][0];
        expect("verdict in JSON", verdict, case["verdict"].as_str().unwrap_or("none"));
        expect("cases in JSON", "1", &report["cases"].as_array().map_or(0, Vec::len).to_string());
        expect("file in JSON", &words[1], case["file"].as_str().unwrap_or("none"));
        if row.code == 2 {
            expect("tensors in JSON", "[]", &case["tensors"].to_string());
            let error = case["error"].as_str().unwrap_or("none");
            // JSON has its own way of writing what a terminal is spared.
            let plain = error.find(|c: char| !matches!(c, ' '..='~')).unwrap_or(error.len());
            let said = row.line.strip_prefix("wora: ").unwrap_or("none");
            let same = said.get(..plain) == Some(&error[..plain]) && error.chars().count() <= said.chars().count();
            expect("error in JSON", said, if same { said } else { error });
        }
    } else if words.iter().any(|word| word == "--merged") && run.stdout.contains("ERROR") {
        // The other weights are judged all the same.
        expect("the end of the table", ", 1 failed\n", &run.stdout[run.stdout.rfind(',').unwrap_or(0)..]);
    } else {
        expect("standard output", "", &run.stdout);
    }
    let after = contents(directory.path());
    let changed = |path: &&PathBuf| before.get(*path) != after.get(*path);
    let changed: BTreeSet<&PathBuf> = before.keys().chain(after.keys()).filter(changed).collect();
    let changed: Vec<_> =
        changed.iter().map(|path| path.strip_prefix(directory.path()).unwrap().display().to_string()).collect();
    expect("files that are changed, new or gone", "", &changed.join(", "));
    complaints
}

fn table() -> Table {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bad_inputs.toml");
    toml::from_str(&std::fs::read_to_string(path).unwrap())
        .unwrap_or_else(|error| panic!("tests/bad_inputs.toml: {error}"))
}

/// C1, C2, C3, C4, C5, C7, C9.
#[test]
fn every_bad_input_gets_its_line_and_leaves_everything_as_it_was() {
    let Table { given, kinds } = table();
    let rows: Vec<(&String, &Row)> =
        kinds.iter().flat_map(|(kind, rows)| rows.iter().map(move |row| (kind, row))).collect();
    assert!(rows.len() >= FEWEST_ROWS, "expected {FEWEST_ROWS} rows or more, found {}", rows.len());
    // Every row is tried, so that a change shows everything that it breaks.
    let failures: Vec<String> = rows
        .par_iter()
        .flat_map_iter(|(kind, row)| {
            // What is said of a row that cannot be made stands above.
            let complaints = std::panic::catch_unwind(|| complaints(row, &given));
            let complaints = complaints.unwrap_or_else(|_| vec!["the row cannot be made".into()]).into_iter();
            complaints.map(move |complaint| format!("{kind}, {}: wora {}\n  {complaint}", row.name, row.run))
        })
        .collect();
    assert!(failures.is_empty(), "\n{}\n{} of {} rows", failures.join("\n"), failures.len(), rows.len());
}

#[test]
fn no_two_rows_have_one_name_and_every_command_has_rows() {
    let Table { kinds, .. } = table();
    let mut commands = BTreeSet::new();
    for (kind, rows) in &kinds {
        let names: BTreeSet<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names.len(), rows.len(), "{kind}: a name that is there twice");
        commands.extend(rows.iter().map(|row| words(&row.run)[0].clone()));
        for row in rows {
            assert!(!row.line.chars().any(char::is_control), "{kind}, {}: a line that is none", row.name);
        }
    }
    let help = Command::new(env!("CARGO_BIN_EXE_wora")).arg("--help").output().unwrap().stdout;
    let help = String::from_utf8(help).unwrap();
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let listed: Vec<&str> =
        listed.filter_map(|line| line.split_whitespace().next()).filter(|&word| word != "help").collect();
    assert!(listed.len() > 8, "{help}");
    for command in listed {
        assert!(commands.contains(command), "wora {command} has no row");
    }
}
