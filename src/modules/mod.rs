//! What a small model needs beside its adapted layers: each module has a forward, the backward that belongs to it, and
//! its definition in plain loops. SPEC.md, section 13.
//!
//! A forward hands out its own backward: a closure over what it keeps, which consumes the cotangent once.
//!
//! ```
//! use ndarray::array;
//! use woracle::modules::{Pass, Settings, Signal};
//! let pooling: Settings = serde_json::from_str(r#"{"type": "max_pool1d", "kernel_size": 2}"#).unwrap();
//! let module = pooling.build::<f64>(&mut rand::SeedableRng::seed_from_u64(0))?;
//! let x = array![[[1.0, 3.0, 2.0, 0.0]]].into_dyn(); // [batch, channels, size]
//! let (y, backward) = module.forward(Signal::Values(x), &Pass::evaluation())?;
//! assert_eq!(y, array![[[3.0, 2.0]]].into_dyn());
//! let back = backward(array![[[10.0, 20.0]]].into_dyn())?;
//! assert_eq!(back.x.unwrap(), array![[[0.0, 10.0, 20.0, 0.0]]].into_dyn());
//! # Ok::<(), woracle::Error>(())
//! ```

mod activation;
mod attention;
mod dropout;
mod layer_norm;
mod loss;
mod pass;
mod pooling;
mod position;
mod reduce;
mod sequential;
mod settings;
mod weighted;

pub use activation::{Approximate, GeluSettings, Relu, Tanh};
pub use attention::SelfAttentionSettings;
pub use dropout::DropoutSettings;
pub use layer_norm::LayerNormSettings;
pub use loss::{Loss, Targets};
pub use pass::{Pass, Watch};
pub use pooling::{AveragePooling, MaxPooling};
pub use position::PositionEmbeddingSettings;
pub use reduce::{FlattenSettings, MeanSettings};
pub use sequential::{Named, ResidualSettings, Sequential};
pub use settings::Settings;
pub(crate) use weighted::LARGEST;
pub use weighted::{Adaptable, Adapting, ConvolutionSettings, EmbeddingTable, LinearMap};

use crate::{Real, Result, Scalar};
use ndarray::{ArrayD, ArrayViewD, ArrayViewMutD};
use rand_pcg::Pcg64;

/// What goes into a module: values, or ids that are looked up, in the shape that the module documents.
#[derive(Clone, Debug, PartialEq)]
pub enum Signal<E> {
    /// Values.
    Values(ArrayD<E>),
    /// Ids.
    Ids(ArrayD<i64>),
}

impl<E> Signal<E> {
    /// The shape.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Values(values) => values.shape(),
            Self::Ids(ids) => ids.shape(),
        }
    }

    /// The values, in their shape.
    ///
    /// # Errors
    ///
    /// Ids, which only an embedding takes.
    pub fn values(self) -> Result<ArrayD<E>> {
        match self {
            Self::Values(values) => Ok(values),
            Self::Ids(_) => {
                let reason = "expected floating-point values, found integer ids (an embedding takes those)".into();
                Err(crate::Error::Unexpected { tensor: "x".into(), reason })
            }
        }
    }
}

/// The gradients of one backward.
pub struct Back<T> {
    /// dx, in the shape of x; `None` for ids, or where nothing before the module is trained.
    pub x: Option<ArrayD<T>>,
    /// The gradients of what is trained, by its name within the module.
    pub parameters: Vec<(String, ArrayD<T>)>,
}

impl<T> Back<T> {
    /// Of a module that has nothing to train: dx, in the shape of x.
    pub fn of_input(x: ArrayD<T>) -> Self {
        Self { x: Some(x), parameters: Vec::new() }
    }
}

/// What is to be done with the cotangent of a module's output, in the output's shape: once, as it consumes what the
/// forward kept.
pub type Backward<'m, T> = Box<dyn FnOnce(ArrayD<T>) -> Result<Back<T>> + 'm>;

/// A forward's output, and its backward.
pub type Forward<'m, T> = (ArrayD<T>, Backward<'m, T>);

/// A tensor of a module.
pub struct Parameter<'m, T> {
    /// Its name within the module, as in PyTorch's `state_dict`; an adapter's as in PEFT's files.
    pub name: String,
    /// Its values.
    pub values: ArrayViewD<'m, T>,
    /// Whether it is trained.
    pub trained: bool,
}

