//! Operators as linear maps: against their terms, against their adjoints, and over random geometry.

use ndarray::{ArcArray, Array2, Array3, ArrayD, Axis, CowArray, IxDyn};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use woracle::case::{Case, Tensor};
use woracle::operators::{
    Conv, Conv1d, Conv2d, Conv3d, ConvSettings, Embedding, EmbeddingSettings, Extents, Ids, Input, Linear,
    LinearSettings, Operator,
};
use woracle::operators::{Padding, PaddingMode, PaddingWord};
use woracle::registry::{Precision, layer};
use woracle::wora::{Base, Config, Layer, LoraInit, Method};

fn random(shape: &[usize], rng: &mut Pcg64) -> ArrayD<f64> {
    ArrayD::from_shape_simple_fn(shape, || rng.random_range(-1.0..1.0))
}

fn inner(a: &ArrayD<f64>, b: &ArrayD<f64>) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// How far apart two sums of the same terms may come out that are added up in another order, as their magnitudes sum.
fn apart(magnitudes: f64) -> f64 {
    8.0 * f64::EPSILON * magnitudes
}

/// PyTorch's formula for the size of the output along one axis.
fn pytorch_size(size: usize, padding: usize, dilation: usize, kernel: usize, stride: usize) -> usize {
    let reach = dilation * (kernel - 1) + 1;
    if size + 2 * padding < reach { 0 } else { (size + 2 * padding - reach) / stride + 1 }
}

/// A padded copy of x, made element by element as PyTorch's documentation describes the modes.
fn padded(x: &ArrayD<f64>, padding: &[(usize, usize)], mode: PaddingMode) -> ArrayD<f64> {
    let mut out = x.clone();
    for (axis, &(before, after)) in padding.iter().enumerate() {
        let axis = Axis(axis + 2);
        let size = out.len_of(axis) as isize;
        let slices: Vec<ArrayD<f64>> = (-(before as isize)..size + after as isize)
            .map(|t| {
                let source = match mode {
                    _ if (0..size).contains(&t) => Some(t),
                    PaddingMode::Zeros => None,
                    PaddingMode::Reflect => Some(if t < 0 { -t } else { 2 * size - 2 - t }),
                    PaddingMode::Replicate => Some(if t < 0 { 0 } else { size - 1 }),
                    PaddingMode::Circular => Some((t + size) % size),
                };
                let slice = out.index_axis(axis, source.unwrap_or(0) as usize).to_owned();
                source.map_or_else(|| ArrayD::zeros(slice.raw_dim()), |_| slice.clone())
            })
            .collect();
        let views: Vec<_> = slices.iter().map(|slice| slice.view()).collect();
        out = ndarray::stack(axis, &views).expect("slices of one shape");
    }
    out
}

/// Seven loops over a padded copy: image, unit, channel, output row and column, kernel row and column.
fn naive_conv2d(
    x: &ArrayD<f64>,
    weight: &ArrayD<f64>,
    stride: [usize; 2],
    dilation: [usize; 2],
    groups: usize,
) -> ArrayD<f64> {
    let size =
        |axis: usize| pytorch_size(x.shape()[axis + 2], 0, dilation[axis], weight.shape()[axis + 2], stride[axis]);
    let (units, per_group) = (weight.shape()[0], weight.shape()[1]);
    let mut y = ArrayD::zeros(IxDyn(&[x.shape()[0], units, size(0), size(1)]));
    for n in 0..x.shape()[0] {
        for u in 0..units {
            for c in 0..per_group {
                for i in 0..size(0) {
                    for j in 0..size(1) {
                        for k in 0..weight.shape()[2] {
                            for l in 0..weight.shape()[3] {
                                let channel = u / (units / groups) * per_group + c;
                                let at = [n, channel, i * stride[0] + k * dilation[0], j * stride[1] + l * dilation[1]];
                                y[[n, u, i, j]] += weight[[u, c, k, l]] * x[at.as_slice()];
                            }
                        }
                    }
                }
            }
        }
    }
    y
}

fn mode() -> impl Strategy<Value = PaddingMode> {
    prop::sample::select(vec![PaddingMode::Zeros, PaddingMode::Reflect, PaddingMode::Replicate, PaddingMode::Circular])
}

