//! Linear: `y[n, u] = sum_j W[u, j] x[n, j]`. SPEC.md, section 3.1.

use super::{Input, Operator, Term, in_standard_layout};
use crate::matmul::{Accumulate, product_into};
use crate::{Error, Result, Scalar};
use ndarray::{
    Array2, ArrayD, ArrayView2, ArrayView3, ArrayViewD, ArrayViewMut2, ArrayViewMut3, ArrayViewMutD, Axis, CowArray,
    Ix2, IxDyn,
};
use serde::{Deserialize, Serialize};

/// PyTorch's `nn.Linear` without its bias: x `[..., in_features]`, y `[..., out_features]`.
#[doc = include_str!("../../docs/linear.md")]
///
/// ```
/// use ndarray::array;
/// use woracle::operators::{Linear, Operator};
/// let linear = Linear { in_features: 3, out_features: 2, fan_in_fan_out: false };
/// let x = array![[1.0, 2.0, 3.0]].into_dyn(); // [1, 3]
/// let weight = array![[1.0, 0.0, -1.0], [2.0, 1.0, 0.0]]; // [2, 3]
/// let y = linear.apply(&x.into(), &[weight.view()]); // one [1, 2, 1]
/// assert_eq!(y[0].iter().copied().collect::<Vec<_>>(), [-2.0, 4.0]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Columns of the weight.
    pub in_features: usize,
    /// Rows of the weight.
    pub out_features: usize,
    /// The weight is stored `[in_features, out_features]`, as GPT-2's `Conv1D` does.
    pub fan_in_fan_out: bool,
}

/// What a case file says of a linear layer beside the shapes of its tensors.
///
/// ```
/// use woracle::operators::{Linear, LinearSettings, Operator};
/// let conv1d_of_gpt2 = Linear::from_weight_shape(LinearSettings { fan_in_fan_out: true }, &[3, 2])?;
/// assert_eq!((conv1d_of_gpt2.in_features, conv1d_of_gpt2.out_features), (3, 2));
/// assert_eq!(conv1d_of_gpt2.lora_shapes(1), [[1, 3], [2, 1]]); // A and B are as ever
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinearSettings {
    /// The weight is stored `[in_features, out_features]`.
    #[serde(default)]
    pub fan_in_fan_out: bool,
}

impl<T: Scalar> Input<T> for CowArray<'_, T, IxDyn> {
    fn values(&self) -> Option<ArrayViewD<'_, T>> {
        Some(self.view())
    }
    fn into_values(self) -> Option<ArrayD<T>> {
        self.is_owned().then(|| self.into_owned())
    }
    fn from_values(values: ArrayD<T>) -> Option<Self> {
        Some(values.into())
    }
    fn shape(&self) -> &[usize] {
        self.shape()
    }
}

impl Linear {
    /// `[..., in_features]` as `[rows, in_features]`.
    fn rows<'a, T: Scalar>(&self, x: &'a CowArray<'_, T, IxDyn>) -> CowArray<'a, T, Ix2> {
        let rows = x.len() / self.in_features;
        x.to_shape((rows, self.in_features)).expect("an input checked by output_shape")
    }

    /// The same of dx.
    fn dx_rows<'a, T: Scalar>(&self, dx: ArrayViewMutD<'a, T>) -> ArrayViewMut2<'a, T> {
        let rows = dx.len() / self.in_features;
        dx.into_shape_with_order((rows, self.in_features)).expect("as many elements as x")
    }
}

impl Operator for Linear {
    type Input<'x, T: Scalar> = CowArray<'x, T, IxDyn>;

    type Settings = LinearSettings;

