//! Safetensors files read by position: the header at once, a tensor when it is asked for, in parallel, and never the
//! whole file.
//!
//! ```
//! use woracle::{oracle::{CaseFile, Dtype}, registry, tensor_file::TensorFile};
//! let linear = registry::layer("linear")?;
//! let bytes = CaseFile::new(linear.draw(&linear.specs()[0], 0), Dtype::F32).to_bytes();
//! let file = TensorFile::from_bytes(&bytes)?;
//! let bias = file.tensors()["base.bias"];
//! assert_eq!(bias.shape, [6]);
//! assert_eq!(file.elements("base.bias", bias, f32::from_le_bytes)?.len(), 6);
//! # Ok::<(), woracle::Error>(())
//! ```

use crate::digest::hexadecimal;
use crate::dtype::Dtype;
use crate::{Error, Result};
use half::{bf16, f16};
use ndarray::ArrayD;
use rayon::prelude::*;
use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Error as IoError, Read};
use std::ops::Range;
use std::path::Path;

/// Bytes of the file that give the length of the header.
const LENGTH: usize = 8;
/// A header is at most so long: 100 MB, as everywhere.
const LONGEST_HEADER: usize = 100_000_000;
/// So many elements are read in one piece.
const PIECE: usize = 1 << 16;
/// So many bytes, a whole number of elements.
const BYTES: usize = 1 << 22;

/// A safetensors file whose header has been read and fits its length.
///
/// ```
/// use woracle::oracle::Dtype;
/// use woracle::tensor_file::{TensorFile, floating_point};
/// # let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/linear-wora-pr2872");
/// let file = TensorFile::open(&data.join("model.safetensors"))?;
/// let (weight, dtype) = file.values("fc1.weight")?; // [14, 10], widened to f64
/// assert_eq!((weight.shape(), dtype), (&[14, 10][..], Dtype::F32));
/// let info = file.info("fc1.weight").unwrap();
/// assert_eq!(floating_point("fc1.weight", info.dtype)?, Dtype::F32);
/// let first = file.bytes("fc1.weight", info, 0..4)?; // little-endian
/// assert_eq!(f64::from(f32::from_le_bytes(first.try_into().unwrap())), weight[[0, 0]]);
/// assert_eq!(file.all_bytes("fc1.weight", info)?.len(), 4 * 14 * 10);
/// assert!(file.in_order().contains(&"fc2.weight".to_string()) && file.metadata().is_none());
/// # Ok::<(), woracle::Error>(())
/// ```
pub struct TensorFile<'a> {
    source: Source<'a>,
    header: Metadata,
    /// Where the tensors begin.
    start: u64,
}

/// Where the bytes are.
enum Source<'a> {
    /// Those given, or those of what has no length, such as a pipe, read to its end.
    Bytes(Cow<'a, [u8]>),
    File(File),
}

impl Source<'_> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        match self {
            Self::File(file) => read_exact_at(file, buffer, offset),
            Self::Bytes(bytes) => {
                let offset = usize::try_from(offset).map_err(IoError::other)?;
                let bytes = bytes.get(offset..).and_then(|rest| rest.get(..buffer.len()));
                buffer.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => (buffer, offset) = (&mut buffer[count..], offset + count as u64),
        }
    }
    Ok(())
}

impl TensorFile<'static> {
    /// Opens a file.
    ///
    /// # Errors
    ///
    /// One that cannot be read, or is no whole safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |error: IoError| Error::io(path, &error);
        let mut file = File::open(path).map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        if about.is_file() {
            return Self::new(Source::File(file), about.len()).map_err(|error| error.in_file(path));
        }
        let bytes = read_stream(&mut file).map_err(failed)?;
        let length = bytes.len() as u64;
        Self::new(Source::Bytes(bytes.into()), length).map_err(|error| error.in_file(path))
    }
}

impl<'a> TensorFile<'a> {
    /// A file that is in memory.
    ///
    /// # Errors
    ///
    /// Bytes that are no whole safetensors file.
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self> {
        Self::new(Source::Bytes(bytes.into()), bytes.len() as u64)
    }

