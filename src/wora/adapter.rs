//! The tensors of a layer: what is frozen ([`Base`]) and what is learned ([`Adapter`]).
//!
//! An adapter's gradients are an [`Adapter`] too, so that optimisers, checks and files walk one list.

use super::{Config, Method};
use crate::error::{check_finite, check_shape};
use crate::operators::Operator;
use crate::{Error, NormAxis, Result, Scalar};
use ndarray::{ArcArray, ArrayD, ArrayViewD, ArrayViewMutD, Axis, IxDyn};
use rand::{Rng, RngExt};
use rand_distr::StandardNormal;

/// The frozen layer under an adapter: PyTorch's `base_layer`, or rather its tensors. SPEC.md, section 1, has the shapes
/// of every layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Base<E> {
    /// W0, as stored: linear `[out, in]`, or `[in, out]` with fan_in_fan_out; embedding `[num_embeddings,
    /// embedding_dim]`; convolution `[out, in / groups, kernel...]`. Whoever has it already shares it.
    pub weight: ArcArray<E, IxDyn>,
    /// b: `[out]`. It is never scaled, and an embedding has none.
    pub bias: Option<ArrayD<E>>,
}

/// The learned tensors, or their gradients.
///
/// ```
/// use ndarray::array;
/// use woracle::operators::{Linear, Operator};
/// use woracle::wora::{Adapter, Method};
/// let lora = Linear::LORA_NAMES; // an embedding's have other names
/// let adapter = Adapter::from_named(Method::Dora, lora, |name| {
///     Ok(match name {
///         "lora_A" => array![[1.0, 2.0, 3.0]].into_dyn(), // [rank, in]
///         "lora_B" => array![[4.0], [5.0]].into_dyn(), // [out, rank]
///         _ => array![6.0, 7.0].into_dyn(), // m [out]
///     })
/// })?;
/// let names: Vec<&str> = adapter.named(lora).into_iter().map(|(name, _)| name).collect();
/// assert_eq!(names, ["lora_A", "lora_B", "lora_magnitude_vector"]); // DoRA learns neither alpha nor beta
/// assert_eq!(adapter.rank(), 1);
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter<E> {
    /// A: linear `[rank, in]`; embedding `[rank, num_embeddings]`; convolution `[rank, in / groups, kernel...]`.
    pub lora_a: ArrayD<E>,
    /// B: linear `[out, rank]`; embedding `[embedding_dim, rank]`; convolution `[out, rank / groups, 1...]`.
    pub lora_b: ArrayD<E>,
    /// m: `[out]`, in a convolution `[1, out, 1...]`; `[in]` or `[1, in]` with `norm_axis = "input"`; `None` for LoRA.
    /// Any finite number.
    pub magnitude: Option<ArrayD<E>>,
    /// alpha: `[]`; `None` for LoRA and DoRA, where it is 1 and not trained.
    pub alpha: Option<ArrayD<E>>,
    /// beta: `[]`; `None` for LoRA and DoRA, where it is 1 and not trained.
    pub beta: Option<ArrayD<E>>,
}

/// How the random one of the pair is drawn.
#[derive(Clone, Copy)]
enum Start {
    /// Within the bound of E38.
    Uniform,
    /// Around 0 with this standard deviation.
    Normal(f64),
}

/// How A starts; B starts at zero. An embedding starts as PEFT has it whichever is chosen: A zero, B standard
/// normal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraInit {
    /// Uniform within `1 / sqrt(fan_in)`: Kaiming-uniform with a = sqrt(5). PEFT's default.
    #[default]
    KaimingUniform,
    /// Normal with standard deviation `1 / rank`. PEFT's `init_lora_weights="gaussian"`.
    Gaussian,
}

/// What the magnitude, alpha and beta are called in files, in that order after the pair's two names.
pub(crate) const SCALE_NAMES: [&str; 3] = ["lora_magnitude_vector", "lora_wora_alpha", "lora_wora_beta"];

