//! Encoders: text or images to features.

use tch::Tensor;

use crate::{Pass, Placement, Result, SiteMap, Tokens, WeightMap};

/// What is known of an encoder without running it.
#[derive(Clone, Debug)]
pub struct EncoderSpec {
    /// The architecture, as `model_type` in Hugging Face's config.json names it.
    pub architecture: String,
    /// D: width of the features of a position.
    pub width: i64,
    /// P: width of the pooled feature, if it gives one.
    pub pooled: Option<i64>,
    /// What it reads.
    pub reads: Reads,
    /// Where the model runs.
    pub placement: Placement,
}

/// What an encoder reads.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reads {
    /// Tokens.
    Text {
        /// How many tokens there are to know.
        vocab: i64,
        /// How many positions the model was made for; as many as wanted where `None`.
        context: Option<i64>,
    },
    /// Images.
    Image {
        /// Channels.
        channels: i64,
        /// Height and width.
        size: [i64; 2],
    },
}

/// What an encoder is given.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum EncoderInput<'a> {
    /// Text.
    Text {
        /// Ids `[B, T]`, or embeddings `[B, T, D]`: soft tokens, textual inversion.
        tokens: Tokens<'a>,
        /// Boolean `[B, T]`, false for padding; all true where `None`.
        keep: Option<&'a Tensor>,
    },
    /// Images `[B, C, H, W]` of the encoder's size, pixels in −1 ..= 1 before the encoder's own normalisation.
    Image(&'a Tensor),
}

/// What an encoder makes of its input.
#[derive(Debug)]
pub struct Features {
    /// Of each position, `[B, T, D]`.
    pub hidden: Tensor,
    /// Of the whole, `[B, P]`: projected, where the model has a projection, but not normalised.
    pub pooled: Option<Tensor>,
}

/// An encoder of text or images, such as CLIP's two, T5's, or BERT. Differentiable in embeddings and pixels.
pub trait Encoder: Send {
    /// Another handle over the same weights and sites.
    fn handle(&self) -> Box<dyn Encoder>;

    /// What is known of it.
    fn spec(&self) -> &EncoderSpec;

    /// Where controls may act.
    fn sites(&self) -> &SiteMap;

    /// The table of token embeddings `[V, D]`, of an encoder of text.
    fn embeddings(&self) -> Option<&Tensor>;

    /// Encodes.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for an input that it does not read;
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Value`](crate::Error::Value) for a token id that is none,
    /// [`Error::Context`](crate::Error::Context) past the last position;
    /// [`Error::ForeignSites`](crate::Error::ForeignSites); the controls'.
    fn encode(&self, input: EncoderInput<'_>, pass: &Pass<'_>) -> Result<Features>;

    /// A handle in which the weights that `f` answers for are replaced and all others shared.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a weight of another shape; `f`'s own.
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Encoder>>;
}
