//! The plot: percent over perplexity, one point a method.

use std::path::Path;

use controlgen_core::{Error, Result};
use plotters::prelude::*;

const SIZE: (u32, u32) = (760, 480);

/// A method.
pub struct Point {
    pub name: String,
    pub perplexity: f64,
    pub percent: f64,
}

/// What is drawn besides its points.
pub struct Chart {
    pub caption: &'static str,
    /// What the percent are of.
    pub percent: &'static str,
    /// What is asked for: so many percent, at a perplexity of at most so much.
    pub goal: Option<(f64, f64)>,
}

impl Chart {
    /// Draws an SVG file. Text is written as text: whoever shows the file has the fonts.
    pub fn draw(&self, path: &Path, points: &[Point]) -> Result<()> {
        let mut svg = String::new();
        self.chart(&mut svg, points).map_err(|source| Error::format(path, source))?;
        std::fs::write(path, svg).map_err(|source| Error::io(path, source))
    }

    fn chart(&self, svg: &mut String, points: &[Point]) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let most = points.iter().map(|point| point.perplexity).filter(|p| p.is_finite()).fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(&area)
            .caption(self.caption, ("sans-serif", 18))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(52)
            .build_cartesian_2d(0.0..most * 1.25, -4.0..108.0)?;
        chart
            .configure_mesh()
            .x_desc("perplexity")
            .y_desc(self.percent)
            .y_label_formatter(&|y| format!("{y:.0}"))
            .label_style(("sans-serif", 13))
            .light_line_style(WHITE)
            .draw()?;
        if let Some((percent, perplexity)) = self.goal {
            let goal = Rectangle::new([(0.0, percent), (perplexity, 100.0)], GREEN.mix(0.25).filled());
            chart.draw_series(std::iter::once(goal))?;
        }
        for (i, point) in points.iter().enumerate().filter(|(_, point)| point.perplexity.is_finite()) {
            let (at, color) = ((point.perplexity, point.percent), Palette99::pick(i).to_rgba());
            chart.draw_series(std::iter::once(Circle::new(at, 5, color.filled())))?;
            let name = Text::new(point.name.clone(), (8, -6), ("sans-serif", 13).into_font());
            chart.draw_series(std::iter::once(EmptyElement::at(at) + name))?;
        }
        area.present()
    }
}
