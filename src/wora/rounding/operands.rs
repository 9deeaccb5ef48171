//! What large products are computed of: x, dy and W0 and their squares, in f32 where no product of two of them leaves its
//! range. How far off a result may be need be known to three digits, and f32 is twice as fast.

use crate::Scalar;
use crate::operators::{Input, Operator, PARALLEL_ELEMENTS, mix_adjoint_input, mix_adjoint_weight};
use crate::simd::{contiguous, magnitudes, squares};
use crate::wora::{Cache, Layer, NormAxis, Workspace};
use ndarray::{
    Array, Array2, Array3, ArrayBase, ArrayD, ArrayView, ArrayView1, ArrayView2, ArrayView3, ArrayViewD, ArrayViewMut1,
    Axis, Data, Dimension, Ix2, Ix3, Zip,
};
use rayon::prelude::*;

/// The squared error of what is 0 may be taken for so much of the largest: its root is a part in ten thousand million.
pub(super) const LEAST: f64 = 1e-20;

/// The smallest magnitude but 0, and the largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Magnitudes {
    least: f64,
    most: f64,
}

impl Magnitudes {
    pub const NONE: Self = Self { least: f64::INFINITY, most: 0.0 };

    pub fn new([least, most]: [f64; 2]) -> Self {
        Self { least, most }
    }

    /// Of the least and the largest of each of some lanes.
    pub fn of_lanes<const N: usize>([least, most]: [[f64; N]; 2]) -> Self {
        Self { least: least.into_iter().fold(f64::INFINITY, f64::min), most: most.into_iter().fold(0.0, f64::max) }
    }

    fn of(values: &[f64]) -> Self {
        let of_part = |part| Self::new(magnitudes(part));
        values.par_chunks(PARALLEL_ELEMENTS).map(of_part).reduce(|| Self::NONE, Self::and)
    }

    /// Of an array in whatever order.
    pub fn of_array<D: Dimension>(values: ArrayView<'_, f64, D>) -> Self {
        values.as_slice_memory_order().map_or_else(|| Self::of(&values.iter().copied().collect::<Vec<_>>()), Self::of)
    }

    pub fn and(self, other: Self) -> Self {
        Self { least: self.least.min(other.least), most: self.most.max(other.most) }
    }

    /// A power of two that divides the largest magnitude down to a number from 1 up to 2.
    fn scale(self) -> f64 {
        power_of_two(self.most)
    }

    /// Of the squares.
    pub fn squared(self) -> Self {
        Self { least: self.least.powi(2), most: self.most.powi(2) }
    }

    /// Of what is divided by its [`Magnitudes::scale`].
    pub fn scaled(self) -> Self {
        let scale = self.scale();
        Self { least: self.least / scale, most: self.most / scale }
    }
}

/// The power of two that divides a magnitude down to a number from 1 up to 2.
pub(super) fn power_of_two(magnitude: f64) -> f64 {
    if magnitude == 0.0 { 1.0 } else { 2.0_f64.powi(magnitude.log2().floor().clamp(-1000.0, 1000.0) as i32) }
}

/// Values divided by a power of two, and their squares.
struct Squared<V> {
    values: V,
    squares: V,
}

/// Values, and what they are to be multiplied by.
pub(super) struct Scaled<V> {
    pub values: V,
    pub scale: f64,
}

impl<P: Scalar, S: Data<Elem = P>, D: Dimension> Scaled<ArrayBase<S, D>> {
    /// What they are.
    pub fn widened(&self) -> Array<f64, D> {
        widened(&self.values, self.scale)
    }
}

impl<P: Scalar, D: Dimension> Scaled<Array<P, D>> {
    /// These, by a power of two that divides the largest down to a number from 1 up to 2.
    pub fn of(values: ArrayView<'_, f64, D>) -> Self {
        let scale = Magnitudes::of_array(values.view()).scale();
        Self { values: values.mapv(|value| P::from_f64(value / scale)), scale }
    }
}

/// What is added up of the squares of a weight, of which some units come after others.
pub(super) struct Sums<P> {
    /// `op2(x~^2, W)`: `[outer, units, inner]`
    pub outputs: Option<Scaled<Array3<P>>>,
    /// `op2*(dy^2, W)`, in the shape of x
    pub inputs: Option<Scaled<ArrayD<P>>>,
    /// `op*(dy, W0)`, not squared, in the shape of x; where it is wanted
    pub base_gradient: Option<Scaled<ArrayD<P>>>,
}

