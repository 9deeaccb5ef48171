//! The cases of the modules and losses: settings, the shape of the input, and what numbers it has.

use super::Draw;
use crate::case::Tensors;
use crate::modules::{Loss, Pass, Settings, Signal, Targets};
use ndarray::{ArrayD, IxDyn};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::SeedableRng;

/// What is special about one case of a module or of a loss.
///
/// ```
/// use woracle::cases::{MODULES, Numbers, Of};
/// let spec = MODULES.iter().find(|spec| spec.name == "module-relu").unwrap();
/// assert!(matches!(spec.of, Of::Module(settings) if settings.contains("relu")));
/// assert_eq!(spec.numbers, Numbers::AwayFromZero); // where max(x, 0) has its kink
/// let case = spec.draw(3);
/// assert_eq!(case.inputs["x"].shape(), spec.x);
/// assert!(case.inputs["x"].iter().all(|x| x.abs() >= 1.0 / 16.0));
/// let y = case.define(&case.inputs, |constant| constant);
/// assert!(y.iter().all(|&y| y >= 0.0));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct ModuleSpec {
    /// The name; begins with the module's type.
    pub name: &'static str,
    /// What is checked.
    pub of: Of,
    /// The shape of x.
    pub x: &'static [usize],
    /// What its numbers are.
    pub numbers: Numbers,
    /// What must hold between its results without any step.
    pub identities: &'static [Relation],
}

/// What is checked.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// A module, with its settings in JSON.
    Module(&'static str),
    /// A loss.
    Loss(Loss),
}

/// What the numbers of an input are. A function with a kink has no derivative there: its cases keep away from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// From -1 to 1.
    Any,
    /// None within 1/16 of 0.
    AwayFromZero,
    /// No two within 1/32 of each other.
    Distinct,
    /// The second half is the negative of the first.
    Mirrored,
    /// Ids below this.
    Ids(i64),
}

/// What holds between results without any step. SPEC.md, section 13.11.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// `<dx, x> = <dy, y>` less what the bias of this name brings; `""` stands for none. E125
    LinearInX(&'static str),
    /// `<dW, W> = <dy, y>` less what the bias brings: the names of W and of the bias. E126
    LinearInWeight(&'static str, &'static str),
    /// The elements of dx sum to 0. E127
    NothingInSum,
    /// What enters through one product has one share in it: the tensors of either side. E128
    Through(&'static [&'static str], &'static [&'static str]),
    /// `sum dx = sum dy (1 - y^2)`. E129
    Tanh,
    /// `dx / dy` at x and at -x sum to 1. E130
    Reflection,
    /// `<dx, x - t> = 2 dy y`. E131
    Square,
}

const PLAIN: ModuleSpec =
    ModuleSpec { name: "", of: Of::Loss(Loss::MeanSquaredError), x: &[], numbers: Numbers::Any, identities: &[] };

const fn module(name: &'static str, settings: &'static str, x: &'static [usize]) -> ModuleSpec {
    ModuleSpec { name, of: Of::Module(settings), x, ..PLAIN }
}

/// In x and in the weight, with a bias.
const LAYER: &[Relation] = &[Relation::LinearInX("bias"), Relation::LinearInWeight("weight", "bias")];
const HOMOGENEOUS: &[Relation] = &[Relation::LinearInX("")];
const ATTENTION: &[Relation] = &[
    Relation::LinearInWeight("out_proj.weight", "out_proj.bias"),
    Relation::Through(&["v_proj.weight", "v_proj.bias"], &["out_proj.weight"]),
    Relation::Through(&["q_proj.weight", "q_proj.bias"], &["k_proj.weight", "k_proj.bias"]),
];