/// What PyTorch's arguments say, one number an axis.
fn settings(stride: &[usize], padding: &[usize], dilation: &[usize], groups: usize, mode: PaddingMode) -> ConvSettings {
    ConvSettings {
        stride: Extents::Each(stride.to_vec()),
        padding: Padding::Numbers(Extents::Each(padding.to_vec())),
        dilation: Extents::Each(dilation.to_vec()),
        groups,
        padding_mode: mode,
    }
}

fn apply<const N: usize>(conv: &Conv<N>, x: &ArrayD<f64>, weight: &ArrayD<f64>) -> ArrayD<f64> {
    let input: CowArray<'_, f64, IxDyn> = x.view().into();
    let shape = conv.output_shape(&input).expect("a shape");
    let y = conv.apply(&input, &[conv.weight_matrix(weight.view())]).swap_remove(0);
    y.into_shape_with_order(shape).expect("as many as the shape says")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// E42 to E48, E74, E75, E77, E78, E156.
    #[test]
    fn a_convolution_is_seven_loops_over_a_padded_copy(
        (images, groups) in (prop::sample::select(vec![1usize, 2, 9]), 1usize..4),
        (per_group, units) in (prop::sample::select(vec![1usize, 2, 5, 17]), prop::sample::select(vec![1usize, 2, 6, 17])),
        size in (1usize..9, prop::sample::select(vec![1usize, 2, 3, 8, 29, 150])).prop_map(<[usize; 2]>::from), kernel in [1usize..4, 1usize..5],
        stride in [1usize..4, 1usize..4], dilation in [1usize..3, 1usize..3], padding in [0usize..5, 0usize..5],
        mode in mode(), seed in any::<u64>(),
    ) {
        let fits = (0..2).all(|axis| pytorch_size(size[axis], padding[axis], dilation[axis], kernel[axis], stride[axis]) > 0);
        let narrow = (0..2).all(|axis| match mode {
            PaddingMode::Reflect => padding[axis] < size[axis],
            PaddingMode::Circular => padding[axis] <= size[axis],
            _ => true,
        });
        let settings = settings(&stride, &padding, &dilation, groups, mode);
        let rng = &mut Pcg64::seed_from_u64(seed);
        let weight = random(&[units * groups, per_group, kernel[0], kernel[1]], rng);
        let x = random(&[images, per_group * groups, size[0], size[1]], rng);
        let conv = Conv2d::from_weight_shape(settings, weight.shape()).expect("a convolution");
        let input: CowArray<'_, f64, IxDyn> = x.view().into();
        let shape = conv.output_shape(&input);
        prop_assert_eq!(shape.is_ok(), fits && narrow);
        if let Ok(shape) = shape {
            for axis in 0..2 {
                let expected = pytorch_size(size[axis], padding[axis], dilation[axis], kernel[axis], stride[axis]);
                prop_assert_eq!(shape[axis + 2], expected);
            }
            let y = apply(&conv, &x, &weight);
            let around = [(padding[0], padding[0]), (padding[1], padding[1])];
            let naive = naive_conv2d(&padded(&x, &around, mode), &weight, stride, dilation, groups);
            prop_assert_eq!(y.shape(), naive.shape());
            prop_assert!(y.iter().zip(&naive).all(|(a, b)| (a - b).abs() < 1e-13));

            // Linear in x, in W and, being adjoints, in dy: <dy, op(x, W)> three ways.
            let dy = random(y.shape(), rng);
            let dy3 = dy.view().into_shape_with_order((images, units * groups, shape[2] * shape[3])).unwrap();
            let matrix = conv.weight_matrix(weight.view());
            let dx = conv.adjoint_input(&input, &[(dy3, matrix)]).expect("values");
            let dw = conv.adjoint_weight(&input, dy3);
            let value = inner(&dy, &y);
            let close = apart(inner(&dy.abs(), &apply(&conv, &x.abs(), &weight.abs())));
            prop_assert!((value - inner(&dx, &x)).abs() <= close);
            prop_assert!((value - inner(&dw.into_dyn(), &matrix.to_owned().into_dyn())).abs() <= close);
            let (other, other_dy) = (random(x.shape(), rng), random(y.shape(), rng));
            let sum = apply(&conv, &(&x * 2.0 - &other), &weight);
            let parts = y * 2.0 - apply(&conv, &other, &weight);
            prop_assert!(sum.iter().zip(&parts).all(|(a, b)| (a - b).abs() < 1e-12));
            let back = |dy: &ArrayD<f64>| {
                let dy3 = dy.view().into_shape_with_order(dy3.dim()).unwrap();
                conv.adjoint_input(&input, &[(dy3, matrix)]).expect("values")
            };
            let parts = back(&dy) * 2.0 - back(&other_dy);
            let sum = back(&(&dy * 2.0 - &other_dy));
            prop_assert!(sum.iter().zip(&parts).all(|(a, b)| (a - b).abs() < 1e-12));
        }
    }

    /// Three axes, and enough channels or so few that nothing is unfolded, against the definition term by term.
    /// E1.
    #[test]
    fn a_volume_is_convolved_term_by_term(
        (groups, per_group, units) in prop::sample::select(vec![(1usize, 16usize, 17usize), (2, 17, 16), (5, 1, 1), (3, 2, 4)]),
        size in [1usize..5, 1usize..6, 1usize..9], kernel in [1usize..4, 1usize..4, 1usize..4],
        stride in [1usize..3, 1usize..3, 1usize..3], dilation in [1usize..3, 1usize..3, 1usize..3],
        padding in [0usize..3, 0usize..3, 0usize..3], same in any::<bool>(), mode in mode(), seed in any::<u64>(),
        images in prop::sample::select(vec![2usize, 9]),
    ) {
        let mut settings = settings(&stride, &padding, &dilation, groups, mode);
        if same {
            // With an even kernel more is put after the input than before.
            settings = ConvSettings { stride: Extents::All(1), padding: Padding::Word(PaddingWord::Same), ..settings };
        }
        let rng = &mut Pcg64::seed_from_u64(seed);
        let weight = random(&[units * groups, per_group, kernel[0], kernel[1], kernel[2]], rng);
        let x = random(&[images, per_group * groups, size[0], size[1], size[2]], rng);
        let conv = Conv3d::from_weight_shape(settings, weight.shape()).expect("a convolution");
        let input: CowArray<'_, f64, IxDyn> = x.view().into();
        prop_assume!(conv.output_shape(&input).is_ok());
        let matrix = conv.weight_matrix(weight.view());
        let y = conv.apply(&input, &[matrix]).swap_remove(0);
        let dy: Array3<f64> = random(y.shape(), rng).into_dimensionality().unwrap();
        let dx = conv.adjoint_input(&input, &[(dy.view(), matrix)]).expect("values");
        let mut twice = dx.clone();
        conv.add_adjoint_input(&input, &[(dy.view(), matrix)], twice.view_mut());
        prop_assert!(twice.iter().zip(&dx).all(|(twice, dx)| *twice == 2.0 * dx));
        let (xs, dys) = (x.as_slice().unwrap(), dy.as_slice().unwrap());
        let dweight = conv.adjoint_weight(&input, dy.view());
        let (mut ys, mut dxs, mut dweights) = (vec![0.0; y.len()], vec![0.0; x.len()], Array2::<f64>::zeros(matrix.dim()));
        conv.terms(&input, |term| {
            let (w, at) = (term.factor * matrix[[term.unit, term.column]], term.input.unwrap());
            ys[term.output] += w * xs[at];
            dxs[at] += w * dys[term.output];
            dweights[[term.unit, term.column]] += term.factor * xs[at] * dys[term.output];
        });
        prop_assert!(y.iter().zip(&ys).all(|(a, b)| (a - b).abs() < 1e-12));
        prop_assert!(dx.iter().zip(&dxs).all(|(a, b)| (a - b).abs() < 1e-12));
        prop_assert!(dweight.iter().zip(&dweights).all(|(a, b)| (a - b).abs() < 1e-12));
    }

    /// A weight that is the identity makes y the unfolded input, and the adjoint to x the fold.
    #[test]
    fn fold_is_the_adjoint_of_unfold(
        (channels, size, kernel) in (1usize..4, 1usize..700, 1usize..6),
        (stride, dilation, padding) in (1usize..4, 1usize..4, 0usize..8),
        mode in mode(), seed in any::<u64>(),
    ) {
        let settings = settings(&[stride], &[padding], &[dilation], 1, mode);
        let fan_in = channels * kernel;
        let conv = Conv1d::from_weight_shape(settings, &[fan_in, channels, kernel]).expect("a convolution");
        let rng = &mut Pcg64::seed_from_u64(seed);
        let x = random(&[1, channels, size], rng);
        let input: CowArray<'_, f64, IxDyn> = x.view().into();
        prop_assume!(conv.output_shape(&input).is_ok());
        let identity = Array2::eye(fan_in);
        let columns = conv.apply(&input, &[identity.view()]).swap_remove(0);
        let c: Array3<f64> = random(columns.shape(), rng).into_dimensionality().unwrap();
        let folded = conv.adjoint_input(&input, &[(c.view(), identity.view())]).expect("values");
        let (left, right) = (inner(&columns.clone().into_dyn(), &c.into_dyn()), inner(&x, &folded));
        prop_assert!((left - right).abs() < 1e-11 * (1.0 + left.abs()), "{} {}", left, right);
        // Each column entry is what E43 says it reads.
        let source = padded(&x, &[(padding, padding)], mode);
        for ((_, row, p), &column) in columns.indexed_iter() {
            prop_assert_eq!(column, source[[0, row / kernel, p * stride + row % kernel * dilation]]);
        }
    }

    /// E39 to E41.
    #[test]
    fn an_embedding_scatters_what_it_looks_up(
        ids in prop::collection::vec(0i64..9, 0..40), dim in 1usize..6, scale in -2.0..2.0, seed in any::<u64>(),
    ) {
        let embedding = Embedding { embed_scale: scale, ..Embedding::new(9, dim) };
        let rng = &mut Pcg64::seed_from_u64(seed);
        let table = random(&[9, dim], rng);
        let ids = Ids::new(&ndarray::Array1::from(ids).into_dyn());
        let y = embedding.apply(&ids, &[embedding.weight_matrix(table.view())]).swap_remove(0);
        let dy: Array3<f64> = random(y.shape(), rng).into_dimensionality().unwrap();
        let dw = embedding.stored_weight(embedding.adjoint_weight(&ids, dy.view()));
        prop_assert!((inner(&y.into_dyn(), &dy.into_dyn()) - inner(&table, &dw)).abs() < 1e-12);
    }
}

