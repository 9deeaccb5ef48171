//! The same run twice: with the norm detached, and with the full gradient.

use super::{figures, labelled};
use crate::chart::{Axis, Chart, Ink, Mark, Picture, Series, scientific};
use crate::page::{escape, inline_formula};
use crate::train::{Evaluation, Points, Record, Run, Start, Unwatched, losses, parse, records, scales, validations};
use crate::wora::NormGradient;
use crate::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

const CONFIGURATION: &str = include_str!("training.toml");
/// The module whose alpha and beta are drawn.
const MODULE: &str = "fc1";

/// Two adapters that differ in nothing but the treatment of the norm.
#[derive(Clone, Debug, Serialize)]
pub struct Training {
    /// What the validation is measured by.
    pub metric: &'static str,
    /// Detached, then full.
    pub ways: Vec<Way>,
}

/// How one adapter was trained.
#[derive(Clone, Debug, Serialize)]
pub struct Way {
    /// How the norm was treated.
    pub norm_gradient: NormGradient,
    /// The training loss against the step, averaged over steps that are near.
    pub loss: Points,
    /// The validation metric against the step.
    pub validation: Points,
    /// alpha and beta of every module, as `fc1 alpha`, against the step.
    pub scales: BTreeMap<String, Points>,
    /// On the test part: the base model.
    pub before: Evaluation,
    /// On the test part: the adapted model.
    pub after: Evaluation,
    /// Whether the merged model is as good, and the base weights are the bits that they were.
    pub holds: bool,
}

impl Training {
    /// The two ways.
    pub const WAYS: [NormGradient; 2] = [NormGradient::Detached, NormGradient::Full];

    /// Trains both side by side, each from the same base model and in the same order of samples; `watch` is told when one
    /// is done.
    ///
    /// # Errors
    ///
    /// A directory for the runs that cannot be made or written into.
    pub fn gather(seed: u64, epochs: usize, watch: &(dyn Fn(&str) + Sync)) -> Result<Self> {
        let one = |norm_gradient: NormGradient| {
            let way = Way::train(norm_gradient, seed, epochs)?;
            watch("training");
            Ok(way)
        };
        let both: Vec<(&'static str, Way)> = Self::WAYS.into_par_iter().map(one).collect::<Result<_>>()?;
        let metric = both.first().map_or("", |(metric, _)| metric);
        Ok(Self { metric, ways: both.into_iter().map(|(_, way)| way).collect() })
    }

    /// Whether what must hold of a run holds of both.
    pub fn holds(&self) -> bool {
        self.ways.iter().all(|way| way.holds)
    }

    /// How good they are.
    pub fn summary(&self) -> String {
        let one = |way: &Way| format!("{} {}", name(way), way.after);
        let ways = self.ways.iter().map(one).collect::<Vec<_>>().join(", ");
        let merged = if self.holds() { "is as good and the base weights are unchanged" } else { "is NOT AS GOOD" };
        format!("trained adapters, on the test part: {ways}; merged, each {merged}")
    }

    /// What is seen, and the pictures.
    pub fn to_html(&self) -> String {
        let before = self.ways.first().map_or_else(String::new, |way| way.before.to_string());
        format!(
            "<p>A small network has learned digits and is frozen ({} right after ink and paper are exchanged). Two adapters are \
             trained on it, from the same start, on the same batches, by plain gradient descent. They differ in one setting: \
             <code>norm_gradient</code>. Detached, as in PEFT, the norm counts as a constant in the backward, although it moves; \
             the full gradient takes into account how it moves.</p>\n{}\
             <p>Of dV, detaching leaves out the part along V, and no output depends on how long V is; but of what A, B, \u{3b1} and \
             \u{3b2} are given it leaves out more than that, so that nothing promises that its loss falls. Here it does. What \
             differs most is where \u{3b1} and \u{3b2} go. The full gradient is perpendicular to (\u{3b1}, \u{3b2}), so small steps \
             keep {} and the length of (\u{3b1}, \u{3b2}) hardly changes; it can only grow, by the square of each step. The \
             detached gradient pushes along (\u{3b1}, \u{3b2}) too, and the length drifts although it means nothing. A full run \
             whose length drifts as the detached one\u{2019}s does would have a wrong gradient through the norm.</p>\n{}",
            escape(&before),
            labelled("E53"),
            inline_formula(r"\alpha\,d\alpha + \beta\,d\beta = 0"),
            figures(self.pictures()),
        )
    }

    /// Every picture, and what is to be read in it.
    pub fn pictures(&self) -> [(Picture, String); 4] {
        let of_both = |curve: &dyn Fn(&Way) -> Points| {
            let series = |(number, way): (usize, &Way)| {
                let mark = if number == 0 { Mark::Dashes } else { Mark::Line };
                Series::new(name(way), mark, Ink::Nth(number), curve(way))
            };
            self.ways.iter().enumerate().map(series).collect::<Vec<_>>()
        };
        let picture = |title: &str, y: Axis, series: Vec<Series>, caption: String| {
            let chart = Chart::new(title, Axis::linear("step of the adapter"), y).with_all(series);
            (Picture::new(format!("{title}: detached and full gradient"), caption.as_str()).with(chart), caption)
        };
        let mut apart = Vec::new();
        for (number, way) in self.ways.iter().enumerate() {
            for (which, mark) in [("alpha", Mark::Line), ("beta", Mark::Dashes)] {
                apart.push(Series::new(
                    format!("{which}, {}", name(way)),
                    mark,
                    Ink::Nth(number),
                    way.scale(MODULE, which),
                ));
            }
        }
        let ends = |what: &str, curve: &dyn Fn(&Way) -> Points| {
            let one = |way: &Way| {
                let points = curve(way);
                let value =
                    |point: Option<&(f64, f64)>| point.map_or("nothing".into(), |(_, value)| scientific(*value));
                format!("{} from {} to {}", name(way), value(points.first()), value(points.last()))
            };
            format!("{what}: {}.", self.ways.iter().map(one).collect::<Vec<_>>().join(", "))
        };
        let (loss, validation) = (|way: &Way| way.loss.clone(), |way: &Way| way.validation.clone());
        let length = |way: &Way| way.length(MODULE);
        [
            picture(
                "Training loss",
                Axis::logarithmic("mean cross-entropy, in nats"),
                of_both(&loss),
                ends("Averages over steps that are near", &loss),
            ),
            picture("Validation", Axis::linear(self.metric), of_both(&validation), ends(self.metric, &validation)),
            picture(
                &format!("alpha and beta of {MODULE}"),
                Axis::linear("value, without a unit"),
                apart,
                ends("alpha", &|way| way.scale(MODULE, "alpha"))
                    + " "
                    + &ends("beta", &|way| way.scale(MODULE, "beta")),
            ),
            picture(
                &format!("Length of (alpha, beta) of {MODULE}"),
                Axis::linear("root of alpha\u{b2} + beta\u{b2}"),
                of_both(&length),
                ends("Length", &length),
            ),
        ]
    }
}

fn name(way: &Way) -> &'static str {
    match way.norm_gradient {
        NormGradient::Detached => "detached",
        NormGradient::Full => "full gradient",
    }
}

