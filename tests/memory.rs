//! What a convolution's training step needs in memory beside what it is given and what it keeps: a few MiB a thread,
//! whatever the size of the images.

use peak_alloc::PeakAlloc;
use woracle::bench::{CASES, training_step};
use woracle::cases::Spec;
use woracle::registry::Precision;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

const MIB: usize = 1 << 20;
/// For each thread.
const FEW: usize = 6 * MIB;

/// Bytes beyond those given and those kept, in two steps.
fn beyond(case: &Spec, precision: Precision) -> usize {
    // A thread's first product reserves room for packed operands, twice the cache, of which only what is used becomes
    // memory: not what is measured here.
    training_step(case, precision).unwrap().run().unwrap();
    let mut step = training_step(case, precision).unwrap();
    let given = HEAP.current_usage();
    HEAP.reset_peak_usage();
    step.run().unwrap();
    step.update();
    step.run().unwrap();
    HEAP.peak_usage() - given - step.kept_bytes().unwrap()
}

// One test: another that ran beside it would count in.
#[test]
fn convolutions_need_a_few_mib_a_thread_whatever_the_size_of_the_images() {
    let most = FEW * rayon::current_num_threads();
    for case in CASES.iter().filter(|case| case.name.starts_with("conv")) {
        for factor in [1, 2, 8] {
            let mut x = case.x.to_vec();
            *x.last_mut().unwrap() *= factor;
            let larger = Spec { x: Box::leak(x.into_boxed_slice()), ..*case };
            for precision in Precision::ALL {
                let beyond = beyond(&larger, precision);
                let of = larger.x;
                assert!(beyond <= most, "{} with x {of:?} in {precision:?}: {beyond} bytes beyond", case.name);
            }
        }
    }
}
