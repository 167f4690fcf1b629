//! Classifier-free guidance.

use super::{Branch, Guidance, Guided, Memory, Needs, Outputs, Step};
use crate::{Error, Prediction, Result};

/// ε = ε_u + s (ε_c − ε_u): away from the unconditional prediction, towards the conditional one. Ho & Salimans,
/// "Classifier-Free Diffusion Guidance" (2022), eq. 6 with s = 1 + w.
///
/// s = 1 is the conditional prediction to the bit, 0 the unconditional one. With several conditions
/// ([`Self::and`]) it is ε_u + Σ sᵢ (εᵢ − ε_u), their conjunction (Liu et al., "Compositional Visual Generation with
/// Composable Diffusion Models", 2022, eq. 11). Linear, hence the same in every parameterisation.
///
/// The difference of this to the guider's base is added to what earlier stages made, so that it may stand anywhere
/// among linear stages. Where it rests (`GuidanceInterval` of controlgen-guidance), the base remains: by custom
/// the conditional prediction.
///
/// *Cost*: a row a sample for each condition and one for the unconditional prediction, in one call.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassifierFreeGuidance {
    unconditional: Branch,
    terms: Vec<(Branch, f64)>,
}

impl ClassifierFreeGuidance {
    /// Condition 1 with scale s, away from condition 0. Usual scales are 1.5 to 10.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is no finite number.
    pub fn new(scale: f64) -> Result<Self> {
        let scale = finite(scale)?;
        Ok(Self { unconditional: Branch::of(0), terms: vec![(Branch::of(1), scale)] })
    }

    /// Other conditions of the guider: unconditional (or of a negative prompt), and conditional.
    #[must_use]
    pub fn of(mut self, unconditional: u32, conditional: u32) -> Self {
        self.unconditional = Branch::of(unconditional);
        self.terms[0].0 = Branch::of(conditional);
        self
    }

    /// One more condition, with a scale of its own.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is no finite number, or a condition that is already there.
    pub fn and(mut self, condition: u32, scale: f64) -> Result<Self> {
        let branch = Branch::of(condition);
        if self.terms.iter().any(|(term, _)| *term == branch) {
            return Err(Error::value("one more condition", "one not yet guided by", condition));
        }
        self.terms.push((branch, finite(scale)?));
        Ok(self)
    }
}

impl Guidance for ClassifierFreeGuidance {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(self.clone())
    }

    fn name(&self) -> &'static str {
        "classifier-free guidance"
    }

    fn needs(&self, _step: &Step) -> Needs {
        let terms = self.terms.iter().map(|(branch, _)| *branch);
        Needs::branches(std::iter::once(self.unconditional).chain(terms).collect::<Vec<_>>())
    }

    fn guide(&self, _step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let total: f64 = self.terms.iter().map(|(_, scale)| scale).sum();
        let mut parts = vec![(1.0, &so_far.prediction), (-1.0, out.base()?)];
        parts.push((1.0 - total, out.get(self.unconditional)?));
        for (branch, scale) in &self.terms {
            parts.push((*scale, out.get(*branch)?));
        }
        Ok(Guided { prediction: Prediction::combine(&parts)?, ..so_far })
    }
}

fn finite(scale: f64) -> Result<f64> {
    if scale.is_finite() { Ok(scale) } else { Err(Error::value("guidance scale", "a finite number", scale)) }
}
