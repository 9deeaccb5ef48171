//! `curves.svg`: how loss, metric, alpha and beta went, step by step.

use super::metrics::Record;
use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

const SIZE: (u32, u32) = (900, 1000);
/// Where there are no alpha and beta.
const SIZE_WITHOUT_SCALES: (u32, u32) = (900, 700);
/// So many steps on either side a step's loss is averaged with: single batches are noise.
const AROUND: usize = 5;

/// Points of a curve.
type Points = Vec<(f64, f64)>;

/// A curve and its name.
type Named = (String, Points);

/// A picture of a run as SVG: the training loss, the validation metric, and alpha and beta of every adapted module. Steps
/// of one stage follow those of the other.
///
/// # Errors
///
/// What cannot be drawn.
pub fn curves(records: &[Record]) -> Result<String> {
    let failed = |error: &dyn std::fmt::Display| Error::File { path: "curves.svg".into(), message: error.to_string() };
    let starts = starts(records);
    let (losses, (metric, validations), scales) =
        (losses(records, &starts), validations(records, &starts), scales(records, &starts));
    let mut svg = String::new();
    {
        let size = if scales.is_empty() { SIZE_WITHOUT_SCALES } else { SIZE };
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE).map_err(|error| failed(&error))?;
        let panels = area.split_evenly((if scales.is_empty() { 2 } else { 3 }, 1));
        let figures = [
            ("Training loss", "mean loss", losses),
            ("Validation", metric, validations),
            ("Scales", "alpha, beta", scales),
        ];
        for (panel, (title, unit, curves)) in panels.iter().zip(figures) {
            draw(panel, title, unit, &curves).map_err(|error| failed(&error))?;
        }
        area.present().map_err(|error| failed(&error))?;
    }
    // What somebody hears who does not see it.
    let text = "<title>Curves of a training run</title><desc>Training loss, validation metric, and where there are any \
                alpha and beta, against the step.</desc>";
    Ok(svg.replacen('>', &format!(">{text}"), 1))
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

fn losses(records: &[Record], starts: &BTreeMap<&str, usize>) -> Vec<Named> {
    let mut curves = Vec::new();
    for record in records {
        if let Record::Step { stage, loss, .. } = record {
            add(&mut curves, stage.clone(), (position(record, starts), *loss));
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

fn validations(records: &[Record], starts: &BTreeMap<&str, usize>) -> (&'static str, Vec<Named>) {
    let (mut curves, mut metric) = (Vec::new(), "loss");
    for record in records {
        if let Record::Evaluation { stage, validation, .. } = record {
            let (name, value) = validation.headline();
            metric = name;
            add(&mut curves, stage.clone(), (position(record, starts), value));
        }
    }
    (metric, curves)
}

fn scales(records: &[Record], starts: &BTreeMap<&str, usize>) -> Vec<Named> {
    let mut curves = Vec::new();
    for record in records {
        if let Record::Evaluation { scales, .. } = record {
            for (module, scales) in scales {
                for (name, value) in scales.iter().filter(|(name, _)| *name != "magnitude") {
                    add(&mut curves, format!("{module} {name}"), (position(record, starts), *value));
                }
            }
        }
    }
    curves
}

/// The least and the largest of some numbers, and a little around them.
fn range(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return 0.0..1.0;
    }
    let margin = (0.05 * (high - low)).max(1e-6 * high.abs()).max(1e-9);
    low - margin..high + margin
}

fn draw<B: DrawingBackend>(
    panel: &DrawingArea<B, Shift>,
    title: &str,
    unit: &str,
    curves: &[Named],
) -> std::result::Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let points = || curves.iter().flat_map(|(_, points)| points.iter().copied());
    let (steps, values) = (range(points().map(|point| point.0)), range(points().map(|point| point.1)));
    let mut chart = ChartBuilder::on(panel)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(steps, values)?;
    let label = |value: &f64| format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_string();
    let steps = |value: &f64| format!("{value:.0}");
    chart.configure_mesh().x_desc("step").y_desc(unit).x_label_formatter(&steps).y_label_formatter(&label).draw()?;
    for (number, (name, points)) in curves.iter().enumerate() {
        let colour = Palette99::pick(number).to_rgba();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?
            .label(name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    if !curves.is_empty() {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 12))
            .draw()?;
    }
    Ok(())
}

/// A row of the comparison's picture: a method, and its metric by seed.
pub(super) type Row<'a> = (&'a str, &'a [f64]);

/// A picture of a comparison: every seed a point, the mean a bar.
pub(super) fn comparison(path: &Path, metric: &str, rows: &[Row<'_>]) -> Result<String> {
    let failed = |error: &dyn std::fmt::Display| Error::File { path: path.into(), message: error.to_string() };
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (900, 90 + 60 * rows.len() as u32)).into_drawing_area();
        draw_comparison(&area, metric, rows).map_err(|error| failed(&error))?;
    }
    let text =
        format!("<title>Methods compared by {metric}</title><desc>Every point is a seed, every bar a mean.</desc>");
    Ok(svg.replacen('>', &format!(">{text}"), 1))
}

fn draw_comparison<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    metric: &str,
    rows: &[Row<'_>],
) -> std::result::Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    area.fill(&WHITE)?;
    let values = range(rows.iter().flat_map(|(_, values)| values.iter().copied()));
    let mut chart = ChartBuilder::on(area)
        .caption(format!("Test, {metric}"), ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(170)
        .build_cartesian_2d(values, -0.5..rows.len() as f64 - 0.5)?;
    // The first method stands at the top.
    let at = |row: usize| (rows.len() - 1 - row) as f64;
    let label = |value: &f64| {
        let row = rows.len() as f64 - 1.0 - value;
        if (row - row.round()).abs() > 0.01 {
            return String::new();
        }
        rows.get(row.round() as usize).map_or_else(String::new, |(name, _)| name.to_string())
    };
    chart.configure_mesh().x_desc(metric).y_labels(2 * rows.len() + 1).y_label_formatter(&label).draw()?;
    for (row, (_, values)) in rows.iter().enumerate() {
        let colour = Palette99::pick(row).to_rgba();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let bar = [(mean, at(row) - 0.3), (mean, at(row) + 0.3)];
        chart.draw_series(LineSeries::new(bar, colour.stroke_width(4)))?;
        chart.draw_series(values.iter().map(|&value| Circle::new((value, at(row)), 5, colour.filled())))?;
    }
    area.present()
}
