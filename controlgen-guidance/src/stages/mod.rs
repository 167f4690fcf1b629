//! Stages of guidance, one a file.

mod classifier;
mod interval;
mod perturbed_attention;
mod universal;

pub use classifier::ClassifierGuidance;
pub use interval::GuidanceInterval;
pub use perturbed_attention::{IdentityAttention, PerturbedAttentionGuidance};
pub use universal::UniversalGuidance;