/// x, dy and W0, in the type that products are computed in.
pub(super) struct Operands<'a, O: Operator, P: Scalar> {
    operator: O,
    /// With every factor squared.
    squared: O,
    /// `x~`, and beside a mask x.
    inputs: Vec<Squared<O::Input<'static, P>>>,
    dy: Option<Squared<Array3<P>>>,
    /// W0: `[units, fan_in]`
    weight: ArrayView2<'a, f64>,
    x_scale: f64,
    dy_scale: f64,
    weight_scale: f64,
    /// Of x and of dy.
    range: [Magnitudes; 2],
    /// What products of some units leave to those of the next.
    pub workspace: Workspace<P>,
}

impl<'a, O: Operator, P: Scalar> Operands<'a, O, P> {
    /// `dy` in the shape of P, `[outer, units, inner]`, whose squares are larger by `dy_tiny_sq`. `None` where products of squares, of x and of dy, would not keep their digits in P.
    pub fn new(
        layer: &'a Layer<O, f64>,
        cache: &Cache<'_, O, f64>,
        dy: Option<ArrayView3<'_, f64>>,
        dy_tiny_sq: f64,
    ) -> Option<Self> {
        let inputs = [Some(cache.adapted_input()), cache.dropped.as_ref().map(|_| &cache.x)];
        let inputs: Vec<_> = inputs.into_iter().flatten().collect();
        let values = || inputs.iter().filter_map(|x| x.values());
        let of_x = values().fold(Magnitudes::NONE, |range, values| range.and(Magnitudes::of_array(values)));
        let range = [of_x, dy.map_or(Magnitudes::NONE, Magnitudes::of_array)];
        if !fit::<P>(range.map(Magnitudes::scaled).map(Magnitudes::squared), Magnitudes::NONE) {
            return None;
        }
        let [x_scale, dy_scale] = range.map(Magnitudes::scale);
        let (operator, weight) = (&layer.operator, layer.weight());
        // No element is larger than its row, whose norm is there already; but the square of one may have been too small.
        let largest_sq = layer.base_sq.iter().copied().fold(0.0, f64::max);
        let is_precise = largest_sq.is_finite() && largest_sq >= f64::MIN_POSITIVE;
        let weight_scale =
            if is_precise { power_of_two(largest_sq.sqrt()) } else { Magnitudes::of_array(weight).scale() };
        let ids = |x: &O::Input<'_, f64>| x.ids().and_then(|ids| O::Input::from_ids(ids.to_owned())).expect("ids");
        let of = |x: &O::Input<'_, f64>| match x.values() {
            None => Squared { values: ids(x), squares: ids(x) },
            Some(x) => {
                let Squared { values, squares } = squared(x, x_scale, 0.0);
                let input = |values| O::Input::from_values(values).expect("values");
                Squared { values: input(values), squares: input(squares) }
            }
        };
        let with_units = |values: ArrayD<P>| values.into_dimensionality::<Ix3>().expect("[outer, units, inner]");
        let dy = dy.map(|dy| {
            let Squared { values, squares } = squared(dy.into_dyn(), dy_scale, dy_tiny_sq);
            Squared { values: with_units(values), squares: with_units(squares) }
        });
        Some(Self {
            operator: operator.power(1),
            squared: operator.power(2),
            inputs: inputs.into_iter().map(of).collect(),
            dy,
            weight,
            x_scale,
            dy_scale,
            weight_scale,
            range,
            workspace: Workspace::default(),
        })
    }

    /// `W0^2` for some units, in the order in which W0 lies: `[units, fan_in]`. `None` where products with it would not
    /// keep their digits in P.
    pub fn weight_sq(&self, units: &Units) -> Option<Scaled<Array2<P>>> {
        let per_scale = 1.0 / self.weight_scale;
        let (values, magnitudes) = self.of_rows(units, |row, into| squares(row, per_scale, into));
        self.fit(magnitudes).then(|| Scaled { values, scale: self.weight_scale.powi(2) })
    }

    /// What is made of W0 of some units where it lies contiguous, and the magnitudes of that.
    fn of_rows(&self, units: &Units, of_row: impl Fn(&[f64], &mut [P]) -> [f64; 2] + Sync) -> (Array2<P>, Magnitudes) {
        let weight = self.weight.slice_axis_move(Axis(0), units.range.clone().into());
        let is_transposed = weight.strides()[0] < weight.strides()[1];
        let rows = if is_transposed { weight.reversed_axes() } else { weight };
        let mut values = self.workspace.array(rows.raw_dim());
        let of_row = |(mut into, row): (ArrayViewMut1<'_, P>, ArrayView1<'_, f64>)| {
            Magnitudes::new(of_row(&contiguous(row), into.as_slice_mut().expect("a row of an array")))
        };
        let of_rows = values.axis_iter_mut(Axis(0)).into_par_iter().zip(rows.axis_iter(Axis(0)));
        let of_rows = of_rows.with_min_len(PARALLEL_ELEMENTS.div_ceil(rows.ncols().max(1)));
        let magnitudes = of_rows.map(of_row).reduce(|| Magnitudes::NONE, Magnitudes::and);
        (if is_transposed { values.reversed_axes() } else { values }, magnitudes)
    }

    /// All of them.
    fn units(&self) -> Units {
        Units::all(self.weight.nrows())
    }

    fn all_weight_sq(&self) -> Array2<P> {
        self.weight_sq(&self.units()).expect("what fitted before").values
    }

    /// What is to be multiplied with the squares of x, or of dy; `None` where products would not keep their digits in P.
    pub fn narrowed<D: Dimension>(&self, values: ArrayView<'_, f64, D>) -> Option<Scaled<Array<P, D>>> {
        self.fit(Magnitudes::of_array(values.view()).scaled()).then(|| Scaled::of(values))
    }

    /// The same of squared errors. Those of what is 0, of which `of_zero` is known, may be so small that P has not the range
    /// for them: they are rounded up to [`LEAST`] of the largest.
    pub fn narrowed_up<D: Dimension>(&self, mut values: Array<f64, D>, of_zero: f64) -> Option<Scaled<Array<P, D>>> {
        let least = LEAST * values.iter().copied().fold(0.0, f64::max);
        values.mapv_inplace(|value| if value > 0.0 && value <= 2.0 * of_zero { value.max(least) } else { value });
        self.narrowed(values.view())
    }

    /// `x~^2`
    pub fn x_sq(&self) -> Scaled<&O::Input<'static, P>> {
        Scaled { values: &self.inputs[0].squares, scale: self.x_scale.powi(2) }
    }

    /// Whether products of the squares of x, and of dy, with what lies within `weight` keep their digits in P.
    pub fn fit(&self, weight: Magnitudes) -> bool {
        fit::<P>(self.range.map(Magnitudes::scaled).map(Magnitudes::squared), weight)
    }

    /// `dy^2`: `[outer, units, inner]`
    pub fn dy_sq(&self) -> Scaled<ArrayView3<'_, P>> {
        self.dy_sq_of(&self.units())
    }

    /// `dy^2` of some units: `[outer, units, inner]`
    pub fn dy_sq_of(&self, units: &Units) -> Scaled<ArrayView3<'_, P>> {
        Scaled { values: units.slice(self.dy().squares.view()), scale: self.dy_scale.powi(2) }
    }

    /// `op2(x~^2, W)`, of as many units as W has: `[outer, units, inner]`
    pub fn outputs(&self, weight: &Scaled<Array2<P>>) -> Scaled<Array3<P>> {
        let values = self.squared.apply(&self.inputs[0].squares, &[weight.values.view()]).swap_remove(0);
        Scaled { values, scale: weight.scale * self.x_scale.powi(2) }
    }

    /// `mix*(b, dy^2)` of b `[units, ranks]`: `[outer, groups * ranks, inner]`
    pub fn mixed_inputs(&self, b: &Scaled<Array2<P>>) -> Scaled<Array3<P>> {
        let dy = self.dy_sq();
        let values = mix_adjoint_input(b.values.view(), dy.values, self.operator.groups());
        Scaled { values, scale: b.scale * dy.scale }
    }

    /// `mix*(dy^2, u)` of u `[outer, groups * ranks, inner]`: `[units, ranks]`
    pub fn mixed_terms(&self, u: &Scaled<Array3<P>>) -> Scaled<Array2<P>> {
        let dy = self.dy_sq();
        let values = mix_adjoint_weight(dy.values, u.values.view(), self.operator.groups());
        Scaled { values, scale: u.scale * dy.scale }
    }

    /// What W of some units, `[units, fan_in]`, adds to the sums on one side.
    pub fn add(&self, side: NormAxis, units: &Units, weight: &Scaled<Array2<P>>, sums: &mut Sums<P>) {
        let (operator, x) = (units.of(&self.squared), &self.inputs[0].squares);
        match side {
            NormAxis::Output => {
                let all = sums.outputs.get_or_insert_with(|| {
                    let [outer, inner] = self.squared.places(x);
                    let values = Array3::zeros((outer, units.total, inner));
                    Scaled { values, scale: weight.scale * self.x_scale.powi(2) }
                });
                let some = all.values.slice_axis_mut(Axis(1), units.range.clone().into());
                operator.apply_into(x, &[weight.values.view()], vec![some]);
            }
            NormAxis::Input => {
                let dy = self.dy_sq_of(units);
                let pair = (dy.values, weight.values.view());
                add_adjoint_input(&operator, x, pair, weight.scale * dy.scale, &mut sums.inputs);
            }
        }
    }

    /// `op2*(x~^2, t)` of t `[outer, rows, inner]`: `[rows, fan_in]`
    pub fn terms_of(&self, t: &Scaled<Array3<P>>) -> Scaled<Array2<P>> {
        let values = self.squared.adjoint_weight(&self.inputs[0].squares, t.values.view());
        Scaled { values, scale: t.scale * self.x_scale.powi(2) }
    }

    /// `l op2(x^2, W0^2) + op(x, W0)^2`, for `x~` and for x.
    pub fn outputs_of_both(&self, chain: f64) -> Array3<f64> {
        let (weight, weight_sq) = (self.weight(&self.units()), self.all_weight_sq());
        let of = |x: &Squared<O::Input<'static, P>>| {
            let terms = self.squared.apply(&x.squares, &[weight_sq.view()]).swap_remove(0);
            let whole = self.operator.apply(&x.values, &[weight.view()]).swap_remove(0);
            chained(&terms, &whole, chain, self.x_scale * self.weight_scale)
        };
        self.inputs.iter().map(of).reduce(|sum, one| sum + one).expect("an input")
    }

    /// `l op2*(dy^2, W0^2) + op*(dy, W0)^2`, in the shape of x.
    pub fn inputs_of_both(&self, chain: f64) -> ArrayD<f64> {
        let (dy, x, weight_sq) = (self.dy(), &self.inputs[0], self.all_weight_sq());
        let terms = self.squared.adjoint_input(&x.squares, &[(dy.squares.view(), weight_sq.view())]);
        let mut whole = None;
        self.add_base_gradient(&self.units(), &mut whole);
        let Scaled { values: whole, scale } = whole.expect("all units");
        chained(&terms.expect("values"), &whole, chain, scale)
    }

    /// What W0 of some units adds to `op*(dy, W0)`, in the shape of x.
    pub fn add_base_gradient(&self, units: &Units, sums: &mut Option<Scaled<ArrayD<P>>>) {
        let (dy, weight) = (units.slice(self.dy().values.view()), self.weight(units));
        let (operator, scale) = (units.of(&self.operator), self.dy_scale * self.weight_scale);
        add_adjoint_input(&operator, &self.inputs[0].values, (dy, weight.view()), scale, sums);
        self.recycle(weight);
    }

    /// W0 of some units, in the order in which it lies: `[units, fan_in]`
    fn weight(&self, units: &Units) -> Array2<P> {
        let per_scale = 1.0 / self.weight_scale;
        let of_row = |row: &[f64], into: &mut [P]| {
            into.iter_mut().zip(row).for_each(|(into, w)| *into = P::from_f64(w * per_scale));
            [f64::INFINITY, 0.0]
        };
        self.of_rows(units, of_row).0
    }

    /// `X = op*(x~, dy)` for some units: `[units, fan_in]`
    pub fn dmerged(&self, units: &Units) -> Scaled<Array2<P>> {
        let mut sums = self.workspace.array(Ix2(units.range.len(), self.operator.fan_in()));
        let dy = units.slice(self.dy().values.view());
        units.of(&self.operator).adjoint_weight_into(&self.inputs[0].values, dy, sums.view_mut());
        Scaled { values: sums, scale: self.x_scale * self.dy_scale }
    }

    /// Leaves what has been returned for some units to the next.
    pub fn recycle<D: Dimension>(&self, array: Array<P, D>) {
        self.workspace.recycle(array);
    }

    /// `op2*(x~^2, dy^2)`: `[units, fan_in]`
    pub fn terms_of_dmerged(&self) -> Array2<f64> {
        let terms = self.squared.adjoint_weight(&self.inputs[0].squares, self.dy().squares.view());
        widened(&terms, (self.x_scale * self.dy_scale).powi(2))
    }

    /// `l op2*(x^2, dy^2) + op*(x, dy)^2`, for `x~` and for x: `[units, fan_in]`
    pub fn dmerged_of_both(&self, chain: f64) -> Array2<f64> {
        let dy = self.dy();
        let of = |x: &Squared<O::Input<'static, P>>| {
            let terms = self.squared.adjoint_weight(&x.squares, dy.squares.view());
            let whole = self.operator.adjoint_weight(&x.values, dy.values.view());
            chained(&terms, &whole, chain, self.x_scale * self.dy_scale)
        };
        self.inputs.iter().map(of).reduce(|sum, one| sum + one).expect("an input")
    }

    fn dy(&self) -> &Squared<Array3<P>> {
        self.dy.as_ref().expect("a cotangent")
    }
}

