//! The cases of every layer that `wora check` runs: what is special about each, and seeded numbers for it.
//!
//! ```
//! use woracle::{cases::{LINEAR, MODULES}, registry};
//! let spec = LINEAR.iter().find(|spec| spec.name == "linear-dropout-full").unwrap();
//! assert_eq!(spec.why(), "WoRA; the gradient through the norm; dropout 0.25");
//! let case = registry::layer("linear")?.draw(spec, 7); // the same numbers for the same seed, everywhere
//! let kept = case.values("dropout_mask")?.iter().filter(|&&k| k != 0.0).count();
//! assert!(0 < kept && kept < 35); // of x [5, 7]
//! assert!(MODULES.iter().any(|spec| spec.name == "module-relu"));
//! # Ok::<(), woracle::Error>(())
//! ```

mod conv;
mod embedding;
mod linear;
mod modules;

pub use conv::{CONV1D, CONV2D, CONV3D};
pub use embedding::EMBEDDING;
pub use linear::LINEAR;
pub use modules::{MODULES, ModuleCase, ModuleSpec, Numbers, Of, Relation};

use crate::Result;
use crate::case::{Case, Tensor};
use crate::operators::{Input, Operator};
use crate::wora::{Adapter, Base, Config, Layer, Method, NormAxis, NormGradient, ZeroNorm, magnitude_shape};
use ndarray::{ArcArray, ArrayD, Axis, IxDyn, Zip};
use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng, SeedableRng};
use serde_json::{Map, Value};

/// What is special about one case. Everything else is drawn from the seed.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// The name; begins with the layer's.
    pub name: &'static str,
    /// The shape of x.
    pub x: &'static [usize],
    /// The shape of the base weight, as stored.
    pub weight: &'static [usize],
    /// The rank.
    pub rank: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// The probability of dropping, for a case with a dropout mask: a power of two, so that the mask is exact.
    pub dropout: Option<f64>,
    /// The method and how the norm is taken.
    pub config: Config,
    /// The values of alpha and beta.
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
    /// Few small whole numbers, and norms that are powers of two, so that every result is the same bits in every type
    /// and order of summation. SPEC.md, section 11.1.
    Exact,
}

impl Spec {
    /// Why the case exists: what sets it apart from the plain one of its layer.
    pub fn why(&self) -> String {
        let Config { method, norm_gradient, norm_axis, norm_eps, .. } = self.config;
        let mut reasons = vec![method.to_string()];
        reasons.extend((norm_gradient == NormGradient::Full).then(|| "the gradient through the norm".into()));
        reasons.extend((norm_axis == NormAxis::Input).then(|| "one norm an input column".into()));
        reasons.extend((norm_eps != 0.0).then(|| format!("norm_eps {norm_eps}")));
        reasons.extend((self.operator != "{}").then(|| self.operator.replace(['{', '}', '"'], "").replace(',', ", ")));
        reasons.extend(self.dropout.map(|p| format!("dropout {p}")));
        reasons.extend((self.rank == 1).then(|| "rank 1".into()));
        let features = self.weight.iter().copied().min().unwrap_or(0);
        reasons.extend((self.rank > features && self.weight.len() == 2).then(|| "a rank above the features".into()));
        reasons
            .extend((self.weight[0] == self.weight[1]).then(|| "square, so that a transpose is no wrong shape".into()));
        let (alpha, beta) = self.alpha_beta;
        reasons.extend((alpha <= 0.0 || beta <= 0.0).then(|| format!("alpha {alpha}, beta {beta}")));
        reasons.extend(
            match self.twist {
                Twist::None => None,
                Twist::FreshB => Some("B zero, as in a fresh adapter"),
                Twist::Cancelling => Some("beta W0 close to -alpha s B A, where a factored norm cancels"),
                Twist::Tiny => Some("weights whose squares vanish in f32"),
                Twist::RepeatedIds => Some("ids that repeat"),
                Twist::ZeroUnit => Some("a unit without a direction"),
                Twist::Exact => Some("the same bits in every type and order of summation"),
            }
            .map(Into::into),
        );
        reasons.join("; ")
    }

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
                // Neither a rank of the cases nor its root, square or inverse: factors of s and r are told apart.
                scaling: 1.5,
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

    /// The numbers of a case of this name: adding a case changes no other.
    pub(crate) fn named(name: &str, seed: u64) -> Self {
        let hash = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Self::new(seed ^ name.bytes().fold(0xcbf2_9ce4_8422_2325, hash))
    }

    pub(crate) fn array(&mut self, shape: &[usize], mut map: impl FnMut(f64) -> f64) -> ArrayD<f64> {
        ArrayD::from_shape_simple_fn(shape, || map((self.0.next_u64() >> 43) as f64 * 2f64.powi(-20) - 1.0))
    }
}

/// `B A`, as the weight is stored.
fn delta<O: Operator>(operator: &O, adapter: &Adapter<f64>) -> ArrayD<f64> {
    let lora = Config::new(Method::Lora, 1.0);
    let pair = Adapter { magnitude: None, alpha: None, beta: None, ..adapter.clone() };
    let zero = Base { weight: ArcArray::zeros(operator.weight_shape()), bias: None };
    let layer = Layer::new(operator.clone(), lora, zero, pair);
    layer.and_then(|layer| layer.merge()).expect("a LoRA layer").weight
}

