//! Langevin dynamics.

use super::{EnergyFn, Point, gradient};
use crate::noise::NoiseSource;
use crate::{Error, Result};
use tch::Tensor;

/// One step of unadjusted Langevin dynamics: x − η ∇E(x) + √(2η) z with z ~ N(0, 1), of x's free tensor (Roberts &
/// Tweedie 1996, ULA; Welling & Teh 2011, whose ε is 2η). Gives E(x), `[B]`, and the new point.
///
/// For small η a chain of such steps has a stationary distribution near exp(−E(x)); it is not corrected for the η
/// that it has: with E(x) = x²/(2 s²) its variance is s² / (1 − η/(2 s²)). `noise` is one stream a row
/// (`Vec<Stream>`), so that a row's chain does not depend on the batch.
///
/// # Errors
/// [`Error::Value`] for a step size that is no finite number above 0; those of [`gradient`] and of
/// [`NoiseSource::normal`].
pub fn langevin<X, E, S>(energy: &E, x: &X, step_size: f64, noise: &mut S) -> Result<(Tensor, X)>
where
    X: Point,
    E: EnergyFn<X> + ?Sized,
    S: NoiseSource + ?Sized,
{
    if !step_size.is_finite() || step_size <= 0.0 {
        return Err(Error::value("step size", "a finite number > 0", step_size));
    }
    let (value, gradient) = gradient(energy, x)?;
    let _no_gradients = tch::no_grad_guard();
    let free = x.free()?;
    let z = noise.normal(&free.size(), free.f_kind()?, free.device())?;
    let moved =
        free.f_sub(&gradient.f_mul_scalar(step_size)?)?.f_add(&z.f_mul_scalar((2.0 * step_size).sqrt())?)?;
    Ok((value, x.rebuilt(moved.f_detach()?)))
}
