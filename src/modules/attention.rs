//! Self-attention with one or several heads. SPEC.md, section 13.9.

use super::activation::add_to;
use super::weighted::check_positive;
use super::{Back, Described, Find, Forward, LinearMap, Module, Pass, Signal, defined, prefixed, run_part, yes};
use crate::matmul::{Accumulate, product_into_on_this_thread, run_tasks};
use crate::simd;
use crate::{Error, Real, Result, Scalar};
use ndarray::{Array3, Array4, ArrayD, ArrayView2, ArrayView4, ArrayViewMut2, Axis, Ix3, Ix4, Slice, Zip};
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

/// Self-attention: x `[batch, length, embed_dim]`, projections `q_proj`, `k_proj`, `v_proj` and `out_proj` of
/// `[embed_dim, embed_dim]` each, which an adapter can be put on.
///
/// ```
/// use ndarray::{Axis, array};
/// use woracle::modules::{Pass, Settings, Signal};
/// let settings = r#"{"type": "self_attention", "embed_dim": 4, "num_heads": 2, "causal": true}"#;
/// let settings: Settings = serde_json::from_str(settings).unwrap();
/// let attention = settings.build::<f64>(&mut rand::SeedableRng::seed_from_u64(0))?;
/// let run = |second: f64| -> woracle::Result<_> {
///     let x = array![[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, second]]].into_dyn(); // [batch, length, embed_dim]
///     Ok(attention.forward(Signal::Values(x), &Pass::evaluation())?.0.index_axis_move(Axis(0), 0)) // one sample
/// };
/// let (one, other) = (run(8.0)?, run(-8.0)?);
/// assert_eq!(one.index_axis(Axis(0), 0), other.index_axis(Axis(0), 0)); // the first place sees nothing after it
/// assert_ne!(one.index_axis(Axis(0), 1), other.index_axis(Axis(0), 1));
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfAttentionSettings {
    /// Features of x and y.
    pub embed_dim: usize,
    /// How many heads share them: a divisor.
    #[serde(default = "one")]
    pub num_heads: usize,
    /// Whether a place sees itself and what is before it, and nothing after it.
    #[serde(default)]
    pub causal: bool,
    /// Whether the projections have biases.
    #[serde(default = "yes")]
    pub bias: bool,
    /// The probability that a weight of the attention is dropped in training.
    #[serde(default)]
    pub dropout: f64,
}

fn one() -> usize {
    1
}

/// What the projections are called.
const PROJECTIONS: [&str; 4] = ["q_proj", "k_proj", "v_proj", "out_proj"];

struct SelfAttention<T> {
    settings: SelfAttentionSettings,
    /// In the order of their names.
    projections: [Box<dyn Module<T>>; 4],
}

/// The features of one sample, head by head: `[length, embed_dim]` as `[length, heads, features]`.
fn heads<T>(x: &Array3<T>, heads: usize) -> ArrayView4<'_, T> {
    let (batch, length, dim) = x.dim();
    x.view().into_shape_with_order((batch, length, heads, dim / heads)).expect("projections in standard layout")
}

/// `[length, features]` of one head of one sample.
fn head_of<'x, T>(all: &'x ArrayView4<'_, T>, sample: usize, head: usize) -> ArrayView2<'x, T> {
    all.view().index_axis_move(Axis(0), sample).index_axis_move(Axis(1), head)
}

/// The attention of each place to the others, in the place of its scores. E110
fn softmax_rows<T: Scalar>(mut scores: ArrayViewMut2<'_, T>, causal: bool) {
    for (place, mut row) in scores.outer_iter_mut().enumerate() {
        let row = row.as_slice_mut().expect("rows of a fresh array");
        let seen = if causal { place + 1 } else { row.len() };
        let (row, unseen) = row.split_at_mut(seen);
        let largest = simd::largest(row);
        row.iter_mut().for_each(|score| *score -= largest);
        T::exp_each(row);
        let sum = simd::sum(row);
        let inverse = T::one() / sum;
        row.iter_mut().for_each(|weight| *weight *= inverse);
        unseen.fill(T::zero());
    }
}

/// A product that is small, and one of many.
fn small<T: Scalar>(scale: T, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, c: ArrayViewMut2<'_, T>) {
    product_into_on_this_thread(scale, a, b, Accumulate::Replace, c);
}

/// Places whose attention is computed together where it is causal.
const TOGETHER: usize = 32;

