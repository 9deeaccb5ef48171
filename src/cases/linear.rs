//! The cases of the linear layer: each setting alone, some together, and both sides of every threshold.

use super::{Spec, Twist};
use crate::wora::{Config, Method, ZeroNorm};
use crate::{NormAxis, NormGradient};

const PLAIN: Spec = Spec::plain("linear-plain");
const DETACHED: Config = PLAIN.config;
const FULL: Config = Config { norm_gradient: NormGradient::Full, ..DETACHED };
const PER_INPUT: Config = Config { norm_axis: NormAxis::Input, ..DETACHED };
const PER_INPUT_FULL: Config = Config { norm_axis: NormAxis::Input, ..FULL };
/// 2 * 260 * 130 * 256 operations and 260 * 256 outputs: above the thresholds of parallel products and passes.
const LARGE: Spec = Spec { x: &[260, 130], weight: &[256, 130], rank: 4, ..PLAIN };
/// 2 * 400 * 400 * 32 operations: above the threshold of parallel norms, every row of which is cancelled.
const LARGE_CANCELLING: Spec = Spec { x: &[3, 400], weight: &[400, 400], rank: 31, twist: Twist::Cancelling, ..PLAIN };

/// A power of two.
const TWO: Config = Config { scaling: 2.0, ..DETACHED };
const EXACT: Spec =
    Spec { x: &[2, 5], weight: &[3, 5], rank: 2, config: TWO, alpha_beta: (0.5, 0.5), twist: Twist::Exact, ..PLAIN };

