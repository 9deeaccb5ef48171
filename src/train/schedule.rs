//! How the learning rate goes up and down. SPEC.md, section 14.3.

use serde::{Deserialize, Serialize};

/// What happens to the rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Nothing.
    #[default]
    Constant,
    /// A straight line down.
    Linear,
    /// Half a cosine down.
    Cosine,
}

/// A factor for every learning rate, step by step.
///
/// ```
/// use woracle::train::{Decay, Schedule};
/// let schedule = Schedule { warmup: 2, decay: Decay::Linear, floor: 0.0 };
/// assert_eq!([0, 1, 2, 4].map(|step| schedule.factor(step, 6)), [0.5, 1.0, 1.0, 0.5]);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Over so many steps the factor goes up to 1 in a straight line.
    pub warmup: usize,
    /// What happens then.
    pub decay: Decay,
    /// The factor that a decay goes down to: from 0 to 1.
    pub floor: f64,
}

impl Schedule {
    /// The factor of a step, counted from 0, of so many: from `floor` to 1, and less while it warms up. E132 to E134
    pub fn factor(&self, step: usize, steps: usize) -> f64 {
        if step < self.warmup {
            return (step + 1) as f64 / self.warmup as f64; // E132
        }
        let (done, all) = (step - self.warmup, steps.saturating_sub(self.warmup).max(1));
        let progress = (done as f64 / all as f64).min(1.0);
        let left = match self.decay {
            Decay::Constant => return 1.0,
            Decay::Linear => 1.0 - progress, // E133
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()), // E134
        };
        self.floor + (1.0 - self.floor) * left
    }
}