/// The places in blocks, each with all that its last one sees: products with what none of them sees are left out.
fn blocks(length: usize, causal: bool) -> impl Iterator<Item = [Slice; 2]> {
    let together = if causal { TOGETHER } else { length.max(1) };
    (0..length).step_by(together).map(move |start| {
        let end = (start + together).min(length);
        [Slice::from(start..end), Slice::from(..end)]
    })
}

/// Some rows of a matrix.
fn rows<'x, T>(matrix: ArrayView2<'x, T>, rows: Slice) -> ArrayView2<'x, T> {
    matrix.slice_axis_move(Axis(0), rows)
}

/// The part of a matrix of places by places, or of its transpose.
fn part<'x, T>(matrix: ArrayView2<'x, T>, of_rows: Slice, of_columns: Slice) -> ArrayView2<'x, T> {
    rows(matrix, of_rows).slice_axis_move(Axis(1), of_columns)
}

fn part_mut<'x, T>(matrix: &'x mut ArrayViewMut2<'_, T>, of_rows: Slice, of_columns: Slice) -> ArrayViewMut2<'x, T> {
    matrix.slice_axis_mut(Axis(0), of_rows).slice_axis_move(Axis(1), of_columns)
}

/// What the heads make of queries, keys and values `[batch, length, embed_dim]`: y, and how much each place attended to
/// each other, `[batch, heads, length, length]`.
fn attend<T: Scalar>(
    [q, k, v]: [&Array3<T>; 3],
    settings: &SelfAttentionSettings,
    mask: Option<&Array4<T>>,
    pass: &Pass<'_, T>,
) -> (Array3<T>, Array4<T>) {
    let (batch, length, dim) = q.dim();
    let count = settings.num_heads;
    let scale = T::one() / T::from_f64((dim / count) as f64).sqrt();
    let (q, k, v) = (heads(q, count), heads(k, count), heads(v, count));
    let y = pass.array(&[batch, length, dim]);
    let weights = pass.array(&[batch, count, length, length]);
    let mut y = three_axes(y);
    let mut weights = weights.into_dimensionality::<Ix4>().expect("four axes");
    let mut by_head = y.view_mut().into_shape_with_order((batch, length, count, dim / count)).expect("a fresh array");
    let tasks = by_head.outer_iter_mut().zip(weights.outer_iter_mut()).enumerate().collect();
    run_tasks(
        tasks,
        || (),
        |(), (sample, (mut y, mut weights))| {
            let of = |all, head| head_of(all, sample, head);
            for (head, mut weights) in weights.outer_iter_mut().enumerate() {
                for [places, seen] in blocks(length, settings.causal) {
                    let (q, k) = (rows(of(&q, head), places), rows(of(&k, head), seen));
                    small(scale, q, k.t(), part_mut(&mut weights, places, seen)); // E109
                }
                softmax_rows(weights.view_mut(), settings.causal);
                let dropped = mask.map(|mask| &weights * &mask.index_axis(Axis(0), sample).index_axis(Axis(0), head));
                let weights = dropped.as_ref().map_or(weights.view(), |dropped| dropped.view());
                let mut y = y.index_axis_mut(Axis(1), head);
                for [places, seen] in blocks(length, settings.causal) {
                    let (weights, v) = (part(weights, places, seen), rows(of(&v, head), seen));
                    small(T::one(), weights, v, y.slice_axis_mut(Axis(0), places)); // E111
                }
            }
        },
    );
    (y, weights)
}

