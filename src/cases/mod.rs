//! The cases of every layer that `wora check` runs: what is special about each, and seeded numbers for it.

mod conv;
mod embedding;
mod linear;

pub use conv::{CONV1D, CONV2D, CONV3D};
pub use embedding::EMBEDDING;
pub use linear::LINEAR;

use crate::case::{Case, Tensor};
use crate::operators::{Input, Operator};
use crate::wora::{Adapter, Base, Config, Layer, Method, NormAxis, NormGradient, ZeroNorm, magnitude_shape};
use ndarray::{ArrayD, Axis, IxDyn, Zip};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};
use serde_json::{Map, Value};

/// What is special about one case. Everything else is drawn from the seed.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// The name; begins with the layer's.
    pub name: &'static str,
    /// x.
    pub x: &'static [usize],
    /// The base weight, as stored.
    pub weight: &'static [usize],
    /// The rank.
    pub rank: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// The probability of dropping, for a case with a dropout mask: a power of two, so that the mask is exact.
    pub dropout: Option<f64>,
    /// The method and how the norm is taken.
    pub config: Config,
    /// Where alpha and beta stand.
    pub alpha_beta: (f64, f64),
    /// What is done to the tensors afterwards.
    pub twist: Twist,
    /// Settings of the operator, as JSON.
    pub operator: &'static str,
}

/// What makes the numbers of a case special.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Twist {
    /// Nothing.
    None,
    /// B is zero, as in a fresh adapter.
    FreshB,
    /// `beta W0` is close to `-alpha s B A`, so that the factored norm cancels.
    Cancelling,
    /// W0 and B are so small that their squares vanish in f32.
    Tiny,
    /// Only the first four ids occur, so that they repeat.
    RepeatedIds,
    /// W0 and B are zero in the first unit, so that it has no direction.
    ZeroUnit,
}

impl Spec {
    /// An ordinary case: 5 rows, bias, rank 3, detached, everything away from its initial value.
    pub const fn plain(name: &'static str) -> Self {
        Self {
            name,
            x: &[5, 7],
            weight: &[6, 7],
            rank: 3,
            bias: true,
            dropout: None,
            config: Config {
                method: Method::Wora,
                scaling: 2.0,
                norm_gradient: NormGradient::Detached,
                norm_axis: NormAxis::Output,
                norm_eps: 0.0,
                zero_norm: ZeroNorm::Error,
            },
            alpha_beta: (1.25, 0.75),
            twist: Twist::None,
            operator: "{}",
        }
    }
}

/// Numbers that f32 holds exactly: multiples of 2^-20 within [-1, 1).
pub(crate) struct Draw(Pcg64);

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Pcg64::seed_from_u64(seed))
    }

    pub(crate) fn array(&mut self, shape: &[usize], mut map: impl FnMut(f64) -> f64) -> ArrayD<f64> {
        ArrayD::from_shape_simple_fn(shape, || map((self.0.next_u64() >> 43) as f64 * 2f64.powi(-20) - 1.0))
    }
}

/// The case of a spec, its numbers drawn from the seed and the name: adding a case changes no other.
///
/// # Panics
///
/// If the spec contradicts itself.
pub fn draw<O: Operator>(spec: &Spec, layer: &str, seed: u64) -> Case {
    let name_hash = spec
        .name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mut draw = Draw::new(seed ^ name_hash);
    let mut settings: Map<String, Value> = serde_json::from_str(spec.operator).expect("JSON in a spec");
    let parsed = serde_json::from_value(settings.clone().into()).expect("settings in a spec");
    let operator = O::from_weight_shape(parsed, spec.weight).expect("a weight in a spec");
    let Value::Object(config) = serde_json::to_value(spec.config).expect("a config") else { unreachable!("a struct") };
    settings.extend(config);

    let [shape_a, shape_b] = operator.lora_shapes(spec.rank);
    let scalar = |value| ArrayD::from_elem(IxDyn(&[]), value);
    let (alpha, beta) = spec.alpha_beta;
    let wora = spec.config.method == Method::Wora;
    let mut base = Base {
        weight: draw.array(spec.weight, |v| v),
        bias: spec.bias.then(|| draw.array(&[operator.units()], |v| v)),
    };
    let mut adapter = Adapter {
        lora_a: draw.array(&shape_a, |v| v),
        lora_b: draw.array(&shape_b, |v| v),
        magnitude: spec
            .config
            .has_norm()
            .then(|| draw.array(&magnitude_shape(&operator, &spec.config), |v| 1.5 + v / 2.0)),
        alpha: wora.then(|| scalar(alpha)),
        beta: wora.then(|| scalar(beta)),
    };
    match spec.twist {
        Twist::None | Twist::RepeatedIds => {}
        Twist::FreshB => adapter.lora_b.fill(0.0),
        Twist::Tiny => {
            base.weight *= 2f64.powi(-80);
            adapter.lora_b *= 2f64.powi(-80);
        }
        Twist::ZeroUnit => {
            adapter.lora_b.index_axis_mut(Axis(0), 0).fill(0.0);
            let mut weight = operator.weight_matrix(base.weight.view()).to_owned();
            weight.row_mut(0).fill(0.0);
            base.weight = operator.stored_weight(weight);
        }
        Twist::Cancelling => {
            let lora = Config::new(Method::Lora, 1.0);
            let pair = Adapter { magnitude: None, alpha: None, beta: None, ..adapter.clone() };
            let zero = Base { weight: ArrayD::zeros(spec.weight), bias: None };
            let delta =
                Layer::new(operator.clone(), lora, zero, pair).and_then(|layer| layer.merge()).expect("a LoRA layer");
            let factor = -alpha * spec.config.scaling / beta;
            Zip::from(&mut base.weight)
                .and(&delta.weight)
                .for_each(|w, &delta| *w = f64::from((delta * factor + *w / 2.0) as f32));
        }
    }
    let mask = spec.dropout.map(|p| draw.array(spec.x, |v| if (v + 1.0) / 2.0 < p { 0.0 } else { 1.0 / (1.0 - p) }));
    let values = draw.array(spec.x, |v| v);
    let ids = if spec.twist == Twist::RepeatedIds { operator.fan_in().min(4) } else { operator.fan_in() };
    let ids = values.mapv(|v| ((v + 1.0) / 2.0 * ids as f64) as i64);
    let (x, output) = match <O::Input<'_, f64>>::from_ids(ids.clone()) {
        Some(input) => (Tensor::Int(ids), operator.output_shape::<f64>(&input)),
        None => {
            let input = O::Input::from_values(values.clone()).expect("values where there are no ids");
            (Tensor::Float(values), operator.output_shape::<f64>(&input))
        }
    };
    let cotangent = draw.array(&output.expect("an input in a spec"), |v| v);

    let mut tensors: Vec<(&str, ArrayD<f64>)> = vec![("grad.y", cotangent)];
    tensors.extend(adapter.named(O::LORA_NAMES).into_iter().map(|(name, values)| (name, values.to_owned())));
    tensors.push(("base.weight", base.weight));
    tensors.extend(base.bias.map(|bias| ("base.bias", bias)));
    tensors.extend(mask.map(|mask| ("dropout_mask", mask)));
    let tensors = tensors.into_iter().map(|(name, values)| (name.to_string(), Tensor::Float(values)));
    Case {
        name: spec.name.into(),
        layer: layer.into(),
        settings,
        tensors: tensors.chain([("x".to_string(), x)]).collect(),
    }
}
