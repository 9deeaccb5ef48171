//! Squares that products of the low-rank pair are made of, as matrices of low rank themselves: what is added up of them
//! costs no product as large as the weight's. SPEC.md, section 8.5.

use super::operands::{Operands, Scaled};
use crate::Scalar;
use crate::matmul::{Accumulate, product_into};
use crate::operators::{Operator, channel_products, group_slice, mix_into};
use crate::wora::{NormAxis, Workspace};
use ndarray::{Array1, Array2, Array3, ArrayD, ArrayView2, ArrayView3, Axis, Ix3, Zip};

/// A weight of a rank is rounded up to so much of the largest of its row: what is added up of squares may not vanish.
const LEAST: f64 = 1e-30;

/// `D^2`, `B^2 A^2` and 1, `[units, fan_in]`, for every group of units b a: some of the ranks belong to each.
pub(super) struct LowRank {
    /// `[groups * ranks, fan_in]`: products of two rows of A, squares of its rows, and a number
    a: Array2<f64>,
    /// `[units, ranks]`
    b: Array2<f64>,
    groups: usize,
    /// So many ranks of a group, the first, make up `D^2`, and so many after them `B^2 A^2`.
    pairs: usize,
    squares: usize,
    /// `D^2` itself, where it has too many ranks.
    whole: Option<Array2<f64>>,
}

/// What the three are multiplied by before they are added up: one number each a unit, or an input.
pub(super) struct Weights {
    pub delta: Array1<f64>,
    pub terms: Array1<f64>,
    pub ones: Array1<f64>,
}

/// `op2(x~^2, a)`, or with norms of columns `b^T dy^2`.
pub(super) struct Channels<P> {
    /// `[outer, groups * ranks, inner]`
    ranks: Scaled<Array3<P>>,
    /// `op2(x~^2, D^2)`, `[outer, units, inner]`, where that is as it is
    whole: Option<Scaled<Array3<P>>>,
}

/// `[outer, units, inner]`, of every unit to be multiplied by a number of its own.
pub(super) struct Mixed<P> {
    pub sums: Array3<P>,
    pub scales: Array1<f64>,
}

impl LowRank {
    pub fn new(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>, groups: usize) -> Self {
        let ((units, squares), fan_in) = (b.dim(), a.ncols());
        let is_whole = squares * (squares + 1) > units / groups;
        let pairs: Vec<_> = (0..if is_whole { 0 } else { squares })
            .flat_map(|k| (k..squares).map(move |l| (k, l)))
            .chain((0..squares).map(|k| (k, k)))
            .collect();
        let largest = a.iter().fold(0.0_f64, |most, a| most.max(a.abs())).powi(2);
        let one = if largest > 0.0 { largest } else { 1.0 };
        let mut of_a = Array2::from_elem((groups * (pairs.len() + 1), fan_in), one);
        for (q, mut ranks) in of_a.axis_chunks_iter_mut(Axis(0), pairs.len() + 1).enumerate() {
            for (mut pair, (k, l)) in ranks.rows_mut().into_iter().zip(&pairs) {
                pair.assign(&(&a.row(q * squares + k) * &a.row(q * squares + l)));
            }
        }
        let mut of_b = Array2::from_elem((units, pairs.len() + 1), 1.0 / one);
        for (mut ranks, b) in of_b.rows_mut().into_iter().zip(b.rows()) {
            for (pair, &(k, l)) in ranks.iter_mut().zip(&pairs) {
                *pair = b[k] * b[l] * if k == l { 1.0 } else { 2.0 };
            }
        }
        let whole = is_whole.then(|| {
            let mut product = Array2::zeros((units, fan_in));
            for q in 0..groups {
                let (rows, ranks) = (group_slice(q, groups, units), group_slice(q, groups, a.nrows()));
                let (a, b) = (a.slice_axis(Axis(0), ranks), b.slice_axis(Axis(0), rows));
                product_into(1.0, b, a, Accumulate::Replace, product.slice_axis_mut(Axis(0), rows));
            }
            product.par_mapv_inplace(|delta| delta * delta);
            product
        });
        Self { a: of_a, b: of_b, groups, pairs: pairs.len() - squares, squares, whole }
    }

    /// `None` where they do not keep their digits in P.
    pub fn channels<O: Operator, P: Scalar>(
        &self,
        axis: NormAxis,
        operands: &Operands<'_, O, P>,
    ) -> Option<Channels<P>> {
        if axis == NormAxis::Input {
            let ranks = operands.mixed_inputs(&operands.narrowed(self.b.view())?);
            return Some(Channels { ranks, whole: None });
        }
        let ranks = operands.outputs(&operands.narrowed(self.a.view())?);
        let whole = match &self.whole {
            Some(whole) => Some(operands.outputs(&operands.narrowed(whole.view())?)),
            None => None,
        };
        Some(Channels { ranks, whole })
    }

