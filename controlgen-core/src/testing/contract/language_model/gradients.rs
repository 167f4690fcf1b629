//! Gradients with respect to embeddings.

use tch::{Kind, Tensor};

use super::Case;
use crate::testing::contract::{Breach, Check, breach, demand, finite, recording};
use crate::{EnableGrad, LmInput, Result, State};

/// Six positions of one row.
const LEN: i64 = 6;

/// The embeddings of the first row, `[1, 6, D]`, away from the table's rows.
fn point(c: &Case<'_>) -> Result<Tensor> {
    let e = c.lm.embeddings().f_index_select(0, &c.ids.f_get(0)?)?.f_unsqueeze(0)?.f_detach()?;
    let away = c.noise(1, &e.size())?.f_mul_scalar(0.3 * scale(&e)?)?;
    Ok(e.f_add(&away)?)
}

/// The root mean square, not below 1e-3.
fn scale(e: &Tensor) -> Result<f64> {
    Ok(e.f_to_kind(Kind::Double)?.f_square()?.f_mean(None::<Kind>)?.f_sqrt()?.f_double_value(&[])?.max(1e-3))
}

/// A weighted sum of each row's logits, f64 `[B]`, so that no symmetry hides an error.
fn functional(c: &Case<'_>, logits: &Tensor) -> Result<Tensor> {
    let w = c.noise(2, &[1, LEN, c.lm.spec().vocab])?.f_to_kind(Kind::Double)?;
    let w = w.f_narrow(1, LEN - logits.size()[1], logits.size()[1])?;
    Ok(logits.f_to_kind(Kind::Double)?.f_mul(&w)?.f_sum_dim_intlist(&[1i64, 2][..], false, None::<Kind>)?)
}

fn embeds(c: &Case<'_>, e: &Tensor, state: &mut State) -> Result<Tensor> {
    c.forward(LmInput::embeds(e), state)
}

/// ∂ f / ∂ e, or why there is none.
fn gradient(f: &Tensor, e: &Tensor, keep_graph: bool) -> Result<Tensor, Breach> {
    demand(f.requires_grad(), "logits that depend on embeddings by gradient", "no graph")?;
    let g = Tensor::f_run_backward(&[&f.f_sum(None::<Kind>)?], &[e], keep_graph, false)?.pop();
    match g.filter(Tensor::defined) {
        Some(g) => Ok(g.f_to_kind(Kind::Double)?),
        None => breach("a gradient at the embeddings", "none"),
    }
}

pub fn flow(c: &Case<'_>) -> Check {
    let e = point(c)?;
    let g = {
        let _gradients = EnableGrad::new();
        let leaf = e.f_detach()?.f_set_requires_grad(true)?;
        let mut state = c.start(1)?;
        let early = embeds(c, &leaf.f_narrow(1, 0, 4)?, &mut state)?;
        let late = embeds(c, &leaf.f_narrow(1, 4, 2)?, &mut state)?;
        let causal = gradient(&early.f_to_kind(Kind::Double)?, &leaf, true)?;
        let later = causal.f_narrow(1, 4, 2)?.f_abs()?.f_max()?.f_double_value(&[])?;
        demand(later == 0.0, "no gradient of logits at what comes after them", format!("{later:.3e}"))?;
        gradient(&functional(c, &Tensor::f_cat(&[early, late], 1)?)?, &leaf, false)?
    };
    finite("gradient at the embeddings", &g)?;
    let kind = c.lm.spec().placement.kind;
    let by_position = g.f_abs()?.f_amax(&[0i64, 2][..], false)?; // (6)
    if kind != Kind::Double && kind != Kind::Float {
        // Half the digits are too few for differences.
        let least = by_position.f_min()?.f_double_value(&[])?;
        return demand(least > 0.0, "a gradient at every position", "0 at one");
    }
    // By position, along random directions. Roundings spoil small steps, and kinks (ReLU) large ones: one must do.
    let u = c.noise(3, &[LEN, c.lm.spec().width])?.f_mul_scalar(scale(&e)?)?;
    let slopes = g.f_squeeze_dim(0)?.f_mul(&u)?.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?;
    let slopes: Vec<f64> = Vec::try_from(slopes)?;
    let (steps, tolerance) =
        if kind == Kind::Double { ([1e-3, 1e-4, 1e-5], 1e-5) } else { ([2e-2, 5e-3, 1e-3], 5e-2) };
    let mut told = Ok(());
    for h in steps {
        let expected = differences(c, &e, &u, h)?;
        let largest = expected.iter().fold(1e-6f64, |m, x| m.max(x.abs()));
        told = slopes.iter().zip(&expected).enumerate().try_for_each(|(t, (found, expected))| {
            let what = format!("a slope of {expected:.5} at position {t}, by finite differences");
            demand(
                (found - expected).abs() <= tolerance * largest,
                what,
                format!("{found:.5} by the gradient"),
            )
        });
        if told.is_ok() {
            break;
        }
    }
    told
}

/// The slopes of the functional at e `[1, 6, D]` by position, along the rows of u `[6, D]`: central differences of
/// fourth order, every point a row of one batch.
fn differences(c: &Case<'_>, e: &Tensor, u: &Tensor, h: f64) -> Result<Vec<f64>> {
    let mut points = Vec::new();
    for t in 0..LEN {
        for k in [-2.0, -1.0, 1.0, 2.0] {
            let step = e.f_zeros_like()?;
            step.f_narrow(1, t, 1)?.f_copy_(&u.f_narrow(0, t, 1)?.f_mul_scalar(k * h)?)?;
            points.push(e.f_add(&step)?);
        }
    }
    let points = Tensor::f_cat(&points, 0)?; // (6 · 4, 6, D)
    let logits = embeds(c, &points, &mut c.start(4 * LEN)?)?;
    let f: Vec<f64> = Vec::try_from(functional(c, &logits)?)?;
    let difference = |f: &[f64]| (8.0 * (f[2] - f[1]) - (f[3] - f[0])) / (12.0 * h);
    Ok(f.chunks_exact(4).map(difference).collect())
}

pub fn none(c: &Case<'_>) -> Check {
    let leaf = point(c)?.f_set_requires_grad(true)?;
    let logits = embeds(c, &leaf, &mut c.start(1)?)?;
    demand(!logits.requires_grad(), "nothing recorded under no_grad_guard", "a graph")?;
    demand(!recording()?, "gradients off after a pass, as before it", "gradients on")?;
    let _gradients = EnableGrad::new();
    let _ = embeds(c, &leaf, &mut c.start(1)?)?;
    demand(recording()?, "gradients on after a pass, as before it", "gradients off")
}
