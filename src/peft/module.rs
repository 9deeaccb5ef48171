//! One adapted weight of a base model, as a matrix: which layer it is of, and what merging makes of some of its rows.

use super::checkpoint::Checkpoint;
use super::model::{Found, Model, Naming};
use crate::operators::{Embedding, Linear, Operator};
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
///
/// ```
/// use woracle::peft::{Checkpoint, Kind, Model, Module};
/// use woracle::wora::ZeroNorm;
/// # let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/text-dora");
/// let adapter = Checkpoint::open(&data.join("adapter"))?;
/// let base = Model::open(&data.join("model.safetensors"))?;
/// let conv = Module::new(&adapter, &base, "conv", ZeroNorm::Error)?;
/// assert_eq!((conv.kind, conv.shape.as_slice(), conv.dim()), (Kind::Conv1d, &[16, 12, 3][..], (16, 36)));
/// assert_eq!(conv.adapter.lora_a.shape(), [4, 36]); // every kind is a matrix
/// let embed = Module::new(&adapter, &base, "embed", ZeroNorm::Error)?;
/// assert_eq!((embed.kind, embed.dim()), (Kind::Embedding, (23, 12)));
/// assert_eq!(embed.adapter.magnitude.as_ref().unwrap().shape(), [12]); // units are the table's columns
/// # Ok::<(), woracle::Error>(())
/// ```
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
        let naming = model.naming(&checkpoint.tensors_of_base().collect::<Vec<_>>())?;
        Self::of_naming(checkpoint, model, &naming, name, zero_norm)
    }

    /// The same where the naming is known.
    pub(super) fn of_naming(
        checkpoint: &Checkpoint,
        model: &Model,
        naming: &Naming<'_>,
        name: &str,
        zero_norm: ZeroNorm,
    ) -> Result<Self> {
        let weight = format!("{name}.weight");
        let found = naming.find(&weight)?;
        let (_, info) = model.tensor(found.name())?;
        floating_point(found.name(), info.dtype).map_err(|error| error.in_file(model.path_of(found.name())))?;
        let Adapter { lora_a, lora_b, magnitude, alpha, beta } = checkpoint.adapter(name)?;
        let [name_a, name_b] = lora_names(checkpoint.is_embedding(name));
        let kind = kind(checkpoint, model, naming, name, &info.shape, [lora_a.shape(), lora_b.shape()])?;
        let (rows, columns) = (info.shape[0], info.shape[1..].iter().product());
        let (units, fan_in) = if kind.units_are_columns() { (columns, rows) } else { (rows, columns) };
        let rank = lora_a.len_of(Axis(0));
        let shaped = |role: &str, values: ArrayD<f64>, shape: &[usize]| -> Result<ArrayD<f64>> {
            let found = values.shape().to_vec();
            values.into_shape_with_order(IxDyn(shape)).map_err(|_| Error::Shape {
                tensor: checkpoint.tensor_name(name, role),
                expected: format!("as many numbers as {shape:?} has, as the weight is {:?}", info.shape),
                found,
            }) // C1
        };
        let adapter = Adapter {
            lora_a: shaped(name_a, lora_a, &[rank, fan_in])?,
            lora_b: shaped(name_b, lora_b, &[units, rank])?,
            magnitude: magnitude.map(|values| shaped(SCALE_NAMES[0], values, &[units])).transpose()?,
            alpha,
            beta,
        };
        let config =
            Config { zero_norm, ..Config::new(checkpoint.config().method(), checkpoint.config().scaling(name)?) };
        Ok(Self { name: name.into(), weight, found, kind, shape: info.shape.clone(), adapter, config })
    }

    /// The rows and columns of the weight, as stored.
    pub fn dim(&self) -> (usize, usize) {
        (self.shape[0], self.shape[1..].iter().product())
    }

    /// Rows that are worked on at a time.
    pub fn blocks(&self) -> Vec<Range<usize>> {
        let (rows, columns) = self.dim();
        let most = (BLOCK / columns.max(1)).max(1);
        (0..rows).step_by(most).map(|start| start..rows.min(start + most)).collect()
    }

    /// The layer whose weight some rows are: `[rows, columns]`, as stored. Where units are columns it has a part of
    /// their weights, and elsewhere some of the units.
    ///
    /// # Errors
    ///
    /// A weight that is not finite (C2).
    pub fn layer(&self, rows: &Range<usize>, weight: ArcArray<f64, Ix2>) -> Result<Layer<Linear, f64>> {
        let fan_in_fan_out = self.kind.units_are_columns();
        let (count, columns) = weight.dim();
        let (in_features, out_features) = if fan_in_fan_out { (count, columns) } else { (columns, count) };
        let part = |values: &ArrayD<f64>, axis: usize, of_rows: bool| match of_rows {
            true => values.slice_axis(Axis(axis), Slice::from(rows.clone())).to_owned(),
            false => values.clone(),
        };
        let Adapter { lora_a, lora_b, magnitude, alpha, beta } = &self.adapter;
        let adapter = Adapter {
            lora_a: part(lora_a, 1, fan_in_fan_out),
            lora_b: part(lora_b, 0, !fan_in_fan_out),
            magnitude: magnitude.as_ref().map(|magnitude| part(magnitude, 0, !fan_in_fan_out)),
            alpha: alpha.clone(),
            beta: beta.clone(),
        };
        let operator = Linear { in_features, out_features, fan_in_fan_out };
        let base = Base { weight: weight.into_dyn(), bias: None };
        Layer::new(operator, self.config, base, adapter).map_err(|error| self.at(rows, error))
    }

    /// `||V||` of all units, `[units]`, where they are columns, which no block of rows knows alone; `None` elsewhere.
    ///
    /// # Errors
    ///
    /// What `read` says, which gives the rows of W0 `[rows, columns]`; a weight that is not finite (C2).
    pub fn column_norms(
        &self,
        read: impl Fn(&Range<usize>) -> Result<ArcArray<f64, Ix2>> + Sync,
    ) -> Result<Option<Array1<f64>>> {
        if !self.kind.units_are_columns() {
            return Ok(None);
        }
        let mut squares = Array1::zeros(self.dim().1);
        let one = |rows: &Range<usize>| Ok(self.layer(rows, read(rows)?)?.squared_weighted_norms());
        in_parallel(&self.blocks(), one, |some| {
            some.iter().for_each(|of_rows| squares += of_rows);
            Ok(())
        })?;
        Ok(Some(squares.mapv_into(f64::sqrt)))
    }

    /// W' of some rows of W0, `[rows, columns]` both, and the norms that were divided by, those of [`Module::norms`].
    /// `column_norms` are those of [`Module::column_norms`]. E12
    ///
    /// # Errors
    ///
    /// A unit without a direction (C5), unless the settings allow it; a weight that is not finite (C2).
    pub fn merge(
        &self,
        rows: &Range<usize>,
        weight: ArcArray<f64, Ix2>,
        column_norms: Option<&Array1<f64>>,
    ) -> Result<(Array2<f64>, Option<Array1<f64>>)> {
        let layer = self.layer(rows, weight)?;
        let merged = match column_norms {
            Some(norms) => layer.merge_at_norm(norms.clone()),
            None => layer.merge(),
        };
        let Merged { weight, weight_norm } = merged.map_err(|error| self.at(rows, error))?;
        Ok((weight.into_dimensionality().expect("a matrix"), weight_norm))
    }

    /// W0 of some rows of W', `[rows, columns]` both, whose norms were these, those of [`Module::norms`]. E37
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

    /// W0 of some rows, `[rows, columns]`, and their bytes.
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
        let (dtype, of_row) = (floating_point(name, info.dtype)?, columns * info.dtype.bitsize() / 8);
        let bytes = file.bytes(name, info, rows.start * of_row..rows.end * of_row)?;
        let weight = Array2::from_shape_vec((rows.len(), columns), dtype.decode(&bytes)).expect("as many elements");
        Ok((weight.into(), bytes))
    }
}

