//! Modules one after the other, and around each other. SPEC.md, section 13.6.

use super::activation::add_to;
use super::{
    Back, Backward, Described, Find, Forward, LARGEST, Module, Pass, Settings, Signal, defined, prefixed, run_part,
};
use crate::operators::in_standard_layout;
use crate::{Error, Real, Result, Scalar};
use ndarray::{ArrayD, Zip};
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

/// A module's settings, and its name within what it is a part of: its number where it has none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Named {
    /// The name; no dots.
    #[serde(default)]
    pub name: Option<String>,
    /// The settings.
    #[serde(flatten)]
    pub settings: Settings,
}

/// Modules one after the other: PyTorch's `nn.Sequential`, with names.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Module, Named, Pass, Sequential, Signal};
/// let modules: Vec<Named> = serde_json::from_str(
///     r#"[
///         {"name": "fc", "type": "linear", "in_features": 2, "out_features": 3},
///         {"type": "relu"},
///         {"type": "mean", "dim": 1}
///     ]"#,
/// )
/// .unwrap();
/// let mut model = Sequential::<f64>::build(&modules, &mut rand::SeedableRng::seed_from_u64(0))?;
/// let (y, backward) = model.forward(Signal::Values(array![[1.0, 2.0]].into_dyn()), &Pass::evaluation())?;
/// assert_eq!(y.shape(), [1]);
/// let gradients = backward(array![1.0].into_dyn())?.parameters;
/// let names: Vec<&str> = gradients.iter().map(|(name, _)| name.as_str()).collect();
/// assert_eq!(names, ["fc.weight", "fc.bias"]); // as in PyTorch's state_dict
/// model.freeze();
/// assert!(!model.is_trained() && model.parameters().len() == 2);
/// # Ok::<(), woracle::Error>(())
/// ```
pub struct Sequential<T> {
    modules: Vec<(String, Box<dyn Module<T>>)>,
}

impl<T: Scalar> Sequential<T> {
    /// The modules with fresh parameters.
    ///
    /// # Errors
    ///
    /// A setting out of range (C4), under the module's name; a name that is there twice or has a dot in it.
    pub fn build(modules: &[Named], rng: &mut Pcg64) -> Result<Self> {
        let parameters = elements(modules)?;
        if parameters > LARGEST {
            let expected = format!("no more than {LARGEST} parameters in all");
            return Err(Error::Setting { name: "modules", expected, found: parameters.to_string() }); // C4
        }
        let build = |(name, module): (String, &Named)| match module.settings.build(rng) {
            Ok(module) => Ok((name, module)),
            Err(error) => Err(of_part(name, error)),
        };
        Ok(Self { modules: names(modules)?.into_iter().zip(modules).map(build).collect::<Result<_>>()? })
    }
}

/// How many numbers the parameters of all modules are.
fn elements(modules: &[Named]) -> Result<usize> {
    names(modules)?.into_iter().zip(modules).try_fold(0, |sum: usize, (name, module)| {
        let elements = module.settings.elements().map_err(|error| of_part(name, error))?;
        Ok(sum.saturating_add(elements))
    })
}

/// An error of a module, under its name.
fn of_part(name: String, error: Error) -> Error {
    match error {
        Error::Module { module, source } => Error::Module { module: prefixed(&name, &module), source },
        error => Error::Module { module: name, source: Box::new(error) },
    }
}

/// The names of modules within what they are parts of.
fn names(modules: &[Named]) -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for (number, module) in modules.iter().enumerate() {
        let name = module.name.clone().unwrap_or_else(|| number.to_string());
        if name.is_empty() || name.contains('.') || names.contains(&name) {
            let expected = "a name of its own without a dot".into();
            return Err(Error::Setting { name: "name", expected, found: format!("{name:?}") }); // C4
        }
        names.push(name);
    }
    Ok(names)
}

