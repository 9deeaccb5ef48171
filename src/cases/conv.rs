//! The cases of the convolutions: each setting alone, some together, and both sides of every threshold.

use super::{Spec, Twist};
use crate::NormGradient;
use crate::wora::{Config, Method, ZeroNorm};

const DETACHED: Config = Spec::plain("").config;
const FULL: Config = Config { norm_gradient: NormGradient::Full, ..DETACHED };
const ZERO_UNIT: Config = Config { zero_norm: ZeroNorm::Zero, ..FULL };
const EPS_FULL: Config = Config { norm_eps: 0.125, ..FULL };
const LORA: Config = Config { method: Method::Lora, ..DETACHED };
const DORA_FULL: Config = Config { method: Method::Dora, ..FULL };

/// An ordinary case: rank 2, bias, detached.
const fn conv(name: &'static str, x: &'static [usize], weight: &'static [usize], operator: &'static str) -> Spec {
    Spec { x, weight, operator, rank: 2, ..Spec::plain(name) }
}

/// A power of two.
const TWO: Config = Config { scaling: 2.0, ..DETACHED };

/// Small whole numbers.
const fn exact(name: &'static str, x: &'static [usize], weight: &'static [usize], operator: &'static str) -> Spec {
    Spec { config: TWO, alpha_beta: (0.5, 0.5), twist: Twist::Exact, ..conv(name, x, weight, operator) }
}

const SAME: &str = r#"{"padding":"same"}"#;
const SAME_DILATED: &str = r#"{"padding":"same","dilation":2}"#;
const PADDED: &str = r#"{"padding":1}"#;
const STRIDED: &str = r#"{"stride":2,"padding":3,"dilation":2}"#;
const REFLECT: &str = r#"{"padding":2,"padding_mode":"reflect"}"#;
const REFLECT_STRIDED: &str = r#"{"padding":2,"padding_mode":"reflect","stride":2}"#;
const REPLICATE: &str = r#"{"padding":2,"padding_mode":"replicate"}"#;
/// Neighbours in the padding read the same element, two steps apart: not a slice.
const REPLICATE_STRIDED: &str = r#"{"padding":3,"padding_mode":"replicate","stride":2,"dilation":2}"#;
const CIRCULAR: &str = r#"{"padding":2,"padding_mode":"circular"}"#;
const CIRCULAR_SAME: &str = r#"{"padding":"same","padding_mode":"circular","dilation":2}"#;
const GROUPS: &str = r#"{"groups":2,"padding":1}"#;
const DEPTHWISE: &str = r#"{"groups":4,"padding":1}"#;
const EVERYTHING: &str = r#"{"groups":2,"padding":2,"padding_mode":"circular","stride":2,"dilation":2}"#;