/// Every case.
pub const MODULES: &[ModuleSpec] = &[
    ModuleSpec {
        identities: LAYER,
        ..module("module-linear", r#"{"type": "linear", "in_features": 7, "out_features": 4}"#, &[2, 3, 7])
    },
    ModuleSpec {
        identities: &[Relation::LinearInX(""), Relation::LinearInWeight("weight", "")],
        ..module(
            "module-linear-no-bias",
            r#"{"type": "linear", "in_features": 5, "out_features": 6, "bias": false}"#,
            &[4, 5],
        )
    },
    ModuleSpec {
        numbers: Numbers::Ids(5),
        identities: &[Relation::LinearInWeight("weight", "")],
        ..module(
            "module-embedding",
            r#"{"type": "embedding", "num_embeddings": 6, "embedding_dim": 3, "embed_scale": 1.5}"#,
            &[2, 5],
        )
    },
    ModuleSpec {
        identities: LAYER,
        ..module(
            "module-conv1d",
            r#"{"type": "conv1d", "in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}"#,
            &[2, 4, 7],
        )
    },
    ModuleSpec {
        identities: LAYER,
        ..module(
            "module-conv2d",
            r#"{"type": "conv2d", "in_channels": 3, "out_channels": 4, "kernel_size": [3, 2], "padding": 1}"#,
            &[2, 3, 5, 4],
        )
    },
    ModuleSpec {
        identities: LAYER,
        ..module(
            "module-conv2d-channels",
            r#"{"type": "conv2d", "in_channels": 16, "out_channels": 17, "kernel_size": 3, "padding": "same"}"#,
            &[1, 16, 3, 4],
        )
    },
    ModuleSpec {
        identities: LAYER,
        ..module(
            "module-conv3d",
            r#"{"type": "conv3d", "in_channels": 2, "out_channels": 3, "kernel_size": 2, "dilation": [1, 2, 1], "padding": 1}"#,
            &[1, 2, 3, 3, 2],
        )
    },
    ModuleSpec {
        numbers: Numbers::AwayFromZero,
        identities: HOMOGENEOUS,
        ..module("module-relu", r#"{"type": "relu"}"#, &[3, 4, 5])
    },
    ModuleSpec {
        numbers: Numbers::Mirrored,
        identities: &[Relation::Reflection],
        ..module("module-gelu", r#"{"type": "gelu"}"#, &[4, 6])
    },
    ModuleSpec {
        numbers: Numbers::Mirrored,
        identities: &[Relation::Reflection],
        ..module("module-gelu-tanh", r#"{"type": "gelu", "approximate": "tanh"}"#, &[4, 6])
    },
    ModuleSpec { identities: &[Relation::Tanh], ..module("module-tanh", r#"{"type": "tanh"}"#, &[4, 6]) },
    ModuleSpec {
        numbers: Numbers::Distinct,
        identities: HOMOGENEOUS,
        ..module(
            "module-max_pool1d",
            r#"{"type": "max_pool1d", "kernel_size": 3, "stride": 2, "padding": 1}"#,
            &[2, 3, 7],
        )
    },
    ModuleSpec {
        numbers: Numbers::Distinct,
        identities: HOMOGENEOUS,
        ..module("module-max_pool2d", r#"{"type": "max_pool2d", "kernel_size": 2}"#, &[2, 3, 5, 4])
    },
    ModuleSpec {
        numbers: Numbers::Distinct,
        identities: HOMOGENEOUS,
        ..module(
            "module-max_pool2d-overlapping",
            r#"{"type": "max_pool2d", "kernel_size": [3, 2], "stride": [1, 2], "padding": [1, 0], "dilation": [1, 2]}"#,
            &[2, 2, 5, 6],
        )
    },
    ModuleSpec {
        identities: HOMOGENEOUS,
        ..module(
            "module-avg_pool1d",
            r#"{"type": "avg_pool1d", "kernel_size": 3, "stride": 2, "padding": 1}"#,
            &[2, 3, 7],
        )
    },
    ModuleSpec {
        identities: HOMOGENEOUS,
        ..module(
            "module-avg_pool2d",
            r#"{"type": "avg_pool2d", "kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0]}"#,
            &[2, 2, 5, 4],
        )
    },
    ModuleSpec { identities: HOMOGENEOUS, ..module("module-mean", r#"{"type": "mean", "dim": -2}"#, &[2, 3, 4]) },
    ModuleSpec { identities: HOMOGENEOUS, ..module("module-flatten", r#"{"type": "flatten"}"#, &[2, 3, 4]) },
    ModuleSpec {
        identities: HOMOGENEOUS,
        ..module("module-flatten-some", r#"{"type": "flatten", "start_dim": 1, "end_dim": -2}"#, &[2, 3, 2, 4])
    },
    ModuleSpec {
        identities: &[Relation::LinearInWeight("weight", "bias"), Relation::NothingInSum],
        ..module("module-layer_norm", r#"{"type": "layer_norm", "features": 6}"#, &[2, 3, 6])
    },
    ModuleSpec {
        identities: &[Relation::LinearInWeight("weight", "bias"), Relation::NothingInSum],
        ..module("module-layer_norm-eps", r#"{"type": "layer_norm", "features": 5, "eps": 0.25}"#, &[4, 5])
    },
    ModuleSpec {
        identities: ATTENTION,
        ..module("module-self_attention", r#"{"type": "self_attention", "embed_dim": 4}"#, &[2, 5, 4])
    },
    ModuleSpec {
        identities: ATTENTION,
        ..module(
            "module-self_attention-causal",
            r#"{"type": "self_attention", "embed_dim": 6, "num_heads": 3, "causal": true}"#,
            &[2, 4, 6],
        )
    },
    ModuleSpec {
        identities: ATTENTION,
        ..module(
            "module-self_attention-dropout",
            r#"{"type": "self_attention", "embed_dim": 4, "num_heads": 2, "causal": true, "dropout": 0.5}"#,
            &[2, 35, 4],
        )
    },
    ModuleSpec { identities: HOMOGENEOUS, ..module("module-dropout", r#"{"type": "dropout", "p": 0.5}"#, &[4, 6]) },
    ModuleSpec {
        identities: HOMOGENEOUS,
        numbers: Numbers::AwayFromZero,
        ..module(
            "module-residual",
            r#"{"type": "residual", "modules": [{"type": "relu"}, {"name": "fc", "type": "linear", "in_features": 5, "out_features": 5, "bias": false}]}"#,
            &[3, 5],
        )
    },
    ModuleSpec {
        identities: &[Relation::Through(&[], &[])],
        ..module(
            "module-position_embedding",
            r#"{"type": "position_embedding", "max_length": 5, "embedding_dim": 3}"#,
            &[2, 4, 3],
        )
    },
    ModuleSpec {
        name: "loss-cross_entropy",
        of: Of::Loss(Loss::CrossEntropy),
        x: &[2, 3, 5],
        identities: &[Relation::NothingInSum],
        ..PLAIN
    },
    ModuleSpec {
        name: "loss-mean_squared_error",
        of: Of::Loss(Loss::MeanSquaredError),
        x: &[4, 3],
        identities: &[Relation::Square],
        ..PLAIN
    },
];

/// A case of a module: what it is, and its tensors.
#[derive(Clone, Debug)]
pub struct ModuleCase {
    /// What is special about it.
    pub spec: ModuleSpec,
    /// The settings; `None` for a loss.
    pub settings: Option<Settings>,
    /// What is differentiated: `x`, unless it is ids, and the parameters.
    pub inputs: Tensors,
    /// Ids.
    pub ids: Option<ArrayD<i64>>,
    /// Targets of a loss.
    pub targets: Option<Targets<f64>>,
    /// What dropout is drawn from.
    pub seed: u64,
    /// What is not differentiated: the mask of a dropout.
    pub constants: Tensors,
    /// dy.
    pub cotangent: ArrayD<f64>,
}

/// No two closer than 1/32: their order is drawn, and a little of each.
fn distinct(values: &ArrayD<f64>) -> ArrayD<f64> {
    let flat: Vec<f64> = values.iter().copied().collect();
    let mut order: Vec<usize> = (0..flat.len()).collect();
    order.sort_by(|&i, &j| flat[i].total_cmp(&flat[j]));
    let mut spread = vec![0.0; flat.len()];
    for (rank, &element) in order.iter().enumerate() {
        // f32 holds all of it.
        let little = (flat[element] * 2f64.powi(10)).round() * 2f64.powi(-16);
        spread[element] = (rank as f64 - flat.len() as f64 / 2.0) / 16.0 + little;
    }
    ArrayD::from_shape_vec(values.shape(), spread).expect("as many elements")
}

impl ModuleSpec {
    /// The numbers of this case, drawn from the seed and the name.
    ///
    /// # Panics
    ///
    /// If the spec contradicts itself.
    pub fn draw(&self, seed: u64) -> ModuleCase {
        let mut draw = Draw::named(self.name, seed);
        let values = draw.array(self.x, |v| v);
        let (mut inputs, mut ids) = (Tensors::new(), None);
        match self.numbers {
            Numbers::Ids(count) => ids = Some(values.mapv(|v| ((v + 1.0) / 2.0 * count as f64) as i64)),
            Numbers::Any => drop(inputs.insert("x".into(), values)),
            Numbers::AwayFromZero => drop(inputs.insert("x".into(), values.mapv(|v| v + v.signum() / 16.0))),
            Numbers::Distinct => drop(inputs.insert("x".into(), distinct(&values))),
            Numbers::Mirrored => {
                let flat: Vec<f64> = values.iter().copied().take(values.len() / 2).collect();
                let both = flat.iter().copied().chain(flat.iter().map(|v| -v)).map(|v| 2.0 * v).collect();
                inputs.insert("x".into(), ArrayD::from_shape_vec(self.x, both).expect("an even number"));
            }
        }
        let mut case = ModuleCase {
            spec: *self,
            settings: None,
            inputs,
            ids,
            targets: None,
            seed,
            constants: Tensors::new(),
            cotangent: ArrayD::zeros(IxDyn(&[])),
        };
        match self.of {
            Of::Loss(loss) => {
                case.targets = Some(match loss {
                    Loss::MeanSquaredError => Targets::Values(draw.array(self.x, |v| v)),
                    Loss::CrossEntropy => {
                        let (&classes, outer) = self.x.split_last().expect("classes");
                        Targets::Classes(draw.array(outer, |v| v).mapv(|v| ((v + 1.0) / 2.0 * classes as f64) as i64))
                    }
                });
                case.cotangent = draw.array(&[], |v| 1.0 + v / 2.0);
            }
            Of::Module(settings) => {
                let settings: Settings = serde_json::from_str(settings).expect("settings in a spec");
                let module = settings.build::<f64>(&mut Pcg64::seed_from_u64(seed)).expect("settings in a spec");
                for parameter in module.parameters() {
                    case.inputs.insert(parameter.name, draw.array(parameter.values.shape(), |v| v));
                }
                let mask = match &settings {
                    Settings::Dropout(dropout) => Some((self.x.to_vec(), dropout.p)),
                    Settings::SelfAttention(attention) if attention.dropout > 0.0 => {
                        Some((vec![self.x[0], attention.num_heads, self.x[1], self.x[1]], attention.dropout))
                    }
                    _ => None,
                };
                if let Some((shape, p)) = mask {
                    let mask = Pass::<f64>::training(seed).mask(&shape, p).expect("a pass that drops");
                    case.constants.insert("mask".into(), mask);
                }
                case.settings = Some(settings);
                let y = case.define(&case.inputs, |value| value);
                case.cotangent = draw.array(y.shape(), |v| v);
            }
        }
        case
    }
}

impl ModuleCase {
    /// The definition on any numbers in the place of the inputs, each in the shape of its input: y, or the loss `[]`.
    /// Constants are lifted.
    ///
    /// # Panics
    ///
    /// If an input is missing or has another shape.
    pub fn define<R: crate::Real>(
        &self,
        inputs: &std::collections::BTreeMap<String, ArrayD<R>>,
        lift: impl Fn(f64) -> R,
    ) -> ArrayD<R> {
        let Some(settings) = &self.settings else {
            let Of::Loss(loss) = self.spec.of else { unreachable!("a module has settings") };
            let loss = loss.define(&inputs["x"], self.targets.as_ref().expect("targets"));
            return ArrayD::from_elem(IxDyn(&[]), loss);
        };
        let signal = match &self.ids {
            Some(ids) => Signal::Ids(ids.clone()),
            None => Signal::Values(inputs["x"].clone()),
        };
        let find = |name: &str| match inputs.get(name) {
            Some(values) => values.clone(),
            None => self.constants[name].mapv(&lift),
        };
        settings.define(signal, &find)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_must_be_distinct_are_far_apart_at_either_side_of_0() {
        for len in [2, 5, 60] {
            let values = Draw::new(len as u64).array(&[len], |value| value);
            let mut spread = distinct(&values).into_raw_vec_and_offset().0;
            spread.sort_by(f64::total_cmp);
            assert!(spread.windows(2).all(|pair| pair[1] - pair[0] >= 1.0 / 32.0), "{spread:?}");
            assert!(spread[0] < 0.0 && (spread[len - 1] > 0.0 || len == 2), "{spread:?}");
        }
    }
}
