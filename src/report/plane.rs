//! The plane of alpha and beta: a loss that does not change along rays, and two gradients, one of which knows that.

use super::{figures, labelled};
use crate::case::{Case, Tensors};
use crate::chart::{Axis, Chart, Ink, Mark, Picture, Series, scientific};
use crate::registry::{Precision, Subject, layer};
use crate::wora::NormGradient;
use crate::{Error, Result};
use ndarray::{ArrayD, IxDyn};
use rayon::prelude::*;
use serde::Serialize;
use std::f64::consts::PI;

/// The case whose alpha and beta are moved, and its layer.
const CASE: &str = "linear-full";
const LAYER: &str = "linear";
/// The layer's own output with alpha and beta in this direction is what the loss measures the distance to.
const TARGET: f64 = 0.75 * PI;
const RAYS: usize = 48;
/// The lengths at which a ray is looked at: no two of them a power of two apart, which would be too easy.
const LENGTHS: [f64; 3] = [0.6, 1.0, 1.9];
/// How far the plane is drawn to.
const EDGE: f64 = 2.0;
/// Where the gradients are drawn, by length and by angle in degrees: two of the points lie on one ray.
const POINTS: [(f64, f64); 7] =
    [(1.4, 35.0), (0.7, 35.0), (1.4, 75.0), (1.4, 195.0), (0.7, 195.0), (1.4, 240.0), (1.4, 295.0)];
/// How long the longest arrow is.
const LONGEST: f64 = 0.75;

/// `L = 1/2 ||y - t||^2` over alpha and beta, of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Plane {
    /// The case.
    pub case: &'static str,
    /// The loss along rays from the origin.
    pub rays: Vec<Ray>,
    /// The largest difference of losses on one ray, in parts of the largest loss.
    pub spread: f64,
    /// The gradients at some points.
    pub arrows: Vec<Arrow>,
}

/// A ray from the origin.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ray {
    /// Counted from the axis of alpha.
    pub angle: f64,
    /// The loss on it.
    pub loss: f64,
}

/// The gradients at a point, as (d alpha, d beta).
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Arrow {
    /// alpha and beta.
    pub point: (f64, f64),
    /// Through the norm.
    pub full: (f64, f64),
    /// With the norm held.
    pub detached: (f64, f64),
    /// `<dm, m>`, what the detached gradient comes to along the ray. E52
    pub along: f64,
}

/// A layer and a target.
struct Ground {
    subject: &'static dyn Subject,
    case: Case,
    target: ArrayD<f64>,
}

impl Ground {
    fn new(seed: u64) -> Result<Self> {
        let subject = layer(LAYER)?;
        let spec = subject.specs().iter().find(|spec| spec.name == CASE).ok_or_else(|| Error::Unknown {
            what: "case",
            expected: format!("a case of {LAYER}"),
            found: CASE.into(),
        })?;
        let mut case = subject.draw(spec, seed);
        case.tensors.remove("grad.y");
        let ground = Self { subject, case, target: ArrayD::zeros(IxDyn(&[])) };
        let target = ground.output((TARGET.cos(), TARGET.sin()))?;
        Ok(Self { target, ..ground })
    }

    fn at(&self, (alpha, beta): (f64, f64)) -> Case {
        let mut case = self.case.clone();
        let named = [("lora_wora_alpha", alpha), ("lora_wora_beta", beta)];
        case.extend(named.map(|(name, value)| (name.to_string(), ArrayD::from_elem(IxDyn(&[]), value))).into());
        case
    }

    fn output(&self, point: (f64, f64)) -> Result<ArrayD<f64>> {
        let mut results = self.subject.evaluate(&self.at(point), Precision::F64)?;
        Ok(results.remove("y").expect("an output"))
    }

    fn loss(&self, point: (f64, f64)) -> Result<f64> {
        Ok(0.5 * (self.output(point)? - &self.target).iter().map(|distance| distance * distance).sum::<f64>())
    }

    /// The gradient at a point, and `<dm, m>`.
    fn gradient(&self, point: (f64, f64), norm_gradient: NormGradient) -> Result<((f64, f64), f64)> {
        let mut case = self.at(point);
        case.settings.insert("norm_gradient".into(), serde_json::json!(norm_gradient));
        case.extend(Tensors::from([("grad.y".into(), self.output(point)? - &self.target)]));
        let results = self.subject.evaluate(&case, Precision::F64)?;
        let of = |name: &str| results[&format!("grad.{name}")].sum();
        let magnitude = "lora_magnitude_vector";
        let along = (&results[&format!("grad.{magnitude}")] * case.values(magnitude)?).sum();
        Ok(((of("lora_wora_alpha"), of("lora_wora_beta")), along))
    }
}

