//! The forward with one thing wrong: the lines of SPEC.md, section 4, each with the ways in which it is got wrong.
//!
//! A [`Formula`] says for every stage which way is taken; [`RIGHT`] takes the right one everywhere and computes what
//! the definition does.

/// Which way every stage of the forward takes.
///
/// ```
/// use woracle::mistakes::{Bias, Formula, NormOf, RIGHT, mistake};
/// let norm = Formula { norm_of: NormOf::Base, ..RIGHT };
/// assert_eq!(mistake("norm-of-base")?.forward, norm);
/// let bias = Formula { bias: Bias::Scaled, ..RIGHT };
/// assert_eq!(norm.and(&bias), Some(Formula { bias: Bias::Scaled, ..norm })); // both at once
/// assert_eq!(norm.and(&Formula { norm_of: NormOf::Delta, ..RIGHT }), None); // n is of one thing or the other
/// # Ok::<(), woracle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Formula {
    /// s. E8
    pub scaling: Scaling,
    /// What stands where alpha should.
    pub alpha: Learned,
    /// What stands where beta should.
    pub beta: Learned,
    /// B A.
    pub delta: Delta,
    /// V. E9
    pub weighted: Weighted,
    /// What the norm is taken of. E10
    pub norm_of: NormOf,
    /// Which norm. E10
    pub norm: Norm,
    /// How many norms. E10
    pub norm_per: NormPer,
    /// Where the epsilon is. E10
    pub eps: Eps,
    /// g. E11
    pub gain: Gain,
    /// How the gradient treats n.
    pub norm_gradient: Path,
    /// How W0 and B A meet the input and the mask. E13
    pub output: Output,
    /// b. E13
    pub bias: Bias,
    /// What of the operator's own settings is lost. E39 to E44
    pub walk: Walk,
    /// What a gradient forgets that is added to several times. E40, E45
    pub overwritten: Overwritten,
}

/// Every stage as it should be.
pub const RIGHT: Formula = Formula {
    scaling: Scaling::Once,
    alpha: Learned::Itself,
    beta: Learned::Itself,
    delta: Delta::Product,
    weighted: Weighted::Sum,
    norm_of: NormOf::Weighted,
    norm: Norm::Euclidean,
    norm_per: NormPer::Setting,
    eps: Eps::Added,
    gain: Gain::Ratio,
    norm_gradient: Path::Setting,
    output: Output::Correction,
    bias: Bias::Added,
    walk: Walk::Setting,
    overwritten: Overwritten::Nothing,
};

impl Formula {
    /// Both ways of getting it wrong at once; `None` where they want different things of one stage.
    pub fn and(self, other: &Self) -> Option<Self> {
        fn one<W: Copy + PartialEq>(a: W, b: W, right: W) -> Option<W> {
            if a == right || a == b {
                Some(b)
            } else if b == right {
                Some(a)
            } else {
                None
            }
        }
        Some(Self {
            scaling: one(self.scaling, other.scaling, RIGHT.scaling)?,
            alpha: one(self.alpha, other.alpha, RIGHT.alpha)?,
            beta: one(self.beta, other.beta, RIGHT.beta)?,
            delta: one(self.delta, other.delta, RIGHT.delta)?,
            weighted: one(self.weighted, other.weighted, RIGHT.weighted)?,
            norm_of: one(self.norm_of, other.norm_of, RIGHT.norm_of)?,
            norm: one(self.norm, other.norm, RIGHT.norm)?,
            norm_per: one(self.norm_per, other.norm_per, RIGHT.norm_per)?,
            eps: one(self.eps, other.eps, RIGHT.eps)?,
            gain: one(self.gain, other.gain, RIGHT.gain)?,
            norm_gradient: one(self.norm_gradient, other.norm_gradient, RIGHT.norm_gradient)?,
            output: one(self.output, other.output, RIGHT.output)?,
            bias: one(self.bias, other.bias, RIGHT.bias)?,
            walk: one(self.walk, other.walk, RIGHT.walk)?,
            overwritten: one(self.overwritten, other.overwritten, RIGHT.overwritten)?,
        })
    }
}

/// s.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// s
    Once,
    /// 1
    Missing,
    /// s^2
    Twice,
    /// r s: `lora_alpha` without the division.
    TimesRank,
    /// sqrt(r) s: rslora's where it is not asked for.
    TimesRootRank,
}

/// A learned scalar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Learned {
    /// It
    Itself,
    /// 1
    One,
    /// The other of the two.
    Other,
    /// Its square.
    Squared,
}

