//! What is done to samples once they are read: another task of the same data.

use super::{Dataset, Features};
use crate::{Error, Result};
use ndarray::{ArrayD, Axis};
use serde::{Deserialize, Serialize};

/// What is done to every sample `[.., rows, columns]`.
///
/// ```
/// use ndarray::array;
/// use woracle::train::data::Transform;
/// let sample = array![[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]].into_dyn(); // [samples, rows, columns]
/// let turned = Transform::Rotate90.apply(sample.clone())?;
/// assert_eq!(turned, array![[[3.0, 6.0], [2.0, 5.0], [1.0, 4.0]]].into_dyn());
/// assert_eq!(Transform::Rotate270.apply(turned)?, sample); // and back
/// assert_eq!(Transform::Flip.apply(sample.clone())?, array![[[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]]].into_dyn());
/// assert_eq!(Transform::Invert.apply(sample)?, array![[[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]].into_dyn());
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Transform {
    /// A quarter turn counter-clockwise, as `numpy.rot90` over the last two axes.
    Rotate90,
    /// A half turn.
    Rotate180,
    /// A quarter turn clockwise.
    Rotate270,
    /// Rows become columns.
    Transpose,
    /// The last axis is mirrored.
    Flip,
    /// The largest value of the whole set minus each value; of samples of any shape.
    Invert,
}

impl Transform {
    /// The transformed samples: `[.., rows, columns]`, or `[.., columns, rows]` of those that turn or transpose.
    ///
    /// # Errors
    ///
    /// Samples with fewer than two axes, but for `Invert`.
    pub fn apply(self, mut values: ArrayD<f64>) -> Result<ArrayD<f64>> {
        if self == Self::Invert {
            let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            return Ok(values.mapv_into(|value| largest - value));
        }
        let axes = values.ndim();
        if axes < 3 {
            let sample = values.shape().get(1..).unwrap_or(&[]);
            let expected = "samples [.., rows, columns]".into();
            return Err(Error::Setting { name: "transform", expected, found: format!("samples {sample:?}") });
        }
        let (rows, columns) = (Axis(axes - 2), Axis(axes - 1));
        if matches!(self, Self::Rotate90 | Self::Rotate180 | Self::Flip) {
            values.invert_axis(columns);
        }
        if self == Self::Rotate180 {
            values.invert_axis(rows);
        }
        if matches!(self, Self::Rotate90 | Self::Rotate270 | Self::Transpose) {
            values.swap_axes(axes - 2, axes - 1);
        }
        if self == Self::Rotate270 {
            values.invert_axis(columns);
        }
        Ok(values.as_standard_layout().into_owned())
    }
}

/// `shape`, then `transform`, then `scale`.
pub(super) fn prepare(
    mut set: Dataset,
    shape: Option<&[usize]>,
    transforms: &[Transform],
    scale: f64,
) -> Result<Dataset> {
    let setting = |name, expected: &str, found: String| Error::Setting { name, expected: expected.into(), found };
    if let Some(shape) = shape {
        let (of_sample, samples) = (set.sample_shape(), set.len());
        let size: usize = of_sample.iter().product();
        let product = shape.iter().try_fold(1_usize, |product, &axis| product.checked_mul(axis));
        if product != Some(size) {
            let expected = format!("the {size} elements of a sample {of_sample:?}");
            return Err(setting("shape", &expected, format!("{shape:?}")));
        }
        let shape = [&[samples], shape].concat();
        set.features = match set.features {
            Features::Values(values) => Features::Values(values.into_shape_with_order(shape).expect("equal sizes")),
            Features::Ids(ids) => Features::Ids(ids.into_shape_with_order(shape).expect("equal sizes")),
        };
    }
    if !scale.is_finite() {
        return Err(setting("scale", "a finite number", scale.to_string()));
    }
    set.features = match set.features {
        Features::Ids(_) if !transforms.is_empty() => {
            return Err(setting("transform", "none, as the features are ids", format!("{transforms:?}")));
        }
        Features::Ids(_) if scale != 1.0 => {
            return Err(setting("scale", "1, as the features are ids", scale.to_string()));
        }
        Features::Ids(ids) => Features::Ids(ids),
        Features::Values(values) => {
            let values = transforms.iter().try_fold(values, |values, transform| transform.apply(values))?;
            let values = values.mapv_into(|value| value * scale);
            if let Some(found) = values.iter().find(|value| !value.is_finite()) {
                return Err(setting("scale", "values that stay finite", found.to_string()));
            }
            Features::Values(values)
        }
    };
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::Targets;
    use ndarray::array;

    fn set(features: Features) -> Dataset {
        let samples = features.shape()[0];
        Dataset::independent(features, Targets::Classes(ArrayD::zeros(vec![samples])), Some(1))
    }

    #[test]
    fn every_transform_is_that_of_numpy() {
        let sample = array![[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]].into_dyn();
        for (transform, expected) in [
            (Transform::Rotate90, array![[[3.0, 6.0], [2.0, 5.0], [1.0, 4.0]]].into_dyn()),
            (Transform::Rotate180, array![[[6.0, 5.0, 4.0], [3.0, 2.0, 1.0]]].into_dyn()),
            (Transform::Rotate270, array![[[4.0, 1.0], [5.0, 2.0], [6.0, 3.0]]].into_dyn()),
            (Transform::Transpose, array![[[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]].into_dyn()),
            (Transform::Flip, array![[[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]]].into_dyn()),
            (Transform::Invert, array![[[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]]].into_dyn()),
        ] {
            let found = transform.apply(sample.clone()).unwrap();
            assert_eq!(found, expected, "{transform:?}");
            assert!(found.is_standard_layout(), "{transform:?}");
        }
    }

    #[test]
    fn the_shape_comes_first_and_the_scale_last() {
        let flat = set(Features::Values(array![[1.0, 2.0, 3.0, 4.0]].into_dyn()));
        let done = prepare(flat, Some(&[1, 2, 2]), &[Transform::Rotate90, Transform::Invert], 0.5).unwrap();
        assert_eq!(done.features, Features::Values(array![[[[1.0, 0.0], [1.5, 0.5]]]].into_dyn()));
    }

    #[test]
    fn what_does_not_fit_the_samples_is_refused() {
        let values = set(Features::Values(array![[1e308, -1e308]].into_dyn()));
        let ids = set(Features::Ids(array![[1, 2]].into_dyn()));
        for (set, shape, transforms, scale, expected) in [
            (
                &values,
                Some(&[3][..]),
                &[][..],
                1.0,
                "setting shape: expected the 2 elements of a sample [2], found [3]",
            ),
            (
                &values,
                Some(&[usize::MAX, 2]),
                &[],
                1.0,
                "setting shape: expected the 2 elements of a sample [2], found [18446744073709551615, 2]",
            ),
            (
                &values,
                None,
                &[Transform::Flip],
                1.0,
                "setting transform: expected samples [.., rows, columns], found samples [2]",
            ),
            (&values, None, &[Transform::Invert], 1.0, "setting scale: expected values that stay finite, found inf"),
            (&values, None, &[], f64::NAN, "setting scale: expected a finite number, found NaN"),
            (
                &ids,
                None,
                &[Transform::Invert],
                1.0,
                "setting transform: expected none, as the features are ids, found [Invert]",
            ),
            (&ids, None, &[], 0.5, "setting scale: expected 1, as the features are ids, found 0.5"),
        ] {
            assert_eq!(prepare(set.clone(), shape, transforms, scale).unwrap_err().to_string(), expected);
        }
    }
}
