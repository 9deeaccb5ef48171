//! One array of NumPy: the header is checked against the length before an element is read.

use super::read::{found, shown};
use ndarray::{ArrayD, Dimension, IxDyn, ShapeBuilder};
use std::io::Read;

const MAGIC: &[u8] = b"\x93NUMPY";
/// So many elements are read in one piece.
const PIECE: u64 = 1 << 14;
/// NumPy refuses longer headers too, unless it is told to trust the file.
const LONGEST_HEADER: u64 = 10_000;

/// An array, its elements widened.
#[derive(Debug, PartialEq)]
pub(super) enum Array {
    Float(ArrayD<f64>),
    Int(ArrayD<i64>),
}

/// What goes wrong with an array, without the file in front.
type Parsed<T> = Result<T, String>;

/// Reads an array. Nothing grows beyond what is really there, whatever the header claims.
pub(super) fn array(reader: &mut dyn Read, length: Option<u64>) -> Parsed<Array> {
    let mut magic = [0; 8];
    reader.read_exact(&mut magic).map_err(|error| format!("expected an array of NumPy, {}", found(&error)))?;
    if !magic.starts_with(MAGIC) || !(1..=3).contains(&magic[6]) {
        return Err("expected an array of NumPy (version 1, 2 or 3), found something else".into());
    }
    let mut header_length = [0; 4];
    let width = if magic[6] == 1 { 2 } else { 4 };
    reader.read_exact(&mut header_length[..width]).map_err(|error| format!("expected a header, {}", found(&error)))?;
    let header_length = u64::from(u32::from_le_bytes(header_length));
    if header_length > LONGEST_HEADER {
        return Err(format!("expected a header of at most {LONGEST_HEADER} bytes, found {header_length}"));
    }
    let mut header = vec![0; header_length as usize];
    reader
        .read_exact(&mut header)
        .map_err(|error| format!("expected a header of {header_length} bytes, {}", found(&error)))?;
    let header = Header::parse(&String::from_utf8_lossy(&header))?;

    let (count, bytes) = header.count_and_bytes()?;
    let expected = |found: &str| format!("expected {bytes} bytes for the shape {:?}, found {found}", header.shape);
    if let Some(length) = length {
        let found = length.saturating_sub(8 + width as u64 + header_length);
        if found != bytes {
            return Err(expected(&found.to_string()));
        }
    }
    let failed = |error: std::io::Error| expected(&format!("less: {error}"));
    let array = match header.descr.as_str() {
        "<f8" => Array::Float(header.array(elements(reader, count, f64::from_le_bytes).map_err(failed)?)?),
        "<f4" => {
            Array::Float(header.array(elements(reader, count, |b| f32::from_le_bytes(b).into()).map_err(failed)?)?)
        }
        "<i8" => Array::Int(header.array(elements(reader, count, i64::from_le_bytes).map_err(failed)?)?),
        "<i4" => Array::Int(header.array(elements(reader, count, |b| i32::from_le_bytes(b).into()).map_err(failed)?)?),
        _ => Array::Int(header.array(elements(reader, count, |[b]: [u8; 1]| b.into()).map_err(failed)?)?),
    };
    if reader.read(&mut [0]).map_err(failed)? != 0 {
        return Err(expected("more"));
    }
    if let Array::Float(values) = &array
        && let Some((index, found)) = values.indexed_iter().find(|(_, value)| !value.is_finite())
    {
        let index = Dimension::slice(&index);
        return Err(format!("{index:?}: expected a finite number, found {found}"));
    }
    Ok(array)
}

fn elements<const N: usize, E>(
    reader: &mut dyn Read,
    count: u64,
    read: impl Fn([u8; N]) -> E,
) -> std::io::Result<Vec<E>> {
    let mut elements = vec![];
    let mut buffer = vec![0; N * PIECE.min(count) as usize];
    let mut left = count;
    while left > 0 {
        let piece = left.min(PIECE);
        let bytes = &mut buffer[..N * piece as usize];
        reader.read_exact(bytes)?;
        elements.extend(bytes.as_chunks::<N>().0.iter().map(|&bytes| read(bytes)));
        left -= piece;
    }
    Ok(elements)
}