/// `B A`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Delta {
    /// `B A`, group by group.
    Product,
    /// Its transpose, where it is square.
    Transposed,
    /// Every unit combines the ranks of the first group.
    FirstGroup,
}

/// V.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighted {
    /// `beta W0 + alpha s B A`
    Sum,
    /// `beta W0 / (||W0|| + eps) + alpha s B A`, that norm a function of W0 whatever becomes of n; nothing of the kind
    /// for LoRA.
    UnitBase,
    /// `beta (W0 + alpha s B A)`
    BetaOutside,
    /// `beta W0 - alpha s B A`
    Difference,
    /// `(1 - alpha) beta W0 + alpha s B A`
    Interpolated,
}

/// What the norm is taken of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormOf {
    /// V
    Weighted,
    /// W0
    Base,
    /// `alpha s B A`
    Delta,
    /// `beta W0 + alpha B A`
    WithoutScaling,
    /// `W0 + s B A`
    WithoutAlphaBeta,
}

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// The root of the sum of squares.
    Euclidean,
    /// The sum of squares.
    Squared,
    /// The sum of absolute values.
    Absolute,
    /// The mean of absolute values.
    Mean,
    /// The root of the mean of squares.
    RootMeanSquare,
}

/// How many norms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormPer {
    /// One an output unit or an input column, as the settings say.
    Setting,
    /// One an output unit, whatever they say.
    Output,
    /// One an input column, a token or an input channel, whatever they say.
    Input,
    /// One for the whole weight; m still has one entry a unit.
    Whole,
    /// One a row of the weight as it is stored, where it is stored transposed: an input column.
    StoredRow,
}

/// The epsilon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Eps {
    /// `||V|| + eps`
    Added,
    /// `||V||`
    Ignored,
    /// `sqrt(||V||^2 + eps)`
    InsideRoot,
    /// `||V|| + eps`, with n instead of `||V||` in the gradient of the norm.
    InGradient,
}

/// g.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gain {
    /// `m / n`
    Ratio,
    /// 1
    One,
    /// m
    Magnitude,
    /// `1 / n`
    Reciprocal,
    /// `n / m`
    Inverted,
    /// `m_j / n_i`: a row times a column.
    Outer,
    /// `m / n^2`
    NormTwice,
    /// `m / n`, and not 0 where n is 0
    Unguarded,
}

/// How the gradient treats n.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Path {
    /// As the settings say.
    Setting,
    /// As a constant.
    Held,
    /// As the function that it is.
    Free,
}

/// How W0 and B A meet the input and the mask. k is the mask, and 1 without one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Output {
    /// `(1 - k) W0 + k g V`
    Correction,
    /// `g V`
    DropoutIgnored,
    /// `k g V`
    DropoutOnEverything,
    /// `g (beta W0 + k alpha s B A)`
    DropoutOnLoraOnly,
    /// `(1 - k) W0 + k g V` with 1 for every k but 0.
    DropoutUnscaled,
    /// `W0 + k g V`
    BaseTwice,
    /// `(1 - k) W0 + k (beta W0 + g alpha s B A)`
    GainOnLoraOnly,
    /// `(1 - k) W0 + k (g beta W0 + alpha s B A)`
    GainOnBaseOnly,
    /// `W0`
    BaseOnly,
    /// `(1 - k) W0 + k g beta W0`
    WithoutLora,
    /// `g W0 + beta g s B A`
    BetaOnLora,
    /// `g W0 + e g (beta - 1) W0 + g alpha s B A`, all of it times e.
    EmbedScaleTwiceOnBeta,
    /// `e W0 + (g V - W0)`
    EmbedScaleOnBaseOnly,
}

/// b.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bias {
    /// `+ b`
    Added,
    /// `+ g b`
    Scaled,
    /// `+ beta b`
    TimesBeta,
    /// `+ s b`
    TimesScaling,
    /// Nothing.
    Dropped,
    /// `+ 2 b`: by the base layer and by the adapter.
    Twice,
}

/// What is lost of the operator's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Walk {
    /// Nothing.
    Setting,
    /// This setting, by the whole operator.
    Without(&'static str),
    /// This setting, by A's path alone.
    LoraWithout(&'static str),
    /// This setting, by the gradient's fraction alone (E41).
    FractionWithout(&'static str),
    /// The direction of the kernel: convolution instead of cross-correlation.
    Flipped,
    /// The order of the kernel's axes, where it is as long along each.
    AxesSwapped,
}

/// What a gradient forgets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Overwritten {
    /// Nothing: contributions add up.
    Nothing,
    /// All occurrences of an id but the last.
    Ids,
    /// All windows that read an input but the last.
    Inputs,
}
