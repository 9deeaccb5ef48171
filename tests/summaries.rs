//! What `wora verify` prints of a wrong case: the mistake, in every format, and tolerances that take the bound's place.

mod command;

use command::wora;
use std::path::Path;
use woracle::case::{Case, Tensor};
use woracle::mistakes::mistake;
use woracle::oracle::{CaseFile, Dtype};
use woracle::registry::{layer, mistaken};

/// linear-plain with the bias scaled, as a file; its name would break a line and a tag.
fn bias_scaled(directory: &Path) -> String {
    let linear = layer("linear").expect("linear");
    let mut case = linear.draw(&linear.specs()[0], 0);
    case.name = "a <b> | \"c\" & d".into();
    let theirs = mistaken(linear, &[mistake("bias-scaled").expect("an id")], &case).expect("results").expect("results");
    case.extend(theirs);
    let path = directory.join("case.safetensors");
    std::fs::write(&path, CaseFile::new(case, Dtype::F64).to_bytes()).expect("written");
    path.to_string_lossy().into_owned()
}

#[test]
fn every_format_names_the_mistake() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = bias_scaled(directory.path());
    for format in [&[][..], &["--json"], &["--markdown"], &["--junit"]] {
        let (code, stdout, stderr) = wora(&[&["verify", &path], format].concat());
        assert_eq!((code, stderr.as_str()), (Some(1), ""));
        for text in ["bias-scaled", "torchtune"] {
            assert!(stdout.contains(text), "{format:?}: {stdout}");
        }
    }
    let (_, json, _) = wora(&["verify", &path, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    let best = &json["cases"][0]["diagnosis"][0];
    assert_eq!((&best["id"], &best["residual"]), (&"bias-scaled".into(), &0.0.into()));
    assert!(best["runner_up_ratio"].as_f64().expect("a ratio") > 100.0 && best["title"].is_string(), "{best}");
    assert_eq!(json["cases"][0]["first_diverging"], "y");
}

#[test]
fn what_a_file_says_is_text_in_every_format() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = bias_scaled(directory.path());
    let (_, xml, _) = wora(&["verify", &path, "--junit"]);
    assert!(xml.contains("a &lt;b&gt; | &quot;c&quot; &amp; d") && !xml.contains("<b>"), "{xml}");
    let (_, markdown, _) = wora(&["verify", &path, "--markdown"]);
    assert!(markdown.contains("a \\<b\\> \\| \"c\" & d"), "{markdown}");
}

#[test]
fn a_tolerance_takes_the_place_of_the_bound() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = bias_scaled(directory.path());
    assert_eq!(wora(&["verify", &path, "--atol", "100"]).0, Some(0));
    assert_eq!(wora(&["verify", &path, "--rtol", "1e-9"]).0, Some(1));
    for wrong in [["--atol", "inf"], ["--rtol", "NaN"], ["--rtol", "much"]] {
        let (code, _, stderr) = wora(&["verify", &path, wrong[0], wrong[1]]);
        assert!(code == Some(2) && stderr.contains("expected a finite number, 0 or more"), "{stderr}");
    }
}

#[test]
fn what_a_file_does_not_answer_is_said() {
    let directory = tempfile::tempdir().expect("a directory");
    let linear = layer("linear").expect("linear");
    let mut case = linear.draw(&linear.specs()[0], 0);
    let mut right = linear.define(&case).expect("answers");
    right.remove("grad.lora_wora_alpha").expect("dalpha");
    case.extend(right);
    let path = directory.path().join("case.safetensors");
    std::fs::write(&path, CaseFile::new(case, Dtype::F64).to_bytes()).expect("written");
    let path = path.to_string_lossy();
    for format in [&[][..], &["--markdown"], &["--junit"]] {
        let (code, stdout, _) = wora(&[&["verify", &path], format].concat());
        let plain = stdout.replace('\\', ""); // Markdown's escapes
        assert!(code == Some(0) && plain.contains("not answered: grad.lora_wora_alpha"), "{format:?}: {stdout}");
    }
    let (_, json, _) = wora(&["verify", &path, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["cases"][0]["unanswered"], serde_json::json!(["grad.lora_wora_alpha"]));
}

#[test]
fn right_results_print_no_explanation() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/linear-plain.safetensors");
    let golden = golden.to_string_lossy();
    assert_eq!(wora(&["verify", &golden, "--markdown"]).1, "**1 passed, 0 failed**\n");
    let (code, xml, _) = wora(&["verify", &golden, "--junit"]);
    assert!(code == Some(0) && xml.contains("failures=\"0\" errors=\"0\"") && !xml.contains("<failure"), "{xml}");
}

#[test]
fn what_no_mistake_explains_is_said() {
    let directory = tempfile::tempdir().expect("a directory");
    let linear = layer("linear").expect("linear");
    let mut case = linear.draw(&linear.specs()[0], 0);
    let right = linear.define(&case).expect("answers");
    case.extend(right.into_iter().filter(|(name, _)| name == "y" || name.starts_with("grad.")).collect());
    let text = |case: Case| {
        let path = directory.path().join("case.safetensors");
        std::fs::write(&path, CaseFile::new(case, Dtype::F64).to_bytes()).expect("written");
        wora(&["verify", &path.to_string_lossy()])
    };
    let unexplained = "no known mistake, nor a pair of them, explains these numbers";
    let (code, right, _) = text(case.clone());
    assert!(code == Some(0) && !right.contains(unexplained), "{right}");
    let Some(Tensor::Float(y)) = case.tensors.get_mut("y") else { panic!("y") };
    y.iter_mut().zip(1..).for_each(|(y, number)| *y += 1.0 / f64::from(number * number));
    let (code, wrong, _) = text(case);
    assert!(code == Some(1) && wrong.contains(unexplained), "{wrong}");
    let (_, named, _) = wora(&["verify", &bias_scaled(directory.path())]);
    assert!(!named.contains(unexplained), "{named}");
}