/// Whether all products of two, of what is made of x, of dy and of a weight, keep their digits in P.
pub(super) fn fit<P: Scalar>([x, dy]: [Magnitudes; 2], weight: Magnitudes) -> bool {
    if P::UNIT_ROUNDOFF == f64::UNIT_ROUNDOFF {
        return true;
    }
    let (least, most) = (P::min_positive_value().as_f64(), P::max_value().as_f64().sqrt());
    let alone = [x, dy, weight].iter().all(|range| range.least >= least && range.most <= most);
    alone && x.least * dy.least >= least && weight.least * x.least.min(dy.least) >= least
}

/// Some of the units of an operator.
#[derive(Clone, Debug)]
pub(super) struct Units {
    pub range: std::ops::Range<usize>,
    total: usize,
}

impl Units {
    pub fn all(total: usize) -> Self {
        Self { range: 0..total, total }
    }

    /// All of them in order, no more than `most` at a time.
    pub fn in_blocks(total: usize, most: usize) -> impl Iterator<Item = Self> {
        (0..total).step_by(most).map(move |start| Self { range: start..total.min(start + most), total })
    }

    fn of<O: Operator>(&self, operator: &O) -> O {
        if self.range.len() == self.total {
            return operator.clone();
        }
        operator.of_units(self.range.len()).expect("an operator whose units are independent")
    }

