//! The model's last hidden states, seen by a tap.

use controlgen_core::{
    At, Binding, Control, Controls, Dims, Error, LanguageModel, Pass, Result, Rows, SiteId, SiteKind,
    SiteMap, Taps,
};
use tch::{Kind, Tensor};

/// Leaves what the output product reads.
struct Tap(SiteId);

impl Control for Tap {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self(self.0))
    }

    fn bind(&self, _sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        to.at_input(self.0, 0);
        Ok(())
    }

    fn input(&self, at: At<'_>, x: Tensor) -> Result<Tensor> {
        if let Some(taps) = at.pass.taps {
            taps.push(at.site, x.shallow_clone());
        }
        Ok(x)
    }
}

/// The site of the output product: the last linear one.
fn output_site(lm: &dyn LanguageModel) -> Result<SiteId> {
    let last = lm.sites().of_kind(SiteKind::Linear).last();
    let vocab = lm.spec().vocab;
    match last {
        Some((id, site)) if matches!(site.dims, Dims::Linear { outputs, .. } if outputs == vocab) => Ok(id),
        _ => {
            let what = "hidden states of a model whose last linear site is not its output product";
            Err(Error::unsupported(what, "models that list it last"))
        }
    }
}

/// `controls`, and after them what [`forward`] sees by.
pub(crate) fn tapped(lm: &dyn LanguageModel, controls: Option<&Controls>) -> Result<Controls> {
    let tap: Vec<Box<dyn Control>> = vec![Box::new(Tap(output_site(lm)?))];
    match controls {
        Some(controls) => controls.with(lm.sites(), tap),
        None => Controls::bind(lm.sites(), tap),
    }
}

/// What `run` gives in a pass under a [`tapped`] stack, and the hidden states `[B, T, D]` of the positions whose logits were
/// computed, f32. What other controls leave in the pass's own taps stays there.
pub(crate) fn forward<T>(
    lm: &dyn LanguageModel,
    pass: &Pass<'_>,
    run: impl FnOnce(&Pass<'_>) -> Result<T>,
) -> Result<(T, Tensor)> {
    let (site, taps) = (output_site(lm)?, Taps::new());
    let output = run(&Pass { taps: Some(&taps), ..*pass })?;
    let mut seen = taps.take();
    let ours = seen.iter().rposition(|(at, _)| *at == site).ok_or_else(|| {
        Error::unsupported("a model that runs its output product without its site", "models that call it")
    })?;
    let (_, hidden) = seen.remove(ours);
    if let Some(others) = pass.taps {
        seen.into_iter().for_each(|(at, tensor)| others.push(at, tensor));
    }
    Ok((output, hidden.f_to_kind(Kind::Float)?))
}

/// The directions of the hidden states of all that was said, row by row.
pub(super) struct Said {
    /// `[R, T, D]`, of length 1.
    directions: Tensor,
    /// Boolean `[R, T]`, false for padding; `None` without any.
    keep: Option<Tensor>,
}

impl Said {
    /// Of hidden states `[R, T, D]`.
    pub(super) fn new(hidden: &Tensor, keep: Option<Tensor>) -> Result<Self> {
        Ok(Self { directions: direction(hidden)?, keep })
    }

    /// The largest cosine between what was said in a row and each of the row's candidates `[R, k, D]`: `[R, k]`.
    pub(super) fn similarity(&self, candidates: &Tensor) -> Result<Tensor> {
        let candidates = direction(candidates)?.f_transpose(1, 2)?; // (R, D, k)
        let mut cosines = self.directions.f_bmm(&candidates)?; // (R, T, k)
        if let Some(keep) = &self.keep {
            let padding = keep.f_logical_not()?.f_unsqueeze(-1)?;
            cosines = cosines.f_masked_fill(&padding, f64::NEG_INFINITY)?;
        }
        Ok(cosines.f_amax([1].as_slice(), false)?)
    }

    /// Makes row `i` what row `rows[i]` was and has said one token more, of hidden states `[R, 1, D]`.
    pub(super) fn follow(&mut self, rows: &[i64], hidden: &Tensor) -> Result<()> {
        self.directions.reorder(rows)?;
        self.directions = Tensor::f_cat(&[&self.directions, &direction(hidden)?], 1)?;
        if let Some(keep) = &mut self.keep {
            keep.reorder(rows)?;
            let new = Tensor::f_ones([keep.size()[0], 1], (Kind::Bool, keep.device()))?;
            *keep = Tensor::f_cat(&[&*keep, &new], 1)?;
        }
        Ok(())
    }
}

/// h / ‖h‖.
fn direction(hidden: &Tensor) -> Result<Tensor> {
    let length = hidden.f_norm_scalaropt_dim(2.0, [-1].as_slice(), true)?;
    Ok(hidden.f_div(&length.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?)
}