impl Way {
    /// A run in a directory that is gone afterwards, and the name of what it is measured by.
    fn train(norm_gradient: NormGradient, seed: u64, epochs: usize) -> Result<(&'static str, Self)> {
        let mut read = parse(Path::new("training.toml"), CONFIGURATION.into())?;
        read.set_seed(seed);
        read.config.adapter.as_mut().expect("an adapter").norm_gradient = norm_gradient;
        read.config.adapt.as_mut().expect("how it is trained").epochs = Some(epochs);
        let directory = tempfile::tempdir().map_err(|error| Error::io(&std::env::temp_dir(), &error))?;
        let summary = Run::new(&read, directory.path(), Start::Fresh)?.finish(&Unwatched)?;
        let adapted = summary.adapt.expect("an adapter");
        let of_adapter = |record: &Record| {
            let (Record::Step { stage, .. } | Record::Evaluation { stage, .. }) = record;
            stage == "adapt"
        };
        let all: Vec<Record> = records(directory.path())?.into_iter().filter(of_adapter).collect();
        let only =
            |curves: Vec<(String, Points)>| curves.into_iter().next().map(|(_, points)| points).unwrap_or_default();
        let (metric, validation) = validations(&all);
        let way = Self {
            norm_gradient,
            loss: only(losses(&all)),
            validation: only(validation),
            scales: scales(&all).into_iter().collect(),
            before: adapted.base,
            after: adapted.trained.test,
            holds: adapted.equal && adapted.base_unchanged,
        };
        Ok((metric, way))
    }

    /// `"alpha"` or `"beta"` of a module, against the step.
    fn scale(&self, module: &str, which: &str) -> Points {
        self.scales.get(&format!("{module} {which}")).cloned().unwrap_or_default()
    }

    /// How long (alpha, beta) of a module is, against the step.
    pub fn length(&self, module: &str) -> Points {
        let both = self.scale(module, "alpha").into_iter().zip(self.scale(module, "beta"));
        both.map(|((step, alpha), (_, beta))| (step, alpha.hypot(beta))).collect()
    }
}
