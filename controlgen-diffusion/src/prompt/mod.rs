//! Prompts, and what denoisers are told of them.

mod clip;
#[cfg(feature = "text")]
mod t5;
mod tokenizer;
mod weighting;

use controlgen_core::Result;
use tch::Tensor;

pub use clip::{ClipPairPrompt, ClipPrompt, LongPrompts};
#[cfg(feature = "text")]
pub use t5::T5Prompt;
pub use tokenizer::ClipTokenizer;
pub use weighting::{Weighted, apply_weights, parse_weights};

/// Text to the conditions of a denoiser: a tokenizer and one encoder or more.
///
/// All prompts of a run, the negative ones among them, are encoded together, so that they come out equally long.
pub trait PromptEncoder: Send {
    /// Another handle over the same weights.
    fn handle(&self) -> Box<dyn PromptEncoder>;

    /// What is encoded of each prompt.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for no prompts; the encoders'.
    fn encode(&self, prompts: &[&str]) -> Result<Vec<EncodedPrompt>>;
}

/// What was encoded of a prompt.
#[derive(Debug)]
pub struct EncodedPrompt {
    /// Features by diffusers' names, without a batch dimension: `encoder_hidden_states` `[T, D]`, `text_embeds` `[P]`.
    pub features: Vec<(String, Tensor)>,
    /// The end of the prompt that was not read, where it is too long for the encoder.
    pub truncated: Option<String>,
}
