//! Charts as SVG: lines and points over linear or logarithmic axes, with a title, a legend and words for who does not see
//! them. What is black follows the colour of the text around it, and every other colour is legible on white and on black.
//!
//! ```
//! use woracle::chart::{Axis, Chart, Mark, Picture, Series};
//! let error = Series::new("error", Mark::Line, 0, vec![(1e-8, 1e-8), (1e-4, 1e-9), (1.0, 0.1)]);
//! let chart = Chart::new("Differences", Axis::logarithmic("step"), Axis::logarithmic("error")).with(error);
//! let svg = Picture::new("The V curve", "It falls, then rises.").with(chart).to_svg();
//! assert!(svg.starts_with("<svg") && svg.contains("<title>The V curve</title>"));
//! ```

use crate::page::escape;
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

/// How wide a picture is; everything is drawn at [`FINE`] times that, as coordinates are whole numbers.
const WIDTH: u32 = 480;
const FINE: u32 = 2;
/// How high the axes and what is between them are where nothing else is said.
const HEIGHT: u32 = 320;
const MARGIN: u32 = 10;
/// Room for a title, for the labels of the horizontal axis, for those of the vertical one, and for a line of the legend.
const TITLE: u32 = 34;
const BELOW: u32 = 50;
const BESIDE: u32 = 70;
const LEGEND: u32 = 24;
/// The size of a title's letters and of all others.
const LARGE: u32 = 18;
const SMALL: u32 = 15;
/// How wide a letter is, about.
const LETTER: f64 = 0.53 * SMALL as f64;
/// How long the sample of a line in the legend is.
const SAMPLE: u32 = 34;

/// Colours that can be told from white and from black, and from each other by most people.
const INKS: [RGBColor; 8] = [
    RGBColor(0x2b, 0x78, 0xd8),
    RGBColor(0xd2, 0x5c, 0x1a),
    RGBColor(0x23, 0x8f, 0x5a),
    RGBColor(0xa0, 0x5c, 0xd6),
    RGBColor(0x9a, 0x7a, 0x12),
    RGBColor(0xd6, 0x45, 0x82),
    RGBColor(0x17, 0x8c, 0x9c),
    RGBColor(0x80, 0x80, 0x86),
];

/// One or more charts, one below the other, with a title and words that say what is to be seen.
#[derive(Clone, Debug)]
pub struct Picture {
    title: String,
    description: String,
    charts: Vec<Chart>,
}

/// Series over two axes.
#[derive(Clone, Debug)]
pub struct Chart {
    title: String,
    x: Axis,
    y: Axis,
    square: bool,
    series: Vec<Series>,
}

/// What a direction of a chart means.
#[derive(Clone, Debug)]
pub struct Axis {
    name: String,
    scale: Scale,
    range: Option<Range<f64>>,
}

#[derive(Clone, Debug)]
enum Scale {
    Linear,
    Logarithmic,
    Rows(Vec<String>),
}

/// Points that belong together.
#[derive(Clone, Debug)]
pub struct Series {
    name: Option<String>,
    mark: Mark,
    ink: Ink,
    width: u32,
    points: Vec<(f64, f64)>,
}

/// How the points of a series are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// A line through them.
    Line,
    /// A broken line through them.
    Dashes,
    /// A disc at each.
    Points,
    /// A line through them, and a disc at each.
    LineAndPoints,
    /// An arrow from every other one to the one after it.
    Arrows,
    /// The same with a broken shaft.
    DashedArrows,
}

/// What a series is drawn in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ink {
    /// The colour of text.
    Text,
    /// The same, faintly.
    Faint,
    /// One of a few colours, which begin again after the last.
    Nth(usize),
    /// From the first of them at 0 to the second at 1.
    Between(f64),
}

impl From<usize> for Ink {
    fn from(number: usize) -> Self {
        Self::Nth(number)
    }
}

