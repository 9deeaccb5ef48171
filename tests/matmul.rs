//! The matrix products against a triple loop, in every layout that a view can have.

use ndarray::{Array2, ArrayBase, ArrayView2, Axis, Ix2, RawData, Slice};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use woracle::Scalar;
use woracle::matmul::{Accumulate, PARALLEL_FLOPS, product, product_into};

/// How a matrix lies in memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    transposed: bool,
    /// Of the rows, then of the columns; negative ones run backwards.
    steps: [isize; 2],
}

const STANDARD: Layout = Layout { transposed: false, steps: [1, 1] };
const TRANSPOSED: Layout = Layout { transposed: true, steps: [1, 1] };
const EVERY_SECOND: Layout = Layout { transposed: false, steps: [2, 2] };

fn layouts() -> impl Strategy<Value = Layout> {
    let steps = || prop::sample::select(vec![1, 2, -1, -2]);
    (any::<bool>(), steps(), steps())
        .prop_map(|(transposed, rows, columns)| Layout { transposed, steps: [rows, columns] })
}

impl Layout {
    fn select<S: RawData>(self, memory: ArrayBase<S, Ix2>) -> ArrayBase<S, Ix2> {
        let mut selected = if self.transposed { memory.reversed_axes() } else { memory };
        for (axis, step) in self.steps.into_iter().enumerate() {
            selected.slice_axis_inplace(Axis(axis), Slice::new(0, None, step));
        }
        selected
    }

    /// Memory in which the matrix lies; `filler` is everywhere that does not belong to it.
    fn spread<T: Scalar>(self, matrix: ArrayView2<'_, T>, filler: T) -> Array2<T> {
        let [rows, columns] = self.steps.map(isize::unsigned_abs);
        let (rows, columns) = (matrix.nrows() * rows, matrix.ncols() * columns);
        let mut memory = Array2::from_elem(if self.transposed { (columns, rows) } else { (rows, columns) }, filler);
        self.select(memory.view_mut()).assign(&matrix);
        memory
    }
}

fn draw<T: Scalar>(rows: usize, columns: usize, rng: &mut Pcg64) -> Array2<T> {
    Array2::from_shape_simple_fn((rows, columns), || T::from_f64(rng.random_range(-1.0..1.0)))
}

/// Fails at the first element that is further from the triple loop than rounding can explain: the loop runs in
/// f64, and each side rounds k products, k sums, the scaling and the addition to c.
fn agrees<T: Scalar>(
    scale: f64,
    a: &Array2<T>,
    b: &Array2<T>,
    c: Option<&Array2<T>>,
    found: ArrayView2<'_, T>,
) -> Result<(), String> {
    let inner = a.ncols();
    let rounding = (inner as f64 + 3.0) * 2.0 * T::UNIT_ROUNDOFF;
    for ((i, j), found) in found.indexed_iter() {
        let before = c.map_or(0.0, |c| c[[i, j]].as_f64());
        let (mut sum, mut size) = (0.0, 0.0);
        for k in 0..inner {
            let term = a[[i, k]].as_f64() * b[[k, j]].as_f64();
            sum += term;
            size += term.abs();
        }
        let expected = scale * sum + before;
        let bound = rounding * (scale.abs() * size + before.abs());
        let error = (found.as_f64() - expected).abs();
        if error.is_nan() || error > bound {
            return Err(format!("{} [{i}, {j}]: expected {expected:e} within {bound:e}, found {found:e}", T::NAME));
        }
    }
    Ok(())
}

#[derive(Clone, Debug)]
struct Product {
    /// m, k, n
    sizes: [usize; 3],
    /// Of a, b and c.
    layouts: [Layout; 3],
    scale: f64,
    accumulate: Accumulate,
    seed: u64,
}

