//! Means over an axis, and axes made one. SPEC.md, section 13.3.

use super::{Back, Described, Find, Forward, Module, Pass, Signal, defined};
use crate::{Error, Real, Result, Scalar};
use ndarray::{ArrayD, Axis, IxDyn};
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

/// The mean over one axis, which is gone afterwards: PyTorch's `x.mean(dim)`.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{MeanSettings, Module, Pass, Signal};
/// let x = array![[1.0, 3.0], [10.0, 30.0]].into_dyn();
/// let (y, backward) = MeanSettings { dim: -1 }.forward(Signal::Values(x), &Pass::evaluation())?;
/// assert_eq!(y, array![2.0, 20.0].into_dyn());
/// assert_eq!(backward(array![1.0, 2.0].into_dyn())?.x.unwrap(), array![[0.5, 0.5], [1.0, 1.0]].into_dyn());
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeanSettings {
    /// Which axis; from the end where negative. The first one, which counts samples, cannot be.
    pub dim: isize,
}

impl MeanSettings {
    fn axis(&self, shape: &[usize]) -> Result<Axis> {
        let from_start = if self.dim < 0 { self.dim + shape.len() as isize } else { self.dim };
        if from_start < 1 || from_start >= shape.len() as isize || shape[from_start as usize] == 0 {
            let expected = format!("an axis {} of some length that is not the first", self.dim);
            return Err(Error::Shape { tensor: "x".into(), expected, found: shape.to_vec() }); // C1
        }
        Ok(Axis(from_start as usize))
    }
}

impl<T: Scalar> Module<T> for MeanSettings {
    fn forward<'m>(&'m self, x: Signal<T>, _: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = x.values()?;
        let (axis, shape) = (self.axis(x.shape())?, x.shape().to_vec());
        let part = T::one() / T::from_f64(shape[axis.index()] as f64);
        let y = x.sum_axis(axis) * part; // E93
        Ok((
            y,
            Box::new(move |dy| {
                let spread = (dy * part).insert_axis(axis);
                Ok(Back::of_input(spread.broadcast(shape).expect("one axis of length 1").to_owned())) // E94
            }),
        ))
    }
}

impl Described for MeanSettings {
    fn build<T: Scalar>(&self, _: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        Ok(Box::new(*self))
    }
    fn define<R: Real>(&self, x: Signal<R>, _: Find<'_, R>) -> ArrayD<R> {
        let x = defined(x);
        let axis = self.axis(x.shape()).expect("an input that fits");
        let count = R::constant(x.len_of(axis) as f64);
        x.map_axis(axis, |lane| lane.iter().fold(R::constant(0.0), |sum, &x| sum + x) / count) // E93
    }
}

/// Some axes made one: PyTorch's `nn.Flatten`.
///
/// ```
/// use ndarray::ArrayD;
/// use woracle::modules::{FlattenSettings, Module, Pass, Signal};
/// let flatten = FlattenSettings::default(); // all axes but the first, which counts samples
/// let (y, backward) = flatten.forward(Signal::Values(ArrayD::<f64>::zeros(vec![2, 3, 4])), &Pass::evaluation())?;
/// assert_eq!(y.shape(), [2, 12]);
/// assert_eq!(backward(y)?.x.unwrap().shape(), [2, 3, 4]);
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlattenSettings {
    /// The first of the axes; from the end where negative.
    pub start_dim: isize,
    /// The last of them.
    pub end_dim: isize,
}

impl Default for FlattenSettings {
    fn default() -> Self {
        Self { start_dim: 1, end_dim: -1 }
    }
}

impl FlattenSettings {
    fn shape(&self, shape: &[usize]) -> Result<Vec<usize>> {
        let from_start = |dim: isize| if dim < 0 { dim + shape.len() as isize } else { dim };
        let (start, end) = (from_start(self.start_dim), from_start(self.end_dim));
        if start < 1 || end < start || end >= shape.len() as isize {
            let expected = format!("axes from {} to {} after the first", self.start_dim, self.end_dim);
            return Err(Error::Shape { tensor: "x".into(), expected, found: shape.to_vec() }); // C1
        }
        let (start, end) = (start as usize, end as usize);
        let one: usize = shape[start..=end].iter().product();
        Ok(shape[..start].iter().copied().chain([one]).chain(shape[end + 1..].iter().copied()).collect())
    }
}

/// The same elements in row-major order under another shape.
fn reshaped<E: Clone>(x: ArrayD<E>, shape: &[usize]) -> ArrayD<E> {
    crate::operators::in_standard_layout(x).into_shape_with_order(IxDyn(shape)).expect("as many elements")
}

impl<T: Scalar> Module<T> for FlattenSettings {
    fn forward<'m>(&'m self, x: Signal<T>, _: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = x.values()?;
        let shape = x.shape().to_vec();
        let y = reshaped(x, &self.shape(&shape)?); // E95
        Ok((y, Box::new(move |dy| Ok(Back::of_input(reshaped(dy, &shape)))))) // E96
    }
}

impl Described for FlattenSettings {
    fn build<T: Scalar>(&self, _: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        Ok(Box::new(*self))
    }
    fn define<R: Real>(&self, x: Signal<R>, _: Find<'_, R>) -> ArrayD<R> {
        let x = defined(x);
        let shape = self.shape(x.shape()).expect("an input that fits");
        ArrayD::from_shape_vec(shape, x.iter().copied().collect()).expect("as many elements") // E95
    }
}
