//! Convolutions and their adjoints against loops over every term, on whole numbers, which need no tolerance.

use ndarray::{Array2, Array3, ArrayD};
use woracle::operators::{Conv, Conv1d, Conv2d, Conv3d, ConvSettings, Extents, Operator, Padding, PaddingMode};

pub fn run(bytes: &[u8]) -> bool {
    match bytes.split_first() {
        Some((0..85, rest)) => on_axes(rest, Conv1d::from_weight_shape),
        Some((85..170, rest)) => on_axes(rest, Conv2d::from_weight_shape),
        Some((170.., rest)) => on_axes(rest, Conv3d::from_weight_shape),
        None => false,
    }
}

fn on_axes<const N: usize>(bytes: &[u8], new: impl Fn(ConvSettings, &[usize]) -> woracle::Result<Conv<N>>) -> bool {
    let mut rest = bytes.iter().cycle();
    let mut below = |count: u8| usize::from(rest.next().unwrap_or(&0) % count);
    let mut each = |least: usize, count: u8| [(); N].map(|()| least + below(count)).to_vec();
    let (kernel, size, stride, dilation, padding) = (each(1, 4), each(1, 9), each(1, 3), each(1, 3), each(0, 4));
    let modes = [PaddingMode::Zeros, PaddingMode::Reflect, PaddingMode::Replicate, PaddingMode::Circular];
    let (mode, groups) = (modes[below(4)], below(3) + 1);
    let [images, channels, units] = [below(3) + 1, below(20) + 1, below(20) + 1];
    let settings = ConvSettings {
        stride: Extents::Each(stride),
        padding: Padding::Numbers(Extents::Each(padding)),
        dilation: Extents::Each(dilation),
        groups,
        padding_mode: mode,
    };
    let weight: Vec<usize> = [units * groups, channels].into_iter().chain(kernel).collect();
    let Ok(conv) = new(settings, &weight) else { return false };
    let shape: Vec<usize> = [images, channels * groups].into_iter().chain(size).collect();
    let mut whole = || below(7) as f64 - 3.0;
    let x = ArrayD::from_shape_simple_fn(shape, &mut whole);
    let weight = Array2::from_shape_simple_fn((conv.units(), conv.fan_in()), &mut whole);
    let input = x.view().into();
    let Ok(shape) = conv.output_shape::<f64>(&input) else { return false };
    if shape.iter().product::<usize>() * conv.fan_in() > 1 << 18 {
        return false;
    }
    let y = conv.apply(&input, &[weight.view()]).swap_remove(0);
    let dy = Array3::from_shape_simple_fn(y.raw_dim(), &mut whole);
    let dx = conv.adjoint_input(&input, &[(dy.view(), weight.view())]).expect("values");
    let dweight = conv.adjoint_weight(&input, dy.view());

    let [xs, ys] = [x.as_slice(), dy.as_slice()].map(|values| values.expect("standard layout"));
    let (mut y_loops, mut dx_loops) = (vec![0.0; y.len()], vec![0.0; x.len()]);
    let mut dweight_loops = Array2::<f64>::zeros(weight.raw_dim());
    conv.terms::<f64>(&input, |term| {
        let (at, input) = ([term.unit, term.column], term.input.expect("a term reads x"));
        y_loops[term.output] += weight[at] * xs[input];
        dx_loops[input] += weight[at] * ys[term.output];
        dweight_loops[at] += ys[term.output] * xs[input];
    });
    assert!(y.iter().eq(&y_loops) && dx.iter().eq(&dx_loops) && dweight == dweight_loops);
    true
}
