//! One adapted weight of a base model, as a matrix: which layer it is of, and what merging makes of some of its rows.

use super::checkpoint::Checkpoint;
use super::model::{Found, Model};
use crate::error::check_finite;
use crate::operators::Linear;
use crate::tensor_file::{TensorFile, floating_point};
use crate::wora::{Adapter, Base, Config, Layer, Merged, Method, SCALE_NAMES, ZeroNorm};
use crate::{Error, Result};
use ndarray::{ArcArray, Array1, Array2, ArrayD, Axis, Ix2, IxDyn, Slice};
use rayon::prelude::*;
use safetensors::tensor::TensorInfo;
use serde::Serialize;
use std::ops::Range;

/// So many elements of a weight are worked on at a time, where its rows are units: few enough to stay in the cache.
const BLOCK: usize = 1 << 17;
/// So many blocks a thread are worked on between two writes.
const AT_A_TIME: usize = 4;

/// Which layer a weight is of. Decided by how its tensors are named and shaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `[out, in]`
    Linear,
    /// `[in, out]`: `transformers.pytorch_utils.Conv1D`
    LinearFanInFanOut,
    /// `[num_embeddings, embedding_dim]`
    Embedding,
    /// `[out, in, kernel]`
    Conv1d,
    /// `[out, in, kernel...]`
    Conv2d,
    /// `[out, in, kernel...]`
    Conv3d,
}

impl Kind {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::LinearFanInFanOut => "linear (fan_in_fan_out)",
            Self::Embedding => "embedding",
            Self::Conv1d => "conv1d",
            Self::Conv2d => "conv2d",
            Self::Conv3d => "conv3d",
        }
    }

    /// Whether the units are the columns of the stored weight, and not its rows.
    fn units_are_columns(self) -> bool {
        matches!(self, Self::LinearFanInFanOut | Self::Embedding)
    }
}

/// An adapted weight: every kind is a matrix `[units, fan_in]` to merging.
#[derive(Clone, Debug)]
pub struct Module {
    /// The module's name in the base model.
    pub name: String,
    /// The name of its weight, and where the base has it.
    pub weight: String,
    /// Where the base has it.
    pub found: Found,
    /// Which layer it is.
    pub kind: Kind,
    /// The shape of the weight, as stored.
    pub shape: Vec<usize>,
    /// A `[rank, fan_in]`, B `[units, rank]`, m `[units]`.
    pub adapter: Adapter<f64>,
    /// The method, s, and what becomes of a unit without a direction.
    pub config: Config,
}

