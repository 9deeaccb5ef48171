//! Memory that one step leaves to the next: fresh pages cost as much as a pass over them.

use crate::Scalar;
use ndarray::{Array, Dimension, ShapeBuilder};
use std::sync::{Mutex, PoisonError};

/// Arrays that are no longer needed, for those that are. It grows to what one step needs at once.
///
/// ```
/// # use ndarray::array;
/// # use rand::SeedableRng;
/// # use woracle::operators::Linear;
/// # use woracle::wora::{Base, Config, Layer, LoraInit, Method, RequiresGrad, Workspace};
/// # let operator = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
/// # let base = Base { weight: array![[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]].into_dyn().into(), bias: None };
/// # let mut rng = rand_pcg::Pcg64::seed_from_u64(1);
/// # let layer = Layer::init(operator, Config::new(Method::Wora, 2.0), base, 1, LoraInit::default(), &mut rng)?;
/// # let (x, dy) = (array![[1.0, 1.0, 1.0]].into_dyn(), array![[1.0, -1.0]].into_dyn());
/// let workspace = Workspace::default();
/// for _ in 0..3 {
///     let (y, cache) = layer.forward_in(&workspace, x.view().into(), None)?;
///     let gradients = layer.backward_in(&workspace, cache, dy.view(), RequiresGrad::default())?;
///     assert_eq!(y, array![[5.0, 7.0]].into_dyn());
///     workspace.recycle(y);
///     workspace.recycle(gradients.x.unwrap());
/// }
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Debug)]
pub struct Workspace<T> {
    free: Mutex<Vec<Vec<T>>>,
}

impl<T> Default for Workspace<T> {
    fn default() -> Self {
        Self { free: Mutex::default() }
    }
}

impl<T: Scalar> Workspace<T> {
    /// An array of this shape, in standard layout, whose values are whatever was there.
    pub(crate) fn array<D: Dimension>(&self, shape: D) -> Array<T, D> {
        let length = shape.size();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |(_, memory): &(usize, &Vec<T>)| memory.len() >= length && memory.len() / 2 <= length;
        let smallest = free.iter().enumerate().filter(fits).min_by_key(|(_, memory)| memory.len());
        let Some((place, _)) = smallest else { return Array::zeros(shape) };
        let mut memory = free.swap_remove(place);
        memory.truncate(length);
        Array::from_shape_vec(shape.into_shape_with_order(), memory).expect("as many elements")
    }

    /// How many elements are there for whoever needs them.
    #[cfg(test)]
    pub(crate) fn elements(&self) -> usize {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).iter().map(Vec::len).sum()
    }

    /// Leaves an array, of any shape, to whoever needs one next: an output or a gradient that has been used.
    pub fn recycle<D: Dimension>(&self, array: Array<T, D>) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(array.into_raw_vec_and_offset().0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, Array2, Ix1, Ix2};

    #[test]
    fn memory_goes_to_whoever_needs_half_of_it_or_more() {
        let workspace = Workspace::<f64>::default();
        let ten = Array1::from_elem(10, 1.0);
        let memory = ten.as_ptr();
        workspace.recycle(ten);
        for too_much_or_too_little in [11, 4] {
            let fresh: Array1<f64> = workspace.array(Ix1(too_much_or_too_little));
            assert_eq!(fresh, Array1::<f64>::zeros(too_much_or_too_little));
            assert_ne!(fresh.as_ptr(), memory);
        }
        let half: Array1<f64> = workspace.array(Ix1(5));
        assert_eq!((half.as_ptr(), half.len()), (memory, 5));
        workspace.recycle(Array1::from_elem(10, 1.0));
        let whole: Array2<f64> = workspace.array(Ix2(2, 5));
        assert_eq!(whole, Array2::<f64>::ones((2, 5)));
    }
}
