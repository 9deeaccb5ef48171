//! Layer normalisation: every row less its mean, over its deviation. SPEC.md, section 13.4.

use super::weighted::check_positive;
use super::{Back, Described, Find, Forward, Module, Parameter, Pass, Signal, defined};
use crate::{Error, Real, Result, Scalar};
use ndarray::{Array1, Array2, ArrayD, ArrayViewMutD, Axis, Ix2, Zip};
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

impl<T: Scalar> Module<T> for LayerNorm<T> {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = x.values()?;
        let shape = x.shape().to_vec();
        let mut x_hat = self.rows(x)?;
        let count = T::from_f64(self.weight.len() as f64);
        let mut inverse = Array1::zeros(x_hat.nrows());
        let y = pass.array(&[x_hat.nrows(), x_hat.ncols()]);
        let mut y = y.into_dimensionality::<Ix2>().expect("two axes");
        let blocks = x_hat.axis_chunks_iter_mut(Axis(0), ROWS).into_par_iter();
        let blocks = blocks.zip(y.axis_chunks_iter_mut(Axis(0), ROWS)).zip(inverse.axis_chunks_iter_mut(Axis(0), ROWS));
        blocks.for_each(|((mut x, mut y), mut inverse)| {
            for ((mut x, y), inverse) in x.outer_iter_mut().zip(y.outer_iter_mut()).zip(&mut inverse) {
                let mean = x.sum() / count;
                x.mapv_inplace(|x| x - mean);
                *inverse = T::one() / (x.dot(&x) / count + self.eps).sqrt();
                let inverse = *inverse;
                x.mapv_inplace(|x| x * inverse); // E98
                Zip::from(y).and(&x).and(&self.weight).and(&self.bias).for_each(|y, &x, &w, &b| *y = w * x + b); // E99
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
                    let parts: Vec<_> =
                        blocks.map(|(dy, x_hat)| ((&dy * &x_hat).sum_axis(Axis(0)), dy.sum_axis(Axis(0)))).collect(); // E100
                    let mut sums = [Array1::zeros(self.weight.len()), Array1::zeros(self.weight.len())];
                    for (dweight, dbias) in parts {
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
                    for ((mut dy, x_hat), &inverse) in dy.outer_iter_mut().zip(x_hat.outer_iter()).zip(&inverse) {
                        dy *= &self.weight;
                        let (mean, along) = (dy.sum() / count, dy.dot(&x_hat) / count);
                        Zip::from(dy).and(&x_hat).for_each(|dx, &x| *dx = inverse * (*dx - mean - along * x)); // E101
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
