//! Products of matrices in any layout against a triple loop, on whole numbers, which need no tolerance.

use ndarray::{Array2, ArrayView2, Axis, Slice};
use woracle::Scalar;
use woracle::matmul::{Accumulate, product, product_into};

pub fn run(bytes: &[u8]) -> bool {
    let [rows, inner, columns, layout_a, layout_b, layout_c, long, values @ ..] = bytes else { return false };
    let mut sizes = [rows, inner, columns].map(|size| usize::from(*size) % 40);
    // Threads share what one long side makes large enough.
    let (side, times) = (usize::from(long % 4), usize::from(*long) / 2);
    if let Some(size) = sizes.get_mut(side) {
        *size *= times;
    }
    let layouts = [*layout_a, *layout_b, *layout_c];
    of::<f32>(sizes, layouts, values);
    of::<f64>(sizes, layouts, values);
    true
}

fn of<T: Scalar>([rows, inner, columns]: [usize; 3], [layout_a, layout_b, layout_c]: [u8; 3], values: &[u8]) {
    let number = |byte: u8| T::from_f64(f64::from(byte % 7) - 3.0);
    let mut values = values.iter().cycle().map(|&byte| number(byte)).chain(std::iter::repeat(T::one()));
    let mut memory = |rows: usize, columns: usize, layout: u8| {
        let shape = if layout & 1 == 1 { [columns, rows] } else { [rows, columns] };
        let spread = [shape[0] * step(layout).unsigned_abs(), shape[1] * step(layout >> 2).unsigned_abs()];
        Array2::from_shape_simple_fn(spread, || values.next().expect("endless"))
    };
    let (a, b) = (memory(rows, inner, layout_a), memory(inner, columns, layout_b));
    let mut c = memory(rows, columns, layout_c);
    let (a, b) = (view(&a, layout_a), view(&b, layout_b));
    let before = view(&c, layout_c).to_owned();
    let loops = Array2::from_shape_fn((rows, columns), |(i, j)| {
        (0..inner).fold(T::zero(), |sum, k| sum + a[[i, k]] * b[[k, j]])
    });
    assert_eq!(product(a, b), loops);

    let mut into = c.view_mut();
    into.slice_axis_inplace(Axis(0), Slice::new(0, None, step(layout_c)));
    into.slice_axis_inplace(Axis(1), Slice::new(0, None, step(layout_c >> 2)));
    let mut into = if layout_c & 1 == 1 { into.reversed_axes() } else { into };
    let two = T::from_f64(2.0);
    product_into(two, a, b, Accumulate::Add, into.view_mut());
    assert_eq!(into, before + loops * two);
}

/// Rows or columns may lie apart and run backwards.
fn step(layout: u8) -> isize {
    [1, -1, 2, -2][usize::from(layout >> 1 & 3)]
}

fn view<T>(memory: &Array2<T>, layout: u8) -> ArrayView2<'_, T> {
    let mut view = memory.view();
    view.slice_axis_inplace(Axis(0), Slice::new(0, None, step(layout)));
    view.slice_axis_inplace(Axis(1), Slice::new(0, None, step(layout >> 2)));
    if layout & 1 == 1 { view.reversed_axes() } else { view }
}
