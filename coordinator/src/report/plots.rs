//! The report's plots as inline SVG.
//!
//! Colours are mid-tones that read on light and dark pages; ink takes the colour of the text around it. Text is escaped by the
//! SVG backend. Does not choose what is plotted.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Width of every plot, in the units of its view box.
const WIDTH: u32 = 520;
/// Stands for "the colour of the page's text" until the SVG is finished: no plot uses it otherwise.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_IN_SVG: &str = "#010203";
/// Room for the name of a condition.
const LABEL_WIDTH: i32 = 116;
const FONT: &str = "sans-serif";

/// Of keys, and of the first of two series.
pub(super) const FIRST: RGBColor = RGBColor(0x3f, 0x86, 0xd4);
/// Of values, and of the second of two series.
pub(super) const SECOND: RGBColor = RGBColor(0xdb, 0x77, 0x2b);

/// A plot could not be drawn: a bug, since it goes to memory.
#[derive(Debug, thiserror::Error)]
#[error("failed to draw {plot}: {detail}")]
pub struct PlotError {
    /// Which plot.
    pub plot: String,
    /// What the library says.
    pub detail: String,
}

/// One layer in a profile.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LayerPoint {
    pub(super) layer: u32,
    /// Sees a sliding window only.
    pub(super) sliding: bool,
    pub(super) key: f64,
    pub(super) value: f64,
}

/// Keys and values over the layers. Where layers differ in what they see, those with full attention have a shaded column and
/// filled points, the others hollow points.
pub(super) fn layer_profile(name: &str, measure: &str, points: &[LayerPoint]) -> Result<String, PlotError> {
    draw(name, 280, |root| {
        let layers = points.iter().map(|point| point.layer).max().map_or(1.0, |last| f64::from(last) + 1.0);
        let top = points.iter().flat_map(|point| [point.key, point.value]).fold(0.0, f64::max);
        let top = if top > 0.0 { top * 1.08 } else { 1.0 };
        let mut chart = ChartBuilder::on(root)
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(58)
            .build_cartesian_2d(-0.6..layers - 0.4, 0.0..top)?;
        if points.iter().any(|point| point.sliding) {
            chart.draw_series(points.iter().filter(|point| !point.sliding).map(|point| {
                let x = f64::from(point.layer);
                Rectangle::new([(x - 0.5, 0.0), (x + 0.5, top)], INK.mix(0.09).filled())
            }))?;
        }
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(INK.mix(0.15))
            .axis_style(INK.mix(0.5))
            .label_style((FONT, 16).into_font().color(&INK))
            .axis_desc_style((FONT, 16).into_font().color(&INK))
            .x_labels(points.len().min(10))
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| short(*y))
            .x_desc("layer")
            .y_desc(measure)
            .draw()?;
        for (colour, of) in [(FIRST, (|point| point.key) as fn(&LayerPoint) -> f64), (SECOND, |point| point.value)] {
            let line = points.iter().map(|point| (f64::from(point.layer), of(point)));
            chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
            chart.draw_series(points.iter().map(|point| {
                let style = if point.sliding { colour.stroke_width(2) } else { colour.filled() };
                Circle::new((f64::from(point.layer), of(point)), 4, style)
            }))?;
        }
        Ok(())
    })
}

/// One curve.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Curve {
    /// From left to right; not empty.
    pub(super) points: Vec<(f64, f64)>,
    /// Its colour.
    pub(super) colour: RGBColor,
    /// Each point has a mark: they are few.
    pub(super) marks: bool,
}

/// Curves over one axis, between the least and the largest of their values.
pub(super) fn curves(name: &str, across: &str, up: &str, curves: &[Curve]) -> Result<String, PlotError> {
    draw(name, 280, |root| {
        let all = || curves.iter().flat_map(|curve| &curve.points).filter(|(x, y)| x.is_finite() && y.is_finite());
        let range = |of: fn(&(f64, f64)) -> f64, room: f64| {
            let (low, high) =
                all().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
            let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
            let wide = if high > low { high - low } else { 1.0 };
            low - room * wide..high + room * wide
        };
        let mut chart = ChartBuilder::on(root)
            .margin(12)
            .margin_right(20)
            .x_label_area_size(42)
            .y_label_area_size(58)
            .build_cartesian_2d(range(|point| point.0, 0.01), range(|point| point.1, 0.06))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(INK.mix(0.15))
            .axis_style(INK.mix(0.5))
            .label_style((FONT, 16).into_font().color(&INK))
            .axis_desc_style((FONT, 16).into_font().color(&INK))
            .x_labels(8)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| fine(*y))
            .x_desc(across)
            .y_desc(up)
            .draw()?;
        for curve in curves {
            let points = || curve.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
            chart.draw_series(LineSeries::new(points(), curve.colour.stroke_width(2)))?;
            if curve.marks {
                chart.draw_series(points().map(|point| Circle::new(point, 4, curve.colour.filled())))?;
            }
        }
        Ok(())
    })
}

