//! Layers with a weight: plain, frozen or trained, or frozen under an adapter. SPEC.md, sections 6 and 13.8.

use super::{Back, Described, Find, Forward, Module, Parameter, Pass, Signal, yes};
use crate::matmul::both;
use crate::operators::{
    Conv, ConvSettings, Embedding, EmbeddingSettings, Extents, Input, Linear, LinearSettings, Operator, Padding,
    PaddingMode, channel_sums, in_standard_layout,
};
use crate::simd::{add_scaled, contiguous};
use crate::wora::{Adapter, Base, Config, Layer, LoraInit, RequiresGrad};
use crate::{Error, Real, Result, Scalar};
use ndarray::{ArcArray, Array3, ArrayD, ArrayView1, ArrayViewMutD, Axis, Ix1, Ix3, IxDyn, Zip};
use rand::RngExt;
use rand_distr::StandardNormal;
use rand_pcg::Pcg64;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// How an adapter is put on a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adapting {
    /// The method, its scaling, and how the norm is taken.
    pub config: Config,
    /// The rank.
    pub rank: usize,
    /// How the pair starts.
    pub init: LoraInit,
    /// The probability that an element of the correction's input is dropped in training.
    pub dropout: f64,
}

/// A layer that an adapter can be put on.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Adapting, Pass, Settings, Signal};
/// use woracle::wora::{Config, LoraInit, Method};
/// let mut rng = rand::SeedableRng::seed_from_u64(0);
/// let settings: Settings =
///     serde_json::from_str(r#"{"type": "linear", "in_features": 3, "out_features": 2}"#).unwrap();
/// let mut linear = settings.build::<f64>(&mut rng)?;
/// let x = || Signal::Values(array![[1.0, 2.0, 3.0]].into_dyn());
/// let before = linear.forward(x(), &Pass::evaluation())?.0;
/// let config = Config::new(Method::Dora, 2.0);
/// let adapting = Adapting { config, rank: 1, init: LoraInit::default(), dropout: 0.0 };
/// for (_, layer) in linear.layers_mut() {
///     layer.adapt(&adapting, &mut rng)?;
///     assert_eq!(layer.adapter().expect("an adapter").0.rank(), 1);
/// }
/// let trained: usize = linear.parameters().iter().filter(|one| one.trained).map(|one| one.values.len()).sum();
/// assert_eq!(trained, 3 + 2 + 2); // A, B, m; weight and bias are frozen
/// let after = linear.forward(x(), &Pass::evaluation())?.0;
/// assert!((after - before).iter().all(|difference| difference.abs() < 1e-15)); // B is zero
/// # Ok::<(), woracle::Error>(())
/// ```
pub trait Adaptable<T: Scalar> {
    /// Puts an adapter on it, and says how many numbers A and B have; its weight and bias are frozen from now on.
    ///
    /// # Errors
    ///
    /// As [`Layer::init`]; a dropout that is no probability, an A or B beyond what a small model has (C4).
    fn adapt(&mut self, adapting: &Adapting, rng: &mut Pcg64) -> Result<usize>;
    /// The adapter in float64, and whether the layer is an embedding; `None` without one.
    fn adapter(&self) -> Option<(Adapter<f64>, bool)>;
}

struct Weighted<O, T> {
    operator: O,
    state: State<O, T>,
}

enum State<O, T> {
    Plain(Plain<T>),
    Adapted { layer: Box<Layer<O, T>>, dropout: f64 },
}

struct Plain<T> {
    /// As stored: linear `[out, in]`, ...
    weight: ArcArray<T, IxDyn>,
    /// `[out]`
    bias: Option<ArrayD<T>>,
    trained: bool,
}

