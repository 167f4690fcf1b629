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
pub fn dexperts(base: &Term, expert: &Term, anti_expert: &Term, alpha: f64) -> Expression {
    base + alpha * (expert - anti_expert)
}
