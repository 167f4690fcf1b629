//! A drawing of a run's tables.

use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::checkpoint::replace;
use crate::{Error, Result};

const WIDTH: u32 = 760;
const PANEL: u32 = 220;

/// A column over the steps.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Draws the tables in a run's directory as `metrics.svg` there, one panel a column; where an evaluation has a metric of the
/// same name as the training, both are in one. Numbers that are not finite are left out. Gives the file's path.
///
/// Text is written as text: whoever shows the file has the fonts.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a table that is not as a [`Trainer`](super::Trainer) writes it.
pub fn plot(directory: impl AsRef<Path>) -> Result<PathBuf> {
    let directory = directory.as_ref();
    let skip = |line: &Line| !matches!(line.name.as_str(), "epoch" | "skipped");
    let train: Vec<Line> = read(&directory.join("train.csv"))?.into_iter().filter(skip).collect();
    let path = directory.join("evaluation.csv");
    let evaluation = if path.exists() { read(&path)? } else { Vec::new() };
    let mut panels: Vec<(Option<&Line>, Option<&Line>)> = train
        .iter()
        .map(|line| (Some(line), evaluation.iter().find(|other| other.name == line.name)))
        .collect();
    let alone = |line: &&Line| train.iter().all(|other| other.name != line.name);
    panels.extend(evaluation.iter().filter(alone).map(|line| (None, Some(line))));
    let path = directory.join("metrics.svg");
    let mut svg = String::new();
    draw(&mut svg, &panels).map_err(|source| Error::format(&path, source))?;
    replace(&path, svg.as_bytes())?;
    Ok(path)
}

fn read(path: &Path) -> Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    let mut rows = text.lines();
    let mut lines: Vec<Line> = (rows.next().unwrap_or_default().split(','))
        .skip(1)
        .map(|name| Line { name: name.to_owned(), points: Vec::new() })
        .collect();
    for (row, number) in rows.zip(2..) {
        let cells: Vec<f64> =
            row.split(',').map(str::parse).collect::<Result<_, _>>().map_err(|_| {
                Error::format(path, format!("line {number}: expected numbers, found `{row}`"))
            })?;
        if cells.len() != lines.len() + 1 {
            let expected = lines.len() + 1;
            return Err(Error::format(
                path,
                format!("line {number}: {} cells, expected {expected}", cells.len()),
            ));
        }
        for (line, &value) in lines.iter_mut().zip(&cells[1..]) {
            line.points.push((cells[0], value));
        }
    }
    Ok(lines)
}

type Failure = DrawingAreaErrorKind<std::io::Error>;

fn draw(svg: &mut String, panels: &[(Option<&Line>, Option<&Line>)]) -> Result<(), Failure> {
    let height = PANEL * panels.len().max(1) as u32;
    let area = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    for (area, (train, evaluation)) in area.split_evenly((panels.len().max(1), 1)).iter().zip(panels) {
        panel(area, *train, *evaluation)?;
    }
    area.present()
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    train: Option<&Line>,
    evaluation: Option<&Line>,
) -> Result<(), Failure> {
    let finite = |line: Option<&Line>| -> Vec<(f64, f64)> {
        let points = line.into_iter().flat_map(|line| line.points.iter().copied());
        points.filter(|(_, y)| y.is_finite()).collect()
    };
    let (line, dots) = (finite(train), finite(evaluation));
    let name = train.or(evaluation).map_or("", |line| line.name.as_str());
    let (mut low, mut high, mut end) = (f64::INFINITY, f64::NEG_INFINITY, 1.0_f64);
    for &(x, y) in line.iter().chain(&dots) {
        (low, high, end) = (low.min(y), high.max(y), end.max(x));
    }
    if low > high {
        (low, high) = (0.0, 1.0);
    }
    let room = (0.05 * (high - low)).max(1e-3 * high.abs()).max(1e-12);
    let mut chart = ChartBuilder::on(area)
        .caption(name, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..end, low - room..high + room)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.3e}"))
        .label_style(("sans-serif", 12))
        .light_line_style(WHITE)
        .draw()?;
    if !line.is_empty() {
        chart.draw_series(std::iter::once(PathElement::new(line, Palette99::pick(0).to_rgba())))?;
    }
    let dot = |at| Circle::new(at, 4, Palette99::pick(1).to_rgba().filled());
    chart.draw_series(dots.into_iter().map(dot))?;
    Ok(())
}
