//! `wora bench`: what it says, and that it counts the arithmetic of the factored path.

mod command;

use command::wora;
use serde_json::Value;
use std::collections::BTreeSet;
use woracle::bench::{CASES, square_product, training_step};
use woracle::registry::Precision;

#[test]
fn a_case_is_a_line_of_json() {
    let (code, line, _) = wora(&["bench", "linear-n256", "--dtype", "f32", "--threads", "1", "--runs", "2", "--json"]);
    assert_eq!(code, Some(0));
    let line: Value = serde_json::from_str(&line).unwrap();
    let keys: BTreeSet<_> = line.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = ["name", "dtype", "threads", "min_ms", "median_ms", "gflops", "matmul_gflops", "percent_of_matmul"];
    assert_eq!(keys, BTreeSet::from(expected));
    assert_eq!(
        (&line["name"], &line["dtype"], &line["threads"]),
        (&"linear-n256-256x256-r8".into(), &"f32".into(), &1.into())
    );
    let number = |key: &str| line[key].as_f64().unwrap();
    assert!(0.0 < number("min_ms") && number("min_ms") <= number("median_ms"));
    let percent = 100.0 * number("gflops") / number("matmul_gflops");
    assert!((number("percent_of_matmul") / percent - 1.0).abs() < 1e-9);
}

#[test]
fn how_fast_products_are_is_measured() {
    let runs = std::num::NonZeroUsize::MIN;
    let [narrow, wide] = Precision::ALL.map(|precision| square_product(precision, runs));
    assert!(narrow > 0.01 && wide > 0.01 && narrow != wide, "{narrow} and {wide}");
}

#[test]
fn every_case_is_listed_under_the_name_of_its_shapes() {
    let (_, listed, _) = wora(&["bench", "--list"]);
    assert_eq!(listed.lines().collect::<Vec<_>>(), CASES.iter().map(|case| case.name).collect::<Vec<_>>());
    for case in CASES {
        assert!(case.name.ends_with(&format!("-r{}", case.rank)), "{}", case.name);
        for length in case.x.iter().chain(case.weight) {
            assert!(case.name.contains(&length.to_string()), "{}: {length}", case.name);
        }
    }
}

#[test]
fn a_filter_that_selects_nothing_is_refused_with_exit_code_2() {
    let (code, said, complained) = wora(&["bench", "linear-n257"]);
    assert_eq!((code, said.as_str()), (Some(2), ""));
    assert!(complained.contains("linear-n257"), "{complained}");
}

/// E76.
#[test]
fn operations_are_those_of_the_factored_products() {
    let flops = |name: &str| {
        let case = CASES.iter().find(|case| case.name == name).unwrap();
        training_step(case, Precision::F64).unwrap().flops().unwrap()
    };
    let (n, i, o, r) = (256, 256, 256, 8);
    let large = 2 * 2 * n * i * o; // y, dx: E76
    let pair = 2 * 3 * n * r * i + 2 * 3 * n * r * o; // U, dx, dA; y, S, T
    assert_eq!(flops("linear-n256-256x256-r8"), large + pair + 2 * o * i * r);
    let (places, units, fan_in, rank) = (2 * 16 * 16 * 16, 32, 32 * 27, 8);
    let large = 2 * 2 * places * units * fan_in;
    let pair = 2 * 3 * places * rank * (fan_in + units);
    assert_eq!(flops("conv3d-2x32x16x16x16-o32-k3-p1-r8"), large + pair + 2 * units * fan_in * rank);
    let (n, d, r, v) = (2048, 512, 8, 32000);
    assert_eq!(flops("embedding-n2048-v32000-d512-r8"), 2 * 3 * n * d * r + 2 * d * v * r);
}
