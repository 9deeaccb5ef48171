//! What large products are computed of: x, dy and their squares, in f32 where no product of two of them leaves its
//! range. How far off a result may be need be known to three digits, and f32 is twice as fast.

use crate::Scalar;
use crate::operators::{Input, Operator};
use crate::simd::magnitudes;
use crate::wora::{Cache, Workspace};
use ndarray::{
    Array, Array2, Array3, ArrayD, ArrayView, ArrayView2, ArrayView3, ArrayViewD, ArrayViewMut3, Axis, Dimension, Ix2,
    Ix3, Zip,
};
use rayon::prelude::*;

/// The smallest magnitude but 0, and the largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Magnitudes {
    pub least: f64,
    pub most: f64,
}

impl Magnitudes {
    pub const NONE: Self = Self { least: f64::INFINITY, most: 0.0 };

    pub fn of(values: &[f64]) -> Self {
        let [least, most] = magnitudes(values);
        Self { least, most }
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
        if self.most == 0.0 { 1.0 } else { 2.0_f64.powi(self.most.log2().floor().clamp(-1000.0, 1000.0) as i32) }
    }

    /// Of the squares.
    pub fn squared(self) -> Self {
        Self { least: self.least.powi(2), most: self.most.powi(2) }
    }

    /// Of what is divided by its [`Magnitudes::scale`].
    fn scaled(self) -> Self {
        let scale = self.scale();
        Self { least: self.least / scale, most: self.most / scale }
    }
}

/// Values divided by a power of two, and their squares.
struct Squared<V> {
    values: V,
    squares: V,
}

/// x and dy, in the type that products are computed in. What is returned has been multiplied by the scales again.
pub(super) struct Operands<O: Operator, P: Scalar> {
    operator: O,
    /// With every factor squared.
    squared: O,
    /// `x~`, and beside a mask x.
    inputs: Vec<Squared<O::Input<'static, P>>>,
    dy: Option<Squared<Array3<P>>>,
    x_scale: f64,
    dy_scale: f64,
    range: [Magnitudes; 2],
    /// What products of some units leave to those of the next.
    workspace: Workspace<P>,
}

