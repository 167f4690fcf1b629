//! UniPC.

use std::collections::VecDeque;

use controlgen_core::guidance::Step;
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, NoiseLevel, Result};
use tch::Tensor;

use super::dpm_solver::{falling, lambda, rests};
use super::{Predict, Sampler, ask, check_steps, done};

/// B(h), which scales the differences; h is −(λ' − λ) here, as x̂₀ is predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UniPcType {
    /// B(h) = h: for unguided sampling in few steps.
    Bh1,
    /// B(h) = e^h − 1.
    #[default]
    Bh2,
}

/// The predictor-corrector of Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
/// Diffusion Models" (2023), on x̂₀: with h = λ − λ' (below 0), λ = ln(α/σ),
///
/// x' = (σ'/σ) x − α' (e^h − 1) x̂₀ − α' B(h) Σₖ ρₖ D_k / r_k, D_k = x̂₀(tₖ) − x̂₀, r_k = (λₖ − λ) / (λ' − λ),
///
/// the predictor (UniP, algorithm 2) over the points before, the corrector (UniC, algorithm 1) also over the new one.
/// The ρ solve R ρ = b, R_jk = r_k^(j−1), b_j = j! φ_j(h) h / B(h) (their eq. 9, appendix). The corrector uses the
/// prediction that the next step asks for anyway: one prediction a step, of one order more than the predictor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UniPc {
    order: usize,
    solver_type: UniPcType,
    lower_order_final: bool,
    disable_corrector: Vec<usize>,
}

impl UniPc {
    /// Of order 1 ..= 3; 2 is usual under guidance.
    ///
    /// # Errors
    /// [`Error::Value`] for another order.
    pub fn new(order: usize) -> Result<Self> {
        if !(1..=3).contains(&order) {
            return Err(Error::value("order of UniPC", "1 ..= 3", order));
        }
        let solver_type = UniPcType::default();
        Ok(Self { order, solver_type, lower_order_final: true, disable_corrector: Vec::new() })
    }

    /// With this B(h).
    #[must_use]
    pub fn with_type(self, solver_type: UniPcType) -> Self {
        Self { solver_type, ..self }
    }

    /// Whether the order falls by one in each of the last steps (the default). A last step without noise at its end is
    /// of order 1 in any case.
    #[must_use]
    pub fn with_lower_order_final(self, lower_order_final: bool) -> Self {
        Self { lower_order_final, ..self }
    }

    /// The steps, from 0, whose results are not corrected: the first ones under strong guidance.
    #[must_use]
    pub fn with_disabled_corrector(self, disable_corrector: Vec<usize>) -> Self {
        Self { disable_corrector, ..self }
    }

    fn order_at(&self, i: usize, n: usize, step: &Step) -> usize {
        let order = self.order.min(i + 1);
        let order = if self.lower_order_final { order.min(n - i) } else { order };
        if step.next.sigma() == 0.0 || rests(step) { 1 } else { order }
    }

    /// What multiplies x, x̂₀ and the other points' x̂₀ from `from` to `to`. `others`: λ of the points before, the newest
    /// first, of a predictor; the corrector's new point comes last, at r = 1.
    fn factors(&self, from: NoiseLevel, to: NoiseLevel, others: &[f64], corrects: bool) -> Factors {
        let h = lambda(to) - lambda(from);
        let hh = -h;
        let e = hh.exp_m1(); // −1 at the end, where h is infinite
        let scale = match self.solver_type {
            UniPcType::Bh1 => hh,
            UniPcType::Bh2 => e,
        };
        let mut factors = Factors { x: to.sigma() / from.sigma(), clean: -to.alpha() * e, others: vec![] };
        let mut r: Vec<f64> = others.iter().map(|other| (other - lambda(from)) / h).collect();
        if corrects {
            r.push(1.0);
        }
        let rho = match (corrects, r.len()) {
            (_, 0) => return factors,
            // With one point ½ is of the same order, whatever B(h) is.
            (_, 1) => vec![0.5],
            _ => weights(&r, hh, scale),
        };
        for (rho, r) in rho.iter().zip(&r) {
            let factor = -to.alpha() * scale * rho / r;
            factors.others.push(factor);
            factors.clean -= factor;
        }
        factors
    }
}

