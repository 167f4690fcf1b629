//! Perturbed-attention guidance.

use controlgen_core::guidance::{Branch, Guided, Memory, Needs, Outputs, Step};
use controlgen_core::{
    At, Attn, Binding, Control, Dims, Error, Guidance, Next, Prediction, Result, SiteKind, SiteMap,
};
use tch::Tensor;

use crate::check;

/// ε + s (ε_c − ε_p): away from the prediction of the same model with spoilt self-attention, whose structure has
/// collapsed. Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance" (2024); with
/// classifier-free guidance both differences add up.
///
/// The spoilt prediction is a variant lane: [`IdentityAttention`] among the guider's controls acts on the rows of that
/// variant alone, so that it costs rows and no call. Any other control that goes by lanes will do as well (skipped
/// layers, dropped tokens); one that cannot gets a graph of its own ([`Self::of`]).
///
/// *Cost*: one more row a sample, two where nothing else needs ε_c.
#[derive(Clone, Debug, PartialEq)]
pub struct PerturbedAttentionGuidance {
    plain: Branch,
    perturbed: Branch,
    scale: f64,
}

impl PerturbedAttentionGuidance {
    /// Condition 1, away from its variant 1. The paper's scales are 1 to 5.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is no finite number.
    pub fn new(scale: f64) -> Result<Self> {
        let scale = check::finite("guidance scale", scale)?;
        Ok(Self { plain: Branch::of(1), perturbed: Branch::of(1).variant(1), scale })
    }

    /// Another condition, variant or graph: away from `perturbed`, from the plain branch of the same condition.
    ///
    /// # Errors
    /// [`Error::Value`] for a branch that is the plain one.
    pub fn of(self, perturbed: Branch) -> Result<Self> {
        let plain = Branch::of(perturbed.condition);
        if perturbed == plain {
            return Err(Error::value(
                "perturbed branch",
                "another variant or graph than 0",
                "the plain branch",
            ));
        }
        Ok(Self { plain, perturbed, ..self })
    }
}

impl Guidance for PerturbedAttentionGuidance {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(self.clone())
    }

    fn name(&self) -> &'static str {
        "perturbed-attention guidance"
    }

    fn needs(&self, _step: &Step) -> Needs {
        Needs::branches([self.plain, self.perturbed])
    }

    fn guide(&self, _step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let (plain, perturbed) = (out.get(self.plain)?, out.get(self.perturbed)?);
        let parts = [(1.0, &so_far.prediction), (self.scale, plain), (-self.scale, perturbed)];
        Ok(Guided { prediction: Prediction::combine(&parts)?, ..so_far })
    }
}

/// Self-attention in which every position sees itself alone: the map is the identity, and what comes out is v. On the
/// rows of one variant, or on all (Ahn et al. 2024).
///
/// *Cost*: the rows of the variant compute no attention; the others are gathered and put back.
#[derive(Clone, Debug, PartialEq)]
pub struct IdentityAttention {
    selector: String,
    variant: Option<u8>,
}

impl IdentityAttention {
    /// At the attention sites that `selector` matches ([`SiteMap::select`]), on rows of variant 1.
    pub fn new(selector: impl Into<String>) -> Self {
        Self { selector: selector.into(), variant: Some(1) }
    }

    /// On rows of another variant.
    #[must_use]
    pub fn variant(self, variant: u8) -> Self {
        Self { variant: Some(variant), ..self }
    }

    /// On all rows: for a graph of its own.
    #[must_use]
    pub fn all_rows(self) -> Self {
        Self { variant: None, ..self }
    }
}

impl Control for IdentityAttention {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.clone())
    }

    /// # Errors
    /// [`Error::NoSite`]; [`Error::Unsupported`] for cross-attention, which has no identity.
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        for site in sites.select(SiteKind::Attention, &self.selector)? {
            if let Some(at) = sites.get(site)
                && matches!(at.dims, Dims::Attention { cross: true, .. })
            {
                let what = format!("identity attention at `{}`, a cross-attention,", at.name);
                return Err(Error::unsupported(what, "self-attention"));
            }
            to.at(site, 0);
        }
        Ok(())
    }

    fn attention(&self, at: At<'_>, attn: Attn, next: Next<'_>) -> Result<Tensor> {
        let lanes = at.pass.lanes.map_or(&[][..], |lanes| lanes.rows());
        let rows: Vec<i64> = match self.variant {
            None => (0..attn.q.size4()?.0).collect(),
            Some(variant) => {
                let of_variant = (0..).zip(lanes).filter(|(_, lane)| lane.variant == variant);
                of_variant.map(|(row, _)| row).collect()
            }
        };
        if rows.is_empty() {
            return next.run(attn);
        }
        let ((batch, heads, tq, _), (_, kv_heads, tk, _)) = (attn.q.size4()?, attn.v.size4()?);
        if tq != tk || kv_heads == 0 || heads % kv_heads != 0 {
            let expected = format!("[{batch}, a divisor of {heads}, {tq}, head_dim], as self-attention has");
            return Err(Error::shape("values of identity attention", expected, &attn.v.size()));
        }
        let v = attn.v.f_repeat_interleave_self_int(heads.div_euclid(kv_heads), 1, None)?; // (B, heads, T, d)
        if i64::try_from(rows.len()) == Ok(batch) {
            return Ok(v);
        }
        let others: Vec<i64> = (0..batch).filter(|row| !rows.contains(row)).collect();
        let attended = next.run_rows(&others, attn.select(&others)?)?;
        Ok(v.f_index_copy(0, &Tensor::f_from_slice(&others)?.f_to_device(v.device())?, &attended)?)
    }
}
