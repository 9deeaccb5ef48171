//! Gradients element by element, as every witness of slopes sees them: for whoever wants to look and not only to know.

use super::comparison::{Place, Point, Testimony, Witness};
use super::differences::Rung;
use super::function::{Survey, sum};
use super::{Options, with_survey};
use crate::case::{Case, Tensors, unravel};
use crate::registry::{Precision, Subject};
use crate::{Error, Result};
use serde::Serialize;

/// The gradient of one tensor, element by element.
#[derive(Clone, Debug, Serialize)]
pub struct Slopes {
    /// The tensor.
    pub tensor: String,
    /// Its elements in row-major order.
    pub elements: Vec<Slope>,
}

/// One element of a gradient.
#[derive(Clone, Debug, Serialize)]
pub struct Slope {
    /// Where it is: one number an axis of the tensor.
    pub index: Vec<usize>,
    /// By the backward under test.
    pub ours: f64,
    /// By central differences, extrapolated.
    pub difference: f64,
    /// How far off that may be.
    pub uncertainty: f64,
    /// By dual numbers.
    pub dual: f64,
}

/// Every element of every gradient of a case, by hand, by differences and by dual numbers. Where the norm is detached,
/// the differences are those of the surrogate.
///
/// ```
/// use woracle::{gradcheck::slopes, registry};
/// let linear = registry::layer("linear")?;
/// let case = linear.draw(&linear.specs()[0], 0);
/// let all = slopes(linear, &case)?;
/// let dalpha = all.iter().find(|one| one.tensor == "lora_wora_alpha").unwrap();
/// assert!((dalpha.elements[0].ours - dalpha.elements[0].dual).abs() < 1e-12);
/// # Ok::<(), woracle::Error>(())
/// ```
///
/// # Errors
///
/// A case that the layer refuses; one whose gradients have more elements than `wora check` looks at one by one.
pub fn slopes(subject: &dyn Subject, case: &Case) -> Result<Vec<Slopes>> {
    let options = Options::default();
    let ours = subject.evaluate(case, Precision::F64)?;
    let expected = subject.roundings(case)?;
    with_survey(subject, case, &expected, options, |survey| {
        let elements: usize = survey.inputs.values().map(|values| values.len()).sum();
        if elements > options.large {
            let (expected, found) =
                (format!("at most {} elements of all gradients", options.large), elements.to_string());
            return Err(Error::Setting { name: "case", expected, found });
        }
        survey.inputs.keys().map(|tensor| of_tensor(survey, tensor, &ours)).collect()
    })
}

/// What differences and dual numbers say of an element that they were asked about.
fn of_element(testimonies: &[Testimony], element: usize) -> [Point; 2] {
    [Witness::Differences, Witness::Duals].map(|witness| {
        let testimony = testimonies.iter().find(|testimony| testimony.witness == witness).expect("both witnesses");
        *testimony.at(Place::Element(element)).expect("what was asked for")
    })
}

fn of_tensor(survey: &Survey<'_>, tensor: &str, ours: &Tensors) -> Result<Slopes> {
    let gradient = &ours[&format!("grad.{tensor}")];
    let testimonies = survey.testimonies(tensor, gradient, &[])?;
    let element = |(element, &ours): (usize, &f64)| {
        let [difference, dual] = of_element(&testimonies, element);
        let index = unravel(element, gradient.shape());
        Slope { index, ours, difference: difference.theirs, uncertainty: difference.uncertainty, dual: dual.theirs }
    };
    Ok(Slopes { tensor: tensor.into(), elements: gradient.iter().enumerate().map(element).collect() })
}

/// One element's central differences at many steps, and what better ways make of the same slope.
///
/// ```
/// use woracle::{gradcheck::curve, registry};
/// let linear = registry::layer("linear")?;
/// let case = linear.draw(&linear.specs()[0], 0);
/// let curve = curve(linear, &case, "lora_wora_alpha", 0)?;
/// let error = |at: usize| (curve.steps[at].value - curve.dual).abs();
/// let last = curve.steps.len() - 1;
/// let best = (0..=last).min_by(|&one, &other| error(one).total_cmp(&error(other))).unwrap();
/// assert!(error(0) > 100.0 * error(best)); // a large step: truncation
/// assert!(error(last) > 100.0 * error(best)); // a small one: rounding
/// assert!((curve.ladder - curve.dual).abs() <= curve.uncertainty);
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, Serialize)]
pub struct Curve {
    /// The case.
    pub case: String,
    /// The tensor.
    pub tensor: String,
    /// The element: one number an axis of the tensor.
    pub index: Vec<usize>,
    /// By the backward under test.
    pub ours: f64,
    /// By dual numbers.
    pub dual: f64,
    /// By the extrapolated ladder, and its uncertainty.
    pub ladder: f64,
    /// How far off the ladder may be.
    pub uncertainty: f64,
    /// Single differences at steps that are powers of two, the largest first, and their errors against the dual number.
    pub steps: Vec<Rung>,
}

/// The exponents of the steps of a [`Curve`].
const EXPONENTS: std::ops::RangeInclusive<i32> = -50..=2;

/// One element of a gradient by differences at many steps: the error falls with the square of the step until rounding
/// takes over and it rises again.
///
/// # Errors
///
/// A case that the layer refuses; a tensor that it has no gradient for, or an element that this one has not.
pub fn curve(subject: &dyn Subject, case: &Case, tensor: &str, element: usize) -> Result<Curve> {
    let ours = subject.evaluate(case, Precision::F64)?;
    let expected = subject.roundings(case)?;
    with_survey(subject, case, &expected, Options::default(), |survey| {
        let Some(values) = survey.inputs.get(tensor) else {
            let all = survey.inputs.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(Error::Unknown { what: "tensor", expected: all, found: tensor.into() });
        };
        if element >= values.len() {
            let (expected, found) = (format!("an element of {tensor}, below {}", values.len()), element.to_string());
            return Err(Error::Setting { name: "element", expected, found });
        }
        let gradient = &ours[&format!("grad.{tensor}")];
        let testimonies = survey.testimonies(tensor, gradient, &[element])?;
        let [ladder, dual] = of_element(&testimonies, element);
        let dual = dual.theirs;
        let steps = EXPONENTS.rev().map(|exponent| {
            let step = 2f64.powi(exponent);
            let value = central(survey, tensor, element, step)?;
            Ok(Rung { step, value, error: (value - dual).abs() })
        });
        Ok(Curve {
            case: case.name.clone(),
            tensor: tensor.into(),
            index: unravel(element, gradient.shape()),
            ours: gradient.iter().copied().nth(element).expect("as many as the tensor has"),
            dual,
            ladder: ladder.theirs,
            uncertainty: ladder.uncertainty,
            steps: steps.collect::<Result<_>>()?,
        })
    })
}

/// `<dy, y(p + h) - y(p - h)> / 2h`, nothing about it clever.
fn central(survey: &Survey<'_>, tensor: &str, element: usize, step: f64) -> Result<f64> {
    let at = |step: f64| {
        let mut inputs = survey.inputs.clone();
        inputs.get_mut(tensor).expect("an input").as_slice_mut().expect("standard layout")[element] += step;
        let y = survey.function.forward(&inputs)?;
        Ok::<_, Error>(sum(y.iter().zip(survey.cotangent).map(|(y, dy)| y * dy)))
    };
    Ok((at(step)? - at(-step)?) / (2.0 * step))
}
