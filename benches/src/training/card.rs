//! Model cards.

use std::fmt::Write;

use super::{Options, Settings};

/// What a recipe says of its model.
#[derive(Clone, Debug)]
pub struct Card {
    /// One line: what it is.
    pub title: String,
    /// The data, where they come from, and what was held out.
    pub data: String,
    /// The loss and what was done to it.
    pub method: String,
    /// What the columns of the table of evaluations are.
    pub measures: String,
}

impl Card {
    /// The card as Markdown.
    pub(super) fn render(&self, settings: &Settings, options: &Options, steps: u64, seconds: f64) -> String {
        let Self { title, data, method, measures } = self;
        let mut text = format!("# {title}\n\n{data}\n\n{method}\n\n");
        let Settings { batch, rate, warmup, weight_decay, beta2, ema, seed, .. } = settings;
        let _ = writeln!(
            text,
            "AdamW, rate {rate} after {warmup} steps, then falling along a cosine over {} steps; β₂ {beta2}, weight decay \
             {weight_decay}, batches of {batch}, seed {seed}, averages of decay {ema}, computed in {:?}. {steps} steps, {:.0} \
             minutes on {:?}.\n",
            settings.steps,
            options.placement.kind,
            seconds / 60.0,
            options.placement.device,
        );
        let _ = writeln!(text, "    cargo run --release -p benches --bin train -- {}\n", options.name);
        let table = std::fs::read_to_string(options.run.join("evaluation.csv")).unwrap_or_default();
        let mut lines = table.lines();
        if let Some(header) = lines.next() {
            let row = |line: &str| format!("| {} |\n", line.split(',').collect::<Vec<_>>().join(" | "));
            let _ = write!(text, "{measures}\n\n{}", row(header));
            let _ = writeln!(text, "|{}", "--:|".repeat(header.split(',').count()));
            for line in lines {
                let rounded: Vec<String> = line
                    .split(',')
                    .map(|cell| match cell.parse::<f64>() {
                        Ok(value) if value.fract() != 0.0 => format!("{value:.4}"),
                        _ => cell.to_owned(),
                    })
                    .collect();
                text.push_str(&row(&rounded.join(",")));
            }
        }
        if let Some(before) = &options.before {
            let _ = write!(text, "\n## Before\n\nIt began with the weights of an earlier run:\n\n{before}");
        }
        text
    }

    /// What a card that [`Card::render`] wrote says of its runs.
    pub(super) fn runs(text: &str) -> Option<&str> {
        text.find("\nAdamW, rate ").and_then(|at| text.get(at + 1..))
    }
}