impl Ink {
    fn colour(self) -> RGBAColor {
        let [RGBColor(r, g, b), other, ..] = INKS;
        match self {
            Self::Text => BLACK.to_rgba(),
            Self::Faint => BLACK.mix(0.45),
            Self::Nth(number) => INKS[number % INKS.len()].to_rgba(),
            Self::Between(part) => {
                let part = part.clamp(0.0, 1.0);
                let mixed =
                    |one: u8, other: u8| (f64::from(one) + part * (f64::from(other) - f64::from(one))).round() as u8;
                RGBColor(mixed(r, other.0), mixed(g, other.1), mixed(b, other.2)).to_rgba()
            }
        }
    }
}

impl Series {
    /// One with a name, for the legend.
    pub fn new(name: impl Into<String>, mark: Mark, ink: impl Into<Ink>, points: Vec<(f64, f64)>) -> Self {
        Self { name: Some(name.into()), ..Self::unnamed(mark, ink, points) }
    }

    /// One that the legend does not name.
    pub fn unnamed(mark: Mark, ink: impl Into<Ink>, points: Vec<(f64, f64)>) -> Self {
        Self { name: None, mark, ink: ink.into(), width: 2, points }
    }

    /// With a line of this width.
    pub fn width(self, width: u32) -> Self {
        Self { width, ..self }
    }
}

impl Axis {
    fn new(name: impl Into<String>, scale: Scale) -> Self {
        Self { name: name.into(), scale, range: None }
    }

    /// Equal distances are equal differences.
    pub fn linear(name: impl Into<String>) -> Self {
        Self::new(name, Scale::Linear)
    }

    /// Equal distances are equal ratios. What is not positive is drawn at the lower edge.
    pub fn logarithmic(name: impl Into<String>) -> Self {
        Self::new(name, Scale::Logarithmic)
    }

    /// Rows with names, counted from the first at the top.
    pub fn rows(name: impl Into<String>, rows: Vec<String>) -> Self {
        Self::new(name, Scale::Rows(rows))
    }

    /// From here to there, whatever the points are.
    pub fn within(self, range: Range<f64>) -> Self {
        Self { range: Some(range), ..self }
    }

    /// Where the axis begins and ends, in the numbers that it is drawn in.
    fn extent(&self, values: impl Iterator<Item = f64>) -> Range<f64> {
        match (&self.range, &self.scale) {
            (Some(range), Scale::Logarithmic) => range.start.log10()..range.end.log10(),
            (Some(range), _) => range.clone(),
            (None, Scale::Linear) => around(values),
            (None, Scale::Rows(rows)) => -0.5..rows.len() as f64 - 0.5,
            (None, Scale::Logarithmic) => {
                let values: Vec<f64> = values.collect();
                let extent = around(values.iter().filter(|value| **value > 0.0).map(|value| value.log10()));
                // Room for what has no place on the axis.
                let below = if values.iter().any(|value| *value <= 0.0) { 1.0 } else { 0.0 };
                extent.start - below..extent.end
            }
        }
    }

    fn position(&self, value: f64, extent: &Range<f64>) -> f64 {
        match &self.scale {
            Scale::Linear => value,
            Scale::Logarithmic if value > 0.0 => value.log10(),
            Scale::Logarithmic => extent.start,
            Scale::Rows(rows) => rows.len() as f64 - 1.0 - value,
        }
    }

    fn label(&self, position: f64) -> String {
        let whole = (position - position.round()).abs() < 1e-6;
        match &self.scale {
            Scale::Linear => {
                let text = format!("{position:.4}");
                let text = text.trim_end_matches('0').trim_end_matches('.');
                if text == "-0" { "0".into() } else { text.replace('-', "\u{2212}") }
            }
            Scale::Logarithmic if whole => power_of_ten(position.round() as i32),
            Scale::Logarithmic => scientific(10f64.powf(position)),
            Scale::Rows(rows) if whole => {
                let row = rows.len() as f64 - 1.0 - position.round();
                rows.get(row as usize).cloned().unwrap_or_default()
            }
            _ => String::new(),
        }
    }

