//! Modules where the cases of `wora check` do not look: at kinks and ties, at what is dropped, at what is frozen, and in
//! whole models under adapters.

use ndarray::{Array, ArrayD, Axis, array};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::SeedableRng;
use woracle::case::Tensors;
use woracle::gradcheck::{Function, Options, gradcheck};
use woracle::modules::{Loss, Module, Named, Pass, Settings, Signal, Targets};
use woracle::train::{AdapterTable, Model};
use woracle::{Error, Result};

fn build(settings: &str) -> Box<dyn Module<f64>> {
    let settings: Settings = serde_json::from_str(settings).unwrap();
    settings.build(&mut Pcg64::seed_from_u64(1)).unwrap()
}

/// y and dx of a module without parameters.
fn run(settings: &str, x: ArrayD<f64>, dy: ArrayD<f64>) -> (ArrayD<f64>, ArrayD<f64>) {
    let module = build(settings);
    let (y, backward) = module.forward(Signal::Values(x), &Pass::evaluation()).unwrap();
    let dx = backward(dy).unwrap().x.unwrap();
    (y, dx)
}

#[test]
fn relu_has_no_slope_at_its_kink_and_hides_no_nan() {
    let (y, dx) =
        run(r#"{"type": "relu"}"#, array![[-1.0, 0.0, -0.0, 2.0]].into_dyn(), array![[5.0, 5.0, 5.0, 5.0]].into_dyn());
    assert_eq!((y, dx), (array![[0.0, 0.0, 0.0, 2.0]].into_dyn(), array![[0.0, 0.0, 0.0, 5.0]].into_dyn()));
    let module = build(r#"{"type": "relu"}"#);
    let (y, _) = module.forward(Signal::Values(array![[f64::NAN]].into_dyn()), &Pass::evaluation()).unwrap();
    assert!(y[[0, 0]].is_nan());
}

#[test]
fn of_equal_ones_the_first_is_the_largest() {
    let x = array![[[1.0, 3.0, 3.0, 0.0, 0.0, 0.0]]].into_dyn();
    let (y, dx) = run(r#"{"type": "max_pool1d", "kernel_size": 3}"#, x, array![[[10.0, 20.0]]].into_dyn());
    assert_eq!(y, array![[[3.0, 0.0]]].into_dyn());
    assert_eq!(dx, array![[[0.0, 10.0, 0.0, 20.0, 0.0, 0.0]]].into_dyn());
    let nan = array![[[1.0, f64::NAN, 3.0]]].into_dyn();
    let (y, _) = run(r#"{"type": "max_pool1d", "kernel_size": 3}"#, nan, array![[[1.0]]].into_dyn());
    assert!(y[[0, 0, 0]].is_nan(), "what is wrong is seen");
    let two = array![[[f64::NAN, 1.0, f64::NAN]]].into_dyn();
    let (_, dx) = run(r#"{"type": "max_pool1d", "kernel_size": 3}"#, two, array![[[1.0]]].into_dyn());
    assert_eq!(dx, array![[[0.0, 0.0, 1.0]]].into_dyn(), "PyTorch's choice");
    let padded = r#"{"type": "max_pool1d", "kernel_size": 3, "stride": 1, "padding": 1}"#;
    let (_, dx) = run(padded, array![[[f64::NAN, f64::NAN]]].into_dyn(), array![[[1.0, 10.0]]].into_dyn());
    assert_eq!(dx, array![[[0.0, 11.0]]].into_dyn(), "padding is no NaN that comes later");
}

#[test]
fn padding_is_never_the_largest_and_counts_in_a_mean() {
    let x = array![[[-4.0, -2.0]]].into_dyn();
    let (y, _) =
        run(r#"{"type": "max_pool1d", "kernel_size": 2, "padding": 1}"#, x.clone(), array![[[0.0, 0.0]]].into_dyn());
    assert_eq!(y, array![[[-4.0, -2.0]]].into_dyn());
    let (y, dx) = run(r#"{"type": "avg_pool1d", "kernel_size": 2, "padding": 1}"#, x, array![[[2.0, 4.0]]].into_dyn());
    assert_eq!((y, dx), (array![[[-2.0, -1.0]]].into_dyn(), array![[[1.0, 2.0]]].into_dyn()));
}

#[test]
fn dropout_drops_its_part_in_training_alone_and_the_same_part_again() {
    let dropout = build(r#"{"type": "dropout", "p": 0.25}"#);
    let x = ArrayD::from_elem(vec![100, 100], 3.0);
    let dropped = |pass: &Pass<'_, f64>| dropout.forward(Signal::Values(x.clone()), pass).unwrap().0;
    assert_eq!(dropped(&Pass::evaluation()), x);
    let once = dropped(&Pass::training(1));
    assert!(once.iter().all(|&value| value == 0.0 || value == 4.0), "0 or 3 / (1 - p)");
    let zeros = once.iter().filter(|&&value| value == 0.0).count() as f64;
    // Six standard deviations of a binomial distribution.
    assert!((zeros - 2500.0).abs() < 6.0 * (10_000.0_f64 * 0.25 * 0.75).sqrt(), "{zeros}");
    assert_eq!(once, dropped(&Pass::training(1)));
    assert_ne!(once, dropped(&Pass::training(2)));
    assert_ne!(once, dropped(&Pass::training(1).inside("other")), "modules do not drop alike");
}

/// More rows than one task has.
#[test]
fn layer_norm_of_many_rows_is_that_of_each_and_its_gradients_are_their_sums() {
    let module = build(r#"{"type": "layer_norm", "features": 37}"#);
    let draw = |salt: f64| Array::from_shape_fn((300, 37), |(i, j)| (salt * (i * 37 + j) as f64).sin()).into_dyn();
    let (x, dy) = (draw(1.3), draw(0.7));
    let run = |x: ArrayD<f64>, dy: ArrayD<f64>| {
        let (y, backward) = module.forward(Signal::Values(x), &Pass::training(1)).unwrap();
        (y, backward(dy).unwrap())
    };
    let (y, back) = run(x.clone(), dy.clone());
    let mut sums = vec![ArrayD::<f64>::zeros(vec![37]); 2];
    for row in 0..300 {
        let [x, dy] = [&x, &dy].map(|all| all.index_axis(Axis(0), row).insert_axis(Axis(0)).to_owned());
        let (y_of_row, of_row) = run(x, dy);
        assert_eq!(y_of_row.index_axis(Axis(0), 0), y.index_axis(Axis(0), row), "row {row}");
        assert_eq!(of_row.x.unwrap().index_axis(Axis(0), 0), back.x.as_ref().unwrap().index_axis(Axis(0), row));
        sums.iter_mut().zip(of_row.parameters).for_each(|(sum, (_, part))| *sum += &part);
    }
    for ((name, found), sum) in back.parameters.iter().zip(sums) {
        approx::assert_abs_diff_eq!(found, &sum, epsilon = 1e-12);
        assert!(sum.iter().any(|value| value.abs() > 0.1), "{name}");
    }
}

#[test]
fn causal_attention_does_not_look_ahead() {
    let module = build(r#"{"type": "self_attention", "embed_dim": 4, "num_heads": 2, "causal": true}"#);
    let x = Array::from_shape_fn((1, 5, 4), |(_, l, j)| (l as f64 - 2.0) * 0.3 + j as f64 * 0.1).into_dyn();
    let y_of = |x: &ArrayD<f64>| module.forward(Signal::Values(x.clone()), &Pass::evaluation()).unwrap().0;
    let before = y_of(&x);
    let mut later = x.clone();
    later.index_axis_mut(Axis(1), 3).fill(9.0);
    let after = y_of(&later);
    for place in 0..5 {
        let same = before.index_axis(Axis(1), place) == after.index_axis(Axis(1), place);
        assert_eq!(same, place < 3, "place {place}");
    }
}

#[test]
fn inputs_that_do_not_fit_are_refused_with_what_was_expected() {
    let cases = [
        (r#"{"type": "linear", "in_features": 3, "out_features": 2}"#, vec![2, 4], "[..., 3]"),
        (r#"{"type": "layer_norm", "features": 3}"#, vec![2, 4], "[..., 3]"),
        (r#"{"type": "max_pool2d", "kernel_size": 2}"#, vec![2, 4], "[batch, channels, size, size]"),
        (r#"{"type": "max_pool2d", "kernel_size": 5}"#, vec![1, 1, 4, 6], "a size of at least 5"),
        (
            r#"{"type": "max_pool1d", "kernel_size": 2, "padding": 1, "dilation": 2}"#,
            vec![1, 1, 1],
            "with more than padding in every window",
        ),
        (r#"{"type": "avg_pool1d", "kernel_size": 2, "padding": 1}"#, vec![1, 1, 0], "at least 1 along axis 2"),
        (r#"{"type": "mean", "dim": 2}"#, vec![2, 4], "an axis 2"),
        (r#"{"type": "mean", "dim": 0}"#, vec![2, 4], "not the first"),
        (r#"{"type": "self_attention", "embed_dim": 4}"#, vec![2, 4], "[batch, length, 4]"),
        (r#"{"type": "position_embedding", "max_length": 2, "embedding_dim": 4}"#, vec![1, 3, 4], "up to 2"),
        (r#"{"type": "residual", "modules": [{"type": "flatten"}]}"#, vec![2, 3, 4], "that of what it is added to"),
    ];
    for (settings, shape, expected) in cases {
        let refused = build(settings).forward(Signal::Values(ArrayD::zeros(shape)), &Pass::evaluation()).err();
        let complaint = refused.unwrap_or_else(|| panic!("{settings} took it")).to_string();
        assert!(complaint.contains(expected), "{settings}: {complaint}");
    }
    let ids = build(r#"{"type": "relu"}"#).forward(Signal::Ids(ArrayD::zeros(vec![2])), &Pass::evaluation()).err();
    assert!(ids.unwrap().to_string().contains("integer ids"));
    let scores = ArrayD::<f64>::zeros(vec![2, 3]);
    let refused = Loss::CrossEntropy.evaluate(scores.clone(), &Targets::Classes(array![0, 3].into_dyn()));
    assert!(matches!(refused, Err(Error::ClassOutOfRange { classes: 3, found: 3, .. })));
    assert!(Loss::CrossEntropy.evaluate(scores.clone(), &Targets::Values(scores.clone())).is_err());
    assert!(Loss::MeanSquaredError.evaluate(scores, &Targets::Values(ArrayD::zeros(vec![2, 2]))).is_err());
}

/// A model under an adapter as a function of everything that is trained, with the norm's gradient in.
struct Whole {
    modules: Vec<Named>,
    table: AdapterTable,
    x: ArrayD<f64>,
    ids: Option<ArrayD<i64>>,
}

impl Whole {
    fn model(&self, inputs: &Tensors) -> Result<Model<f64>> {
        let mut model = Model::new(&self.modules, 5)?;
        model.adapt(&self.table, 6)?;
        model.set_trained(inputs)?;
        Ok(model)
    }
    fn signal(&self) -> Signal<f64> {
        self.ids.clone().map_or_else(|| Signal::Values(self.x.clone()), Signal::Ids)
    }
}

impl Function for Whole {
    fn name(&self) -> &str {
        "a model under an adapter"
    }
    fn forward(&self, inputs: &Tensors) -> Result<ArrayD<f64>> {
        let model = self.model(inputs)?;
        Ok(model.forward(self.signal(), &Pass::training(3))?.0)
    }
    fn backward(&self, inputs: &Tensors, dy: &ArrayD<f64>) -> Result<Tensors> {
        let model = self.model(inputs)?;
        let (_, backward) = model.forward(self.signal(), &Pass::training(3))?;
        Ok(backward(dy.clone())?.parameters.into_iter().collect())
    }
}

/// Everything that is trained, away from where it starts.
fn moved(whole: &Whole) -> Tensors {
    let mut model = Model::<f64>::new(&whole.modules, 5).unwrap();
    model.adapt(&whole.table, 6).unwrap();
    let wave = |nth: usize| 0.3 * ((nth * 37 % 101) as f64 / 50.0 - 1.0);
    let mut nth = 0;
    let mut trained = model.trained();
    for values in trained.values_mut() {
        values.mapv_inplace(|value| {
            nth += 1;
            value + wave(nth)
        });
    }
    trained
}

#[test]
fn the_gradients_of_whole_models_under_adapters_are_those_of_the_loss() {
    let convolutional = r#"[
        {"name": "conv", "type": "conv2d", "in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1},
        {"type": "tanh"},
        {"type": "avg_pool2d", "kernel_size": 2},
        {"type": "flatten"},
        {"type": "dropout", "p": 0.25},
        {"name": "head", "type": "linear", "in_features": 12, "out_features": 4}
    ]"#;
    let transformer = r#"[
        {"name": "tokens", "type": "embedding", "num_embeddings": 6, "embedding_dim": 4},
        {"name": "positions", "type": "position_embedding", "max_length": 3, "embedding_dim": 4},
        {"name": "look", "type": "residual", "modules": [
            {"name": "norm", "type": "layer_norm", "features": 4},
            {"name": "attention", "type": "self_attention", "embed_dim": 4, "num_heads": 2, "causal": true}
        ]},
        {"name": "mlp", "type": "residual", "modules": [
            {"name": "up", "type": "linear", "in_features": 4, "out_features": 8},
            {"type": "gelu"},
            {"name": "down", "type": "linear", "in_features": 8, "out_features": 4}
        ]},
        {"type": "mean", "dim": 1}
    ]"#;
    for method in ["lora", "dora", "wora"] {
        let table = |targets: &str, dropout: f64| -> AdapterTable {
            serde_json::from_value(serde_json::json!({
                "method": method, "rank": 2, "lora_alpha": 3.0, "target_modules": targets, "norm_gradient": "full",
                "lora_dropout": dropout,
            }))
            .unwrap()
        };
        let x = Array::from_shape_fn((2, 2, 4, 4), |(n, c, i, j)| ((n + 2 * c + 3 * i + 5 * j) % 7) as f64 / 3.5 - 1.0);
        let ids = array![[1, 4, 1], [0, 5, 2]].into_dyn();
        let wholes = [
            Whole {
                modules: serde_json::from_str(convolutional).unwrap(),
                table: table("conv|head", 0.25),
                x: x.into_dyn(),
                ids: None,
            },
            Whole {
                modules: serde_json::from_str(transformer).unwrap(),
                table: table("tokens|.*_proj|mlp\\..*", 0.0),
                x: ArrayD::zeros(vec![0]),
                ids: Some(ids),
            },
        ];
        for whole in wholes {
            let inputs = moved(&whole);
            assert!(inputs.len() >= 4, "little is trained: {:?}", inputs.keys());
            let report = gradcheck(&whole, &inputs, Options::default());
            assert!(report.agrees(), "{method}: {report}");
        }
    }
}

#[test]
fn nothing_is_computed_for_what_is_frozen() {
    let modules: Vec<Named> = serde_json::from_str(
        r#"[{"name": "a", "type": "linear", "in_features": 3, "out_features": 3},
            {"name": "norm", "type": "layer_norm", "features": 3},
            {"name": "b", "type": "linear", "in_features": 3, "out_features": 2}]"#,
    )
    .unwrap();
    let mut model = Model::<f64>::new(&modules, 1).unwrap();
    let gradients = |model: &Model<f64>| -> Vec<String> {
        let x = Signal::Values(array![[1.0, -1.0, 2.0]].into_dyn());
        let (y, backward) = model.forward(x, &Pass::evaluation()).unwrap();
        let back = backward(y).unwrap();
        assert!(back.x.is_none(), "nothing needs dx");
        let mut names: Vec<String> = back.parameters.into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    };
    assert_eq!(gradients(&model), ["a.bias", "a.weight", "b.bias", "b.weight", "norm.bias", "norm.weight"]);
    let table = |targets: serde_json::Value| -> AdapterTable {
        let table = serde_json::json!({ "method": "wora", "rank": 1, "lora_alpha": 1.0, "target_modules": targets });
        serde_json::from_value(table).unwrap()
    };
    model.adapt(&table("b".into()), 2).unwrap();
    let of_b = ["b.lora_A", "b.lora_B", "b.lora_magnitude_vector", "b.lora_wora_alpha", "b.lora_wora_beta"];
    assert_eq!(gradients(&model), of_b);
    assert_eq!(model.count_trained(), 3 + 2 + 2 + 1 + 1);
    model.adapt(&table("a".into()), 2).unwrap();
    assert_eq!(gradients(&model).len(), 2 * of_b.len());
    let refused = model.adapt(&table(serde_json::json!(["nothing"])), 2).unwrap_err();
    assert!(refused.to_string().contains("expected some of a, b"), "{refused}");
}

#[test]
fn an_axis_that_is_flattened_alone_stays() {
    let flatten: Settings = serde_json::from_str(r#"{"type": "flatten", "start_dim": 1, "end_dim": 1}"#).unwrap();
    let module = flatten.build::<f64>(&mut Pcg64::seed_from_u64(0)).unwrap();
    let x = Array::from_shape_fn((2, 3, 4), |(i, j, k)| (12 * i + 4 * j + k) as f64).into_dyn();
    let (y, _) = module.forward(Signal::Values(x.clone()), &Pass::evaluation()).unwrap();
    assert_eq!(y, x);
}

#[test]
fn every_place_and_every_seed_has_a_mask_of_its_own() {
    let mask = |seed: u64, place: &str| Pass::<f64>::training(seed).inside(place).mask(&[64], 0.5).expect("a mask");
    let (seeds, places) = (0..8, ["", "a", "b", "aa", "fc1", "fc2"]);
    for seed in seeds.clone() {
        for (nth, place) in places.iter().enumerate() {
            let own = mask(seed, place);
            assert!((16..48).contains(&own.iter().filter(|&&kept| kept == 2.0).count()), "{own}");
            assert!(places[..nth].iter().all(|other| mask(seed, other) != own), "{place:?}");
            assert!(seeds.clone().filter(|&other| other != seed).all(|other| mask(other, place) != own), "{seed}");
        }
    }
}
