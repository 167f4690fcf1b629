//! Two ways of the same work, timed side by side.
//!
//! They run in the order one, other, other, one (ABBA), so that a drift of the machine's speed within the four counts for
//! both alike; every second time in the opposite order, so that a place in the order counts for neither. The ratio of the
//! four is the time of the two runs of the other over that of the one.

use std::time::Instant;

use controlgen_core::Result;
use controlgen_core::noise::Stream;

/// How often the ratios are drawn anew.
const RESAMPLES: usize = 10_000;

/// Ratios of `fours` times four runs: time of `run(true)` over time of `run(false)`. As many, and 10 at most, are run
/// before and not counted.
///
/// # Errors
/// Those of `run`.
pub fn ratios(fours: usize, mut run: impl FnMut(bool) -> Result<()>) -> Result<Vec<f64>> {
    let mut timed = |other| -> Result<f64> {
        let begin = Instant::now();
        run(other)?;
        Ok(begin.elapsed().as_secs_f64())
    };
    let mut four = |i: usize| {
        let inner = i.is_multiple_of(2);
        let (a, b, c, d) = (timed(!inner)?, timed(inner)?, timed(inner)?, timed(!inner)?);
        let ratio = (b + c) / (a + d);
        Ok(if inner { ratio } else { ratio.recip() })
    };
    for i in 0..fours.min(10) {
        four(i)?;
    }
    (0..fours).map(four).collect()
}

/// The median, and a 95 % interval of it by the percentile bootstrap.
pub fn estimate(ratios: &[f64]) -> (f64, f64, f64) {
    let mut stream = Stream::new(0, 0);
    let mut draw = || {
        let pick = |_| ratios[stream.index(ratios.len())];
        median(&sorted((0..ratios.len()).map(pick).collect()))
    };
    let medians = sorted((0..RESAMPLES).map(|_| draw()).collect());
    let at = |share: f64| medians[((RESAMPLES - 1) as f64 * share).round() as usize];
    (median(&sorted(ratios.to_vec())), at(0.025), at(0.975))
}

fn median(sorted: &[f64]) -> f64 {
    let half = sorted.len() >> 1;
    if sorted.len() % 2 == 1 { sorted[half] } else { f64::midpoint(sorted[half - 1], sorted[half]) }
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}