impl<O: Operator, T: Scalar> Weighted<O, T> {
    fn input(&self, x: Signal<T>) -> Result<O::Input<'static, T>> {
        let (input, expected) = match x {
            Signal::Values(values) => (<O::Input<'static, T>>::from_values(values), "integer ids, found values"),
            Signal::Ids(ids) => (<O::Input<'static, T>>::from_ids(ids), "values, found integer ids"),
        };
        let reason = format!("expected {expected}");
        input.ok_or_else(|| Error::Unexpected { tensor: "x".into(), reason })
    }
}

/// So many rows of y are one task.
const ROWS: usize = 256;

/// `y += b`, channel by channel: y `[outer, units, inner]`. E113
fn add_bias<T: Scalar>(y: &mut Array3<T>, bias: ArrayView1<'_, T>) {
    if y.len_of(Axis(2)) == 1 {
        let mut rows = y.index_axis_mut(Axis(2), 0);
        let bias = contiguous(bias);
        return rows.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter().for_each(|mut rows| {
            for row in rows.outer_iter_mut() {
                add_scaled(T::one(), &bias, row.into_slice().expect("standard layout"));
            }
        });
    }
    Zip::from(y.outer_iter_mut()).par_for_each(|mut y| {
        Zip::from(y.rows_mut()).and(bias).for_each(|mut y, &bias| y.mapv_inplace(|y| y + bias));
    });
}

impl<T: Scalar> Plain<T> {
    fn forward<'m, O: Operator>(
        &'m self,
        operator: &'m O,
        x: O::Input<'static, T>,
        pass: &Pass<'m, T>,
    ) -> Result<Forward<'m, T>> {
        let shape = operator.output_shape(&x)?;
        check_elements("y", &shape)?;
        let weight = operator.weight_matrix(self.weight.view());
        let [outer, inner] = operator.places(&x);
        let of_output = Ix3(outer, operator.units(), inner);
        let y = pass.array(&[outer, operator.units(), inner]);
        let mut y = y.into_dimensionality::<Ix3>().expect("three axes");
        operator.apply_into(&x, &[weight], vec![y.view_mut()]); // E113
        if let Some(bias) = &self.bias {
            add_bias(&mut y, bias.view().into_dimensionality::<Ix1>().expect("one axis"));
        }
        let y = y.into_shape_with_order(shape).expect("as many outputs");
        let pass = pass.clone();
        Ok((
            y,
            Box::new(move |dy| {
                let dy = in_standard_layout(dy).into_shape_with_order(of_output).expect("as y");
                let of_parameters = || {
                    let mut parameters = Vec::new();
                    if self.trained {
                        let dweight = operator.stored_weight(operator.adjoint_weight(&x, dy.view())); // E114
                        parameters.push(("weight".to_string(), dweight));
                        let dbias = self.bias.as_ref().map(|_| channel_sums(dy.view()).into_dyn()); // E115
                        parameters.extend(dbias.map(|dbias| ("bias".to_string(), dbias)));
                    }
                    parameters
                };
                let wanted = pass.requires_grad_x() && x.values().is_some();
                let mut dx = wanted.then(|| pass.array(x.shape()));
                let of_input = || {
                    if let Some(dx) = &mut dx {
                        let pairs = [(dy.view(), operator.weight_matrix(self.weight.view()))];
                        operator.adjoint_input_into(&x, &pairs, dx.view_mut());
                    }
                };
                let (parameters, ()) = both(2 * dy.len() * operator.fan_in(), of_parameters, of_input);
                pass.recycle(dy);
                x.into_values().into_iter().for_each(|x| pass.recycle_input(x));
                Ok(Back { x: dx, parameters })
            }),
        ))
    }
}

impl<O: Operator, T: Scalar> Module<T> for Weighted<O, T> {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let (x, wanted) = (self.input(x)?, pass.requires_grad_x());
        let (layer, dropout) = match &self.state {
            State::Plain(plain) => return plain.forward(&self.operator, x, pass),
            State::Adapted { layer, dropout } => (layer, *dropout),
        };
        // Ids take no mask, as in PEFT.
        let mask = x.values().and_then(|x| pass.mask(x.shape(), dropout));
        let mask = mask.as_ref().map(|mask| mask.view());
        let (y, cache) = pass.with_workspace(|workspace| layer.forward_in(workspace, x, mask))?;
        let pass = pass.clone();
        Ok((
            y,
            Box::new(move |dy| {
                let requires_grad = RequiresGrad { x: wanted, ..RequiresGrad::default() };
                let backward = |workspace: &_| layer.backward_and_input(workspace, cache, dy.view(), requires_grad);
                let (gradients, x) = pass.with_workspace(backward)?;
                pass.recycle(dy);
                x.into_values().into_iter().for_each(|x| pass.recycle_input(x));
                let named = gradients.adapter.named(O::LORA_NAMES).into_iter();
                let parameters = named.map(|(name, values)| (name.to_string(), values.to_owned())).collect();
                Ok(Back { x: gradients.x, parameters })
            }),
        ))
    }
    fn parameters(&self) -> Vec<Parameter<'_, T>> {
        let (weight, bias, trained, adapter) = match &self.state {
            State::Plain(plain) => (plain.weight.view(), plain.bias.as_ref(), plain.trained, None),
            State::Adapted { layer, .. } => {
                (layer.base().weight.view(), layer.base().bias.as_ref(), false, Some(layer.adapter()))
            }
        };
        let base = [("weight", Some(weight)), ("bias", bias.map(|bias| bias.view()))];
        let base = base.into_iter().filter_map(|(name, values)| Some((name, values?, trained)));
        let learned = adapter.into_iter().flat_map(|adapter| adapter.named(O::LORA_NAMES));
        let all = base.chain(learned.map(|(name, values)| (name, values, true)));
        all.map(|(name, values, trained)| Parameter { name: name.into(), values, trained }).collect()
    }
    fn parameters_mut(&mut self) -> Vec<(String, ArrayViewMutD<'_, T>)> {
        let named = match &mut self.state {
            State::Adapted { layer, .. } => layer.adapter_mut(),
            State::Plain(plain) if plain.trained => plain.tensors_mut(),
            State::Plain(_) => Vec::new(),
        };
        named.into_iter().map(|(name, values)| (name.to_string(), values)).collect()
    }
    fn freeze(&mut self) {
        if let State::Plain(plain) = &mut self.state {
            plain.trained = false;
        }
    }
    fn layers_mut(&mut self) -> Vec<(String, &mut dyn Adaptable<T>)> {
        vec![(String::new(), self)]
    }
}

