//! Layer normalisation: every row less its mean, over its deviation. SPEC.md, section 13.4.

use super::weighted::check_positive;
use super::{Back, Described, Find, Forward, Module, Parameter, Pass, Signal, defined};
use crate::simd::{self, contiguous};
use crate::{Error, Real, Result, Scalar};
use multiversion::multiversion;
use ndarray::{Array1, Array2, ArrayD, ArrayView2, ArrayViewMut1, ArrayViewMutD, Axis, Ix2, Zip};
use rand_pcg::Pcg64;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// PyTorch's `nn.LayerNorm` over the last axis: x `[..., features]`.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{Described, LayerNormSettings, Pass, Signal};
/// let norm = LayerNormSettings { features: 2, eps: 0.0 };
/// let module = norm.build::<f64>(&mut rand::SeedableRng::seed_from_u64(0))?; // weight 1, bias 0
/// let x = array![[1.0, 3.0], [10.0, 50.0]].into_dyn(); // means 2 and 30, deviations 1 and 20
/// let (y, _) = module.forward(Signal::Values(x), &Pass::evaluation())?;
/// assert_eq!(y, array![[-1.0, 1.0], [-1.0, 1.0]].into_dyn());
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerNormSettings {
    /// The length of the last axis.
    pub features: usize,
    /// Added to the variance: 0 or more.
    #[serde(default = "usual_eps")]
    pub eps: f64,
}

fn usual_eps() -> f64 {
    1e-5
}

/// So many rows are one task, and one partial sum: how sums are made does not depend on the number of threads.
const ROWS: usize = 64;

struct LayerNorm<T> {
    /// `[features]`
    weight: Array1<T>,
    /// `[features]`
    bias: Array1<T>,
    eps: T,
    trained: bool,
}

impl<T: Scalar> LayerNorm<T> {
    /// Weight and bias.
    fn slices(&self) -> [&[T]; 2] {
        [&self.weight, &self.bias].map(|values| values.as_slice().expect("standard layout"))
    }

    /// Rows, or what is wrong with them.
    fn rows(&self, x: ArrayD<T>) -> Result<Array2<T>> {
        let features = self.weight.len();
        if x.shape().last() != Some(&features) || x.ndim() < 2 {
            let expected = format!("[..., {features}]");
            return Err(Error::Shape { tensor: "x".into(), expected, found: x.shape().to_vec() }); // C1
        }
        Ok(as_rows(x, features))
    }
}

fn as_rows<T: Scalar>(x: ArrayD<T>, features: usize) -> Array2<T> {
    let rows = x.len() / features;
    crate::operators::in_standard_layout(x).into_shape_with_order((rows, features)).expect("rows")
}

fn row_mut<T>(row: ArrayViewMut1<'_, T>) -> &mut [T] {
    row.into_slice().expect("standard layout")
}

/// A row x is normalised, and y made of it; what it was multiplied by.
#[multiversion(targets("x86_64+avx2"))]
fn normalise<T: Scalar>(x: &mut [T], y: &mut [T], [weight, bias]: [&[T]; 2], eps: T) -> T {
    let count = T::from_f64(x.len() as f64);
    let mean = simd::sum(x) / count;
    for x in &mut *x {
        *x -= mean;
    }
    let inverse = T::one() / (simd::dot(x, x) / count + eps).sqrt();
    for (((x, y), &w), &b) in x.iter_mut().zip(y).zip(weight).zip(bias) {
        *x *= inverse; // E98
        *y = w * *x + b; // E99
    }
    inverse
}

/// The gradient of x in the place of that of y.
#[multiversion(targets("x86_64+avx2"))]
fn normalise_backward<T: Scalar>(dy: &mut [T], x_hat: &[T], weight: &[T], inverse: T) {
    let count = T::from_f64(dy.len() as f64);
    for (dy, &w) in dy.iter_mut().zip(weight) {
        *dy *= w;
    }
    let (mean, along) = (simd::sum(dy) / count, simd::dot(dy, x_hat) / count);
    for (dx, &x) in dy.iter_mut().zip(x_hat) {
        *dx = inverse * (*dx - mean - along * x); // E101
    }
}

