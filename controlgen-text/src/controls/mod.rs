//! Controls over the next token: the classical samplers, penalties and bans.
//!
//! Each is a [`TokenControl`](controlgen_core::TokenControl) that is checked when it is made and put into a stack as
//! it is; they act in the order in which they were added:
//!
//! ```
//! use controlgen_core::TokenControls;
//! use controlgen_text::controls::{NoRepeatNgram, Temperature, TopP};
//!
//! let controls = TokenControls::new()
//!     .with(NoRepeatNgram::new(3)?)
//!     .with(Temperature::new(0.8)?)
//!     .with(TopP::new(0.95)?);
//! # Ok::<(), controlgen_core::Error>(())
//! ```
//!
//! | control | keeps or changes | role |
//! |---|---|---|
//! | [`Temperature`] | divides the scores | proposal |
//! | [`TopK`] | the k most probable tokens | proposal |
//! | [`TopP`] | the fewest most probable tokens whose mass reaches p | proposal |
//! | [`MinP`] | tokens at least p times as probable as the best | proposal |
//! | [`Typical`] | tokens whose information is nearest to the entropy | proposal |
//! | [`EpsilonCutoff`], [`EtaCutoff`] | tokens above a probability, fixed or tied to the entropy | proposal |
//! | [`RepetitionPenalty`] | lowers tokens that occurred, by a factor | potential |
//! | [`FrequencyPresence`] | lowers generated tokens, by their count | potential |
//! | [`NoRepeatNgram`] | bans tokens that would complete an n-gram a second time | potential |
//! | [`Suppress`] | bans tokens | potential |
//! | [`BannedWords`] | bans tokens and sequences of tokens | potential |
//! | [`LogitBias`] | adds to the scores of tokens, and of sequences' last tokens | potential |
//! | [`Regularised`] | lowers tokens that spread the surprisal unevenly | potential |
//! | [`MinLength`] | bans the end of the text until it is long enough | potential |
//! | [`Features`] | adds what words are worth: word lists, lexicons, repetition, alliteration, length, syllables | potential |
//! | [`Watermark`] | raises tokens that a key and the tokens before pick | potential |
//! | [`ForcedPrefix`] | bans all but the given first tokens | potential |
//! | [`GumbelNoise`] | adds noise, so that a search for the best is a draw | proposal |
//! | [`Gedi`] | raises tokens by what language models of classes make of the text | potential |
//! | [`Fudge`] | raises the best tokens by what a discriminator expects of the whole text | potential |
//! | [`LexicalConstraints`] | bans what loses clauses over words and phrases, and leads to them | potential |
//!
//! What transformers' processors of the same names give is what these give, on rows of any history. Where several
//! tokens are tied, each control says what it does. A row of which nothing is left is all −∞; it is for the search
//! to report it ([`controlgen_core::Error::AllBanned`]). A row with a NaN keeps it.

/// Makes a control of a type with `fn shape(&self, logits: Tensor) -> Result<Tensor>`, which shapes the proposal and
/// remembers nothing.
macro_rules! proposal {
    ($control:ty) => {
        impl controlgen_core::TokenControl for $control {
            type State = ();

            fn start(&self, _prompts: &[Vec<i64>]) -> controlgen_core::Result<()> {
                Ok(())
            }

            fn score(&self, _state: &mut (), logits: tch::Tensor) -> controlgen_core::Result<tch::Tensor> {
                super::scores::dims(&logits)?;
                self.shape(logits)
            }

            fn advance(&self, _state: &mut (), _tokens: &[i64]) -> controlgen_core::Result<()> {
                Ok(())
            }

            fn role(&self) -> controlgen_core::Role {
                controlgen_core::Role::Proposal
            }

            fn bans(&self) -> controlgen_core::Bans {
                controlgen_core::Bans::NotTheLast
            }
        }
    };
}

mod banned_words;
mod check;
mod entropy;
mod epsilon_cutoff;
mod eta_cutoff;
pub mod features;
mod forced_prefix;
mod frequency_presence;
mod fudge;
mod gedi;
mod gumbel_noise;
mod lexical_constraints;
mod logit_bias;
mod mass;
mod min_length;
mod min_p;
mod no_repeat_ngram;
mod phrases;
mod regularised;
mod repetition_penalty;
mod scores;
mod suppress;
mod temperature;
mod top_k;
mod top_p;
mod typical;
mod watermark;

pub use banned_words::BannedWords;
pub use epsilon_cutoff::EpsilonCutoff;
pub use eta_cutoff::EtaCutoff;
pub use features::Features;
pub use forced_prefix::ForcedPrefix;
pub use frequency_presence::FrequencyPresence;
pub use fudge::{Fudge, FudgeState, FutureDiscriminator};
pub use gedi::{Gedi, GediState};
pub use gumbel_noise::GumbelNoise;
pub use lexical_constraints::LexicalConstraints;
pub use logit_bias::LogitBias;
pub use min_length::MinLength;
pub use min_p::MinP;
pub use no_repeat_ngram::NoRepeatNgram;
pub use regularised::{Regularised, Regulariser};
pub use repetition_penalty::RepetitionPenalty;
pub use suppress::Suppress;
pub use temperature::Temperature;
pub use top_k::TopK;
pub use top_p::TopP;
pub use typical::Typical;
pub use watermark::{Detection, Watermark, WatermarkDetector};

pub(crate) use scores::{ban_where, dims, in_vocabulary, to_vec};