/// Every case of the convolution along one axis.
pub const CONV1D: &[Spec] = &[
    conv("conv1d-plain", &[2, 4, 7], &[6, 4, 3], "{}"),
    Spec { config: FULL, ..conv("conv1d-full", &[2, 4, 7], &[6, 4, 3], PADDED) },
    Spec { bias: false, ..conv("conv1d-no-bias", &[2, 4, 7], &[6, 4, 3], PADDED) },
    conv("conv1d-no-batch", &[4, 7], &[6, 4, 3], PADDED),
    Spec { rank: 1, config: FULL, ..conv("conv1d-kernel-1-rank-1-full", &[2, 4, 7], &[6, 4, 1], "{}") },
    conv("conv1d-same-even", &[2, 4, 9], &[6, 4, 4], SAME),
    conv("conv1d-valid", &[2, 4, 9], &[6, 4, 4], r#"{"padding":"valid"}"#),
    conv("conv1d-stride-padding-dilation", &[2, 4, 13], &[6, 4, 3], STRIDED),
    conv("conv1d-reflect", &[2, 4, 7], &[6, 4, 3], REFLECT),
    conv("conv1d-reflect-stride", &[2, 4, 7], &[6, 4, 3], REFLECT_STRIDED),
    conv("conv1d-replicate", &[2, 4, 7], &[6, 4, 3], REPLICATE),
    conv("conv1d-replicate-stride-dilation", &[2, 4, 8], &[6, 4, 3], REPLICATE_STRIDED),
    conv("conv1d-circular", &[2, 4, 7], &[6, 4, 3], CIRCULAR),
    Spec { rank: 4, ..conv("conv1d-depthwise", &[2, 4, 7], &[8, 1, 3], DEPTHWISE) },
    Spec {
        rank: 4,
        config: FULL,
        dropout: Some(0.5),
        ..conv("conv1d-everything-full", &[2, 4, 9], &[6, 2, 3], EVERYTHING)
    },
    Spec { dropout: Some(0.5), ..conv("conv1d-dropout", &[2, 4, 7], &[6, 4, 3], PADDED) },
    Spec { config: LORA, dropout: Some(0.5), ..conv("conv1d-lora", &[2, 4, 7], &[6, 4, 3], PADDED) },
    Spec { alpha_beta: (1.25, 0.0), config: FULL, ..conv("conv1d-beta-0-full", &[2, 4, 7], &[6, 4, 3], PADDED) },
    Spec { twist: Twist::Cancelling, config: FULL, ..conv("conv1d-cancelling-full", &[2, 4, 7], &[6, 4, 3], PADDED) },
    conv("conv1d-same-dilated", &[2, 4, 9], &[6, 4, 3], SAME_DILATED),
    // As many channels in as out, so that a norm along the other axis is a wrong number and no wrong shape.
    Spec { config: FULL, ..conv("conv1d-square-full", &[2, 4, 7], &[4, 4, 3], PADDED) },
    // As many ranks as units, so that a transposed B is a wrong number and no wrong shape.
    Spec { rank: 6, config: EPS_FULL, ..conv("conv1d-norm-eps-full", &[2, 4, 7], &[6, 4, 3], PADDED) },
    Spec { twist: Twist::ZeroUnit, config: ZERO_UNIT, ..conv("conv1d-zero-unit-full", &[2, 4, 7], &[6, 4, 3], PADDED) },
    exact("conv1d-exact", &[1, 2, 4], &[3, 2, 2], PADDED),
    Spec {
        config: Config { norm_gradient: NormGradient::Full, ..TWO },
        ..exact("conv1d-exact-full", &[1, 2, 3], &[2, 2, 2], PADDED)
    },
    conv("conv1d-large-tiles", &[2, 3, 1200], &[20, 3, 5], r#"{"padding":2}"#),
    Spec { config: FULL, ..conv("conv1d-large-one-unit-full", &[1, 40, 700], &[1, 40, 3], PADDED) },
];

/// Every case of the convolution along two axes.
pub const CONV2D: &[Spec] = &[
    conv("conv2d-plain", &[2, 4, 5, 6], &[6, 4, 3, 2], "{}"),
    Spec { config: FULL, ..conv("conv2d-full", &[2, 4, 5, 6], &[6, 4, 3, 3], PADDED) },
    Spec { bias: false, ..conv("conv2d-no-bias-1x1", &[2, 4, 5, 5], &[6, 4, 1, 1], "{}") },
    conv("conv2d-no-batch", &[4, 5, 5], &[6, 4, 3, 3], PADDED),
    conv("conv2d-rectangular", &[2, 4, 6, 9], &[6, 4, 1, 3], r#"{"stride":[2,1],"padding":[0,1],"dilation":[1,2]}"#),
    conv("conv2d-same-even", &[1, 4, 5, 6], &[6, 4, 2, 4], SAME),
    conv("conv2d-same-dilated", &[1, 4, 6, 6], &[6, 4, 3, 3], SAME_DILATED),
    conv("conv2d-stride-padding-dilation", &[1, 4, 6, 7], &[6, 4, 3, 3], STRIDED),
    conv("conv2d-reflect", &[1, 4, 5, 4], &[6, 4, 3, 3], REFLECT),
    conv("conv2d-replicate-stride-dilation", &[1, 4, 5, 6], &[6, 4, 3, 3], REPLICATE_STRIDED),
    conv("conv2d-circular-same-dilated", &[1, 4, 5, 6], &[6, 4, 2, 3], CIRCULAR_SAME),
    Spec { rank: 4, config: FULL, ..conv("conv2d-groups-full", &[1, 4, 5, 5], &[6, 2, 3, 3], GROUPS) },
    Spec { rank: 4, ..conv("conv2d-depthwise", &[1, 4, 5, 5], &[8, 1, 3, 3], DEPTHWISE) },
    Spec {
        rank: 4,
        config: FULL,
        dropout: Some(0.5),
        ..conv("conv2d-everything-full", &[1, 4, 5, 5], &[6, 2, 3, 2], EVERYTHING)
    },
    Spec { dropout: Some(0.25), ..conv("conv2d-dropout", &[1, 4, 5, 5], &[6, 4, 3, 3], PADDED) },
    Spec { config: DORA_FULL, ..conv("conv2d-dora-full", &[1, 4, 5, 5], &[6, 4, 3, 3], PADDED) },
    Spec {
        twist: Twist::ZeroUnit,
        config: ZERO_UNIT,
        ..conv("conv2d-zero-unit-full", &[1, 4, 5, 5], &[6, 4, 3, 3], PADDED)
    },
    Spec { config: FULL, ..conv("conv2d-square-full", &[1, 4, 5, 5], &[4, 4, 3, 2], PADDED) },
    // As many ranks as units, so that a transposed B is a wrong number and no wrong shape.
    Spec { rank: 6, config: EPS_FULL, ..conv("conv2d-norm-eps-full", &[1, 4, 5, 5], &[6, 4, 3, 2], PADDED) },
    exact("conv2d-exact", &[1, 2, 2, 3], &[3, 2, 2, 2], PADDED),
    // 900 positions, two tiles; 40 * 900 * 2 outputs, above the threshold of parallel passes.
    Spec { rank: 4, config: FULL, ..conv("conv2d-large-full", &[2, 20, 30, 30], &[40, 20, 3, 3], PADDED) },
    Spec {
        rank: 4,
        ..conv(
            "conv2d-large-groups-stride",
            &[2, 40, 50, 50],
            &[16, 20, 3, 3],
            r#"{"groups":2,"stride":2,"padding":1}"#,
        )
    },
];

/// Every case of the convolution along three axes.
pub const CONV3D: &[Spec] = &[
    conv("conv3d-plain", &[1, 2, 3, 4, 4], &[4, 2, 2, 3, 2], "{}"),
    Spec { config: FULL, ..conv("conv3d-full", &[1, 2, 3, 3, 4], &[4, 2, 3, 3, 3], PADDED) },
    Spec { bias: false, ..conv("conv3d-no-bias-1x1x1", &[2, 3, 3, 3, 3], &[4, 3, 1, 1, 1], "{}") },
    conv("conv3d-no-batch", &[2, 3, 4, 3], &[4, 2, 3, 3, 3], PADDED),
    conv(
        "conv3d-rectangular",
        &[1, 2, 4, 3, 6],
        &[4, 2, 3, 1, 2],
        r#"{"stride":[2,1,2],"padding":[1,0,2],"dilation":[1,2,1]}"#,
    ),
    conv("conv3d-same-even", &[1, 2, 3, 3, 4], &[4, 2, 2, 2, 4], SAME),
    conv("conv3d-same-dilated", &[1, 2, 3, 3, 4], &[4, 2, 2, 3, 2], SAME_DILATED),
    conv("conv3d-reflect", &[1, 2, 3, 3, 4], &[4, 2, 3, 2, 2], REFLECT),
    conv("conv3d-replicate-stride-dilation", &[1, 2, 3, 3, 4], &[4, 2, 2, 2, 3], REPLICATE_STRIDED),
    conv("conv3d-circular", &[1, 2, 3, 3, 4], &[4, 2, 2, 2, 3], CIRCULAR),
    Spec { config: FULL, ..conv("conv3d-groups-full", &[1, 4, 3, 3, 3], &[4, 2, 2, 3, 2], GROUPS) },
    Spec { rank: 4, ..conv("conv3d-depthwise", &[1, 4, 3, 3, 3], &[4, 1, 2, 3, 3], DEPTHWISE) },
    Spec {
        config: FULL,
        dropout: Some(0.5),
        ..conv("conv3d-everything-full", &[1, 4, 3, 3, 4], &[4, 2, 2, 2, 3], EVERYTHING)
    },
    Spec { dropout: Some(0.5), ..conv("conv3d-dropout", &[1, 2, 3, 3, 4], &[4, 2, 2, 2, 2], PADDED) },
    Spec { config: FULL, ..conv("conv3d-square-full", &[1, 3, 3, 3, 3], &[3, 3, 2, 3, 2], PADDED) },
    // As many ranks as units, so that a transposed B is a wrong number and no wrong shape.
    Spec { rank: 4, config: EPS_FULL, ..conv("conv3d-norm-eps-full", &[1, 2, 3, 3, 4], &[4, 2, 2, 3, 2], PADDED) },
    Spec {
        twist: Twist::ZeroUnit,
        config: ZERO_UNIT,
        ..conv("conv3d-zero-unit-full", &[1, 2, 3, 3, 4], &[4, 2, 2, 3, 2], PADDED)
    },
    exact("conv3d-exact", &[1, 2, 2, 2, 2], &[2, 2, 2, 1, 2], PADDED),
    // 2 tiles of 1000 positions.
    Spec { config: FULL, ..conv("conv3d-large-full", &[2, 6, 10, 10, 10], &[36, 6, 3, 3, 3], PADDED) },
];