impl<E> Adapter<E> {
    /// The tensors there are, under the names they have in files and in their shapes there; `lora` names A and B, as
    /// [`Operator::LORA_NAMES`](crate::operators::Operator::LORA_NAMES) does.
    pub fn named(&self, lora: [&'static str; 2]) -> Vec<(&'static str, ArrayViewD<'_, E>)> {
        let fields =
            [Some(&self.lora_a), Some(&self.lora_b), self.magnitude.as_ref(), self.alpha.as_ref(), self.beta.as_ref()];
        let names = lora.into_iter().chain(SCALE_NAMES);
        names.zip(fields).filter_map(|(name, field)| Some((name, field?.view()))).collect()
    }

    /// The same tensors, to be changed; their shapes cannot be.
    pub fn named_mut(&mut self, lora: [&'static str; 2]) -> Vec<(&'static str, ArrayViewMutD<'_, E>)> {
        let fields = [
            Some(&mut self.lora_a),
            Some(&mut self.lora_b),
            self.magnitude.as_mut(),
            self.alpha.as_mut(),
            self.beta.as_mut(),
        ];
        let names = lora.into_iter().chain(SCALE_NAMES);
        names.zip(fields).filter_map(|(name, field)| Some((name, field?.view_mut()))).collect()
    }

    /// An adapter from its tensors by name: `get` finds the required ones of the method (C7), each as stored. Shapes
    /// are checked by [`Layer::new`](super::Layer::new).
    ///
    /// # Errors
    ///
    /// Whatever `get` says of a tensor that it does not find.
    pub fn from_named(
        method: Method,
        lora: [&'static str; 2],
        mut get: impl FnMut(&'static str) -> Result<ArrayD<E>>,
    ) -> Result<Self> {
        let [magnitude, alpha, beta] = SCALE_NAMES;
        Ok(Self {
            lora_a: get(lora[0])?,
            lora_b: get(lora[1])?,
            magnitude: (method != Method::Lora).then(|| get(magnitude)).transpose()?,
            alpha: (method == Method::Wora).then(|| get(alpha)).transpose()?,
            beta: (method == Method::Wora).then(|| get(beta)).transpose()?,
        })
    }

    /// The rank: the length of A's first axis.
    pub fn rank(&self) -> usize {
        self.lora_a.shape().first().copied().unwrap_or(0)
    }
}

impl<E: Copy> Adapter<E> {
    /// The learned alpha, or `one` where it is not trained.
    pub(crate) fn alpha_or(&self, one: E) -> E {
        self.alpha.as_ref().map_or(one, |alpha| alpha[IxDyn(&[])])
    }
    /// The learned beta, or `one` where it is not trained.
    pub(crate) fn beta_or(&self, one: E) -> E {
        self.beta.as_ref().map_or(one, |beta| beta[IxDyn(&[])])
    }
}

impl<T: Scalar> Adapter<T> {
    /// PEFT's start: A random, B zero, alpha = beta = 1. The magnitude, which is `||V||` of the layer it
    /// is put on, is filled in by [`Layer::init`](super::Layer::init). E38
    ///
    /// # Errors
    ///
    /// If the rank is 0 (C3) or no multiple of the groups.
    pub(crate) fn init<O: Operator>(
        operator: &O,
        config: &Config,
        rank: usize,
        init: LoraInit,
        rng: &mut impl Rng,
    ) -> Result<Self> {
        check_rank(operator, rank)?;
        let [shape_a, shape_b] = operator.lora_shapes(rank);
        let bound = 1.0 / (operator.fan_in() as f64).sqrt();
        let one = || ArrayD::from_elem(IxDyn(&[]), T::one());
        let mut random = |init| match init {
            Start::Uniform => rng.random_range(-bound..bound),
            Start::Normal(deviation) => rng.sample::<f64, _>(StandardNormal) * deviation,
        };
        let (start, shape) = match (O::LORA_A_STARTS_AT_ZERO, init) {
            (true, _) => (Start::Normal(1.0), &shape_b),
            (false, LoraInit::KaimingUniform) => (Start::Uniform, &shape_a),
            (false, LoraInit::Gaussian) => (Start::Normal(1.0 / rank as f64), &shape_a),
        };
        let drawn = ArrayD::from_shape_simple_fn(shape.as_slice(), || T::from_f64(random(start)));
        let (lora_a, lora_b) = match O::LORA_A_STARTS_AT_ZERO {
            true => (ArrayD::zeros(shape_a), drawn),
            false => (drawn, ArrayD::zeros(shape_b)),
        };
        Ok(Self {
            lora_a,
            lora_b,
            magnitude: config.has_norm().then(|| ArrayD::zeros(magnitude_shape(operator, config))),
            alpha: (config.method == Method::Wora).then(one),
            beta: (config.method == Method::Wora).then(one),
        })
    }
}

/// The shape in which m is stored: `[units]` beside a matrix, `[1, units, 1...]` beside a kernel.
pub(crate) fn magnitude_shape<O: Operator>(operator: &O, config: &Config) -> Vec<usize> {
    let weight = operator.weight_shape();
    if config.norm_axis == NormAxis::Input {
        return vec![operator.fan_in()];
    }
    if weight.len() == 2 {
        return vec![operator.units()];
    }
    (0..weight.len()).map(|axis| if axis == 1 { operator.units() } else { 1 }).collect()
}

fn check_rank<O: Operator>(operator: &O, rank: usize) -> Result<()> {
    let groups = operator.groups();
    if rank == 0 || !rank.is_multiple_of(groups) {
        let expected =
            if groups == 1 { "1 or more".into() } else { format!("a positive multiple of groups = {groups}") };
        return Err(Error::Setting { name: "rank", expected, found: rank.to_string() }); // C3
    }
    Ok(())
}

/// Fails unless every tensor has the shape that the operator and the method demand, and all but W0 is finite. C1, C2, C3, C7
pub(crate) fn check_tensors<O: Operator, T: Scalar>(
    operator: &O,
    config: &Config,
    base: &Base<T>,
    adapter: &Adapter<T>,
) -> Result<()> {
    check_shape("base.weight", &operator.weight_shape(), base.weight.shape())?;
    if base.weight.is_empty() {
        let (tensor, expected) = ("base.weight".into(), "no length to be 0".into());
        return Err(Error::Shape { tensor, expected, found: base.weight.shape().to_vec() }); // C1
    }
    if let Some(bias) = &base.bias {
        check_shape("base.bias", &[operator.units()], bias.shape())?;
    }
    let [name_a, name_b] = O::LORA_NAMES;
    if adapter.rank() == 0 {
        let [shape_a, _] = operator.lora_shapes(1);
        let expected = format!(
            "[rank, {}], rank 1 or more",
            shape_a[1..].iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
        );
        return Err(Error::Shape { tensor: name_a.into(), expected, found: adapter.lora_a.shape().to_vec() }); // C3
    }
    if let Some(reason) = operator.foreign_lora_a(adapter.lora_a.shape()) {
        return Err(Error::Unexpected { tensor: name_a.into(), reason }); // C1
    }
    check_rank(operator, adapter.rank())?;
    let [shape_a, shape_b] = operator.lora_shapes(adapter.rank());
    check_shape(name_a, &shape_a, adapter.lora_a.shape())?;
    check_shape(name_b, &shape_b, adapter.lora_b.shape())?;
    let [name_m, name_alpha, name_beta] = SCALE_NAMES;
    let present = [
        (name_m, &adapter.magnitude, config.has_norm()),
        (name_alpha, &adapter.alpha, config.method == Method::Wora),
        (name_beta, &adapter.beta, config.method == Method::Wora),
    ];
    for (name, tensor, needed) in present {
        match (tensor, needed) {
            (None, true) => {
                let expected = format!("a tensor, as the method is {:?}", config.method);
                return Err(Error::Missing { tensor: name.into(), expected }); // C7
            }
            (Some(_), false) => {
                let reason = format!("expected none, as the method is {:?}", config.method);
                return Err(Error::Unexpected { tensor: name.into(), reason }); // C7
            }
            _ => {}
        }
    }
    if let Some(magnitude) = &adapter.magnitude {
        let expected = magnitude_shape(operator, config);
        // PEFT's code and the published one store the per-input magnitude [in] and [1, in].
        let row = config.norm_axis == NormAxis::Input && magnitude.shape() == [1, expected[0]];
        if !row {
            check_shape(name_m, &expected, magnitude.shape())?;
        }
    }
    for (name, scalar) in [(name_alpha, &adapter.alpha), (name_beta, &adapter.beta)] {
        if let Some(scalar) = scalar {
            check_shape(name, &[], scalar.shape())?;
        }
    }
    let bias = base.bias.iter().map(|bias| ("base.bias", bias.view()));
    bias.chain(adapter.named(O::LORA_NAMES)).try_for_each(|(name, values)| check_finite(name, values)) // C2
}

/// A stored tensor as a matrix: its first axis, then all others as one.
pub(crate) fn as_matrix<E>(stored: &ArrayD<E>) -> ndarray::ArrayView2<'_, E> {
    let rows = stored.len_of(Axis(0));
    let columns: usize = stored.shape()[1..].iter().product();
    stored.view().into_shape_with_order((rows, columns)).expect("a tensor in standard layout")
}
