//! Convolution in one, two or three dimensions: `y[n, u, p] = sum_ck W[u, c k] x[n, c, source(p, k)]`.
//! SPEC.md, section 3.4.

use super::unfold::{Geometry, PaddingMode, Windows};
use super::{Operator, Term, in_standard_layout};
use crate::{Error, Result, Scalar};
use ndarray::{
    Array2, ArrayD, ArrayView2, ArrayView3, ArrayViewD, ArrayViewMut2, ArrayViewMut3, ArrayViewMutD, CowArray, Ix3,
    IxDyn,
};
use serde::{Deserialize, Serialize};

/// PyTorch's `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` without their bias: x `[batch, in, size...]` or
/// `[in, size...]`, y `[batch, out, size...]` or `[out, size...]`.
#[doc = include_str!("../../docs/conv.md")]
///
/// ```
/// use ndarray::{Array, array};
/// use woracle::operators::{Conv2d, Conv3d, ConvSettings, Operator};
/// let settings = ConvSettings::default();
/// let conv = Conv2d::from_weight_shape(settings.clone(), &[1, 1, 2, 2])?; // [out, in / groups, height, width]
/// assert_eq!((conv.units(), conv.fan_in(), conv.kernel_size), (1, 4, [2, 2]));
/// let image = array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]];
/// let x = image.into_shape_with_order((1, 1, 2, 3)).unwrap().into_dyn(); // [batch, in, height, width]
/// let y = conv.apply(&x.into(), &[array![[1.0, 0.0, 0.0, 1.0]].view()]).remove(0); // the diagonal of each window
/// assert_eq!(y, array![[[6.0, 8.0]]]); // [outer, units, inner]: 1 x 2 pixels
/// let volumes = Conv3d::from_weight_shape(settings, &[8, 4, 3, 3, 3])?;
/// let x = Array::<f64, _>::zeros((2, 4, 5, 6, 7)).into_dyn().into();
/// assert_eq!(volumes.output_shape(&x)?, [2, 8, 3, 4, 5]);
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Conv<const N: usize> {
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// The kernel's extent along each axis.
    pub kernel_size: [usize; N],
    /// The step of the output along each axis: 1 or more.
    pub stride: [usize; N],
    /// Padding before and after along each axis, in elements of the input.
    pub padding: [(usize, usize); N],
    /// The step within the kernel along each axis: 1 or more.
    pub dilation: [usize; N],
    /// Output channels of group q see the input channels of group q only: a divisor of both, and of the rank (C3).
    pub groups: usize,
    /// How the padding is filled.
    pub padding_mode: PaddingMode,
}

/// Convolution along one axis.
///
/// ```
/// use ndarray::{Array, array};
/// use woracle::operators::{Conv1d, ConvSettings, Operator};
/// let settings: ConvSettings = serde_json::from_str(r#"{"stride": 2, "padding": 1}"#).unwrap();
/// let conv = Conv1d::from_weight_shape(settings, &[1, 1, 3])?; // [out, in / groups, kernel]
/// let x = array![[[1.0, 2.0, 3.0, 4.0]]].into_dyn(); // [batch, in, size]
/// let weight = array![[1.0, 10.0, 100.0]]; // [units, fan_in]
/// let y = conv.apply(&x.into(), &[weight.view()]); // one [1, 1, 2]
/// assert_eq!(y[0].iter().copied().collect::<Vec<_>>(), [210.0, 432.0]);
/// # Ok::<(), woracle::Error>(())
/// ```
pub type Conv1d = Conv<1>;
/// Convolution along two axes.
pub type Conv2d = Conv<2>;
/// Convolution along three axes.
pub type Conv3d = Conv<3>;

/// One number for every axis, or one an axis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "neither a number from 0 nor one an axis")]
pub enum Extents {
    /// The same along every axis.
    All(usize),
    /// One an axis.
    Each(Vec<usize>),
}

/// What is put around the input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "neither a number from 0, nor one an axis, nor \"same\" or \"valid\"")]
pub enum Padding {
    /// As much before as after.
    Numbers(Extents),
    /// `"same"` or `"valid"`.
    Word(PaddingWord),
}

/// PyTorch's words for padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PaddingWord {
    /// So much that the output is as large as the input; the odd one goes after.
    Same,
    /// None.
    Valid,
}

