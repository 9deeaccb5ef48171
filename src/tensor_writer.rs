//! Safetensors files written from front to back: the header at once, then piece after piece, and never the whole file.
//!
//! ```
//! use safetensors::{Dtype, SafeTensors};
//! use woracle::tensor_writer::{Planned, TensorWriter};
//! let bias = Planned { name: "bias".into(), dtype: Dtype::F32, shape: vec![2] };
//! let mut writer = TensorWriter::new(Vec::new(), &[bias], &Default::default())?;
//! writer.write(&1.0_f32.to_le_bytes())?;
//! writer.write(&2.0_f32.to_le_bytes())?;
//! let bytes = writer.finish()?;
//! assert_eq!(SafeTensors::deserialize(&bytes).unwrap().tensor("bias").unwrap().shape(), [2]);
//! # Ok::<(), std::io::Error>(())
//! ```

use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::{Error, Result, Write};

/// A header's length is a multiple of this, so that tensors are aligned.
const ALIGNMENT: usize = 8;

/// A tensor that is going to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Planned {
    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// A file that is being written.
pub struct TensorWriter<W> {
    out: W,
    /// How many bytes there are still to come.
    missing: usize,
}

impl<W: Write> TensorWriter<W> {
    /// Writes the header of a file of these tensors, whose bytes are to follow in this order.
    ///
    /// # Errors
    ///
    /// What cannot be written; a name that is there twice.
    pub fn new(mut out: W, tensors: &[Planned], metadata: &BTreeMap<String, String>) -> Result<Self> {
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), json!(metadata));
        }
        let mut start = 0;
        for tensor in tensors {
            let end = start + tensor.bytes();
            let info = json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end] });
            if header.insert(tensor.name.clone(), info).is_some() {
                return Err(Error::other(format!("{}: expected once, found twice", tensor.name)));
            }
            start = end;
        }
        let mut header = Value::from(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        Ok(Self { out, missing: start })
    }

    /// The next bytes.
    ///
    /// # Errors
    ///
    /// What cannot be written; more bytes than the header says.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let more = || Error::other(format!("{} bytes more than the header says", bytes.len() - self.missing));
        self.missing = self.missing.checked_sub(bytes.len()).ok_or_else(more)?;
        self.out.write_all(bytes)
    }

    /// The whole file.
    ///
    /// # Errors
    ///
    /// What cannot be written; fewer bytes than the header says.
    pub fn finish(mut self) -> Result<W> {
        if self.missing > 0 {
            return Err(Error::other(format!("{} bytes fewer than the header says", self.missing)));
        }
        self.out.flush()?;
        Ok(self.out)
    }
}
