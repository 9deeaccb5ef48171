//! One forward and backward in a case, line by line: what SPEC.md says of each line and what the numbers are, the
//! identities with both sides, and every gradient beside its difference.
//!
//! The numbers are those that the definition and the production path work with, shown while they run (`wora::Watch`).
//!
//! ```
//! use woracle::explain::{Walk, examples};
//! let linear = &examples()[0];
//! let walk = Walk::of(&linear.case()?)?;
//! assert!(walk.to_string().starts_with(linear.text.lines().next().unwrap()));
//! # Ok::<(), woracle::Error>(())
//! ```

mod drawn;
mod example;
mod lines;
mod numbers;
mod page;
mod text;

pub use drawn::{Shape, drawn};
pub use example::{Example, examples};
pub use lines::Chapter;

use crate::case::{Case, Tensor};
use crate::gradcheck::{Identity, Options, Slopes, check, slopes};
use crate::registry;
use crate::wora::{Config, Line, Method, NormGradient, SCALE_NAMES};
use crate::{Error, Result};
use ndarray::ArrayD;
use serde::{Serialize, Serializer};

/// What a case is given, and every line that is worked out from it.
#[derive(Clone, Debug, Serialize)]
pub struct Walk {
    /// The layer's name.
    pub layer: String,
    /// Its settings, as in a case file.
    pub settings: serde_json::Map<String, serde_json::Value>,
    /// The tensors that are given.
    pub given: Vec<Given>,
    /// What else is to be known to follow the lines.
    pub notes: Vec<&'static str>,
    /// The lines, chapter by chapter.
    pub steps: Vec<Step>,
}

/// A tensor that is given.
#[derive(Clone, Debug, Serialize)]
pub struct Given {
    /// Its name in a case file.
    pub name: String,
    /// Whether it holds ids.
    pub ids: bool,
    /// Its values.
    #[serde(serialize_with = "nested")]
    pub values: ArrayD<f64>,
}

/// A line that is worked out.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// The part it belongs to.
    pub chapter: Chapter,
    /// Its label in SPEC.md.
    pub label: &'static str,
    /// The quantity, as SPEC.md calls it.
    pub quantity: &'static str,
    /// The line as a formula in plain text.
    pub formula: &'static str,
    /// The numbers: weights as `[units, fan_in]`, outputs of an operator as `[outer, units, inner]`.
    #[serde(serialize_with = "nested")]
    pub values: ArrayD<f64>,
}

/// A walk, and what is known of its results beside.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// The lines.
    pub walk: Walk,
    /// What must hold between the gradients, both sides evaluated. SPEC.md, section 8.3.
    pub identities: Vec<Identity>,
    /// Every gradient element by element, beside a difference and a dual number.
    pub slopes: Vec<Slopes>,
    /// Whether these are differences and dual numbers of the surrogate of SPEC.md, section 2, and not of y itself.
    pub surrogate: bool,
}

/// An array as nested lists.
fn nested<S: Serializer>(values: &ArrayD<f64>, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    fn of(values: ndarray::ArrayViewD<'_, f64>) -> serde_json::Value {
        if values.ndim() == 0 {
            return values[[]].into();
        }
        values.outer_iter().map(of).collect::<Vec<_>>().into()
    }
    of(values.view()).serialize(serializer)
}

/// More numbers than this in a case are for computers to read.
const READABLE: usize = 1000;

impl Walk {
    /// The walk through a case.
    ///
    /// # Errors
    ///
    /// A layer that the registry does not have; a case that it refuses; one with more than a thousand numbers.
    pub fn of(case: &Case) -> Result<Self> {
        let subject = registry::layer(&case.layer)?;
        let elements: usize = case.tensors.values().map(|tensor| tensor.shape().iter().product::<usize>()).sum();
        if elements > READABLE {
            let expected = format!("at most {READABLE} numbers in all tensors, to be read one by one");
            return Err(Error::Setting { name: "case", expected, found: elements.to_string() });
        }
        let order: Vec<&str> = ["x", "dropout_mask", "base.weight", "base.bias"]
            .into_iter()
            .chain(subject.lora_names())
            .chain(SCALE_NAMES)
            .chain(["grad.y"])
            .collect();
        let given = order.into_iter().filter_map(|name| {
            let (ids, values) = match case.tensors.get(name)? {
                Tensor::Int(ids) => (true, ids.mapv(|id| id as f64)),
                Tensor::Float(values) => (false, values.to_owned()),
            };
            Some(Given { name: name.into(), ids, values })
        });
        let circumstances = lines::Circumstances {
            config: case.settings::<Config>()?,
            masked: case.tensors.contains_key("dropout_mask"),
            biased: case.tensors.contains_key("base.bias"),
            held_back: !subject.is_gradient_of_the_loss(case)?,
        };
        let [defined, produced] = subject.walk(case)?;
        let all = defined.into_iter().map(|line| (true, line)).chain(produced.into_iter().map(|line| (false, line)));
        let mut steps: Vec<(usize, Step)> = all
            .map(|(by_definition, Line { label, quantity, values })| {
                let (place, chapter, formula) = lines::reading(label, quantity, by_definition, &circumstances)
                    .unwrap_or_else(|| panic!("{label} {quantity} is shown and not in the list of lines"));
                (place, Step { chapter, label, quantity, formula, values })
            })
            .collect();
        steps.sort_by_key(|(place, _)| *place);
        let steps: Vec<Step> = steps.into_iter().map(|(_, step)| step).collect();
        let directionless = |step: &Step| step.quantity == "||V||" && step.values.iter().any(|&norm| norm == 0.0);
        let notes = [
            (circumstances.config.method == Method::Lora)
                .then_some("LoRA has no norm, and nothing beside A and B: g = α = β = 1."),
            (circumstances.config.method == Method::Dora).then_some("DoRA has no α and no β: both are 1."),
            steps
                .iter()
                .any(directionless)
                .then_some("Where ‖V‖ is 0 there is no direction: n, g, dm and k are 0 (C5)."),
        ];
        Ok(Self {
            layer: case.layer.clone(),
            settings: case.settings.clone(),
            given: given.collect(),
            notes: notes.into_iter().flatten().collect(),
            steps,
        })
    }

    /// The last line of a quantity: its final value by that way of computing.
    pub fn last(&self, quantity: &str, chapters: &[Chapter]) -> Option<&Step> {
        self.steps.iter().rev().find(|step| step.quantity == quantity && chapters.contains(&step.chapter))
    }
}

impl Explanation {
    /// Everything about a case with a cotangent.
    ///
    /// # Errors
    ///
    /// As [`Walk::of`]; a case without a cotangent.
    pub fn of(case: &Case) -> Result<Self> {
        case.values("grad.y")?;
        let (walk, subject) = (Walk::of(case)?, registry::layer(&case.layer)?);
        let report = check(subject, case, Options::default());
        if let Some(failure) = report.failure {
            return Err(Error::Setting { name: "case", expected: "one that can be checked".into(), found: failure });
        }
        let config = case.settings::<Config>()?;
        let detached = config.has_norm() && config.norm_gradient == NormGradient::Detached;
        let surrogate = detached || !subject.is_gradient_of_the_loss(case)?;
        Ok(Self { walk, identities: report.identities, slopes: slopes(subject, case)?, surrogate })
    }
}