    /// Room for the labels of a vertical axis.
    fn beside(&self) -> u32 {
        match &self.scale {
            Scale::Rows(rows) => {
                let longest = rows.iter().map(|row| row.chars().count()).max().unwrap_or(0);
                (longest as f64 * LETTER) as u32 + 24
            }
            _ => BESIDE,
        }
    }

    /// How many labels there may be.
    fn labels(&self) -> usize {
        match &self.scale {
            // One at every row, and one between any two that stays empty.
            Scale::Rows(rows) => 2 * rows.len() + 1,
            _ => 6,
        }
    }
}

/// `10` and a raised exponent.
fn power_of_ten(exponent: i32) -> String {
    let raised = |digit: char| match digit {
        '-' => '\u{207b}',
        '1' => '\u{b9}',
        '2' => '\u{b2}',
        '3' => '\u{b3}',
        digit => char::from_u32(0x2070 + digit.to_digit(10).unwrap_or(0)).unwrap_or(digit),
    };
    match exponent {
        0 => "1".into(),
        1 => "10".into(),
        _ => format!("10{}", exponent.to_string().chars().map(raised).collect::<String>()),
    }
}

/// A number for a reader: two digits and a power of ten; three digits where that is no long number.
///
/// ```
/// use woracle::chart::scientific;
/// assert_eq!(scientific(-3.14e-5), "\u{2212}3.1\u{b7}10\u{207b}\u{2075}");
/// assert_eq!((scientific(37.25), scientific(0.0625)), ("37.2".into(), "0.0625".into()));
/// ```
pub fn scientific(value: f64) -> String {
    let text = format!("{value:.1e}");
    let (digits, exponent) = match text.split_once('e').map(|(digits, exponent)| (digits, exponent.parse())) {
        Some((digits, Ok(exponent))) if value != 0.0 => (digits, exponent),
        _ => return if value == 0.0 { "0".into() } else { value.to_string() },
    };
    let text = match exponent {
        -2..=2 => format!("{value:.*}", (2 - exponent) as usize),
        _ => format!("{digits}\u{b7}{}", power_of_ten(exponent)),
    };
    text.replace('-', "\u{2212}")
}

/// The least and the largest of some numbers, and a little around them.
fn around(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return 0.0..1.0;
    }
    let margin = (0.05 * (high - low)).max(1e-6 * high.abs()).max(1e-9);
    low - margin..high + margin
}

impl Chart {
    /// One without a series; axes are named with their units.
    pub fn new(title: impl Into<String>, x: Axis, y: Axis) -> Self {
        Self { title: title.into(), x, y, square: false, series: Vec::new() }
    }

    /// With one more series.
    pub fn with(mut self, series: Series) -> Self {
        self.series.push(series);
        self
    }

    /// With many more.
    pub fn with_all(self, series: impl IntoIterator<Item = Series>) -> Self {
        series.into_iter().fold(self, Self::with)
    }

    /// With as much room from below to above as from left to right: where the axes cover ranges of the same length, angles
    /// are what they are.
    pub fn square(self) -> Self {
        Self { square: true, ..self }
    }

    /// How high the axes and what is between them are.
    fn body(&self) -> u32 {
        match &self.y.scale {
            _ if self.square => WIDTH - self.y.beside() + BELOW,
            Scale::Rows(rows) => 60 * rows.len() as u32 + BELOW + 2 * MARGIN,
            _ => HEIGHT,
        }
    }

    fn named(&self) -> impl Iterator<Item = (&str, &Series)> {
        self.series.iter().filter_map(|series| Some((series.name.as_deref()?, series)))
    }

    /// Columns and rows of the legend.
    fn legend(&self) -> (u32, u32) {
        let longest = self.named().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let entry = f64::from(SAMPLE) + 24.0 + LETTER * longest as f64;
        let columns = ((f64::from(WIDTH - 2 * MARGIN) / entry) as u32).clamp(1, 4);
        (columns, (self.named().count() as u32).div_ceil(columns))
    }

    fn height(&self) -> u32 {
        TITLE + self.body() + self.legend().1 * LEGEND + MARGIN
    }
}