/// The product of a gradient with the point that it is at.
fn radial(point: (f64, f64), gradient: (f64, f64)) -> f64 {
    point.0 * gradient.0 + point.1 * gradient.1
}

impl Plane {
    /// Looks along every ray, and takes the gradients.
    ///
    /// # Errors
    ///
    /// None that the registry's own case has.
    pub fn gather(seed: u64) -> Result<Self> {
        let ground = Ground::new(seed)?;
        let looked = (0..RAYS).into_par_iter().map(|number| {
            let angle = 2.0 * PI * number as f64 / RAYS as f64;
            let losses = LENGTHS.map(|length| ground.loss((length * angle.cos(), length * angle.sin())));
            let losses = losses.into_iter().collect::<Result<Vec<f64>>>()?;
            let (low, high) =
                losses.iter().fold((f64::INFINITY, 0f64), |(low, high), &loss| (low.min(loss), high.max(loss)));
            Ok((Ray { angle, loss: losses[0] }, high - low))
        });
        let looked: Vec<(Ray, f64)> = looked.collect::<Result<_>>()?;
        let largest = looked.iter().map(|(ray, _)| ray.loss).fold(0.0, f64::max);
        let spread = looked.iter().map(|(_, spread)| *spread).fold(0.0, f64::max) / largest;
        let arrow = |(length, degrees): (f64, f64)| {
            let angle = f64::to_radians(degrees);
            let point = (length * angle.cos(), length * angle.sin());
            let (full, _) = ground.gradient(point, NormGradient::Full)?;
            let (detached, along) = ground.gradient(point, NormGradient::Detached)?;
            Ok(Arrow { point, full, detached, along })
        };
        let arrows = POINTS.into_iter().map(arrow).collect::<Result<_>>()?;
        Ok(Self { case: CASE, rays: looked.into_iter().map(|(ray, _)| ray).collect(), spread, arrows })
    }

    /// What is seen, the picture and the numbers.
    pub fn to_html(&self) -> String {
        let number = |value: f64| format!("<td class=\"number\">{}</td>", scientific(value));
        let row = |arrow: &Arrow| {
            let Arrow { point, full, detached, along } = *arrow;
            format!(
                "<tr><th scope=\"row\">({}, {})</th>{}{}{}</tr>\n",
                scientific(point.0),
                scientific(point.1),
                number(radial(point, full)),
                number(radial(point, detached)),
                number(along)
            )
        };
        let rows: String = self.arrows.iter().map(row).collect();
        format!(
            "<p>\u{3b1} and \u{3b2} are two numbers, so that a loss over them can be drawn. Multiply both by the same positive \
             number: V becomes as many times longer, and where \u{3b5} = 0, as here, W\u{2032}, which takes the direction of V alone, \
             stays what it is.</p>\n\
             {}{}\
             <p>So a loss has the same value all along a ray from the origin, whatever loss it is; here half the squared distance \
             of y to what the layer itself puts out at {:.0} degrees, where it is 0. A gradient is perpendicular to where a \
             function does not change. The full gradient is: it stands at a right angle to the ray, along the circle. The \
             detached gradient takes n for a constant. To it a longer V is a larger output, so it leans inwards or outwards along \
             the ray, as the gradient of the magnitude does:</p>\n{}{}{}\
             <p>On one ray the gradients are the longer the nearer to the origin: the same turn is a smaller step there. What would be \
             wrong: rays with more than one colour, a full gradient that leans, or a detached one that does not where \
             \u{27e8}dm, m\u{27e9} is not 0.</p>\n\
             <h3>How far the gradients lean</h3>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Gradients along the \
             ray\"><table><thead><tr><th scope=\"col\">(\u{3b1}, \u{3b2})</th>\
             <th scope=\"col\">full: \u{3b1} d\u{3b1} + \u{3b2} d\u{3b2}</th>\
             <th scope=\"col\">detached: \u{3b1} d\u{3b1} + \u{3b2} d\u{3b2}</th>\
             <th scope=\"col\">\u{27e8}dm, m\u{27e9}</th></tr></thead>\n<tbody>{rows}</tbody></table></div>\n\
             <p class=\"note\">The second column is rounding, the third and the fourth are the same number. Along all {} rays, looked \
             at from {} to {} away from the origin, the loss changes by {} of the largest one at most.</p>\n",
            labelled("E9"),
            labelled("E12"),
            TARGET.to_degrees(),
            labelled("E53"),
            labelled("E52"),
            figures([(self.picture(), self.in_words())]),
            self.rays.len(),
            LENGTHS[0],
            LENGTHS[LENGTHS.len() - 1],
            scientific(self.spread),
        )
    }

