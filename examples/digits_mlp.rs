//! The run of `examples/digits-mlp.toml` through the library, and then every way of adapting it, compared.
//!
//! ```sh
//! cargo run --release --example digits_mlp
//! ```

use std::path::Path;
use woracle::train::compare::compare;
use woracle::train::{Run, Start, Unwatched, read};

fn main() -> woracle::Result<()> {
    let config = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits-mlp.toml"))?;
    let directory = tempfile::tempdir().expect("a directory");
    let run = Run::new(&config, &directory.path().join("run"), Start::Fresh)?;
    println!("{}", run.finish(&Unwatched)?);
    for way in compare(&config, &directory.path().join("compared"), &Unwatched)? {
        println!("{:20} {:8.2} +- {:.2}, {} numbers trained", way.way, way.mean, way.deviation, way.parameters);
    }
    Ok(())
}
