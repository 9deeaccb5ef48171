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

    /// Leaves an array, of any shape, to whoever needs one next: an output or a gradient that has been used.
    pub fn recycle<D: Dimension>(&self, array: Array<T, D>) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(array.into_raw_vec_and_offset().0);
    }
}
