//! The steps of `wora bench` under criterion: `cargo bench`, or `cargo bench -- linear-n256`.

use criterion::{Criterion, criterion_group, criterion_main};
use woracle::bench::{CASES, training_step};
use woracle::registry::Precision;

fn steps(criterion: &mut Criterion) {
    for case in CASES {
        for precision in Precision::ALL {
            let mut step = training_step(case, precision).expect("a case of the list");
            criterion.bench_function(&format!("{}/{}", case.name, precision.name()), |bencher| {
                bencher.iter_custom(|runs| {
                    // Within rayon's pool, and without the update.
                    rayon::scope(|_| {
                        (0..runs)
                            .map(|_| {
                                step.update();
                                let start = std::time::Instant::now();
                                step.run().expect("a case of the list");
                                start.elapsed()
                            })
                            .sum()
                    })
                });
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = steps
}
criterion_main!(benches);
