//! Prompts of DeepFloyd IF: read by T5.

use std::path::Path;

use controlgen_core::{Encoder, EncoderInput, Error, Pass, Placement, Reads, Result, Tokens};
use controlgen_text::models::open_encoder;
use controlgen_text::tokenizer::{Special, Tokenizer};
use tch::Tensor;

use super::{EncodedPrompt, PromptEncoder};

/// A prompt by the encoder of T5 (Raffel et al. 2020): `encoder_hidden_states` `[T, D]`, as Imagen and DeepFloyd IF read
/// them. Texts are lower-cased, white space around them left out, ended by the tokenizer's end and padded to T positions,
/// which the encoder does not see, though it says something of them. What is too long is left out, and said. That is what
/// diffusers does with `clean_caption=False`: with its default, where two more packages are installed, it also takes
/// addresses, markup and special characters out.
pub struct T5Prompt {
    tokenizer: Tokenizer,
    encoder: Box<dyn Encoder>,
    length: usize,
    eos: i64,
    pad: i64,
}

impl T5Prompt {
    /// With a tokenizer and an encoder of its tokens, in 77 positions.
    ///
    /// # Errors
    /// [`Error::Value`] for a tokenizer without an end or a padding token, or with more tokens than the encoder knows;
    /// [`Error::Unsupported`] for an encoder of images.
    pub fn new(tokenizer: Tokenizer, encoder: Box<dyn Encoder>) -> Result<Self> {
        let Reads::Text { vocab, .. } = encoder.spec().reads else {
            return Err(Error::unsupported("an encoder of images for prompts", "an encoder of text"));
        };
        let (Some(&eos), Some(pad)) = (tokenizer.eos().first(), tokenizer.pad()) else {
            return Err(Error::value("special tokens of the tokenizer", "an end and a padding", "not both"));
        };
        if eos.max(pad) >= vocab {
            return Err(Error::value("special tokens", format!("0 .. {vocab}, the encoder's"), eos.max(pad)));
        }
        Ok(Self { tokenizer, encoder, length: 77, eos, pad })
    }

    /// Opens `tokenizer` (a tokenizer.json) and `text_encoder` of a pipeline's directory.
    ///
    /// # Errors
    /// Those of [`Tokenizer::open`] and [`open_encoder`].
    pub fn open(directory: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let directory = directory.as_ref();
        let tokenizer = Tokenizer::open(directory.join("tokenizer"))?;
        Self::new(tokenizer, open_encoder(&directory.join("text_encoder"), placement)?)
    }

    /// In so many positions.
    ///
    /// # Errors
    /// [`Error::Value`] for none.
    pub fn with_length(self, length: usize) -> Result<Self> {
        if length == 0 {
            return Err(Error::value("positions of a prompt", ">= 1", length));
        }
        Ok(Self { length, ..self })
    }
}

impl PromptEncoder for T5Prompt {
    fn handle(&self) -> Box<dyn PromptEncoder> {
        Box::new(Self { tokenizer: self.tokenizer.handle(), encoder: (*self.encoder).handle(), ..*self })
    }

    fn encode(&self, prompts: &[&str]) -> Result<Vec<EncodedPrompt>> {
        if prompts.is_empty() {
            return Err(Error::value("prompts", "at least one", 0));
        }
        let (mut ids, mut keep, mut truncated) = (Vec::new(), Vec::new(), Vec::new());
        for prompt in prompts {
            let mut own = self.tokenizer.encode(prompt.to_lowercase().trim(), Special::Keep)?;
            let rest = own.split_off(own.len().min(self.length - 1));
            let rest = if rest.is_empty() { None } else { Some(self.tokenizer.decode(&rest, false)?) };
            truncated.push(rest);
            own.push(self.eos);
            let used = own.len();
            own.resize(self.length, self.pad);
            ids.extend(own);
            keep.extend((0..self.length).map(|position| position < used));
        }
        let shape = [i64::try_from(prompts.len()).unwrap_or(0), i64::try_from(self.length).unwrap_or(0)];
        let device = self.encoder.spec().placement.device;
        let ids = Tensor::f_from_slice(&ids)?.f_view(shape)?.f_to_device(device)?;
        let keep = Tensor::f_from_slice(&keep)?.f_view(shape)?.f_to_device(device)?;
        let _no_gradients = tch::no_grad_guard();
        let input = EncoderInput::Text { tokens: Tokens::Ids(&ids), keep: Some(&keep) };
        let hidden = self.encoder.encode(input, &Pass::default())?.hidden; // (B, T, D)
        let one = |(hidden, truncated)| EncodedPrompt {
            features: vec![("encoder_hidden_states".to_owned(), hidden)],
            truncated,
        };
        Ok(hidden.f_unbind(0)?.into_iter().zip(truncated).map(one).collect())
    }
}