/// What a case file says of a convolution beside the shapes of its tensors.
///
/// PyTorch's words, and its defaults where nothing is said:
///
/// ```
/// use ndarray::Array;
/// use woracle::operators::{Conv2d, ConvSettings, Extents, Operator, Padding, PaddingMode, PaddingWord};
/// let settings: ConvSettings =
///     serde_json::from_str(r#"{"padding": "same", "padding_mode": "reflect", "dilation": [1, 2]}"#).unwrap();
/// assert_eq!(settings.padding, Padding::Word(PaddingWord::Same));
/// assert_eq!(settings.dilation, Extents::Each(vec![1, 2])); // one an axis
/// assert_eq!(settings.stride, Extents::All(1)); // the same along every axis
/// assert_eq!(settings.padding_mode, PaddingMode::Reflect);
/// let conv = Conv2d::from_weight_shape(settings, &[1, 1, 3, 2])?;
/// assert_eq!(conv.padding, [(1, 1), (1, 1)]); // D (K - 1) elements, half of them before
/// let x = Array::<f64, _>::zeros((1, 1, 5, 5)).into_dyn().into();
/// assert_eq!(conv.output_shape(&x)?, [1, 1, 5, 5]); // the same
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConvSettings {
    /// The step of the output.
    pub stride: Extents,
    /// What is put around the input.
    pub padding: Padding,
    /// The step within the kernel.
    pub dilation: Extents,
    /// The number of groups.
    pub groups: usize,
    /// How the padding is filled.
    pub padding_mode: PaddingMode,
}

impl Default for ConvSettings {
    fn default() -> Self {
        let padding = Padding::Numbers(Extents::All(0));
        Self {
            stride: Extents::All(1),
            padding,
            dilation: Extents::All(1),
            groups: 1,
            padding_mode: PaddingMode::Zeros,
        }
    }
}

impl Extents {
    pub(crate) fn each<const N: usize>(&self, name: &'static str, least: usize) -> Result<[usize; N]> {
        let each = match self {
            Self::All(value) => [*value; N],
            Self::Each(values) => {
                values.as_slice().try_into().map_err(|_| setting(name, format!("{N} numbers"), values))?
            }
        };
        if each.iter().any(|&value| value < least) {
            return Err(setting(name, format!("numbers of {least} or more"), &each)); // C4
        }
        // Beyond this the arithmetic of positions could overflow, and no input is that large.
        if each.iter().any(|&value| value > u32::MAX as usize) {
            return Err(setting(name, format!("numbers up to {}", u32::MAX), &each)); // C4
        }
        Ok(each)
    }
}

fn setting(name: &'static str, expected: String, found: &dyn std::fmt::Debug) -> Error {
    Error::Setting { name, expected, found: format!("{found:?}") }
}

/// `[batch, in, size...]` as `[batch, in, inputs]`.
type Images<'a, T> = CowArray<'a, T, Ix3>;

impl<const N: usize> Conv<N> {
    /// The axes of an input of this size, or what is wrong with it.
    fn axes(&self, size: &[usize]) -> Result<[Geometry; N]> {
        let axes = std::array::from_fn(|axis| Geometry {
            size: size[axis],
            kernel: self.kernel_size[axis],
            stride: self.stride[axis],
            dilation: self.dilation[axis],
            before: self.padding[axis].0,
            after: self.padding[axis].1,
            mode: self.padding_mode,
        });
        for (axis, Geometry { size, before, after, .. }) in axes.iter().enumerate() {
            let widest = before.max(after);
            let (limit, expected) = match self.padding_mode {
                PaddingMode::Zeros => (usize::MAX, ""),
                PaddingMode::Reflect => (size.saturating_sub(1), "less than"),
                PaddingMode::Replicate => (if *size == 0 { 0 } else { usize::MAX }, "0 beside"),
                PaddingMode::Circular => (*size, "at most"),
            };
            if *widest > limit {
                let expected =
                    format!("{:?} padding {expected} the input's size {size} along axis {axis}", self.padding_mode);
                return Err(setting("padding", expected.to_lowercase(), widest)); // C10
            }
        }
        if let Some(axis) = axes.iter().position(|axis| axis.output() == 0) {
            let Geometry { size, kernel, dilation, before, after, .. } = axes[axis];
            let expected = format!(
                "a size along axis {axis} of at least {} for kernel {kernel} with dilation {dilation} and padding {before} + {after}",
                (dilation * (kernel - 1) + 1).saturating_sub(before + after),
            );
            return Err(Error::Shape { tensor: "x".into(), expected, found: vec![size] }); // C10
        }
        Ok(axes)
    }