/// A value with its interval in a row of its own.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RowPoint {
    pub(super) label: String,
    /// One entry a series; `None` where it has no value.
    pub(super) values: Vec<Option<Interval>>,
}

/// A value between its ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Interval {
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// What the horizontal axis means.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Axis {
    /// 0 to 1, linear, shown as per cent.
    Share,
    /// Logarithmic from `floor`; what lies at or below stands hollow at the left edge.
    Log { floor: f64 },
}

/// Rows with one or two points each, interval drawn through.
pub(super) fn rows(name: &str, axis: Axis, description: &str, rows: &[RowPoint]) -> Result<String, PlotError> {
    let height = 66 + 30 * u32::try_from(rows.len()).unwrap_or(0);
    draw(name, height, |root| match axis {
        Axis::Share => {
            let format = |x: &f64| format!("{:.0} %", x * 100.0);
            draw_rows(root, rows, 0.0..1.0, description, &format, 0.0)
        }
        Axis::Log { floor } => {
            let highs = rows.iter().flat_map(|row| row.values.iter().flatten()).map(|interval| interval.high);
            let top = highs.fold(floor * 100.0, f64::max) * 2.0;
            let format =
                |x: &f64| if *x <= floor * 1.01 { format!("≤ {}", power_of_ten(*x)) } else { power_of_ten(*x) };
            draw_rows(root, rows, (floor..top).log_scale(), description, &format, floor)
        }
    })
}

fn draw_rows<'a, R, X>(
    root: &DrawingArea<SVGBackend<'a>, Shift>,
    rows: &[RowPoint],
    range: R,
    description: &str,
    format: &dyn Fn(&f64) -> String,
    floor: f64,
) -> Result<(), DrawError>
where
    R: plotters::coord::ranged1d::AsRangedCoord<Value = f64, CoordDescType = X>,
    X: plotters::coord::ranged1d::Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
{
    let count = rows.len() as f64;
    let mut chart = ChartBuilder::on(root)
        .margin(12)
        .margin_right(24)
        .x_label_area_size(42)
        .y_label_area_size(LABEL_WIDTH)
        .build_cartesian_2d(range, 0.0..count)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .bold_line_style(INK.mix(0.15))
        .axis_style(INK.mix(0.5))
        .label_style((FONT, 16).into_font().color(&INK))
        .axis_desc_style((FONT, 16).into_font().color(&INK))
        .x_labels(6)
        .x_label_formatter(&format)
        .x_desc(description)
        .draw()?;
    let edge = |x: f64| x.max(floor);
    for (index, row) in rows.iter().enumerate() {
        let middle = count - index as f64 - 0.5;
        let (_, y) = chart.plotting_area().map_coordinate(&(edge(0.0), middle));
        let style = (FONT, 16).into_font().color(&INK).pos(Pos::new(HPos::Right, VPos::Center));
        root.draw(&Text::new(row.label.clone(), (LABEL_WIDTH + 4, y), style))?;
        let series = row.values.len();
        for (place, interval) in row.values.iter().enumerate() {
            let Some(interval) = interval else { continue };
            let y = middle + if series > 1 { 0.18 - 0.36 * place as f64 } else { 0.0 };
            let colour = if place == 0 { FIRST } else { SECOND };
            let ends = [(edge(interval.low), y), (edge(interval.high), y)];
            chart.draw_series([PathElement::new(ends, colour.stroke_width(3))])?;
            let hollow = floor > 0.0 && interval.value <= floor;
            let style = if hollow { colour.stroke_width(2) } else { colour.filled() };
            chart.draw_series([Circle::new((edge(interval.value), y), 5, style)])?;
        }
    }
    Ok(())
}

type DrawError = Box<dyn std::error::Error>;

fn draw(
    name: &str,
    height: u32,
    body: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), DrawError>,
) -> Result<String, PlotError> {
    let mut svg = String::new();
    let drawn = {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        body(&root).and_then(|()| Ok(root.present()?))
    };
    drawn.map_err(|error| PlotError { plot: name.to_owned(), detail: error.to_string() })?;
    Ok(svg.replace(INK_IN_SVG, "currentColor"))
}

fn short(y: f64) -> String {
    if y >= 100.0 || y.fract() == 0.0 { format!("{y:.0}") } else { format!("{y:.1}") }
}

fn fine(y: f64) -> String {
    if y.abs() >= 100.0 || y.fract() == 0.0 { format!("{y:.0}") } else { format!("{y:.2}") }
}

fn power_of_ten(x: f64) -> String {
    let exponent = x.log10();
    if (exponent - exponent.round()).abs() > 0.01 {
        return String::new();
    }
    match exponent.round() as i32 {
        0 => "1".to_owned(),
        exponent => format!("1e{exponent}"),
    }
}
