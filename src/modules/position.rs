//! Learned positions: a row for every place in a sequence. SPEC.md, section 13.7.

use super::weighted::{check_elements, check_positive};
use super::{Back, Described, Find, Forward, Module, Parameter, Pass, Signal, defined};
use crate::operators::for_each;
use crate::{Error, Real, Result, Scalar};
use ndarray::{Array2, ArrayD, ArrayViewMutD, Axis, Slice};
use rand::RngExt;
use rand_distr::StandardNormal;
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

/// `y = x + P`: x `[batch, length, embedding_dim]`, P `[max_length, embedding_dim]`, as many rows of it as x is long.
///
/// ```
/// use ndarray::ArrayD;
/// use woracle::modules::{Described, Pass, PositionEmbeddingSettings, Signal};
/// let settings = PositionEmbeddingSettings { max_length: 3, embedding_dim: 2 };
/// let positions = settings.build::<f64>(&mut rand::SeedableRng::seed_from_u64(0))?;
/// let x = |length| Signal::Values(ArrayD::zeros(vec![4, length, 2]));
/// let (y, backward) = positions.forward(x(2), &Pass::evaluation())?;
/// let table = positions.parameters().remove(0).values.to_owned(); // [max_length, embedding_dim]
/// assert_eq!(y[[3, 1, 0]], table[[1, 0]]);
/// let gradient = backward(ArrayD::ones(vec![4, 2, 2]))?.parameters.remove(0).1;
/// assert_eq!((gradient[[1, 0]], gradient[[2, 0]]), (4.0, 0.0)); // the sum over the batch; the third place is not used
/// assert!(positions.forward(x(4), &Pass::evaluation()).is_err()); // C1
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PositionEmbeddingSettings {
    /// The longest sequence.
    pub max_length: usize,
    /// Features of a place.
    pub embedding_dim: usize,
}

/// How far from 0 fresh positions are, as GPT-2's.
const DEVIATION: f64 = 0.02;

struct PositionEmbedding<T> {
    /// `[max_length, embedding_dim]`
    weight: Array2<T>,
    trained: bool,
}

impl<T: Scalar> Module<T> for PositionEmbedding<T> {
    fn forward<'m>(&'m self, x: Signal<T>, _: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let mut y = x.values()?;
        let (max_length, dim) = self.weight.dim();
        let length = match *y.shape() {
            [_, length, found] if found == dim && length <= max_length => length,
            _ => {
                let expected = format!("[batch, up to {max_length}, {dim}]");
                return Err(Error::Shape { tensor: "x".into(), expected, found: y.shape().to_vec() }); // C1
            }
        };
        let weight = self.weight.slice_axis(Axis(0), Slice::from(..length));
        for_each(y.len(), y.outer_iter_mut(), |mut y| y += &weight); // E107
        Ok((
            y,
            Box::new(move |dy| {
                let mut parameters = Vec::new();
                if self.trained {
                    let mut dweight = Array2::zeros(self.weight.raw_dim());
                    dweight.slice_axis_mut(Axis(0), Slice::from(..length)).into_dyn().assign(&dy.sum_axis(Axis(0))); // E108
                    parameters.push(("weight".into(), dweight.into_dyn()));
                }
                Ok(Back { x: Some(dy), parameters })
            }),
        ))
    }
    fn parameters(&self) -> Vec<Parameter<'_, T>> {
        vec![Parameter { name: "weight".into(), values: self.weight.view().into_dyn(), trained: self.trained }]
    }
    fn parameters_mut(&mut self) -> Vec<(String, ArrayViewMutD<'_, T>)> {
        if self.trained { vec![("weight".into(), self.weight.view_mut().into_dyn())] } else { Vec::new() }
    }
    fn freeze(&mut self) {
        self.trained = false;
    }
}

impl Described for PositionEmbeddingSettings {
    fn build<T: Scalar>(&self, rng: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        let shape = (self.max_length, self.embedding_dim);
        self.elements()?;
        let weight =
            Array2::from_shape_simple_fn(shape, || T::from_f64(rng.sample::<f64, _>(StandardNormal) * DEVIATION));
        Ok(Box::new(PositionEmbedding { weight, trained: true }))
    }
    fn elements(&self) -> Result<usize> {
        check_positive("max_length", self.max_length)?;
        check_positive("embedding_dim", self.embedding_dim)?;
        check_elements("weight", &[self.max_length, self.embedding_dim])
    }
    fn define<R: Real>(&self, x: Signal<R>, parameters: Find<'_, R>) -> ArrayD<R> {
        let (mut y, weight) = (defined(x), parameters("weight"));
        for (index, y) in y.indexed_iter_mut() {
            *y = *y + weight[[index[1], index[2]]]; // E107
        }
        y
    }
}
