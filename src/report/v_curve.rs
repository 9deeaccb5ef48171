//! Error against step: why one difference is never enough.

use super::figures;
use crate::case::Tensor;
use crate::chart::{Axis, Chart, Ink, Mark, Picture, Series, scientific};
use crate::gradcheck::{Curve, Rung, curve};
use crate::page::formula;
use crate::registry::specs;
use crate::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;

/// What is drawn where nothing else is asked for: a curved path, one without curvature, and one through many outputs.
pub const DEFAULT_PATHS: [&str; 3] = ["linear-full/lora_wora_alpha", "linear-plain/lora_A", "conv2d-full/base.weight"];

/// Elements of gradients, each by differences at many steps.
#[derive(Clone, Debug, Serialize)]
pub struct VCurves {
    /// In the order they were asked for.
    pub curves: Vec<Curve>,
}

/// The element that a path, `CASE/TENSOR` or `CASE/TENSOR/ELEMENT`, leads to, by differences at many steps. An element is
/// an index as `1,2`, or a number that counts in row-major order; the first where there is none.
///
/// ```
/// let curve = woracle::report::curve_at("linear-full/lora_B/5,2", 0)?;
/// assert_eq!((curve.tensor.as_str(), &curve.index[..]), ("lora_B", &[5, 2][..]));
/// # Ok::<(), woracle::Error>(())
/// ```
///
/// # Errors
///
/// A path of another form; a case, a tensor or an element that there is not.
pub fn curve_at(path: &str, seed: u64) -> Result<Curve> {
    let (name, tensor, place) = match path.split('/').collect::<Vec<_>>()[..] {
        [name, tensor] => (name, tensor, "0"),
        [name, tensor, place] => (name, tensor, place),
        _ => return Err(refuse("CASE/TENSOR or CASE/TENSOR/ELEMENT", path)),
    };
    let (layer, spec) = specs().find(|(_, spec)| spec.name == name).ok_or_else(|| Error::Unknown {
        what: "--path",
        expected: "the name of a layer's case (wora check --list)".into(),
        found: name.into(),
    })?;
    let case = layer.draw(spec, seed);
    let shape = case.tensors.get(tensor).map_or(&[][..], Tensor::shape);
    let element =
        element(place, shape).ok_or_else(|| refuse(&format!("an element of {tensor}, of shape {shape:?}"), path))?;
    curve(layer, &case, tensor, element)
}

fn refuse(expected: &str, found: &str) -> Error {
    Error::Setting { name: "--path", expected: expected.into(), found: found.into() }
}

/// The row-major number of an element.
fn element(place: &str, shape: &[usize]) -> Option<usize> {
    let index: Vec<usize> = place.split(',').map(|number| number.trim().parse().ok()).collect::<Option<_>>()?;
    match index[..] {
        [number] => (number < shape.iter().product()).then_some(number),
        _ if index.len() != shape.len() => None,
        _ => {
            index.iter().zip(shape).try_fold(0, |number, (&at, &length)| (at < length).then_some(number * length + at))
        }
    }
}

impl VCurves {
    /// Takes the differences of every path; `watch` is told each.
    ///
    /// # Errors
    ///
    /// As [`curve_at`].
    pub fn gather(paths: &[String], seed: u64, watch: &(dyn Fn(&str) + Sync)) -> Result<Self> {
        let one = |path: &String| {
            let curve = curve_at(path, seed)?;
            watch(path);
            Ok(curve)
        };
        // One after the other, the first that is wrong is the one that is complained of.
        let curves: Vec<Result<Curve>> = paths.par_iter().map(one).collect();
        Ok(Self { curves: curves.into_iter().collect::<Result<_>>()? })
    }

    /// What is seen, and a picture a path.
    pub fn to_html(&self) -> String {
        let pictures = figures(self.curves.iter().map(|curve| (picture(curve), in_words(curve))));
        format!(
            "<p>A gradient can be had without any derivation: move one element by h, both ways, and see how the output \
             changes. The difference is off by what is curved, which shrinks with the step, and by rounding, which grows as \
             the step shrinks:</p>\n{}\
             <p>Hence the V: from the right the error falls with the square of the step, a factor of 100 for a factor of 10; \
             to the left it rises as 1/h. At its tip about ten digits are right, which is too few to tell a small mistake from \
             rounding; where the tip lies depends on how curved the output is. The <em>ladder</em> combines differences at nine large steps so \
             that the curved parts cancel, and says how sure it is. <em>Dual numbers</em> take no step at all. A wrong \
             gradient would show as a line of the derived value far above the ladder\u{2019}s. Where the output is a straight line \
             in the element there is no right arm: every large step is good, and the curve only rises to the left. Errors \
             that are exactly 0 lie on the lower edge.</p>\n{pictures}",
            formula(r"D(h) = D + c_2 h^2 + c_4 h^4 + \dots \pm \text{rounding} / h"),
        )
    }
}

fn name(curve: &Curve) -> String {
    let index = curve.index.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let place = if index.is_empty() { String::new() } else { format!("[{index}]") };
    format!("{}: d {}{place}", curve.case, curve.tensor)
}

/// The best that a single difference can do.
fn tip(curve: &Curve) -> Option<&Rung> {
    curve.steps.iter().min_by(|one, other| one.error.total_cmp(&other.error))
}

fn in_words(curve: &Curve) -> String {
    let best = tip(curve).map_or_else(String::new, |rung| {
        format!("The best single difference, at h = {}, is off by {}. ", scientific(rung.step), scientific(rung.error))
    });
    format!(
        "{}. {best}The ladder is off by {} and allows for {}; the derived gradient, {}, and the dual number differ by {}.",
        name(curve),
        scientific((curve.ladder - curve.dual).abs()),
        scientific(curve.uncertainty),
        scientific(curve.ours),
        scientific((curve.ours - curve.dual).abs()),
    )
}

/// The error of single differences against their step, and of what knows better.
pub fn picture(curve: &Curve) -> Picture {
    let steps: Vec<(f64, f64)> = curve.steps.iter().map(|rung| (rung.step, rung.error)).collect();
    let ends = || steps.first().into_iter().chain(steps.last()).map(|(step, _)| *step);
    let level =
        |name: &str, mark, ink, value: f64| Series::new(name, mark, ink, ends().map(|step| (step, value)).collect());
    let chart = Chart::new(
        name(curve),
        Axis::logarithmic("step h, in the element's unit"),
        Axis::logarithmic("error of the slope, in its own unit"),
    )
    .with(level("ladder: what it allows for", Mark::Dashes, Ink::Nth(1), curve.uncertainty))
    .with(level("ladder: error", Mark::Line, Ink::Nth(1), (curve.ladder - curve.dual).abs()))
    .with(level(
        "dual number: its distance from the derived gradient",
        Mark::Dashes,
        Ink::Nth(2),
        (curve.ours - curve.dual).abs(),
    ))
    .with(Series::new("central difference", Mark::LineAndPoints, Ink::Nth(0), steps.clone()));
    Picture::new(format!("Error against step, {}", name(curve)), in_words(curve)).with(chart)
}
