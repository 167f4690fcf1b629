//! DPM-Solver++.

use controlgen_core::guidance::Step;
use controlgen_core::noise::NoiseSource;
use controlgen_core::{Error, NoiseLevel, Result};
use tch::Tensor;

use super::{Predict, Sampler, ask, check_steps, done, normal_like};

/// How the second order is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DpmSolverType {
    /// The slope in the middle of the step.
    #[default]
    Midpoint,
    /// The integral of the slope.
    Heun,
}

/// The multistep solver in λ = ln(α/σ), of order 1, 2 (2M) or 3 (3M), on the equation in x̂₀:
///
/// x' = (σ'/σ) x − α' (e^(−h) − 1) (x̂₀ + D₁ / 2), h = λ' − λ, D₁ = (h / h₋₁) (x̂₀ − x̂₀₋₁),
///
/// and for the stochastic equation (SDE-DPM-Solver++)
///
/// x' = (σ'/σ) e^(−h) x − α' (e^(−2h) − 1) (x̂₀ + D₁ / 2) + σ' √(1 − e^(−2h)) z, z ~ N(0, 1).
///
/// Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (2022), algorithm 2
/// and section 4.2; order 3 as in its code. One prediction a step, whose x̂₀ is kept. The first steps are of lower
/// order, and so is a last one without noise at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DpmSolver {
    order: usize,
    solver_type: DpmSolverType,
    stochastic: bool,
    lower_order_final: bool,
    euler_at_final: bool,
}

impl DpmSolver {
    /// Of order 1 ..= 3; 2 is usual under guidance.
    ///
    /// # Errors
    /// [`Error::Value`] for another order.
    pub fn new(order: usize) -> Result<Self> {
        if !(1..=3).contains(&order) {
            return Err(Error::value("order of DPM-Solver++", "1 ..= 3", order));
        }
        let solver_type = DpmSolverType::default();
        Ok(Self { order, solver_type, stochastic: false, lower_order_final: true, euler_at_final: false })
    }

    /// Solves the stochastic equation.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for order 3, for which the paper has no such solver.
    pub fn stochastic(self) -> Result<Self> {
        if self.order > 2 {
            return Err(Error::unsupported("SDE-DPM-Solver++ of order 3", "orders 1 and 2"));
        }
        Ok(Self { stochastic: true, ..self })
    }

    /// With another way to second order.
    #[must_use]
    pub fn with_type(self, solver_type: DpmSolverType) -> Self {
        Self { solver_type, ..self }
    }

    /// Whether the order falls towards the end of runs of less than 15 steps (the default).
    #[must_use]
    pub fn with_lower_order_final(self, lower_order_final: bool) -> Self {
        Self { lower_order_final, ..self }
    }

    /// Whether the last step is of order 1 in any case.
    #[must_use]
    pub fn with_euler_at_final(self, euler_at_final: bool) -> Self {
        Self { euler_at_final, ..self }
    }

    /// The order of step i of n.
    fn order_at(self, i: usize, n: usize, step: &Step) -> usize {
        let left = n - i;
        let few = self.lower_order_final && step.of < 15;
        let order = self.order.min(i + 1);
        if left == 1 && (few || self.euler_at_final || step.next.sigma() == 0.0 || rests(step)) {
            1
        } else if left == 2 && few {
            order.min(2)
        } else {
            order
        }
    }
}

/// λ = ln(α/σ).
pub(super) fn lambda(level: NoiseLevel) -> f64 {
    level.alpha().ln() - level.sigma().ln()
}

/// What a step multiplies x, x̂₀, those before it (the newest first), and the noise with.
struct Factors {
    x: f64,
    clean: f64,
    past: Vec<f64>,
    noise: f64,
}