    pub fn slice<'v, P>(&self, values: ArrayView3<'v, P>) -> ArrayView3<'v, P> {
        values.slice_axis_move(Axis(1), self.range.clone().into())
    }
}

/// The square of the error of sums of which `terms` are the squared terms and `whole` the sums.
fn chained<P: Scalar, D: Dimension>(terms: &Array<P, D>, whole: &Array<P, D>, chain: f64, scale: f64) -> Array<f64, D> {
    let error = |terms: &P, whole: &P| scale * scale * (chain * terms.as_f64() + whole.as_f64().powi(2));
    Zip::from(terms).and(whole).map_collect(error)
}

/// Adds the adjoint of a pair to what others have made, in the shape of x, all of which is to be multiplied by `scale`.
fn add_adjoint_input<O: Operator, P: Scalar>(
    operator: &O,
    x: &O::Input<'_, P>,
    pair: (ArrayView3<'_, P>, ArrayView2<'_, P>),
    scale: f64,
    all: &mut Option<Scaled<ArrayD<P>>>,
) {
    match all {
        Some(all) => operator.add_adjoint_input(x, &[pair], all.values.view_mut()),
        None => *all = Some(Scaled { values: operator.adjoint_input(x, &[pair]).expect("values"), scale }),
    }
}

fn widened<P: Scalar, S: Data<Elem = P>, D: Dimension>(values: &ArrayBase<S, D>, scale: f64) -> Array<f64, D> {
    Zip::from(values).par_map_collect(|value| value.as_f64() * scale)
}

fn squared<P: Scalar>(values: ArrayViewD<'_, f64>, scale: f64, tiny_sq: f64) -> Squared<ArrayD<P>> {
    let per_scale = 1.0 / scale;
    let tiny_sq = tiny_sq * per_scale * per_scale;
    let [mut narrow, mut squares] = [0; 2].map(|_| ArrayD::zeros(values.raw_dim()));
    Zip::from(&mut narrow).and(&mut squares).and(&values).par_for_each(|narrow, square, value| {
        let value = value * per_scale;
        (*narrow, *square) = (P::from_f64(value), P::from_f64(value * value + tiny_sq));
    });
    Squared { values: narrow, squares }
}