impl<T: Scalar> Plain<T> {
    fn tensors_mut(&mut self) -> Vec<(&'static str, ArrayViewMutD<'_, T>)> {
        let tensors =
            [("weight", Some(self.weight.view_mut())), ("bias", self.bias.as_mut().map(|bias| bias.view_mut()))];
        tensors.into_iter().filter_map(|(name, values)| Some((name, values?))).collect()
    }
}

impl<O: Operator, T: Scalar> Adaptable<T> for Weighted<O, T> {
    fn adapt(&mut self, adapting: &Adapting, rng: &mut Pcg64) -> Result<usize> {
        let &Adapting { config, rank, init, dropout } = adapting;
        Pass::<T>::check_probability("lora_dropout", dropout)?;
        let [a, b] = O::LORA_NAMES;
        let elements =
            check_elements(a, &[rank, self.operator.fan_in()])? + check_elements(b, &[self.operator.units(), rank])?;
        let base = match &self.state {
            State::Plain(Plain { weight, bias, .. }) => Base { weight: weight.clone(), bias: bias.clone() },
            State::Adapted { layer, .. } => layer.base().clone(),
        };
        let layer = Layer::init(self.operator.clone(), config, base, rank, init, rng)?;
        self.state = State::Adapted { layer: Box::new(layer), dropout };
        Ok(elements)
    }
    fn adapter(&self) -> Option<(Adapter<f64>, bool)> {
        let State::Adapted { layer, .. } = &self.state else { return None };
        let named: std::collections::BTreeMap<_, _> = layer.adapter().named(O::LORA_NAMES).into_iter().collect();
        let widened = |name| Ok(named[name].mapv(T::as_f64));
        let adapter = Adapter::from_named(layer.config().method, O::LORA_NAMES, widened);
        Some((adapter.expect("every tensor of the method"), O::LORA_A_STARTS_AT_ZERO))
    }
}

/// Longer axes, and models of more numbers, are mistakes: they would only take memory.
const LONGEST: usize = 1 << 24;
pub(crate) const LARGEST: usize = 1 << 27;

/// Fails on a length of 0, or one beyond what a small model has. C4
pub(super) fn check_positive(name: &'static str, value: usize) -> Result<()> {
    if (1..=LONGEST).contains(&value) {
        return Ok(());
    }
    Err(Error::Setting { name, expected: format!("1 or more, up to {LONGEST}"), found: value.to_string() })
}

/// Fails on a tensor beyond what a small model has. C4
pub(super) fn check_elements(tensor: &str, shape: &[usize]) -> Result<usize> {
    let elements = shape.iter().try_fold(1, |elements: usize, &length| elements.checked_mul(length));
    if let Some(elements) = elements.filter(|&elements| elements <= LARGEST) {
        return Ok(elements);
    }
    let expected = format!("no more than {LARGEST} elements");
    Err(Error::Shape { tensor: tensor.into(), expected, found: shape.to_vec() }) // C4
}

/// How fresh weights are drawn, as PyTorch draws them.
enum Start {
    /// Uniform within `1 / sqrt(fan_in)`, the bias too.
    Uniform,
    /// Standard normal.
    Normal,
}

fn elements<O: Operator>(operator: &O, bias: bool) -> Result<usize> {
    Ok(check_elements("weight", &operator.weight_shape())? + if bias { operator.units() } else { 0 })
}

