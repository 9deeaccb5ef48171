//! The list of layers. Everything that checks, verifies, writes, times or explains iterates it: a new layer
//! is one line here. The modules beside them are listed in `modules/settings.rs`, and checked with them.
//!
//! ```
//! let names: Vec<_> = woracle::registry::LAYERS.iter().map(|layer| layer.name()).collect();
//! assert!(names.contains(&"linear"));
//! ```

use crate::bench::{StepOf, TrainingStep};
use crate::case::{Case, Tensor, Tensors, Values};
use crate::cases::{CONV1D, CONV2D, CONV3D, EMBEDDING, LINEAR, MODULES, ModuleSpec, Spec, Twist, draw};
use crate::error::check_shape;
use crate::mistakes::{Anchor, Evaluated, Formula, FormulaResults, Mistake, Spoiling, TracedForward, results};
use crate::operators::{
    Conv1d, Conv2d, Conv3d, Embedding, Input, Linear, Operator, PARALLEL_ELEMENTS, in_standard_layout,
};
use crate::traced::Traced;
use crate::wora::{
    Adapter, Base, Cache, Config, Definition, Evaluation, Gradients, Layer, Line, Method, NormGradient, RequiresGrad,
    SCALE_NAMES, Storage, Workspace, as_matrix, check_mask, watched,
};
use crate::{Counted, Dual, DualForward, Error, Real, Result, Rounded, Scalar};
use ndarray::{ArcArray, Array1, Array2, ArrayD, ArrayView1, ArrayView2, ArrayViewD, Axis, IxDyn, Zip};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Mutex;

/// Nothing in a case vouches for an output that it does not have, so it may not be larger.
const MOST_OUTPUTS: usize = 1 << 26;

/// Every layer.
pub static LAYERS: &[&dyn Subject] = &[
    &Adapted::<Linear>::new("linear", LINEAR),
    &Adapted::<Embedding>::new("embedding", EMBEDDING),
    &Adapted::<Conv1d>::new("conv1d", CONV1D),
    &Adapted::<Conv2d>::new("conv2d", CONV2D),
    &Adapted::<Conv3d>::new("conv3d", CONV3D),
];

/// The names of all layers, as they are told to somebody who gave another.
///
/// ```
/// assert_eq!(woracle::registry::names(), "linear, embedding, conv1d, conv2d, conv3d");
/// ```
pub fn names() -> String {
    LAYERS.iter().map(|layer| layer.name()).collect::<Vec<_>>().join(", ")
}

/// The layer of this name.
///
/// # Errors
///
/// A name that no layer has.
pub fn layer(name: &str) -> Result<&'static dyn Subject> {
    LAYERS.iter().copied().find(|layer| layer.name() == name).ok_or_else(|| Error::Unknown {
        what: "layer",
        expected: names(),
        found: name.into(),
    })
}

/// Every case of every layer.
pub fn specs() -> impl Iterator<Item = (&'static dyn Subject, &'static Spec)> {
    LAYERS.iter().flat_map(|&layer| layer.specs().iter().map(move |spec| (layer, spec)))
}

/// Something that is checked: a case of a layer, or of a module or a loss.
///
/// ```
/// use woracle::gradcheck::{Options, check_entry};
/// use woracle::registry::{Entry, choose, entries};
/// let relu = choose(entries().collect(), "module-relu", |entry: &Entry| entry.name(), "a case's name")?;
/// assert_eq!(relu.len(), 1); // the whole name: none that merely contains it
/// assert!(check_entry(relu[0], Options::default()).agrees());
/// assert!(choose(entries().collect(), "no such case", |entry: &Entry| entry.name(), "a case's name").is_err());
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy)]
pub enum Entry {
    /// A case of a layer.
    Layer(&'static dyn Subject, &'static Spec),
    /// A case of a module or a loss.
    Module(&'static ModuleSpec),
}

impl Entry {
    /// The case's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Layer(_, spec) => spec.name,
            Self::Module(spec) => spec.name,
        }
    }
}

