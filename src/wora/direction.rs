//! The norms `||V_i||` and gains `g_i = m_i / (||V_i|| + eps)` without forming V, and the adjoint of the
//! norm. SPEC.md, section 5.
//!
//! With `norm_axis = "input"` the same lines run on the transposed factors: the columns of
//! `beta W0 + alpha s B A` are the rows of `beta W0^T + alpha s A^T B^T`.

use super::watch::Watch;
use super::{Config, ZeroNorm};
use crate::matmul::{Accumulate, PARALLEL_FLOPS, product, product_into};
use crate::operators::group_slice;
use crate::simd::{contiguous, dot};
use crate::{Error, Result, Scalar};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis, Slice, Zip};
use rayon::prelude::*;

/// Below this fraction of the sum of its absolute terms, the factored `||V_i||^2` is not trusted and the
/// norm is taken of the row itself. At 1/4 a norm has lost two bits to cancellation. SPEC.md, section 5.2.
pub const CANCELLATION: f64 = 0.25;

/// `V = beta base + alpha s left right`, one norm a row.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a, T> {
    /// `[rows, columns]`
    pub base: ArrayView2<'a, T>,
    /// `[rows, rank / groups]`
    pub left: ArrayView2<'a, T>,
    /// `[rank, columns]`
    pub right: ArrayView2<'a, T>,
    /// Row i uses the rows of `right` that belong to its group.
    pub groups: usize,
    /// `||base_i||^2`: `[rows]`
    pub base_sq: ArrayView1<'a, T>,
    pub alpha: T,
    pub beta: T,
    pub scaling: T,
}

/// Everything about the norms that forward and backward share.
#[doc = include_str!("../../docs/direction.md")]
#[derive(Clone, Debug)]
pub struct Direction<T> {
    /// `||V_i||`: `[rows]`
    pub norm: Array1<T>,
    /// `n_i = ||V_i|| + eps`, which divides; 0 where `||V_i|| = 0`: `[rows]`
    pub weight_norm: Array1<T>,
    /// `g_i = m_i / n_i`, 0 where `||V_i|| = 0`: `[rows]`
    pub gain: Array1<T>,
    /// `base_i right^T`: `[rows, rank / groups]`
    cross: Array2<T>,
    /// `left_i (right right^T)`: `[rows, rank / groups]`
    mixed: Array2<T>,
    /// `<base_i, delta_i>`: `[rows]`
    base_delta: Array1<T>,
    /// `||delta_i||^2`: `[rows]`
    delta_sq: Array1<T>,
}

/// What the gradient through the norm adds to the factors' gradients.
pub(crate) struct NormPath<T> {
    pub d_left: Array2<T>,
    pub d_right: Array2<T>,
    pub dalpha: T,
    pub dbeta: T,
}

impl<'a, T: Scalar> Factors<'a, T> {
    /// The factors of one group, and which rows they are.
    fn group(&self, q: usize) -> (Factors<'a, T>, Slice) {
        let rows = group_slice(q, self.groups, self.base.nrows());
        let mut of_group = Factors { groups: 1, ..*self };
        of_group.base.slice_axis_inplace(Axis(0), rows);
        of_group.left.slice_axis_inplace(Axis(0), rows);
        of_group.right.slice_axis_inplace(Axis(0), group_slice(q, self.groups, self.right.nrows()));
        of_group.base_sq.slice_axis_inplace(Axis(0), rows);
        (of_group, rows)
    }

    /// `||V_i||` from the row itself, scaled so that no square overflows or vanishes.
    fn norm_of_row(&self, i: usize) -> T {
        let rows = self.base.nrows() / self.groups;
        let (of_group, _) = self.group(i / rows);
        let i = i % rows;
        let mut row = of_group.base.row(i).map(|&w| self.beta * w);
        for (&b, a) in of_group.left.row(i).iter().zip(of_group.right.rows()) {
            row.scaled_add(self.alpha * self.scaling * b, &a);
        }
        norm(row.view())
    }
}

/// The Euclidean norm, scaled by the largest element.
pub(crate) fn norm<T: Scalar>(row: ArrayView1<'_, T>) -> T {
    let largest =
        row.iter().fold(T::zero(), |largest, v| if v.abs() > largest || v.is_nan() { v.abs() } else { largest });
    if largest == T::zero() || !largest.is_finite() {
        return largest;
    }
    largest * row.iter().fold(T::zero(), |sum, &v| sum + (v / largest) * (v / largest)).sqrt()
}

/// `||W_i||^2` of every row, in one walk over W in the order in which it lies.
pub(crate) fn squared_norms<T: Scalar>(rows: ArrayView2<'_, T>) -> Array1<T> {
    if rows.strides()[1] == 1 {
        let rows: Vec<_> = rows.outer_iter().collect();
        let of_row = |row| {
            let row = contiguous(row);
            dot(&row, &row)
        };
        return rows.into_par_iter().map(of_row).collect::<Vec<_>>().into();
    }
    let mut sums = Array1::zeros(rows.nrows());
    for column in rows.columns() {
        Zip::from(&mut sums).and(column).for_each(|sum, &w| *sum += w * w);
    }
    sums
}

