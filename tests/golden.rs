//! `wora golden`: the same bytes everywhere, accepted by `wora verify`, and as the manifest says.

mod command;

use command::{wora, wora_on};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use woracle::mistakes::mistake;
use woracle::oracle::golden::{Manifest, Options, cases};
use woracle::oracle::verify::{Tolerance, Verdict, verify};
use woracle::oracle::{CaseFile, Dtype, case_file};
use woracle::registry::{layer, mistaken};

/// Every file of a directory.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("an entry").path());
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    entries.map(|path| (name(&path), std::fs::read(&path).expect("a file"))).collect()
}

#[test]
fn the_bytes_of_every_type_are_those_that_are_kept() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden.sha256");
    let mut lines = vec![];
    for dtype in Dtype::ALL {
        for case in cases("", Options { dtype, ..Options::default() }).expect("cases") {
            let (entry, _) = case.expect("a case");
            lines.push(format!("{}  {dtype}/{}", entry.sha256, entry.file));
        }
    }
    if std::env::var_os("WORA_KEEP").is_some() {
        std::fs::write(&kept, lines.join("\n") + "\n").expect("written");
    }
    let kept = std::fs::read_to_string(&kept).expect("the kept digests");
    let differing: Vec<_> = lines.iter().zip(kept.lines()).filter(|(now, kept)| now != kept).collect();
    assert_eq!((differing, lines.len()), (vec![], kept.lines().count()));
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/conv2d-exact.safetensors");
    let (_, bytes) = cases("conv2d-exact", Options::default()).expect("a case").next().expect("one").expect("a case");
    if std::env::var_os("WORA_KEEP").is_some() {
        std::fs::write(&kept, &bytes).expect("written");
    }
    assert!(bytes == std::fs::read(&kept).expect("a kept file"), "conv2d-exact");
}

#[test]
fn the_command_writes_the_same_files_on_any_number_of_threads() {
    let directory = tempfile::tempdir().expect("a directory");
    let out = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    for threads in [1, 3] {
        let (code, _, stderr) =
            wora_on(threads, &["golden", &out(&threads.to_string()), "linear-d", "--seed", "7", "--dtype", "bf16"]);
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
    }
    let written = files(&directory.path().join("1"));
    assert!(written == files(&directory.path().join("3")));
    let manifest: Value = serde_json::from_slice(&written["manifest.json"]).expect("JSON");
    assert_eq!(
        (&manifest["seed"], &manifest["dtype"], &manifest["answers"]),
        (&7.into(), &"BF16".into(), &true.into())
    );
    let listed = manifest["cases"].as_array().expect("cases");
    assert_eq!(listed.len() + 1, written.len(), "nothing else is left in the directory");
    for entry in listed {
        let bytes = &written[entry["file"].as_str().expect("a name")];
        let digest = <sha2::Sha256 as sha2::Digest>::digest(bytes);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(entry["sha256"], digest);
        assert!(!entry["why"].as_str().expect("why").is_empty());
    }
}

#[test]
fn every_written_case_passes_in_every_type_and_holds_every_stage() {
    for dtype in Dtype::ALL {
        let mut count = 0;
        for case in cases("", Options { dtype, seed: 3, answers: true }).expect("cases") {
            let (entry, bytes) = case.expect("a case");
            let file = case_file::parse(&bytes, "").expect("a case file");
            assert!(file.dtypes.values().all(|&of| of == dtype));
            for tensor in verify(&file, Tolerance::default()).expect("a verdict") {
                assert_eq!(tensor.verdict, Verdict::Pass, "{dtype} {}: {tensor:?}", entry.file);
            }
            for stage in ["weighted", "merged_weight", "y", "grad.base.weight"] {
                assert!(file.case.tensors.contains_key(stage), "{}: {stage}", entry.file);
            }
            count += 1;
        }
        assert!(count >= 125, "{dtype}: {count}");
    }
}

#[test]
fn a_blind_case_is_the_inputs_alone() {
    let [blind, whole] = [false, true].map(|answers| {
        let options = Options { answers, ..Options::default() };
        let (entry, bytes) = cases("conv1d-dropout", options).expect("a case").next().expect("one").expect("a case");
        (entry, case_file::parse(&bytes, "").expect("a case file").case)
    });
    let names: Vec<_> = blind.1.tensors.keys().map(String::as_str).collect();
    let inputs = [
        "base.bias",
        "base.weight",
        "dropout_mask",
        "grad.y",
        "lora_A",
        "lora_B",
        "lora_magnitude_vector",
        "lora_wora_alpha",
        "lora_wora_beta",
        "x",
    ];
    assert_eq!(names, inputs);
    assert!(inputs.iter().all(|name| blind.1.tensors[*name] == whole.1.tensors[*name]));
    assert_eq!((blind.0.catches, blind.1.settings), (whole.0.catches, whole.1.settings));
}