#[test]
fn same_padding_keeps_the_size_for_even_kernels_too() {
    for kernel in 1..6 {
        for dilation in 1..4 {
            let settings = ConvSettings {
                padding: Padding::Word(PaddingWord::Same),
                dilation: Extents::All(dilation),
                ..ConvSettings::default()
            };
            let conv = Conv1d::from_weight_shape(settings, &[2, 3, kernel]).expect("a convolution");
            let x: CowArray<'_, f64, IxDyn> = ArrayD::zeros(IxDyn(&[1, 3, 11])).into();
            assert_eq!(conv.output_shape(&x).expect("a shape"), [1, 2, 11]);
            let total = dilation * (kernel - 1);
            assert_eq!(conv.padding[0], (total / 2, total - total / 2));
        }
    }
}

/// An even kernel reads further behind an input than before it, whatever lies there.
#[test]
fn uneven_padding_reads_what_its_mode_says() {
    let rng = &mut Pcg64::seed_from_u64(4);
    for padding_mode in [PaddingMode::Zeros, PaddingMode::Reflect, PaddingMode::Replicate, PaddingMode::Circular] {
        for (groups, per_group, units) in [(1, 16, 17), (3, 1, 1), (1, 2, 3)] {
            let settings =
                ConvSettings { padding: Padding::Word(PaddingWord::Same), groups, padding_mode, ..Default::default() };
            let weight = random(&[units * groups, per_group, 2, 4], rng);
            let x = random(&[2, per_group * groups, 5, 6], rng);
            let conv = Conv2d::from_weight_shape(settings, weight.shape()).expect("a convolution");
            let y = apply(&conv, &x, &weight);
            let around = padded(&x, &[(0, 1), (1, 2)], padding_mode);
            let expected = naive_conv2d(&around, &weight, [1, 1], [1, 1], groups);
            assert_eq!(y.shape(), expected.shape());
            assert!(y.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-12), "{padding_mode:?}");
            let dy = random(y.shape(), rng);
            let of_units = dy.view().into_shape_with_order((2, units * groups, 30)).expect("[outer, units, inner]");
            let input: CowArray<'_, f64, IxDyn> = x.view().into();
            let matrix = conv.weight_matrix(weight.view());
            let dx = conv.adjoint_input(&input, &[(of_units, matrix)]).expect("values");
            let dw = conv.adjoint_weight(&input, of_units);
            let value = inner(&dy, &expected);
            let close = apart(inner(&dy.abs(), &apply(&conv, &x.abs(), &weight.abs())));
            assert!((value - inner(&dx, &x)).abs() <= close, "{padding_mode:?}");
            assert!((value - inner(&dw.into_dyn(), &matrix.to_owned().into_dyn())).abs() <= close, "{padding_mode:?}");
        }
    }
}