/// `n = ||V|| + eps`, 0 where `||V|| = 0`. E10
///
/// # Errors
///
/// A norm of 0, unless `zero_norm` says otherwise (C5); a norm that overflows (C2).
pub(crate) fn weight_norm<T: Scalar>(norm: ArrayView1<'_, T>, config: &Config) -> Result<Array1<T>> {
    let eps = T::from_f64(config.norm_eps);
    for (unit, &norm) in norm.iter().enumerate() {
        if !norm.is_finite() {
            let (tensor, index, found) = ("weight_norm".into(), vec![unit], norm.as_f64());
            return Err(Error::NotFinite { tensor, index, found }); // C2
        }
        if norm == T::zero() && config.zero_norm == ZeroNorm::Error {
            return Err(Error::ZeroNorm { unit }); // C5
        }
    }
    Ok(norm.mapv(|norm| if norm == T::zero() { norm } else { norm + eps })) // E10
}

impl<T: Scalar> Direction<T> {
    /// Norms and gains of the factors. `magnitude` is m: `[rows]`.
    ///
    /// # Errors
    ///
    /// A row with `||V_i|| = 0`, unless `zero_norm` says otherwise (C5); a norm that overflows (C2).
    pub(crate) fn new(factors: &Factors<'_, T>, magnitude: ArrayView1<'_, T>, config: &Config) -> Result<Self> {
        let (rows, rank) = factors.left.dim();
        let (mut cross, mut mixed) = (Array2::zeros((rows, rank)), Array2::zeros((rows, rank)));
        let mut delta_terms = Array1::zeros(rows);
        for q in 0..factors.groups {
            let (f, range) = factors.group(q);
            let gram = product(f.right, f.right.t());
            let of_ranks = |left: ArrayView1<'_, T>| {
                left.iter().zip(gram.diag()).fold(T::zero(), |sum, (&l, &a_sq)| sum + l * l * a_sq)
            };
            delta_terms.slice_axis_mut(Axis(0), range).assign(&f.left.map_axis(Axis(1), of_ranks));
            product_into(T::one(), f.base, f.right.t(), Accumulate::Replace, cross.slice_axis_mut(Axis(0), range));
            product_into(T::one(), f.left, gram.view(), Accumulate::Replace, mixed.slice_axis_mut(Axis(0), range));
        }
        let row_dots = |a: &Array2<T>| Zip::from(factors.left.rows()).and(a.rows()).map_collect(|left, a| left.dot(&a));
        let (base_delta, delta_sq) = (row_dots(&cross), row_dots(&mixed));

        let (beta, gamma) = (factors.beta, factors.alpha * factors.scaling);
        let two = T::one() + T::one();
        let threshold = T::from_f64(CANCELLATION);
        let squares = Zip::from(factors.base_sq).and(&base_delta).and(&delta_sq).and(&delta_terms);
        let factored: Array1<Option<T>> = squares.map_collect(|&base_sq, &base_delta, &delta_sq, &delta_terms| {
            let terms = [beta * beta * base_sq, two * beta * gamma * base_delta, gamma * gamma * delta_sq];
            let sum = terms[0] + terms[1] + terms[2]; // E14
            let of_delta = terms[2].abs().max(gamma * gamma * delta_terms);
            let trusted = sum.is_normal() && sum >= threshold * (terms[0].abs() + terms[1].abs() + of_delta);
            trusted.then(|| sum.sqrt())
        });
        let direct = factored.iter().filter(|norm| norm.is_none()).count();
        let one = |(i, norm): (usize, &Option<T>)| norm.unwrap_or_else(|| factors.norm_of_row(i));
        let norm: Vec<T> = if 2 * direct * factors.base.ncols() * (rank + 1) >= PARALLEL_FLOPS {
            factored.as_slice().expect("a fresh array").par_iter().enumerate().map(one).collect()
        } else {
            factored.iter().enumerate().map(one).collect()
        };
        let norm = Array1::from(norm);

