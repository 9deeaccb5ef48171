//! The bank of known mistakes: what people get wrong when they write this layer, each under a stable id.
//!
//! A mistake is a [`Formula`] for y that differs from the right one, or a gradient that is not the one of its own
//! forward, or both. Everything that is not named is right: the gradients of a wrong forward are those of that
//! forward, with its own norm treated as the settings say.
//!
//! ```
//! use woracle::mistakes::{MISTAKES, mistake};
//! assert!(MISTAKES.len() >= 45);
//! println!("{}", mistake("norm-of-base")?.wrong);
//! # Ok::<(), woracle::Error>(())
//! ```
//!
//! What one of them comes to in a case:
//!
//! ```
//! use woracle::{mistakes::{mistake, of_layer}, registry};
//! let norm = mistake("norm-of-base")?;
//! assert!(norm.is_in_forward() && !norm.is_in_backward()); // the gradients of a wrong y
//! assert!(of_layer("linear").any(|one| one.id == norm.id));
//! let linear = registry::layer("linear")?;
//! let case = linear.draw(&linear.specs()[0], 0);
//! let right = linear.define(&case)?;
//! let wrong = registry::mistaken(linear, &[norm], &case)?.expect("it can be made in any case");
//! let distance = |name: &str| (&right[name] - &wrong[name]).iter().fold(0.0_f64, |most, d| most.max(d.abs()));
//! assert!(distance("weighted") < 1e-14); // V is right
//! assert!(distance("weight_norm") > 0.1 && distance("y") > 0.1); // n is not, and so y
//! # Ok::<(), woracle::Error>(())
//! ```

mod bank;
mod blocks;
mod evaluate;
mod formula;
mod gradients;

pub use bank::MISTAKES;
pub(crate) use evaluate::{Anchor, Evaluated};
pub use formula::{
    Bias, Delta, Eps, Formula, Gain, Learned, Norm, NormOf, NormPer, Output, Overwritten, Path, RIGHT, Scaling, Walk,
    Weighted,
};
pub use gradients::Gradients;
pub(crate) use gradients::Spoiling;

use crate::case::Tensors;
use crate::traced::{Traced, TracedTensors};
use crate::{Error, Result};
use ndarray::ArrayD;
use std::collections::BTreeMap;

/// A way to get the layer wrong.
pub struct Mistake {
    /// Its name, for good.
    pub id: &'static str,
    /// What goes wrong, in one sentence.
    pub wrong: &'static str,
    /// Where it was seen, or that it is one sign, factor or axis away from the right line.
    pub seen: &'static str,
    /// The section of SPEC.md that has it right.
    pub section: &'static str,
    /// The layers it can be made in.
    pub layers: &'static [&'static str],
    /// y.
    pub forward: Formula,
    /// The gradients.
    pub backward: Backward,
}