impl<O: Operator, P: Scalar> Operands<O, P> {
    /// `dy` in the shape of P: `[outer, units, inner]`.
    pub fn new(operator: &O, cache: &Cache<'_, O, f64>, dy: Option<ArrayView3<'_, f64>>) -> Self {
        let inputs = [Some(cache.adapted_input()), cache.dropped.as_ref().map(|_| &cache.x)];
        let inputs: Vec<_> = inputs.into_iter().flatten().collect();
        let values = || inputs.iter().filter_map(|x| x.values());
        let of_x = values().fold(Magnitudes::NONE, |range, values| range.and(Magnitudes::of_array(values)));
        let of_dy = dy.map_or(Magnitudes::NONE, Magnitudes::of_array);
        let (x_scale, dy_scale) = (of_x.scale(), of_dy.scale());
        let ids = |x: &O::Input<'_, f64>| x.ids().and_then(|ids| O::Input::from_ids(ids.to_owned())).expect("ids");
        let of = |x: &O::Input<'_, f64>| match x.values() {
            None => Squared { values: ids(x), squares: ids(x) },
            Some(x) => {
                let Squared { values, squares } = squared(x, x_scale);
                let input = |values| O::Input::from_values(values).expect("values");
                Squared { values: input(values), squares: input(squares) }
            }
        };
        let with_units = |values: ArrayD<P>| values.into_dimensionality::<Ix3>().expect("[outer, units, inner]");
        let dy = dy.map(|dy| {
            let Squared { values, squares } = squared(dy.into_dyn(), dy_scale);
            Squared { values: with_units(values), squares: with_units(squares) }
        });
        Self {
            operator: operator.power(1),
            squared: operator.power(2),
            inputs: inputs.into_iter().map(of).collect(),
            dy,
            x_scale,
            dy_scale,
            range: [of_x, of_dy],
            workspace: Workspace::default(),
        }
    }

    /// Whether all products of two squares, of x, of dy and of what lies within `weight`, keep their digits in P.
    pub fn fit(&self, weight: Magnitudes) -> bool {
        if P::UNIT_ROUNDOFF == f64::UNIT_ROUNDOFF {
            return true;
        }
        let (least, most) = (P::min_positive_value().as_f64(), P::max_value().as_f64().sqrt());
        let [x, dy] = self.range.map(|range| range.scaled().squared());
        let ranges = [x, dy, weight];
        let alone = ranges.iter().all(|range| range.least >= least && range.most <= most);
        alone && x.least * dy.least >= least && weight.least * x.least.min(dy.least) >= least
    }

    /// `y += op2(x~^2, W)` for the W of some units: y `[outer, units, inner]`.
    pub fn add_outputs(&self, units: &Units, weight: ArrayView2<'_, P>, y: ArrayViewMut3<'_, f64>) {
        let scale = self.x_scale.powi(2);
        let mut y = units.slice_mut(y);
        let mut sums = self.workspace.array(y.raw_dim());
        units.of(&self.squared).apply_into(&self.inputs[0].squares, &[weight], vec![sums.view_mut()]);
        y.axis_iter_mut(Axis(0)).into_par_iter().zip(sums.axis_iter(Axis(0))).for_each(|(mut y, sums)| {
            y.zip_mut_with(&sums, |y, &sum| *y += sum.as_f64() * scale);
        });
        self.workspace.recycle(sums);
    }

    /// `l op2(x^2, W^2) + op(x, W)^2`, for `x~` and for x, of the whole W.
    pub fn outputs_of_both(&self, weight: ArrayView2<'_, P>, chain: f64) -> Array3<f64> {
        let weight_sq = weight.mapv(|w| w * w);
        let of = |x: &Squared<O::Input<'static, P>>| {
            let terms = self.squared.apply(&x.squares, &[weight_sq.view()]).swap_remove(0);
            let whole = self.operator.apply(&x.values, &[weight]).swap_remove(0);
            chained(&terms, &whole, chain, self.x_scale)
        };
        self.inputs.iter().map(of).reduce(|sum, one| sum + one).expect("an input")
    }

    /// `dx += op2*(dy^2, W)` for the W of some units, in the shape of x.
    pub fn add_inputs(&self, units: &Units, weight: ArrayView2<'_, P>, dx: &mut ArrayD<f64>) {
        let (scale, dy_sq) = (self.dy_scale.powi(2), units.slice(self.dy().squares.view()));
        let mut sums = self.workspace.array(dx.raw_dim());
        units.of(&self.squared).adjoint_input_into(&self.inputs[0].squares, &[(dy_sq, weight)], sums.view_mut());
        Zip::from(dx).and(&sums).par_for_each(|dx, &sum| *dx += sum.as_f64() * scale);
        self.workspace.recycle(sums);
    }

    /// `l op2*(dy^2, W^2) + op*(dy, W)^2`, in the shape of x, of the whole W.
    pub fn inputs_of_both(&self, weight: ArrayView2<'_, P>, chain: f64) -> ArrayD<f64> {
        let (dy, x) = (self.dy(), &self.inputs[0]);
        let weight_sq = weight.mapv(|w| w * w);
        let terms = self.squared.adjoint_input(&x.squares, &[(dy.squares.view(), weight_sq.view())]);
        let whole = self.operator.adjoint_input(&x.values, &[(dy.values.view(), weight)]);
        chained(&terms.expect("values"), &whole.expect("values"), chain, self.dy_scale)
    }

    /// `X = op*(x~, dy)` and `op2*(x~^2, dy^2)` for some units, `[units, fan_in]`, each with what it is to be multiplied
    /// by.
    pub fn weights(&self, units: &Units) -> [(Array2<P>, f64); 2] {
        self.weights_of(units, &self.inputs[0])
    }

    /// The same of all units, summed up as `l op2*(x^2, dy^2) + op*(x, dy)^2` for `x~` and for x.
    pub fn weights_of_both(&self, chain: f64) -> Array2<f64> {
        let of = |x| {
            let [(whole, scale), (terms, _)] = self.weights_of(&Units::all(self.operator.units()), x);
            chained(&terms, &whole, chain, scale)
        };
        self.inputs.iter().map(of).reduce(|sum, one| sum + one).expect("an input")
    }

    fn weights_of(&self, units: &Units, x: &Squared<O::Input<'static, P>>) -> [(Array2<P>, f64); 2] {
        let (dy, scale) = (self.dy(), self.x_scale * self.dy_scale);
        let of = |operator: &O, x: &O::Input<'_, P>, dy: ArrayView3<'_, P>| {
            let mut sums = self.workspace.array(Ix2(units.range.len(), operator.fan_in()));
            units.of(operator).adjoint_weight_into(x, units.slice(dy), sums.view_mut());
            sums
        };
        let whole = of(&self.operator, &x.values, dy.values.view());
        let terms = of(&self.squared, &x.squares, dy.squares.view());
        [(whole, scale), (terms, scale * scale)]
    }

    /// Leaves what [`Operands::weights`] has returned to the next units.
    pub fn recycle(&self, weights: [(Array2<P>, f64); 2]) {
        weights.into_iter().for_each(|(weights, _)| self.workspace.recycle(weights));
    }

    fn dy(&self) -> &Squared<Array3<P>> {
        self.dy.as_ref().expect("a cotangent")
    }
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

    fn slice<'v, P>(&self, values: ArrayView3<'v, P>) -> ArrayView3<'v, P> {
        values.slice_axis_move(Axis(1), self.range.clone().into())
    }

    fn slice_mut<'v, P>(&self, values: ArrayViewMut3<'v, P>) -> ArrayViewMut3<'v, P> {
        values.slice_axis_move(Axis(1), self.range.clone().into())
    }
}

/// The square of the error of sums of which `terms` are the squared terms and `whole` the sums.
fn chained<P: Scalar, D: Dimension>(terms: &Array<P, D>, whole: &Array<P, D>, chain: f64, scale: f64) -> Array<f64, D> {
    let error = |terms: &P, whole: &P| scale * scale * (chain * terms.as_f64() + whole.as_f64().powi(2));
    Zip::from(terms).and(whole).map_collect(error)
}

fn squared<P: Scalar>(values: ArrayViewD<'_, f64>, scale: f64) -> Squared<ArrayD<P>> {
    Squared {
        values: Zip::from(&values).par_map_collect(|value| P::from_f64(value / scale)),
        squares: Zip::from(&values).par_map_collect(|value| P::from_f64((value / scale).powi(2))),
    }
}
