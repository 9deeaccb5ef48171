//! Pooling: the largest or the mean of every window of every channel. SPEC.md, section 13.2.

use super::{Back, Described, Find, Forward, Module, Pass, Signal, defined};
use crate::operators::{Extents, for_each, in_standard_layout};
use crate::{Error, Real, Result, Scalar};
use ndarray::ArrayD;
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};
use std::hint::select_unpredictable;

/// PyTorch's `nn.MaxPool1d` (N = 1) and `nn.MaxPool2d` (N = 2): x `[batch, channels, size...]`. Of equal ones the first
/// is the largest; a NaN is larger than any number, and of several the last is the largest.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{MaxPooling, Module, Pass, Signal};
/// use woracle::operators::Extents;
/// let pooling = MaxPooling::<2> { kernel_size: Extents::All(2), stride: None, padding: None, dilation: None };
/// let x = array![[[[1.0, 2.0, 5.0, 3.0], [4.0, 0.0, 5.0, 1.0]]]].into_dyn(); // [batch, channels, height, width]
/// let (y, backward) = pooling.forward(Signal::Values(x), &Pass::evaluation())?;
/// assert_eq!(y, array![[[[4.0, 5.0]]]].into_dyn());
/// let dx = backward(array![[[[10.0, 20.0]]]].into_dyn())?.x.unwrap();
/// assert_eq!(dx, array![[[[0.0, 0.0, 20.0, 0.0], [10.0, 0.0, 0.0, 0.0]]]].into_dyn()); // the first of two equal ones
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaxPooling<const N: usize> {
    /// Lengths of a window: one number for every axis, or one an axis.
    pub kernel_size: Extents,
    /// Steps between windows; the kernel's size where nothing is said.
    #[serde(default)]
    pub stride: Option<Extents>,
    /// Places around the input that are never the largest: at most half of the kernel.
    #[serde(default)]
    pub padding: Option<Extents>,
    /// Steps within a window.
    #[serde(default)]
    pub dilation: Option<Extents>,
}

/// PyTorch's `nn.AvgPool1d` (N = 1) and `nn.AvgPool2d` (N = 2): x `[batch, channels, size...]`. Padding counts as
/// zeros.
///
/// ```
/// use ndarray::array;
/// use woracle::modules::{AveragePooling, Module, Pass, Signal};
/// use woracle::operators::Extents;
/// let pooling = AveragePooling::<1> { kernel_size: Extents::All(2), stride: None, padding: Some(Extents::All(1)) };
/// let x = array![[[4.0, 6.0, 8.0, 2.0]]].into_dyn(); // [batch, channels, size]
/// let (y, _) = pooling.forward(Signal::Values(x), &Pass::evaluation())?;
/// assert_eq!(y, array![[[2.0, 7.0, 1.0]]].into_dyn()); // (0 + 4) / 2, ...
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AveragePooling<const N: usize> {
    /// Lengths of a window: one number for every axis, or one an axis.
    pub kernel_size: Extents,
    /// Steps between windows; the kernel's size where nothing is said.
    #[serde(default)]
    pub stride: Option<Extents>,
    /// Zeros around the input: at most half of the kernel.
    #[serde(default)]
    pub padding: Option<Extents>,
}

/// Windows along N axes.
#[derive(Clone, Copy)]
struct Window<const N: usize> {
    kernel: [usize; N],
    stride: [usize; N],
    padding: [usize; N],
    dilation: [usize; N],
}

/// Where the windows of one channel lie.
struct Places {
    /// The shape of y.
    output: Vec<usize>,
    /// Elements of a channel of x, and of y.
    inputs: usize,
    outputs: usize,
    /// For every place of a window, one after the other, what each output sees there in a channel of x; `PADDING` where
    /// that is none of it.
    sources: Vec<u32>,
}

/// Stands for a place outside the input.
const PADDING: u32 = u32::MAX;

impl Places {
    /// What all outputs see at one place of their windows after the other.
    fn taps(&self) -> impl Iterator<Item = &[u32]> {
        self.sources.chunks_exact(self.outputs)
    }

    /// What one output sees; padding is left out.
    fn of(&self, output: usize) -> impl Iterator<Item = usize> {
        let all = self.taps().map(move |tap| tap[output]);
        all.filter(|&source| source != PADDING).map(|source| source as usize)
    }

    /// The same with what an output has seen before, or sees first, in place of padding; `None` where an output sees
    /// nothing else.
    fn without_padding(mut self) -> Option<Self> {
        for output in 0..self.outputs {
            let mut seen = self.of(output).next()? as u32;
            for source in self.sources.iter_mut().skip(output).step_by(self.outputs) {
                seen = if *source == PADDING { seen } else { *source };
                *source = seen;
            }
        }
        Some(self)
    }
}

