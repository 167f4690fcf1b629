//! What is added to the keys and values of the past.

use std::iter;

use controlgen_core::{
    At, Attn, Binding, Control, Controls, Dims, Error, LanguageModel, Next, Result, SiteKind, SiteMap,
};
use tch::{Kind, Tensor};

use crate::search::hidden;

/// So that a gradient of 0 is divided by something.
const SMALL: f64 = 1e-15;

/// ΔH: for each attention of the model what is added to the keys and to the values of the last positions before the token
/// that is read, `[B, kv_heads, positions, head_dim]` both, f32.
pub(super) struct Deltas(Vec<[Tensor; 2]>);

impl Deltas {
    /// For `rows` rows with `len` positions before.
    pub(super) fn zeros(lm: &dyn LanguageModel, rows: i64, len: i64, window: Option<usize>) -> Result<Self> {
        let window = window.and_then(|n| i64::try_from(n).ok()).unwrap_or(len).min(len);
        let zeros = |dims: Dims| match dims {
            Dims::Attention { kv_heads, head_dim, .. } => {
                let options = (Kind::Float, lm.spec().placement.device);
                let zeros = || Tensor::f_zeros([rows, kv_heads, window, head_dim], options);
                Ok([zeros()?, zeros()?])
            }
            _ => Err(Error::unsupported("an attention site without heads", "those of controlgen")),
        };
        let all = lm.sites().of_kind(SiteKind::Attention).map(|(_, site)| zeros(site.dims));
        Ok(Self(all.collect::<Result<_>>()?))
    }

    /// The same, to differentiate by.
    pub(super) fn leaves(&self) -> Result<Self> {
        let leaf = |t: &Tensor| -> Result<Tensor> { Ok(t.f_detach_copy()?.f_set_requires_grad(true)?) };
        let all = self.0.iter().map(|[k, v]| Ok([leaf(k)?, leaf(v)?]));
        Ok(Self(all.collect::<Result<_>>()?))
    }

    /// A step down the gradient of the losses `[B]`, which the leaves are told of.
    pub(super) fn down(self, loss: &Tensor, step_size: f64, gamma: f64) -> Result<Self> {
        let not_differentiable = || Error::NotDifferentiable { what: "the loss of an attribute".into() };
        if !loss.requires_grad() {
            return Err(not_differentiable());
        }
        let leaves: Vec<&Tensor> = self.0.iter().flatten().collect();
        let gradients = Tensor::f_run_backward(&[&loss.f_sum(Kind::Float)?], &leaves, false, false)?;
        let _guard = tch::no_grad_guard();
        let mut next = Vec::with_capacity(self.0.len());
        for (pair, gradients) in iter::zip(self.0, gradients.chunks_exact(2)) {
            // A row's norm, of the layer's keys and values together.
            let square = |g: &Tensor| -> Result<Tensor> {
                if !g.defined() {
                    return Err(not_differentiable());
                }
                Ok(g.f_square()?.f_sum_dim_intlist([1, 2, 3].as_slice(), true, Kind::Float)?)
            };
            let norm =
                square(&gradients[0])?.f_add(&square(&gradients[1])?)?.f_sqrt()?.f_add_scalar(SMALL)?;
            let factor = norm.f_pow_tensor_scalar(-gamma)?.f_mul_scalar(-step_size)?; // (B, 1, 1, 1)
            let moved = |t: &Tensor, g: &Tensor| -> Result<Tensor> {
                // A gradient of 0, as of padding alone, is no step, whatever the factor is.
                let step = g.f_mul(&factor)?.f_masked_fill(&g.f_eq(0.0)?, 0.0)?;
                Ok(t.f_detach()?.f_add(&step)?)
            };
            let [k, v] = &pair;
            next.push([moved(k, &gradients[0])?, moved(v, &gradients[1])?]);
        }
        Ok(Self(next))
    }

    /// These changes, outside of `controls`; with a tap of the hidden states, if it is wanted.
    pub(super) fn over(
        &self,
        lm: &dyn LanguageModel,
        controls: Option<&Controls>,
        tap: bool,
    ) -> Result<Controls> {
        let own: Vec<Box<dyn Control>> = vec![self.control()];
        if tap {
            return hidden::tapped(lm, controls)?.with(lm.sites(), own);
        }
        match controls {
            Some(controls) => controls.with(lm.sites(), own),
            None => Controls::bind(lm.sites(), own),
        }
    }

    fn control(&self) -> Box<dyn Control> {
        let all = self.0.iter().map(|[k, v]| [k.shallow_clone(), v.shallow_clone()]);
        Box::new(Perturbation(all.collect()))
    }
}

/// The control that adds them.
struct Perturbation(Vec<[Tensor; 2]>);

impl Control for Perturbation {
    fn handle(&self) -> Box<dyn Control> {
        Deltas(self.0.iter().map(|[k, v]| [k.shallow_clone(), v.shallow_clone()]).collect()).control()
    }

    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        for (slot, (id, _)) in sites.of_kind(SiteKind::Attention).enumerate() {
            to.at(id, slot);
        }
        Ok(())
    }

    fn attention(&self, at: At<'_>, mut attn: Attn, next: Next<'_>) -> Result<Tensor> {
        let [dk, dv] = &self.0[at.slot];
        let (window, keys, new) = (dk.size()[2], attn.k.size()[2], attn.q.size()[2]);
        let add = |t: &Tensor, delta: &Tensor| -> Result<Tensor> {
            // The positions before the window, and the token that is read, stay.
            let all = delta.f_constant_pad_nd([0, 0, keys - new - window, new])?;
            Ok(t.f_add(&all.f_to_kind(t.f_kind()?)?)?)
        };
        (attn.k, attn.v) = (add(&attn.k, dk)?, add(&attn.v, dv)?);
        next.run(attn)
    }
}
