//! Operators: maps `y = op(x, W)` that are linear in `x` and in `W`, and their adjoints.
//!
//! An operator knows nothing of adapters. It sees every weight as a matrix `[units, fan_in]`, one row
//! an output unit, and every output as `[outer, units, inner]`: a linear layer's rows are `outer`, a
//! convolution's images are `outer` and its pixels `inner`. SPEC.md, section 3.
//!
//! The two adjoints are found in an operator's terms, and `<dy, op(x, W)> = <dx, x> = <dW, W>` holds for every one:
//!
//! ```
//! use ndarray::array;
//! use woracle::operators::{Linear, LinearSettings, Operator};
//! let linear = Linear::from_weight_shape(LinearSettings::default(), &[2, 3])?; // stored [out, in]
//! assert_eq!((linear.units(), linear.fan_in()), (2, 3));
//! assert_eq!(linear.lora_shapes(1), [vec![1, 3], vec![2, 1]]); // A [rank, in], B [out, rank]
//! let x = array![[1.0, 2.0, 3.0]].into_dyn().into();
//! let weight = array![[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]];
//! let dy = array![[[10.0], [1.0]]]; // [outer, units, inner]
//!
//! let y = linear.apply(&x, &[weight.view()]).remove(0); // [[-2, 4]]
//! let dx = linear.adjoint_input(&x, &[(dy.view(), weight.view())]).unwrap();
//! let dweight = linear.adjoint_weight(&x, dy.view());
//! assert_eq!(dx, array![[12.0, 1.0, -10.0]].into_dyn()); // dy W
//! assert_eq!(dweight, array![[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]]); // dy^T x
//! assert_eq!((&dy * &y).sum(), -16.0);
//! assert_eq!((&dx * &x).sum(), -16.0);
//! assert_eq!((&dweight * &weight).sum(), -16.0);
//! # Ok::<(), woracle::Error>(())
//! ```

mod channels;
mod conv;
mod embedding;
mod linear;
mod shifts;
mod tiles;
mod unfold;

pub(crate) use channels::{
    Contracted, PARALLEL_ELEMENTS, channel_products, channel_square_products, channel_sums, contract, for_each,
    mix_adjoint_input, mix_adjoint_weight, mix_into, scale_and_mix_into, scale_into,
};
pub use conv::{Conv, Conv1d, Conv2d, Conv3d, ConvSettings, Extents, Padding, PaddingWord};
pub use embedding::{Embedding, EmbeddingSettings, Ids};
pub use linear::{Linear, LinearSettings};
pub use unfold::PaddingMode;

use crate::{Result, Scalar};
use ndarray::{
    Array, Array2, Array3, ArrayBase, ArrayD, ArrayView2, ArrayView3, ArrayViewD, ArrayViewMut2, ArrayViewMut3,
    ArrayViewMutD, Axis, Data, Dimension, Slice,
};

/// What an operator is applied to: floating-point values, or ids.
///
/// ```
/// use ndarray::{ArrayD, CowArray, IxDyn, array};
/// use woracle::operators::{Ids, Input};
/// let ids: Ids = Input::<f64>::from_ids(array![2, 0].into_dyn()).unwrap();
/// assert_eq!(Input::<f64>::ids(&ids).unwrap(), array![2, 0].into_dyn());
/// assert!(Input::<f64>::values(&ids).is_none()); // so they have no gradient
/// let values = array![1.0, 2.0].into_dyn();
/// assert!(<Ids as Input<f64>>::from_values(values.clone()).is_none());
/// let x: CowArray<'_, f64, IxDyn> = Input::from_values(values).unwrap(); // what linear and convolutions take
/// assert_eq!(Input::<f64>::shape(&x), [2]);
/// ```
pub trait Input<T>: Clone + Send + Sync {
    /// The values, in the shape of the input; `None` for ids, which have no gradient and take no mask.
    fn values(&self) -> Option<ArrayViewD<'_, T>>;
    /// The values themselves; `None` where they are lent, and for ids.
    fn into_values(self) -> Option<ArrayD<T>> {
        None
    }
    /// The ids, in the shape of the input; `None` for values.
    fn ids(&self) -> Option<ArrayViewD<'_, i64>> {
        None
    }
    /// An input that holds these values, in this shape; `None` where only ids will do.
    fn from_values(values: ArrayD<T>) -> Option<Self>;
    /// An input that holds these ids, in this shape; `None` where only values will do.
    fn from_ids(_ids: ArrayD<i64>) -> Option<Self> {
        None
    }
    /// The shape, as the caller gave it.
    fn shape(&self) -> &[usize];
}

