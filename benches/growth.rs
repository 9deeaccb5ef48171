//! What a training step costs as its work grows along one axis at a time: time, arithmetic done in it, and memory.
//! `cargo bench --bench growth`

use peak_alloc::PeakAlloc;
use std::time::Instant;
use woracle::bench::{CASES, training_step};
use woracle::cases::Spec;
use woracle::registry::Precision;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// So many steps are timed, of which the median counts.
const RUNS: usize = 7;
const MIB: f64 = (1 << 20) as f64;

fn linear(tokens: usize, features: usize, rank: usize) -> Spec {
    let shape = |shape: [usize; 2]| -> &'static [usize] { Box::leak(Box::new(shape)) };
    Spec { x: shape([tokens, features]), weight: shape([features, features]), rank, ..CASES[0] }
}

fn conv2d(images: usize, side: usize) -> Spec {
    let of_conv = CASES.iter().find(|case| case.name.starts_with("conv2d-8x64")).expect("a case of the list");
    Spec { x: Box::leak(Box::new([images, 64, side, side])), ..*of_conv }
}

/// One step of a case: its median time, the arithmetic done in it, and the bytes it is given, keeps, and needs beyond.
struct Cost {
    ms: f64,
    gflops: f64,
    given: usize,
    kept: usize,
    beyond: usize,
}

impl Cost {
    fn of(case: &Spec, precision: Precision) -> woracle::Result<Self> {
        // A thread's first product reserves room for packed operands, twice the cache, of which only what is used becomes
        // memory: not what is measured here.
        training_step(case, precision)?.run()?;
        let before = HEAP.current_usage();
        let mut step = training_step(case, precision)?;
        let given = HEAP.current_usage();
        HEAP.reset_peak_usage();
        let mut seconds = Vec::with_capacity(RUNS);
        rayon::scope(|_| {
            for run in 0..=RUNS {
                step.update();
                let start = Instant::now();
                step.run()?;
                // The first one warms up.
                seconds.extend((run > 0).then(|| start.elapsed().as_secs_f64()));
            }
            woracle::Result::Ok(())
        })?;
        seconds.sort_by(f64::total_cmp);
        let (median, kept) = (seconds[RUNS / 2], step.kept_bytes()?);
        Ok(Self {
            ms: median * 1e3,
            gflops: step.flops()? as f64 / median * 1e-9,
            given: given - before,
            kept,
            beyond: HEAP.peak_usage() - given - kept,
        })
    }
}

fn main() -> woracle::Result<()> {
    let growing: [(&str, Vec<(usize, Spec)>); 5] = [
        ("tokens (1024 features, rank 16)", [256, 512, 1024, 2048, 4096].map(|n| (n, linear(n, 1024, 16))).to_vec()),
        ("features (1024 tokens, rank 16)", [256, 512, 1024, 2048, 4096].map(|d| (d, linear(1024, d, 16))).to_vec()),
        ("rank (2048 tokens, 1024 features)", [4, 8, 16, 32, 64].map(|r| (r, linear(2048, 1024, r))).to_vec()),
        ("image side (8 images, 64 channels)", [14, 28, 56, 112, 224].map(|side| (side, conv2d(8, side))).to_vec()),
        ("images (56 x 56, 64 channels)", [1, 2, 4, 8, 16, 32].map(|images| (images, conv2d(images, 56))).to_vec()),
    ];
    println!("| growing | | f64: ms | GF/s | given MiB | kept MiB | beyond MiB | f32: ms | GF/s | beyond MiB |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for (axis, cases) in growing {
        for (size, case) in cases {
            let [of_f32, of_f64] = Precision::ALL.map(|precision| Cost::of(&case, precision));
            let (Cost { ms, gflops, given, kept, beyond }, of_f32) = (of_f64?, of_f32?);
            let [given, kept, beyond, beyond_f32] =
                [given, kept, beyond, of_f32.beyond].map(|bytes| bytes as f64 / MIB);
            let Cost { ms: ms_f32, gflops: gflops_f32, .. } = of_f32;
            println!(
                "| {axis} | {size} | {ms:.2} | {gflops:.0} | {given:.1} | {kept:.1} | {beyond:.1} | {ms_f32:.2} | \
                 {gflops_f32:.0} | {beyond_f32:.1} |"
            );
        }
    }
    Ok(())
}
