//! Files of a run, each written to the side and put in its place when it is whole.

pub(super) use crate::aside::replace;
use crate::dtype::Dtype;
use crate::tensor_writer::{Planned, TensorWriter};
use crate::{Result, Scalar};
use ndarray::ArrayD;
use std::collections::BTreeMap;
use std::path::Path;

/// Writes tensors, and one entry of metadata.
pub(super) fn replace_tensors<T: Scalar>(
    path: &Path,
    tensors: &BTreeMap<String, ArrayD<T>>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let dtype = Dtype::of_scalar::<T>();
    let planned = |(name, values): (&String, &ArrayD<T>)| Planned {
        name: name.clone(),
        dtype: dtype.into(),
        shape: values.shape().to_vec(),
    };
    let planned: Vec<_> = tensors.iter().map(planned).collect();
    replace(path, |out| {
        let mut writer = TensorWriter::new(out, &planned, metadata)?;
        for values in tensors.values() {
            let values: Vec<f64> = values.iter().map(|value| value.as_f64()).collect();
            writer.write(&dtype.encode(&values))?;
        }
        writer.finish().map(drop)
    })
}