/// C1.
#[test]
fn a_weight_without_rows_or_columns_is_refused() {
    for shape in [[0, 3], [3, 0], [0, 0]] {
        for fan_in_fan_out in [false, true] {
            let message = Linear::from_weight_shape(LinearSettings { fan_in_fan_out }, &shape).expect_err("refused");
            let order = if fan_in_fan_out { "[in, out]" } else { "[out, in]" };
            let expected = format!("base.weight: expected shape {order}, neither 0, found {shape:?}");
            assert_eq!(message.to_string(), expected);
        }
        let message = Embedding::from_weight_shape(EmbeddingSettings::default(), &shape).expect_err("refused");
        let expected = "base.weight: expected shape [num_embeddings, embedding_dim], neither 0, found";
        assert!(message.to_string().starts_with(expected), "{message}");
    }
}

#[test]
fn some_units_of_a_linear_layer_read_what_all_do() {
    let linear = Linear { in_features: 4, out_features: 7, fan_in_fan_out: true };
    assert_eq!(linear.of_units(3), Some(Linear { out_features: 3, ..linear }));
    let conv = Conv1d::from_weight_shape(ConvSettings::default(), &[4, 2, 3]).expect("a convolution");
    assert_eq!(conv.of_units(2), None, "a convolution's units are looked at together");

    let rng = &mut Pcg64::seed_from_u64(3);
    let (x, weight, dy) = (random(&[5, 4], rng), random(&[4, 7], rng), random(&[5, 7, 1], rng));
    let (x, weight) = (CowArray::from(x), linear.weight_matrix(weight.view()));
    let dy: Array3<f64> = dy.into_dimensionality().expect("[outer, units, inner]");
    let (mut y, mut dx) = (Array3::<f64>::zeros((5, 7, 1)), ArrayD::<f64>::zeros(x.shape()));
    for units in [0..3, 3..6, 6..7] {
        let some = linear.of_units(units.len()).expect("some units");
        let weight = weight.slice_axis(Axis(0), units.clone().into());
        some.apply_into(&x, &[weight], vec![y.slice_axis_mut(Axis(1), units.clone().into())]);
        let dy = dy.slice_axis(Axis(1), units.into());
        some.add_adjoint_input(&x, &[(dy, weight)], dx.view_mut());
    }
    let all = linear.adjoint_input(&x, &[(dy.view(), weight)]).expect("values");
    assert!((y - linear.apply(&x, &[weight]).swap_remove(0)).iter().all(|off| off.abs() < 1e-14));
    assert!((dx - all).iter().all(|off| off.abs() < 1e-14));
}

