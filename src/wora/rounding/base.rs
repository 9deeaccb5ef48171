//! The base output and its gradients, which may be rounded apart from any gain: by who adds a correction to them.
//! SPEC.md, section 8.5, E152.

use crate::operators::Operator;
use crate::wora::{Cache, Layer, NormAxis};
use ndarray::Array1;

/// Below this a gain times beta makes small what the base output is not.
const SMALL: f64 = 0.5;
/// What gains leave of the squares of `op*(dy, W0)` when what they have in common is taken out may be such a part of them,
/// and is then taken for as random as rounding errors are.
const RANDOM: f64 = 1.0 / 8.0;

/// Where the errors of the base output are counted.
pub(super) enum Base {
    /// Among those of W', whose gains make none of it small.
    Gained,
    /// Among what is added up of W0^2 anyway.
    Summed(AmongWeights),
    /// By themselves.
    Apart,
}

/// What is added up of W0^2 for the base output, and for its gradient.
pub(super) struct AmongWeights {
    /// In y
    output: f64,
    /// In dx, unit by unit
    gradient: Array1<f64>,
    /// What `op*(g dy, beta W0)` is to be multiplied by to come near `op*(dy, W0)`, where gains have so much in common. E153
    per_gain: Option<f64>,
}

impl Base {
    /// The chains of a sum over a unit's weights and of one over units.
    pub fn new<O: Operator>(layer: &Layer<O, f64>, cache: &Cache<'_, O, f64>, [output, chain]: [f64; 2]) -> Self {
        let direction = match (&cache.dropped, &cache.direction) {
            (Some(_), _) => return Self::Apart,
            (None, None) => return Self::Gained,
            (None, Some(direction)) => direction,
        };
        let gains = &direction.gain * layer.beta();
        if gains.iter().all(|gain| *gain >= SMALL) {
            return Self::Gained;
        }
        if layer.config.norm_axis == NormAxis::Input {
            return Self::Apart;
        }
        let squares = gains.dot(&gains);
        let per_gain = if squares > 0.0 { gains.sum() / squares } else { 0.0 };
        let rest = gains.mapv(|gain| (1.0 - per_gain * gain).powi(2));
        let is_random = rest.sum() <= RANDOM * gains.len() as f64;
        let gradient = if is_random { rest * 2.0 + chain } else { Array1::from_elem(gains.len(), chain) }; // E153
        Self::Summed(AmongWeights { output, gradient, per_gain: is_random.then_some(per_gain) })
    }

    /// How often y has `op2(x^2, W0^2)` among its errors beside what it has of W', and how often `op(x, W0)^2`. E152
    pub fn of_outputs(&self) -> [f64; 2] {
        if let Self::Summed(of) = self { [of.output, 1.0] } else { [0.0; 2] } // E152
    }

    /// How often dx has `op2*(dy^2, W0^2)` among its errors beside what it has of W', unit by unit. E152
    pub fn of_rows(&self) -> Option<Array1<f64>> {
        if let Self::Summed(of) = self { Some(&of.gradient * 3.0) } else { None } // E152
    }

    /// Whether `op*(dy, W0)` is to be computed for dx beside what is added up for all units. E152
    pub fn is_gradient_needed(&self) -> bool {
        matches!(self, Self::Summed(AmongWeights { per_gain: None, .. }))
    }

    /// How often dx has `op*(g dy, beta W0)^2` among its errors for `op*(dy, W0)^2`. E153
    pub fn of_gained(&self) -> f64 {
        let per_gain = if let Self::Summed(of) = self { of.per_gain } else { None };
        6.0 * per_gain.map_or(0.0, |per_gain| per_gain * per_gain) // E153
    }
}
