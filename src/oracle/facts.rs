//! What is remarkable about numbers that are wrong, where no known mistake explains them: each fact a line that says
//! where to look.

use super::verify::{Expected, TensorVerdict, Verdict};
use super::{CaseFile, Dtype};
use crate::case::{Tensor, unravel};
use ndarray::{ArrayD, ArrayRef, Axis, IxDyn};
use std::collections::BTreeMap;

/// What there is to say of a failed answer, if there is.
type Fact<'a> = dyn Fn(&Failed<'_>) -> Option<String> + 'a;

/// A failed answer.
struct Failed<'a> {
    name: &'a str,
    actual: &'a ArrayRef<f64, IxDyn>,
    expected: &'a ArrayD<f64>,
    bound: &'a ArrayD<f64>,
}

/// The facts about every answer that fails.
pub(super) fn facts(file: &CaseFile, expected: &Expected, tensors: &[TensorVerdict]) -> Vec<String> {
    let failed = tensors.iter().filter(|tensor| tensor.verdict != Verdict::Pass);
    let mut lines = vec![];
    for tensor in failed {
        let name = tensor.name.as_str();
        let Tensor::Float(actual) = &file.case.tensors[name] else { continue };
        let failed = Failed { name, actual, expected: &expected.witnesses[0][name], bound: &expected.bounds[name] };
        let all: [&Fact<'_>; 9] = [
            &not_numbers,
            &zeros,
            &constant_ratio,
            &|failed| as_narrow(failed, file),
            &constant_ratio_along_an_axis,
            &constant_difference,
            &transposed,
            &permuted,
            &|failed| where_wrong(failed, file),
        ];
        lines.extend(all.iter().find_map(|fact| fact(&failed)).map(|fact| format!("{name}: {fact}")));
    }
    lines
}

impl Failed<'_> {
    fn is_wrong(&self, (actual, (expected, bound)): (&f64, (&f64, &f64))) -> bool {
        let within = (actual - expected).abs() <= *bound;
        !within
    }

    fn elements(&self) -> impl Iterator<Item = (&f64, (&f64, &f64))> {
        self.actual.iter().zip(self.expected.iter().zip(self.bound))
    }

    /// The one factor between all elements, where there is one and they are wrong.
    fn ratio(&self) -> Option<f64> {
        // By the largest element, whose ratio is the surest.
        let (actual, (expected, _)) = self.elements().max_by(|a, b| a.1.0.abs().total_cmp(&b.1.0.abs()))?;
        let ratio = actual / expected;
        let all = |(actual, (expected, bound)): (&f64, (&f64, &f64))| {
            (actual - ratio * expected).abs() <= 4.0 * ratio.abs().max(1.0) * bound
        };
        let one = ratio.is_finite() && self.elements().all(all) && self.elements().any(|one| self.is_wrong(one));
        one.then_some(ratio)
    }

    /// Whether other numbers are the answer.
    fn is(&self, other: &ArrayD<f64>) -> bool {
        other.shape() == self.actual.shape()
            && self
                .actual
                .iter()
                .zip(other.iter().zip(self.bound))
                .all(|(actual, (other, bound))| (actual - other).abs() <= 4.0 * bound)
    }
}

fn not_numbers(failed: &Failed<'_>) -> Option<String> {
    let count = failed.actual.iter().filter(|value| !value.is_finite()).count();
    let first = failed.actual.iter().position(|value| !value.is_finite())?;
    let place = unravel(first, failed.actual.shape());
    Some(format!("{count} of {} elements are no numbers, the first at {place:?}", failed.actual.len()))
}

fn zeros(failed: &Failed<'_>) -> Option<String> {
    failed.actual.iter().all(|&value| value == 0.0).then(|| "it is zero everywhere".into())
}

/// As many roundings as there may be in what was computed in a narrower type, of the size of the whole tensor.
const ROUNDINGS: f64 = 16.0;
/// A number is nearly 0 within so many of its bounds.
const VANISHES: f64 = 16.0;
/// That one or two numbers are off by so much is a coincidence.
const SEVERAL: usize = 8;

/// The types that numbers of this one may have been computed in.
fn narrower(dtype: Dtype) -> &'static [Dtype] {
    match dtype {
        Dtype::F64 => &[Dtype::F32, Dtype::F16, Dtype::Bf16],
        Dtype::F32 => &[Dtype::F16, Dtype::Bf16],
        Dtype::Bf16 | Dtype::F16 => &[],
    }
}

fn as_narrow(failed: &Failed<'_>, file: &CaseFile) -> Option<String> {
    let dtype = file.dtype(failed.name);
    let square = |sum: f64, value: f64| sum + value * value;
    let error = failed.elements().map(|(actual, (expected, _))| actual - expected).fold(0.0, square).sqrt();
    let size = failed.expected.iter().copied().fold(0.0, square).sqrt();
    let explains = |narrow: &&Dtype| {
        let wider = narrow.unit_roundoff() / dtype.unit_roundoff();
        error <= ROUNDINGS * narrow.unit_roundoff() * size
            && failed.elements().all(|(actual, (expected, bound))| (actual - expected).abs() <= bound * wider)
    };
    // So few digits are easily right by chance.
    let is_narrow = |narrow: &&Dtype| **narrow == Dtype::F32 || failed.actual.iter().all(|&v| narrow.round(v) == v);
    let narrow = narrower(dtype).iter().find(|narrow| explains(narrow) && is_narrow(narrow));
    let narrow = narrow.filter(|_| failed.actual.len() >= SEVERAL)?;
    Some(format!("it is as exact as {narrow} is, and stored as {dtype}: was it computed in {narrow}?"))
}

