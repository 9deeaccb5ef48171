//! Embedding: `y[n, u] = embed_scale W[u, ids[n]]`, a row of the stored table an id. SPEC.md, section 3.3.

use super::channels::for_each;
use super::{Input, Operator, Term, in_standard_layout};
use crate::{Error, Result, Scalar};
use ndarray::{
    Array2, ArrayD, ArrayView2, ArrayView3, ArrayViewD, ArrayViewMut2, ArrayViewMut3, ArrayViewMutD, Axis, Ix2, Zip,
};
use serde::{Deserialize, Serialize};

/// PyTorch's `nn.Embedding`: ids of any shape, y `[..., embedding_dim]`.
#[doc = include_str!("../../docs/embedding.md")]
///
/// ```
/// use ndarray::array;
/// use woracle::operators::{Embedding, Ids, Operator};
/// let embedding = Embedding { embed_scale: 2.0, ..Embedding::new(3, 2) };
/// let table = array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]; // [num_embeddings, embedding_dim]
/// let ids = Ids::new(&array![2_u8, 0].into_dyn());
/// let y = embedding.apply(&ids, &[table.t()]); // one [2, 2, 1]
/// assert_eq!(y[0].iter().copied().collect::<Vec<_>>(), [10.0, 12.0, 2.0, 4.0]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// Rows of the stored table: ids are below it.
    pub num_embeddings: usize,
    /// Columns of the stored table.
    pub embedding_dim: usize,
    /// The id whose row the lookup sends no gradient to.
    pub padding_idx: Option<usize>,
    /// The lookup's gradient of a row is divided by how often its id occurs.
    pub scale_grad_by_freq: bool,
    /// What the whole output is multiplied by, as Gemma does; 1 elsewhere.
    pub embed_scale: f64,
}

/// Units whose gradient one task adds up.
const UNITS: usize = 48;

impl Embedding {
    /// A table of this size with PyTorch's default settings.
    pub fn new(num_embeddings: usize, embedding_dim: usize) -> Self {
        Self { num_embeddings, embedding_dim, padding_idx: None, scale_grad_by_freq: false, embed_scale: 1.0 }
    }

    /// How much of the lookup's gradient reaches each row of the table; `None` where all of it does.
    fn fraction(&self, x: &Ids) -> Option<Vec<f64>> {
        if self.padding_idx.is_none() && !self.scale_grad_by_freq {
            return None;
        }
        let mut fraction = vec![1.0; self.num_embeddings];
        if self.scale_grad_by_freq {
            let mut counts = vec![0_u32; self.num_embeddings];
            self.columns(x).for_each(|id| counts[id] += 1);
            fraction = counts.into_iter().map(|count| 1.0 / f64::from(count.max(1))).collect(); // E41
        }
        if let Some(id) = self.padding_idx {
            fraction[id] = 0.0; // E41
        }
        Some(fraction)
    }

    /// The ids as columns of the weight. They have been checked by `output_shape`.
    fn columns<'a>(&self, ids: &'a Ids) -> impl Iterator<Item = usize> + 'a {
        ids.0.iter().map(|&id| usize::try_from(id).expect("an id checked by output_shape"))
    }
}

/// What a case file says of an embedding beside the shapes of its tensors.
///
/// ```
/// use woracle::operators::{Embedding, EmbeddingSettings, Ids, Operator};
/// use ndarray::array;
/// let settings = EmbeddingSettings { padding_idx: Some(0), scale_grad_by_freq: true, ..Default::default() };
/// let embedding = Embedding::from_weight_shape(settings, &[3, 2])?; // [num_embeddings, embedding_dim]
/// let ids = Ids::new(&array![0_i64, 1, 1].into_dyn());
/// let fraction = embedding.gradient_fraction::<f64>(&ids).unwrap();
/// assert_eq!(fraction, [0.0, 0.5, 1.0]); // none of the padding row's, half of each of two
/// let renormalising = EmbeddingSettings { max_norm: Some(1.0), ..Default::default() };
/// assert!(Embedding::from_weight_shape(renormalising, &[3, 2]).is_err()); // it would rewrite the table
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EmbeddingSettings {
    /// The id whose row the lookup sends no gradient to.
    pub padding_idx: Option<usize>,
    /// The lookup's gradient of a row is divided by how often its id occurs.
    pub scale_grad_by_freq: bool,
    /// What the whole output is multiplied by; 1 where there is none.
    pub embed_scale: Option<f64>,
    /// PyTorch's renormalising lookup: refused.
    pub max_norm: Option<f64>,
}

