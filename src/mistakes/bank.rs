//! The list. Everything that checks, explains or diagnoses mistakes iterates it: a new mistake is one entry here.

use super::Backward::{Changed, Of, OfForward, Zero};
use super::Parameter::{Alpha, Beta, Bias as BiasOf, LoraA, LoraB, Magnitude, Weight, X};
use super::{
    Bias, Delta, Eps, Formula, Gain, Gradients, Learned, Mistake, Norm, NormOf, NormPer, Output, Overwritten,
    Parameter, Path, RIGHT, Scaling, Walk, Weighted,
};
use crate::Result;
use ndarray::ArrayD;

const EVERY: &[&str] = &["linear", "embedding", "conv1d", "conv2d", "conv3d"];
const LINEAR: &[&str] = &["linear"];
const EMBEDDING: &[&str] = &["embedding"];
const CONV: &[&str] = &["conv1d", "conv2d", "conv3d"];
/// Where x has values, and so a gradient and a mask.
const VALUES: &[&str] = &["linear", "conv1d", "conv2d", "conv3d"];
const ALL: &[Parameter] = &Parameter::ALL;
const NEAR: &str = "one step away from the right line";

/// A mistake in y, with the gradients of that y.
const fn forward(
    id: &'static str,
    layers: &'static [&'static str],
    section: &'static str,
    forward: Formula,
    wrong: &'static str,
    seen: &'static str,
) -> Mistake {
    Mistake { id, wrong, seen, section, layers, forward, backward: OfForward }
}

/// A right y with wrong gradients.
const fn backward(
    id: &'static str,
    layers: &'static [&'static str],
    section: &'static str,
    backward: super::Backward,
    wrong: &'static str,
    seen: &'static str,
) -> Mistake {
    Mistake { id, wrong, seen, section, layers, forward: RIGHT, backward }
}

