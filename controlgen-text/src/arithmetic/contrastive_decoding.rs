//! Contrastive decoding: what an expert knows and an amateur does not.

use super::{Expression, Term};

/// What an expert finds more probable than an amateur, of the tokens that the expert finds plausible: Li, Holtzman, Fried,
/// Liang, Eisner, Hashimoto, Zettlemoyer and Lewis, "Contrastive Decoding: Open-ended Text Generation as Optimization" (ACL
/// 2023), equations 2 and 3.
///
/// ```text
/// score(v)  =  log p_exp(v) − log p_ama(v)    where p_exp(v) ≥ α max p_exp,  −∞ elsewhere
/// ```
///
/// The amateur is a smaller model; the expert's own [first layers](Term::first_layers); or the expert with less to read,
/// such as the [last token](Term::last_token). Its τ is the term's [temperature](Term::temperature). The paper's α is 0.1,
/// its τ 0.5 (GPT-2) or 1 (OPT), and the scores are searched by 5 beams.
///
/// *Cost*: the amateur's.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::{TextModel, arithmetic::contrastive_decoding};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let contrast = model.arithmetic(|m| Ok(contrastive_decoding(&m.prompt(), &m.last_token(), 0.1)))?;
/// let done = contrast.generate("The old library was").max_new_tokens(24).run()?;
/// // " repurposed as a museum and now it has become a hub for literary studies, and now the old library is also a", where
/// // the model says
/// // " a place where people could come to learn about the world around them. It was a place where they could learn about
/// // different"
/// println!("{:?}", done.text());
/// # Ok(())
/// # }
/// ```
pub fn contrastive_decoding(expert: &Term, amateur: &Term, alpha: f64) -> Expression {
    (expert - amateur).plausible(expert, alpha)
}

/// The form that does not forget the expert: O'Brien and Lewis, "Contrastive Decoding Improves Reasoning in Large Language
/// Models" (2023), section 2. Their α is 0.1, their β 0.5, the amateur's τ 1.
///
/// ```text
/// score(v)  =  (1 + β) z_exp(v) − β z_ama(v)    where z_exp(v) ≥ max z_exp + ln α,  −∞ elsewhere
/// ```
///
/// *Cost*: the amateur's.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::{TextModel, arithmetic::improved_contrastive_decoding};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let contrast = |m: &controlgen_text::TextTerms<'_>| {
///     Ok(improved_contrastive_decoding(&m.prompt(), &m.last_token(), 0.1, 0.5))
/// };
/// let done = model.arithmetic(contrast)?.generate("The old library was").max_new_tokens(24).run()?;
/// // " repurposed as a museum, but the new one was repurposed as a library. The old library was repurposed as"
/// println!("{:?}", done.text());
/// # Ok(())
/// # }
/// ```
pub fn improved_contrastive_decoding(expert: &Term, amateur: &Term, alpha: f64, beta: f64) -> Expression {
    ((1.0 + beta) * expert - beta * amateur).plausible(expert, alpha)
}