impl Product {
    fn check<T: Scalar>(&self) -> Result<(), String> {
        let [m, k, n] = self.sizes;
        let mut rng = Pcg64::seed_from_u64(self.seed);
        let (a, b, before) = (draw::<T>(m, k, &mut rng), draw(k, n, &mut rng), draw(m, n, &mut rng));
        let [layout_a, layout_b, layout_c] = self.layouts;
        // NaN between the elements spreads to the result of whoever reads it.
        let (memory_a, memory_b) = (layout_a.spread(a.view(), T::nan()), layout_b.spread(b.view(), T::nan()));
        let (view_a, view_b) = (layout_a.select(memory_a.view()), layout_b.select(memory_b.view()));

        let c = product(view_a, view_b);
        if c.dim() != (m, n) {
            return Err(format!("expected shape {:?}, found {:?}", (m, n), c.dim()));
        }
        agrees(1.0, &a, &b, None, c.view())?;

        let scale = T::from_f64(self.scale);
        let add = self.accumulate == Accumulate::Add;
        let filler = T::from_f64(0.125);
        // A destination that is replaced may hold anything, and so what is not a number either.
        let destination = if add { before.clone() } else { Array2::from_elem((m, n), T::nan()) };
        let mut memory_c = layout_c.spread(destination.view(), filler);
        product_into(scale, view_a, view_b, self.accumulate, layout_c.select(memory_c.view_mut()));
        agrees(scale.as_f64(), &a, &b, add.then_some(&before), layout_c.select(memory_c.view()))?;
        layout_c.select(memory_c.view_mut()).fill(filler);
        if memory_c.iter().any(|&value| value != filler) {
            return Err("expected the memory between the elements of c untouched".into());
        }
        Ok(())
    }
}

fn products() -> impl Strategy<Value = Product> {
    let accumulate = prop::sample::select(vec![Accumulate::Replace, Accumulate::Add]);
    (prop::array::uniform3(0..=20_usize), prop::array::uniform3(layouts()), -3.0..3.0, accumulate, any::<u64>())
        .prop_map(|(sizes, layouts, scale, accumulate, seed)| Product { sizes, layouts, scale, accumulate, seed })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn products_in_f64_are_those_of_the_triple_loop(product in products()) {
        prop_assert_eq!(product.check::<f64>(), Ok(()));
    }

    #[test]
    fn products_in_f32_are_those_of_the_triple_loop(product in products()) {
        prop_assert_eq!(product.check::<f32>(), Ok(()));
    }
}

#[test]
fn an_empty_sum_is_zero_and_adds_nothing() {
    let (a, b) = (Array2::<f64>::zeros((2, 0)), Array2::zeros((0, 3)));
    assert_eq!(product(a.view(), b.view()), Array2::<f64>::zeros((2, 3)));
    let mut c = Array2::from_elem((2, 3), 7.0);
    product_into(2.0, a.view(), b.view(), Accumulate::Add, c.view_mut());
    assert_eq!(c, Array2::from_elem((2, 3), 7.0));
}

#[test]
#[should_panic(expected = "inner dimensions of a matrix product")]
fn inner_dimensions_that_differ_are_refused() {
    product(Array2::<f64>::zeros((2, 3)).view(), Array2::zeros((2, 3)).view());
}

#[test]
#[should_panic(expected = "destination of a matrix product")]
fn a_destination_of_another_shape_is_refused() {
    let (a, b) = (Array2::<f64>::zeros((2, 3)), Array2::zeros((3, 4)));
    product_into(1.0, a.view(), b.view(), Accumulate::Replace, Array2::zeros((4, 2)).view_mut());
}

#[test]
fn a_product_large_enough_for_threads_is_that_of_the_triple_loop() {
    let sizes = [181, 170, 173];
    assert!(2 * sizes.iter().product::<usize>() > PARALLEL_FLOPS);
    for layouts in [
        [STANDARD; 3],
        [STANDARD, TRANSPOSED, STANDARD],
        [TRANSPOSED, STANDARD, TRANSPOSED],
        [EVERY_SECOND, TRANSPOSED, EVERY_SECOND],
    ] {
        for accumulate in [Accumulate::Replace, Accumulate::Add] {
            let product = Product { sizes, layouts, scale: -0.75, accumulate, seed: 1 };
            assert_eq!(product.check::<f64>(), Ok(()), "{product:?}");
            assert_eq!(product.check::<f32>(), Ok(()), "{product:?}");
        }
    }
}

