//! Gradients of energies.

use tch::Tensor;

use super::{EnergyFn, Point, checks};
use crate::{EnableGrad, Error, Result};

/// E(x), `[B]`, and ∇E(x), of the shape of x's free tensor; both detached.
///
/// Gradients are turned on for as long as this takes, whatever the caller's mode, and x itself is left alone. Rows
/// are taken to be independent: row i of the gradient is the gradient of E of row i.
///
/// # Errors
/// [`Error::NotDifferentiable`] for a point without a free tensor, or an energy that does not depend on it;
/// [`Error::Shape`] for one that is not one number a row; [`Error::NotFinite`], naming the rows, for an energy or
/// gradient that is NaN or infinite, and the gradient's norm; the energy's own.
pub fn gradient<X: Point, E: EnergyFn<X> + ?Sized>(energy: &E, x: &X) -> Result<(Tensor, Tensor)> {
    gradient_of(x, |x| Ok((energy.energy(x)?, ()))).map(|(value, gradient, ())| (value, gradient))
}

/// The same for an energy that `f` computes together with something else, which is passed on.
///
/// # Errors
/// Those of [`gradient`], and `f`'s own.
pub fn gradient_of<X: Point, R>(
    x: &X,
    f: impl FnOnce(&X) -> Result<(Tensor, R)>,
) -> Result<(Tensor, Tensor, R)> {
    let free = x.free()?;
    checks::floating("the point of a gradient", free)?;
    let Some(&rows) = free.size().first() else {
        return Err(Error::shape("the point of a gradient", "[B, ..]", &[]));
    };
    let _gradients = EnableGrad::new();
    let leaf = free.f_detach()?.f_set_requires_grad(true)?;
    let (value, rest) = f(&x.rebuilt(leaf.shallow_clone()))?;
    checks::one_a_row("energy", &value, Some(rows))?;
    let gradient = backward(&value, &leaf, false)?;
    Ok((value.f_detach()?, gradient, rest))
}

/// ∇ Σ `energy` at `leaf`, detached. LibTorch answers for what does not depend on the leaf with a tensor that is
/// not there; that is an error here.
pub(crate) fn backward(energy: &Tensor, leaf: &Tensor, keep_graph: bool) -> Result<Tensor> {
    let independent = || Error::NotDifferentiable { what: "the energy".into() };
    if !energy.requires_grad() {
        return Err(independent());
    }
    checks::finite("energy", &energy.f_detach()?)?;
    let total = energy.f_sum(None::<tch::Kind>)?;
    let mut gradients = Tensor::f_run_backward(&[&total], &[leaf], keep_graph, false)?;
    let gradient = gradients.pop().filter(Tensor::defined).ok_or_else(independent)?;
    let gradient = gradient.f_detach()?;
    checks::finite("gradient of the energy", &gradient).map_err(|error| with_norm(error, &gradient))?;
    Ok(gradient)
}

/// An error of a gradient that is not finite, with its norm, and that of its finite numbers: a gradient that had been
/// growing for many steps looks otherwise than a division by 0.
fn with_norm(error: Error, gradient: &Tensor) -> Error {
    let Error::NotFinite { what, at, found } = error else { return error };
    let norms = || -> Result<(f64, f64)> {
        let gradient = gradient.f_to_kind(tch::Kind::Double)?;
        let norm = gradient.f_norm()?.f_double_value(&[])?;
        let rest = gradient.f_nan_to_num(0.0, 0.0, 0.0)?.f_norm()?.f_double_value(&[])?;
        Ok((norm, rest))
    };
    match norms() {
        Ok((norm, rest)) => {
            let found = format!("{found}, norm {norm} ({rest:.4e} over its finite numbers)");
            Error::NotFinite { what, at, found }
        }
        Err(error) => error,
    }
}