        let weight_norm = weight_norm(norm.view(), config)?;
        let gain = Self::gain(magnitude, weight_norm.view());
        Ok(Self { norm, weight_norm, gain, cross, mixed, base_delta, delta_sq })
    }

    /// What `||V||^2` is made of, and what comes of it.
    pub(crate) fn show(&self, factors: &Factors<'_, T>, watch: &mut Watch<'_, T>) {
        watch("E14", "||W0||^2", &|| factors.base_sq.to_owned().into_dyn());
        watch("E14", "<W0, BA>", &|| self.base_delta.clone().into_dyn());
        watch("E14", "||BA||^2", &|| self.delta_sq.clone().into_dyn());
        watch("E14", "||V||", &|| self.norm.clone().into_dyn());
        watch("E11", "g", &|| self.gain.clone().into_dyn());
    }

    /// `g = m / n`, 0 where there is no direction. E11
    pub(crate) fn gain(magnitude: ArrayView1<'_, T>, weight_norm: ArrayView1<'_, T>) -> Array1<T> {
        Zip::from(magnitude).and(weight_norm).map_collect(|&m, &n| if n == T::zero() { n } else { m / n }) // E11
    }

    /// `dm = c / n` from the gradient c of the gain; 0 where there is no direction. E28
    pub(crate) fn dmagnitude(&self, dgain: ArrayView1<'_, T>) -> Array1<T> {
        Self::gain(dgain, self.weight_norm.view()) // E28
    }

    /// `k_i` such that the loss's gradient through the norm is `dV_i = k_i V_i`. E31
    pub(crate) fn norm_weight(&self, dgain: ArrayView1<'_, T>) -> Array1<T> {
        Zip::from(dgain).and(&self.gain).and(&self.norm).and(&self.weight_norm).map_collect(|&c, &g, &norm, &n| {
            if norm == T::zero() { T::zero() } else { -(c / n) * (g / norm) } // E31
        })
    }

    /// Fails where a square that the gradient through the norm is made of leaves the range of the type. C11
    pub(crate) fn check_squares(&self, factors: &Factors<'_, T>) -> Result<()> {
        let fits = |unit: usize| {
            let (norm, squares) = (self.norm[unit], factors.base_sq[unit] + self.delta_sq[unit]);
            norm == T::zero() || ((norm * norm).is_normal() && squares.is_finite())
        };
        match (0..self.norm.len()).find(|&unit| !fits(unit)) {
            None => Ok(()),
            Some(unit) => Err(Error::Range { unit, found: self.norm[unit].as_f64(), number: T::NAME }),
        }
    }

    /// `V right^T`: `[rows, rank / groups]`
    pub(crate) fn weighted_right(&self, factors: &Factors<'_, T>) -> Array2<T> {
        &self.cross * factors.beta + &self.mixed * (factors.alpha * factors.scaling)
    }

    /// What `dV = diag(k) V` adds to the gradients of left, right, alpha and beta.
    pub(crate) fn adjoint(&self, k: ArrayView1<'_, T>, factors: &Factors<'_, T>) -> NormPath<T> {
        let (beta, gamma) = (factors.beta, factors.alpha * factors.scaling);
        let mut path = NormPath {
            d_left: Array2::zeros(factors.left.dim()),
            d_right: Array2::zeros(factors.right.dim()),
            dalpha: T::zero(),
            dbeta: T::zero(),
        };
        for (i, &k) in k.iter().enumerate() {
            path.dalpha += factors.scaling * k * (beta * self.base_delta[i] + gamma * self.delta_sq[i]); // E32
            path.dbeta += k * (beta * factors.base_sq[i] + gamma * self.base_delta[i]); // E33
        }
        path.d_left.assign(&(self.weighted_right(factors) * k.insert_axis(Axis(1)) * gamma)); // E34
        for q in 0..factors.groups {
            let (f, range) = factors.group(q);
            let k_left = &f.left * &k.slice_axis(Axis(0), range).insert_axis(Axis(1));
            let d_right = path.d_right.slice_axis_mut(Axis(0), group_slice(q, factors.groups, factors.right.nrows()));
            add_weighted(gamma, k_left.t(), &f, d_right); // E35
        }
        path
    }

    /// What `dV = diag(k) V` adds to the gradient of base. E36
    pub(crate) fn adjoint_base(
        &self,
        k: ArrayView1<'_, T>,
        factors: &Factors<'_, T>,
        mut d_base: ArrayViewMut2<'_, T>,
    ) {
        for q in 0..factors.groups {
            let (f, range) = factors.group(q);
            let mut d_base = d_base.slice_axis_mut(Axis(0), range);
            let k_beta = k.slice_axis(Axis(0), range).mapv(|k| k * f.beta).insert_axis(Axis(1));
            let k_left = &f.left * &k_beta;
            product_into(f.alpha * f.scaling, k_left.view(), f.right, Accumulate::Add, d_base.view_mut()); // E36
            Zip::from(&mut d_base)
                .and(f.base)
                .and_broadcast(&k_beta)
                .for_each(|d, &w, &k_beta| *d += k_beta * f.beta * w); // E36
        }
    }
}

/// `out += scale left (beta base + gamma f.left f.right)`, for `left` `[rank, rows]`, without forming V.
fn add_weighted<T: Scalar>(scale: T, left: ArrayView2<'_, T>, f: &Factors<'_, T>, mut out: ArrayViewMut2<'_, T>) {
    let gamma = f.alpha * f.scaling;
    product_into(scale * f.beta, left, f.base, Accumulate::Add, out.view_mut());
    let square = product(left, f.left);
    product_into(scale * gamma, square.view(), f.right, Accumulate::Add, out);
}