/// A part of a model.
///
/// A module of your own has a forward that hands out its backward; whatever has neither parts nor parameters needs no
/// more:
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Back, Forward, Module, Pass, Signal};
/// use woracle::{Result, Scalar};
/// struct Square;
/// impl<T: Scalar> Module<T> for Square {
///     fn forward<'m>(&'m self, x: Signal<T>, _: &Pass<'m, T>) -> Result<Forward<'m, T>> {
///         let x = x.values()?;
///         let y = &x * &x;
///         Ok((y, Box::new(move |dy| Ok(Back::of_input((&x + &x) * dy)))))
///     }
/// }
/// let module: &dyn Module<f64> = &Square;
/// let (y, backward) = module.forward(Signal::Values(array![[3.0, -1.0]].into_dyn()), &Pass::evaluation())?;
/// assert_eq!(y, array![[9.0, 1.0]].into_dyn());
/// assert_eq!(backward(array![[1.0, 10.0]].into_dyn())?.x.unwrap(), array![[6.0, -20.0]].into_dyn());
/// assert!(!module.is_trained() && module.parameters().is_empty());
/// # Ok::<(), woracle::Error>(())
/// ```
pub trait Module<T: Scalar>: Send + Sync {
    /// y, and the backward.
    ///
    /// # Errors
    ///
    /// An input that does not fit (C1).
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>>;
    /// The modules that it is made of, by their names: what follows is by default that of its parts.
    fn parts(&self) -> Vec<(&str, &dyn Module<T>)> {
        Vec::new()
    }
    /// The same, to be changed.
    fn parts_mut(&mut self) -> Vec<(&str, &mut dyn Module<T>)> {
        Vec::new()
    }
    /// Every tensor, trained or not.
    fn parameters(&self) -> Vec<Parameter<'_, T>> {
        let parts = self.parts().into_iter();
        parts
            .flat_map(|(part, module)| {
                let within = module.parameters().into_iter();
                within.map(move |parameter| Parameter { name: prefixed(part, &parameter.name), ..parameter })
            })
            .collect()
    }
    /// Those that are trained, to be changed; their shapes cannot be.
    fn parameters_mut(&mut self) -> Vec<(String, ArrayViewMutD<'_, T>)> {
        let parts = self.parts_mut().into_iter();
        parts
            .flat_map(|(part, module)| {
                module.parameters_mut().into_iter().map(move |(name, values)| (prefixed(part, &name), values))
            })
            .collect()
    }
    /// Has nothing of it trained any more, but for what is adapted.
    fn freeze(&mut self) {
        self.parts_mut().into_iter().for_each(|(_, module)| module.freeze());
    }
    /// The layers in it that an adapter can be put on, by their names within it.
    fn layers_mut(&mut self) -> Vec<(String, &mut dyn Adaptable<T>)> {
        let parts = self.parts_mut().into_iter();
        parts
            .flat_map(|(part, module)| {
                module.layers_mut().into_iter().map(move |(name, layer)| (prefixed(part, &name), layer))
            })
            .collect()
    }
    /// Whether anything in it is trained.
    fn is_trained(&self) -> bool {
        self.parameters().iter().any(|parameter| parameter.trained)
    }
}

/// Finds a parameter of a module by its name in it.
pub type Find<'a, R> = &'a dyn Fn(&str) -> ArrayD<R>;

/// What a configuration says of a module: what builds it, and the definition of what it computes.
///
/// ```
/// use ndarray::array;
/// use woracle::{Dual, Real};
/// use woracle::modules::{Described, LinearMap, Signal};
/// let linear = LinearMap { in_features: 2, out_features: 1, bias: false };
/// let weight = array![[3.0, 4.0]].into_dyn(); // [out, in]
/// let parameters = |name: &str| {
///     assert_eq!(name, "weight");
///     weight.mapv(Dual::constant)
/// };
/// let x = array![[Dual::new(1.0, 1.0), Dual::new(2.0, 0.0)]].into_dyn(); // the first feature moves
/// let y = linear.define(Signal::Values(x), &parameters);
/// assert_eq!((y[[0, 0]].re, y[[0, 0]].eps), (11.0, 3.0)); // y, and its derivative
/// ```
pub trait Described: Sized {
    /// The module with fresh parameters.
    ///
    /// # Errors
    ///
    /// A setting out of range (C4).
    fn build<T: Scalar>(&self, rng: &mut Pcg64) -> Result<Box<dyn Module<T>>>;
    /// How many numbers its parameters are, before any is allocated.
    ///
    /// # Errors
    ///
    /// A setting of a shape that is out of range (C4).
    fn elements(&self) -> Result<usize> {
        Ok(0)
    }
    /// The definition, in plain loops and on any number: y of an input that fits, with these parameters; shapes are
    /// those of the module.
    ///
    /// # Panics
    ///
    /// Where the module's forward has an error.
    fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R>;
}

/// A name within a part, as it is outside of it; the part's own is empty.
fn prefixed(part: &str, name: &str) -> String {
    match (part, name) {
        ("", name) => name.into(),
        (part, "") => part.into(),
        (part, name) => format!("{part}.{name}"),
    }
}

/// Runs a part of a module: what it complains of and what it shows is under its name.
fn run_part<'m, T: Scalar>(
    part: &str,
    module: &'m dyn Module<T>,
    x: Signal<T>,
    pass: &Pass<'m, T>,
    requires_grad_x: bool,
) -> Result<Forward<'m, T>> {
    let inside = pass.inside(part).requiring_grad_x(requires_grad_x);
    let (y, backward) = module.forward(x, &inside).map_err(|error| inside.complain(error))?;
    inside.show(&y);
    Ok((y, backward))
}

/// What a configuration means where it says nothing of something that is usually there.
fn yes() -> bool {
    true
}

/// The values of a definition's input.
fn defined<R: Real>(x: Signal<R>) -> ArrayD<R> {
    x.values().expect("an input that fits")
}
