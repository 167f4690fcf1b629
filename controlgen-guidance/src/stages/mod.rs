//! Stages of guidance, one a file.

mod classifier;
mod classifier_free;
mod interval;
mod perturbed_attention;
mod universal;

pub use classifier::ClassifierGuidance;
pub use classifier_free::ClassifierFreeGuidance;
pub use interval::GuidanceInterval;
pub use perturbed_attention::{IdentityAttention, PerturbedAttentionGuidance};
pub use universal::UniversalGuidance;