impl Picture {
    /// One without a chart.
    pub fn new(title: impl Into<String>, description: impl Into<String>) -> Self {
        Self { title: title.into(), description: description.into(), charts: Vec::new() }
    }

    /// With one more chart below the others.
    pub fn with(mut self, chart: Chart) -> Self {
        self.charts.push(chart);
        self
    }

    /// The points of the series of this name, of the first chart that has it.
    pub fn points(&self, series: &str) -> Option<&[(f64, f64)]> {
        let mut named = self.charts.iter().flat_map(Chart::named);
        named.find(|(name, _)| *name == series).map(|(_, series)| &series.points[..])
    }

    fn height(&self) -> u32 {
        self.charts.iter().map(Chart::height).sum()
    }

    /// For a page: without a background, and with the page's colour of text.
    pub fn to_svg(&self) -> String {
        self.wrapped(WIDTH, "", "")
    }

    /// For a file of its own: on white, or on black where whoever looks at it prefers that.
    pub fn to_file(&self) -> String {
        let paper = "<style>@media (prefers-color-scheme: dark) { svg { color: #e6e6e8 } .paper { fill: #17181a } }</style>\n\
                     <rect class=\"paper\" width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n";
        self.wrapped(WIDTH * 2, " color=\"#1c1c1e\"", paper)
    }

    fn wrapped(&self, width: u32, attributes: &str, paper: &str) -> String {
        let mut svg = String::new();
        self.draw(&mut svg).expect("a string takes all that is drawn");
        let body = svg.split_once('>').map_or("", |(_, body)| body);
        let body = body.replace("\"#000000\"", "\"currentColor\"").replace(" opacity=\"1\"", "");
        let height = self.height() * width / WIDTH;
        let (right, bottom) = (WIDTH * FINE, self.height() * FINE);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {right} {bottom}\"{attributes}>\n<title>{}</title>\n<desc>{}</desc>\n{paper}{}",
            escape(&self.title),
            escape(&self.description),
            body.trim_start()
        )
    }

    fn draw<'s>(&self, svg: &'s mut String) -> Drawn<SVGBackend<'s>> {
        let area = SVGBackend::with_string(svg, (WIDTH * FINE, self.height() * FINE)).into_drawing_area();
        let mut rest = area.clone();
        for chart in &self.charts {
            let (panel, below) = rest.split_vertically(chart.height() * FINE);
            draw(&area, &panel, chart)?;
            rest = below;
        }
        area.present()
    }
}

type Drawn<B> = std::result::Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// A length in the numbers that are drawn in.
fn fine(length: u32) -> i32 {
    (length * FINE) as i32
}

/// Letters of this size; the backend takes sizes for something larger.
fn letters(size: u32, colour: RGBAColor) -> TextStyle<'static> {
    ("sans-serif", 1.24 * f64::from(size * FINE)).into_font().color(&colour)
}

