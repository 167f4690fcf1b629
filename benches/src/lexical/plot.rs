//! The plot: percent over perplexity, one point a method.

use std::path::Path;

use controlgen_core::{Error, Result};
use plotters::prelude::*;

use super::methods::REFERENCE;
use super::report::Row;

const SIZE: (u32, u32) = (760, 480);

/// Draws an SVG file. Text is written as text: whoever shows the file has the fonts.
pub fn draw(path: &Path, rows: &[Row]) -> Result<()> {
    let mut svg = String::new();
    chart(&mut svg, rows).map_err(|source| Error::format(path, source))?;
    std::fs::write(path, svg).map_err(|source| Error::io(path, source))
}

fn chart(svg: &mut String, rows: &[Row]) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let most = rows.iter().map(|row| row.perplexity).filter(|p| p.is_finite()).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&area)
        .caption("Words said, and fluency", ("sans-serif", 18))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..most * 1.25, -4.0..108.0)?;
    chart
        .configure_mesh()
        .x_desc("perplexity")
        .y_desc("texts that say all words, %")
        .y_label_formatter(&|y| format!("{y:.0}"))
        .label_style(("sans-serif", 13))
        .light_line_style(WHITE)
        .draw()?;
    // What is asked for: 97 % at 1.5 times the reference's perplexity.
    if let Some(reference) = rows.iter().find(|row| row.method == REFERENCE) {
        let goal =
            Rectangle::new([(0.0, 97.0), (1.5 * reference.perplexity, 100.0)], GREEN.mix(0.25).filled());
        chart.draw_series(std::iter::once(goal))?;
    }
    for (i, row) in rows.iter().enumerate().filter(|(_, row)| row.perplexity.is_finite()) {
        let (at, color) = ((row.perplexity, row.coverage.percent), Palette99::pick(i).to_rgba());
        chart.draw_series(std::iter::once(Circle::new(at, 5, color.filled())))?;
        let label = EmptyElement::at(at) + Text::new(row.method, (8, -6), ("sans-serif", 13).into_font());
        chart.draw_series(std::iter::once(label))?;
    }
    area.present()
}