/// What A and B are called.
fn lora_names(embedding: bool) -> [&'static str; 2] {
    if embedding { Embedding::LORA_NAMES } else { Linear::LORA_NAMES }
}

/// Which layer a weight of this shape is, with an A and a B of these. C1
fn kind(
    checkpoint: &Checkpoint,
    model: &Model,
    naming: &Naming<'_>,
    name: &str,
    weight: &[usize],
    [a, b]: [&[usize]; 2],
) -> Result<Kind> {
    let [name_a, name_b] = lora_names(checkpoint.is_embedding(name));
    let refuse = |role: &str, expected: String, found: &[usize]| {
        let expected = format!("{expected}, as {name}.weight is {weight:?}");
        Err(Error::Shape { tensor: checkpoint.tensor_name(name, role), expected, found: found.to_vec() })
    };
    if weight.contains(&0) {
        let (tensor, expected) = (format!("{name}.weight"), "with no length of 0".into());
        return Err(Error::Shape { tensor, expected, found: weight.to_vec() });
    }
    let rank = a[0];
    if checkpoint.is_embedding(name) {
        let &[ids, features] = weight else {
            return refuse(name_a, "of a weight with two axes".into(), a);
        };
        return match (a == [rank, ids], b == [features, rank]) {
            (true, true) => Ok(Kind::Embedding),
            (true, false) => refuse(name_b, format!("[{features}, {rank}]"), b),
            (false, _) => refuse(name_a, format!("[{rank}, {ids}]"), a),
        };
    }
    if let &[first, second] = weight {
        return match orientation([first, second], [a, b]) {
            [true, true] => Ok(square_kind(checkpoint, model, naming, name)),
            [true, false] => Ok(Kind::Linear),
            [false, true] => Ok(Kind::LinearFanInFanOut),
            [false, false] if a == [rank, second] => refuse(name_b, format!("[{first}, {rank}]"), b),
            [false, false] => refuse(name_a, format!("[{rank}, {second}]"), a),
        };
    }
    let kind = match weight.len() {
        3 => Kind::Conv1d,
        4 => Kind::Conv2d,
        5 => Kind::Conv3d,
        _ => return refuse(name_a, "of a weight with 2 to 5 axes".into(), a),
    };
    let of_a: Vec<usize> = [rank].iter().chain(&weight[1..]).copied().collect();
    let of_b: Vec<usize> = [weight[0], rank].into_iter().chain(weight[2..].iter().map(|_| 1)).collect();
    if a != of_a {
        let grouped = a.len() == weight.len() && a[2..] == weight[2..] && a[1].is_multiple_of(weight[1]);
        let why = if grouped {
            " (a grouped convolution in PEFT's layout, whose A sees every input channel: its B A is no change of the weight)"
        } else {
            ""
        };
        return refuse(name_a, format!("{of_a:?}{why}"), a);
    }
    if b != of_b {
        return refuse(name_b, format!("{of_b:?}"), b);
    }
    Ok(kind)
}