/// A map that is linear in its input and in its weight. SPEC.md, E1.
#[doc = include_str!("../../docs/operator.md")]
///
/// Maps and adjoints take for granted what [`Operator::output_shape`] checks, and panic where it would refuse the input
/// or where weights and cotangents do not fit. What is written for any operator needs to be written once:
///
/// ```
/// use ndarray::Array2;
/// use woracle::operators::{Conv2d, ConvSettings, Linear, LinearSettings, Operator};
/// /// How many numbers of rank r are learned beside a weight of this shape.
/// fn lora_parameters<O: Operator>(settings: O::Settings, weight: &[usize], rank: usize) -> woracle::Result<usize> {
///     let shapes = O::from_weight_shape(settings, weight)?.lora_shapes(rank);
///     Ok(shapes.iter().map(|shape| shape.iter().product::<usize>()).sum())
/// }
/// assert_eq!(lora_parameters::<Linear>(LinearSettings::default(), &[6, 7], 2)?, 2 * 7 + 6 * 2);
/// assert_eq!(lora_parameters::<Conv2d>(ConvSettings::default(), &[6, 7, 3, 3], 2)?, 2 * 7 * 9 + 6 * 2);
///
/// // Whatever the shape in which a weight is stored, it is seen as [units, fan_in].
/// let conv = Conv2d::from_weight_shape(ConvSettings::default(), &[6, 7, 3, 3])?;
/// let stored = conv.stored_weight(Array2::<f64>::zeros((conv.units(), conv.fan_in())));
/// assert_eq!((conv.weight_matrix(stored.view()).dim(), stored.shape()), ((6, 63), &[6, 7, 3, 3][..]));
/// assert_eq!(conv.unit_axis(4), 1); // of y [batch, out, height, width]
/// # Ok::<(), woracle::Error>(())
/// ```
pub trait Operator: Clone + std::fmt::Debug + Send + Sync + 'static {
    /// What it is applied to. The lifetime lets a caller lend the values instead of copying them.
    type Input<'x, T: Scalar>: Input<T>;

    /// What a case file says of it beside the shapes of its tensors.
    type Settings: serde::de::DeserializeOwned;

    /// What the low-rank pair is called in PEFT's files.
    const LORA_NAMES: [&'static str; 2];
    /// Whether a fresh pair has A zero and B random, instead of A random and B zero.
    const LORA_A_STARTS_AT_ZERO: bool = false;
    /// Why the columns of the weight are not features of the input, where they are not: a setting that
    /// acts on input columns is refused with this reason.
    const COLUMNS_ARE_NOT_FEATURES: Option<&'static str>;

    /// The operator with these settings and a weight stored in this shape.
    ///
    /// # Errors
    ///
    /// A shape or a setting that no such operator has (C1, C4).
    fn from_weight_shape(settings: Self::Settings, weight: &[usize]) -> Result<Self>;
    /// The number of output units: rows of the weight matrix.
    fn units(&self) -> usize;
    /// The number of weights a unit has: columns of the weight matrix.
    fn fan_in(&self) -> usize;
    /// The number of groups: unit i combines only the ranks of its own group.
    fn groups(&self) -> usize {
        1
    }
    /// The shape in which the weight is stored.
    fn weight_shape(&self) -> Vec<usize>;
    /// The shapes in which the low-rank pair of this rank is stored: A, then B.
    fn lora_shapes(&self, rank: usize) -> [Vec<usize>; 2];
    /// Why this shape of A, which is not that of [`Operator::lora_shapes`], is recognised and refused.
    fn foreign_lora_a(&self, _shape: &[usize]) -> Option<String> {
        None
    }
    /// A stored weight seen as `[units, fan_in]`. The stored array is in standard layout.
    fn weight_matrix<'w, E>(&self, weight: ArrayViewD<'w, E>) -> ArrayView2<'w, E>;
    /// The matrix `[units, fan_in]` in the shape in which a weight is stored.
    fn stored_weight<E: Clone>(&self, matrix: Array2<E>) -> ArrayD<E>;

    /// The same input, lent instead of copied.
    fn lend<'a, T: Scalar>(x: &'a Self::Input<'_, T>) -> Self::Input<'a, T>;
    /// Which axis of an output with this many axes runs over the units.
    fn unit_axis(&self, output_ndim: usize) -> usize {
        output_ndim - 1
    }
    /// The output's shape, or what is wrong with the input's.
    ///
    /// # Errors
    ///
    /// If the operator cannot be applied to an input of this shape (C1), to one of these ids (C9), or has no output for
    /// it (C10).
    fn output_shape<T: Scalar>(&self, x: &Self::Input<'_, T>) -> Result<Vec<usize>>;
    /// How many outer and inner positions an output has.
    fn places<T: Scalar>(&self, x: &Self::Input<'_, T>) -> [usize; 2];
    /// `op(x, W)` for several weights `[units, fan_in]` in one walk over `x`, each into `[outer, units, inner]` in
    /// standard layout, whatever it holds.
    ///
    /// ```
    /// use ndarray::{Array3, array};
    /// use woracle::operators::{Linear, Operator};
    /// let linear = Linear { in_features: 2, out_features: 1, fan_in_fan_out: false };
    /// let x = array![[3.0, 4.0]].into_dyn().into();
    /// let (weight, factor) = (array![[1.0, 1.0]], array![[1.0, 0.0], [0.0, 1.0]]); // W0, A
    /// let [outer, inner] = linear.places(&x);
    /// let (mut p, mut u) = (Array3::zeros((outer, 1, inner)), Array3::from_elem((outer, 2, inner), f64::NAN));
    /// linear.apply_into(&x, &[weight.view(), factor.view()], vec![p.view_mut(), u.view_mut()]);
    /// assert_eq!((p, u), (array![[[7.0]]], array![[[3.0], [4.0]]])); // both in one walk, over whatever was there
    /// ```
    fn apply_into<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        weights: &[ArrayView2<'_, T>],
        outputs: Vec<ArrayViewMut3<'_, T>>,
    );
    /// The adjoint of `x -> op(x, W)`, summed over the pairs of dy `[outer, units, inner]` and W `[units, fan_in]`,
    /// into dx in the shape of `x` and in standard layout, whatever it holds. Ids have none: nothing is done.
    fn adjoint_input_into<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        pairs: &[(ArrayView3<'_, T>, ArrayView2<'_, T>)],
        dx: ArrayViewMutD<'_, T>,
    );
    /// The adjoint of `W -> op(x, W)` at dy `[outer, rows, inner]`, into dW `[rows, fan_in]`, whatever it holds.
    fn adjoint_weight_into<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        dy: ArrayView3<'_, T>,
        dweight: ArrayViewMut2<'_, T>,
    );

    /// [`Operator::apply_into`] fresh arrays.
    fn apply<T: Scalar>(&self, x: &Self::Input<'_, T>, weights: &[ArrayView2<'_, T>]) -> Vec<Array3<T>> {
        let [outer, inner] = self.places(x);
        let zeros = |weight: &ArrayView2<'_, T>| Array3::zeros((outer, weight.nrows(), inner));
        let mut outputs: Vec<_> = weights.iter().map(zeros).collect();
        self.apply_into(x, weights, outputs.iter_mut().map(|output| output.view_mut()).collect());
        outputs
    }
    /// [`Operator::adjoint_input_into`] a fresh array; `None` for ids.
    fn adjoint_input<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        pairs: &[(ArrayView3<'_, T>, ArrayView2<'_, T>)],
    ) -> Option<ArrayD<T>> {
        x.values()?;
        let mut dx = ArrayD::zeros(x.shape());
        self.adjoint_input_into(x, pairs, dx.view_mut());
        Some(dx)
    }

    /// What [`Operator::adjoint_input_into`] puts into dx, added to what it holds.
    ///
    /// ```
    /// use ndarray::array;
    /// use woracle::operators::{Linear, Operator};
    /// let linear = Linear { in_features: 2, out_features: 1, fan_in_fan_out: false };
    /// let (x, dy, weight) = (array![[3.0, 4.0]].into_dyn().into(), array![[[2.0]]], array![[1.0, 5.0]]);
    /// let mut dx = array![[100.0, 200.0]].into_dyn();
    /// linear.add_adjoint_input(&x, &[(dy.view(), weight.view())], dx.view_mut());
    /// assert_eq!(dx, array![[102.0, 210.0]].into_dyn());
    /// ```
    fn add_adjoint_input<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        pairs: &[(ArrayView3<'_, T>, ArrayView2<'_, T>)],
        mut dx: ArrayViewMutD<'_, T>,
    ) {
        if let Some(more) = self.adjoint_input(x, pairs) {
            dx += &more;
        }
    }

    /// [`Operator::adjoint_weight_into`] a fresh array.
    fn adjoint_weight<T: Scalar>(&self, x: &Self::Input<'_, T>, dy: ArrayView3<'_, T>) -> Array2<T> {
        let mut dweight = Array2::zeros((dy.len_of(Axis(1)), self.fan_in()));
        self.adjoint_weight_into(x, dy, dweight.view_mut());
        dweight
    }

    /// The definition: how much of its gradient reaches each column of a weight that the operator is applied to,
    /// `[fan_in]`; `None` where all of it does. [`Operator::adjoint_weight`] has it in, and works it out by itself.
    fn gradient_fraction<T: Scalar>(&self, _x: &Self::Input<'_, T>) -> Option<Vec<f64>> {
        None
    }

    /// The same operator with every factor of its terms raised to this power, and with nothing of its gradient held
    /// back: applied to squares, the second one sums squares of terms.
    fn power(&self, _exponent: i32) -> Self {
        self.clone()
    }

    /// The same operator with only so many units: `op(x, W)` for some rows of W, into outputs of any strides. `None` where
    /// units are not independent of each other, or where it is not worth it.
    fn of_units(&self, _units: usize) -> Option<Self> {
        None
    }

    /// The definition: every term `y[output] += factor * W[unit, column] * x[input]`, in a fixed order.
    ///
    /// `output` and `input` count the elements of y `[outer, units, inner]` and x in row-major order.
    fn terms<T: Scalar>(&self, x: &Self::Input<'_, T>, visit: impl FnMut(Term));
}