    fn new(source: Source<'a>, length: u64) -> Result<Self> {
        let refuse = |reason: &dyn std::fmt::Display| Error::Unexpected {
            tensor: "safetensors".into(),
            reason: format!("expected a whole file, found {length} bytes: {reason}"),
        };
        if length < LENGTH as u64 {
            return Err(refuse(&SafeTensorError::HeaderTooSmall));
        }
        let mut first = [0; LENGTH];
        source.read_exact_at(&mut first, 0).map_err(|error| refuse(&error))?;
        let header = u64::from_le_bytes(first);
        if header > LONGEST_HEADER as u64 {
            return Err(refuse(&SafeTensorError::HeaderTooLarge));
        }
        let start = LENGTH as u64 + header;
        if start > length {
            return Err(refuse(&SafeTensorError::InvalidHeaderLength));
        }
        let mut bytes = vec![0; header as usize];
        source.read_exact_at(&mut bytes, LENGTH as u64).map_err(|error| refuse(&error))?;
        let header: Metadata = serde_json::from_slice(&bytes).map_err(|error| refuse(&error))?;
        if start + header.data_len() as u64 != length {
            return Err(refuse(&SafeTensorError::MetadataIncompleteBuffer));
        }
        Ok(Self { source, header, start })
    }

    /// The SHA-256 of the whole file, in hexadecimal: of what was opened, whatever has its name by now.
    pub(crate) fn sha256(&self) -> std::io::Result<String> {
        let (length, mut digest) = (self.start + self.header.data_len() as u64, Sha256::new());
        let mut buffer = vec![0; BYTES];
        for start in (0..length).step_by(BYTES) {
            let piece = &mut buffer[..(length - start).min(BYTES as u64) as usize];
            self.source.read_exact_at(piece, start)?;
            digest.update(piece);
        }
        Ok(hexadecimal(digest))
    }

    /// The text beside the tensors.
    pub fn metadata(&self) -> Option<&HashMap<String, String>> {
        self.header.metadata().as_ref()
    }

    /// Every tensor: its type, its shape, where it lies.
    pub fn tensors(&self) -> BTreeMap<String, &TensorInfo> {
        self.header.tensors().into_iter().collect()
    }

    /// Some of the bytes of a tensor; the name is for what goes wrong.
    ///
    /// # Errors
    ///
    /// A file that cannot be read to the tensor's end.
    ///
    /// # Panics
    ///
    /// If the tensor has fewer bytes.
    pub fn bytes(&self, name: &str, tensor: &TensorInfo, range: Range<usize>) -> Result<Vec<u8>> {
        let (first, end) = tensor.data_offsets;
        assert!(range.start <= range.end && range.end <= end - first, "{range:?} of {} bytes", end - first);
        let mut bytes = vec![0; range.len()];
        let read = self.source.read_exact_at(&mut bytes, self.start + (first + range.start) as u64);
        read.map_err(|error| Error::Unexpected {
            tensor: name.into(),
            reason: format!("expected {} bytes, found the end: {error}", end - first),
        })?;
        Ok(bytes)
    }

    /// All the bytes of a tensor; the name is for what goes wrong.
    ///
    /// # Errors
    ///
    /// A file that cannot be read to the tensor's end.
    pub fn all_bytes(&self, name: &str, tensor: &TensorInfo) -> Result<Vec<u8>> {
        self.bytes(name, tensor, 0..tensor.data_offsets.1 - tensor.data_offsets.0)
    }

    /// All the bytes of a tensor from the first to the last, piece by piece, each with the place of its first element;
    /// the name is for what goes wrong.
    ///
    /// # Errors
    ///
    /// A file that cannot be read to the tensor's end; whatever `each` says.
    pub fn in_pieces(
        &self,
        name: &str,
        tensor: &TensorInfo,
        mut each: impl FnMut(&[u8], usize) -> Result<()>,
    ) -> Result<()> {
        let length = tensor.data_offsets.1 - tensor.data_offsets.0;
        for start in (0..length).step_by(BYTES) {
            let bytes = self.bytes(name, tensor, start..length.min(start + BYTES))?;
            each(&bytes, start * 8 / tensor.dtype.bitsize())?;
        }
        Ok(())
    }