#[test]
fn columns_that_meet_in_the_cache_are_multiplied_as_others_are() {
    for [m, k, n] in [[512, 40, 600], [1024, 16, 1030], [512, 40, 500]] {
        assert!(2 * m * k * n > PARALLEL_FLOPS);
        for layouts in [[TRANSPOSED, STANDARD, STANDARD], [TRANSPOSED, TRANSPOSED, TRANSPOSED]] {
            let product = Product { sizes: [m, k, n], layouts, scale: 0.5, accumulate: Accumulate::Add, seed: 4 };
            assert_eq!(product.check::<f64>(), Ok(()), "{product:?}");
            assert_eq!(product.check::<f32>(), Ok(()), "{product:?}");
        }
    }
}

/// m, k and n of products with one row or one column, all with an operand or a result of more than 65,536
/// elements. The last three also have more operations than [`PARALLEL_FLOPS`].
const THIN: [[usize; 3]; 10] = [
    [1, 70_001, 3],
    [3, 70_001, 1],
    [1, 3, 70_001],
    [70_001, 3, 1],
    [1, 300, 301],
    [301, 300, 1],
    [1, 70_001, 1],
    [1, 2300, 2301],
    [2301, 2300, 1],
    [1, 5_000_001, 1],
];

/// Products of every way to divide the work: by terms, by blocks of rows or of columns, and by panels of columns, the
/// last of each being smaller than the others.
const DIVIDED: [[usize; 3]; 5] = [[12, 40_000, 16], [96, 2103, 97], [700, 300, 40], [40, 300, 700], [300, 70, 1100]];

#[test]
fn products_whose_work_is_divided_are_those_of_the_triple_loop() {
    for sizes in DIVIDED {
        assert!(2 * sizes.iter().product::<usize>() > PARALLEL_FLOPS);
        for layouts in [[STANDARD; 3], [TRANSPOSED, TRANSPOSED, STANDARD], [STANDARD, EVERY_SECOND, TRANSPOSED]] {
            for accumulate in [Accumulate::Replace, Accumulate::Add] {
                let product = Product { sizes, layouts, scale: -1.5, accumulate, seed: 5 };
                assert_eq!(product.check::<f64>(), Ok(()), "{product:?}");
            }
        }
    }
}

#[test]
fn products_with_one_row_or_column_are_those_of_the_triple_loop() {
    for sizes in THIN {
        let product = Product { sizes, layouts: [STANDARD; 3], scale: 1.5, accumulate: Accumulate::Add, seed: 2 };
        assert_eq!(product.check::<f64>(), Ok(()), "{product:?}");
    }
}

#[cfg(not(feature = "openblas"))]
#[test]
fn products_do_not_depend_on_the_number_of_threads() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let pools = [pool(1), pool(2)];
    for [m, k, n] in THIN.into_iter().chain(DIVIDED).chain([[181, 170, 173]]) {
        let mut rng = Pcg64::seed_from_u64(3);
        let (a, b) = (draw::<f64>(m, k, &mut rng), draw::<f64>(k, n, &mut rng));
        // Column-major operands take other paths through a matrix library.
        let b_transposed = TRANSPOSED.spread(b.view(), 0.0);
        for b in [b.view(), b_transposed.t()] {
            let [one, two] = [&pools[0], &pools[1]].map(|pool| pool.install(|| product(a.view(), b)));
            let differs = one.iter().zip(&two).position(|(one, two)| one.to_bits() != two.to_bits());
            assert_eq!(differs, None, "[{m}, {k}] times [{k}, {n}], strides of b {:?}", b.strides());
        }
    }
}
