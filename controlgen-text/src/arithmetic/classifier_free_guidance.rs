//! Classifier-free guidance for language models.

use super::{Expression, Term};

/// Away from what the model would say without the prompt, or under a negative one, by γ = `guidance_scale`: Sanchez, Fan,
/// Spangher, Levi, Ammanamanchi and Biderman, "Stay on topic with Classifier-Free Guidance" (2023), equation 7; the scores
/// that transformers' `guidance_scale` gives.
///
/// ```text
/// log p̂(v)  =  log p(v | negative)  +  γ (log p(v | prompt) − log p(v | negative))
/// ```
///
/// γ = 1 is the model alone, and costs as much. Under the unprompted model read
/// [`last_token`](Term::last_token), which is what transformers does without a negative prompt, or
/// [`instead`](Term::instead) of it the token that begins a text.
///
/// *Cost*: two rows for one.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::TextModel;
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let guided = model.generate("Write about the sea. The").guidance_scale(2.0);
/// // " sea is my home. I am a sailor. I sail the seas. I have a ship. I have a crew", where the model says
/// // " sea is a place where the human imagination meets the ocean. It's a place where the boundaries between the
/// // physical and the"
/// println!("{:?}", guided.max_new_tokens(24).run()?.text());
/// # Ok(())
/// # }
/// ```
pub fn classifier_free_guidance(prompt: &Term, negative: &Term, guidance_scale: f64) -> Expression {
    guidance_scale * prompt + (1.0 - guidance_scale) * negative
}