/// Everything that is checked.
pub fn entries() -> impl Iterator<Item = Entry> {
    specs().map(|(layer, spec)| Entry::Layer(layer, spec)).chain(MODULES.iter().map(Entry::Module))
}

/// The one whose name the filter is, or all whose names contain it; `what` says what it is a part of.
///
/// # Errors
///
/// A filter that selects nothing.
pub fn choose<T>(all: Vec<T>, filter: &str, name: impl Fn(&T) -> &str, what: &str) -> Result<Vec<T>> {
    let exact = all.iter().any(|one| name(one) == filter);
    let fits = |one: &T| if exact { name(one) == filter } else { name(one).contains(filter) };
    let chosen: Vec<T> = all.into_iter().filter(fits).collect();
    if chosen.is_empty() {
        let expected = format!("part of {what}");
        return Err(Error::Unknown { what: "FILTER", expected, found: filter.into() });
    }
    Ok(chosen)
}

/// A forward as a function of the tensors of a case.
pub type Forward = Box<dyn Fn(&Case) -> Result<ArrayD<f64>> + Send + Sync>;

/// There and back: merging and unmerging, in f64.
#[derive(Debug)]
pub struct RoundTrip {
    /// y of the adapted layer, without a mask, in the shape of y.
    pub adapted: ArrayD<f64>,
    /// y of the plain layer with the merged weight, in the shape of y.
    pub merged: ArrayD<f64>,
    /// W0 restored from the merged weight, in the shape in which it is stored, or why it cannot be (C6).
    pub restored: Result<ArrayD<f64>>,
}

/// The types of numbers that the production path runs in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32
    #[default]
    F32,
    /// f64
    F64,
}

impl Precision {
    /// Both.
    pub const ALL: [Self; 2] = [Self::F32, Self::F64];

    /// `"f32"` or `"f64"`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => f32::NAME,
            Self::F64 => f64::NAME,
        }
    }
}

