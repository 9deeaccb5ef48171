//! Merges a WoRA adapter into its base model: the merged model computes without the adapter what the two computed
//! together. Then unmerges it again, once from the numbers alone and once from a base that was kept.
//!
//! The model is that of tests/data/peft/linear-wora-pr2872, two linear layers with a ReLU between them, whose adapter
//! PEFT has written. Beside it lies what PEFT computed with the adapter.
//!
//! `cargo run --release --example merge_an_adapter`

use ndarray::{ArrayD, Zip};
use std::path::Path;
use woracle::operators::Linear;
use woracle::oracle::Dtype;
use woracle::peft::{self, Checkpoint, MODEL_FILE, MergeOptions, Model};
use woracle::tensor_file::TensorFile;
use woracle::wora::Layer;
use woracle::{Error, Result};

fn values(model: &Model, name: &str) -> Result<ArrayD<f64>> {
    Ok(model.tensor(name)?.0.values(name)?.0)
}

/// `max |one - other|`
fn distance(one: &ArrayD<f64>, other: &ArrayD<f64>) -> f64 {
    Zip::from(one).and(other).fold(0.0, |most, one, other| most.max((one - other).abs()))
}

fn relu(x: ArrayD<f64>) -> ArrayD<f64> {
    x.mapv(|x| x.max(0.0))
}

/// `y = x W^T + b`, as a model computes it that has never heard of adapters.
fn plain(model: &Model, module: &str, x: ArrayD<f64>) -> Result<ArrayD<f64>> {
    let x = x.into_dimensionality::<ndarray::Ix2>().expect("[rows, in]");
    let weight = values(model, &format!("{module}.weight"))?.into_dimensionality::<ndarray::Ix2>().expect("[out, in]");
    let y = x.dot(&weight.t());
    Ok(match values(model, &format!("{module}.bias")) {
        Ok(bias) => y.into_dyn() + bias,
        Err(_) => y.into_dyn(),
    })
}

fn main() -> Result<()> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/linear-wora-pr2872");
    let adapter = Checkpoint::open(&data.join("adapter"))?;
    let base = Model::open(&data.join(MODEL_FILE))?;
    let recorded = TensorFile::open(&data.join("io.safetensors"))?;
    let (x, theirs) = (recorded.values("x")?.0, recorded.values("y_adapted")?.0);

    // With the adapter beside the frozen weights.
    let fc1: Layer<Linear, f64> = peft::load(&adapter, &base, "fc1", Default::default())?;
    let fc2: Layer<Linear, f64> = peft::load(&adapter, &base, "fc2", Default::default())?;
    let hidden = relu(fc1.forward(x.view().into(), None)?.0);
    let adapted = fc2.forward(hidden.view().into(), None)?.0;
    println!("adapted, against what PEFT computed in f32: {:.1e}", distance(&adapted, &theirs));
    assert!(distance(&adapted, &theirs) < 1e-5);

    // Merged in f64: W' has all its digits, and computes the same but for the last of them.
    let directory = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
    let (wide, back) = (directory.path().join("wide"), directory.path().join("back"));
    let options = MergeOptions { dtype: Some(Dtype::F64), ..MergeOptions::default() };
    let changed = peft::merge(&base, std::slice::from_ref(&adapter), options, &wide, &|_| Ok(()))?;
    for tensor in &changed {
        println!("{}: {:?}", tensor.tensor, tensor.change);
    }
    let merged = Model::open(&wide)?;
    let weight = fc1.merge()?.weight;
    println!(
        "fc1.weight in the file, against W' of the layer: {:.1e}",
        distance(&values(&merged, "fc1.weight")?, &weight)
    );
    assert!(distance(&values(&merged, "fc1.weight")?, &weight) < 1e-15);
    let alone = plain(&merged, "fc2", relu(plain(&merged, "fc1", x.clone())?))?;
    let before = plain(&base, "fc2", relu(plain(&base, "fc1", x)?))?;
    println!("merged, against adapted:                         {:.1e}", distance(&alone, &adapted));
    println!("the base model, against adapted:                 {:.1e}", distance(&before, &adapted));
    assert!(distance(&alone, &adapted) < 1e-14 && distance(&before, &adapted) > 0.01);

    // Unmerged: W0 = (W' n / m - alpha s B A) / beta, with the norms n that merging wrote down beside the model.
    peft::unmerge(&wide, &adapter, &back, &|_| Ok(()))?;
    let original = values(&base, "fc1.weight")?;
    let restored = values(&Model::open(&back)?, "fc1.weight")?;
    println!("unmerged, against the base:                      {:.1e}", distance(&restored, &original));
    assert!(distance(&restored, &original) < 1e-7);

    // bf16 keeps 8 binary digits of W', and of W0 no more: whoever wants the base back from it keeps it.
    let (narrow, back) = (directory.path().join("narrow"), directory.path().join("kept"));
    let options = MergeOptions { dtype: Some(Dtype::Bf16), keep_base: true, ..MergeOptions::default() };
    peft::merge(&base, std::slice::from_ref(&adapter), options, &narrow, &|_| Ok(()))?;
    let lost = distance(&values(&Model::open(&narrow)?, "fc1.weight")?, &weight);
    peft::unmerge(&narrow, &adapter, &back, &|_| Ok(()))?;
    let restored = values(&Model::open(&back)?, "fc1.weight")?;
    println!("merged in bf16, against W':                      {lost:.1e}");
    println!("unmerged with the base that was kept:            {:.1e}", distance(&restored, &original));
    assert!(lost > 1e-4 && restored == original);
    Ok(())
}