/// Every case of the linear layer.
pub const LINEAR: &[Spec] = &[
    PLAIN,
    Spec { name: "linear-full", config: FULL, ..PLAIN },
    Spec { name: "linear-no-bias", bias: false, ..PLAIN },
    Spec { name: "linear-one-row", x: &[7], ..PLAIN },
    Spec { name: "linear-batched", x: &[2, 3, 7], ..PLAIN },
    Spec { name: "linear-rank-1", rank: 1, ..PLAIN },
    Spec { name: "linear-rank-1-full", rank: 1, config: FULL, ..PLAIN },
    Spec { name: "linear-rank-above-features", x: &[5, 3], weight: &[4, 3], rank: 6, ..PLAIN },
    Spec { name: "linear-one-unit-full", weight: &[1, 7], config: FULL, ..PLAIN },
    Spec { name: "linear-one-feature-full", x: &[5, 1], weight: &[6, 1], config: FULL, ..PLAIN },
    Spec { name: "linear-fresh-b", twist: Twist::FreshB, alpha_beta: (1.0, 1.0), ..PLAIN },
    Spec { name: "linear-alpha-0-full", alpha_beta: (0.0, 0.75), config: FULL, ..PLAIN },
    Spec { name: "linear-beta-0-full", alpha_beta: (1.25, 0.0), config: FULL, ..PLAIN },
    Spec { name: "linear-negative-alpha-beta-full", alpha_beta: (-0.75, -1.5), config: FULL, ..PLAIN },
    Spec { name: "linear-fan-in-fan-out", weight: &[7, 6], operator: r#"{"fan_in_fan_out":true}"#, ..PLAIN },
    Spec {
        name: "linear-fan-in-fan-out-dropout-full",
        weight: &[7, 6],
        operator: r#"{"fan_in_fan_out":true}"#,
        dropout: Some(0.5),
        config: FULL,
        ..PLAIN
    },
    Spec { name: "linear-dropout", dropout: Some(0.5), ..PLAIN },
    Spec { name: "linear-dropout-full", dropout: Some(0.25), config: FULL, ..PLAIN },
    Spec { name: "linear-per-input", config: PER_INPUT, ..PLAIN },
    Spec { name: "linear-per-input-full", config: PER_INPUT_FULL, ..PLAIN },
    Spec { name: "linear-per-input-dropout", config: PER_INPUT, dropout: Some(0.5), ..PLAIN },
    Spec { name: "linear-per-input-dropout-full", config: PER_INPUT_FULL, dropout: Some(0.5), ..PLAIN },
    Spec {
        name: "linear-per-input-fan-in-fan-out-full",
        weight: &[7, 6],
        operator: r#"{"fan_in_fan_out":true}"#,
        config: PER_INPUT_FULL,
        ..PLAIN
    },
    Spec { name: "linear-norm-eps", config: Config { norm_eps: 0.125, ..DETACHED }, ..PLAIN },
    Spec { name: "linear-norm-eps-full", config: Config { norm_eps: 0.125, ..FULL }, ..PLAIN },
    Spec {
        name: "linear-zero-unit",
        twist: Twist::ZeroUnit,
        config: Config { zero_norm: ZeroNorm::Zero, ..DETACHED },
        ..PLAIN
    },
    Spec {
        name: "linear-zero-unit-dropout-full",
        twist: Twist::ZeroUnit,
        dropout: Some(0.5),
        config: Config { zero_norm: ZeroNorm::Zero, ..FULL },
        ..PLAIN
    },
    Spec { name: "linear-dora", config: Config { method: Method::Dora, ..DETACHED }, ..PLAIN },
    Spec { name: "linear-dora-full", config: Config { method: Method::Dora, ..FULL }, ..PLAIN },
    Spec { name: "linear-lora", config: Config { method: Method::Lora, ..DETACHED }, ..PLAIN },
    Spec {
        name: "linear-lora-dropout",
        config: Config { method: Method::Lora, ..DETACHED },
        dropout: Some(0.5),
        ..PLAIN
    },
    Spec { name: "linear-cancelling", twist: Twist::Cancelling, ..PLAIN },
    Spec { name: "linear-cancelling-full", twist: Twist::Cancelling, config: FULL, ..PLAIN },
    // Square, so that a transposed operand is a wrong number and no wrong shape.
    Spec { name: "linear-square", x: &[6, 6], weight: &[6, 6], rank: 6, ..PLAIN },
    Spec {
        name: "linear-square-fan-in-fan-out",
        weight: &[7, 7],
        operator: r#"{"fan_in_fan_out":true}"#,
        config: FULL,
        ..PLAIN
    },
    Spec { name: "linear-square-full", x: &[6, 6], weight: &[6, 6], rank: 6, config: FULL, ..PLAIN },
    Spec {
        name: "linear-square-dropout-per-input-full",
        x: &[6, 6],
        weight: &[6, 6],
        rank: 6,
        config: PER_INPUT_FULL,
        dropout: Some(0.5),
        ..PLAIN
    },
    Spec { name: "linear-tiny", twist: Twist::Tiny, ..PLAIN },
    Spec {
        name: "linear-zero-unit-norm-eps",
        twist: Twist::ZeroUnit,
        config: Config { zero_norm: ZeroNorm::Zero, norm_eps: 0.125, ..DETACHED },
        ..PLAIN
    },
    Spec { name: "linear-per-input-norm-eps-full", config: Config { norm_eps: 0.125, ..PER_INPUT_FULL }, ..PLAIN },
    Spec { name: "linear-per-input-cancelling-full", twist: Twist::Cancelling, config: PER_INPUT_FULL, ..PLAIN },
    Spec { name: "linear-per-input-dora-full", config: Config { method: Method::Dora, ..PER_INPUT_FULL }, ..PLAIN },
    Spec {
        name: "linear-per-input-fan-in-fan-out-dropout-full",
        weight: &[7, 6],
        operator: r#"{"fan_in_fan_out":true}"#,
        dropout: Some(0.5),
        config: PER_INPUT_FULL,
        ..PLAIN
    },
    Spec { name: "linear-exact", ..EXACT },
    Spec { name: "linear-exact-full", config: Config { norm_gradient: NormGradient::Full, ..TWO }, ..EXACT },
    Spec { name: "linear-exact-dropout", dropout: Some(0.5), ..EXACT },
    Spec { name: "linear-large", ..LARGE },
    Spec { name: "linear-large-dropout-full", dropout: Some(0.5), config: FULL, ..LARGE },
    Spec { name: "linear-large-per-input-full", config: PER_INPUT_FULL, ..LARGE },
    Spec { name: "linear-large-rank-1", rank: 1, ..LARGE },
    Spec { name: "linear-large-one-unit", x: &[700, 260], weight: &[1, 260], ..LARGE },
    Spec { name: "linear-large-cancelling", ..LARGE_CANCELLING },
    Spec { name: "linear-large-cancelling-full", config: FULL, ..LARGE_CANCELLING },
];