/// `whole` is where a chart's own coordinates are counted from.
fn draw<B: DrawingBackend>(whole: &DrawingArea<B, Shift>, panel: &DrawingArea<B, Shift>, chart: &Chart) -> Drawn<B> {
    let black = BLACK.to_rgba();
    let (title, rest) = panel.split_vertically(TITLE * FINE);
    let (body, legend) = rest.split_vertically(chart.body() * FINE);
    let centred = letters(LARGE, black).pos(Pos::new(HPos::Center, VPos::Top));
    title.draw(&Text::new(chart.title.as_str(), (fine(WIDTH) / 2, fine(MARGIN)), centred))?;

    let points = || chart.series.iter().flat_map(|series| series.points.iter().copied());
    let (x, y) = (chart.x.extent(points().map(|point| point.0)), chart.y.extent(points().map(|point| point.1)));
    let mut axes = ChartBuilder::on(&body)
        .margin(fine(MARGIN))
        .x_label_area_size(fine(BELOW))
        .y_label_area_size(fine(chart.y.beside()))
        .build_cartesian_2d(x.clone(), y.clone())?;
    let (x_label, y_label) = (|at: &f64| chart.x.label(*at), |at: &f64| chart.y.label(*at));
    axes.configure_mesh()
        .x_desc(chart.x.name.as_str())
        .y_desc(chart.y.name.as_str())
        .x_labels(chart.x.labels())
        .y_labels(chart.y.labels())
        .x_label_formatter(&x_label)
        .y_label_formatter(&y_label)
        .label_style(letters(SMALL, black))
        .axis_desc_style(letters(SMALL, black))
        .axis_style(BLACK.mix(0.6).stroke_width(FINE))
        .bold_line_style(BLACK.mix(0.15).stroke_width(FINE))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for series in &chart.series {
        let finite = series.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite());
        let points = finite.map(|&(at, value)| (chart.x.position(at, &x), chart.y.position(value, &y)));
        let places: Vec<(i32, i32)> = points.map(|point| axes.backend_coord(&point)).collect();
        draw_series(whole, series, &places)?;
    }
    let (columns, _) = chart.legend();
    let step = fine(WIDTH - 2 * MARGIN) / columns as i32;
    for (number, (name, series)) in chart.named().enumerate() {
        let (column, row) = (number as i32 % columns as i32, number as i32 / columns as i32);
        let (left, middle) = (fine(2 * MARGIN) + column * step, fine(LEGEND) * row + fine(LEGEND) / 2);
        let right = left + fine(SAMPLE);
        draw_series(&legend, series, &[(left, middle), (right, middle)])?;
        let beside = letters(SMALL, black).pos(Pos::new(HPos::Left, VPos::Center));
        legend.draw(&Text::new(name, (right + fine(8), middle), beside))?;
    }
    Ok(())
}

/// A series whose points are at these places of an area.
fn draw_series<B: DrawingBackend>(area: &DrawingArea<B, Shift>, series: &Series, places: &[(i32, i32)]) -> Drawn<B> {
    let style = series.ink.colour().stroke_width(series.width * FINE);
    let broken = |places: &[(i32, i32)]| area.draw(&DashedPathElement::new(places.to_vec(), fine(8), fine(5), style));
    let discs = || {
        let radius = fine(2 + series.width / 2);
        places.iter().try_for_each(|&place| area.draw(&Circle::new(place, radius, style.color.filled())))
    };
    match series.mark {
        Mark::Line => area.draw(&PathElement::new(places, style)),
        Mark::Dashes => broken(places),
        Mark::Points => discs(),
        Mark::LineAndPoints => {
            area.draw(&PathElement::new(places, style))?;
            discs()
        }
        Mark::Arrows | Mark::DashedArrows => places.as_chunks().0.iter().try_for_each(|&[tail, tip]| {
            match series.mark {
                Mark::Arrows => area.draw(&PathElement::new([tail, tip], style))?,
                _ => broken(&[tail, tip])?,
            }
            area.draw(&Polygon::new(head(tail, tip), style.color.filled()))
        }),
    }
}

