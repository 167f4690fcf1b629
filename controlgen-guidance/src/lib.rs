//! # controlgen-guidance
//!
//! Controllable generation of images: guidance, attention edits, inversion and masks.
//!
//! Stages of guidance stack around a denoiser; the predictions that they need of one graph are one call:
//!
//! ```
//! use controlgen_core::guidance::Guider;
//! use controlgen_core::testing::{Component, Mixture, MixtureDenoiser};
//! use controlgen_core::{Condition, NoiseLevel, Parameterisation, Result};
//! use controlgen_guidance::{ClassifierFreeGuidance, ClassifierGuidance};
//!
//! # fn main() -> Result<()> {
//! let part = |x: f64, class| Component { mean: vec![x], deviation: 0.3, weight: 1.0, class };
//! let data = Mixture::new([1, 1, 1], vec![part(-2.0, 0), part(2.0, 1), part(4.0, 1)])?;
//! let right_most = data.with_classes(&[0, 0, 1])?.noised_classifier(1)?;
//! let model = MixtureDenoiser::new(data, Parameterisation::Velocity, NoiseLevel::from_flow)?;
//! // Condition 0 is the unconditional model, 1 what is asked for, and the base.
//! let conditions = vec![vec![Condition::Null], vec![Condition::Class(1)]];
//! let guider = Guider::new(Box::new(model), conditions, None, 1)?
//!     .with(ClassifierFreeGuidance::new(3.0)?)
//!     .with(ClassifierGuidance::new(right_most, 1.0)?);
//! # let _ = guider;
//! # Ok(())
//! # }
//! ```

mod attention_edits;
mod check;
mod energies;
mod stages;

pub use attention_edits::{Edit, PromptToPrompt};
/// The stage that pipelines use too.
pub use controlgen_core::guidance::ClassifierFreeGuidance;
pub use energies::class_energy;
pub use stages::{
    ClassifierGuidance, GuidanceInterval, IdentityAttention, PerturbedAttentionGuidance, UniversalGuidance,
};