impl DpmSolver {
    /// `past`: λ of the steps before, the newest first.
    fn factors(self, step: &Step, past: &[f64], order: usize) -> Factors {
        let (alpha, sigma) = (step.next.alpha(), step.next.sigma());
        let h = lambda(step.next) - lambda(step.level);
        let long = if self.stochastic { 2.0 * h } else { h };
        let e = (-long).exp_m1(); // −1 at the end, where h is infinite
        let mut factors =
            Factors { x: sigma / step.level.sigma(), clean: -alpha * e, past: vec![], noise: 0.0 };
        if self.stochastic {
            factors.x *= (-h).exp();
            factors.noise = sigma * (-e).max(0.0).sqrt();
        }
        if order == 1 {
            return factors;
        }
        let r0 = (lambda(step.level) - past[0]) / h;
        let slope = match (order, self.solver_type) {
            (2, DpmSolverType::Midpoint) => -0.5 * alpha * e,
            _ => alpha * (e / long + 1.0),
        };
        if order == 2 {
            factors.clean += slope / r0;
            factors.past.push(-slope / r0);
            return factors;
        }
        let r1 = (past[0] - past[1]) / h;
        let curve = -alpha * ((e + long) / (long * long) - 0.5);
        // D₁ = d₀ + (d₀ − d₁) r₀ / (r₀ + r₁), D₂ = (d₀ − d₁) / (r₀ + r₁) with d₀ = (m₀ − m₁) / r₀, d₁ = (m₁ − m₂) / r₁
        let difference = (slope * r0 + curve) / (r0 + r1);
        let (d0, d1) = ((slope + difference) / r0, -difference / r1);
        factors.clean += d0;
        factors.past.extend([d1 - d0, -d1]);
        factors
    }
}

impl Sampler for DpmSolver {
    fn handle(&self) -> Box<dyn Sampler> {
        Box::new(*self)
    }

    fn sample(
        &self,
        predict: &mut Predict<'_>,
        mut x: Tensor,
        steps: &[Step],
        noise: &mut dyn NoiseSource,
    ) -> Result<Tensor> {
        check_steps(steps)?;
        falling(steps)?;
        let _no_gradients = tch::no_grad_guard();
        let (mut lambdas, mut cleans) = (Vec::<f64>::new(), Vec::<Tensor>::new());
        for (i, step) in steps.iter().enumerate() {
            let guided = ask(predict, &x, step)?;
            let factors = self.factors(step, &lambdas, self.order_at(i, steps.len(), step));
            // x = α x₀ + σ ε
            let (alpha, sigma) = (step.level.alpha(), step.level.sigma());
            x = guided.mix(step.level, factors.x * alpha + factors.clean, factors.x * sigma)?;
            for (factor, clean) in factors.past.iter().zip(&cleans) {
                x = x.f_add(&clean.f_mul_scalar(*factor)?)?;
            }
            if factors.noise > 0.0 {
                x = x.f_add(&normal_like(&x, noise)?.f_mul_scalar(factors.noise)?)?;
            }
            if self.order > 1 {
                lambdas.insert(0, lambda(step.level));
                cleans.insert(0, guided.x0(step.level)?);
                lambdas.truncate(self.order - 1);
                cleans.truncate(self.order - 1);
            }
        }
        done(x, steps)
    }
}

/// Whether a step ends with the noise it began with: diffusers' `sigma_min` may be that of the last timestep.
pub(super) fn rests(step: &Step) -> bool {
    (lambda(step.next) - lambda(step.level)).abs() < 1e-9
}

/// Refuses steps along which λ does not rise, but for a last one that rests, or that begin where it is not a number.
pub(super) fn falling(steps: &[Step]) -> Result<()> {
    for (i, step) in steps.iter().enumerate() {
        let (from, to) = (lambda(step.level), lambda(step.next));
        if !from.is_finite() || to.is_nan() || (to <= from && !(i + 1 == steps.len() && rests(step))) {
            let what = format!("ln(alpha / sigma) of step {}", step.index);
            return Err(Error::value(what, "a finite number that rises", format!("{from} to {to}")));
        }
    }
    Ok(())
}