/// The gradients of a mistake.
///
/// ```
/// use woracle::mistakes::{Backward, Formula, Parameter, Path, RIGHT, mistake};
/// let detached = mistake("norm-detached")?;
/// assert!(!detached.is_in_forward()); // the right y, and the gradients of another function
/// let other = Formula { norm_gradient: Path::Held, ..RIGHT };
/// assert!(matches!(detached.backward, Backward::Of(function, _) if function == other));
/// assert_eq!(Parameter::LoraA.name(["lora_embedding_A", "lora_embedding_B"]), "lora_embedding_A");
/// # Ok::<(), woracle::Error>(())
/// ```
pub enum Backward {
    /// Those of its forward.
    OfForward,
    /// Those of its forward, but zero for these tensors.
    Zero(&'static [Parameter]),
    /// Those of its forward, but those of another function for these tensors.
    Of(Formula, &'static [Parameter]),
    /// Those of its forward, changed.
    Changed(fn(&mut Gradients<'_>) -> Result<()>),
}

/// A tensor with a gradient, by its role: A and B have other names in an embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// x
    X,
    /// W0
    Weight,
    /// b
    Bias,
    /// A
    LoraA,
    /// B
    LoraB,
    /// m
    Magnitude,
    /// alpha
    Alpha,
    /// beta
    Beta,
}

impl Parameter {
    /// Every one of them.
    pub const ALL: [Self; 8] =
        [Self::X, Self::Weight, Self::Bias, Self::LoraA, Self::LoraB, Self::Magnitude, Self::Alpha, Self::Beta];

    /// The name in a case file; `lora` names A and B.
    pub fn name(self, lora: [&'static str; 2]) -> &'static str {
        match self {
            Self::X => "x",
            Self::Weight => "base.weight",
            Self::Bias => "base.bias",
            Self::LoraA => lora[0],
            Self::LoraB => lora[1],
            Self::Magnitude => "lora_magnitude_vector",
            Self::Alpha => "lora_wora_alpha",
            Self::Beta => "lora_wora_beta",
        }
    }
}

/// A formula at a case, as a function of traced numbers that take the place of the case's tensors.
pub type TracedForward = Box<dyn Fn(&TracedTensors) -> Result<FormulaResults> + Send + Sync>;

/// What a formula computes.
///
/// ```
/// use woracle::{Real, mistakes::RIGHT, registry, traced::TracedTensors};
/// let linear = registry::layer("linear")?;
/// let case = linear.draw(&linear.specs()[0], 0);
/// let formula = linear.formula(&RIGHT, &case)?.expect("nothing asks for other shapes");
/// let results = formula(&TracedTensors::new())?; // in the place of no tensor
/// let right = linear.define(&case)?;
/// assert!(results.y.iter().zip(&right["y"]).all(|(y, right)| (y.value() - right).abs() < 1e-13));
/// assert_eq!(results.stages["gain"].shape(), [6]); // one a unit
/// # Ok::<(), woracle::Error>(())
/// ```
pub struct FormulaResults {
    /// The output, in the shape of the case's y.
    pub y: ArrayD<Traced>,
    /// `weighted`, `weight_norm`, `gain` and `merged_weight`, as in a case file.
    pub stages: BTreeMap<&'static str, ArrayD<f64>>,
}

/// The mistake of this id.
///
/// # Errors
///
/// An id that the bank does not have.
pub fn mistake(id: &str) -> Result<&'static Mistake> {
    MISTAKES.iter().find(|mistake| mistake.id == id).ok_or_else(|| Error::Unknown {
        what: "mistake",
        expected: MISTAKES.iter().map(|mistake| mistake.id).collect::<Vec<_>>().join(", "),
        found: id.into(),
    })
}

/// The mistakes that can be made in a layer.
pub fn of_layer(layer: &str) -> impl Iterator<Item = &'static Mistake> {
    MISTAKES.iter().filter(move |mistake| mistake.layers.contains(&layer))
}

impl Mistake {
    /// Whether y is another.
    pub fn is_in_forward(&self) -> bool {
        self.forward != RIGHT
    }

    /// Whether the gradients are not those of y.
    pub fn is_in_backward(&self) -> bool {
        !matches!(self.backward, Backward::OfForward)
    }

    /// `"forward"`, `"backward"` or `"both"`.
    pub fn place(&self) -> &'static str {
        match (self.is_in_forward(), self.is_in_backward()) {
            (true, true) => "both",
            (true, false) => "forward",
            _ => "backward",
        }
    }
}

/// Several formulas in one, where they do not want different things.
fn together(formulas: &[&Formula]) -> Option<Formula> {
    formulas.iter().try_fold(RIGHT, |all, formula| all.and(formula))
}

/// y of someone who makes these mistakes, all at once; `None` where they cannot be made together.
pub(crate) fn forward(mistakes: &[&Mistake]) -> Option<Formula> {
    together(&mistakes.iter().map(|mistake| &mistake.forward).collect::<Vec<_>>())
}

/// The results of someone who makes these mistakes, all at once; `None` where they cannot be made, or not together.
pub(crate) fn results(mistakes: &[&Mistake], spoiling: &Spoiling<'_>) -> Result<Option<Tensors>> {
    let Some(forward) = forward(mistakes) else { return Ok(None) };
    let Some(evaluated) = spoiling.evaluate(&forward)? else { return Ok(None) };
    let mut results = (*evaluated).clone();
    let (mut formulas, mut zeros) = (BTreeMap::new(), vec![]);
    for parameter in Parameter::ALL {
        let key = format!("grad.{}", parameter.name(spoiling.lora));
        if !results.contains_key(&key) {
            continue;
        }
        let others = mistakes.iter().filter_map(|mistake| match &mistake.backward {
            Backward::Of(other, parameters) if parameters.contains(&parameter) => Some(other),
            _ => None,
        });
        let others: Vec<&Formula> = others.collect();
        if !others.is_empty() {
            let Some(function) = together(&[others, vec![&forward]].concat()) else { return Ok(None) };
            let Some(evaluated) = spoiling.evaluate(&function)? else { return Ok(None) };
            results.insert(key.clone(), evaluated[&key].clone());
            formulas.insert(key.clone(), function);
        } else {
            formulas.insert(key.clone(), forward);
        }
        let zero = |mistake: &&Mistake| matches!(&mistake.backward, Backward::Zero(list) if list.contains(&parameter));
        if mistakes.iter().any(zero) {
            zeros.push(key);
        }
    }
    let mut gradients = Gradients { spoiling, results, formulas };
    for mistake in mistakes {
        if let Backward::Changed(change) = mistake.backward {
            change(&mut gradients)?;
        }
    }
    let mut results = gradients.results;
    // A gradient that is cut off is none whatever else is done to it.
    for key in zeros {
        results.entry(key).and_modify(|gradient| gradient.fill(0.0));
    }
    Ok(Some(results))
}