    /// The rays with the least and with the largest loss.
    fn ends(&self) -> Option<(&Ray, &Ray)> {
        let by_loss = |one: &&Ray, other: &&Ray| one.loss.total_cmp(&other.loss);
        Some((self.rays.iter().min_by(by_loss)?, self.rays.iter().max_by(by_loss)?))
    }

    fn in_words(&self) -> String {
        let (low, high) = self.ends().map_or((0.0, 0.0), |(low, high)| (low.angle, high.angle));
        format!(
            "The loss of {} is the same along every ray: least at {:.0} degrees, largest at {:.0}. At {} points, steps against \
             the full gradient go along the circle through the point; steps against the detached gradient leave it.",
            self.case,
            low.to_degrees(),
            high.to_degrees(),
            self.arrows.len()
        )
    }

    /// Rays by their loss, and steps against both gradients.
    pub fn picture(&self) -> Picture {
        let (low, high) = self.ends().map_or((0.0, 1.0), |(low, high)| (low.loss, high.loss));
        let part = |loss: f64| (loss - low) / (high - low);
        let ray = |ray: &Ray| {
            let at = |length: f64| (length * ray.angle.cos(), length * ray.angle.sin());
            let (points, mark) = (vec![at(0.25), at(EDGE)], Mark::Line);
            let (ink, width) = (Ink::Between(part(ray.loss)), 1 + (3.0 * part(ray.loss)).round() as u32);
            let name = match ray.loss {
                loss if loss == low => format!("least loss, {loss:.2} units of y\u{b2}"),
                loss if loss == high => format!("largest, {loss:.1} units of y\u{b2}"),
                _ => return Series::unnamed(mark, ink, points).width(width),
            };
            Series::new(name, mark, ink, points).width(width)
        };
        let length = |(x, y): (f64, f64)| x.hypot(y);
        let longest = self.arrows.iter().flat_map(|arrow| [arrow.full, arrow.detached]).map(length).fold(0.0, f64::max);
        let steps = |gradient: &dyn Fn(&Arrow) -> (f64, f64)| -> Vec<(f64, f64)> {
            let step = |arrow: &Arrow| {
                let ((x, y), scale) = (gradient(arrow), LONGEST / longest);
                [arrow.point, (arrow.point.0 - scale * x, arrow.point.1 - scale * y)]
            };
            self.arrows.iter().flat_map(step).collect()
        };
        // The first two are all the lengths there are.
        let circle = |arrow: &Arrow| {
            let radius = length(arrow.point);
            let around = (0..=120).map(|part| 2.0 * PI * f64::from(part) / 120.0);
            Series::unnamed(
                Mark::Line,
                Ink::Faint,
                around.map(|angle| (radius * angle.cos(), radius * angle.sin())).collect(),
            )
            .width(1)
        };
        let points = self.arrows.iter().map(|arrow| arrow.point).collect();
        let chart = Chart::new(
            "Loss over alpha and beta, and steps downhill",
            Axis::linear("alpha, without a unit").within(-EDGE..EDGE),
            Axis::linear("beta, without a unit").within(-EDGE..EDGE),
        )
        .square()
        .with_all(self.rays.iter().map(ray))
        .with_all(self.arrows.iter().take(2).map(circle))
        .with(
            Series::new("step, detached gradient", Mark::DashedArrows, Ink::Nth(5), steps(&|arrow| arrow.detached))
                .width(3),
        )
        .with(Series::new("step, full gradient", Mark::Arrows, Ink::Text, steps(&|arrow| arrow.full)).width(3))
        .with(Series::unnamed(Mark::Points, Ink::Text, points).width(4));
        Picture::new("The plane of alpha and beta", self.in_words()).with(chart)
    }
}
