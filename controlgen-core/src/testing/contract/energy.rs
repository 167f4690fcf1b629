//! What every energy keeps.

use tch::Tensor;

use super::{
    Breach, Check, Clause, Options, Violation, breach, by_differences, check, close, demand, equal,
    on_thread, recording, sized,
};
use crate::energy::{EnergyFn, Point, gradient};
use crate::{EnableGrad, Error, Result, Rows};

/// The energy and a point.
pub struct Case<'a, X, E> {
    energy: &'a E,
    x: &'a X,
    /// B at x.
    rows: i64,
    tolerance: f64,
    seed: u64,
}

pub fn clauses<'a, X, E>() -> Vec<Clause<Case<'a, X, E>>>
where
    X: Point + Rows + Clone,
    E: EnergyFn<X> + Clone + Send + 'static,
{
    vec![
        ("shape", shape),
        ("repeatable", repeatable),
        ("rows", rows),
        ("gradient", slopes),
        ("gradient mode", mode),
        ("clone", clone),
    ]
}

impl Options {
    /// [`energy`](super::energy) with these options.
    ///
    /// # Errors
    /// The first clause that does not hold.
    pub fn energy<X, E>(&self, energy: &E, x: &X) -> Result<(), Violation>
    where
        X: Point + Rows + Clone,
        E: EnergyFn<X> + Clone + Send + 'static,
    {
        let _no_gradients = tch::no_grad_guard();
        let case = || -> Result<_, Breach> {
            let value = energy.energy(x)?;
            let &[rows] = value.size().as_slice() else {
                return breach("one number a row, [B]", format!("shape {:?}", value.size()));
            };
            demand(rows >= 2, "a point of at least 2 rows", rows)?;
            let tolerance = self.tolerance(value.f_kind()?);
            Ok(Case { energy, x, rows, tolerance, seed: self.seed })
        };
        let case = case().map_err(|b| b.in_clause("energy", "shape"))?;
        check("energy", &clauses(), &case)
    }
}

impl<X: Point + Rows + Clone, E: EnergyFn<X>> Case<'_, X, E> {
    /// The energies of these rows of the point.
    fn of(&self, rows: &[i64]) -> Result<Tensor> {
        let mut x = self.x.clone();
        x.reorder(rows)?;
        self.energy.energy(&x)
    }
}

fn shape<X: Point + Rows + Clone, E: EnergyFn<X>>(c: &Case<'_, X, E>) -> Check {
    for rows in [(0..c.rows).collect::<Vec<_>>(), vec![1], vec![0, 0, 1]] {
        let value = c.of(&rows)?;
        sized(&format!("the energy of {} rows", rows.len()), &value, &[rows.len() as i64])?;
        demand(value.is_floating_point(), "floating-point numbers", format!("{:?}", value.f_kind()?))?;
        let nan = value.f_isnan()?.f_any()?.f_int64_value(&[])? != 0;
        demand(!nan, "numbers", "NaN")?;
    }
    Ok(())
}

fn repeatable<X: Point + Rows + Clone, E: EnergyFn<X>>(c: &Case<'_, X, E>) -> Check {
    let before = c.x.free().ok().map(|free| free.f_add_scalar(0)).transpose()?;
    let first = c.energy.energy(c.x)?;
    equal("the energy, the second time", &c.energy.energy(c.x)?, &first)?;
    match (before, c.x.free()) {
        (Some(before), Ok(after)) => equal("the point after its energy was taken", after, &before),
        _ => Ok(()),
    }
}

fn rows<X: Point + Rows + Clone, E: EnergyFn<X>>(c: &Case<'_, X, E>) -> Check {
    let together = c.energy.energy(c.x)?;
    for row in 0..c.rows {
        let found = together.f_narrow(0, row, 1)?;
        close(&format!("the energy of row {row} of a batch"), &found, &c.of(&[row])?, c.tolerance)?;
    }
    let backwards: Vec<i64> = (0..c.rows).rev().collect();
    close("the energies of rows in reverse", &c.of(&backwards)?, &together.f_flip([0])?, c.tolerance)
}

/// A point of token ids has no gradient.
fn slopes<X: Point + Rows + Clone, E: EnergyFn<X>>(c: &Case<'_, X, E>) -> Check {
    let free = match c.x.free() {
        Ok(free) => free,
        Err(Error::NotDifferentiable { .. }) => return Ok(()),
        Err(other) => return Err(other.into()),
    };
    let (value, found) = gradient(c.energy, c.x)?;
    close("the energy beside its gradient", &value, &c.energy.energy(c.x)?, c.tolerance)?;
    by_differences("the gradient", free, &found, c.seed, &|x| {
        c.energy.energy(&c.x.rebuilt(x.shallow_clone()))
    })
}

fn mode<X: Point + Rows + Clone, E: EnergyFn<X>>(c: &Case<'_, X, E>) -> Check {
    let leaf = |free: &Tensor| -> Result<Tensor> { Ok(free.f_detach()?.f_set_requires_grad(true)?) };
    let x = match c.x.free() {
        Ok(free) => c.x.rebuilt(leaf(free)?),
        Err(_) => c.x.clone(),
    };
    let value = c.energy.energy(&x)?;
    demand(!value.requires_grad(), "nothing recorded under no_grad_guard", "a graph")?;
    demand(!recording()?, "gradients off after an energy, as before it", "gradients on")?;
    let _gradients = EnableGrad::new();
    let _ = c.energy.energy(&x)?;
    demand(recording()?, "gradients on after an energy, as before it", "gradients off")
}

fn clone<X, E>(c: &Case<'_, X, E>) -> Check
where
    X: Point + Rows + Clone,
    E: EnergyFn<X> + Clone + Send + 'static,
{
    let (copy, x) = (c.energy.clone(), c.x.clone());
    let found = on_thread(move || copy.energy(&x))?;
    close("the energy of a clone on another thread", &found, &c.energy.energy(c.x)?, c.tolerance)
}
