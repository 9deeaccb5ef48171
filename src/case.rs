//! A case: one layer at one input, by name. What checks, verifies and writes layers passes these around.
//!
//! ```
//! use ndarray::array;
//! use woracle::{Error, case::{Tensor, Tensors}, registry, wora::Config};
//! let linear = registry::layer("linear")?;
//! let mut case = linear.draw(&linear.specs()[0], 0);
//! assert_eq!((case.name.as_str(), case.layer.as_str()), ("linear-plain", "linear"));
//! assert_eq!(case.values("base.weight")?.shape(), [6, 7]); // [out, in]
//! assert_eq!(case.settings::<Config>()?.scaling, 1.5);
//! case.extend(Tensors::from([("x".to_string(), array![[1.0, f64::NAN]].into_dyn())]));
//! assert!(matches!(case.values("x"), Err(Error::NotFinite { .. }))); // C2
//! assert!(case.optional("dropout_mask")?.is_none());
//! assert!(matches!(&case.tensors["grad.y"], Tensor::Float(dy) if dy.shape() == [5, 6]));
//! # Ok::<(), woracle::Error>(())
//! ```

use crate::error::check_finite;
use crate::{Error, Result};
use ndarray::{ArcArray, ArrayD, IxDyn};
use std::collections::BTreeMap;

/// Tensors by their names in a case file, such as `y` or `grad.lora_A`.
pub type Tensors = BTreeMap<String, ArrayD<f64>>;

/// A tensor's values: a layer takes them without a copy.
pub type Values = ArcArray<f64, IxDyn>;

/// A tensor of a case.
#[derive(Clone, Debug, PartialEq)]
pub enum Tensor {
    /// Values.
    Float(Values),
    /// Ids.
    Int(ArrayD<i64>),
}

impl Tensor {
    /// The shape.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Float(values) => values.shape(),
            Self::Int(ids) => ids.shape(),
        }
    }
}

/// A layer's settings, parameters, input and cotangent, and in a case file somebody's answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// The case's own name.
    pub name: String,
    /// The layer's name in the [registry](crate::registry).
    pub layer: String,
    /// Everything else that the metadata says: `scaling`, `norm_gradient`, ...
    pub settings: serde_json::Map<String, serde_json::Value>,
    /// `x`, `base.weight`, ..., `grad.y`, in the shapes of SPEC.md, section 1; `y` and the other `grad.*` are answers,
    /// each gradient in the shape of what it is the gradient of.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Case {
    /// The values of a tensor.
    ///
    /// # Errors
    ///
    /// If it is missing (C7), holds ids, or is not finite (C2).
    pub fn values(&self, name: &str) -> Result<&Values> {
        let values = self.stored(name)?;
        check_finite(name, values.view())?; // C2
        Ok(values)
    }

    /// The values of a tensor that need not be there.
    ///
    /// # Errors
    ///
    /// If it holds ids, or is not finite (C2).
    pub fn optional(&self, name: &str) -> Result<Option<&Values>> {
        self.tensors.contains_key(name).then(|| self.values(name)).transpose()
    }

    /// As [`Case::values`], which may still be not finite.
    pub(crate) fn stored(&self, name: &str) -> Result<&Values> {
        match self.tensors.get(name) {
            None => Err(Error::Missing { tensor: name.into(), expected: "a tensor".into() }), // C7
            Some(Tensor::Int(_)) => Err(Error::Unexpected {
                tensor: name.into(),
                reason: "expected floating-point values, found integers".into(),
            }),
            Some(Tensor::Float(values)) => Ok(values),
        }
    }

    /// Puts tensors in, in the place of those of the same names.
    pub fn extend(&mut self, tensors: Tensors) {
        self.tensors.extend(tensors.into_iter().map(|(name, values)| (name, Tensor::Float(values.into()))));
    }

    /// The settings as a type; what the type does not name is ignored.
    ///
    /// # Errors
    ///
    /// A setting that is missing, of another type or out of its range (C4).
    pub fn settings<S: serde::de::DeserializeOwned>(&self) -> Result<S> {
        let settings = serde_json::Value::from(self.settings.clone());
        serde_path_to_error::deserialize(settings).map_err(|error| Error::Setting {
            name: "wora_case",
            expected: format!("the settings of the layer {}", self.layer),
            found: error.to_string(),
        })
    }
}

/// The index of the row-major `element` of a tensor of this shape.
pub(crate) fn unravel(element: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = element;
    let mut index: Vec<usize> = shape.iter().rev().map(|&length| (rest % length, rest /= length).0).collect();
    index.reverse();
    index
}