/// A layer as everything that iterates the registry sees it.
///
/// Results are named as in a case file: `y`, `grad.x`, `grad.lora_A`, ..., `weight_norm`, `merged_weight`.
///
/// ```
/// use woracle::registry::{self, Precision};
/// let conv = registry::layer("conv2d")?;
/// let case = conv.draw(&conv.specs()[0], 0);
/// let (ours, defined) = (conv.evaluate(&case, Precision::F64)?, conv.define(&case)?);
/// assert!((&ours["grad.lora_A"] - &defined["grad.lora_A"]).iter().all(|difference| difference.abs() < 1e-12));
/// let trip = conv.merge(&case)?;
/// assert!((&trip.adapted - &trip.merged).iter().all(|difference| difference.abs() < 1e-12));
/// let base = case.values("base.weight")?;
/// assert!((trip.restored? - base).iter().all(|difference| difference.abs() < 1e-12));
/// assert!(conv.is_input(&case, "x")? && !conv.is_input(&case, "y")?);
/// assert_eq!(conv.lora_names(), ["lora_A", "lora_B"]);
/// # Ok::<(), woracle::Error>(())
/// ```
pub trait Subject: Sync {
    /// The name, as `layer` in a case file.
    fn name(&self) -> &'static str;
    /// Its cases.
    fn specs(&self) -> &'static [Spec];
    /// The case of a spec of this layer.
    ///
    /// # Panics
    ///
    /// If the spec contradicts itself.
    fn draw(&self, spec: &Spec, seed: u64) -> Case {
        self.try_draw(spec, seed).expect("a spec that does not contradict itself")
    }
    /// The case of any spec.
    ///
    /// # Errors
    ///
    /// A spec that contradicts itself.
    fn try_draw(&self, spec: &Spec, seed: u64) -> Result<Case>;
    /// Forward, and backward where there is a cotangent, by the production path.
    ///
    /// # Errors
    ///
    /// A tensor or a setting that does not fit the layer (C1 to C8).
    fn evaluate(&self, case: &Case, precision: Precision) -> Result<Tensors>;
    /// The same by the definition, in f64.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn define(&self, case: &Case) -> Result<Tensors>;
    /// The same on numbers that estimate their own rounding errors.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn roundings(&self, case: &Case) -> Result<BTreeMap<String, ArrayD<Rounded>>>;
    /// The answers that a case holds, by the production path, and for each way of storing intermediates how far off
    /// they may be (see [`Layer::rounding`]), in unit roundoffs.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn expect(&self, case: &Case, storages: &[Storage]) -> Result<(Tensors, Vec<Tensors>)>;
    /// Every line that the definition works out in a case, and every line that the production path does.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn walk(&self, case: &Case) -> Result<[Vec<Line>; 2]>;
    /// The layer of a case, its input and its cotangent, to be run again and again.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`]; a case without a cotangent.
    fn training_step(&self, case: &Case, precision: Precision) -> Result<Box<dyn TrainingStep>>;
    /// How many products the definition's forward adds up.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn terms(&self, case: &Case) -> Result<usize>;
    /// The surrogate (see [`Subject::surrogate`]) by the definition, as a function of dual numbers whose values are
    /// those of the case.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn dual(&self, case: &Case) -> Result<DualForward>;
    /// The production forward whose gradient the backward claims to be: with the norms held at those of this
    /// case where they are detached, or where there is no direction, and with what is looked up moved by the
    /// operator's fraction of any change of A and W0 alone.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn surrogate(&self, case: &Case) -> Result<Forward>;
    /// The layer in evaluation mode, adapted and merged, and what unmerging makes of the merged weight.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn merge(&self, case: &Case) -> Result<RoundTrip>;
    /// Whether a case of this layer has an input of this name.
    ///
    /// # Errors
    ///
    /// Settings that are none of this layer's (C4).
    fn is_input(&self, case: &Case, tensor: &str) -> Result<bool>;
    /// Whether every gradient is one of the loss, or with the norm held of the surrogate: not so where a lookup
    /// passes on only a fraction (E41).
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn is_gradient_of_the_loss(&self, case: &Case) -> Result<bool>;
    /// A formula, right or mistaken, as a function of traced numbers that take the place of the case's tensors; where
    /// the formula holds its norm, it is held at that of the case. `None` where the mistake cannot be made.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn formula(&self, formula: &Formula, case: &Case) -> Result<Option<TracedForward>>;
    /// What the low-rank pair is called: A, then B.
    fn lora_names(&self) -> [&'static str; 2];
    /// Whether that forward is affine in this tensor alone.
    ///
    /// # Errors
    ///
    /// As [`Subject::evaluate`].
    fn is_affine(&self, case: &Case, tensor: &str) -> Result<bool>;
}

/// Sums of fewer units than this are exact in bf16, the type with the fewest digits, in any order.
pub const EXACT: f64 = 256.0;
/// How often an exact case is drawn: most draws are sparse enough.
const ATTEMPTS: usize = 10_000;

/// A LoRA, DoRA or WoRA layer over an operator.
struct Adapted<O> {
    name: &'static str,
    specs: &'static [Spec],
    operator: PhantomData<fn() -> O>,
}

/// The tensors of a case as a layer takes them.
struct Parts<O: Operator, T: Scalar> {
    layer: Layer<O, T>,
    x: O::Input<'static, T>,
    mask: Option<ArrayD<T>>,
    dy: Option<ArcArray<T, IxDyn>>,
}

impl<O: Operator> Adapted<O> {
    const fn new(name: &'static str, specs: &'static [Spec]) -> Self {
        Self { name, specs, operator: PhantomData }
    }

    fn config(case: &Case) -> Result<Config> {
        case.settings()
    }