/// -1, 0 or 1, each as likely.
fn ternary(v: f64) -> f64 {
    (1.5 * v).round_ties_even().clamp(-1.0, 1.0)
}

/// The case of a spec, its numbers drawn from the seed and the name: adding a case changes no other. Every attempt
/// draws others.
///
/// # Errors
///
/// A spec that contradicts itself.
pub fn draw<O: Operator>(spec: &Spec, layer: &str, seed: u64, attempt: u64) -> Result<Case> {
    let mut draw = Draw::named(spec.name, seed ^ (attempt << 32));
    let exact = spec.twist == Twist::Exact;
    let mut settings: Map<String, Value> = serde_json::from_str(spec.operator).expect("JSON in a spec");
    let parsed = serde_json::from_value(settings.clone().into()).expect("settings in a spec");
    let operator = O::from_weight_shape(parsed, spec.weight)?;
    let Value::Object(config) = serde_json::to_value(spec.config).expect("a config") else { unreachable!("a struct") };
    settings.extend(config);
    if exact {
        settings.insert("tier".into(), "exact".into());
    }

    let [shape_a, shape_b] = operator.lora_shapes(spec.rank);
    let scalar = |value| ArrayD::from_elem(IxDyn(&[]), value);
    let (alpha, beta) = spec.alpha_beta;
    let wora = spec.config.method == Method::Wora;
    let mut base = Base {
        weight: draw.array(spec.weight, |v| v).into(),
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
            base.weight = operator.stored_weight(weight).into();
        }
        Twist::Cancelling => {
            let factor = -alpha * spec.config.scaling / beta;
            Zip::from(&mut base.weight)
                .and(&delta(&operator, &adapter))
                .for_each(|w, &delta| *w = f64::from((delta * factor + *w / 2.0) as f32));
        }
        Twist::Exact => {
            adapter.lora_a.mapv_inplace(ternary);
            adapter.lora_b.mapv_inplace(ternary);
            base.bias.iter_mut().for_each(|bias| bias.mapv_inplace(ternary));
            // V has four elements of -1 or 1 in every row, so that its norms are 2.
            let keys = operator.weight_matrix(base.weight.view()).to_owned();
            let mut weighted = ndarray::Array2::zeros(keys.dim());
            for (i, (mut row, keys)) in weighted.outer_iter_mut().zip(keys.outer_iter()).enumerate() {
                let mut order: Vec<usize> = (0..keys.len()).collect();
                order.sort_by(|&j, &k| keys[j].abs().total_cmp(&keys[k].abs()));
                order.iter().take(4).for_each(|&j| row[j] = if keys[j] < 0.0 { -1.0 } else { 1.0 });
                if let Some(magnitude) = &mut adapter.magnitude {
                    let m = magnitude.iter_mut().nth(i).expect("one a unit");
                    *m = if *m < 1.5 { 2.0 } else { 4.0 };
                }
            }
            let alpha_s = alpha * spec.config.scaling;
            base.weight = ((operator.stored_weight(weighted) - delta(&operator, &adapter) * alpha_s) / beta).into();
        }
    }
    let small = |v| if exact { ternary(v) } else { v };
    let mask = spec.dropout.map(|p| draw.array(spec.x, |v| if (v + 1.0) / 2.0 < p { 0.0 } else { 1.0 / (1.0 - p) }));
    let values = draw.array(spec.x, |v| v);
    let ids = if spec.twist == Twist::RepeatedIds { operator.fan_in().min(4) } else { operator.fan_in() };
    let ids = values.mapv(|v| ((v + 1.0) / 2.0 * ids as f64) as i64);
    let (x, output) = match <O::Input<'_, f64>>::from_ids(ids.clone()) {
        Some(input) => (Tensor::Int(ids), operator.output_shape::<f64>(&input)),
        None => {
            let values = values.mapv(small);
            let input = O::Input::from_values(values.clone()).expect("values where there are no ids");
            (Tensor::Float(values.into()), operator.output_shape::<f64>(&input))
        }
    };
    let cotangent = draw.array(&output?, small);

    let mut tensors: Vec<(&str, ArrayD<f64>)> = vec![("grad.y", cotangent)];
    tensors.extend(adapter.named(O::LORA_NAMES).into_iter().map(|(name, values)| (name, values.to_owned())));
    tensors.push(("base.weight", base.weight.into_owned()));
    tensors.extend(base.bias.map(|bias| ("base.bias", bias)));
    tensors.extend(mask.map(|mask| ("dropout_mask", mask)));
    let tensors = tensors.into_iter().map(|(name, values)| (name.to_string(), Tensor::Float(values.into())));
    Ok(Case {
        name: spec.name.into(),
        layer: layer.into(),
        settings,
        tensors: tensors.chain([("x".to_string(), x)]).collect(),
    })
}