impl<const N: usize> Window<N> {
    fn new(
        kernel: &Extents,
        stride: Option<&Extents>,
        padding: Option<&Extents>,
        dilation: Option<&Extents>,
    ) -> Result<Self> {
        let kernel = kernel.each("kernel_size", 1)?;
        let or = |extents: Option<&Extents>, name, least, otherwise| {
            extents.map_or(Ok(otherwise), |extents| extents.each(name, least))
        };
        let padding = or(padding, "padding", 0, [0; N])?;
        if let Some((&padding, &kernel)) =
            padding.iter().zip(&kernel).find(|(padding, kernel)| **padding > **kernel / 2)
        {
            let expected = format!("at most half of kernel_size {kernel}");
            return Err(Error::Setting { name: "padding", expected, found: padding.to_string() }); // C4
        }
        Ok(Self {
            kernel,
            stride: or(stride, "stride", 1, kernel)?,
            padding,
            dilation: or(dilation, "dilation", 1, [1; N])?,
        })
    }

    /// E89
    fn places(&self, shape: &[usize]) -> Result<Places> {
        let misfit = |expected: String| Error::Shape { tensor: "x".into(), expected, found: shape.to_vec() };
        if shape.len() != N + 2 {
            return Err(misfit(format!("[batch, channels, {}]", ["size"; N].join(", ")))); // C1
        }
        let (sizes, mut extents) = (&shape[2..], [0; N]);
        for axis in 0..N {
            if sizes[axis] == 0 {
                return Err(misfit(format!("a size of at least 1 along axis {}", axis + 2))); // C1
            }
            let padded = sizes[axis] + 2 * self.padding[axis];
            let reach = self.dilation[axis].saturating_mul(self.kernel[axis] - 1).saturating_add(1);
            if reach > padded {
                return Err(misfit(format!("a size of at least {reach} with its padding along axis {}", axis + 2))); // C1
            }
            extents[axis] = (padded - reach) / self.stride[axis] + 1;
        }
        let (inputs, outputs): (usize, _) = (sizes.iter().product(), extents.iter().product());
        if inputs >= PADDING as usize {
            return Err(misfit(format!("fewer than {PADDING} elements a channel"))); // C1
        }
        let mut sources = Vec::new();
        for within in ndarray::indices(self.kernel.as_slice()) {
            for output in ndarray::indices(extents.as_slice()) {
                let place = (0..N).try_fold(0, |place, axis| {
                    let padded = output[axis] * self.stride[axis] + within[axis] * self.dilation[axis];
                    let inside = padded.checked_sub(self.padding[axis]).filter(|&inside| inside < sizes[axis])?;
                    Some(place * sizes[axis] + inside)
                });
                sources.push(place.map_or(PADDING, |place| place as u32));
            }
        }
        let output = shape[..2].iter().copied().chain(extents).collect();
        Ok(Places { output, inputs, outputs, sources })
    }

    /// The elements of a window.
    fn elements(&self) -> usize {
        self.kernel.iter().product()
    }
}

/// The elements of an array in standard layout.
fn slice<T: Scalar>(values: &ArrayD<T>) -> &[T] {
    values.as_slice().expect("standard layout")
}

fn slice_mut<T: Scalar>(values: &mut ArrayD<T>) -> &mut [T] {
    values.as_slice_mut().expect("standard layout")
}

impl<const N: usize> MaxPooling<N> {
    fn window(&self) -> Result<Window<N>> {
        Window::new(&self.kernel_size, self.stride.as_ref(), self.padding.as_ref(), self.dilation.as_ref())
    }
}

impl<T: Scalar, const N: usize> Module<T> for MaxPooling<N> {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = in_standard_layout(x.values()?);
        let Some(places) = self.window()?.places(x.shape())?.without_padding() else {
            let expected = "with more than padding in every window".into();
            return Err(Error::Shape { tensor: "x".into(), expected, found: x.shape().to_vec() }); // C1
        };
        let channels: usize = x.shape()[..2].iter().product();
        let (inputs, outputs) = (places.inputs, places.outputs);
        let mut y = pass.array(&places.output);
        let mut largest = vec![0_u32; channels * outputs];
        let of_channels = slice_mut(&mut y).chunks_exact_mut(outputs).zip(largest.chunks_exact_mut(outputs));
        for_each(x.len(), of_channels.zip(slice(&x).chunks_exact(inputs)), |((y, largest), x)| {
            let mut taps = places.taps();
            largest.copy_from_slice(taps.next().expect("a window"));
            for tap in taps {
                for (largest, &place) in largest.iter_mut().zip(tap) {
                    let (old, new) = (x[*largest as usize], x[place as usize]);
                    // A NaN is the largest, so that it is seen.
                    let beats = (new > old) | new.is_nan();
                    *largest = select_unpredictable(beats, place, *largest); // E90
                }
            }
            y.iter_mut().zip(largest).for_each(|(y, &mut place)| *y = x[place as usize]);
        });
        let shape = x.shape().to_vec();
        pass.recycle_input(x);
        let pass = pass.clone();
        Ok((
            y,
            Box::new(move |dy| {
                let dy = in_standard_layout(dy);
                assert_eq!(dy.len(), shape[..2].iter().product::<usize>() * outputs, "as many as y");
                let mut dx = pass.array(&shape);
                let elements = dx.len();
                let of_channels = slice_mut(&mut dx).chunks_exact_mut(inputs).zip(largest.chunks_exact(outputs));
                for_each(elements, of_channels.zip(slice(&dy).chunks_exact(outputs)), |((dx, largest), dy)| {
                    dx.fill(T::zero());
                    largest.iter().zip(dy).for_each(|(&place, &dy)| dx[place as usize] += dy); // E91
                });
                pass.recycle(dy);
                Ok(Back::of_input(dx))
            }),
        ))
    }
}