    fn parts<T: Scalar>(case: &Case) -> Result<Parts<O, T>> {
        let cast = |values: &Values| T::from_shared(values).into_owned();
        let config = Self::config(case)?;
        let weight = case.stored("base.weight")?;
        let operator = O::from_weight_shape(case.settings()?, weight.shape())?;
        let base = Base { weight: T::from_shared(weight), bias: case.optional("base.bias")?.map(cast) };
        let adapter = Adapter::from_named(config.method, O::LORA_NAMES, |name| case.values(name).map(cast))?;
        let layer = Layer::new(operator, config, base, adapter)?;
        let mask = case.optional("dropout_mask")?.map(cast);
        let dy = case.optional("grad.y")?.map(T::from_shared);
        let x = Self::input(case)?;
        // Before anything is computed: what an absurd setting asks for may be more than there is memory.
        let output_shape = layer.operator().output_shape(&x)?;
        let y = case.tensors.get("y").map(|y| ("y", y.shape()));
        let outputs = dy.as_ref().map(|dy| ("grad.y", dy.shape())).into_iter().chain(y);
        outputs.into_iter().try_for_each(|(name, shape)| check_shape(name, &output_shape, shape))?; // C1
        let elements: usize = output_shape.iter().product();
        if y.is_none() && dy.is_none() && elements > MOST_OUTPUTS {
            let expected = format!("no more than {MOST_OUTPUTS} elements where the case has neither y nor grad.y");
            return Err(Error::Shape { tensor: "y".into(), expected, found: output_shape });
        }
        Ok(Parts { layer, x, mask, dy })
    }

    fn input<T: Scalar>(case: &Case) -> Result<O::Input<'static, T>> {
        let refuse = |reason: &str| Error::Unexpected { tensor: "x".into(), reason: reason.into() };
        match case.tensors.get("x") {
            Some(Tensor::Int(ids)) => <O::Input<'static, T>>::from_ids(ids.clone())
                .ok_or_else(|| refuse("expected floating-point values, found integers")),
            _ => {
                let values = case.values("x")?;
                let values = if values.len() < PARALLEL_ELEMENTS {
                    values.mapv(T::from_f64)
                } else {
                    Zip::from(values).par_map_collect(|&value| T::from_f64(value))
                };
                <O::Input<'static, T>>::from_values(values)
                    .ok_or_else(|| refuse("expected integer ids, found floating-point values"))
            }
        }
    }