/// Every mistake.
pub static MISTAKES: &[Mistake] = &[
    // The norm.
    backward(
        "norm-not-detached",
        EVERY,
        "2",
        Of(Formula { norm_gradient: Path::Free, ..RIGHT }, ALL),
        "The gradient flows through n although it is to be held constant.",
        "LyCORIS, and the published WoRA code, beside PEFT",
    ),
    backward(
        "norm-detached",
        EVERY,
        "5.3",
        Of(Formula { norm_gradient: Path::Held, ..RIGHT }, ALL),
        "n counts as a constant although the gradient is to flow through it.",
        "PEFT, beside the published WoRA code",
    ),
    forward(
        "norm-per-input",
        EVERY,
        "4",
        Formula { norm_per: NormPer::Input, ..RIGHT },
        "One norm for each input column (token, input channel) instead of each output unit, and m indexed alike.",
        "LyCORIS #216, NVlabs/DoRA #11",
    ),
    forward(
        "norm-per-output",
        LINEAR,
        "4",
        Formula { norm_per: NormPer::Output, ..RIGHT },
        "One norm for each output unit where the settings ask for one an input column.",
        "loading published WoRA weights into PEFT's layer",
    ),
    forward(
        "norm-of-whole-weight",
        EVERY,
        "4",
        Formula { norm_per: NormPer::Whole, ..RIGHT },
        "One norm of the whole weight instead of one a unit.",
        "a norm without its axis argument",
    ),
    forward(
        "norm-of-base",
        EVERY,
        "4",
        Formula { norm_of: NormOf::Base, ..RIGHT },
        "n is the norm of W0 instead of V.",
        "ComfyUI #15458",
    ),
    forward(
        "norm-of-delta",
        EVERY,
        "4",
        Formula { norm_of: NormOf::Delta, ..RIGHT },
        "n is the norm of alpha s B A alone.",
        NEAR,
    ),
    forward(
        "norm-without-scaling",
        EVERY,
        "4",
        Formula { norm_of: NormOf::WithoutScaling, ..RIGHT },
        "n is the norm of beta W0 + alpha B A: s is missing in the norm alone.",
        "adapters, ai-toolkit",
    ),
    forward(
        "norm-without-alpha-beta",
        EVERY,
        "4",
        Formula { norm_of: NormOf::WithoutAlphaBeta, ..RIGHT },
        "n is DoRA's norm, of W0 + s B A.",
        "DoRA code extended in the output but not in the norm",
    ),
    forward(
        "norm-squared",
        EVERY,
        "4",
        Formula { norm: Norm::Squared, ..RIGHT },
        "The root of the sum of squares is forgotten.",
        NEAR,
    ),
    forward(
        "norm-absolute",
        EVERY,
        "4",
        Formula { norm: Norm::Absolute, ..RIGHT },
        "The sum of absolute values instead of the Euclidean norm.",
        "a norm called with ord = 1",
    ),
    forward(
        "norm-mean",
        EVERY,
        "4",
        Formula { norm: Norm::Mean, ..RIGHT },
        "The mean of absolute values instead of the Euclidean norm.",
        "LyCORIS #160",
    ),
    forward(
        "norm-root-mean-square",
        EVERY,
        "4",
        Formula { norm: Norm::RootMeanSquare, ..RIGHT },
        "The root of the mean of squares: too small by the root of the fan-in.",
        "RMSNorm's formula in place of a norm",
    ),
    forward(
        "norm-eps-ignored",
        &["linear", "embedding"],
        "4",
        Formula { eps: Eps::Ignored, ..RIGHT },
        "norm_eps is not added.",
        "PEFT has none where LyCORIS has one",
    ),
    forward(
        "norm-eps-inside-root",
        &["linear", "embedding"],
        "4",
        Formula { eps: Eps::InsideRoot, ..RIGHT },
        "norm_eps is added to the square of the norm.",
        "batch normalisation's habit",
    ),
    backward(
        "norm-eps-in-norm-gradient",
        &["linear", "embedding"],
        "5.3",
        Of(Formula { eps: Eps::InGradient, ..RIGHT }, ALL),
        "The gradient through the norm divides by n twice instead of by n and by ||V||.",
        NEAR,
    ),
    // The gain.
    forward(
        "magnitude-ignored",
        EVERY,
        "4",
        Formula { gain: Gain::One, ..RIGHT },
        "The adapted weight is V: neither normalised nor scaled.",
        "silent falls back to LoRA; PEFT's merge with torchao",
    ),
    forward(
        "magnitude-not-divided",
        EVERY,
        "4",
        Formula { gain: Gain::Magnitude, ..RIGHT },
        "The adapted weight is m V: the norm is not divided by.",
        NEAR,
    ),
    forward(
        "magnitude-dropped",
        EVERY,
        "4",
        Formula { gain: Gain::Reciprocal, ..RIGHT },
        "The adapted weight is V / n: m is left out.",
        "PEFT's merge with torchao",
    ),
    forward("gain-inverted", EVERY, "4", Formula { gain: Gain::Inverted, ..RIGHT }, "g is n / m.", NEAR),
    forward(
        "gain-norm-twice",
        EVERY,
        "4",
        Formula { gain: Gain::NormTwice, ..RIGHT },
        "V is normalised, then multiplied by m / n.",
        NEAR,
    ),
    forward(
        "gain-outer-product",
        LINEAR,
        "4",
        Formula { gain: Gain::Outer, ..RIGHT },
        "m [N] over n [N, 1] broadcasts to a matrix: entry (i, j) gets m_j / n_i.",
        "ComfyUI #12938",
    ),
    forward(
        "gain-on-lora-only",
        EVERY,
        "4",
        Formula { output: Output::GainOnLoraOnly, ..RIGHT },
        "Only alpha s B A is multiplied by g; beta W0 is not.",
        NEAR,
    ),
    forward(
        "gain-on-base-only",
        EVERY,
        "4",
        Formula { output: Output::GainOnBaseOnly, ..RIGHT },
        "Only beta W0 is multiplied by g; alpha s B A is not.",
        NEAR,
    ),
    backward(
        "magnitude-detached",
        EVERY,
        "6.2",
        Zero(&[Magnitude]),
        "m gets no gradient and is never trained.",
        "torchtune #2250",
    ),
    backward(
        "magnitude-gradient-extra-gain",
        EVERY,
        "6.2",
        Changed(magnitude_gradient_extra_gain),
        "dm is taken from the output that is scaled already: multiplied by g once more.",
        "axolotl #3528",
    ),
    backward(
        "magnitude-gradient-undivided",
        EVERY,
        "6.2",
        Changed(magnitude_gradient_undivided),
        "dm is the gradient of g: not divided by n.",
        NEAR,
    ),
    backward(
        "magnitude-gradient-of-base-only",
        EVERY,
        "6.2",
        Of(Formula { output: Output::WithoutLora, norm_gradient: Path::Held, ..RIGHT }, &[Magnitude]),
        "dm sees the product with W0 alone.",
        NEAR,
    ),
    // s.
    forward(
        "scaling-missing",
        EVERY,
        "1",
        Formula { scaling: Scaling::Missing, ..RIGHT },
        "s is 1 everywhere.",
        "the published WoRA code has none",
    ),
    forward(
        "scaling-twice",
        EVERY,
        "1",
        Formula { scaling: Scaling::Twice, ..RIGHT },
        "s is squared everywhere: once in B A, once beside alpha.",
        "B saved with s in it",
    ),
    forward(
        "scaling-without-rank",
        EVERY,
        "1",
        Formula { scaling: Scaling::TimesRank, ..RIGHT },
        "s is lora_alpha, not divided by the rank.",
        "fsdp_qlora #68",
    ),
    forward(
        "scaling-root-of-rank",
        EVERY,
        "1",
        Formula { scaling: Scaling::TimesRootRank, ..RIGHT },
        "s is lora_alpha over the root of the rank although rslora is off.",
        NEAR,
    ),
    backward(
        "lora-gradient-without-scaling",
        EVERY,
        "6.2",
        Changed(|gradients| {
            let s = gradients.case.settings.get("scaling").and_then(serde_json::Value::as_f64).unwrap_or(1.0);
            gradients.scale(&[LoraA, LoraB], 1.0 / s);
            Ok(())
        }),
        "dA and dB lack the factor s.",
        NEAR,
    ),
    backward(
        "alpha-gradient-without-scaling",
        EVERY,
        "6.2",
        Changed(|gradients| {
            let s = gradients.case.settings.get("scaling").and_then(serde_json::Value::as_f64).unwrap_or(1.0);
            gradients.scale(&[Alpha], 1.0 / s);
            Ok(())
        }),
        "dalpha lacks the factor s.",
        NEAR,
    ),
    // alpha and beta.
    backward(
        "alpha-detached",
        EVERY,
        "6.2",
        Zero(&[Alpha]),
        "y is right, but alpha gets no gradient.",
        "pull request 2872, first commit: .item()",
    ),
    backward(
        "beta-detached",
        EVERY,
        "6.2",
        Zero(&[Beta]),
        "y is right, but beta gets no gradient.",
        "pull request 2872, first commit: .item()",
    ),
    backward(
        "alpha-beta-detached",
        EVERY,
        "6.2",
        Zero(&[Alpha, Beta]),
        "y is right, but neither alpha nor beta gets a gradient.",
        "pull request 2872, first commit: .item()",
    ),
    forward(
        "alpha-beta-swapped",
        EVERY,
        "4",
        Formula { alpha: Learned::Other, beta: Learned::Other, ..RIGHT },
        "alpha multiplies W0 and beta multiplies B A.",
        NEAR,
    ),
    forward(
        "alpha-ignored",
        EVERY,
        "4",
        Formula { alpha: Learned::One, ..RIGHT },
        "alpha is taken as 1 and gets no gradient.",
        "WoRA weights in DoRA code",
    ),
    forward(
        "beta-ignored",
        EVERY,
        "4",
        Formula { beta: Learned::One, ..RIGHT },
        "beta is taken as 1 and gets no gradient.",
        "WoRA weights in DoRA code",
    ),
    forward(
        "alpha-squared",
        EVERY,
        "4",
        Formula { alpha: Learned::Squared, ..RIGHT },
        "alpha multiplies B A twice.",
        NEAR,
    ),
    forward(
        "beta-on-both-terms",
        EVERY,
        "4",
        Formula { weighted: Weighted::BetaOutside, ..RIGHT },
        "V is beta (W0 + alpha s B A).",
        NEAR,
    ),
    Mistake {
        id: "beta-on-lora-term",
        wrong: "y is g base + beta g s lora: beta stands where alpha should, and neither gets a gradient.",
        seen: "pull request 2872, first commit",
        section: "3.3",
        layers: EMBEDDING,
        forward: Formula { output: Output::BetaOnLora, ..RIGHT },
        backward: Zero(&[Alpha, Beta]),
    },
    backward(
        "alpha-beta-gradients-swapped",
        EVERY,
        "6.2",
        Changed(|gradients| {
            let (alpha, beta) = (gradients.get(Alpha).cloned(), gradients.get(Beta).cloned());
            if let (Some(alpha), Some(beta)) = (alpha, beta) {
                gradients.get(Alpha).into_iter().for_each(|gradient| gradient.assign(&beta));
                gradients.get(Beta).into_iter().for_each(|gradient| gradient.assign(&alpha));
            }
            Ok(())
        }),
        "dalpha and dbeta are returned in the wrong order.",
        NEAR,
    ),
    backward(
        "beta-gradient-negated",
        EVERY,
        "6.2",
        Changed(|gradients| {
            gradients.scale(&[Beta], -1.0);
            Ok(())
        }),
        "dbeta has the wrong sign.",
        NEAR,
    ),
    backward(
        "lora-gradient-without-alpha",
        EVERY,
        "6.2",
        Changed(|gradients| {
            let alpha = gradients.scalar(Alpha);
            gradients.scale(&[LoraA, LoraB], if alpha == 0.0 { 1.0 } else { 1.0 / alpha });
            Ok(())
        }),
        "dA and dB lack the factor alpha.",
        "DoRA's backward under WoRA's forward",
    ),
    backward(
        "alpha-beta-norm-detached",
        EVERY,
        "5.3",
        Of(Formula { norm_gradient: Path::Held, ..RIGHT }, &[Alpha, Beta]),
        "With the full gradient, dalpha and dbeta leave out the path through the norm; dA and dB have it.",
        NEAR,
    ),
    backward(
        "norm-gradient-sign",
        EVERY,
        "5.3",
        Changed(|gradients| norm_path(gradients, -1.0)),
        "With the full gradient, the path through the norm is added with the wrong sign.",
        NEAR,
    ),
    backward(
        "norm-gradient-twice",
        EVERY,
        "5.3",
        Changed(|gradients| norm_path(gradients, 2.0)),
        "With the full gradient, the path through the norm is counted twice: the 2 of the square stays.",
        NEAR,
    ),
    // A and B.
    forward(
        "lora-subtracted",
        EVERY,
        "4",
        Formula { weighted: Weighted::Difference, ..RIGHT },
        "V is beta W0 - alpha s B A.",
        NEAR,
    ),
    forward(
        "delta-on-unit-direction",
        EVERY,
        "4",
        Formula { weighted: Weighted::UnitBase, ..RIGHT },
        "B A is added to beta W0 / ||W0||, and the sum is normalised and scaled again.",
        "several Rust ports",
    ),
    forward(
        "delta-transposed",
        LINEAR,
        "4",
        Formula { delta: Delta::Transposed, ..RIGHT },
        "B A is transposed, as where fan_in_fan_out is not heeded.",
        "peft #1588, #3531",
    ),
    forward(
        "base-counted-twice",
        EVERY,
        "4",
        Formula { output: Output::BaseTwice, ..RIGHT },
        "g V x is added to the base output, which it contains already.",
        NEAR,
    ),
    forward(
        "groups-first-only",
        CONV,
        "3.2",
        Formula { delta: Delta::FirstGroup, ..RIGHT },
        "Every unit combines the ranks of the first group.",
        "peft #2549",
    ),
    backward(
        "lora-gradient-without-gain",
        EVERY,
        "6.2",
        Of(Formula { gain: Gain::One, ..RIGHT }, &[LoraA, LoraB]),
        "dA and dB are computed from dy instead of g dy.",
        NEAR,
    ),
    backward(
        "lora-b-gradient-transposed",
        LINEAR,
        "6.2",
        Changed(|gradients| {
            if let Some(gradient) = gradients.get(LoraB)
                && gradient.shape()[0] == gradient.shape()[1]
            {
                *gradient = gradient.t().as_standard_layout().into_owned();
            }
            Ok(())
        }),
        "dB is transposed, which a square B does not notice.",
        NEAR,
    ),
    backward(
        "base-weight-gradient-without-beta",
        EVERY,
        "6.2",
        Changed(|gradients| {
            let beta = gradients.scalar(Beta);
            gradients.scale(&[Weight], if beta == 0.0 { 1.0 } else { 1.0 / beta });
            Ok(())
        }),
        "dW0 lacks the factor beta.",
        NEAR,
    ),
    // Sums over the batch.
    backward(
        "gradients-averaged",
        EVERY,
        "6.2",
        Changed(gradients_averaged),
        "The gradients of parameters are divided by the first dimension of x.",
        "a mean loss's factor taken twice",
    ),
    backward(
        "cotangent-ignored",
        EVERY,
        "2",
        Changed(cotangent_ignored),
        "The gradients are those of the sum of y, whatever dy is.",
        "checkers that send ones alone cannot see it",
    ),
    // The bias.
    forward(
        "bias-scaled",
        VALUES,
        "4",
        Formula { bias: Bias::Scaled, ..RIGHT },
        "b is multiplied by g.",
        "torchtune, adapters",
    ),
    forward("bias-dropped", VALUES, "4", Formula { bias: Bias::Dropped, ..RIGHT }, "b is left out.", "peft-rs"),
    forward(
        "bias-twice",
        VALUES,
        "4",
        Formula { bias: Bias::Twice, ..RIGHT },
        "b is added by the base layer and again by the adapter.",
        NEAR,
    ),
    forward(
        "bias-times-beta",
        VALUES,
        "4",
        Formula { bias: Bias::TimesBeta, ..RIGHT },
        "beta multiplies the base output with its bias.",
        NEAR,
    ),
    backward(
        "bias-gradient-scaled",
        VALUES,
        "6.2",
        Of(Formula { bias: Bias::Scaled, norm_gradient: Path::Held, ..RIGHT }, &[BiasOf]),
        "db is summed over g dy instead of dy.",
        NEAR,
    ),
    // Dropout.
    forward(
        "dropout-base-uncorrected",
        VALUES,
        "6.1",
        Formula { output: Output::DropoutOnLoraOnly, ..RIGHT },
        "y is g (beta W0 x + alpha s B A x~) + b: the mask acts on B A alone.",
        "torchtune, mlx-lm, adapters",
    ),
    forward(
        "dropout-ignored",
        VALUES,
        "6.1",
        Formula { output: Output::DropoutIgnored, ..RIGHT },
        "The mask is not applied.",
        "LyCORIS; peft #1474",
    ),
    forward(
        "dropout-on-everything",
        VALUES,
        "6.1",
        Formula { output: Output::DropoutOnEverything, ..RIGHT },
        "y is W' x~ + b: the mask acts on the base output too.",
        "peft #1806",
    ),
    forward(
        "dropout-unscaled",
        VALUES,
        "6.1",
        Formula { output: Output::DropoutUnscaled, ..RIGHT },
        "What is kept is not multiplied by 1 / (1 - p).",
        NEAR,
    ),
    backward(
        "input-gradient-without-mask",
        VALUES,
        "6.2",
        Of(Formula { output: Output::DropoutIgnored, ..RIGHT }, &[X]),
        "dx is computed as if nothing were dropped.",
        NEAR,
    ),
    backward(
        "input-gradient-masked",
        VALUES,
        "6.2",
        Of(Formula { output: Output::DropoutOnEverything, ..RIGHT }, &[X]),
        "dx is multiplied by the mask, the base output's part too.",
        NEAR,
    ),
    // The input.
    backward(
        "input-gradient-of-base-only",
        VALUES,
        "6.2",
        Of(Formula { output: Output::BaseOnly, ..RIGHT }, &[X]),
        "dx is that of the frozen layer.",
        NEAR,
    ),
    backward(
        "input-gradient-without-lora",
        VALUES,
        "6.2",
        Of(Formula { output: Output::WithoutLora, ..RIGHT }, &[X]),
        "dx leaves out the path through B A.",
        NEAR,
    ),
    // Embedding.
    forward(
        "embed-scale-missing",
        EMBEDDING,
        "3.3",
        Formula { walk: Walk::Without("embed_scale"), ..RIGHT },
        "embed_scale is not applied.",
        "peft #2839",
    ),
    forward(
        "embed-scale-twice-on-beta",
        EMBEDDING,
        "3.3",
        Formula { output: Output::EmbedScaleTwiceOnBeta, ..RIGHT },
        "y is g e base + e (g (beta - 1) e base + alpha g s lora): e reaches the beta term twice.",
        "pull request 2872",
    ),
    forward(
        "embed-scale-on-base-only",
        EMBEDDING,
        "3.3",
        Formula { output: Output::EmbedScaleOnBaseOnly, ..RIGHT },
        "The correction W' - W0 lacks embed_scale.",
        NEAR,
    ),
    backward(
        "embed-scale-missing-in-gradient",
        EMBEDDING,
        "3.3",
        Of(Formula { walk: Walk::Without("embed_scale"), ..RIGHT }, ALL),
        "No gradient carries embed_scale.",
        NEAR,
    ),
    backward(
        "padding-idx-ignored",
        EMBEDDING,
        "3.3",
        Of(Formula { walk: Walk::FractionWithout("padding_idx"), ..RIGHT }, ALL),
        "The padding row of A and W0 gets the lookup's gradient.",
        NEAR,
    ),
    backward(
        "scale-grad-by-freq-ignored",
        EMBEDDING,
        "3.3",
        Of(Formula { walk: Walk::FractionWithout("scale_grad_by_freq"), ..RIGHT }, ALL),
        "The lookup's gradient of a row is not divided by how often its id occurs.",
        NEAR,
    ),
    backward(
        "repeated-ids-overwritten",
        EMBEDDING,
        "3.3",
        Of(Formula { overwritten: Overwritten::Ids, ..RIGHT }, &[LoraA, Weight]),
        "The last occurrence of an id wins: its gradients are stored instead of added.",
        "indexed assignment in place of a scatter-add",
    ),
    // Convolution.
    forward(
        "kernel-flipped",
        CONV,
        "3.4",
        Formula { walk: Walk::Flipped, ..RIGHT },
        "Convolution instead of cross-correlation: the kernel is reversed.",
        "signal-processing libraries",
    ),
    forward(
        "kernel-axes-swapped",
        &["conv2d", "conv3d"],
        "3.4",
        Formula { walk: Walk::AxesSwapped, ..RIGHT },
        "The kernel's axes are in the reverse order.",
        "weights converted between layouts",
    ),
    forward(
        "lora-dilation-dropped",
        CONV,
        "3.4",
        Formula { walk: Walk::LoraWithout("dilation"), ..RIGHT },
        "A's convolution has no dilation.",
        "peft #3697; with padding = \"same\" it does not even raise",
    ),
    forward(
        "lora-padding-mode-dropped",
        CONV,
        "3.4",
        Formula { walk: Walk::LoraWithout("padding_mode"), ..RIGHT },
        "A's convolution pads with zeros.",
        "peft 0.21 with reflect and circular padding",
    ),
    forward(
        "padding-mode-dropped",
        CONV,
        "3.4",
        Formula { walk: Walk::Without("padding_mode"), ..RIGHT },
        "Both convolutions pad with zeros.",
        NEAR,
    ),
    backward(
        "padding-gradient-lost",
        CONV,
        "3.4",
        Of(Formula { walk: Walk::Without("padding_mode"), ..RIGHT }, &[X]),
        "What reflected, replicated or circular padding reads sends no gradient back.",
        NEAR,
    ),
    backward(
        "fold-overwrites",
        CONV,
        "3.4",
        Of(Formula { overwritten: Overwritten::Inputs, ..RIGHT }, &[X]),
        "Overlapping windows store into dx instead of adding to it.",
        "col2im by indexed assignment",
    ),
];

