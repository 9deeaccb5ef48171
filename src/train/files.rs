//! Files of a run, each written to the side and put in its place when it is whole.

use crate::dtype::Dtype;
use crate::tensor_writer::{Planned, TensorWriter};
use crate::{Error, Result, Scalar};
use ndarray::ArrayD;
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;
use tempfile::NamedTempFile;

/// Writes a file that is either there as a whole or as it was before.
pub(super) fn replace(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(path, &error);
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let aside: NamedTempFile = builder.prefix(".wora-").tempfile_in(directory).map_err(failed)?;
    let mut buffered = BufWriter::new(aside);
    write(&mut buffered).map_err(failed)?;
    let aside = buffered.into_inner().map_err(|error| Error::io(path, error.error()))?;
    aside.persist(path).map_err(|error| Error::io(path, &error.error)).map(drop)
}

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