    /// Everything by the production path, and what its forward kept; of the weights, and of the gradients beside the
    /// adapter's, what is wanted.
    fn produce<T: Scalar>(
        parts: &Parts<O, T>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(Evaluation<T>, Cache<'_, O, T>)> {
        let Parts { layer, x, mask, dy } = parts;
        let (y, cache) = layer.forward(O::lend(x), mask.as_ref().map(|values| values.view()))?;
        let requires_grad =
            RequiresGrad { x: wanted("grad.x"), weight: wanted("grad.base.weight"), bias: wanted("grad.base.bias") };
        let gradients = dy.as_ref().map(|dy| layer.backward_of(&cache, dy.view(), requires_grad)).transpose()?;
        let norms = cache.direction().map(|direction| (direction.weight_norm.clone(), direction.gain.clone()));
        let (weight_norm, gain) = norms.unzip();
        let weighted = wanted("weighted").then(|| layer.weighted());
        let merged = wanted("merged_weight").then(|| layer.merge()).transpose()?;
        let merged_weight = merged.map(|merged| merged.weight);
        Ok((Evaluation { y, weighted, weight_norm, gain, merged_weight, gradients }, cache))
    }

    fn run<T: Scalar>(case: &Case) -> Result<Tensors> {
        Ok(Self::tensors(Self::produce(&Self::parts::<T>(case)?, |_| true)?.0, T::as_f64))
    }

    fn step<T: Scalar>(case: &Case) -> Result<Box<dyn TrainingStep>> {
        case.values("grad.y")?;
        let Parts { layer, x, dy, .. } = Self::parts::<T>(case)?;
        Ok(Box::new(StepOf::new(layer, x, dy.expect("a cotangent").into_owned())))
    }

    /// Hands the definition of a case, on numbers made of f64 by `lift`, and the cotangent to `run`.
    fn with_definition<R: Real, Out>(
        case: &Case,
        lift: impl Fn(&str, ArrayViewD<'_, f64>) -> ArrayD<R>,
        run: impl FnOnce(Definition<'_, '_, O, R>, Option<ArrayViewD<'_, f64>>) -> Out,
    ) -> Result<Out> {
        let Parts { layer, x, mask, dy } = Self::parts::<f64>(case)?;
        mask.as_ref().map_or(Ok(()), |mask| check_mask(&x, mask.shape()))?;
        let Base { weight, bias } = layer.base();
        let named: BTreeMap<_, _> = layer.adapter().named(O::LORA_NAMES).into_iter().collect();
        let definition = Definition {
            operator: layer.operator(),
            config: layer.config(),
            input: &x,
            x: x.values().map(|x| lift("x", x)),
            mask: mask.as_ref().map(|mask| lift("dropout_mask", mask.view())),
            base: Base {
                weight: lift("base.weight", weight.view()).into(),
                bias: bias.as_ref().map(|bias| lift("base.bias", bias.view())),
            },
            adapter: Adapter::from_named(layer.config().method, O::LORA_NAMES, |name| {
                Ok(lift(name, named[name].view()))
            })?,
            frozen_norm: None,
        };
        Ok(run(definition, dy.as_ref().map(|values| values.view())))
    }

    /// Everything by the definition, on numbers made of f64 by `lift`.
    fn define_on<R: Real>(case: &Case, lift: impl Fn(f64) -> R) -> Result<BTreeMap<String, ArrayD<R>>> {
        let lift = |_: &str, values: ArrayViewD<'_, f64>| values.mapv(&lift);
        let evaluation = Self::with_definition(case, lift, |definition, dy| definition.evaluate(dy))?;
        Ok(Self::tensors(evaluation, |value| value))
    }

    /// Whether no sum of the definition needs more digits than any type has, and no result is zero altogether.
    fn is_exact(case: &Case) -> bool {
        let all = Self::define_on(case, Counted::constant).expect("a case of a spec");
        let says = |values: &ArrayD<Counted>| values.iter().any(|one| one.value() != 0.0);
        all.values().all(says) && all.values().flatten().all(|one| one.units() < EXACT)
    }

    /// Results under their names in a case file.
    fn tensors<E: Copy, N>(evaluation: Evaluation<E>, read: impl Fn(E) -> N) -> BTreeMap<String, ArrayD<N>> {
        // Numbers that stay what they are stay where they are.
        let read = |values: ArrayD<E>| {
            let shape = values.shape().to_vec();
            let values = in_standard_layout(values).into_raw_vec_and_offset().0;
            ArrayD::from_shape_vec(shape, values.into_iter().map(&read).collect()).expect("as many elements")
        };
        let Evaluation { y, weighted, weight_norm, gain, merged_weight, gradients } = evaluation;
        let weights = [("y", Some(y)), ("weighted", weighted), ("merged_weight", merged_weight)];
        let norms = [("weight_norm", weight_norm), ("gain", gain)];
        let norms = norms.map(|(name, values): (_, Option<Array1<E>>)| (name, values.map(Array1::into_dyn)));
        let all = weights.into_iter().chain(norms);
        let mut named: Vec<_> = all.filter_map(|(name, values)| Some((name.to_string(), values?))).collect();
        if let Some(Gradients { x, weight, bias, adapter }) = gradients {
            let base = [("grad.x", x), ("grad.base.weight", weight), ("grad.base.bias", bias)];
            named.extend(base.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))));
            let adapter = adapter.named(O::LORA_NAMES).into_iter();
            named.extend(adapter.map(|(name, values)| (format!("grad.{name}"), values.to_owned())));
        }
        named.into_iter().map(|(name, values)| (name, read(values))).collect()
    }
}

