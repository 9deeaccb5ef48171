//! A report: what the oracle finds, as one page to look at, with what to see in every picture.
//!
//! ```no_run
//! use woracle::report::{Plan, Report};
//! let report = Report::gather(&Plan::quick(0), &|_| ())?;
//! assert!(report.is_right() && report.to_html().contains("<math"));
//! # Ok::<(), woracle::Error>(())
//! ```

mod heat_map;
mod mistakes;
mod plane;
mod training;
mod v_curve;

pub use heat_map::{Group, HeatMap};
pub use mistakes::Matrix;
pub use plane::{Arrow, Plane, Ray};
pub use training::{Training, Way};
pub use v_curve::{DEFAULT_PATHS, VCurves, curve_at, picture};

use crate::Result;
use crate::chart::Picture;
use crate::mistakes::{MISTAKES, Mistake};
use crate::page::{Page, escape, figure, formula};
use crate::registry::{Entry, entries};
use crate::spec;
use serde::Serialize;

/// What goes into a report.
#[derive(Clone)]
pub struct Plan {
    /// What numbers are drawn from.
    pub seed: u64,
    /// The cases that are checked.
    pub cases: Vec<Entry>,
    /// The elements whose differences are drawn against the step, as `CASE/TENSOR` or `CASE/TENSOR/ELEMENT`.
    pub paths: Vec<String>,
    /// The mistakes that the checker is put on trial with.
    pub mistakes: Vec<&'static Mistake>,
    /// How often the adapters that are compared see every sample.
    pub epochs: usize,
}

/// A full comparison's epochs, and a quick one's.
const EPOCHS: usize = 40;
const FEW_EPOCHS: usize = 4;

impl Plan {
    /// Everything there is.
    pub fn everything(seed: u64) -> Self {
        let paths = DEFAULT_PATHS.map(String::from).to_vec();
        Self { seed, cases: entries().collect(), paths, mistakes: MISTAKES.iter().collect(), epochs: EPOCHS }
    }

    /// A look at each: the small cases of the linear layer and of the modules beside it, the mistakes that no other layer
    /// has, and a short training.
    pub fn quick(seed: u64) -> Self {
        let everything = Self::everything(seed);
        let small = |entry: &Entry| entry.name().contains("linear") && !entry.name().contains("large");
        Self {
            cases: everything.cases.into_iter().filter(small).collect(),
            mistakes: everything.mistakes.into_iter().filter(|mistake| mistake.layers == ["linear"]).collect(),
            epochs: FEW_EPOCHS,
            ..everything
        }
    }

    /// How often the watcher of [`Report::gather`] is told of something that is done.
    pub fn parts(&self) -> usize {
        self.cases.len() + self.paths.len() + self.mistakes.len() + Training::WAYS.len() + 1
    }
}

/// What there is to see.
#[derive(Clone, Serialize)]
pub struct Report {
    /// What numbers were drawn from.
    pub seed: u64,
    /// Whether every case and every mistake there is went into it.
    pub complete: bool,
    /// Every case and what the witnesses say of its tensors.
    pub heat_map: HeatMap,
    /// Differences against the step.
    pub v_curves: VCurves,
    /// Every mistake and who sees it.
    pub mistakes: Matrix,
    /// The same run with the norm detached and with the full gradient.
    pub training: Training,
    /// The loss over alpha and beta.
    pub plane: Plane,
}

impl Report {
    /// Does all the work; `watch` is told what is done.
    ///
    /// # Errors
    ///
    /// A path that leads to no element of a gradient, which is found out first; training data that cannot be written.
    pub fn gather(plan: &Plan, watch: &(dyn Fn(&str) + Sync)) -> Result<Self> {
        let v_curves = VCurves::gather(&plan.paths, plan.seed, watch)?;
        let plane = Plane::gather(plan.seed)?;
        watch("the plane of alpha and beta");
        // Side by side: training takes its steps one after the other, and cases leave room beside it.
        let (training, (heat_map, mistakes)) = rayon::join(
            || Training::gather(plan.seed, plan.epochs, watch),
            || {
                rayon::join(
                    || HeatMap::gather(&plan.cases, plan.seed, watch),
                    || Matrix::gather(&plan.mistakes, plan.seed, watch),
                )
            },
        );
        let complete = plan.cases.len() == entries().count() && plan.mistakes.len() == MISTAKES.len();
        Ok(Self { seed: plan.seed, complete, heat_map, v_curves, mistakes: mistakes?, training: training?, plane })
    }

    /// Whether every case agrees, every mistake is seen, and the trained adapters are what their merged weights are.
    pub fn is_right(&self) -> bool {
        self.heat_map.agrees() && self.mistakes.all_killed() && self.training.holds()
    }

    /// What it comes to, in a line.
    pub fn summary(&self) -> String {
        format!("{}; {}; {}", self.heat_map.summary(), self.mistakes.summary(), self.training.summary())
    }

    /// The page.
    pub fn to_html(&self) -> String {
        Page::new("WoRA, checked")
            .section("What was found", &self.opening())
            .section("Every case and every tensor", &self.heat_map.to_html())
            .section("Error against step: the V curve", &self.v_curves.to_html())
            .section("Known mistakes, and who sees them", &self.mistakes.to_html())
            .section("Trained with the norm detached and with the full gradient", &self.training.to_html())
            .section("The plane of alpha and beta", &self.plane.to_html())
            .to_html()
    }

    fn opening(&self) -> String {
        let verdict = |right: bool, text: &str| {
            let (class, word) = if right { ("good", "Right") } else { ("bad", "Wrong") };
            format!("<li><strong class=\"{class}\">{word}:</strong> {}</li>", escape(text))
        };
        let verdicts = [
            verdict(self.heat_map.agrees(), &self.heat_map.summary()),
            verdict(self.mistakes.all_killed(), &self.mistakes.summary()),
            verdict(self.training.holds(), &self.training.summary()),
        ];
        let part = if self.complete {
            ""
        } else {
            "<p class=\"unsure\">This page shows a part of all cases and mistakes only.</p>"
        };
        format!(
            "<p>A WoRA layer turns its input x into y with a weight W\u{2032}. Each row of V is a mixture of the frozen weight \
             W<sub>0</sub> and the low-rank product BA, of which m sets the length:</p>\n{}{}{}{}\
             <p>The backward pass of this layer was derived by hand. Whether it is right is asked of witnesses that share as \
             little as they can with it: a definition in plain loops, the same path in f32, differences of the forward, dual \
             numbers, and identities between the gradients. This page is what they say.</p>\n<ul>{}</ul>\n{part}\
             <p class=\"note\">woracle {}, seed {}.</p>",
            labelled("E9"),
            labelled("E10"),
            labelled("E11"),
            labelled("E12"),
            verdicts.concat(),
            env!("CARGO_PKG_VERSION"),
            self.seed,
        )
    }
}

/// A formula of SPEC.md, with its label.
fn labelled(label: &str) -> String {
    let latex = spec::formula(label).expect("a label of SPEC.md");
    format!("<div class=\"formula\">{} <span class=\"label\">{label}</span></div>\n", formula(latex))
}

/// Pictures with their captions, side by side where there is room.
fn figures(pictures: impl IntoIterator<Item = (Picture, String)>) -> String {
    let all: String = pictures.into_iter().map(|(picture, caption)| figure(&picture.to_svg(), &caption)).collect();
    format!("<div class=\"pictures\">\n{all}</div>\n")
}

/// What is read out, and not shown.
fn spoken(text: &str) -> String {
    format!("<span class=\"hidden\">{}</span>", escape(text))
}
