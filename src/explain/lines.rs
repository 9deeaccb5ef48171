//! How every line that a pass shows reads: one list, in the order in which they are told.

use crate::wora::{Config, NormAxis, NormGradient};

/// The parts of an explanation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Chapter {
    /// The definition's forward, which forms V and W'.
    Definition,
    /// The production forward, which forms neither.
    Factored,
    /// The adjoint of every line of the definition.
    DefinitionBackward,
    /// The production backward with the norm held.
    FactoredBackward,
    /// What flows through the norm, added to it.
    ThroughNorm,
}

impl Chapter {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Definition, Self::Factored, Self::DefinitionBackward, Self::FactoredBackward, Self::ThroughNorm];

    /// What is written above it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Definition => "Forward by the definition (section 4): V and W' are formed",
            Self::Factored => "Forward, factored (sections 5.1 and 6.1): the same y without them",
            Self::DefinitionBackward => "Backward by the definition (section 4.2): one adjoint a line",
            Self::FactoredBackward => "Backward, factored (section 6.2): the norm held, the detached gradient",
            Self::ThroughNorm => "Backward through the norm (section 5.3): the full gradient",
        }
    }
}

/// A line as it reads: its label and quantity, the chapter, and the formula.
struct Reading {
    label: &'static str,
    quantity: &'static str,
    chapter: Chapter,
    formula: &'static str,
}

const fn line(chapter: Chapter, label: &'static str, quantity: &'static str, formula: &'static str) -> Reading {
    Reading { label, quantity, chapter, formula }
}

use Chapter::{Definition, DefinitionBackward, Factored, FactoredBackward, ThroughNorm};

const READINGS: &[Reading] = &[
    line(Definition, "E9", "BA", "Δ = B A"),
    line(Definition, "E9", "V", "V = β W0 + α s Δ"),
    line(Definition, "E10", "||V||", "‖V‖"),
    line(Definition, "E10", "n", "n = ‖V‖ + ε"),
    line(Definition, "E11", "g", "g = m / n"),
    line(Definition, "E12", "W'", "W' = g V"),
    line(Definition, "E44", "X", "X = unfold(x̃)"),
    line(Definition, "E39", "X", "X: e in the column of each id"),
    line(Definition, "E13", "y", "y = op(x, W0) + op(x̃, W' - W0) + b"),
    line(Factored, "E14", "||W0||^2", "‖W0‖²"),
    line(Factored, "E14", "<W0, BA>", "<W0, Δ> = (W0 Aᵀ) · B"),
    line(Factored, "E14", "||BA||^2", "‖Δ‖² = B (A Aᵀ) Bᵀ"),
    line(Factored, "E14", "||V||", "‖V‖ = √(β²‖W0‖² + 2 α β s <W0, Δ> + α² s² ‖Δ‖²)"),
    line(Factored, "E11", "g", "g = m / (‖V‖ + ε)"),
    line(Factored, "E15", "u", "u = g x̃"),
    line(Factored, "E16", "P", "P = op(u, W0)"),
    line(Factored, "E16", "U", "U = op(u, A)"),
    line(Factored, "E5", "Z", "Z = B U"),
    line(Factored, "E17", "y", "y = op(x - x̃, W0) + g (β P + α s Z) + b"),
    line(DefinitionBackward, "E142", "dW'", "dW' = op*(x̃, dy)"),
    line(DefinitionBackward, "E144", "c", "c = <dW', V>"),
    line(DefinitionBackward, "E28", "dm", "dm = c / n"),
    line(DefinitionBackward, "E145", "dV", "dV = g dW'"),
    line(DefinitionBackward, "E146", "dalpha", "dα = s <dV, Δ>"),
    line(DefinitionBackward, "E147", "dbeta", "dβ = <dV, W0>"),
    line(DefinitionBackward, "E148", "dB", "dB = α s dV Aᵀ"),
    line(DefinitionBackward, "E149", "dA", "dA = α s Bᵀ dV"),
    line(DefinitionBackward, "E150", "dW0", "dW0 = β dV + op*(x - x̃, dy)"),
    line(DefinitionBackward, "E47", "C", "C = W'ᵀ dy, and dx = fold(C)"),
    line(DefinitionBackward, "E143", "dx", "dx = op*(dy, W0) + mask op*(dy, W' - W0)"),
    line(FactoredBackward, "E18", "H", "H = g dy"),
    line(FactoredBackward, "E19", "p", "p = Σ dy P"),
    line(FactoredBackward, "E19", "S", "S = Σ dy Uᵀ"),
    line(FactoredBackward, "E19", "z", "z = <B, S>"),
    line(FactoredBackward, "E20", "dbeta", "dβ = Σ g p"),
    line(FactoredBackward, "E21", "dalpha", "dα = s Σ g z"),
    line(FactoredBackward, "E22", "dB", "dB = α s g S"),
    line(FactoredBackward, "E23", "T", "T = α s Bᵀ H"),
    line(FactoredBackward, "E24", "dA", "dA = op*(u, T)"),
    line(FactoredBackward, "E25", "du", "du = op*(β H, W0) + op*(T, A)"),
    line(FactoredBackward, "E29", "dW0", "dW0 = op*(u, β H) + op*(x - x̃, dy)"),
    line(FactoredBackward, "E27", "c", "c = β p + α s z"),
    line(FactoredBackward, "E28", "dm", "dm = c / n"),
    line(FactoredBackward, "E26", "dx", "dx = mask g du + (1 - mask) op*(dy, W0)"),
    line(FactoredBackward, "E30", "db", "db = Σ dy"),
    line(ThroughNorm, "E31", "k", "k = -(c / n) (g / ‖V‖)"),
    line(ThroughNorm, "E32", "dalpha", "dα += s Σ k (β <W0, Δ> + α s ‖Δ‖²)"),
    line(ThroughNorm, "E33", "dbeta", "dβ += Σ k (β ‖W0‖² + α s <W0, Δ>)"),
    line(ThroughNorm, "E34", "dB", "dB += α s k V Aᵀ"),
    line(ThroughNorm, "E35", "dA", "dA += α s Bᵀ (k V)"),
    line(ThroughNorm, "E36", "dW0", "dW0 += β k V"),
];