    /// The sum over every row, or column, of `D^2` times the squared terms of X: `<op2(x~^2, D^2), dy^2>` unit by unit, or
    /// input by input.
    pub fn contracted<O: Operator, P: Scalar>(
        &self,
        axis: NormAxis,
        channels: &Channels<P>,
        operands: &Operands<'_, O, P>,
    ) -> Array1<f64> {
        let mut sums = match axis {
            NormAxis::Output => {
                let dy = operands.dy_sq();
                let mut sums = Array1::zeros(self.b.nrows());
                let Scaled { values: of_ranks, scale } = operands.mixed_terms(&channels.ranks);
                for ((sum, b), terms) in sums.iter_mut().zip(self.b.rows()).zip(of_ranks.rows()) {
                    let pairs = b.iter().zip(terms).take(self.pairs);
                    *sum = scale * pairs.map(|(b, terms)| b * terms.as_f64()).sum::<f64>();
                }
                if let Some(whole) = &channels.whole {
                    let terms = channel_products(dy.values, whole.values.view());
                    sums.zip_mut_with(&terms, |sum, terms| *sum += whole.scale * dy.scale * terms.as_f64());
                }
                sums
            }
            NormAxis::Input => {
                let of_ranks = operands.terms_of(&channels.ranks);
                let mut sums = Array1::zeros(self.a.ncols());
                for (k, (a, terms)) in self.a.rows().into_iter().zip(of_ranks.values.rows()).enumerate() {
                    if k % self.b.ncols() < self.pairs {
                        sums += &(&a * &terms.mapv(|terms| of_ranks.scale * terms.as_f64()));
                    }
                }
                if let Some(whole) = &self.whole {
                    sums += &(whole * &operands.terms_of_dmerged()).sum_axis(Axis(0));
                }
                sums
            }
        };
        // What is small beside the terms of a square may come out below 0.
        sums.mapv_inplace(|sum| sum.max(0.0));
        sums
    }

    /// `op2(x~^2, W)` for the sum W of all three, their rows weighted, and `share B^2 u` beside, weighted as `B^2 A^2` is;
    /// that of `D^2` apart where it is as it is, and not weighted.
    pub fn outputs<P: Scalar>(
        &self,
        Channels { mut ranks, whole }: Channels<P>,
        weights: &Weights,
        (u, share): (ArrayView3<'_, f64>, f64),
        workspace: &Workspace<P>,
    ) -> (Mixed<P>, Option<Scaled<Array3<P>>>) {
        let per_scale = share / ranks.scale;
        for (k, u) in u.axis_iter(Axis(1)).enumerate() {
            let rank = k / self.squares * self.b.ncols() + self.pairs + k % self.squares;
            let mut ranks = ranks.values.index_axis_mut(Axis(1), rank);
            ranks.zip_mut_with(&u, |rank, u| *rank += P::from_f64(per_scale * u));
        }
        let mixed = mix((self.b.view(), self.pairs, self.squares), weights, &ranks, self.groups, workspace);
        (mixed, whole)
    }

    /// `op2*(dy^2, W)` for the sum W of all three, their columns weighted, and `op2*(t, A)` beside, in the shape of x.
    pub fn inputs<O: Operator, P: Scalar>(
        &self,
        channels: &Channels<P>,
        weights: &Weights,
        (operator, x): (&O, &O::Input<'_, f64>),
        operands: &Operands<'_, O, P>,
        (t, a): (ArrayView3<'_, f64>, ArrayView2<'_, f64>),
    ) -> Option<ArrayD<f64>> {
        let ranks = channels.ranks.widened();
        let Weights { delta, terms, ones } = weights;
        let of_input = |(k, j): (usize, usize)| {
            let rank = k % self.b.ncols();
            self.a[[k, j]] * kind(rank, [self.pairs, self.squares], [delta, terms, ones])[j]
        };
        let weighted = Array2::from_shape_fn(self.a.dim(), of_input);
        let whole = self.whole.as_ref().map(|whole| (operands.dy_sq().widened(), whole * delta));
        let mut pairs = vec![(t, a), (ranks.view(), weighted.view())];
        pairs.extend(whole.as_ref().map(|(dy, whole)| (dy.view(), whole.view())));
        operator.adjoint_input(x, &pairs)
    }
}

/// Which of these a rank of a group is weighted by: what is of `D^2`, of `B^2 A^2` or of 1.
fn kind<W>(rank: usize, [pairs, squares]: [usize; 2], [delta, terms, ones]: [W; 3]) -> W {
    if rank < pairs {
        delta
    } else if rank < pairs + squares {
        terms
    } else {
        ones
    }
}

/// `mix(b, u)`, the ranks of b `[units, ranks]` weighted as those of [`LowRank`] are. No b but of pairs is negative.
pub(super) fn mix<P: Scalar>(
    (b, pairs, squares): (ArrayView2<'_, f64>, usize, usize),
    Weights { delta, terms, ones }: &Weights,
    u: &Scaled<Array3<P>>,
    groups: usize,
    workspace: &Workspace<P>,
) -> Mixed<P> {
    let mut narrow = Array2::zeros(b.dim());
    let mut scales = Array1::zeros(b.nrows());
    let rows = Zip::from(narrow.rows_mut()).and(&mut scales).and(b.rows()).and(delta).and(terms).and(ones);
    rows.par_for_each(|mut narrow, scale, b, &delta, &terms, &ones| {
        let weighted = |(k, &b): (usize, &f64)| kind(k, [pairs, squares], [delta, terms, ones]) * b;
        let largest = b.iter().enumerate().map(weighted).fold(0.0_f64, |most, b| most.max(b.abs()));
        let divisor = if largest > 0.0 { largest } else { 1.0 };
        for (k, (narrow, b)) in narrow.iter_mut().zip(b.iter().enumerate().map(weighted)).enumerate() {
            let b = b / divisor;
            *narrow = P::from_f64(if k >= pairs && b > 0.0 { b.max(LEAST) } else { b });
        }
        *scale = divisor * u.scale;
    });
    let mut sums = workspace.array(Ix3(u.values.len_of(Axis(0)), b.nrows(), u.values.len_of(Axis(2))));
    mix_into(sums.view_mut(), narrow.view(), u.values.view(), groups);
    Mixed { sums, scales }
}