struct Factors {
    x: f64,
    clean: f64,
    others: Vec<f64>,
}

/// ρ of Σₖ r_k^(j−1) ρₖ = b_j, j = 1 .. n, by Gaussian elimination: n is at most 3.
fn weights(r: &[f64], hh: f64, scale: f64) -> Vec<f64> {
    let n = r.len();
    let mut rows = Vec::with_capacity(n);
    let (mut phi, mut factorial) = (hh.exp_m1() / hh - 1.0, 1.0);
    for j in 0..n {
        let power = i32::try_from(j).unwrap_or(i32::MAX);
        let mut row: Vec<f64> = r.iter().map(|r| r.powi(power)).collect();
        row.push(phi * factorial / scale);
        rows.push(row);
        factorial *= (j + 2) as f64;
        phi = phi / hh - 1.0 / factorial;
    }
    for i in 0..n {
        // The rᵢ are distinct, so that no pivot is 0 once the greatest is taken.
        let best = (i..n).max_by(|&a, &b| rows[a][i].abs().total_cmp(&rows[b][i].abs())).unwrap_or(i);
        rows.swap(i, best);
        let pivot = rows[i].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(j, _)| *j != i) {
            let factor = row[i] / pivot[i];
            row.iter_mut().zip(&pivot).for_each(|(a, b)| *a -= factor * b);
        }
    }
    rows.iter().enumerate().map(|(i, row)| row[n] / row[i]).collect()
}

/// A point on the way: where, and what was predicted there.
struct Point {
    level: NoiseLevel,
    x0: Tensor,
}

impl Factors {
    /// x times its factor, x̂₀ times its, and so on.
    fn apply<'a>(&self, x: &Tensor, x0: &Tensor, others: impl Iterator<Item = &'a Tensor>) -> Result<Tensor> {
        let mut sum = x.f_mul_scalar(self.x)?.f_add(&x0.f_mul_scalar(self.clean)?)?;
        for (factor, other) in self.others.iter().zip(others) {
            sum = sum.f_add(&other.f_mul_scalar(*factor)?)?;
        }
        Ok(sum)
    }
}

impl Sampler for UniPc {
    fn handle(&self) -> Box<dyn Sampler> {
        Box::new(self.clone())
    }

    fn sample(
        &self,
        predict: &mut Predict<'_>,
        mut x: Tensor,
        steps: &[Step],
        _noise: &mut dyn NoiseSource,
    ) -> Result<Tensor> {
        check_steps(steps)?;
        falling(steps)?;
        let _no_gradients = tch::no_grad_guard();
        let mut past = VecDeque::<Point>::new(); // the newest first
        let mut before: Option<(Tensor, usize)> = None; // x of the step before, and its order
        for (i, step) in steps.iter().enumerate() {
            let guided = ask(predict, &x, step)?;
            let point = Point { level: step.level, x0: guided.x0(step.level)? };
            x = guided.x;
            if let (Some((last, order)), Some(newest)) = (&before, past.front())
                && !self.disable_corrector.contains(&(step.index.wrapping_sub(1)))
            {
                let lambdas = lambdas(past.iter().skip(1), *order);
                let factors = self.factors(newest.level, step.level, &lambdas, true);
                let others = past.iter().skip(1).take(order - 1).map(|point| &point.x0);
                x = factors.apply(last, &newest.x0, others.chain([&point.x0]))?;
            }
            let order = self.order_at(i, steps.len(), step);
            let lambdas = lambdas(past.iter(), order);
            let factors = self.factors(step.level, step.next, &lambdas, false);
            let predicted = factors.apply(&x, &point.x0, past.iter().map(|point| &point.x0))?;
            before = Some((std::mem::replace(&mut x, predicted), order));
            past.push_front(point);
            past.truncate(self.order);
        }
        done(x, steps)
    }
}

/// λ of the points that a step of this order looks back to.
fn lambdas<'a>(points: impl Iterator<Item = &'a Point>, order: usize) -> Vec<f64> {
    points.take(order - 1).map(|point| lambda(point.level)).collect()
}