impl<O: Operator> Subject for Adapted<O> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn specs(&self) -> &'static [Spec] {
        self.specs
    }
    fn try_draw(&self, spec: &Spec, seed: u64) -> Result<Case> {
        let mut attempts = (0..ATTEMPTS as u64).map(|attempt| draw::<O>(spec, self.name, seed, attempt));
        let fits = |case: &Result<Case>| match case {
            Ok(case) => spec.twist != Twist::Exact || Self::is_exact(case),
            Err(_) => true,
        };
        attempts.find(fits).expect("an exact case among the attempts")
    }
    fn evaluate(&self, case: &Case, precision: Precision) -> Result<Tensors> {
        match precision {
            Precision::F32 => Self::run::<f32>(case),
            Precision::F64 => Self::run::<f64>(case),
        }
    }
    fn define(&self, case: &Case) -> Result<Tensors> {
        Self::define_on(case, |value| value)
    }
    fn expect(&self, case: &Case, storages: &[Storage]) -> Result<(Tensors, Vec<Tensors>)> {
        let parts = Self::parts::<f64>(case)?;
        let (results, cache) = Self::produce(&parts, |name| case.tensors.contains_key(name))?;
        let answers = |evaluation| -> Tensors {
            let all = Self::tensors(evaluation, |value| value);
            all.into_iter().filter(|(name, _)| case.tensors.contains_key(name)).collect()
        };
        let dy = parts.dy.as_ref().map(|values| values.view());
        let rounding = |&storage: &Storage| answers(parts.layer.rounding(&cache, dy.clone(), &results, storage));
        let errors = storages.iter().map(rounding).collect();
        Ok((answers(results), errors))
    }
    fn walk(&self, case: &Case) -> Result<[Vec<Line>; 2]> {
        let defined = Self::with_definition(
            case,
            |_, values| values.to_owned(),
            |definition, dy| watched(|watch| definition.evaluate_watched(dy, watch)).1,
        )?;
        let Parts { layer, x, mask, dy } = Self::parts::<f64>(case)?;
        let (done, produced) = watched(|watch| {
            let mask = mask.as_ref().map(|mask| mask.view());
            let (_, cache) = layer.forward_watched(&Workspace::default(), x, mask, watch)?;
            dy.map_or(Ok(()), |dy| layer.backward_watched(&cache, dy.view(), RequiresGrad::ALL, watch).map(|_| ()))
        });
        done.map(|()| [defined, produced])
    }
    fn training_step(&self, case: &Case, precision: Precision) -> Result<Box<dyn TrainingStep>> {
        match precision {
            Precision::F32 => Self::step::<f32>(case),
            Precision::F64 => Self::step::<f64>(case),
        }
    }
    fn terms(&self, case: &Case) -> Result<usize> {
        let operator = O::from_weight_shape(case.settings()?, case.stored("base.weight")?.shape())?;
        let answered = ["y", "grad.y"].into_iter().find_map(|name| case.tensors.get(name));
        let outputs: usize = match answered {
            Some(answer) => answer.shape().iter().product(),
            None => operator.output_shape::<f64>(&Self::input(case)?)?.iter().product(),
        };
        Ok(outputs.saturating_mul(operator.fan_in()))
    }
    fn roundings(&self, case: &Case) -> Result<BTreeMap<String, ArrayD<Rounded>>> {
        Self::define_on(case, Rounded::exact)
    }
    fn dual(&self, case: &Case) -> Result<DualForward> {
        let frozen_norm = match Self::config(case)?.norm_gradient {
            NormGradient::Full => None,
            NormGradient::Detached => {
                Self::with_definition(case, |_, values| values.to_owned(), |definition, _| definition.weight_norm())?
            }
        };
        let (frozen_norm, case) = (frozen_norm.map(|norm| norm.mapv(Dual::constant)), case.clone());
        Ok(Box::new(move |inputs| {
            Self::with_definition(&case, lift(inputs), |definition, _| {
                Definition { frozen_norm: frozen_norm.clone(), ..definition }.evaluate(None).y
            })
        }))
    }
    fn surrogate(&self, case: &Case) -> Result<Forward> {
        let Parts { layer: at_point, x, .. } = Self::parts::<f64>(case)?;
        let here = at_point.direction()?.map(|direction| direction.weight_norm);
        let fraction = at_point.operator().gradient_fraction(&x);
        let detached = Self::config(case)?.norm_gradient == NormGradient::Detached;
        Ok(Box::new(move |case| {
            let Parts { layer, x, mask, .. } = Self::parts::<f64>(case)?;
            let mask = mask.as_ref().map(|values| values.view());
            let norm = match &here {
                None => None,
                Some(here) if detached => Some(here.clone()),
                Some(here) => {
                    // A unit without a direction has zero gradients by convention: it keeps its zero row.
                    let mut norm = layer.direction()?.expect("a method with a norm").weight_norm;
                    Zip::from(&mut norm)
                        .and(here)
                        .for_each(|norm, &here| *norm = if here == 0.0 { 0.0 } else { *norm });
                    Some(norm)
                }
            };
            let looked_up = match &fraction {
                None => layer,
                Some(fraction) => looked_up(&at_point, layer, fraction)?,
            };
            match norm {
                None => looked_up.forward(x, mask).map(|(y, _)| y),
                Some(norm) => looked_up.forward_at_norm(x, mask, norm.view()),
            }
        }))
    }
    fn merge(&self, case: &Case) -> Result<RoundTrip> {
        let Parts { layer, x, .. } = Self::parts::<f64>(case)?;
        let (operator, merged) = (layer.operator(), layer.merge()?);
        let (adapted, _) = layer.forward(x.clone(), None)?;
        let mut y = operator.apply(&x, &[operator.weight_matrix(merged.weight.view())]).swap_remove(0);
        if let Some(bias) = &layer.base().bias {
            for (mut channel, &bias) in y.axis_iter_mut(Axis(1)).zip(bias) {
                channel += bias;
            }
        }
        let y = y.into_shape_with_order(adapted.shape()).expect("as many outputs as the adapted layer's");
        Ok(RoundTrip { adapted, merged: y, restored: layer.unmerge(&merged) })
    }
    fn formula(&self, formula: &Formula, case: &Case) -> Result<Option<TracedForward>> {
        let mut anchor = Self::with_definition(
            case,
            |_, values| values.to_owned(),
            |here, _| Anchor {
                settings: case.settings.clone(),
                weight_norm: None,
                base: here.operator.weight_matrix(here.base.weight.view()).to_owned(),
                lora_a: as_matrix(&here.adapter.lora_a).to_owned(),
            },
        )?;
        let constants = |_: &str, values: ArrayViewD<'_, f64>| values.mapv(Traced::constant);
        let here = Self::with_definition(case, constants, |here, _| formula.weight_norm(&here, &anchor))??;
        let Some(weight_norm) = here else { return Ok(None) };
        anchor.weight_norm = Some(weight_norm);
        let (formula, case) = (*formula, case.clone());
        Ok(Some(Box::new(move |inputs| {
            let results = |there: Definition<'_, '_, O, Traced>| {
                let evaluated = formula.evaluate(&there, &anchor)?;
                let Evaluated { y, weight_norm, gain, weighted, merged } =
                    evaluated.expect("a formula that fits the case");
                let stored = |matrix: Array2<f64>| there.operator.stored_weight(matrix);
                let mut stages = BTreeMap::from([("weighted", stored(weighted)), ("merged_weight", stored(merged))]);
                if there.config.has_norm() {
                    let norms = [("weight_norm", weight_norm), ("gain", gain)];
                    stages.extend(norms.map(|(name, each)| (name, Array1::from(each).into_dyn())));
                }
                Ok(FormulaResults { y, stages })
            };
            Self::with_definition(&case, lift(inputs), |there, _| results(there))?
        })))
    }
    fn is_gradient_of_the_loss(&self, case: &Case) -> Result<bool> {
        let Parts { layer, x, .. } = Self::parts::<f64>(case)?;
        Ok(layer.operator().gradient_fraction(&x).is_none())
    }
    fn lora_names(&self) -> [&'static str; 2] {
        O::LORA_NAMES
    }
    fn is_input(&self, case: &Case, tensor: &str) -> Result<bool> {
        let config = Self::config(case)?;
        let scales = if config.has_norm() { SCALE_NAMES.as_slice() } else { &[] };
        let scales = if config.method == Method::Dora { &scales[..1] } else { scales };
        let always = ["x", "base.weight", "base.bias", "dropout_mask", "grad.y"];
        Ok(always.contains(&tensor) || O::LORA_NAMES.contains(&tensor) || scales.contains(&tensor))
    }
    fn is_affine(&self, case: &Case, tensor: &str) -> Result<bool> {
        let config = Self::config(case)?;
        let through_norm = ["base.weight", O::LORA_NAMES[0], O::LORA_NAMES[1], "lora_wora_alpha", "lora_wora_beta"];
        Ok(!config.has_norm() || config.norm_gradient == NormGradient::Detached || !through_norm.contains(&tensor))
    }
}