/// The dictionary in front of the elements.
struct Header {
    descr: String,
    fortran_order: bool,
    shape: Vec<usize>,
}

impl Header {
    fn parse(text: &str) -> Parsed<Self> {
        let wrong = |key: &str| format!("expected {key} in the header, found {}", shown(text.as_bytes()));
        let value = |key: &str| text.split_once(key).map(|(_, rest)| rest.trim_start()).ok_or_else(|| wrong(key));
        let descr = value("'descr':")?;
        let types = "'<f8', '<f4', '<i8', '<i4' or '|u1'";
        let (descr, _) = descr.strip_prefix('\'').and_then(|rest| rest.split_once('\'')).ok_or_else(|| wrong(types))?;
        if !["<f8", "<f4", "<i8", "<i4", "|u1"].contains(&descr) {
            return Err(format!("expected elements of type {types}, found {}", shown(descr.as_bytes())));
        }
        let fortran_order = match value("'fortran_order':")? {
            order if order.starts_with("True") => true,
            order if order.starts_with("False") => false,
            _ => return Err(wrong("'fortran_order': True or False")),
        };
        let shape = value("'shape':")?.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let axes = shape.map(|(axes, _)| axes.split(',').map(str::trim).filter(|axis| !axis.is_empty()));
        let shape = axes.and_then(|axes| axes.map(|axis| axis.parse().ok()).collect());
        Ok(Self {
            descr: descr.into(),
            fortran_order,
            shape: shape.ok_or_else(|| wrong("a 'shape' of integers from 0"))?,
        })
    }

    fn count_and_bytes(&self) -> Parsed<(u64, u64)> {
        let size = match self.descr.as_str() {
            "<f8" | "<i8" => 8,
            "<f4" | "<i4" => 4,
            _ => 1,
        };
        let count = self.shape.iter().try_fold(1_u64, |product, &axis| product.checked_mul(axis as u64));
        let bytes = count.and_then(|count| Some((count, count.checked_mul(size)?)));
        bytes.ok_or_else(|| self.too_large())
    }

    fn too_large(&self) -> String {
        format!("expected a shape that fits in memory, found {:?}", self.shape)
    }

    /// In the order of C, whatever the file has.
    fn array<E: Clone>(&self, elements: Vec<E>) -> Parsed<ArrayD<E>> {
        let shape = IxDyn(&self.shape).set_f(self.fortran_order);
        let array = ArrayD::from_shape_vec(shape, elements).map_err(|_| self.too_large())?;
        Ok(if array.is_standard_layout() { array } else { array.as_standard_layout().into_owned() })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A file as NumPy writes it.
    pub(crate) fn npy(descr: &str, shape: &str, bytes: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), bytes].concat()
    }

    #[test]
    fn a_file_that_is_no_array_or_claims_more_is_refused() {
        let long = [b"\x93NUMPY\x02\x00", &[255; 4][..]].concat();
        for (x, expected) in [
            (
                npy("<f8", "(1000000000000,)", &[0; 8]),
                "expected 8000000000000 bytes for the shape [1000000000000], found 8",
            ),
            (
                npy("<f8", "(4294967296, 4294967296)", &[]),
                "expected a shape that fits in memory, found [4294967296, 4294967296]",
            ),
            (npy("<f8", "(1,)", &[0; 9]), "expected 8 bytes for the shape [1], found 9"),
            (npy(">f8", "(1,)", &[0; 8]), "'<i4' or '|u1', found \">f8\""),
            (
                npy("<f8", "(-1,)", &[0; 8]),
                "expected a 'shape' of integers from 0 in the header, found \"{'descr': '<f8', 'fortran_order': False,\"...",
            ),
            (long, "expected a header of at most 10000 bytes, found 4294967295"),
            (b"PK\x03\x04 and more".to_vec(), "expected an array of NumPy (version 1, 2 or 3), found something else"),
            (vec![], "expected an array of NumPy, found the end of the file"),
        ] {
            for length in [Some(x.len() as u64), None] {
                let error = array(&mut &x[..], length).unwrap_err();
                assert!(error.ends_with(expected) || length.is_none() && error.starts_with("expected"), "{error}");
            }
        }
    }
}