impl Module {
    /// A module of an adapter over a base model.
    ///
    /// # Errors
    ///
    /// A weight that the base does not have (C7), shapes that do not fit it (C1), numbers that are not finite (C2).
    pub fn new(checkpoint: &Checkpoint, model: &Model, name: &str, zero_norm: ZeroNorm) -> Result<Self> {
        let weight = format!("{name}.weight");
        let found = model.find(&weight)?;
        let (_, info) = model.tensor(found.name())?;
        floating_point(found.name(), info)?;
        let Adapter { lora_a, lora_b, magnitude, alpha, beta } = checkpoint.adapter(name)?;
        let named = |role: &str| checkpoint.tensor_name(name, role);
        let names =
            if checkpoint.is_embedding(name) { ["lora_embedding_A", "lora_embedding_B"] } else { ["lora_A", "lora_B"] };
        let kind = kind(checkpoint, name, &info.shape, &lora_a, &lora_b)?;
        let rows = info.shape[0];
        let columns: usize = info.shape[1..].iter().product();
        let (units, fan_in) = if kind.units_are_columns() { (columns, rows) } else { (rows, columns) };
        let rank = lora_a.len_of(Axis(0));
        let matrix = |role: &str, values: ArrayD<f64>, shape: [usize; 2]| -> Result<ArrayD<f64>> {
            check_finite(&named(role), values.view())?; // C2
            let found = values.shape().to_vec();
            values.into_shape_with_order(IxDyn(&shape)).map_err(|_| Error::Shape {
                tensor: named(role),
                expected: format!("as many as {shape:?}, as the weight is {:?}", info.shape),
                found,
            }) // C1
        };
        let [of_magnitude, of_alpha, of_beta] = SCALE_NAMES;
        let scalar = |role: &'static str, values: Option<ArrayD<f64>>| -> Result<Option<ArrayD<f64>>> {
            let Some(values) = values else { return Ok(None) };
            check_finite(&named(role), values.view())?; // C2
            let found = values.shape().to_vec();
            let one = values.into_shape_with_order(IxDyn(&[]));
            Ok(Some(one.map_err(|_| Error::Shape { tensor: named(role), expected: "[]".into(), found })?)) // C1
        };
        let magnitude = magnitude.map(|values| {
            check_finite(&named(of_magnitude), values.view())?; // C2
            let found = values.shape().to_vec();
            values.into_shape_with_order(IxDyn(&[units])).map_err(|_| Error::Shape {
                tensor: named(of_magnitude),
                expected: format!("one an output unit, of which there are {units}"),
                found,
            }) // C1
        });
        let adapter = Adapter {
            lora_a: matrix(names[0], lora_a, [rank, fan_in])?,
            lora_b: matrix(names[1], lora_b, [units, rank])?,
            magnitude: magnitude.transpose()?,
            alpha: scalar(of_alpha, alpha)?,
            beta: scalar(of_beta, beta)?,
        };
        let config =
            Config { zero_norm, ..Config::new(checkpoint.config().method(), checkpoint.config().scaling(name)?) };
        Ok(Self { name: name.into(), weight, found, kind, shape: info.shape.clone(), adapter, config })
    }

    /// The rows and columns of the weight, as stored.
    pub fn dim(&self) -> (usize, usize) {
        (self.shape[0], self.shape[1..].iter().product())
    }

    /// Rows that can be merged apart from the others: of a weight whose units are its columns, all.
    pub fn blocks(&self) -> Vec<Range<usize>> {
        let (rows, columns) = self.dim();
        let most = if self.kind.units_are_columns() { rows } else { (BLOCK / columns.max(1)).max(1) };
        (0..rows).step_by(most.max(1)).map(|start| start..rows.min(start + most)).collect()
    }

    /// The layer whose weight some rows are: `[rows, columns]`, as stored.
    ///
    /// # Errors
    ///
    /// A weight that is not finite (C2).
    pub fn layer(&self, rows: &Range<usize>, weight: ArcArray<f64, Ix2>) -> Result<Layer<Linear, f64>> {
        let fan_in_fan_out = self.kind.units_are_columns();
        let (count, columns) = weight.dim();
        let (in_features, out_features) = if fan_in_fan_out { (count, columns) } else { (columns, count) };
        let some = |values: &ArrayD<f64>| match fan_in_fan_out {
            true => values.clone(),
            false => values.slice_axis(Axis(0), Slice::from(rows.clone())).to_owned(),
        };
        let Adapter { lora_a, lora_b, magnitude, alpha, beta } = &self.adapter;
        let adapter = Adapter {
            lora_a: lora_a.clone(),
            lora_b: some(lora_b),
            magnitude: magnitude.as_ref().map(some),
            alpha: alpha.clone(),
            beta: beta.clone(),
        };
        let operator = Linear { in_features, out_features, fan_in_fan_out };
        let base = Base { weight: weight.into_dyn(), bias: None };
        Layer::new(operator, self.config, base, adapter).map_err(|error| self.at(rows, error))
    }

    /// W' of some rows of W0, and their norms.
    ///
    /// # Errors
    ///
    /// A unit without a direction (C5), unless the settings allow it; a weight that is not finite (C2).
    pub fn merge(&self, rows: &Range<usize>, weight: ArcArray<f64, Ix2>) -> Result<(Array2<f64>, Option<Array1<f64>>)> {
        let Merged { weight, weight_norm } = self.layer(rows, weight)?.merge().map_err(|error| self.at(rows, error))?;
        Ok((weight.into_dimensionality().expect("a matrix"), weight_norm))
    }

    /// W0 of some rows of W', whose norms were these.
    ///
    /// # Errors
    ///
    /// W' that does not hold W0 any more (C6).
    pub fn unmerge(
        &self,
        rows: &Range<usize>,
        merged: ArcArray<f64, Ix2>,
        weight_norm: Option<Array1<f64>>,
    ) -> Result<Array2<f64>> {
        let weight = merged.clone().into_owned().into_dyn();
        let layer = self.layer(rows, merged)?;
        let base = layer.unmerge(&Merged { weight, weight_norm }).map_err(|error| self.at(rows, error))?;
        Ok(base.into_dimensionality().expect("a matrix"))
    }

    /// Which part of the norms some rows have.
    pub fn norms(&self, rows: &Range<usize>) -> Range<usize> {
        if self.kind.units_are_columns() { 0..self.dim().1 } else { rows.clone() }
    }

    /// What is wrong with some rows, said of the whole weight.
    fn at(&self, rows: &Range<usize>, error: Error) -> Error {
        let error = match error {
            Error::ZeroNorm { unit } => Error::ZeroNorm { unit: self.norms(rows).start + unit },
            Error::NotFinite { index, found, tensor } if tensor == "base.weight" => {
                let mut index = index;
                if let Some(row) = index.first_mut() {
                    *row += rows.start;
                }
                return Error::NotFinite { tensor: self.weight.clone(), index, found };
            }
            other => other,
        };
        Error::Unexpected { tensor: self.weight.clone(), reason: error.to_string() }
    }

    /// W0 of some rows, and their bytes.
    ///
    /// # Errors
    ///
    /// A file that cannot be read to the tensor's end.
    pub fn read(
        &self,
        rows: &Range<usize>,
        name: &str,
        (file, info): (&TensorFile<'static>, &TensorInfo),
    ) -> Result<(ArcArray<f64, Ix2>, Vec<u8>)> {
        let (_, columns) = self.dim();
        let (dtype, of_row) = (floating_point(name, info)?, columns * info.dtype.bitsize() / 8);
        let bytes = file.bytes(name, info, rows.start * of_row..rows.end * of_row)?;
        let weight = Array2::from_shape_vec((rows.len(), columns), dtype.decode(&bytes)).expect("as many elements");
        Ok((weight.into(), bytes))
    }
}