/// A trained layer with fresh weights.
fn fresh<O: Operator, T: Scalar>(operator: O, bias: bool, start: Start, rng: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
    check_elements("weight", &operator.weight_shape())?;
    let bound = 1.0 / (operator.fan_in() as f64).sqrt();
    let mut draw = |shape: &[usize]| -> ArrayD<T> {
        ArrayD::from_shape_simple_fn(shape, || {
            T::from_f64(match start {
                Start::Uniform => rng.random_range(-bound..bound),
                Start::Normal => rng.sample::<f64, _>(StandardNormal),
            })
        })
    };
    let weight = draw(&operator.weight_shape()).into();
    let bias = bias.then(|| draw(&[operator.units()]));
    Ok(Box::new(Weighted { operator, state: State::Plain(Plain { weight, bias, trained: true }) }))
}

/// y of the plain layer, term by term. E113
fn define<O: Operator, R: Real>(operator: &O, x: Signal<R>, bias: bool, parameters: Find<'_, R>) -> ArrayD<R> {
    // The operator's own input tells it the shape and the ids; the values are those of the definition.
    let (values, input) = match x {
        Signal::Values(values) => {
            let input = <O::Input<'static, f64>>::from_values(values.mapv(R::value));
            (values.iter().copied().collect::<Vec<_>>(), input)
        }
        Signal::Ids(ids) => (Vec::new(), <O::Input<'static, f64>>::from_ids(ids)),
    };
    let input = input.expect("an input that fits");
    let stored = parameters("weight");
    let weight = operator.weight_matrix(stored.view());
    let bias = bias.then(|| parameters("bias"));
    let [outer, inner] = operator.places(&input);
    let mut y = Array3::from_elem((outer, operator.units(), inner), R::constant(0.0));
    {
        let y = y.as_slice_mut().expect("a fresh array");
        operator.terms(&input, |term| {
            let w = weight[[term.unit, term.column]] * R::constant(term.factor);
            y[term.output] = y[term.output] + term.input.map_or(w, |input| w * values[input]);
        });
    }
    if let Some(bias) = bias {
        y.indexed_iter_mut().for_each(|((_, unit, _), y)| *y = *y + bias[[unit]]);
    }
    let y: Array3<R> = y.into_dimensionality::<Ix3>().expect("three axes");
    let shape = operator.output_shape(&input).expect("an input that fits");
    ArrayD::from_shape_vec(shape, y.into_raw_vec_and_offset().0).expect("as many outputs")
}

/// PyTorch's `nn.Linear`: x `[..., in_features]`.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Described, LinearMap, Signal};
/// let linear = LinearMap { in_features: 2, out_features: 1, bias: true };
/// let parameters = |name: &str| match name {
///     "weight" => array![[3.0, 4.0]].into_dyn(), // [out_features, in_features]
///     _ => array![0.5].into_dyn(), // [out_features]
/// };
/// let y = linear.define(Signal::Values(array![[1.0, 2.0]].into_dyn()), &parameters);
/// assert_eq!(y, array![[11.5]].into_dyn());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearMap {
    /// Features of x.
    pub in_features: usize,
    /// Features of y.
    pub out_features: usize,
    /// Whether there is a bias.
    #[serde(default = "yes")]
    pub bias: bool,
}

impl LinearMap {
    pub(super) fn operator(&self) -> Result<Linear> {
        check_positive("in_features", self.in_features)?;
        check_positive("out_features", self.out_features)?;
        Linear::from_weight_shape(LinearSettings::default(), &[self.out_features, self.in_features])
    }
}

impl Described for LinearMap {
    fn build<T: Scalar>(&self, rng: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        fresh(self.operator()?, self.bias, Start::Uniform, rng)
    }
    fn elements(&self) -> Result<usize> {
        elements(&self.operator()?, self.bias)
    }
    fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
        define(&self.operator().expect("settings that fit"), x, self.bias, parameters)
    }
}

/// PyTorch's `nn.Embedding`: ids `[...]`, y `[..., embedding_dim]`.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Described, EmbeddingTable, Pass, Signal};
/// let table = EmbeddingTable { num_embeddings: 3, embedding_dim: 2, padding_idx: Some(0), embed_scale: None };
/// let module = table.build::<f64>(&mut rand::SeedableRng::seed_from_u64(0))?;
/// let (_, backward) = module.forward(Signal::Ids(array![0, 2, 2].into_dyn()), &Pass::evaluation())?;
/// let dweight = backward(array![[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]].into_dyn())?.parameters.remove(0).1;
/// assert_eq!(dweight, array![[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]].into_dyn()); // [num_embeddings, embedding_dim]
/// assert!(module.forward(Signal::Ids(array![3].into_dyn()), &Pass::evaluation()).is_err()); // C9
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingTable {
    /// How many ids there are.
    pub num_embeddings: usize,
    /// Features of each.
    pub embedding_dim: usize,
    /// An id whose row gets no gradient.
    #[serde(default)]
    pub padding_idx: Option<usize>,
    /// What every row is multiplied by when it is looked up.
    #[serde(default)]
    pub embed_scale: Option<f64>,
}