/// The same array in row-major order, copied only where it is in another.
pub(crate) fn in_standard_layout<E: Clone, S: Data<Elem = E>, D: Dimension>(array: ArrayBase<S, D>) -> ArrayBase<S, D>
where
    Array<E, D>: Into<ArrayBase<S, D>>,
{
    if array.is_standard_layout() { array } else { array.as_standard_layout().into_owned().into() }
}

/// The part of an axis of this length that belongs to group q.
pub(crate) fn group_slice(q: usize, groups: usize, length: usize) -> Slice {
    Slice::from(q * (length / groups)..(q + 1) * (length / groups))
}

/// One term of the definition of an operator: `y[output] += factor * W[unit, column] * x[input]`.
///
/// ```
/// use ndarray::array;
/// use woracle::operators::{Linear, Operator, Term};
/// let linear = Linear { in_features: 2, out_features: 1, fan_in_fan_out: false };
/// let mut terms = Vec::new();
/// linear.terms::<f64>(&array![[7.0, 8.0]].into_dyn().into(), |term| terms.push(term));
/// // y[0] = W[0, 0] x[0] + W[0, 1] x[1]
/// let term = |column| Term { output: 0, unit: 0, column, input: Some(column), factor: 1.0 };
/// assert_eq!(terms, [term(0), term(1)]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Term {
    /// Row-major index into y `[outer, units, inner]`.
    pub output: usize,
    /// Row of the weight matrix.
    pub unit: usize,
    /// Column of the weight matrix.
    pub column: usize,
    /// Row-major index into x; `None` where the term has no input value but 1.
    pub input: Option<usize>,
    /// A fixed number.
    pub factor: f64,
}
