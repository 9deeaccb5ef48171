//! A disk that is full, at every byte.

use super::merge::{Learned, Work, plans};
use super::rewrite::write_tensors;
use super::{Checkpoint, MergeOptions, Model};
use crate::wora::ZeroNorm;
use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result, Write};
use std::path::Path;
use std::sync::Mutex;

/// A disk with so many bytes left.
struct Disk {
    left: usize,
    written: Vec<u8>,
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let count = bytes.len().min(self.left);
        if count == 0 && !bytes.is_empty() {
            return Err(Error::from(ErrorKind::StorageFull));
        }
        self.left -= count;
        self.written.extend_from_slice(&bytes[..count]);
        Ok(count)
    }
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_that_is_full_at_any_byte_is_an_error_that_names_the_file() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peft/linear-wora-pr2872");
    let model = Model::open(&fixture.join("model.safetensors")).expect("a model");
    let adapters = [Checkpoint::open(&fixture.join("adapter")).expect("an adapter")];
    let plans = plans(&model, &adapters, ZeroNorm::Error).expect("they fit");
    let merge = |left: usize| {
        let learned = Mutex::new(Learned::default());
        let options = MergeOptions::default();
        let work = Work { model: &model, adapters: &adapters, plans: &plans, options, learned: &learned, kept: None };
        let outputs = work.outputs().expect("outputs");
        let mut disk = Disk { left, written: vec![] };
        let path = Path::new("out/model.safetensors");
        write_tensors(&mut disk, path, &model, &outputs[0], &BTreeMap::new(), &|_| Ok(())).map(|()| disk.written)
    };
    let whole = merge(usize::MAX).expect("a disk with room").len();
    assert!(whole > 1000);
    for left in 0..whole {
        let error = merge(left).expect_err("a full disk").to_string();
        assert!(error.starts_with("out/model.safetensors: "), "{left}: {error}");
    }
    assert_eq!(merge(whole).expect("just enough").len(), whole);
}