/// `g = m / n` by element of m, 0 where there is no direction.
fn gains(gradients: &Gradients<'_>) -> Option<(ArrayD<f64>, ArrayD<f64>)> {
    let m = gradients.case.values(Magnitude.name(gradients.lora)).ok()?;
    let n = gradients.weight_norm?.to_shape(m.shape()).ok()?.into_owned();
    let mut gain = m / &n;
    gain.zip_mut_with(&n, |gain, &n| *gain = if n == 0.0 { 0.0 } else { *gain });
    Some((gain, n))
}

fn magnitude_gradient_extra_gain(gradients: &mut Gradients<'_>) -> Result<()> {
    if let Some((gain, _)) = gains(gradients)
        && let Some(gradient) = gradients.get(Magnitude)
    {
        *gradient *= &gain;
    }
    Ok(())
}

fn magnitude_gradient_undivided(gradients: &mut Gradients<'_>) -> Result<()> {
    if let Some((_, n)) = gains(gradients)
        && let Some(gradient) = gradients.get(Magnitude)
    {
        *gradient *= &n;
    }
    Ok(())
}

/// The path through the norm, which is all that differs between the two gradients, times a factor.
fn norm_path(gradients: &mut Gradients<'_>, factor: f64) -> Result<()> {
    for parameter in Parameter::ALL {
        let held = gradients.of(&Formula { norm_gradient: Path::Held, ..RIGHT }, gradients.case, parameter)?;
        if let (Some(held), Some(gradient)) = (held, gradients.get(parameter)) {
            gradient.zip_mut_with(&held, |full, &held| *full = held + factor * (*full - held));
        }
    }
    Ok(())
}

fn gradients_averaged(gradients: &mut Gradients<'_>) -> Result<()> {
    let first = gradients.case.tensors["x"].shape().first().copied().unwrap_or(1);
    gradients.scale(&[Weight, BiasOf, LoraA, LoraB, Magnitude, Alpha, Beta], 1.0 / first as f64);
    Ok(())
}

fn cotangent_ignored(gradients: &mut Gradients<'_>) -> Result<()> {
    let mut ones = gradients.case.clone();
    if let Some(crate::case::Tensor::Float(dy)) = ones.tensors.get_mut("grad.y") {
        dy.fill(1.0);
    }
    for parameter in Parameter::ALL {
        if let Some(other) = gradients.of(&RIGHT, &ones, parameter)?
            && let Some(gradient) = gradients.get(parameter)
        {
            gradient.assign(&other);
        }
    }
    Ok(())
}