/// Which layer a weight of this shape is, with this A and B. C1
fn kind(checkpoint: &Checkpoint, name: &str, weight: &[usize], a: &ArrayD<f64>, b: &ArrayD<f64>) -> Result<Kind> {
    let refuse = |role: &str, expected: String, found: &[usize]| {
        let expected = format!("{expected}, as {name}.weight is {weight:?}");
        Err(Error::Shape { tensor: checkpoint.tensor_name(name, role), expected, found: found.to_vec() })
    };
    if weight.contains(&0) {
        let expected = "no length to be 0".into();
        return Err(Error::Shape { tensor: format!("{name}.weight"), expected, found: weight.to_vec() });
    }
    let rank = a.shape()[0];
    let fits = |a_shape: &[usize], b_shape: &[usize]| a.shape() == a_shape && b.shape() == b_shape;
    if checkpoint.is_embedding(name) {
        let &[ids, features] = weight else {
            return refuse("lora_embedding_A", "one of a weight with two axes".into(), a.shape());
        };
        return match fits(&[rank, ids], &[features, rank]) {
            true => Ok(Kind::Embedding),
            false if a.shape() == [rank, ids] => refuse("lora_embedding_B", format!("[{features}, {rank}]"), b.shape()),
            false => refuse("lora_embedding_A", format!("[{rank}, {ids}]"), a.shape()),
        };
    }
    if let &[first, second] = weight {
        let (plain, turned) = (fits(&[rank, second], &[first, rank]), fits(&[rank, first], &[second, rank]));
        return match (plain, turned) {
            (true, true) if checkpoint.config().fan_in_fan_out() => Ok(Kind::LinearFanInFanOut),
            (true, _) => Ok(Kind::Linear),
            (false, true) => Ok(Kind::LinearFanInFanOut),
            _ if a.shape() == [rank, second] => refuse("lora_B", format!("[{first}, {rank}]"), b.shape()),
            _ => refuse("lora_A", format!("[{rank}, {second}]"), a.shape()),
        };
    }
    let kind = match weight.len() {
        3 => Kind::Conv1d,
        4 => Kind::Conv2d,
        5 => Kind::Conv3d,
        _ => return refuse("lora_A", "one of a weight with 2 to 5 axes".into(), a.shape()),
    };
    let of_a: Vec<usize> = [rank].iter().chain(&weight[1..]).copied().collect();
    let of_b: Vec<usize> = [weight[0], rank].into_iter().chain(weight[2..].iter().map(|_| 1)).collect();
    if a.shape() != of_a {
        let grouped =
            a.ndim() == weight.len() && a.shape()[2..] == weight[2..] && a.shape()[1].is_multiple_of(weight[1]);
        let why = if grouped {
            "a grouped convolution in PEFT's layout, whose A sees every input channel, has no B A to merge: "
        } else {
            ""
        };
        return refuse("lora_A", format!("{why}{of_a:?}"), a.shape());
    }
    if b.shape() != of_b {
        return refuse("lora_B", format!("{of_b:?}"), b.shape());
    }
    Ok(kind)
}

/// Something for every block, some of them at a time, handed on in order.
pub(super) fn in_parallel<R: Send>(
    blocks: &[Range<usize>],
    one: impl Fn(&Range<usize>) -> Result<R> + Sync,
    mut then: impl FnMut(Vec<R>) -> Result<()>,
) -> Result<()> {
    for some in blocks.chunks(AT_A_TIME * rayon::current_num_threads()) {
        then(some.par_iter().map(&one).collect::<Result<_>>()?)?;
    }
    Ok(())
}

/// LoRA needs no norms.
pub(super) fn has_norms(module: &Module) -> bool {
    module.config.method != Method::Lora
}