    const LORA_NAMES: [&'static str; 2] = ["lora_A", "lora_B"];
    const COLUMNS_ARE_NOT_FEATURES: Option<&'static str> = None;

    fn from_weight_shape(settings: LinearSettings, weight: &[usize]) -> Result<Self> {
        let LinearSettings { fan_in_fan_out } = settings;
        match *weight {
            [a, b] if a > 0 && b > 0 => {
                let (out_features, in_features) = if fan_in_fan_out { (b, a) } else { (a, b) };
                Ok(Self { in_features, out_features, fan_in_fan_out })
            }
            _ => {
                let expected = if fan_in_fan_out { "[in, out], neither 0" } else { "[out, in], neither 0" };
                Err(Error::Shape { tensor: "base.weight".into(), expected: expected.into(), found: weight.to_vec() }) // C1
            }
        }
    }
    fn units(&self) -> usize {
        self.out_features
    }
    fn fan_in(&self) -> usize {
        self.in_features
    }
    fn weight_shape(&self) -> Vec<usize> {
        if self.fan_in_fan_out {
            vec![self.in_features, self.out_features]
        } else {
            vec![self.out_features, self.in_features]
        }
    }
    fn lora_shapes(&self, rank: usize) -> [Vec<usize>; 2] {
        [vec![rank, self.in_features], vec![self.out_features, rank]]
    }
    fn weight_matrix<'w, E>(&self, weight: ArrayViewD<'w, E>) -> ArrayView2<'w, E> {
        let matrix = weight.into_dimensionality::<Ix2>().expect("a weight checked by its shape");
        if self.fan_in_fan_out { matrix.reversed_axes() } else { matrix }
    }
    fn stored_weight<E: Clone>(&self, matrix: Array2<E>) -> ArrayD<E> {
        let stored = if self.fan_in_fan_out { matrix.reversed_axes() } else { matrix };
        in_standard_layout(stored).into_dyn()
    }

    fn lend<'a, T: Scalar>(x: &'a Self::Input<'_, T>) -> Self::Input<'a, T> {
        x.view().into()
    }
    fn output_shape<T: Scalar>(&self, x: &Self::Input<'_, T>) -> Result<Vec<usize>> {
        let mut shape = x.shape().to_vec();
        match shape.last_mut() {
            Some(last) if *last == self.in_features => *last = self.out_features,
            _ => {
                let expected = format!("[..., {}]", self.in_features);
                return Err(Error::Shape { tensor: "x".into(), expected, found: shape }); // C1
            }
        }
        Ok(shape)
    }

    fn places<T: Scalar>(&self, x: &Self::Input<'_, T>) -> [usize; 2] {
        [x.len() / self.in_features, 1]
    }

    fn apply_into<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        weights: &[ArrayView2<'_, T>],
        outputs: Vec<ArrayViewMut3<'_, T>>,
    ) {
        let x = self.rows(x);
        for (weight, mut output) in weights.iter().zip(outputs) {
            let output = output.index_axis_mut(Axis(2), 0);
            product_into(T::one(), x.view(), weight.t(), Accumulate::Replace, output); // E2
        }
    }

    fn adjoint_input_into<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        pairs: &[(ArrayView3<'_, T>, ArrayView2<'_, T>)],
        mut dx: ArrayViewMutD<'_, T>,
    ) {
        let Some(((dy, weight), rest)) = pairs.split_first() else { return dx.fill(T::zero()) };
        let rows = self.dx_rows(dx.view_mut());
        product_into(T::one(), dy.index_axis(Axis(2), 0), *weight, Accumulate::Replace, rows); // E3
        self.add_adjoint_input(x, rest, dx);
    }

    fn add_adjoint_input<T: Scalar>(
        &self,
        _x: &Self::Input<'_, T>,
        pairs: &[(ArrayView3<'_, T>, ArrayView2<'_, T>)],
        dx: ArrayViewMutD<'_, T>,
    ) {
        let mut dx = self.dx_rows(dx);
        for (dy, weight) in pairs {
            product_into(T::one(), dy.index_axis(Axis(2), 0), *weight, Accumulate::Add, dx.view_mut()); // E3
        }
    }

    fn adjoint_weight_into<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        dy: ArrayView3<'_, T>,
        dweight: ArrayViewMut2<'_, T>,
    ) {
        product_into(T::one(), dy.index_axis(Axis(2), 0).t(), self.rows(x).view(), Accumulate::Replace, dweight); // E4
    }

    fn of_units(&self, units: usize) -> Option<Self> {
        Some(Self { out_features: units, ..self.clone() })
    }

    fn terms<T: Scalar>(&self, x: &Self::Input<'_, T>, mut visit: impl FnMut(Term)) {
        let (units, columns) = (self.out_features, self.in_features);
        for n in 0..x.len() / columns {
            for unit in 0..units {
                for column in 0..columns {
                    let (output, input) = (n * units + unit, Some(n * columns + column));
                    visit(Term { output, unit, column, input, factor: 1.0 }); // E2
                }
            }
        }
    }
}
