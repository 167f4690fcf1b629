//! DExperts: an expert and an anti-expert.

use super::{Expression, Term};

/// Towards what an expert says and an anti-expert does not: Liu, Sap, Lu, Swayamdipta, Bhagavatula, Smith and Choi,
/// "DExperts: Decoding-Time Controlled Text Generation with Experts and Anti-Experts" (ACL 2021), equation 2. The paper's
/// experts are models of their own; the same model under two instructions serves too, in one call.
///
/// ```text
/// p̂(v)  =  softmax(z + α (z⁺ − z⁻))
/// ```
///
/// with the logits z, for which log-probabilities do as well. The paper's α are 2 (away from toxicity) and up to 3.2
/// (sentiment).
///
/// *Cost*: three rows for one, or three calls.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::{TextModel, arithmetic::dexperts};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let praising = model.arithmetic(|m| {
///     let good = m.after("A review that praises the film.\n\n")?;
///     let bad = m.after("A review that condemns the film.\n\n")?;
///     Ok(dexperts(&m.prompt(), &good, &bad, 2.0))
/// })?;
/// let done = praising.generate("The film was").max_new_tokens(24).run()?;
/// // " praised for its innovative approach to storytelling and its ability to tackle complex themes in a way that was
/// // both thought-provoking and", where the model says
/// // " a film about a young woman named Aria who is a 17-year-old girl who is a part"
/// println!("{:?}", done.text());
/// # Ok(())
/// # }
/// ```
pub fn dexperts(base: &Term, expert: &Term, anti_expert: &Term, alpha: f64) -> Expression {
    base + alpha * (expert - anti_expert)
}