impl<T: Scalar> Module<T> for LayerNorm<T> {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = x.values()?;
        let shape = x.shape().to_vec();
        let mut x_hat = self.rows(x)?;
        let mut inverse = Array1::zeros(x_hat.nrows());
        let y = pass.array(&[x_hat.nrows(), x_hat.ncols()]);
        let mut y = y.into_dimensionality::<Ix2>().expect("two axes");
        let blocks = x_hat.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter();
        let blocks = blocks.zip(y.axis_chunks_iter_mut(Axis(0), ROWS)).zip(inverse.axis_chunks_iter_mut(Axis(0), ROWS));
        blocks.for_each(|((mut x, mut y), mut inverse)| {
            for ((x, y), inverse) in x.outer_iter_mut().zip(y.outer_iter_mut()).zip(&mut inverse) {
                *inverse = normalise(row_mut(x), row_mut(y), self.slices(), self.eps);
            }
        });
        let y = y.into_shape_with_order(shape.as_slice()).expect("as many elements");
        let pass = pass.clone();
        Ok((
            y,
            Box::new(move |dy| {
                let mut dy = as_rows(dy, self.weight.len());
                let mut parameters = Vec::new();
                if self.trained {
                    let blocks =
                        dy.axis_chunks_iter(Axis(0), ROWS).into_par_iter().zip(x_hat.axis_chunks_iter(Axis(0), ROWS));
                    let of_block = |(dy, x_hat): (ArrayView2<'_, T>, ArrayView2<'_, T>)| {
                        let mut sums = [(); 2].map(|()| vec![T::zero(); self.weight.len()]);
                        let [dweight, dbias] = &mut sums;
                        for (dy, x_hat) in dy.outer_iter().zip(x_hat.outer_iter()) {
                            let (dy, x_hat) = (contiguous(dy), contiguous(x_hat));
                            simd::add_products(&dy, &x_hat, dweight); // E100
                            simd::add_scaled(T::one(), &dy, dbias); // E100
                        }
                        sums.map(Array1::from)
                    };
                    let parts: Vec<_> = blocks.map(of_block).collect();
                    let mut sums = [Array1::zeros(self.weight.len()), Array1::zeros(self.weight.len())];
                    for [dweight, dbias] in parts {
                        sums[0] += &dweight;
                        sums[1] += &dbias;
                    }
                    let named = ["weight", "bias"].into_iter().zip(sums);
                    parameters = named.map(|(name, sum)| (name.into(), sum.into_dyn())).collect();
                }
                if !pass.requires_grad_x() {
                    return Ok(Back { x: None, parameters });
                }
                let blocks = dy.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter();
                let blocks =
                    blocks.zip(x_hat.axis_chunks_iter(Axis(0), ROWS)).zip(inverse.axis_chunks_iter(Axis(0), ROWS));
                blocks.for_each(|((mut dy, x_hat), inverse)| {
                    for ((dy, x_hat), &inverse) in dy.outer_iter_mut().zip(x_hat.outer_iter()).zip(&inverse) {
                        let [weight, _] = self.slices();
                        normalise_backward(row_mut(dy), &contiguous(x_hat), weight, inverse);
                    }
                });
                pass.recycle(x_hat);
                Ok(Back { x: Some(dy.into_shape_with_order(shape).expect("as many elements")), parameters })
            }),
        ))
    }
    fn parameters(&self) -> Vec<Parameter<'_, T>> {
        let named = [("weight", &self.weight), ("bias", &self.bias)];
        named
            .into_iter()
            .map(|(name, values)| Parameter {
                name: name.into(),
                values: values.view().into_dyn(),
                trained: self.trained,
            })
            .collect()
    }
    fn parameters_mut(&mut self) -> Vec<(String, ArrayViewMutD<'_, T>)> {
        if !self.trained {
            return Vec::new();
        }
        let named = [("weight", &mut self.weight), ("bias", &mut self.bias)];
        named.into_iter().map(|(name, values)| (name.into(), values.view_mut().into_dyn())).collect()
    }
    fn freeze(&mut self) {
        self.trained = false;
    }
}

impl Described for LayerNormSettings {
    fn build<T: Scalar>(&self, _: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        let &Self { features, eps } = self;
        check_positive("features", features)?;
        if !(eps.is_finite() && eps >= 0.0) {
            let expected = "a finite number, 0 or more".into();
            return Err(Error::Setting { name: "eps", expected, found: eps.to_string() }); // C4
        }
        let (weight, bias) = (Array1::ones(features), Array1::zeros(features));
        Ok(Box::new(LayerNorm { weight, bias, eps: T::from_f64(eps), trained: true }))
    }
    fn elements(&self) -> Result<usize> {
        check_positive("features", self.features)?;
        Ok(2 * self.features)
    }
    fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
        let x = defined(x);
        let shape = x.shape().to_vec();
        let rows = (x.len() / self.features, self.features);
        let mut y = x.into_shape_with_order(rows).expect("rows").into_dimensionality::<Ix2>().expect("two axes");
        let (weight, bias) = (parameters("weight"), parameters("bias"));
        let (zero, count) = (R::constant(0.0), R::constant(self.features as f64));
        for mut row in y.outer_iter_mut() {
            let mean = row.iter().fold(zero, |sum, &x| sum + x) / count;
            let variance = row.iter().fold(zero, |sum, &x| sum + (x - mean) * (x - mean)) / count;
            let deviation = (variance + R::constant(self.eps)).sqrt();
            Zip::from(&mut row)
                .and(&weight.view().into_dimensionality().expect("one axis"))
                .and(&bias.view().into_dimensionality().expect("one axis"))
                .for_each(|x, &w, &b| *x = w * ((*x - mean) / deviation) + b); // E98, E99
        }
        y.into_shape_with_order(shape).expect("as many elements")
    }
}