/// A case's tensors as other numbers: those given, the others constant.
fn lift<R: Real>(inputs: &BTreeMap<String, ArrayD<R>>) -> impl Fn(&str, ArrayViewD<'_, f64>) -> ArrayD<R> {
    |name, values| inputs.get(name).cloned().unwrap_or_else(|| values.mapv(R::constant))
}

/// The results of someone who makes these mistakes in a case; `None` where they cannot be made, or not together.
///
/// # Errors
///
/// As [`Subject::evaluate`].
pub fn mistaken(subject: &dyn Subject, mistakes: &[&Mistake], case: &Case) -> Result<Option<Tensors>> {
    with_mistakes(subject, case, &subject.define(case)?, |spoiling| results(mistakes, spoiling))
}

/// Hands `run` a case with these right results, in which mistakes can be made one after the other.
pub(crate) fn with_mistakes<Out>(
    subject: &dyn Subject,
    case: &Case,
    right: &Tensors,
    run: impl FnOnce(&Spoiling<'_>) -> Result<Out>,
) -> Result<Out> {
    let formula = |formula: &Formula, case: &Case| subject.formula(formula, case);
    run(&Spoiling { case, lora: subject.lora_names(), right, formula: &formula, known: Mutex::default() })
}

/// The layer in which A and W0 have moved from `from` by only a fraction of the way to `to`, column by column.
fn looked_up<O: Operator>(from: &Layer<O, f64>, to: Layer<O, f64>, fraction: &[f64]) -> Result<Layer<O, f64>> {
    let operator = from.operator();
    let fraction = ArrayView1::from(fraction);
    let between = |from: ArrayView2<'_, f64>, to: ArrayView2<'_, f64>| &from + &((&to - &from) * fraction);
    let lora_a = between(from.a(), to.a()).into_shape_with_order(to.adapter().lora_a.shape()).expect("as many as A");
    let base = Base { weight: operator.stored_weight(between(from.weight(), to.weight())).into(), ..to.base().clone() };
    let adapter = Adapter { lora_a, ..to.adapter().clone() };
    Layer::new(operator.clone(), *to.config(), base, adapter)
}