/// The gradients of queries, keys and values, given that of [`attend`]'s y.
fn attend_backward<T: Scalar>(
    [q, k, v]: [&Array3<T>; 3],
    weights: &Array4<T>,
    causal: bool,
    mask: Option<&Array4<T>>,
    dy: &Array3<T>,
    pass: &Pass<'_, T>,
) -> [Array3<T>; 3] {
    let (batch, length, dim) = q.dim();
    let count = weights.len_of(Axis(1));
    let scale = T::one() / T::from_f64((dim / count) as f64).sqrt();
    let (q, k, v, dy) = (heads(q, count), heads(k, count), heads(v, count), heads(dy, count));
    let mut gradients = [(); 3].map(|()| three_axes(pass.array(&[batch, length, dim])));
    let by_head = gradients.each_mut().map(|gradient| {
        gradient.view_mut().into_shape_with_order((batch, length, count, dim / count)).expect("a fresh array")
    });
    let [mut dq, mut dk, mut dv] = by_head;
    let tasks = dq.outer_iter_mut().zip(dk.outer_iter_mut()).zip(dv.outer_iter_mut()).enumerate().collect();
    let of_mask = if mask.is_some() { length } else { 0 };
    let scratch = || [length, of_mask].map(|length| ndarray::Array2::zeros((length, length)));
    run_tasks(tasks, scratch, |[dscores, dropped], (sample, ((mut dq, mut dk), mut dv))| {
        let of = |all, head| head_of(all, sample, head);
        for head in 0..count {
            let weights = weights.index_axis(Axis(0), sample);
            let weights = weights.index_axis(Axis(0), head);
            let mask = mask.map(|mask| mask.index_axis(Axis(0), sample).index_axis_move(Axis(0), head));
            let dy = of(&dy, head);
            let attended = match &mask {
                None => weights.view(),
                Some(mask) => {
                    Zip::from(&mut *dropped).and(&weights).and(mask).for_each(|dropped, &w, &mask| *dropped = w * mask);
                    dropped.view()
                }
            };
            let [mut dq, mut dk, mut dv] = [&mut dq, &mut dk, &mut dv].map(|all| all.index_axis_mut(Axis(1), head));
            for [places, seen] in blocks(length, causal) {
                let (weights, mut dscores) = (rows(weights, places), dscores.slice_axis_mut(Axis(0), places));
                let mut dscores = dscores.slice_axis_mut(Axis(1), seen);
                small(T::one(), rows(dy, places), rows(of(&v, head), seen).t(), dscores.view_mut()); // E116
                if let Some(mask) = &mask {
                    dscores *= &part(mask.view(), places, seen);
                }
                for (mut row, weights) in dscores.outer_iter_mut().zip(weights.outer_iter()) {
                    let row = row.as_slice_mut().expect("rows of a fresh array");
                    let weights = &weights.to_slice().expect("rows of a fresh array")[..row.len()];
                    let mean = simd::dot(row, weights);
                    row.iter_mut().zip(weights).for_each(|(dscore, &weight)| *dscore = weight * (*dscore - mean)); // E117
                }
                small(scale, dscores.view(), rows(of(&k, head), seen), dq.slice_axis_mut(Axis(0), places)); // E118
            }
            for [places, _] in blocks(length, causal) {
                let seeing = Slice::from(if causal { places.start } else { 0 }..);
                let (attended, dscores) = (part(attended, seeing, places), part(dscores.view(), seeing, places));
                small(T::one(), attended.t(), rows(dy, seeing), dv.slice_axis_mut(Axis(0), places)); // E112
                small(scale, dscores.t(), rows(of(&q, head), seeing), dk.slice_axis_mut(Axis(0), places)); // E119
            }
        }
    });
    gradients
}

fn three_axes<T: Scalar>(x: ArrayD<T>) -> Array3<T> {
    crate::operators::in_standard_layout(x).into_dimensionality::<Ix3>().expect("as many axes as x")
}

impl<T: Scalar> SelfAttention<T> {
    /// Runs one of the projections.
    fn project<'m>(&'m self, which: usize, x: ArrayD<T>, pass: &Pass<'m, T>, wanted: bool) -> Result<Forward<'m, T>> {
        run_part(PROJECTIONS[which], self.projections[which].as_ref(), Signal::Values(x), pass, wanted)
    }
}