/// The head of an arrow.
fn head(tail: (i32, i32), tip: (i32, i32)) -> Vec<(i32, i32)> {
    let along = (f64::from(tip.0 - tail.0), f64::from(tip.1 - tail.1));
    let length = along.0.hypot(along.1).max(1e-9);
    let (x, y) = (along.0 / length, along.1 / length);
    let back = |along: f64, across: f64| {
        let (along, across) = (along * f64::from(FINE), across * f64::from(FINE));
        (tip.0 + (across * y - along * x).round() as i32, tip.1 - (across * x + along * y).round() as i32)
    };
    vec![back(-2.0, 0.0), back(10.0, 5.0), back(10.0, -5.0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The relative luminance that contrast is reckoned from.
    fn luminance(RGBAColor(r, g, b, _): RGBAColor) -> f64 {
        let linear = |part: u8| {
            let part = f64::from(part) / 255.0;
            if part <= 0.04045 { part / 12.92 } else { ((part + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
    }

    #[test]
    fn every_colour_is_legible_on_light_and_on_dark() {
        let dark = luminance(RGBColor(0x17, 0x18, 0x1a).to_rgba());
        let inks = (0..INKS.len()).map(Ink::Nth).chain((0..=10).map(|part| Ink::Between(f64::from(part) / 10.0)));
        for ink in inks {
            let own = luminance(ink.colour());
            let (on_light, on_dark) = (1.05 / (own + 0.05), (own + 0.05) / (dark + 0.05));
            assert!(on_light >= 3.0 && on_dark >= 3.0, "{ink:?}: {on_light} on white, {on_dark} on black");
        }
    }

    #[test]
    fn what_is_not_positive_has_a_place_on_a_logarithmic_axis() {
        let axis = Axis::logarithmic("error");
        let extent = axis.extent([1e-12, 0.0, 1.0].into_iter());
        assert!(extent.start < -12.5 && extent.end > 0.0, "{extent:?}");
        assert_eq!(axis.position(0.0, &extent), extent.start);
        assert_eq!((axis.label(-12.0), axis.label(0.5)), ("10\u{207b}\u{b9}\u{b2}".into(), "3.16".into()));
    }

    #[test]
    fn a_constant_series_fills_the_axis() {
        let extent = around([5.0, 5.0, f64::NAN].into_iter());
        assert!(extent.contains(&5.0) && extent.end - extent.start < 1e-4, "{extent:?}");
        assert_eq!(around([f64::NAN].into_iter()), 0.0..1.0);
    }

    #[test]
    fn names_in_a_legend_stand_beside_each_other() {
        let series = ["one", "two", "three"].map(|name| Series::new(name, Mark::Line, Ink::Nth(0), vec![(0.0, 0.0)]));
        let chart = Chart::new("three names", Axis::linear("x"), Axis::linear("y")).with_all(series);
        let svg = Picture::new("", "").with(chart).to_svg();
        let place = |name: &str| {
            let (before, _) = svg.split_once(&format!("\n{name}\n")).expect("a name");
            let (_, tag) = before.rsplit_once("<text ").expect("a text");
            let number = |key: &str| -> f64 {
                let (_, rest) = tag.split_once(&format!("{key}=\"")).expect("a place");
                rest.split('"').next().expect("a number").parse().expect("a number")
            };
            (number("x"), number("y"))
        };
        let [one, two, three] = ["one", "two", "three"].map(place);
        let step = two.0 - one.0;
        assert!(one.1 == two.1 && two.1 == three.1 && step > LETTER * 3.0, "{one:?} {two:?} {three:?}");
        approx::assert_relative_eq!(three.0 - two.0, step, epsilon = 1.0);
        assert_eq!(place("three names").0, f64::from(WIDTH * FINE) / 2.0);
    }

    #[test]
    fn the_legend_has_as_many_columns_as_there_is_room_for() {
        let chart = |names: &[&str]| {
            let series = names.iter().map(|name| Series::new(*name, Mark::Line, Ink::Nth(0), vec![]));
            Chart::new("", Axis::linear("x"), Axis::linear("y")).with_all(series).legend()
        };
        assert_eq!(chart(&["a", "b", "c"]), (4, 1));
        assert_eq!(chart(&["a", "b", "c", "d", "e"]), (4, 2));
        let long = "n".repeat(40);
        let (columns, rows) = chart(&[&long, "b", "c", "d", "e"]);
        let entry = f64::from(SAMPLE) + 24.0 + LETTER * 40.0;
        assert!(
            f64::from(columns) * entry <= f64::from(WIDTH - 2 * MARGIN) && columns * rows >= 5,
            "{columns}, {rows}"
        );
        assert!(f64::from(columns + 1) * entry > f64::from(WIDTH - 2 * MARGIN));
    }

    #[test]
    fn an_arrow_points_where_it_goes() {
        let [tip, left, right] = head((0, 0), (100, 0))[..] else { panic!("a triangle") };
        assert!(tip.0 > 100 && tip.1 == 0 && left.0 < 100 && left.0 == right.0 && left.1 == -right.1);
    }
}