    /// The windows of an input that `output_shape` has accepted.
    fn windows(&self, shape: &[usize]) -> Windows<N> {
        Windows::new(self.axes(&shape[shape.len() - N..]).expect("an input checked by output_shape"))
    }

    /// The number of images: 1 where there is no batch.
    fn batch<T>(x: &CowArray<'_, T, IxDyn>) -> usize {
        if x.ndim() == N + 2 { x.shape()[0] } else { 1 }
    }

    fn images<'a, T: Scalar>(&self, x: &'a CowArray<'_, T, IxDyn>) -> Images<'a, T> {
        let batch = Self::batch(x);
        let inputs: usize = x.shape()[x.ndim() - N..].iter().product();
        let images = x.to_shape((batch, self.in_channels, inputs)).expect("an input checked by output_shape");
        if images.is_standard_layout() { images } else { images.as_standard_layout().into_owned().into() }
    }
}

impl<const N: usize> Operator for Conv<N> {
    type Input<'x, T: Scalar> = CowArray<'x, T, IxDyn>;
    type Settings = ConvSettings;

    const LORA_NAMES: [&'static str; 2] = ["lora_A", "lora_B"];
    const COLUMNS_ARE_NOT_FEATURES: Option<&'static str> =
        Some("a column of a convolution's weight meets many elements of the input");

    fn from_weight_shape(settings: ConvSettings, weight: &[usize]) -> Result<Self> {
        let ConvSettings { stride, padding, dilation, groups, padding_mode } = settings;
        if weight.len() != N + 2 || weight.contains(&0) {
            let expected = format!("[out, in / groups, {}], none 0", ["kernel"; N].join(", "));
            return Err(Error::Shape { tensor: "base.weight".into(), expected, found: weight.to_vec() }); // C1
        }
        let kernel_size: [usize; N] = std::array::from_fn(|axis| weight[axis + 2]);
        if groups == 0 || !weight[0].is_multiple_of(groups) {
            return Err(setting("groups", format!("a divisor of the {} output channels", weight[0]), &groups)); // C4
        }
        let (stride, dilation) = (stride.each("stride", 1)?, dilation.each::<N>("dilation", 1)?);
        let padding = match padding {
            Padding::Numbers(numbers) => numbers.each::<N>("padding", 0)?.map(|padding| (padding, padding)),
            Padding::Word(PaddingWord::Valid) => [(0, 0); N],
            Padding::Word(PaddingWord::Same) => {
                if stride != [1; N] {
                    return Err(setting("padding", "numbers, as \"same\" needs stride 1".into(), &"same")); // C4
                }
                std::array::from_fn(|axis| {
                    let total = dilation[axis] * (kernel_size[axis] - 1);
                    (total / 2, total - total / 2)
                })
            }
        };
        let (in_channels, out_channels) = (weight[1] * groups, weight[0]);
        Ok(Self { in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode })
    }

    fn units(&self) -> usize {
        self.out_channels
    }
    fn fan_in(&self) -> usize {
        self.in_channels / self.groups * self.kernel_size.iter().product::<usize>()
    }
    fn groups(&self) -> usize {
        self.groups
    }
    fn weight_shape(&self) -> Vec<usize> {
        [self.out_channels, self.in_channels / self.groups].into_iter().chain(self.kernel_size).collect()
    }
    fn lora_shapes(&self, rank: usize) -> [Vec<usize>; 2] {
        let a = [rank, self.in_channels / self.groups].into_iter().chain(self.kernel_size).collect();
        let b = [self.out_channels, rank / self.groups].into_iter().chain([1; N]).collect();
        [a, b]
    }
    fn foreign_lora_a(&self, shape: &[usize]) -> Option<String> {
        let theirs: Vec<usize> = [self.in_channels].into_iter().chain(self.kernel_size).collect();
        (self.groups > 1 && shape.get(1..) == Some(&theirs)).then(|| {
            format!(
                "expected shape [rank, {}, kernel...], found {shape:?}: PEFT's layout for groups, in which A sees every input channel, \
                 so that B A has not the shape of the weight and cannot be merged",
                self.in_channels / self.groups
            )
        })
    }
    fn weight_matrix<'w, E>(&self, weight: ArrayViewD<'w, E>) -> ArrayView2<'w, E> {
        let (units, fan_in) = (self.out_channels, self.fan_in());
        weight.into_shape_with_order((units, fan_in)).expect("a weight checked by its shape")
    }
    fn stored_weight<E: Clone>(&self, matrix: Array2<E>) -> ArrayD<E> {
        in_standard_layout(matrix).into_shape_with_order(self.weight_shape()).expect("as many as the weight has")
    }
    fn unit_axis(&self, output_ndim: usize) -> usize {
        output_ndim - 1 - N
    }

    fn lend<'a, T: Scalar>(x: &'a Self::Input<'_, T>) -> Self::Input<'a, T> {
        x.view().into()
    }
    fn output_shape<T: Scalar>(&self, x: &Self::Input<'_, T>) -> Result<Vec<usize>> {
        let mut shape = x.shape().to_vec();
        let channels = shape.len().checked_sub(N + 1).filter(|&axis| axis <= 1);
        let Some(channels) = channels.filter(|&axis| shape[axis] == self.in_channels) else {
            let expected = format!("[batch, {}, {}] or without the batch", self.in_channels, ["size"; N].join(", "));
            return Err(Error::Shape { tensor: "x".into(), expected, found: shape }); // C1
        };
        let axes = self.axes(&shape[channels + 1..])?;
        shape[channels] = self.out_channels;
        for (size, axis) in shape[channels + 1..].iter_mut().zip(axes) {
            *size = axis.output(); // E42
        }
        // Padding alone can ask for more numbers than have an address.
        let bytes = shape.iter().try_fold(size_of::<T>(), |bytes, &length| bytes.checked_mul(length));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
            let expected = "so little that y can be held in memory".into();
            return Err(Error::Setting { name: "padding", expected, found: format!("a y of shape {shape:?}") }); // C4
        }
        Ok(shape)
    }

    fn places<T: Scalar>(&self, x: &Self::Input<'_, T>) -> [usize; 2] {
        let axes = self.axes(&x.shape()[x.ndim() - N..]).expect("an input checked by output_shape");
        [Self::batch(x), axes.iter().map(|axis| axis.output()).product()]
    }

    fn apply_into<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        weights: &[ArrayView2<'_, T>],
        outputs: Vec<ArrayViewMut3<'_, T>>,
    ) {
        self.outputs(&self.windows(x.shape()), self.images(x).view(), weights, outputs); // E46
    }

    fn adjoint_input_into<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        pairs: &[(ArrayView3<'_, T>, ArrayView2<'_, T>)],
        dx: ArrayViewMutD<'_, T>,
    ) {
        let windows = self.windows(x.shape());
        let shape = (Self::batch(x), self.in_channels, windows.inputs());
        let dx = dx.into_shape_with_order(shape).expect("as many elements as x");
        self.inputs(&windows, pairs, dx); // E47
    }

    fn adjoint_weight_into<T: Scalar>(
        &self,
        x: &Self::Input<'_, T>,
        dy: ArrayView3<'_, T>,
        mut dweight: ArrayViewMut2<'_, T>,
    ) {
        dweight.assign(&self.weights(&self.windows(x.shape()), self.images(x).view(), dy)); // E48
    }

    fn terms<T: Scalar>(&self, x: &Self::Input<'_, T>, mut visit: impl FnMut(Term)) {
        let windows = self.windows(x.shape());
        let (positions, inputs) = (windows.positions(), windows.inputs());
        let per_group = (self.in_channels / self.groups, self.out_channels / self.groups);
        for image in 0..Self::batch(x) {
            for unit in 0..self.out_channels {
                let (output, group) = ((image * self.out_channels + unit) * positions, unit / per_group.1);
                for channel in 0..per_group.0 {
                    let input = (image * self.in_channels + group * per_group.0 + channel) * inputs;
                    for k in 0..windows.kernel {
                        let column = channel * windows.kernel + k;
                        windows.pairs(k, |p, i| {
                            visit(Term { output: output + p, unit, column, input: Some(input + i), factor: 1.0 }); // E46
                        });
                    }
                }
            }
        }
    }
}