/// C10.
#[test]
fn geometry_that_cannot_be_says_which_number_is_wrong() {
    fn conv(json: &str, weight: &[usize], x: &[usize]) -> String {
        let settings: ConvSettings = serde_json::from_str(json).expect("JSON");
        let conv = match Conv2d::from_weight_shape(settings, weight) {
            Ok(conv) => conv,
            Err(error) => return error.to_string(),
        };
        let x: CowArray<'_, f64, IxDyn> = ArrayD::zeros(IxDyn(x)).into();
        conv.output_shape(&x).map_or_else(|error| error.to_string(), |shape| format!("{shape:?}"))
    }
    let weight = &[4, 2, 3, 3];
    for (json, x, fragments) in [
        ("{}", &[1, 2, 5, 5][..], &["[1, 4, 3, 3]"][..]),
        ("{}", &[2, 5, 5], &["[4, 3, 3]"]),
        ("{}", &[1, 3, 5, 5], &["x: expected shape [batch, 2, size, size]", "found [1, 3, 5, 5]"]),
        ("{}", &[5, 5], &["x: expected shape"]),
        ("{}", &[1, 2, 5, 2], &["x: expected", "axis 1 of at least 3", "found [2]"]),
        (r#"{"dilation":3}"#, &[1, 2, 5, 9], &["axis 0 of at least 7 for kernel 3 with dilation 3", "found [5]"]),
        (
            r#"{"padding":5,"padding_mode":"reflect"}"#,
            &[1, 2, 5, 6],
            &["padding: expected", "less than", "size 5", "found 5"],
        ),
        (
            r#"{"padding":6,"padding_mode":"circular"}"#,
            &[1, 2, 5, 6],
            &["padding: expected", "at most", "size 5", "found 6"],
        ),
        (r#"{"stride":0}"#, &[1, 2, 5, 5], &["stride: expected numbers of 1 or more", "found [0, 0]"]),
        (r#"{"stride":[1,2,3]}"#, &[1, 2, 5, 5], &["stride: expected 2 numbers", "found [1, 2, 3]"]),
        (r#"{"groups":3}"#, &[1, 6, 5, 5], &["groups: expected a divisor of the 4 output channels", "found 3"]),
        (r#"{"groups":0}"#, &[1, 2, 5, 5], &["groups: expected a divisor", "found 0"]),
        (r#"{"padding":"same","stride":2}"#, &[1, 2, 5, 5], &["padding: expected numbers", "stride 1"]),
        (r#"{"dilation":9999999999999}"#, &[1, 2, 5, 5], &["dilation: expected numbers up to"]),
        (r#"{"padding":4294967296}"#, &[1, 2, 5, 5], &["padding: expected numbers up to 4294967295, found"]),
        // The largest number that can be told, and a y with more numbers than can be counted.
        (r#"{"padding":4294967295}"#, &[1, 2, 5, 5], &["padding: expected so little that y can be held in memory"]),
        // A y whose bytes can be counted, but are more than have an address.
        (r#"{"padding":319000000}"#, &[1, 2, 5, 5], &["so little that y", "of shape [1, 4, 638000003, 638000003]"]),
    ] {
        let message = conv(json, weight, x);
        assert!(fragments.iter().all(|fragment| message.contains(fragment)), "{json} {x:?}: {message}");
    }
    let message = conv("{}", &[4, 2, 3], &[1, 2, 5, 5]);
    assert!(message.contains("base.weight: expected shape [out, in / groups, kernel, kernel]"), "{message}");
}

/// C9.
#[test]
fn an_embedding_refuses_what_it_cannot_look_up() {
    let embedding = Embedding::new(5, 2);
    for (ids, fragments) in [
        (ndarray::array![[0, 4], [5, 1]], "x[1, 0]: expected an id from 0 to 4, found 5"),
        (ndarray::array![[0, -1], [2, 1]], "x[0, 1]: expected an id from 0 to 4, found -1"),
    ] {
        let message = embedding.output_shape::<f64>(&Ids::new(&ids.into_dyn())).expect_err("refused").to_string();
        assert_eq!(message, fragments);
    }
    let ids = Ids::new(&ndarray::array![[0, 4, 1], [3, 2, 1]].into_dyn());
    assert_eq!(Input::<f64>::shape(&ids), [2, 3]);
    let refused = |settings| Embedding::from_weight_shape(settings, &[5, 2]).expect_err("refused").to_string();
    let message = refused(EmbeddingSettings { max_norm: Some(1.0), ..Default::default() });
    assert!(message.starts_with("setting max_norm: expected none (") && message.ends_with("found 1"), "{message}");
    let message = refused(EmbeddingSettings { padding_idx: Some(5), ..Default::default() });
    assert_eq!(message, "setting padding_idx: expected an id below 5, found 5");
}

#[test]
fn a_case_that_no_layer_can_run_names_the_tensor_and_the_reason() {
    type Change = fn(&mut Case);
    let values = |shape: &[usize]| Tensor::Float(ArcArray::ones(IxDyn(shape)));
    let table: &[(&str, &str, Change, &[&str])] = &[
        (
            "conv2d",
            "conv2d-groups-full",
            |case| drop(case.tensors.insert("lora_A".into(), Tensor::Float(ArcArray::ones(IxDyn(&[4, 4, 3, 3]))))),
            &["lora_A: expected shape [rank, 2, kernel...], found [4, 4, 3, 3]", "PEFT's layout for groups"],
        ),
        (
            "conv2d",
            "conv2d-groups-full",
            |case| {
                case.tensors.insert("lora_A".into(), Tensor::Float(ArcArray::ones(IxDyn(&[3, 2, 3, 3]))));
            },
            &["rank: expected a positive multiple of groups = 2, found 3"],
        ),
        (
            "conv2d",
            "conv2d-plain",
            |case| drop(case.settings.insert("norm_axis".into(), "input".into())),
            &["norm_axis: expected output (a column of a convolution's weight meets many elements", "found input"],
        ),
        (
            "embedding",
            "embedding-plain",
            |case| drop(case.settings.insert("norm_axis".into(), "input".into())),
            &["norm_axis: expected output (the columns of an embedding's weight are ids)"],
        ),
        (
            "embedding",
            "embedding-plain",
            |case| drop(case.settings.insert("max_norm".into(), 1.0.into())),
            &["max_norm: expected none (it rewrites rows of the table", "found 1"],
        ),
        (
            "embedding",
            "embedding-plain",
            |case| drop(case.tensors.insert("dropout_mask".into(), Tensor::Float(ArcArray::ones(IxDyn(&[4, 3]))))),
            &["dropout_mask: expected none: PEFT applies no dropout to ids"],
        ),
        (
            "embedding",
            "embedding-plain",
            |case| drop(case.tensors.insert("x".into(), Tensor::Int(ArrayD::from_elem(IxDyn(&[4, 3]), 11)))),
            &["x[0, 0]: expected an id from 0 to 10, found 11"],
        ),
        (
            "conv1d",
            "conv1d-plain",
            |case| drop(case.settings.insert("padding_mode".into(), "mirror".into())),
            &["padding_mode", "mirror", "reflect"],
        ),
    ];
    for (name, spec, change, fragments) in table {
        let layer = layer(name).expect("a layer");
        let spec = layer.specs().iter().find(|candidate| candidate.name == *spec).expect("a case");
        let mut case = layer.draw(spec, 1);
        change(&mut case);
        for result in [layer.evaluate(&case, Precision::F64), layer.define(&case)] {
            let message = result.expect_err("refused").to_string();
            assert!(fragments.iter().all(|fragment| message.contains(fragment)), "{}: {message}", spec.name);
        }
    }
    let embedding = layer("embedding").expect("a layer");
    let mut case = embedding.draw(&embedding.specs()[0], 1);
    case.tensors.insert("x".into(), values(&[4, 3]));
    let message = embedding.evaluate(&case, Precision::F64).expect_err("refused").to_string();
    assert_eq!(message, "x: expected integer ids, found floating-point values");
}

#[test]
fn embedding_and_convolution_start_as_peft_starts_them() {
    let rng = &mut Pcg64::seed_from_u64(3);
    let config = Config::new(Method::Wora, 2.0);
    let base = Base { weight: random(&[50, 40], rng).into(), bias: None };
    let layer = Layer::init(Embedding::new(50, 40), config, base, 30, LoraInit::default(), rng).expect("a layer");
    let adapter = layer.adapter();
    assert!(adapter.lora_a.iter().all(|&a| a == 0.0) && adapter.lora_a.shape() == [30, 50]);
    assert!((adapter.lora_b.std(0.0) - 1.0).abs() < 0.1 && adapter.lora_b.shape() == [40, 30]);
    assert_eq!(adapter.magnitude.as_ref().expect("m").shape(), [40]);

    let settings: ConvSettings = serde_json::from_str(r#"{"groups":2}"#).expect("JSON");
    let conv = Conv2d::from_weight_shape(settings, &[6, 4, 3, 3]).expect("a convolution");
    let base = Base { weight: random(&[6, 4, 3, 3], rng).into(), bias: None };
    let layer = Layer::init(conv, config, base, 20, LoraInit::default(), rng).expect("a layer");
    let adapter = layer.adapter();
    assert!(adapter.lora_b.iter().all(|&b| b == 0.0) && adapter.lora_b.shape() == [6, 10, 1, 1]);
    let largest = adapter.lora_a.iter().fold(0.0, |largest: f64, a| largest.max(a.abs()));
    assert!(largest <= 1.0 / 6.0 && largest > 0.98 / 6.0 && adapter.lora_a.shape() == [20, 4, 3, 3]); // fan_in 36
    let magnitude = adapter.magnitude.as_ref().expect("m");
    assert_eq!(magnitude.shape(), [1, 6, 1, 1]);
    for (m, unit) in magnitude.iter().zip(layer.base().weight.outer_iter()) {
        assert!((m - unit.iter().map(|w| w * w).sum::<f64>().sqrt()).abs() < 1e-14);
    }
}
