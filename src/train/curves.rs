//! `curves.svg`: how loss, metric, alpha and beta went, step by step.

use super::metrics::Record;
use crate::chart::{Axis, Chart, Mark, Picture, Series};
use std::collections::BTreeMap;

/// So many steps on either side a step's loss is averaged with: single batches are noise.
const AROUND: usize = 5;

/// Points of a curve.
pub(crate) type Points = Vec<(f64, f64)>;

/// A curve and its name.
pub(crate) type Named = (String, Points);

/// A picture of a run as SVG: the training loss, the validation metric, and alpha and beta of every adapted module. Steps
/// of one stage follow those of the other.
///
/// ```
/// use woracle::train::{Record, curves};
/// let step = |step: usize, loss| Record::Step {
///     stage: "pretrain".into(), step, epoch: 0, loss, rate: 1.0, gradient_norm: 1.0, seconds: 0.01,
/// };
/// let svg = curves(&[step(1, 2.0), step(2, 1.5), step(3, 1.25)]);
/// assert!(svg.starts_with("<svg") && svg.contains("polyline"));
/// ```
pub fn curves(records: &[Record]) -> String {
    let (metric, validations) = validations(records);
    let panel = |title: &str, unit: &str, curves: Vec<Named>| {
        let series = curves.into_iter().enumerate().map(|(number, (name, points))| {
            // There are more modules than colours.
            let mark = if number % 2 == 0 { Mark::Line } else { Mark::Dashes };
            Series::new(name, mark, number, points)
        });
        Chart::new(title, Axis::linear("step"), Axis::linear(unit)).with_all(series)
    };
    let words = "Training loss, validation metric, and where there are any alpha and beta, against the step.";
    let picture = Picture::new("Curves of a training run", words)
        .with(panel("Training loss", "mean loss", losses(records)))
        .with(panel("Validation", metric, validations));
    let scales = scales(records);
    if scales.is_empty() { picture } else { picture.with(panel("Scales", "alpha, beta", scales)) }.to_file()
}

fn stage_and_step(record: &Record) -> (&str, usize) {
    match record {
        Record::Step { stage, step, .. } | Record::Evaluation { stage, step, .. } => (stage, *step),
    }
}

/// The step that a stage's steps are counted from.
fn starts(records: &[Record]) -> BTreeMap<&str, usize> {
    let mut lengths: Vec<(&str, usize)> = Vec::new();
    for (stage, step) in records.iter().map(stage_and_step) {
        match lengths.iter_mut().find(|(known, _)| *known == stage) {
            Some((_, length)) => *length = step.max(*length),
            None => lengths.push((stage, step)),
        }
    }
    let mut start = 0;
    let mut begin = |(stage, length)| {
        start += length;
        (stage, start - length)
    };
    lengths.into_iter().map(&mut begin).collect()
}

fn position(record: &Record, starts: &BTreeMap<&str, usize>) -> f64 {
    let (stage, step) = stage_and_step(record);
    (starts[stage] + step) as f64
}

/// A point on the curve of this name.
fn add(curves: &mut Vec<Named>, name: String, point: (f64, f64)) {
    match curves.iter_mut().find(|(known, _)| *known == name) {
        Some((_, points)) => points.push(point),
        None => curves.push((name, vec![point])),
    }
}

/// The loss of every stage's steps, averaged over steps that are near.
pub(crate) fn losses(records: &[Record]) -> Vec<Named> {
    let (mut curves, starts) = (Vec::new(), starts(records));
    for record in records {
        if let Record::Step { stage, loss, .. } = record {
            add(&mut curves, stage.clone(), (position(record, &starts), *loss));
        }
    }
    for (_, points) in &mut curves {
        let raw = points.clone();
        for (nth, point) in points.iter_mut().enumerate() {
            let near = &raw[nth.saturating_sub(AROUND)..(nth + AROUND + 1).min(raw.len())];
            point.1 = near.iter().map(|(_, loss)| loss).sum::<f64>() / near.len() as f64;
        }
    }
    curves
}

/// What people look at, and how it went in every stage.
pub(crate) fn validations(records: &[Record]) -> (&'static str, Vec<Named>) {
    let (mut curves, mut metric, starts) = (Vec::new(), "loss", starts(records));
    for record in records {
        if let Record::Evaluation { stage, validation, .. } = record {
            let (name, value) = validation.headline();
            metric = name;
            add(&mut curves, stage.clone(), (position(record, &starts), value));
        }
    }
    (metric, curves)
}

/// alpha and beta of every module that has them, each a curve.
pub(crate) fn scales(records: &[Record]) -> Vec<Named> {
    let (mut curves, starts) = (Vec::new(), starts(records));
    for record in records {
        if let Record::Evaluation { scales, .. } = record {
            for (module, scales) in scales {
                for (name, value) in scales.iter().filter(|(name, _)| *name != "magnitude") {
                    add(&mut curves, format!("{module} {name}"), (position(record, &starts), *value));
                }
            }
        }
    }
    curves
}

/// A row of the comparison's picture: a method, and its metric by seed.
pub(super) type Row<'a> = (&'a str, &'a [f64]);

/// A picture of a comparison: every seed a point, the mean a bar.
pub(super) fn comparison(metric: &str, rows: &[Row<'_>]) -> String {
    let names = rows.iter().map(|(name, _)| name.to_string()).collect();
    let series = rows.iter().enumerate().flat_map(|(row, (_, values))| {
        let (at, mean) = (row as f64, values.iter().sum::<f64>() / values.len() as f64);
        let bar = Series::unnamed(Mark::Line, row, vec![(mean, at - 0.3), (mean, at + 0.3)]).width(4);
        [bar, Series::unnamed(Mark::Points, row, values.iter().map(|&value| (value, at)).collect()).width(6)]
    });
    let chart = Chart::new(format!("Test, {metric}"), Axis::linear(metric), Axis::rows("", names)).with_all(series);
    let title = format!("Methods compared by {metric}");
    Picture::new(title, "Every point is a seed, every bar a mean.").with(chart).to_file()
}
