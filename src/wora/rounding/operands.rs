//! What large products are computed of: x, dy and their squares, in f32 where no product of two of them leaves its
//! range. How far off a result may be need be known to three digits, and f32 is twice as fast.

use crate::Scalar;
use crate::operators::{Input, Operator};
use crate::wora::Cache;
use ndarray::{Array2, Array3, ArrayD, ArrayView2, ArrayViewD, Ix3};

/// The smallest magnitude but 0, and the largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Range {
    pub least: f64,
    pub most: f64,
}

impl Range {
    pub const NONE: Self = Self { least: f64::INFINITY, most: 0.0 };

    pub fn of<'v>(values: impl IntoIterator<Item = &'v f64>) -> Self {
        values.into_iter().fold(Self::NONE, |range, value| range.with(value.abs()))
    }

    /// With a magnitude more.
    pub fn with(self, magnitude: f64) -> Self {
        let least = if magnitude > 0.0 && magnitude < self.least { magnitude } else { self.least };
        Self { least, most: if magnitude > self.most { magnitude } else { self.most } }
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

    /// Of what is divided by its [`Range::scale`].
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
    range: [Range; 2],
}

impl<O: Operator, P: Scalar> Operands<O, P> {
    /// `dy` in the shape of P: `[outer, units, inner]`.
    pub fn new(operator: &O, cache: &Cache<'_, O, f64>, dy: Option<&Array3<f64>>) -> Self {
        let inputs = [Some(cache.adapted_input()), cache.dropped.as_ref().map(|_| &cache.x)];
        let inputs: Vec<_> = inputs.into_iter().flatten().collect();
        let values = || inputs.iter().filter_map(|x| x.values());
        let of_x = values().fold(Range::NONE, |range, values| range.and(Range::of(&values)));
        let of_dy = dy.map_or(Range::NONE, Range::of);
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
            let Squared { values, squares } = squared(dy.view().into_dyn(), dy_scale);
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
        }
    }

    /// Whether all products of two squares, of x, of dy and of what lies within `weight`, keep their digits in P.
    pub fn fit(&self, weight: Range) -> bool {
        if P::UNIT_ROUNDOFF == f64::UNIT_ROUNDOFF {
            return true;
        }
        let (least, most) = (P::min_positive_value().as_f64(), P::max_value().as_f64().sqrt());
        let [x, dy] = self.range.map(|range| range.scaled().squared());
        let ranges = [x, dy, weight];
        let alone = ranges.iter().all(|range| range.least >= least && range.most <= most);
        alone && x.least * dy.least >= least && weight.least * x.least.min(dy.least) >= least
    }

    /// `op2(x~^2, W)` with every factor squared: `[outer, units, inner]`.
    pub fn outputs(&self, weight: ArrayView2<'_, P>) -> Array3<f64> {
        self.apply(&self.squared, &self.inputs[0].squares, weight, self.x_scale.powi(2))
    }

    /// `l op2(x^2, W^2) + op(x, W)^2`, for `x~` and for x.
    pub fn outputs_of_both(&self, weight: ArrayView2<'_, P>, chain: f64) -> Array3<f64> {
        let weight_sq = weight.mapv(|w| w * w);
        let of = |x: &Squared<O::Input<'static, P>>| {
            let terms = self.apply(&self.squared, &x.squares, weight_sq.view(), self.x_scale.powi(2) * chain);
            terms + self.apply(&self.operator, &x.values, weight, self.x_scale).mapv_into(|whole| whole * whole)
        };
        self.inputs.iter().map(of).reduce(|sum, one| sum + one).expect("an input")
    }

    fn apply(&self, operator: &O, x: &O::Input<'_, P>, weight: ArrayView2<'_, P>, scale: f64) -> Array3<f64> {
        operator.apply(x, &[weight]).swap_remove(0).mapv(|sum| sum.as_f64() * scale)
    }

    /// `op2*(dy^2, W)`, in the shape of x.
    pub fn inputs(&self, weight: ArrayView2<'_, P>) -> ArrayD<f64> {
        let dy = self.dy();
        let sums = self.squared.adjoint_input(&self.inputs[0].squares, &[(dy.squares.view(), weight)]);
        let scale = self.dy_scale.powi(2);
        sums.expect("values").mapv(|sum| sum.as_f64() * scale)
    }

    /// `l op2*(dy^2, W^2) + op*(dy, W)^2`, in the shape of x.
    pub fn inputs_whole(&self, weight: ArrayView2<'_, P>, chain: f64) -> ArrayD<f64> {
        let whole = self.operator.adjoint_input(&self.inputs[0].values, &[(self.dy().values.view(), weight)]);
        let scale = self.dy_scale;
        self.inputs(weight.mapv(|w| w * w).view()) * chain
            + whole.expect("values").mapv(|sum| (sum.as_f64() * scale).powi(2))
    }

    /// `X = op*(x~, dy)` and `op2*(x~^2, dy^2)`, `[units, fan_in]`, each with what it is to be multiplied by.
    pub fn weights(&self) -> [(Array2<P>, f64); 2] {
        self.weights_of(&self.inputs[0])
    }

    /// The same, summed up as `l op2*(x^2, dy^2) + op*(x, dy)^2` for `x~` and for x.
    pub fn weights_of_both(&self, chain: f64) -> Array2<f64> {
        let of = |x| {
            let [(whole, scale), (terms, scale_sq)] = self.weights_of(x);
            terms.mapv(|sum| sum.as_f64() * scale_sq * chain) + whole.mapv(|sum| (sum.as_f64() * scale).powi(2))
        };
        self.inputs.iter().map(of).reduce(|sum, one| sum + one).expect("an input")
    }

    fn weights_of(&self, x: &Squared<O::Input<'static, P>>) -> [(Array2<P>, f64); 2] {
        let (dy, scale) = (self.dy(), self.x_scale * self.dy_scale);
        let whole = self.operator.adjoint_weight(&x.values, dy.values.view());
        [(whole, scale), (self.squared.adjoint_weight(&x.squares, dy.squares.view()), scale * scale)]
    }

    fn dy(&self) -> &Squared<Array3<P>> {
        self.dy.as_ref().expect("a cotangent")
    }
}

fn squared<P: Scalar>(values: ArrayViewD<'_, f64>, scale: f64) -> Squared<ArrayD<P>> {
    Squared {
        values: values.mapv(|value| P::from_f64(value / scale)),
        squares: values.mapv(|value| P::from_f64((value / scale).powi(2))),
    }
}
