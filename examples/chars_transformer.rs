//! The run of `examples/chars-transformer.toml`, or of any other configuration, through the library, watched by a line of
//! its own every hundred steps.
//!
//! ```sh
//! cargo run --release --example chars_transformer [CONFIG.toml [DIRECTORY]]
//! ```

use std::path::PathBuf;
use woracle::Result;
use woracle::train::{Observer, Progress, Run, Start, read};

struct Lines;

impl Observer for Lines {
    fn watch(&self, progress: &Progress<'_>) {
        let Progress { stage, step, steps, loss, validation } = progress;
        if step % 100 == 0 || step == steps {
            let validation = validation.map_or_else(String::new, |validation| format!(", validation {validation}"));
            println!("{stage} {step}/{steps}: loss {loss:.4}{validation}");
        }
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(PathBuf::from);
    let config = arguments
        .next()
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/chars-transformer.toml"));
    let out = arguments.next().unwrap_or_else(|| "runs/chars-transformer".into());
    let summary = Run::new(&read(&config)?, &out, Start::Resume)?.finish(&Lines)?;
    println!("{summary}");
    Ok(())
}