impl<T: Scalar> Module<T> for SelfAttention<T> {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = x.values()?;
        if !matches!(*x.shape(), [_, _, dim] if dim == self.settings.embed_dim) {
            let expected = format!("[batch, length, {}]", self.settings.embed_dim);
            return Err(Error::Shape { tensor: "x".into(), expected, found: x.shape().to_vec() }); // C1
        }
        let wanted = pass.requires_grad_x();
        let (batch, length, heads) = (x.shape()[0], x.shape()[1], self.settings.num_heads);
        let (q, back_q) = self.project(0, pass.copy(&x), pass, wanted)?;
        let (k, back_k) = self.project(1, pass.copy(&x), pass, wanted)?;
        let (v, back_v) = self.project(2, x, pass, wanted)?;
        let [q, k, v] = [q, k, v].map(three_axes);
        let mask = pass.mask(&[batch, heads, length, length], self.settings.dropout);
        let mask = mask.map(|mask| mask.into_dimensionality::<Ix4>().expect("four axes"));
        let (attended, weights) = attend([&q, &k, &v], &self.settings, mask.as_ref(), pass);
        let inner = wanted || self.projections[..3].iter().any(|projection| projection.is_trained());
        let (y, back_out) = self.project(3, attended.into_dyn(), pass, inner)?;
        let (pass, causal) = (pass.clone(), self.settings.causal);
        Ok((
            y,
            Box::new(move |dy| {
                let mut parameters = Vec::new();
                let mut take = |which: usize, back: Back<T>| {
                    let named = back.parameters.into_iter();
                    parameters.extend(named.map(|(name, values)| (prefixed(PROJECTIONS[which], &name), values)));
                    back.x
                };
                let Some(dattended) = take(3, back_out(dy)?) else { return Ok(Back { x: None, parameters }) };
                let dattended = three_axes(dattended);
                let gradients = attend_backward([&q, &k, &v], &weights, causal, mask.as_ref(), &dattended, &pass);
                [q, k, v, dattended].into_iter().for_each(|array| pass.recycle(array));
                pass.recycle(weights);
                let mut dx: Option<ArrayD<T>> = None;
                for (which, (gradient, backward)) in gradients.into_iter().zip([back_q, back_k, back_v]).enumerate() {
                    let Some(part) = take(which, backward(gradient.into_dyn())?) else { continue };
                    match &mut dx {
                        None => dx = Some(part),
                        Some(dx) => {
                            add_to(dx, &part); // E120
                            pass.recycle(part);
                        }
                    }
                }
                Ok(Back { x: dx, parameters })
            }),
        ))
    }
    fn parts(&self) -> Vec<(&str, &dyn Module<T>)> {
        PROJECTIONS.into_iter().zip(self.projections.iter().map(Box::as_ref)).collect()
    }
    fn parts_mut(&mut self) -> Vec<(&str, &mut dyn Module<T>)> {
        let projections = self.projections.iter_mut().map(|projection| projection.as_mut() as &mut dyn Module<T>);
        PROJECTIONS.into_iter().zip(projections).collect()
    }
}

impl SelfAttentionSettings {
    fn projection(&self) -> LinearMap {
        LinearMap { in_features: self.embed_dim, out_features: self.embed_dim, bias: self.bias }
    }
}

impl Described for SelfAttentionSettings {
    fn build<T: Scalar>(&self, rng: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        check_positive("embed_dim", self.embed_dim)?;
        if self.num_heads == 0 || !self.embed_dim.is_multiple_of(self.num_heads) {
            let expected = format!("a divisor of embed_dim = {}", self.embed_dim);
            return Err(Error::Setting { name: "num_heads", expected, found: self.num_heads.to_string() }); // C4
        }
        Pass::<T>::check_probability("dropout", self.dropout)?;
        let mut build = || self.projection().build(rng);
        Ok(Box::new(SelfAttention { settings: *self, projections: [build()?, build()?, build()?, build()?] }))
    }
    fn elements(&self) -> Result<usize> {
        check_positive("embed_dim", self.embed_dim)?;
        Ok(4 * self.projection().elements()?)
    }
    /// With the mask of a dropout as a parameter.
    fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
        let x = defined(x);
        let project = |part: &str, x: ArrayD<R>| {
            self.projection().define(Signal::Values(x), &|name: &str| parameters(&prefixed(part, name)))
        };
        let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|part| project(part, x.clone()));
        let (batch, length) = (x.shape()[0], x.shape()[1]);
        let features = self.embed_dim / self.num_heads;
        let zero = R::constant(0.0);
        let root = R::constant(features as f64).sqrt();
        let mask = (self.dropout > 0.0).then(|| parameters("mask"));
        let mut attended = ArrayD::from_elem(x.shape(), zero);
        for (sample, head, place) in ndarray::indices((batch, self.num_heads, length)) {
            let columns = head * features..(head + 1) * features;
            let seen = if self.causal { place + 1 } else { length };
            let score = |other: usize| {
                let products = columns.clone().map(|j| q[[sample, place, j]] * k[[sample, other, j]]);
                products.fold(zero, |sum, product| sum + product) / root // E109
            };
            let scores: Vec<R> = (0..seen).map(score).collect();
            // What is taken off every score takes nothing off the attention.
            let largest = scores.iter().fold(f64::NEG_INFINITY, |largest, score| largest.max(score.value()));
            let weights: Vec<R> = scores.iter().map(|&score| (score - R::constant(largest)).exp()).collect();
            let sum = weights.iter().fold(zero, |sum, &weight| sum + weight);
            let kept = |other: usize| mask.as_ref().map_or(R::constant(1.0), |mask| mask[[sample, head, place, other]]);
            for j in columns {
                let terms = weights.iter().enumerate().map(|(other, &weight)| {
                    weight / sum * kept(other) * v[[sample, other, j]] // E110
                });
                attended[[sample, place, j]] = terms.fold(zero, |sum, term| sum + term); // E111
            }
        }
        project("out_proj", attended)
    }
}
