//! How fast a training step is, and how fast it could be: beside it a bare matrix product, measured in the same run.
//!
//! ```
//! use std::num::NonZeroUsize;
//! use woracle::{bench, registry::Precision};
//! let case = bench::CASES.iter().find(|case| case.name.starts_with("linear-n256")).unwrap();
//! let timing = bench::time(case, Precision::F64, NonZeroUsize::new(3).unwrap())?;
//! assert!(0.0 < timing.min_ms && timing.min_ms <= timing.median_ms);
//! # Ok::<(), woracle::Error>(())
//! ```

mod step;

pub(crate) use step::StepOf;
pub use step::TrainingStep;

use crate::cases::{Draw, Spec};
use crate::matmul::{Accumulate, product_into};
use crate::registry::{self, Precision};
use crate::wora::Config;
use crate::{Result, Scalar};
use ndarray::{Array2, Ix2};
use serde::Serialize;
use std::num::NonZeroUsize;
use std::time::Instant;

const CONFIG: Config = Config { scaling: 2.0, ..Spec::plain("").config };
const LINEAR: Spec = Spec { config: CONFIG, alpha_beta: (1.1, 0.9), ..Spec::plain("") };
const CONV: Spec = Spec { rank: 8, operator: r#"{"padding":1}"#, ..LINEAR };

/// The steps that are timed. Names give the shapes: tokens `n`, kernel `k`, stride `s`, padding `p`, rank `r`.
pub const CASES: &[Spec] = &[
    Spec { name: "linear-n2048-1024x1024-r16", x: &[2048, 1024], weight: &[1024, 1024], rank: 16, ..LINEAR },
    Spec { name: "linear-n512-4096x4096-r16", x: &[512, 4096], weight: &[4096, 4096], rank: 16, ..LINEAR },
    Spec { name: "linear-n256-256x256-r8", x: &[256, 256], weight: &[256, 256], rank: 8, ..LINEAR },
    Spec { name: "embedding-n2048-v32000-d512-r8", x: &[2048], weight: &[32000, 512], rank: 8, bias: false, ..LINEAR },
    Spec {
        name: "conv1d-8x128x1024-o128-k5-p2-r8",
        x: &[8, 128, 1024],
        weight: &[128, 128, 5],
        operator: r#"{"padding":2}"#,
        ..CONV
    },
    Spec { name: "conv2d-8x64x56x56-o64-k3-p1-r8", x: &[8, 64, 56, 56], weight: &[64, 64, 3, 3], ..CONV },
    Spec {
        name: "conv2d-8x128x28x28-o256-k3-s2-p1-r8",
        x: &[8, 128, 28, 28],
        weight: &[256, 128, 3, 3],
        operator: r#"{"padding":1,"stride":2}"#,
        ..CONV
    },
    Spec { name: "conv3d-2x32x16x16x16-o32-k3-p1-r8", x: &[2, 32, 16, 16, 16], weight: &[32, 32, 3, 3, 3], ..CONV },
];

/// How long one training step takes.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// The case.
    pub name: &'static str,
    /// `"f32"` or `"f64"`.
    pub dtype: &'static str,
    /// The threads of rayon; OpenBLAS has its own.
    pub threads: usize,
    /// The fastest run, in milliseconds.
    pub min_ms: f64,
    /// The median run, in milliseconds.
    pub median_ms: f64,
    /// What [`TrainingStep::flops`] counts, in the median run: 10^9 operations a second.
    pub gflops: f64,
    /// The same of a bare square product.
    pub matmul_gflops: f64,
    /// How near the step comes to it.
    pub percent_of_matmul: f64,
}

/// Times a case, one run to warm up and then so many, and beside it [`square_product`].
///
/// # Errors
///
/// None for a case of [`CASES`].
pub fn time(case: &'static Spec, precision: Precision, runs: NonZeroUsize) -> Result<Timing> {
    let mut step = training_step(case, precision)?;
    let mut seconds = Vec::with_capacity(runs.get());
    // Within rayon's pool, as a training loop should be: from outside of it every product first wakes a thread.
    rayon::scope(|_| {
        step.run()?;
        for _ in 0..runs.get() {
            step.update();
            let start = Instant::now();
            step.run()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        Ok(())
    })?;
    let matmul_gflops = square_product(precision, runs);
    let (min, median) = (seconds.iter().copied().fold(f64::INFINITY, f64::min), median(seconds));
    let gflops = step.flops()? as f64 / median * 1e-9;
    Ok(Timing {
        name: case.name,
        dtype: precision.name(),
        threads: rayon::current_num_threads(),
        min_ms: min * 1e3,
        median_ms: median * 1e3,
        gflops,
        matmul_gflops,
        percent_of_matmul: 100.0 * gflops / matmul_gflops,
    })
}

/// The step of a case, its numbers drawn from seed 0.
///
/// # Errors
///
/// None for a case of [`CASES`].
pub fn training_step(case: &Spec, precision: Precision) -> Result<Box<dyn TrainingStep>> {
    let layer = case.name.split('-').next().unwrap_or_default();
    let layer = registry::layer(layer)?;
    layer.training_step(&layer.draw(case, 0), precision)
}

/// How fast this machine multiplies two matrices of 1024 x 1024, in 10^9 operations a second: the median of so many runs.
pub fn square_product(precision: Precision, runs: NonZeroUsize) -> f64 {
    match precision {
        Precision::F32 => square_product_in::<f32>(runs),
        Precision::F64 => square_product_in::<f64>(runs),
    }
}

fn square_product_in<T: Scalar>(runs: NonZeroUsize) -> f64 {
    const SIZE: usize = 1024;
    let mut draw = Draw::new(0);
    let mut matrix =
        || draw.array(&[SIZE, SIZE], |v| v).mapv(T::from_f64).into_dimensionality::<Ix2>().expect("a matrix");
    let (a, b, mut c) = (matrix(), matrix(), Array2::zeros((SIZE, SIZE)));
    let mut run = || {
        let start = Instant::now();
        product_into(T::one(), a.view(), b.view(), Accumulate::Replace, c.view_mut());
        start.elapsed().as_secs_f64()
    };
    run();
    let seconds = (0..runs.get()).map(|_| run()).collect();
    2.0 * (SIZE as f64).powi(3) / median(seconds) * 1e-9
}

/// The middle one; of an even number the later of the two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
