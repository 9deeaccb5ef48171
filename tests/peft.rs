//! Adapters of the real PEFT (LoRA, DoRA) and of its pull request 2872 (WoRA), read, merged, unmerged and written.

mod command;

use command::wora;
use ndarray::{Array3, ArrayD, Axis, Ix2, IxDyn};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use woracle::operators::{Conv1d, Conv2d, Conv3d, ConvSettings, Embedding, Input, Linear, Operator};
use woracle::oracle::Dtype;
use woracle::peft::{self, AdapterConfig, Checkpoint, Kind, MergeOptions, Model, Module};
use woracle::wora::{Layer, Method, ZeroNorm};

const FIXTURES: [&str; 7] = [
    "linear-wora-pr2872",
    "text-dora",
    "text-dora-rank-pattern",
    "text-lora-rslora",
    "text-wora-pr2872",
    "vision-dora",
    "vision-wora-pr2872",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft").join(name)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Every tensor of a file: its type, its shape, its bytes.
type Tensors = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter();
    tensors.map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None::<HashMap<String, String>>).unwrap()).unwrap();
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn array(tensors: &Tensors, name: &str) -> ArrayD<f64> {
    let (_, shape, bytes) = &tensors[name];
    ArrayD::from_shape_vec(shape.clone(), f32s(bytes).into_iter().map(f64::from).collect()).unwrap()
}

/// A fixture merged by the library: the directory, and the merged weights.
fn merged(name: &str, options: MergeOptions) -> (TempDir, Tensors) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let (base, adapter) =
        (Model::open(&fixture(name).join("model.safetensors")), Checkpoint::open(&fixture(name).join("adapter")));
    peft::merge(&base.unwrap(), &[adapter.unwrap()], options, &out, &|_| Ok(())).unwrap();
    let merged = tensors(&out.join("model.safetensors"));
    (directory, merged)
}

/// An adapted weight in plain loops: W', and `g (|beta W0| + |alpha| s sum |B| |A|)` beside it, as stored; and each g.
fn by_hand(module: &Module, base: &ArrayD<f64>) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (rows, columns) = (module.shape[0], base.len() / module.shape[0]);
    let turned = matches!(module.kind, Kind::Embedding | Kind::LinearFanInFanOut);
    let (units, fan_in) = if turned { (columns, rows) } else { (rows, columns) };
    let matrix = |values: &ArrayD<f64>| values.view().into_dimensionality::<Ix2>().unwrap().to_owned();
    let (a, b) = (matrix(&module.adapter.lora_a), matrix(&module.adapter.lora_b));
    let scalar = |values: &Option<ArrayD<f64>>| values.as_ref().map_or(1.0, |values| values[IxDyn(&[])]);
    let (alpha, beta, s) = (scalar(&module.adapter.alpha), scalar(&module.adapter.beta), module.config.scaling);
    let stored = |unit: usize, j: usize| if turned { j * columns + unit } else { unit * columns + j };
    let flat: Vec<f64> = base.iter().copied().collect();
    let (mut merged, mut terms, mut gains) = (vec![0.0; flat.len()], vec![0.0; flat.len()], vec![]);
    for unit in 0..units {
        let mut squares = 0.0;
        for j in 0..fan_in {
            let products = (0..a.nrows()).map(|k| b[(unit, k)] * a[(k, j)]);
            let at = stored(unit, j);
            merged[at] = beta * flat[at] + alpha * s * products.clone().sum::<f64>();
            terms[at] = (beta * flat[at]).abs() + alpha.abs() * s * products.map(f64::abs).sum::<f64>();
            squares += merged[at] * merged[at];
        }
        let gain = module.adapter.magnitude.as_ref().map_or(1.0, |m| m[unit] / squares.sqrt());
        for j in 0..fan_in {
            merged[stored(unit, j)] *= gain;
            terms[stored(unit, j)] *= gain.abs();
        }
        gains.push(gain);
    }
    (merged, terms, gains)
}