/// Whether A and B fit a weight with two axes as `[out, in]`, and as `[in, out]`.
fn orientation([first, second]: [usize; 2], [a, b]: [&[usize]; 2]) -> [bool; 2] {
    let rank = a[0];
    [a == [rank, second] && b == [first, rank], a == [rank, first] && b == [second, rank]]
}

/// How a square weight is stored: as those that its namesakes in other layers or all others that are not square, and
/// where they do not agree as the configuration says.
fn square_kind(checkpoint: &Checkpoint, model: &Model, naming: &Naming<'_>, name: &str) -> Kind {
    let last = |module: &str| module.rsplit('.').next().map(str::to_string);
    let told = |module: &str| -> Option<bool> {
        let found = naming.find(&format!("{module}.weight")).ok()?;
        let &[first, second] = model.tensor(found.name()).ok()?.1.shape.as_slice() else { return None };
        match orientation([first, second], checkpoint.lora_shapes(module)?) {
            [true, false] => Some(false),
            [false, true] => Some(true),
            _ => None,
        }
    };
    let others = || checkpoint.modules().filter(|module| !checkpoint.is_embedding(module));
    let agreed = |told: Vec<bool>| told.first().copied().filter(|first| told.iter().all(|one| one == first));
    let namesakes = agreed(others().filter(|module| last(module) == last(name)).filter_map(told).collect());
    let turned = namesakes.or_else(|| agreed(others().filter_map(told).collect()));
    if turned.unwrap_or_else(|| checkpoint.config().fan_in_fan_out()) { Kind::LinearFanInFanOut } else { Kind::Linear }
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