impl<T: Scalar, const N: usize> Module<T> for AveragePooling<N> {
    fn forward<'m>(&'m self, x: Signal<T>, pass: &Pass<'m, T>) -> Result<Forward<'m, T>> {
        let x = in_standard_layout(x.values()?);
        let window = self.window()?;
        let places = window.places(x.shape())?;
        let (inputs, outputs) = (places.inputs, places.outputs);
        let part = T::one() / T::from_f64(window.elements() as f64);
        let mut y = pass.array(&places.output);
        let of_channels = slice_mut(&mut y).chunks_exact_mut(outputs).zip(slice(&x).chunks_exact(inputs));
        for_each(x.len(), of_channels, |(y, x)| {
            for (output, y) in y.iter_mut().enumerate() {
                *y = places.of(output).fold(T::zero(), |sum, place| sum + x[place]) * part; // E92
            }
        });
        let shape = x.shape().to_vec();
        pass.recycle_input(x);
        let pass = pass.clone();
        Ok((
            y,
            Box::new(move |dy| {
                let dy = in_standard_layout(dy);
                assert_eq!(dy.len(), shape[..2].iter().product::<usize>() * outputs, "as many as y");
                let mut dx = pass.array(&shape);
                let elements = dx.len();
                let of_channels = slice_mut(&mut dx).chunks_exact_mut(inputs).zip(slice(&dy).chunks_exact(outputs));
                for_each(elements, of_channels, |(dx, dy)| {
                    dx.fill(T::zero());
                    for (output, &dy) in dy.iter().enumerate() {
                        places.of(output).for_each(|place| dx[place] += dy * part); // E97
                    }
                });
                pass.recycle(dy);
                Ok(Back::of_input(dx))
            }),
        ))
    }
}

impl<const N: usize> AveragePooling<N> {
    fn window(&self) -> Result<Window<N>> {
        Window::new(&self.kernel_size, self.stride.as_ref(), self.padding.as_ref(), None)
    }
}

/// Every output made of the values in its window.
fn windows<R: Real>(x: &ArrayD<R>, places: &Places, make: impl Fn(&mut dyn Iterator<Item = R>) -> R) -> ArrayD<R> {
    let x: Vec<R> = x.iter().copied().collect();
    let y = (0..x.len() / places.inputs * places.outputs).map(|element| {
        let (channel, output) = (element / places.outputs, element % places.outputs);
        make(&mut places.of(output).map(|place| x[channel * places.inputs + place]))
    });
    ArrayD::from_shape_vec(places.output.as_slice(), y.collect()).expect("as many outputs")
}

impl<const N: usize> Described for MaxPooling<N> {
    fn build<T: Scalar>(&self, _: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        self.window()?;
        Ok(Box::new(self.clone()))
    }
    fn define<R: Real>(&self, x: Signal<R>, _: Find<'_, R>) -> ArrayD<R> {
        let x = defined(x);
        let places = self.window().and_then(|window| window.places(x.shape())).expect("an input that fits");
        let larger = |best: R, x: R| if x.value() > best.value() { x } else { best };
        windows(&x, &places, |seen| seen.reduce(larger).expect("a window")) // E90
    }
}

impl<const N: usize> Described for AveragePooling<N> {
    fn build<T: Scalar>(&self, _: &mut Pcg64) -> Result<Box<dyn Module<T>>> {
        self.window()?;
        Ok(Box::new(self.clone()))
    }
    fn define<R: Real>(&self, x: Signal<R>, _: Find<'_, R>) -> ArrayD<R> {
        let x = defined(x);
        let window = self.window().expect("settings that fit");
        let places = window.places(x.shape()).expect("an input that fits");
        let elements = R::constant(window.elements() as f64);
        windows(&x, &places, |seen| seen.fold(R::constant(0.0), |sum, x| sum + x) / elements) // E92
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_of_more_elements_than_are_counted_is_refused() {
        let window = Window::<2>::new(&Extents::All(1 << 15), None, None, None).expect("a window");
        let refused = window.places(&[1, 1, 1 << 16, 1 << 16]).err().expect("C1").to_string();
        assert_eq!(refused, "x: expected shape fewer than 4294967295 elements a channel, found [1, 1, 65536, 65536]");
    }
}