impl<T: Scalar> Module<T> for Sequential<T> {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let mut steps: Vec<(&str, Backward<'m, T>)> = Vec::new();
        let mut wanted = pass.requires_grad_x();
        let mut x = x;
        for (name, module) in &self.modules {
            let (y, backward) = run_part(name, module.as_ref(), x, pass, wanted)?;
            steps.push((name, backward));
            // Where nothing is trained up to here, no gradient is wanted.
            wanted |= module.is_trained();
            x = Signal::Values(y);
        }
        Ok((
            x.values()?,
            Box::new(move |dy| {
                let (mut cotangent, mut parameters) = (Some(dy), Vec::new());
                for (name, backward) in steps.into_iter().rev() {
                    let Some(dy) = cotangent.take() else { break };
                    let back = backward(dy)?;
                    let named = back.parameters.into_iter();
                    parameters.extend(named.map(|(parameter, values)| (prefixed(name, &parameter), values)));
                    cotangent = back.x;
                }
                Ok(Back { x: cotangent, parameters })
            }),
        ))
    }
    fn parts(&self) -> Vec<(&str, &dyn Module<T>)> {
        self.modules.iter().map(|(name, module)| (name.as_str(), module.as_ref())).collect()
    }
    fn parts_mut(&mut self) -> Vec<(&str, &mut dyn Module<T>)> {
        self.modules.iter_mut().map(|(name, module)| (name.as_str(), module.as_mut() as &mut dyn Module<T>)).collect()
    }
}

/// `y = x + f(x)`, f being modules one after the other whose output has the shape of their input.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Pass, Settings, Signal};
/// let residual: Settings = serde_json::from_str(r#"{"type": "residual", "modules": [{"type": "relu"}]}"#).unwrap();
/// let module = residual.build::<f64>(&mut rand::SeedableRng::seed_from_u64(0))?;
/// let (y, backward) = module.forward(Signal::Values(array![-3.0, 3.0].into_dyn()), &Pass::evaluation())?;
/// assert_eq!(y, array![-3.0, 6.0].into_dyn());
/// assert_eq!(backward(array![1.0, 1.0].into_dyn())?.x.unwrap(), array![1.0, 2.0].into_dyn()); // both ways add up
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResidualSettings {
    /// f.
    pub modules: Vec<Named>,
}

struct Residual<T> {
    inner: Sequential<T>,
}

impl<T: Scalar> Module<T> for Residual<T> {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = in_standard_layout(x.values()?);
        let (y, backward) = self.inner.forward(Signal::Values(pass.copy(&x)), pass)?;
        if y.shape() != x.shape() {
            let expected = format!("{:?}, that of what it is added to", x.shape());
            return Err(Error::Shape { tensor: "f(x)".into(), expected, found: y.shape().to_vec() }); // C1
        }
        let mut y = in_standard_layout(y);
        add_to(&mut y, &x); // E105
        pass.recycle(x);
        let pass = pass.clone();
        Ok((
            y,
            Box::new(move |dy| {
                let kept = pass.requires_grad_x().then(|| pass.copy(&dy));
                let Back { x, parameters } = backward(dy)?;
                let x = match (kept, x) {
                    (Some(mut dx), Some(through)) => {
                        let through = in_standard_layout(through);
                        add_to(&mut dx, &through); // E106
                        pass.recycle(through);
                        Some(dx)
                    }
                    (kept, _) => kept,
                };
                Ok(Back { x, parameters })
            }),
        ))
    }
    fn parts(&self) -> Vec<(&str, &dyn Module<T>)> {
        self.inner.parts()
    }
    fn parts_mut(&mut self) -> Vec<(&str, &mut dyn Module<T>)> {
        self.inner.parts_mut()
    }
}

/// The definition of modules one after the other.
pub(crate) fn define_all<R: Real>(modules: &[Named], x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
    let names = names(modules).expect("names that fit");
    let y = names.iter().zip(modules).fold(x, |x, (name, module)| {
        let inner = |parameter: &str| parameters(&prefixed(name, parameter));
        Signal::Values(module.settings.define(x, &inner))
    });
    defined(y)
}

impl Described for ResidualSettings {
    fn build<T: Scalar>(&self, rng: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        Ok(Box::new(Residual { inner: Sequential::build(&self.modules, rng)? }))
    }
    fn elements(&self) -> Result<usize> {
        elements(&self.modules)
    }
    fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
        let x = defined(x);
        let through = define_all(&self.modules, Signal::Values(x.clone()), parameters);
        Zip::from(&x).and(&through).map_collect(|&x, &f| x + f) // E105
    }
}