/// What changes how lines read.
pub(super) struct Circumstances {
    pub config: Config,
    /// Whether there is a dropout mask.
    pub masked: bool,
    pub biased: bool,
    /// Whether a lookup passes on only a fraction of its gradient (E41).
    pub held_back: bool,
}

impl Circumstances {
    /// The formula as it reads here, where it reads otherwise than in the list.
    fn special(&self, label: &str, quantity: &str) -> Option<&'static str> {
        let Self { config, masked, held_back, .. } = self;
        let full = config.norm_gradient == NormGradient::Full && config.has_norm();
        let per_input = config.norm_axis == NormAxis::Input && config.has_norm();
        match label {
            // The columns of V are the rows of its transpose, and the factors change places.
            "E14" if per_input => match quantity {
                "<W0, BA>" => Some("<W0, Δ> = (W0ᵀ B) · Aᵀ"),
                "||BA||^2" => Some("‖Δ‖² = Aᵀ (Bᵀ B) A"),
                _ => None,
            },
            "E13" if !masked => Some("y = op(x, W') + b"),
            "E15" if per_input => Some("u = g x̃"),
            "E15" => Some("u = x̃"),
            "E17" => Some(match (masked, per_input) {
                (false, false) => "y = g (β P + α s Z) + b",
                (false, true) => "y = β P + α s Z + b",
                (true, false) => "y = op(x - x̃, W0) + g (β P + α s Z) + b",
                (true, true) => "y = op(x - x̃, W0) + β P + α s Z + b",
            }),
            "E145" if full => Some("dV = g dW' + k V, k = -(c / n) (g / ‖V‖)"),
            "E149" if *held_back => Some("dA = α s Bᵀ dV, g dW' in it times f (E41)"),
            "E150" if *held_back => Some("dW0 = β dV, g dW' in it times f (E41)"),
            "E150" if !masked => Some("dW0 = β dV"),
            "E143" if !masked => Some("dx = op*(dy, W')"),
            "E18" if per_input => Some("H = dy"),
            "E18" => Some("H = g dy"),
            "E20" if per_input => Some("dβ = Σ p"),
            "E21" if per_input => Some("dα = s Σ z"),
            "E22" if per_input => Some("dB = α s S"),
            "E24" if *held_back => Some("dA = op*(u, T), columns times f (E41)"),
            "E29" if *held_back => Some("dW0 = op*(u, β H), columns times f (E41)"),
            "E29" if !masked => Some("dW0 = op*(u, β H)"),
            "E27" if per_input => Some("c = Σ x̃ du"),
            "E26" => Some(match (masked, per_input) {
                (false, false) => "dx = du",
                (false, true) => "dx = g du",
                (true, false) => "dx = mask du + (1 - mask) op*(dy, W0)",
                (true, true) => "dx = mask g du + (1 - mask) op*(dy, W0)",
            }),
            _ => None,
        }
    }
}

/// Where a line stands in the list, its chapter, and its formula as it reads here.
pub(super) fn reading(
    label: &str,
    quantity: &str,
    by_definition: bool,
    circumstances: &Circumstances,
) -> Option<(usize, Chapter, &'static str)> {
    let of_definition = |chapter| matches!(chapter, Definition | DefinitionBackward);
    let fits =
        |one: &Reading| one.label == label && one.quantity == quantity && of_definition(one.chapter) == by_definition;
    let (place, Reading { chapter, formula, .. }) = READINGS.iter().enumerate().find(|(_, one)| fits(one))?;
    let formula = circumstances.special(label, quantity).unwrap_or(formula);
    let unbiased = formula.strip_suffix(" + b").filter(|_| !circumstances.biased);
    Some((place, *chapter, unbiased.unwrap_or(formula)))
}
