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

mod bank;
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

use crate::case::{Case, Tensors};
use crate::{DualForward, DualTensors, Error, Real, Result};
use gradients::gradient;

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

/// A formula at a case; `None` where the mistake cannot be made.
pub(crate) type Evaluate<'a> = &'a dyn Fn(&Formula, &Case) -> Result<Option<DualForward>>;

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

impl Mistake {
    /// Whether y is another.
    pub fn is_in_forward(&self) -> bool {
        self.forward != RIGHT
    }

    /// Whether the gradients are not those of y.
    pub fn is_in_backward(&self) -> bool {
        !matches!(self.backward, Backward::OfForward)
    }

    /// y and the gradients of someone who makes this mistake; `None` where it cannot be made. `right` holds the
    /// definition's results.
    pub(crate) fn evaluate(
        &self,
        case: &Case,
        lora: [&'static str; 2],
        right: &Tensors,
        evaluate: Evaluate<'_>,
    ) -> Result<Option<Tensors>> {
        let Some(forward) = evaluate(&self.forward, case)? else { return Ok(None) };
        let y = forward(&DualTensors::new())?;
        let mut gradients = Tensors::new();
        for parameter in Parameter::ALL {
            let name = parameter.name(lora);
            let key = format!("grad.{name}");
            if !right.contains_key(&key) {
                continue;
            }
            let function = match &self.backward {
                Backward::Of(other, parameters) if parameters.contains(&parameter) => other,
                _ => &self.forward,
            };
            let Some(mut gradient) = gradient(function, case, name, evaluate)? else { return Ok(None) };
            if matches!(&self.backward, Backward::Zero(parameters) if parameters.contains(&parameter)) {
                gradient.fill(0.0);
            }
            gradients.insert(key, gradient);
        }
        if let Backward::Changed(change) = self.backward {
            let mut changed = Gradients { case, lora, weight_norm: right.get("weight_norm"), evaluate, gradients };
            change(&mut changed)?;
            gradients = changed.gradients;
        }
        gradients.insert("y".into(), y.mapv(Real::value));
        Ok(Some(gradients))
    }
}