impl EmbeddingTable {
    fn operator(&self) -> Result<Embedding> {
        check_positive("num_embeddings", self.num_embeddings)?;
        check_positive("embedding_dim", self.embedding_dim)?;
        let &Self { padding_idx, embed_scale, .. } = self;
        let settings = EmbeddingSettings { padding_idx, embed_scale, ..EmbeddingSettings::default() };
        Embedding::from_weight_shape(settings, &[self.num_embeddings, self.embedding_dim])
    }
}

impl Described for EmbeddingTable {
    fn build<T: Scalar>(&self, rng: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        fresh(self.operator()?, false, Start::Normal, rng)
    }
    fn elements(&self) -> Result<usize> {
        elements(&self.operator()?, false)
    }
    fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
        define(&self.operator().expect("settings that fit"), x, false, parameters)
    }
}

/// PyTorch's `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: x `[batch, in_channels, size...]`.
///
/// ```
/// use ndarray::ArrayD;
/// use woracle::modules::{ConvolutionSettings, Described, Pass, Signal};
/// let settings: ConvolutionSettings<2> =
///     serde_json::from_str(r#"{"in_channels": 1, "out_channels": 4, "kernel_size": 3, "padding": "same"}"#).unwrap();
/// let module = settings.build::<f32>(&mut rand::SeedableRng::seed_from_u64(0))?;
/// let (y, _) = module.forward(Signal::Values(ArrayD::zeros(vec![2, 1, 8, 8])), &Pass::evaluation())?;
/// assert_eq!(y.shape(), [2, 4, 8, 8]); // [batch, out_channels, size...]
/// assert_eq!(module.parameters()[0].values.shape(), [4, 1, 3, 3]); // [out_channels, in_channels / groups, kernel...]
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConvolutionSettings<const N: usize> {
    /// Channels of x.
    pub in_channels: usize,
    /// Channels of y.
    pub out_channels: usize,
    /// Lengths of the kernel: one number for every axis, or one an axis.
    pub kernel_size: Extents,
    /// The step of the output; 1 where nothing is said.
    #[serde(default)]
    pub stride: Option<Extents>,
    /// What is put around the input; nothing where nothing is said.
    #[serde(default)]
    pub padding: Option<Padding>,
    /// The step within the kernel; 1 where nothing is said.
    #[serde(default)]
    pub dilation: Option<Extents>,
    /// The number of groups; 1 where nothing is said.
    #[serde(default)]
    pub groups: Option<usize>,
    /// How the padding is filled.
    #[serde(default)]
    pub padding_mode: PaddingMode,
    /// Whether there is a bias.
    #[serde(default = "yes")]
    pub bias: bool,
}

impl<const N: usize> ConvolutionSettings<N> {
    fn operator(&self) -> Result<Conv<N>> {
        check_positive("in_channels", self.in_channels)?;
        check_positive("out_channels", self.out_channels)?;
        let kernel: [usize; N] = self.kernel_size.each("kernel_size", 1)?;
        let usual = ConvSettings::default();
        let groups = self.groups.unwrap_or(1);
        if groups == 0 || !self.in_channels.is_multiple_of(groups) {
            let expected = format!("a divisor of in_channels = {}", self.in_channels);
            return Err(Error::Setting { name: "groups", expected, found: groups.to_string() }); // C4
        }
        let settings = ConvSettings {
            stride: self.stride.clone().unwrap_or(usual.stride),
            padding: self.padding.clone().unwrap_or(usual.padding),
            dilation: self.dilation.clone().unwrap_or(usual.dilation),
            groups,
            padding_mode: self.padding_mode,
        };
        let shape: Vec<usize> = [self.out_channels, self.in_channels / groups].into_iter().chain(kernel).collect();
        Conv::from_weight_shape(settings, &shape)
    }
}

impl<const N: usize> Described for ConvolutionSettings<N> {
    fn build<T: Scalar>(&self, rng: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        fresh(self.operator()?, self.bias, Start::Uniform, rng)
    }
    fn elements(&self) -> Result<usize> {
        elements(&self.operator()?, self.bias)
    }
    fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
        define(&self.operator().expect("settings that fit"), x, self.bias, parameters)
    }
}
