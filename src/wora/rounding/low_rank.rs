//! Squares that products of the low-rank pair are made of, as matrices of low rank themselves: what is added up of them
//! costs no product as large as the weight's. SPEC.md, section 8.5.

use crate::matmul::{Accumulate, product_into};
use crate::operators::{Operator, channel_products, group_slice, mix_adjoint_input, mix_adjoint_weight, mix_into};
use crate::wora::NormAxis;
use ndarray::{Array1, Array2, Array3, ArrayD, ArrayView2, ArrayView3, Axis, CowArray, Ix3};

/// `[units, fan_in]`, for every group of units b a.
pub(super) struct LowRank {
    /// `[rank, fan_in]`
    a: Array2<f64>,
    /// `[units, rank / groups]`; `None` where a has a row a unit and is the matrix itself.
    b: Option<Array2<f64>>,
}

impl LowRank {
    /// `(B A)^2` element by element: its ranks are pairs of those of B A, unless there would be too many of them.
    pub fn square_of_product(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>, groups: usize) -> Self {
        let (units, rank) = b.dim();
        let pairs = || (0..rank).flat_map(|k| (k..rank).map(move |l| (k, l)));
        if rank * (rank + 1) > units / groups {
            let mut product = Array2::zeros((units, a.ncols()));
            for q in 0..groups {
                let (rows, ranks) = (group_slice(q, groups, units), group_slice(q, groups, a.nrows()));
                let (a, b) = (a.slice_axis(Axis(0), ranks), b.slice_axis(Axis(0), rows));
                product_into(1.0, b, a, Accumulate::Replace, product.slice_axis_mut(Axis(0), rows));
            }
            product.par_mapv_inplace(|delta| delta * delta);
            return Self { a: product, b: None };
        }
        let mut pairs_of_a = Array2::zeros((groups * pairs().count(), a.ncols()));
        let ranks = (0..groups).flat_map(|q| pairs().map(move |(k, l)| (q * rank + k, q * rank + l)));
        for (mut pair, (k, l)) in pairs_of_a.rows_mut().into_iter().zip(ranks) {
            pair.assign(&(&a.row(k) * &a.row(l)));
        }
        let mut pairs_of_b = Array2::zeros((units, pairs().count()));
        for (mut pair, (k, l)) in pairs_of_b.columns_mut().into_iter().zip(pairs()) {
            pair.assign(&(&b.column(k) * &b.column(l)));
            if k != l {
                pair *= 2.0;
            }
        }
        Self { a: pairs_of_a, b: Some(pairs_of_b) }
    }

    /// `B^2 A^2`
    pub fn product_of_squares(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Self {
        Self { a: a.mapv(|a| a * a), b: Some(b.mapv(|b| b * b)) }
    }

    /// 1 in every element.
    pub fn ones(units: usize, fan_in: usize, groups: usize) -> Self {
        Self { a: Array2::ones((groups, fan_in)), b: Some(Array2::ones((units, 1))) }
    }

    /// With every row, or column, multiplied by a number of its own.
    pub fn scaled(&self, axis: NormAxis, scales: &Array1<f64>) -> Self {
        let Self { a, b } = self;
        let by_row = scales.view().insert_axis(Axis(1));
        match (axis, b) {
            (NormAxis::Output, Some(b)) => Self { a: a.clone(), b: Some(b * &by_row) },
            (NormAxis::Output, None) => Self { a: a * &by_row, b: None },
            (NormAxis::Input, b) => Self { a: a * scales, b: b.clone() },
        }
    }

    /// The sum over every row, or column, of its product with `op*(x, dy)`: `<op(x, this), dy>` unit by unit, or input by
    /// input.
    pub fn contracted<O: Operator>(
        &self,
        axis: NormAxis,
        operator: &O,
        x: &O::Input<'_, f64>,
        dy: ArrayView3<'_, f64>,
    ) -> Array1<f64> {
        match axis {
            NormAxis::Output => {
                let u = operator.apply(x, &[self.a.view()]).swap_remove(0);
                match &self.b {
                    Some(b) => (b * &mix_adjoint_weight(dy, u.view(), operator.groups())).sum_axis(Axis(1)),
                    None => channel_products(dy, u.view()),
                }
            }
            NormAxis::Input => {
                (&self.a * &operator.adjoint_weight(x, self.channels(dy, operator.groups()).view())).sum_axis(Axis(0))
            }
        }
    }

    /// Every element: `[units, fan_in]`.
    #[cfg(test)]
    pub fn whole(&self, groups: usize) -> Array2<f64> {
        let Some(b) = &self.b else { return self.a.clone() };
        let of_unit = |i: usize, j: usize| {
            let first = i / (b.nrows() / groups) * b.ncols();
            (0..b.ncols()).map(|k| b[[i, k]] * self.a[[first + k, j]]).sum()
        };
        Array2::from_shape_fn((b.nrows(), self.a.ncols()), |(i, j)| of_unit(i, j))
    }

    /// dy as it reaches a: `[outer, rank, inner]`.
    fn channels<'v>(&self, dy: ArrayView3<'v, f64>, groups: usize) -> CowArray<'v, f64, Ix3> {
        self.b.as_ref().map_or_else(|| dy.into(), |b| mix_adjoint_input(b.view(), dy, groups).into())
    }
}

/// `y += op(x, W)` of the sum of all W: y `[outer, units, inner]`.
pub(super) fn add_outputs<O: Operator>(all: &[LowRank], operator: &O, x: &O::Input<'_, f64>, y: &mut Array3<f64>) {
    let a: Vec<_> = all.iter().map(|one| one.a.view()).collect();
    for (one, u) in all.iter().zip(operator.apply(x, &a)) {
        match &one.b {
            Some(b) => mix_into(y.view_mut(), b.view(), u.view(), operator.groups()),
            None => *y += &u,
        }
    }
}

/// `op*(dy, W)` of the sum of all W, and `op*(t, A)` beside, in the shape of x; `None` for ids.
pub(super) fn inputs<O: Operator>(
    all: &[LowRank],
    operator: &O,
    x: &O::Input<'_, f64>,
    dy: ArrayView3<'_, f64>,
    (t, a): (ArrayView3<'_, f64>, Array2<f64>),
) -> Option<ArrayD<f64>> {
    let channels: Vec<_> = all.iter().map(|one| one.channels(dy, operator.groups())).collect();
    let mut pairs = vec![(t, a.view())];
    pairs.extend(channels.iter().zip(all).map(|(t, one)| (t.view(), one.a.view())));
    operator.adjoint_input(x, &pairs)
}