fn constant_ratio(failed: &Failed<'_>) -> Option<String> {
    let ratio = failed.ratio()?;
    if failed.actual.len() > 1 {
        return Some(format!("every element is {ratio:.6} times what it should be"));
    }
    // Of what is nearly 0 anything is a multiple.
    let vanishes = failed.elements().all(|(_, (expected, bound))| expected.abs() <= VANISHES * bound);
    (!vanishes).then(|| format!("it is {ratio:.6} times what it should be"))
}

fn constant_ratio_along_an_axis(failed: &Failed<'_>) -> Option<String> {
    (0..failed.actual.ndim()).filter(|&axis| failed.actual.len_of(Axis(axis)) < failed.actual.len()).find_map(|axis| {
        let lines = 0..failed.actual.len_of(Axis(axis));
        let ratios: Option<Vec<f64>> = lines
            .map(|line| {
                let of = |values: &ArrayRef<f64, IxDyn>| values.index_axis(Axis(axis), line).to_owned();
                let (actual, expected, bound) = (of(failed.actual), of(failed.expected), of(failed.bound));
                let one = Failed { name: failed.name, actual: &actual, expected: &expected, bound: &bound };
                if one.is(&expected) {
                    return Some(1.0);
                }
                one.ratio()
            })
            .collect();
        let ratios = ratios?;
        let shown: Vec<String> = ratios.iter().take(6).map(|ratio| format!("{ratio:.4}")).collect();
        let more = if ratios.len() > 6 { ", ..." } else { "" };
        Some(format!("along axis {axis} it is off by one factor an index: {}{more}", shown.join(", ")))
    })
}

fn constant_difference(failed: &Failed<'_>) -> Option<String> {
    let (actual, (expected, _)) = failed.elements().next()?;
    let offset = actual - expected;
    let all = failed.elements().all(|(actual, (expected, bound))| (actual - expected - offset).abs() <= 4.0 * bound);
    (failed.actual.len() > 1 && all).then(|| format!("every element is off by {offset:e}"))
}

fn transposed(failed: &Failed<'_>) -> Option<String> {
    let mut reversed = failed.expected.view();
    reversed.swap_axes(0, failed.expected.ndim().checked_sub(1)?);
    (failed.actual.ndim() > 1 && failed.is(&reversed.to_owned())).then(|| "it is the right tensor, transposed".into())
}

fn permuted(failed: &Failed<'_>) -> Option<String> {
    let axes = 0..failed.actual.ndim();
    axes.filter(|&axis| (2..=4096).contains(&failed.actual.len_of(Axis(axis)))).find_map(|axis| {
        let line = |values: &ArrayRef<f64, IxDyn>, index: usize| values.index_axis(Axis(axis), index).to_owned();
        let count = failed.actual.len_of(Axis(axis));
        let find = |index: usize| {
            let (actual, bound) = (line(failed.actual, index), line(failed.bound, index));
            (0..count).find(|&other| {
                let expected = line(failed.expected, other);
                Failed { name: failed.name, actual: &actual, expected: &expected, bound: &bound }.is(&expected)
            })
        };
        let order: Vec<usize> = (0..count).map(find).collect::<Option<_>>()?;
        let shown: Vec<String> = order.iter().take(8).map(ToString::to_string).collect();
        let more = if count > 8 { ", ..." } else { "" };
        Some(format!("along axis {axis} it is the right tensor in another order: {}{more}", shown.join(", ")))
    })
}

/// Where the wrong elements lie.
fn where_wrong(failed: &Failed<'_>, file: &CaseFile) -> Option<String> {
    let shape = failed.actual.shape();
    let wrong: Vec<Vec<usize>> = failed
        .elements()
        .enumerate()
        .filter(|(_, one)| failed.is_wrong(*one))
        .map(|(element, _)| unravel(element, shape))
        .collect();
    let share = format!("{} of {} elements are wrong", wrong.len(), failed.actual.len());
    if let Some(Tensor::Int(ids)) = file.case.tensors.get("x") {
        let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
        ids.iter().for_each(|&id| *counts.entry(id as usize).or_default() += 1);
        // W0's rows are ids, A's columns are.
        let axis =
            [("grad.base.weight", 0), ("grad.lora_embedding_A", 1)].into_iter().find(|(name, _)| *name == failed.name);
        if let Some((_, axis)) = axis {
            let repeats = |index: &Vec<usize>| counts.get(&index[axis]).is_some_and(|&count| count > 1);
            let padding = file.case.settings.get("padding_idx").and_then(serde_json::Value::as_u64);
            if wrong.iter().all(|index| Some(index[axis] as u64) == padding) {
                return Some(format!("{share}, all of them at padding_idx"));
            }
            if wrong.iter().all(repeats) {
                return Some(format!("{share}, all of them where an id occurs more than once"));
            }
        }
    }
    if wrong.len() == failed.actual.len() {
        return None;
    }
    if file.case.layer.starts_with("conv") && matches!(failed.name, "y" | "grad.x") {
        let first = shape.len() - (file.case.layer.as_bytes()[4] - b'0') as usize;
        let on_border =
            |index: &Vec<usize>| (first..shape.len()).any(|axis| index[axis] == 0 || index[axis] + 1 == shape[axis]);
        if wrong.iter().all(on_border) {
            return Some(format!("{share}, all of them at the border"));
        }
    }
    let single =
        (0..shape.len()).find(|&axis| shape[axis] > 1 && wrong.iter().all(|index| index[axis] == wrong[0][axis]));
    Some(match single {
        Some(axis) => format!("{share}, all of them at index {} of axis {axis}", wrong[0][axis]),
        None => format!("{share}, the first at {:?}", wrong[0]),
    })
}
