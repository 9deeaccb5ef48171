//! Verifies case files: what somebody's layer computed, against this crate's, element by element.
//!
//! Without an argument it plays both sides: a file of inputs is written, a layer written in a few lines answers it in
//! f32, once right and once with a classic mistake, and the answers are read back and judged. The wrong ones get a
//! diagnosis: which intermediate goes wrong first, and which known mistake explains the numbers.
//!
//! ```sh
//! cargo run --release --example verify_a_file
//! cargo run --release --example verify_a_file -- FILE_OR_DIRECTORY
//! ```

use ndarray::{Array1, Array2, ArrayD, Axis, Ix1, Ix2};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use woracle::case::{Case, Tensors};
use woracle::oracle::diagnose::{Diagnosis, judge};
use woracle::oracle::verify::{Tolerance, Verdict};
use woracle::oracle::{CaseFile, Dtype, case_file};
use woracle::wora::Config;
use woracle::{Error, Result, registry};

/// What the norm is taken of: V, or as in a mistake often made W0, which seems to be the same while B is zero.
#[derive(Clone, Copy)]
enum NormOf {
    Weighted,
    Base,
}

/// The layer under test: WoRA over a linear layer, in f32, from the tensors of a case. It knows nothing of this crate
/// but the names in the file.
fn answer(case: &Case, norm_of: NormOf) -> Result<Tensors> {
    let values = |name| Ok::<_, Error>(case.values(name)?.mapv(|value| value as f32));
    let matrix = |name| Ok::<_, Error>(values(name)?.into_dimensionality::<Ix2>().expect("a matrix"));
    let vector = |name| Ok::<_, Error>(values(name)?.into_dimensionality::<Ix1>().expect("a vector"));
    let (x, base, bias) = (matrix("x")?, matrix("base.weight")?, vector("base.bias")?); // [rows, in], [out, in], [out]
    let (a, b, m) = (matrix("lora_A")?, matrix("lora_B")?, vector("lora_magnitude_vector")?); // [r, in], [out, r], [out]
    let (alpha, beta) = (values("lora_wora_alpha")?[[]], values("lora_wora_beta")?[[]]);
    let scaling = case.settings::<Config>()?.scaling as f32;

    let weighted: Array2<f32> = &base * beta + b.dot(&a) * (alpha * scaling);
    let rows = match norm_of {
        NormOf::Weighted => &weighted,
        NormOf::Base => &*base,
    };
    let weight_norm: Array1<f32> = rows.map_axis(Axis(1), |row| row.dot(&row).sqrt());
    let gain = &m / &weight_norm;
    let merged: Array2<f32> = &weighted * &gain.view().insert_axis(Axis(1));
    let y = x.dot(&merged.t()) + bias;

    let wide = |values: ArrayD<f32>| values.mapv(f64::from);
    Ok(Tensors::from([
        ("weighted".to_string(), wide(weighted.into_dyn())),
        ("weight_norm".to_string(), wide(weight_norm.into_dyn())),
        ("gain".to_string(), wide(gain.into_dyn())),
        ("merged_weight".to_string(), wide(merged.into_dyn())),
        ("y".to_string(), wide(y.into_dyn())),
    ]))
}

/// Writes inputs and answers, as an implementation in any language would.
fn write(directory: &Path, name: &str, norm_of: NormOf) -> Result<PathBuf> {
    let linear = registry::layer("linear")?;
    let spec = linear.specs().iter().find(|spec| spec.name == "linear-plain").expect("the plain case");
    let mut case = linear.draw(spec, 0);
    let answers = answer(&case, norm_of)?;
    case.name = name.into();
    case.extend(answers);
    let path = directory.join(format!("{name}.safetensors"));
    std::fs::write(&path, CaseFile::new(case, Dtype::F32).to_bytes()).map_err(|error| Error::io(&path, &error))?;
    Ok(path)
}

/// Judges a file and prints what there is to say of it.
fn verify(path: &Path) -> Result<Option<Diagnosis>> {
    let file = case_file::read(path)?;
    let (tensors, diagnosis) = judge(&file, Tolerance::default()).map_err(|error| error.in_file(path))?;
    println!("{}", file.case.name);
    for tensor in &tensors {
        let verdict = match tensor.verdict {
            Verdict::Pass => "pass",
            Verdict::Fail => "FAIL",
            Verdict::Error => "ERROR",
        };
        let (name, error) = (&tensor.name, tensor.error_over_bound);
        println!("  {verdict} {name:<26} in {}: the largest error is {error:.1e} of its bound", tensor.dtype);
        if tensor.verdict != Verdict::Pass {
            let (at, expected, actual) = (&tensor.worst_index, tensor.expected, tensor.actual);
            println!("       at {at:?}: expected {expected:.6}, found {actual:.6}");
        }
    }
    if let Some(Diagnosis { first_diverging, candidates, facts, .. }) = &diagnosis {
        println!("  first diverging: {}", first_diverging.as_deref().unwrap_or("none"));
        for candidate in candidates {
            println!("  explained by {}: {} SPEC.md, section {}", candidate.id, candidate.title, candidate.section);
        }
        facts.iter().for_each(|fact| println!("  {fact}"));
    }
    Ok(diagnosis)
}

fn main() -> Result<ExitCode> {
    if let Some(path) = std::env::args_os().nth(1) {
        let mut passed = true;
        for file in case_file::find(Path::new(&path))? {
            passed &= verify(&file)?.is_none();
        }
        return Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let directory = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
    let right = verify(&write(directory.path(), "right", NormOf::Weighted)?)?;
    assert!(right.is_none());
    let wrong = verify(&write(directory.path(), "norm-of-the-base", NormOf::Base)?)?.expect("a diagnosis");
    assert_eq!(wrong.first_diverging.as_deref(), Some("weight_norm"));
    assert_eq!(wrong.candidates[0].ids, ["norm-of-base"]);
    Ok(ExitCode::SUCCESS)
}