#[test]
fn a_merge_is_the_definition_in_f64_rounded_once_and_pefts_is_close_to_it() {
    let mut compared = 0;
    for name in FIXTURES {
        let (_directory, ours) = merged(name, MergeOptions::default());
        let base_file = fixture(name).join("model.safetensors");
        let base = tensors(&base_file);
        let (model, adapter) =
            (Model::open(&base_file).unwrap(), Checkpoint::open(&fixture(name).join("adapter")).unwrap());
        let theirs =
            Some(fixture(name).join("merged.safetensors")).filter(|path| path.exists()).map(|path| tensors(&path));
        let adapted: Vec<String> = adapter.modules().map(|module| format!("{module}.weight")).collect();
        assert_eq!(ours.keys().collect::<Vec<_>>(), base.keys().collect::<Vec<_>>());
        for (tensor, bytes) in base.iter().filter(|(tensor, _)| !adapted.contains(tensor)) {
            assert!(ours[tensor] == *bytes, "{name}: {tensor} is not adapted");
        }
        for module in adapter.modules() {
            let module = Module::new(&adapter, &model, module, ZeroNorm::Error).unwrap();
            let (expected, terms, _) = by_hand(&module, &array(&base, &module.weight));
            let found = f32s(&ours[&module.weight].2);
            let rounded: Vec<f32> = expected.iter().map(|&value| value as f32).collect();
            assert_eq!(found, rounded, "{name}: {}", module.weight);
            let Some(theirs) = &theirs else { continue };
            for ((theirs, expected), terms) in f32s(&theirs[&module.weight].2).iter().zip(&expected).zip(&terms) {
                let bound = 8.0 * 2.0_f64.powi(-24) * terms;
                assert!(
                    (f64::from(*theirs) - expected).abs() <= bound,
                    "{name}: {}: {theirs} {expected}",
                    module.weight
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 3000, "{compared}");
}

/// What the modules of a fixture's model compute.
trait Network {
    fn apply<O: Operator>(&self, module: &str, settings: O::Settings, x: O::Input<'_, f64>) -> ArrayD<f64>;
}

fn settings(json: &str) -> ConvSettings {
    serde_json::from_str(json).unwrap()
}

/// Plain layers with the weights of a file.
struct Plain(Tensors);

impl Network for Plain {
    fn apply<O: Operator>(&self, module: &str, settings: O::Settings, x: O::Input<'_, f64>) -> ArrayD<f64> {
        let weight = array(&self.0, &format!("{module}.weight"));
        let operator = O::from_weight_shape(settings, weight.shape()).unwrap();
        let shape = operator.output_shape(&x).unwrap();
        let mut y: Array3<f64> = operator.apply(&x, &[operator.weight_matrix(weight.view())]).swap_remove(0);
        if self.0.contains_key(&format!("{module}.bias")) {
            let bias = array(&self.0, &format!("{module}.bias"));
            y.axis_iter_mut(Axis(1)).zip(&bias).for_each(|(mut channel, &bias)| channel += bias);
        }
        y.into_shape_with_order(shape).unwrap()
    }
}

/// Adapted layers of an adapter over a base, and plain ones where it has none.
struct Adapted {
    adapter: Checkpoint,
    base: Model,
    plain: Plain,
}

impl Network for Adapted {
    fn apply<O: Operator>(&self, module: &str, settings: O::Settings, x: O::Input<'_, f64>) -> ArrayD<f64> {
        if !self.adapter.modules().any(|adapted| adapted == module) {
            return self.plain.apply::<O>(module, settings, x);
        }
        let layer: Layer<O, f64> = peft::load(&self.adapter, &self.base, module, settings).unwrap();
        layer.forward(x, None).unwrap().0
    }
}

/// The models of `make_peft.py`.
fn output(name: &str, network: &impl Network, io: &Tensors) -> ArrayD<f64> {
    let relu = |values: ArrayD<f64>| values.mapv(|value| value.max(0.0));
    let mean = |values: ArrayD<f64>, axis: usize| values.mean_axis(Axis(axis)).unwrap();
    let linear = |module: &str, x: ArrayD<f64>| network.apply::<Linear>(module, Default::default(), x.into());
    match name.split('-').next().unwrap() {
        "linear" => linear("fc2", relu(linear("fc1", array(io, "x")))),
        "text" => {
            let (_, shape, bytes) = &io["x"];
            let ids = bytes.as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect();
            let ids = Input::<f64>::from_ids(ArrayD::from_shape_vec(shape.clone(), ids).unwrap()).unwrap();
            let embedded = network.apply::<Embedding>("embed", Default::default(), ids);
            let turned = embedded.permuted_axes(IxDyn(&[0, 2, 1])).as_standard_layout().into_owned();
            let convolved = network.apply::<Conv1d>("conv", settings(r#"{"padding":1}"#), turned.into());
            linear("fc2", relu(linear("fc1", mean(relu(convolved), 2))))
        }
        _ => {
            let volumes = network.apply::<Conv3d>("c3", settings(r#"{"padding":[0,1,1]}"#), array(io, "x").into());
            let images = mean(relu(volumes), 2);
            let images = network.apply::<Conv2d>("c2", settings(r#"{"stride":2,"padding":1}"#), images.into());
            linear("head", mean(mean(relu(images), 3), 2))
        }
    }
}

#[test]
fn merged_models_and_adapted_layers_compute_what_the_adapted_model_did() {
    for name in FIXTURES {
        let io = tensors(&fixture(name).join("io.safetensors"));
        let expected = array(&io, "y_adapted");
        let most = expected.iter().fold(0.0_f64, |most, y| most.max(y.abs()));
        let off = |found: ArrayD<f64>| (&found - &expected).iter().fold(0.0_f64, |worst, d| worst.max(d.abs()));
        let base = fixture(name).join("model.safetensors");
        let adapted = Adapted {
            adapter: Checkpoint::open(&fixture(name).join("adapter")).unwrap(),
            base: Model::open(&base).unwrap(),
            plain: Plain(tensors(&base)),
        };
        let of_merged = off(output(name, &Plain(merged(name, MergeOptions::default()).1), &io));
        let of_adapted = off(output(name, &adapted, &io));
        assert!(of_merged <= 1e-6 * most, "{name}, merged: off by {of_merged:e} of {most}");
        assert!(of_adapted <= 1e-6 * most, "{name}, adapted: off by {of_adapted:e} of {most}");
        let moved = off(output(name, &adapted.plain, &io));
        assert!(moved > 1e-2 * most, "{name}: the adapter changes what the model computes, by {moved:e}");
    }
}

#[test]
fn what_is_read_and_written_is_the_same_byte_for_byte() {
    for name in FIXTURES {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("adapter");
        let adapter = Checkpoint::open(&fixture(name).join("adapter")).unwrap();
        let one = |module: &str| (module.to_string(), (adapter.adapter(module).unwrap(), adapter.is_embedding(module)));
        peft::save(&out, adapter.config(), &adapter.modules().map(one).collect(), Dtype::F32).unwrap();
        let [ours, theirs] = [&out, &fixture(name).join("adapter")].map(|path| tensors(&path.join(peft::ADAPTER_FILE)));
        assert!(ours == theirs, "{name}: {:?} {:?}", ours.keys(), theirs.keys());
        let json = |path: &Path| -> Value {
            serde_json::from_str(&std::fs::read_to_string(path.join(peft::CONFIG_FILE)).unwrap()).unwrap()
        };
        assert_eq!(json(&out), json(&fixture(name).join("adapter")), "{name}");
        let copy = directory.path().join("copy");
        Checkpoint::open(&out).unwrap().write(&copy).unwrap();
        assert!(tensors(&copy.join(peft::ADAPTER_FILE)) == theirs, "{name}");
    }
}

#[test]
fn unmerging_restores_the_base_within_its_rounding_or_to_the_bit() {
    for name in FIXTURES {
        for keep_base in [false, true] {
            let (directory, merged) = merged(name, MergeOptions { keep_base, ..Default::default() });
            let (from, out) = (directory.path().join("out"), directory.path().join("base"));
            let adapter = Checkpoint::open(&fixture(name).join("adapter")).unwrap();
            peft::unmerge(&from, &adapter, &out, &|_| Ok(())).unwrap();
            let [restored, base] = [&out, &fixture(name)].map(|path| tensors(&path.join("model.safetensors")));
            assert!(restored != merged, "{name}");
            assert!(!keep_base || restored == base, "{name}");
            for tensor in base.keys() {
                let (ours, theirs) = (array(&restored, tensor), array(&base, tensor));
                let most = theirs.iter().fold(0.0_f64, |most, w| most.max(w.abs()));
                let worst = (&ours - &theirs).iter().fold(0.0_f64, |worst, d| worst.max(d.abs()));
                assert!(worst <= 4.0 * 2.0_f64.powi(-24) * most, "{name}: {tensor}: {worst:e} of {most}");
            }
        }
    }
}

#[test]
fn a_merged_model_that_has_been_changed_is_not_unmerged() {
    let (directory, _) = merged("text-dora", MergeOptions::default());
    let out = directory.path().join("out");
    let adapter = |name: &str| Checkpoint::open(&fixture(name).join("adapter")).unwrap();
    let base = directory.path().join("base");
    let error = peft::unmerge(&out, &adapter("text-dora-rank-pattern"), &base, &|_| Ok(())).unwrap_err().to_string();
    assert!(error.contains(peft::RECORD_FILE) && error.contains("another"), "{error}");
    edit(out.join("model.safetensors"), |all| all.get_mut("fc1.weight").unwrap().2[0] ^= 1);
    let error = peft::unmerge(&out, &adapter("text-dora"), &base, &|_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("fc1.weight") && error.contains("changed since"), "{error}");
    assert_eq!(entries(directory.path()), std::slice::from_ref(&out));
}

/// E79.
#[test]
fn several_adapters_are_each_merged_against_the_base() {
    let directory = tempfile::tempdir().unwrap();
    let adapters =
        ["text-dora", "text-dora-rank-pattern"].map(|name| Checkpoint::open(&fixture(name).join("adapter")).unwrap());
    let file = fixture("text-dora").join("model.safetensors");
    let base = Model::open(&file).unwrap();
    let out = directory.path().join("both");
    let options = MergeOptions { dtype: Some(Dtype::F64), keep_base: true, ..Default::default() };
    peft::merge(&base, &adapters, options, &out, &|_| Ok(())).unwrap();
    let merged = Model::open(&out).unwrap();
    let (both, _) = merged.tensor("fc1.weight").unwrap().0.values("fc1.weight").unwrap();
    let weight = array(&tensors(&file), "fc1.weight");
    let alone = adapters.each_ref().map(|adapter| {
        let module = Module::new(adapter, &base, "fc1", ZeroNorm::Error).unwrap();
        by_hand(&module, &weight).0
    });
    for (((found, one), other), w) in both.iter().zip(&alone[0]).zip(&alone[1]).zip(&weight) {
        assert!((found - (one + other - w)).abs() <= 1e-14, "{found} {one} {other} {w}");
    }
    peft::unmerge(&out, &adapters[0], &directory.path().join("base"), &|_| Ok(())).unwrap();
    assert!(tensors(&directory.path().join("base/model.safetensors"))["fc1.weight"] == tensors(&file)["fc1.weight"]);
}

#[test]
fn a_sharded_model_keeps_its_shards_and_its_companions() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    std::fs::create_dir(&model).unwrap();
    let all = tensors(&fixture("text-dora").join("model.safetensors"));
    let (mut map, mut shards) = (serde_json::Map::new(), [Tensors::new(), Tensors::new()]);
    for (nth, (name, tensor)) in all.iter().enumerate() {
        map.insert(name.clone(), json!(format!("part-{}.safetensors", nth % 2)));
        shards[nth % 2].insert(name.clone(), tensor.clone());
    }
    for (nth, shard) in shards.iter().enumerate() {
        write(&model.join(format!("part-{nth}.safetensors")), shard);
    }
    let index = json!({ "metadata": { "total_size": 1, "note": "kept" }, "weight_map": map });
    std::fs::write(model.join(peft::INDEX_FILE), index.to_string()).unwrap();
    std::fs::write(model.join("config.json"), "{}").unwrap();
    let adapter = text(&fixture("text-dora").join("adapter"));
    let (code, stdout, stderr) =
        wora(&["merge", "--base", &text(&model), "--adapter", &adapter, "--out", &text(&out), "--json"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap().as_array().unwrap().len(), 4);
    let (_directory, single) = merged("text-dora", MergeOptions::default());
    let mut found = tensors(&out.join("part-0.safetensors"));
    found.extend(tensors(&out.join("part-1.safetensors")));
    assert!(found == single);
    let written: Value = serde_json::from_str(&std::fs::read_to_string(out.join(peft::INDEX_FILE)).unwrap()).unwrap();
    let bytes: usize = single.values().map(|(_, _, bytes)| bytes.len()).sum();
    assert_eq!(written["metadata"], json!({ "total_size": bytes, "note": "kept" }));
    assert_eq!(written["weight_map"], index["weight_map"]);
    assert_eq!(std::fs::read_to_string(out.join("config.json")).unwrap(), "{}");
    let base = directory.path().join("base");
    let (code, _, stderr) = wora(&["unmerge", "--merged", &text(&out), "--adapter", &adapter, "--out", &text(&base)]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(base.join("config.json").exists() && base.join("part-1.safetensors").exists());
}

#[test]
fn prefixed_and_tied_weights_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let all = tensors(&fixture("text-dora").join("model.safetensors"));
    write(&path, &all.iter().map(|(name, tensor)| (format!("transformer.{name}"), tensor.clone())).collect());
    let adapter = Checkpoint::open(&fixture("text-dora").join("adapter")).unwrap();
    let out = directory.path().join("out");
    peft::merge(&Model::open(&path).unwrap(), &[adapter], MergeOptions::default(), &out, &|_| Ok(())).unwrap();
    let (_directory, plain) = merged("text-dora", MergeOptions::default());
    let found = tensors(&out.join("model.safetensors"));
    assert!(plain.iter().all(|(name, tensor)| found[&format!("transformer.{name}")] == *tensor));

    // An output layer that shares the input embedding's tensor gets one of its own.
    let (adapter_directory, base) = (directory.path().join("adapter"), directory.path().join("base"));
    let tied: Tensors = BTreeMap::from([("model.embed_tokens.weight".into(), all["fc1.weight"].clone())]);
    std::fs::create_dir(&base).unwrap();
    write(&base.join("model.safetensors"), &tied);
    let says = |tied: bool| json!({ "vocab_size": 20, "tie_word_embeddings": tied });
    std::fs::write(base.join("config.json"), says(true).to_string()).unwrap();
    std::fs::create_dir(&adapter_directory).unwrap();
    let file = tensors(&fixture("text-dora").join("adapter").join(peft::ADAPTER_FILE)).into_iter();
    let of_head =
        file.filter_map(|(name, tensor)| name.contains(".fc1.").then(|| (name.replace("fc1", "lm_head"), tensor)));
    write(&adapter_directory.join(peft::ADAPTER_FILE), &of_head.collect());
    let config = fixture("text-dora").join("adapter").join(peft::CONFIG_FILE);
    std::fs::copy(config, adapter_directory.join(peft::CONFIG_FILE)).unwrap();
    let (adapter, out) = (Checkpoint::open(&adapter_directory).unwrap(), directory.path().join("tied"));
    peft::merge(&Model::open(&base).unwrap(), &[adapter], MergeOptions::default(), &out, &|_| Ok(())).unwrap();
    let said = |directory: &Path| -> Value {
        serde_json::from_slice(&std::fs::read(directory.join("config.json")).unwrap()).unwrap()
    };
    assert_eq!(said(&out), says(false));
    let found = tensors(&out.join("model.safetensors"));
    assert!(found["model.embed_tokens.weight"] == tied["model.embed_tokens.weight"]);
    assert!(found["lm_head.weight"] == plain["fc1.weight"]);
    let adapter = Checkpoint::open(&adapter_directory).unwrap();
    peft::unmerge(&out, &adapter, &directory.path().join("untied"), &|_| Ok(())).unwrap();
    assert!(tensors(&directory.path().join("untied/model.safetensors")) == tied);
    assert_eq!(said(&directory.path().join("untied")), says(true));
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn tensor(shape: &[usize], values: &[f32]) -> (safetensors::Dtype, Vec<usize>, Vec<u8>) {
    (safetensors::Dtype::F32, shape.to_vec(), floats(values))
}

#[test]
fn a_bias_of_b_a_replaced_module_and_stored_transposes_are_merged() {
    let directory = tempfile::tempdir().unwrap();
    let adapter_directory = directory.path().join("adapter");
    std::fs::create_dir(&adapter_directory).unwrap();
    let model: Tensors = BTreeMap::from([
        ("h.c_attn.weight".into(), tensor(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        ("h.c_attn.bias".into(), tensor(&[3], &[1.0, 1.0, 1.0])),
        ("score.weight".into(), tensor(&[1, 2], &[7.0, 8.0])),
    ]);
    write(&directory.path().join("model.safetensors"), &model);
    let adapter: Tensors = BTreeMap::from([
        ("base_model.model.h.c_attn.lora_A.weight".into(), tensor(&[1, 2], &[1.0, -1.0])),
        ("base_model.model.h.c_attn.lora_B.weight".into(), tensor(&[3, 1], &[1.0, 2.0, 0.5])),
        ("base_model.model.h.c_attn.lora_B.bias".into(), tensor(&[3], &[0.5, 0.0, -1.0])),
        ("base_model.model.score.weight".into(), tensor(&[1, 2], &[-1.0, -2.0])),
    ]);
    write(&adapter_directory.join(peft::ADAPTER_FILE), &adapter);
    let config = r#"{"peft_type":"LORA","r":1,"lora_alpha":2,"lora_bias":true,"modules_to_save":["score"]}"#;
    std::fs::write(adapter_directory.join(peft::CONFIG_FILE), config).unwrap();
    let (base, out) = (Model::open(&directory.path().join("model.safetensors")).unwrap(), directory.path().join("out"));
    let open = || Checkpoint::open(&adapter_directory).unwrap();
    peft::merge(&base, &[open()], MergeOptions::default(), &out, &|_| Ok(())).unwrap();
    let found = tensors(&out.join("model.safetensors"));
    // W0 [in, out] + s (B A)^T, s = 2.
    assert_eq!(f32s(&found["h.c_attn.weight"].2), [3.0, 6.0, 4.0, 2.0, 1.0, 5.0]);
    assert_eq!(f32s(&found["h.c_attn.bias"].2), [2.0, 1.0, -1.0]);
    assert_eq!(f32s(&found["score.weight"].2), [-1.0, -2.0]);
    let error = peft::unmerge(&out, &open(), &directory.path().join("base"), &|_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("score.weight") && error.contains("--keep-base"), "{error}");
    let kept = directory.path().join("kept");
    peft::merge(&base, &[open()], MergeOptions { keep_base: true, ..Default::default() }, &kept, &|_| Ok(())).unwrap();
    peft::unmerge(&kept, &open(), &directory.path().join("base"), &|_| Ok(())).unwrap();
    assert!(tensors(&directory.path().join("base/model.safetensors")) == model);
}

#[test]
fn somebodys_merge_is_judged_and_diagnosed() {
    let directory = tempfile::tempdir().unwrap();
    let judge = |name: &str, merged: &Path| {
        let (base, adapter) = (text(&fixture(name).join("model.safetensors")), text(&fixture(name).join("adapter")));
        let (code, stdout, stderr) =
            wora(&["verify", "--adapter", &adapter, "--base", &base, "--merged", &text(merged), "--json"]);
        assert_eq!(stderr, "", "{name}");
        (code, serde_json::from_str::<Value>(&stdout).unwrap())
    };
    for name in FIXTURES {
        let theirs = fixture(name).join("merged.safetensors");
        if theirs.exists() {
            let (code, report) = judge(name, &theirs);
            assert_eq!(code, Some(0), "PEFT's own merge of {name}: {report}");
        }
        let (ours, _) = merged(name, MergeOptions::default());
        assert_eq!(judge(name, &ours.path().join("out")).0, Some(0), "{name}");
    }
    let (_ours, mut wrong) = merged("text-dora", MergeOptions::default());
    let base = tensors(&fixture("text-dora").join("model.safetensors"));
    // m left out of one weight, and a bias changed that nobody adapts.
    let adapter = Checkpoint::open(&fixture("text-dora").join("adapter")).unwrap();
    let model = Model::open(&fixture("text-dora").join("model.safetensors")).unwrap();
    let mut module = Module::new(&adapter, &model, "fc1", ZeroNorm::Error).unwrap();
    module.adapter.magnitude = module.adapter.magnitude.map(|m| ArrayD::ones(m.raw_dim()));
    let (weight, ..) = by_hand(&module, &array(&base, "fc1.weight"));
    wrong.get_mut("fc1.weight").unwrap().2 = floats(&weight.iter().map(|&w| w as f32).collect::<Vec<_>>());
    wrong.get_mut("fc2.bias").unwrap().2[0] ^= 1;
    let path = directory.path().join("wrong.safetensors");
    write(&path, &wrong);
    let (code, report) = judge("text-dora", &path);
    assert_eq!(code, Some(1));
    let cases = report["cases"].as_array().unwrap();
    let failed: Vec<_> = cases.iter().filter(|case| case["verdict"] == "fail").collect();
    assert_eq!(failed.iter().map(|case| case["name"].as_str().unwrap()).collect::<Vec<_>>(), ["fc1", "fc2.bias"]);
    assert_eq!(failed[0]["diagnosis"][0]["id"], "magnitude-dropped");
}

/// E80.
#[test]
fn an_adapter_is_inspected_with_its_base_and_without() {
    for name in FIXTURES {
        let (base, adapter) = (text(&fixture(name).join("model.safetensors")), text(&fixture(name).join("adapter")));
        let (code, stdout, _) = wora(&["inspect", &adapter, "--base", &base, "--json"]);
        assert_eq!(code, Some(0), "{name}");
        let reports: Value = serde_json::from_str(&stdout).unwrap();
        let checkpoint = Checkpoint::open(Path::new(&adapter)).unwrap();
        let (modules, model) = (checkpoint.modules().collect::<Vec<_>>(), Model::open(Path::new(&base)).unwrap());
        let reports = reports.as_array().unwrap();
        assert_eq!(reports.iter().map(|report| report["module"].as_str().unwrap()).collect::<Vec<_>>(), modules);
        let file = tensors(&fixture(name).join("model.safetensors"));
        for (report, module) in reports.iter().zip(&modules) {
            let module = Module::new(&checkpoint, &model, module, ZeroNorm::Error).unwrap();
            let w = array(&file, &module.weight);
            let (merged, _, gains) = by_hand(&module, &w);
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let change = norm(&mut merged.iter().zip(&w).map(|(m, w)| m - w)) / norm(&mut w.iter().copied());
            let said = report["change_over_base"].as_f64().unwrap();
            assert!((said - change).abs() <= 1e-12 * change, "{name} {}: {said} {change}", module.name);
            let (effective, rank) = (report["effective_rank"].as_f64().unwrap(), report["rank"].as_f64().unwrap());
            assert!(effective >= 1.0 && effective <= rank + 1e-9, "{name} {}: {effective} of {rank}", module.name);
            assert_eq!(report["gains"].is_null(), module.config.method == Method::Lora);
            if module.config.method != Method::Lora {
                let [least, most]: [f64; 2] = serde_json::from_value(report["gains"].clone()).unwrap();
                let (low, high) = gains.iter().fold((f64::INFINITY, 0f64), |(a, b), &gain| (a.min(gain), b.max(gain)));
                let off = (least / low - 1.0).abs().max((most / high - 1.0).abs());
                assert!(off < 1e-12, "{name} {}: {least} to {most}, expected {low} to {high}", module.name);
            }
            assert_eq!(report["zero_norm_units"], 0);
        }
        let (code, stdout, _) = wora(&["inspect", &adapter]);
        assert!(code == Some(0) && modules.iter().all(|module| stdout.contains(module)), "{name}: {stdout}");
    }
}

#[test]
fn patterns_are_tried_in_the_order_of_the_file_and_what_is_not_understood_is_told() {
    let with = |fields: Value| {
        let mut all = json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 4 });
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        AdapterConfig::parse(&all.to_string())
    };
    let patterns = json!({ "b": 8, "a.*": 16 });
    let config = with(
        json!({ "use_rslora": true, "rank_pattern": patterns, "target_modules": "all-linear", "lora_alpha": 4.5 }),
    );
    let config = config.unwrap();
    assert_eq!((config.rank("x.b"), config.rank("ab"), config.rank("c")), (8, 16, 2));
    assert_eq!(config.scaling("x.a1").unwrap(), 4.5 / 4.0);
    // The first that fits, in the order of the file and not of the alphabet.
    let text = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"rank_pattern":{"z|fc":3,"fc":5}}"#;
    assert_eq!(AdapterConfig::parse(text).unwrap().rank("fc"), 3);
    assert!(with(json!({ "use_bdlora": { "a": 1 }, "unknown": false })).unwrap().warnings()[0].contains("use_bdlora"));
    let off =
        json!({ "unknown": false, "loftq_config": {}, "count": 0, "name": "", "list": [], "fields": {}, "none": null });
    assert_eq!(with(off).unwrap().warnings(), [""; 0]);
    for on in [json!(true), json!(0.5), json!("name"), json!([0]), json!({ "a": 0 })] {
        assert_eq!(with(json!({ "unknown": on })).unwrap().warnings().len(), 1, "{on}");
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries
}

fn edit(path: PathBuf, change: impl FnOnce(&mut Tensors)) {
    let mut all = tensors(&path);
    change(&mut all);
    write(&path, &all);
}

/// A copy of a fixture, to be changed.
struct Copy(TempDir);

impl Copy {
    fn of(name: &str) -> Self {
        let copy = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(copy.at("adapter")).unwrap();
        std::fs::copy(fixture(name).join("model.safetensors"), copy.model()).unwrap();
        for file in [peft::ADAPTER_FILE, peft::CONFIG_FILE] {
            std::fs::copy(fixture(name).join("adapter").join(file), copy.at("adapter").join(file)).unwrap();
        }
        copy
    }
    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    fn model(&self) -> PathBuf {
        self.at("model.safetensors")
    }
    fn adapter(&self) -> PathBuf {
        self.at("adapter").join(peft::ADAPTER_FILE)
    }
    /// Makes the second unit of fc1 zero, so that it has no direction.
    fn zero_unit(&self) {
        edit(self.model(), |all| all.get_mut("fc1.weight").unwrap().2[64..128].fill(0));
        edit(self.adapter(), |all| all.get_mut("base_model.model.fc1.lora_B.weight").unwrap().2[16..32].fill(0));
    }
    fn merge(&self, out: &str, more: &[&str]) -> (Option<i32>, String, String) {
        let base = if self.model().exists() { self.model() } else { self.0.path().into() };
        let (base, adapter, out) = (text(&base), text(&self.at("adapter")), text(&self.at(out)));
        wora(&[&["merge", "--base", &base, "--adapter", &adapter, "--out", &out], more].concat())
    }
}

#[test]
fn a_type_that_does_not_hold_the_result_is_refused_and_zero_rows_are_allowed() {
    let copy = Copy::of("text-dora");
    let before = entries(copy.0.path());
    edit(copy.model(), |all| all.get_mut("fc2.bias").unwrap().2[4..8].copy_from_slice(&1e6_f32.to_le_bytes()));
    let (code, _, stderr) = copy.merge("half", &["--dtype", "f16"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("fc2.bias") && stderr.contains("f16") && stderr.contains("1e6"), "{stderr}");
    assert_eq!(entries(copy.0.path()), before, "nothing is left");
    assert_eq!(copy.merge("bf16", &["--dtype", "bf16"]).0, Some(0));
    let half = tensors(&copy.at("bf16/model.safetensors"));
    assert!(half.values().all(|(dtype, ..)| *dtype == safetensors::Dtype::BF16));
    copy.zero_unit();
    let (code, _, stderr) = copy.merge("zero", &["--zero-norm", "zero"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let found = tensors(&copy.at("zero/model.safetensors"));
    assert!(found["fc1.weight"].2[64..128].iter().all(|&byte| byte == 0));
}

/// A base and an adapter, written by hand: LoRA of rank 1 with lora_alpha 1, and these fields beside.
fn by_hand_in(
    directory: &Path,
    base: &[(&str, &[usize], &[f32])],
    adapter: &[(&str, &[usize], &[f32])],
    fields: Value,
) {
    let all = |list: &[(&str, &[usize], &[f32])]| {
        list.iter().map(|(name, shape, values)| (name.to_string(), tensor(shape, values))).collect::<Tensors>()
    };
    write(&directory.join("model.safetensors"), &all(base));
    std::fs::create_dir_all(directory.join("adapter")).unwrap();
    write(&directory.join("adapter").join(peft::ADAPTER_FILE), &all(adapter));
    let mut config = json!({ "peft_type": "LORA", "r": 1, "lora_alpha": 1 });
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    std::fs::write(directory.join("adapter").join(peft::CONFIG_FILE), config.to_string()).unwrap();
}

/// What merging into `out` says, and what is there then.
fn merge_in(directory: &Path, out: &str, options: MergeOptions) -> Result<Tensors, String> {
    let base = Model::open(&directory.join("model.safetensors")).map_err(|error| error.to_string())?;
    let adapter = Checkpoint::open(&directory.join("adapter")).map_err(|error| error.to_string())?;
    let merged = peft::merge(&base, &[adapter], options, &directory.join(out), &|_| Ok(()));
    merged.map_err(|error| error.to_string())?;
    Ok(tensors(&directory.join(out).join("model.safetensors")))
}

#[test]
fn a_shared_tensor_that_is_replaced_or_saved_beside_its_adapter_is_written_once() {
    let directory = tempfile::tempdir().unwrap();
    let embed: &[f32] = &[1.0, 2.0, 3.0, 4.0];
    let base: [(&str, &[usize], &[f32]); 2] =
        [("model.embed_tokens.weight", &[2, 2], embed), ("model.q.weight", &[2, 2], &[0.0; 4])];
    let head: (&str, &[usize], &[f32]) = ("base_model.model.lm_head.weight", &[2, 2], &[5.0, 6.0, 7.0, 8.0]);
    by_hand_in(directory.path(), &base, &[head], json!({ "modules_to_save": ["lm_head"] }));
    let merged = merge_in(directory.path(), "replaced", MergeOptions::default()).unwrap();
    assert_eq!(f32s(&merged["lm_head.weight"].2), [5.0, 6.0, 7.0, 8.0]);
    assert_eq!(f32s(&merged["model.embed_tokens.weight"].2), embed);
    // PEFT saves the base's own weight of an adapted embedding or head beside the adapter.
    let of_head = |end: &str| format!("base_model.model.lm_head.{end}");
    let [a, b, w] = [of_head("lora_A.weight"), of_head("lora_B.weight"), of_head("base_layer.weight")];
    let adapter: [(&str, &[usize], &[f32]); 3] =
        [(&a, &[1, 2], &[1.0, 1.0]), (&b, &[2, 1], &[1.0, 2.0]), (&w, &[2, 2], embed)];
    by_hand_in(directory.path(), &base, &adapter, json!({}));
    let merged = merge_in(directory.path(), "adapted", MergeOptions::default()).unwrap();
    assert_eq!(f32s(&merged["lm_head.weight"].2), [2.0, 3.0, 5.0, 6.0]);
    assert_eq!(f32s(&merged["model.embed_tokens.weight"].2), embed);
}

#[test]
fn a_module_is_not_taken_for_another_that_ends_alike() {
    let directory = tempfile::tempdir().unwrap();
    let base: [(&str, &[usize], &[f32]); 1] = [("head.weight", &[2, 2], &[0.0; 4])];
    let (row, column): (&[f32], &[f32]) = (&[1.0, 1.0], &[1.0, 2.0]);
    let aux: [(&str, &[usize], &[f32]); 2] =
        [("aux.head.lora_A.weight", &[1, 2], row), ("aux.head.lora_B.weight", &[2, 1], column)];
    by_hand_in(directory.path(), &base, &aux, json!({}));
    let error = merge_in(directory.path(), "out", MergeOptions::default()).unwrap_err();
    assert!(error.contains("aux.head.weight") && error.contains("found none"), "{error}");
    let head: [(&str, &[usize], &[f32]); 2] =
        [("head.lora_A.weight", &[1, 2], row), ("head.lora_B.weight", &[2, 1], column)];
    by_hand_in(directory.path(), &base, &[aux, head].concat(), json!({}));
    let error = merge_in(directory.path(), "out", MergeOptions::default()).unwrap_err();
    assert!(error.contains("aux.head.weight"), "{error}");
}

#[test]
fn biases_go_back_to_their_own_modules_and_are_judged() {
    let directory = tempfile::tempdir().unwrap();
    let weight: (&[usize], &[f32]) = (&[2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let base: [(&str, &[usize], &[f32]); 5] = [
        ("c1.weight", weight.0, weight.1),
        ("c1.bias", &[2], &[1.0, 2.0]),
        ("fc1.weight", weight.0, weight.1),
        ("fc1.bias", &[2], &[3.0, 4.0]),
        ("score.weight", weight.0, weight.1),
    ];
    let adapter: [(&str, &[usize], &[f32]); 7] = [
        ("c1.lora_A.weight", &[1, 2], &[1.0, 0.5]),
        ("c1.lora_B.weight", &[2, 1], &[1.0, 2.0]),
        ("c1.lora_B.bias", &[2], &[10.0, 20.0]),
        ("fc1.lora_A.weight", &[1, 2], &[1.0, 0.5]),
        ("fc1.lora_B.weight", &[2, 1], &[1.0, 2.0]),
        ("fc1.lora_B.bias", &[2], &[30.0, 40.0]),
        ("score.weight", &[2, 2], &[0.5; 4]),
    ];
    by_hand_in(directory.path(), &base, &adapter[..6], json!({ "lora_bias": true }));
    let merged = merge_in(directory.path(), "out", MergeOptions::default()).unwrap();
    assert_eq!([f32s(&merged["c1.bias"].2), f32s(&merged["fc1.bias"].2)], [[11.0, 22.0], [33.0, 44.0]]);
    let checkpoint = Checkpoint::open(&directory.path().join("adapter")).unwrap();
    peft::unmerge(&directory.path().join("out"), &checkpoint, &directory.path().join("base"), &|_| Ok(())).unwrap();
    assert!(
        tensors(&directory.path().join("base/model.safetensors"))
            == tensors(&directory.path().join("model.safetensors"))
    );

    by_hand_in(directory.path(), &base, &adapter, json!({ "lora_bias": true, "modules_to_save": ["score"] }));
    let merged = merge_in(directory.path(), "all", MergeOptions::default()).unwrap();
    let judged = |merged: &Tensors| {
        let path = directory.path().join("theirs.safetensors");
        write(&path, merged);
        let [base, adapter] = ["model.safetensors", "adapter"].map(|name| text(&directory.path().join(name)));
        let run = wora(&["verify", "--base", &base, "--adapter", &adapter, "--merged", &text(&path), "--json"]);
        let report: Value = serde_json::from_str(&run.1).unwrap();
        let failed = report["cases"].as_array().unwrap().iter().filter(|case| case["verdict"] == "fail");
        (run.0, failed.map(|case| case["name"].as_str().unwrap().to_string()).collect::<Vec<_>>())
    };
    assert_eq!(judged(&merged), (Some(0), vec![]));
    type Wrong = (fn(&mut Tensors), &'static str);
    let wrongs: [Wrong; 4] = [
        (|all| drop(all.insert("fc1.bias".into(), tensor(&[2], &[3.0, 4.0]))), "fc1.bias"),
        (|all| drop(all.insert("score.weight".into(), tensor(&[2, 2], &[1.0, 2.0, 3.0, 4.0]))), "score.weight"),
        (|all| drop(all.remove("c1.bias")), "c1.bias"),
        (|all| drop(all.insert("stray".into(), tensor(&[1], &[0.5]))), "stray"),
    ];
    for (spoil, name) in wrongs {
        let mut wrong = merged.clone();
        spoil(&mut wrong);
        assert_eq!(judged(&wrong), (Some(1), vec![name.to_string()]));
    }
}

#[test]
fn what_is_there_twice_or_is_no_number_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let base: [(&str, &[usize], &[f32]); 2] = [("fc.weight", &[2, 2], &[1.0; 4]), ("score.weight", &[1], &[1.0])];
    let adapter: [(&str, &[usize], &[f32]); 2] =
        [("fc.lora_A.weight", &[1, 2], &[1.0; 2]), ("fc.lora_B.weight", &[2, 1], &[1.0; 2])];
    let with = |more: &[(&str, &[usize], &[f32])], fields: Value| {
        by_hand_in(directory.path(), &base, &[&adapter, more].concat(), fields);
        merge_in(directory.path(), "out", MergeOptions::default()).unwrap_err()
    };
    let dora = json!({ "use_dora": true });
    let magnitudes: [(&str, &[usize], &[f32]); 2] =
        [("fc.lora_magnitude_vector", &[2], &[1.0; 2]), ("fc.lora_magnitude_vector.weight", &[2], &[2.0; 2])];
    let error = with(&magnitudes, dora);
    assert!(error.contains("fc.lora_magnitude_vector") && error.contains("once"), "{error}");
    let error = with(&[("base_model.model.fc.lora_A.weight", &[1, 2], &[1.0; 2])], json!({}));
    assert!(error.contains("fc.lora_A.weight") && error.contains("once"), "{error}");
    let error = with(&[("score.weight", &[1], &[f32::NAN])], json!({}));
    assert!(error.contains("score.weight") && error.contains("NaN"), "{error}");
    let ranks: [(&str, &[usize], &[f32]); 2] =
        [("fc.lora_A.weight", &[1, 2], &[1.0; 2]), ("fc.lora_B.weight", &[2, 2], &[1.0; 4])];
    by_hand_in(directory.path(), &base, &ranks, json!({}));
    let (code, _, stderr) = wora(&["inspect", &text(&directory.path().join("adapter"))]);
    assert!(code == Some(2) && stderr.contains("fc.lora_B.weight") && stderr.lines().count() == 1, "{stderr}");
    by_hand_in(directory.path(), &base, &adapter, json!({}));
    let (open, model) =
        (|| Checkpoint::open(&directory.path().join("adapter")).unwrap(), directory.path().join("model.safetensors"));
    let twice = [open(), open()];
    let out = directory.path().join("twice");
    let model = Model::open(&model).unwrap();
    let error = peft::merge(&model, &twice, MergeOptions::default(), &out, &|_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("twice"), "{error}");
    merge_in(directory.path(), "once", MergeOptions::default()).unwrap();
    let merged = Model::open(&directory.path().join("once")).unwrap();
    let error = peft::merge(&merged, &[open()], MergeOptions::default(), &out, &|_| Ok(())).unwrap_err().to_string();
    assert!(error.contains(peft::RECORD_FILE) && error.contains("merged"), "{error}");
    assert!(!out.exists());
}

#[test]
fn a_square_weight_is_stored_as_its_namesakes_are() {
    let directory = tempfile::tempdir().unwrap();
    let square: &[f32] = &[1.0, 2.0, 3.0, 4.0];
    let base: [(&str, &[usize], &[f32]); 3] = [
        ("h.attn.c_proj.weight", &[2, 2], square),
        ("h.mlp.c_proj.weight", &[3, 2], &[0.0; 6]),
        ("score.weight", &[1, 2], &[0.0; 2]),
    ];
    let adapter: [(&str, &[usize], &[f32]); 6] = [
        ("h.attn.c_proj.lora_A.weight", &[1, 2], &[1.0, 0.0]),
        ("h.attn.c_proj.lora_B.weight", &[2, 1], &[0.0, 1.0]),
        ("h.mlp.c_proj.lora_A.weight", &[1, 3], &[1.0; 3]),
        ("h.mlp.c_proj.lora_B.weight", &[2, 1], &[1.0; 2]),
        ("score.lora_A.weight", &[1, 2], &[1.0; 2]),
        ("score.lora_B.weight", &[1, 1], &[1.0]),
    ];
    by_hand_in(directory.path(), &base, &adapter, json!({ "fan_in_fan_out": false }));
    let merged = merge_in(directory.path(), "out", MergeOptions::default()).unwrap();
    // The other c_proj is [in, out], so this one is: the change is (B A)^T.
    assert_eq!(f32s(&merged["h.attn.c_proj.weight"].2), [1.0, 3.0, 3.0, 4.0]);
}

#[test]
fn a_kept_base_comes_back_to_the_bit_from_any_type_and_a_changed_record_does_not_pass() {
    let copy = Copy::of("text-dora");
    let (directory, adapter) = (copy.0.path(), text(&copy.at("adapter")));
    assert_eq!(copy.merge("half", &["--dtype", "bf16", "--keep-base"]).0, Some(0));
    let unmerge = |from: &str, out: &str| {
        let (from, out) = (text(&directory.join(from)), text(&directory.join(out)));
        wora(&["unmerge", "--merged", &from, "--adapter", &adapter, "--out", &out])
    };
    assert_eq!(unmerge("half", "base").0, Some(0));
    assert!(tensors(&copy.at("base/model.safetensors")) == tensors(&copy.model()));
    let spoil = |from: &str, change: fn(&mut Vec<u8>)| {
        let path = directory.join(from).join(peft::RECORD_FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    };
    // The last bytes are of the last kept tensor.
    spoil("half", |bytes| *bytes.last_mut().unwrap() ^= 1);
    let (code, _, stderr) = unmerge("half", "spoilt");
    assert!(code == Some(2) && stderr.contains("base.") && stderr.contains("changed since"), "{stderr}");
    assert_eq!(copy.merge("plain", &[]).0, Some(0));
    spoil("plain", |bytes| *bytes.last_mut().unwrap() ^= 1);
    let (code, _, stderr) = unmerge("plain", "spoilt");
    assert!(code == Some(2) && stderr.contains(".weight_norm") && stderr.contains("changed since"), "{stderr}");
    assert!(!copy.at("spoilt").exists());
}

#[test]
fn parents_are_made_only_when_all_is_well_and_links_are_followed() {
    let copy = Copy::of("text-dora");
    assert_eq!(copy.merge("new/a/b", &[]).0, Some(0));
    assert!(copy.at("new/a/b/model.safetensors").exists());
    copy.zero_unit();
    assert_eq!(copy.merge("other/a/b", &[]).0, Some(2));
    assert!(!copy.at("other").exists());
    #[cfg(unix)]
    {
        std::fs::create_dir(copy.at("empty")).unwrap();
        std::os::unix::fs::symlink(copy.at("empty"), copy.at("link")).unwrap();
        assert_eq!(copy.merge("link", &["--zero-norm", "zero"]).0, Some(0));
        assert!(copy.at("empty/model.safetensors").exists());
    }
}
