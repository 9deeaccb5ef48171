//! The cases of the embedding: each setting alone, some together, and both sides of every threshold.

use super::{Spec, Twist};
use crate::NormGradient;
use crate::wora::{Config, Method, ZeroNorm};

const PLAIN: Spec =
    Spec { x: &[4, 3], weight: &[11, 6], bias: false, alpha_beta: (0.75, 1.25), ..Spec::plain("embedding-plain") };
const DETACHED: Config = PLAIN.config;
const FULL: Config = Config { norm_gradient: NormGradient::Full, ..DETACHED };
const REPEATED: Spec = Spec { twist: Twist::RepeatedIds, ..PLAIN };
const PADDING: &str = r#"{"padding_idx":2}"#;
const FREQUENCY: &str = r#"{"scale_grad_by_freq":true}"#;
const SCALE: &str = r#"{"embed_scale":2.5}"#;
const ALL: &str = r#"{"padding_idx":2,"scale_grad_by_freq":true,"embed_scale":2.5}"#;
/// 2 * 256 * 500 * 40 operations and 300 * 256 outputs: above the thresholds of parallel products and passes.
const LARGE: Spec = Spec { x: &[300], weight: &[500, 256], rank: 40, ..PLAIN };

/// A power of two.
const TWO: Config = Config { scaling: 2.0, ..DETACHED };
const EXACT: Spec = Spec {
    x: &[3],
    weight: &[5, 3],
    rank: 2,
    config: TWO,
    alpha_beta: (0.5, 0.5),
    operator: r#"{"padding_idx":1,"embed_scale":2.0}"#,
    twist: Twist::Exact,
    ..PLAIN
};

/// Every case of the embedding.
pub const EMBEDDING: &[Spec] = &[
    PLAIN,
    Spec { name: "embedding-full", config: FULL, ..PLAIN },
    Spec { name: "embedding-one-id", x: &[], ..PLAIN },
    Spec { name: "embedding-rank-1-full", rank: 1, config: FULL, ..PLAIN },
    Spec { name: "embedding-rank-above-both", rank: 13, ..PLAIN },
    Spec { name: "embedding-repeated-ids", ..REPEATED },
    Spec { name: "embedding-repeated-ids-full", config: FULL, ..REPEATED },
    Spec { name: "embedding-padding-idx", operator: PADDING, ..REPEATED },
    Spec { name: "embedding-padding-idx-full", operator: PADDING, config: FULL, ..REPEATED },
    Spec { name: "embedding-scale-grad-by-freq", operator: FREQUENCY, ..REPEATED },
    Spec { name: "embedding-scale-grad-by-freq-full", operator: FREQUENCY, config: FULL, ..REPEATED },
    Spec { name: "embedding-embed-scale", operator: SCALE, ..PLAIN },
    Spec { name: "embedding-embed-scale-full", operator: SCALE, config: FULL, ..PLAIN },
    Spec { name: "embedding-everything", operator: ALL, ..REPEATED },
    Spec { name: "embedding-everything-full", operator: ALL, config: FULL, ..REPEATED },
    Spec {
        name: "embedding-everything-lora",
        operator: ALL,
        config: Config { method: Method::Lora, ..DETACHED },
        ..REPEATED
    },
    Spec {
        name: "embedding-everything-dora-full",
        operator: ALL,
        config: Config { method: Method::Dora, ..FULL },
        ..REPEATED
    },
    Spec { name: "embedding-fresh-b", twist: Twist::FreshB, alpha_beta: (1.0, 1.0), ..PLAIN },
    Spec { name: "embedding-alpha-0-full", alpha_beta: (0.0, 1.25), config: FULL, ..PLAIN },
    Spec { name: "embedding-beta-0-full", alpha_beta: (0.75, 0.0), config: FULL, ..PLAIN },
    Spec { name: "embedding-norm-eps-full", config: Config { norm_eps: 0.125, ..FULL }, ..PLAIN },
    Spec {
        name: "embedding-zero-unit-full",
        twist: Twist::ZeroUnit,
        config: Config { zero_norm: ZeroNorm::Zero, ..FULL },
        ..PLAIN
    },
    Spec { name: "embedding-cancelling-full", twist: Twist::Cancelling, config: FULL, ..PLAIN },
    // As many ids as dimensions, so that a norm along the other axis is a wrong number and no wrong shape.
    Spec { name: "embedding-square-full", weight: &[6, 6], config: FULL, ..PLAIN },
    Spec { name: "embedding-exact", ..EXACT },
    Spec { name: "embedding-exact-full", config: Config { norm_gradient: NormGradient::Full, ..TWO }, ..EXACT },
    Spec { name: "embedding-large", ..LARGE },
    Spec { name: "embedding-large-everything-full", operator: ALL, config: FULL, ..LARGE },
    Spec { name: "embedding-large-cancelling", twist: Twist::Cancelling, ..LARGE },
];