/// Token ids of any shape. They have no gradient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ids(ArrayD<i64>);

impl Ids {
    /// Ids from integers of any type that fits i64, in the shape of the array. Whether an embedding has them is asked
    /// by [`Operator::output_shape`] (C9).
    pub fn new<I: Copy + Into<i64>>(ids: &ArrayD<I>) -> Self {
        Self(ids.mapv(Into::into))
    }
}

impl<T> Input<T> for Ids {
    fn values(&self) -> Option<ArrayViewD<'_, T>> {
        None
    }
    fn ids(&self) -> Option<ArrayViewD<'_, i64>> {
        Some(self.0.view())
    }
    fn from_values(_values: ArrayD<T>) -> Option<Self> {
        None
    }
    fn from_ids(ids: ArrayD<i64>) -> Option<Self> {
        Some(Self(ids))
    }
    fn shape(&self) -> &[usize] {
        self.0.shape()
    }
}

impl Operator for Embedding {
    type Input<'x, T: Scalar> = Ids;
    type Settings = EmbeddingSettings;

    const LORA_NAMES: [&'static str; 2] = ["lora_embedding_A", "lora_embedding_B"];
    const LORA_A_STARTS_AT_ZERO: bool = true;
    const COLUMNS_ARE_NOT_FEATURES: Option<&'static str> = Some("the columns of an embedding's weight are ids");

    fn from_weight_shape(settings: EmbeddingSettings, weight: &[usize]) -> Result<Self> {
        let EmbeddingSettings { padding_idx, scale_grad_by_freq, embed_scale, max_norm } = settings;
        let setting =
            |name, expected: &str, found: String| Err(Error::Setting { name, expected: expected.into(), found });
        let &[num_embeddings, embedding_dim] = weight else {
            let expected = "[num_embeddings, embedding_dim]".into();
            return Err(Error::Shape { tensor: "base.weight".into(), expected, found: weight.to_vec() }); // C1
        };
        if num_embeddings == 0 || embedding_dim == 0 {
            let expected = "[num_embeddings, embedding_dim], neither 0".into();
            return Err(Error::Shape { tensor: "base.weight".into(), expected, found: weight.to_vec() }); // C1
        }
        if let Some(max) = max_norm {
            let expected = "none (it rewrites rows of the table during the lookup, so the adapted table is never what was looked up)";
            return setting("max_norm", expected, max.to_string()); // C4
        }
        if let Some(id) = padding_idx.filter(|&id| id >= num_embeddings) {
            return setting("padding_idx", &format!("an id below {num_embeddings}"), id.to_string()); // C4
        }
        let embed_scale = embed_scale.unwrap_or(1.0);
        if !embed_scale.is_finite() {
            return setting("embed_scale", "a finite number", embed_scale.to_string()); // C4
        }
        Ok(Self { num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, embed_scale })
    }

    fn units(&self) -> usize {
        self.embedding_dim
    }
    fn fan_in(&self) -> usize {
        self.num_embeddings
    }
    fn weight_shape(&self) -> Vec<usize> {
        vec![self.num_embeddings, self.embedding_dim]
    }
    fn lora_shapes(&self, rank: usize) -> [Vec<usize>; 2] {
        [vec![rank, self.num_embeddings], vec![self.embedding_dim, rank]]
    }
    fn weight_matrix<'w, E>(&self, weight: ArrayViewD<'w, E>) -> ArrayView2<'w, E> {
        weight.into_dimensionality::<Ix2>().expect("a weight checked by its shape").reversed_axes()
    }
    fn stored_weight<E: Clone>(&self, matrix: Array2<E>) -> ArrayD<E> {
        in_standard_layout(matrix.reversed_axes()).into_dyn()
    }

    fn lend<T: Scalar>(x: &Ids) -> Ids {
        x.clone()
    }
    fn output_shape<T: Scalar>(&self, x: &Ids) -> Result<Vec<usize>> {
        let known = 0..self.num_embeddings as i64;
        if let Some((index, id)) = x.0.indexed_iter().find(|(_, id)| !known.contains(id)) {
            let index = ndarray::Dimension::slice(&index).to_vec();
            return Err(Error::IdOutOfRange { index, num_embeddings: self.num_embeddings, found: *id }); // C9
        }
        Ok(x.0.shape().iter().copied().chain([self.embedding_dim]).collect())
    }

    fn places<T: Scalar>(&self, x: &Ids) -> [usize; 2] {
        [x.0.len(), 1]
    }

    fn apply_into<T: Scalar>(&self, x: &Ids, weights: &[ArrayView2<'_, T>], outputs: Vec<ArrayViewMut3<'_, T>>) {
        let scale = T::from_f64(self.embed_scale);
        for (weight, mut y) in weights.iter().zip(outputs) {
            let (elements, mut y) = (y.len(), y.index_axis_mut(Axis(2), 0));
            for_each(elements, y.outer_iter_mut().zip(self.columns(x)), |(mut y, id)| {
                Zip::from(&mut y).and(weight.column(id)).for_each(|y, &w| *y = scale * w); // E39
            });
        }
    }

    fn adjoint_input_into<T: Scalar>(
        &self,
        _: &Ids,
        _: &[(ArrayView3<'_, T>, ArrayView2<'_, T>)],
        _: ArrayViewMutD<'_, T>,
    ) {
    }

    fn adjoint_weight_into<T: Scalar>(&self, x: &Ids, dy: ArrayView3<'_, T>, mut dweight: ArrayViewMut2<'_, T>) {
        let scale = T::from_f64(self.embed_scale);
        let fraction = self.fraction(x);
        let dy = dy.index_axis(Axis(2), 0);
        // Ids may be anywhere, and the same one again: what is shared out is units.
        let blocks = dweight.axis_chunks_iter_mut(Axis(0), UNITS).zip(dy.axis_chunks_iter(Axis(1), UNITS));
        for_each(dy.len(), blocks, |(mut dweight, dy)| {
            dweight.fill(T::zero());
            for (dy, id) in dy.outer_iter().zip(self.columns(x)) {
                let part = fraction.as_ref().map_or(scale, |fraction| scale * T::from_f64(fraction[id]));
                dweight.column_mut(id).scaled_add(part, &dy); // E40
            }
        });
    }

    fn gradient_fraction<T: Scalar>(&self, x: &Ids) -> Option<Vec<f64>> {
        let occurrences = |id: usize| x.0.iter().filter(|&&other| other == id as i64).count().max(1);
        let fraction = |id: usize| match (self.padding_idx == Some(id), self.scale_grad_by_freq) {
            (true, _) => 0.0,
            (false, true) => 1.0 / occurrences(id) as f64,
            (false, false) => 1.0,
        };
        let acts = self.padding_idx.is_some() || self.scale_grad_by_freq;
        acts.then(|| (0..self.num_embeddings).map(fraction).collect()) // E41
    }

    fn power(&self, exponent: i32) -> Self {
        Self { padding_idx: None, scale_grad_by_freq: false, embed_scale: self.embed_scale.powi(exponent), ..*self }
    }

    fn terms<T: Scalar>(&self, x: &Ids, mut visit: impl FnMut(Term)) {
        let units = self.embedding_dim;
        for (n, column) in self.columns(x).enumerate() {
            for unit in 0..units {
                visit(Term { output: n * units + unit, unit, column, input: None, factor: self.embed_scale }); // E39
            }
        }
    }
}