#[test]
fn a_case_catches_what_the_manifest_says_and_nothing_else() {
    let linear = layer("linear").expect("linear");
    for name in ["linear-plain", "linear-dropout-full", "linear-exact"] {
        let (entry, bytes) = cases(name, Options::default()).expect("a case").next().expect("one").expect("a case");
        let file = case_file::parse(&bytes, "").expect("a case file");
        assert!(entry.catches.len() > 20, "{:?}", entry.catches);
        for one in woracle::mistakes::MISTAKES.iter().filter(|mistake| mistake.layers.contains(&"linear")) {
            let theirs = mistaken(linear, &[mistake(one.id).expect("an id")], &file.case).expect("results");
            let caught = theirs.is_some_and(|theirs| {
                let mut case = file.case.clone();
                case.extend(theirs);
                let verdicts = verify(&CaseFile::new(case, Dtype::F64), Tolerance::default()).expect("a verdict");
                verdicts.iter().any(|tensor| tensor.verdict == Verdict::Fail)
            });
            assert_eq!(entry.catches.contains(&one.id), caught, "{name} {}", one.id);
        }
    }
}

#[test]
fn what_cannot_be_written_is_one_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("file");
    std::fs::write(&file, "").expect("written");
    let file = file.to_string_lossy().into_owned();
    for arguments in [&["golden", &file][..], &["golden", &format!("{file}2"), "no-such-case"]] {
        let (code, stdout, stderr) = wora(arguments);
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(2), "", 1), "{stderr}");
    }
}

#[test]
fn the_schemas_are_json_and_name_every_field() {
    let read = |name: &str| -> Value {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema").join(name);
        serde_json::from_str(&std::fs::read_to_string(path).expect("a schema")).expect("JSON")
    };
    let (entry, bytes) =
        cases("conv2d-everything-full", Options::default()).expect("a case").next().expect("one").expect("a case");
    let manifest = serde_json::to_value(Manifest::new(Options::default(), vec![entry])).expect("JSON");
    let schema = read("manifest.schema.json");
    let fields = |value: &Value| value.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
    assert_eq!(fields(&manifest), fields(&schema["properties"]));
    assert_eq!(fields(&manifest["cases"][0]), fields(&schema["properties"]["cases"]["items"]["properties"]));
    let settings = case_file::parse(&bytes, "").expect("a file").case.settings;
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("a.safetensors"), &bytes).expect("written");
    let (_, stdout, _) = wora(&["verify", &directory.path().to_string_lossy(), "--json"]);
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    let schema = read("report.schema.json");
    assert_eq!(fields(&report), fields(&schema["properties"]));
    let of_case = &schema["properties"]["cases"]["items"]["properties"];
    assert_eq!(fields(&report["cases"][0]), fields(of_case));
    assert_eq!(fields(&report["cases"][0]["tensors"][0]), fields(&of_case["tensors"]["items"]["properties"]));
    let schema = read("case.schema.json");
    for field in settings.keys() {
        assert!(schema["properties"].get(field).is_some(), "{field}");
    }
}

#[test]
fn a_directory_that_holds_other_cases_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let out = directory.path().to_string_lossy().into_owned();
    for case in ["linear-plain", "linear-plain"] {
        assert_eq!(wora(&["golden", &out, case]).0, Some(0), "the same cases may be written again");
    }
    let (code, stdout, stderr) = wora(&["golden", &out, "linear-dora"]);
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(2), "", 1));
    assert!(stderr.contains("linear-plain.safetensors"), "{stderr}");
    assert_eq!(files(directory.path()).len(), 2);
}

#[test]
fn a_large_file_is_read_as_it_was_written() {
    let linear = layer("linear").expect("linear");
    let mut case = linear.draw(&linear.specs()[0], 0);
    let values = ndarray::ArrayD::from_shape_fn(vec![1500, 1999], |at| (at[0] * 1999 + at[1]) as f64);
    case.extend(BTreeMap::from([("x".to_string(), values)]));
    let file = CaseFile::new(case, Dtype::F64);
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("large.safetensors");
    std::fs::write(&path, file.to_bytes()).expect("written");
    assert!(case_file::read(&path).expect("a case") == file, "expected the numbers that were written");
}
