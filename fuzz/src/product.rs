//! Products of matrices in any layout against a triple loop, on whole numbers, which need no tolerance.

use ndarray::{Array2, ArrayView2, Axis, Slice};
use woracle::matmul::{Accumulate, product, product_into};

pub fn run(bytes: &[u8]) -> bool {
    let [rows, inner, columns, layout_a, layout_b, layout_c, values @ ..] = bytes else { return false };
    let [rows, inner, columns] = [rows, inner, columns].map(|size| usize::from(*size) % 40);
    let mut values = values.iter().cycle().map(|&byte| f32::from(byte % 7) - 3.0).chain(std::iter::repeat(1.0));
    let mut memory = |rows: usize, columns: usize, layout: u8| {
        let shape = if layout & 1 == 1 { [columns, rows] } else { [rows, columns] };
        let spread = [shape[0] * step(layout).unsigned_abs(), shape[1] * step(layout >> 2).unsigned_abs()];
        Array2::from_shape_simple_fn(spread, || values.next().expect("endless"))
    };
    let (a, b) = (memory(rows, inner, *layout_a), memory(inner, columns, *layout_b));
    let mut c = memory(rows, columns, *layout_c);
    let (a, b) = (view(&a, *layout_a), view(&b, *layout_b));
    let before = view(&c, *layout_c).to_owned();
    let loops = Array2::from_shape_fn((rows, columns), |(i, j)| (0..inner).map(|k| a[[i, k]] * b[[k, j]]).sum::<f32>());
    assert_eq!(product(a, b), loops);

    let mut into = c.view_mut();
    into.slice_axis_inplace(Axis(0), Slice::new(0, None, step(*layout_c)));
    into.slice_axis_inplace(Axis(1), Slice::new(0, None, step(layout_c >> 2)));
    let mut into = if layout_c & 1 == 1 { into.reversed_axes() } else { into };
    product_into(2.0, a, b, Accumulate::Add, into.view_mut());
    assert_eq!(into, before + loops * 2.0);
    true
}

/// Rows or columns may lie apart and run backwards.
fn step(layout: u8) -> isize {
    [1, -1, 2, -2][usize::from(layout >> 1 & 3)]
}

fn view(memory: &Array2<f32>, layout: u8) -> ArrayView2<'_, f32> {
    let mut view = memory.view();
    view.slice_axis_inplace(Axis(0), Slice::new(0, None, step(layout)));
    view.slice_axis_inplace(Axis(1), Slice::new(0, None, step(layout >> 2)));
    if layout & 1 == 1 { view.reversed_axes() } else { view }
}