    /// All of a tensor's floating-point numbers in its shape, and the type that they are stored in.
    ///
    /// # Errors
    ///
    /// A tensor that is not there (C7) or is of another type; a file that cannot be read to the tensor's end.
    pub fn values(&self, name: &str) -> Result<(ArrayD<f64>, Dtype)> {
        let missing = || Error::Missing { tensor: name.into(), expected: "a tensor".into() };
        let info = self.header.info(name).ok_or_else(missing)?; // C7
        let dtype = floating_point(name, info.dtype)?;
        let values = match dtype {
            Dtype::F64 => self.elements(name, info, f64::from_le_bytes),
            Dtype::F32 => self.elements(name, info, |bytes| f32::from_le_bytes(bytes).into()),
            Dtype::Bf16 => self.elements(name, info, |bytes| bf16::from_le_bytes(bytes).to_f64()),
            Dtype::F16 => self.elements(name, info, |bytes| f16::from_le_bytes(bytes).to_f64()),
        };
        Ok((values?, dtype))
    }

    /// A tensor's type, its shape, where it lies.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }

    /// The names of the tensors in the order in which they lie.
    pub fn in_order(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// The elements of a tensor whose type has `N` bytes; the name is for what goes wrong.
    ///
    /// # Errors
    ///
    /// A file that cannot be read to the tensor's end, or a shape whose elements no memory holds.
    pub fn elements<const N: usize, E: Clone + Default + Send>(
        &self,
        name: &str,
        tensor: &TensorInfo,
        read: impl Fn([u8; N]) -> E + Sync,
    ) -> Result<ArrayD<E>> {
        let (first, end) = tensor.data_offsets;
        let count = (end - first) / N;
        let mut elements = vec![E::default(); count];
        elements
            .par_chunks_mut(PIECE)
            .enumerate()
            .try_for_each_init(Vec::new, |buffer, (piece, elements)| {
                buffer.resize(N * elements.len(), 0);
                let offset = self.start + (first + piece * PIECE * N) as u64;
                self.source.read_exact_at(buffer, offset)?;
                let (bytes, _) = buffer.as_chunks::<N>();
                elements.iter_mut().zip(bytes).for_each(|(element, &bytes)| *element = read(bytes));
                Ok(())
            })
            .map_err(|error: IoError| Error::Unexpected {
                tensor: name.into(),
                reason: format!("expected {count} elements, found the end: {error}"),
            })?;
        ArrayD::from_shape_vec(tensor.shape.clone(), elements).map_err(|_| Error::Shape {
            tensor: name.into(),
            expected: "one that fits in memory".into(),
            found: tensor.shape.clone(),
        })
    }
}

/// What has no length may have no end: no more of it is read than its header claims, and one byte that shows that it
/// goes on.
fn read_stream(file: &mut File) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![];
    let mut read = |bytes: &mut Vec<u8>, count: u64| file.take(count).read_to_end(bytes);
    read(&mut bytes, LENGTH as u64)?;
    let length = <[u8; LENGTH]>::try_from(&bytes[..]).map(u64::from_le_bytes);
    let Some(length) = length.ok().filter(|&length| length <= LONGEST_HEADER as u64) else { return Ok(bytes) };
    read(&mut bytes, length)?;
    if let Ok(header) = serde_json::from_slice::<Metadata>(&bytes[LENGTH..]) {
        read(&mut bytes, (header.data_len() as u64).saturating_add(1))?;
    }
    Ok(bytes)
}

/// The type of a tensor of floating-point numbers.
///
/// # Errors
///
/// A tensor of another type.
pub fn floating_point(name: &str, dtype: safetensors::Dtype) -> Result<Dtype> {
    Dtype::of(dtype).ok_or_else(|| Error::Unexpected {
        tensor: name.into(),
        reason: format!("expected F64, F32, BF16 or F16, found {dtype}"),
    })
}
