//! Masked language models: p(token | tokens on both sides).

use tch::Tensor;

use crate::{LmSpec, Pass, Result, SiteMap, Tokens};

/// A masked language model, such as BERT or RoBERTa: it fills gaps, and its pseudo-likelihood is an energy
/// (Salazar et al. 2020; Mireshghallah et al. 2022). Differentiable in embeddings.
pub trait MaskedLm: Send {
    /// Another handle over the same weights and sites.
    fn handle(&self) -> Box<dyn MaskedLm>;

    /// What is known of it; `bos` and `eos` are the tokens that open and close a text (`[CLS]`, `[SEP]`).
    fn spec(&self) -> &LmSpec;

    /// The token that stands for a gap.
    fn mask(&self) -> i64;

    /// Where controls may act.
    fn sites(&self) -> &SiteMap;

    /// The table of token embeddings, `[V, D]`.
    fn embeddings(&self) -> &Tensor;

    /// The logits of each position, `[B, T, V]`, for ids `[B, T]` or embeddings `[B, T, D]`. `keep` is boolean
    /// `[B, T]`, false for padding; all true where `None`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Kind`](crate::Error::Kind),
    /// [`Error::Value`](crate::Error::Value) for a token id that is none,
    /// [`Error::Context`](crate::Error::Context) past the last position;
    /// [`Error::ForeignSites`](crate::Error::ForeignSites); the controls'.
    fn logits(&self, tokens: Tokens<'_>, keep: Option<&Tensor>, pass: &Pass<'_>) -> Result<Tensor>;
}
