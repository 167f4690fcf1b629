//! Prompts of Stable Diffusion: read by one CLIP, or two.

use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, Weights};
use controlgen_core::{Config, Controls, Error, Pass, Placement, Result, Tokens};
use tch::{Kind, Tensor};

use super::weighting::{apply_weights, parse_weights};
use super::{ClipTokenizer, EncodedPrompt, PromptEncoder};
use crate::models::{ClipLayer, ClipText, ClipTextInput};

/// What becomes of a prompt that is longer than an encoder's positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LongPrompts {
    /// The rest is left out, and said ([`EncodedPrompt::truncated`]): diffusers.
    #[default]
    Truncate,
    /// It is encoded in chunks of 75 tokens, each framed, and their states follow each other: AUTOMATIC1111's web
    /// interface. All prompts get as many chunks as the longest; the pooled feature is the first chunk's.
    Chunks,
}

/// A prompt by one CLIP: `encoder_hidden_states` `[T, D]`, as Stable Diffusion 1 and 2 read them. T is the encoder's
/// positions, 77, or a multiple of them.
///
/// ```no_run
/// use controlgen_core::Placement;
/// use controlgen_diffusion::prompt::{ClipPrompt, LongPrompts, PromptEncoder};
///
/// # fn main() -> controlgen_core::Result<()> {
/// let prompts = ClipPrompt::open("stable-diffusion", Placement::CPU)?
///     .with_weights()
///     .with_long(LongPrompts::Chunks);
/// let encoded = prompts.encode(&["a (red:1.3) house", ""])?;
/// # Ok(())
/// # }
/// ```
pub struct ClipPrompt {
    tokenizer: ClipTokenizer,
    encoder: ClipText,
    controls: Option<Controls>,
    layer: ClipLayer,
    weights: bool,
    long: LongPrompts,
    embeds: bool,
}

/// What one CLIP makes of all prompts.
struct Encoded {
    /// `[T, D]` each.
    hidden: Vec<Tensor>,
    /// `[P]` each.
    pooled: Vec<Tensor>,
    /// Boolean `[T]` each.
    keep: Vec<Tensor>,
    truncated: Vec<Option<String>>,
}

/// The tokens of a prompt and the weight of each.
#[derive(Default)]
struct Read {
    ids: Vec<i64>,
    weights: Vec<f64>,
    truncated: Option<String>,
}

impl ClipPrompt {
    /// With a tokenizer and an encoder. The states are the last ones, brackets are characters, what is too long is left
    /// out.
    ///
    /// # Errors
    /// [`Error::Value`] for a tokenizer whose tokens or positions are more than the encoder's.
    pub fn new(tokenizer: ClipTokenizer, encoder: ClipText) -> Result<Self> {
        let (vocab, positions) = (encoder.config().vocab_size, encoder.config().max_position_embeddings);
        let most = tokenizer.bos().max(tokenizer.eos()).max(tokenizer.pad());
        if most >= vocab {
            return Err(Error::value("special tokens", format!("0 .. {vocab}, the encoder's"), most));
        }
        if i64::try_from(tokenizer.context()).map_or(true, |context| context > positions) {
            return Err(Error::value(
                "positions of the tokenizer",
                format!("<= {positions}"),
                tokenizer.context(),
            ));
        }
        let (layer, long) = (ClipLayer::LAST, LongPrompts::Truncate);
        Ok(Self { tokenizer, encoder, controls: None, layer, weights: false, long, embeds: false })
    }

    /// Opens `tokenizer` and `text_encoder` of a pipeline's directory.
    ///
    /// # Errors
    /// Those of [`ClipTokenizer::open`] and [`ClipText::load`].
    pub fn open(directory: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        Self::open_named(directory.as_ref(), ["tokenizer", "text_encoder"], placement)
    }

    fn open_named(directory: &Path, names: [&str; 2], placement: Placement) -> Result<Self> {
        let [tokenizer, encoder] = names.map(|name| directory.join(name));
        let config = Config::open(&encoder.join("config.json"))?;
        let source = Safetensors::open(&encoder)?;
        let encoder = ClipText::load(&config, &Weights::new(&source, placement.options()), placement)?;
        Self::new(ClipTokenizer::open(tokenizer)?, encoder)
    }

    /// With the states of this layer.
    #[must_use]
    pub fn with_layer(self, layer: ClipLayer) -> Self {
        Self { layer, ..self }
    }

    /// diffusers' `clip_skip`: without the last `n` blocks, but through the final norm. It is so for negative prompts too,
    /// where diffusers reads the last block's states.
    #[must_use]
    pub fn with_clip_skip(self, n: usize) -> Self {
        self.with_layer(ClipLayer { before_last: n, norm: true })
    }

    /// Reads weights of words, `(word:1.3)`, as [`parse_weights`] does, and applies them to the states by
    /// [`apply_weights`], chunk by chunk.
    #[must_use]
    pub fn with_weights(self) -> Self {
        Self { weights: true, ..self }
    }

    /// Does this with long prompts.
    #[must_use]
    pub fn with_long(self, long: LongPrompts) -> Self {
        Self { long, ..self }
    }

    /// Gives `text_embeds` `[P]`, the pooled feature, and `attention_mask` `[T]`, boolean, false for padding, besides: what
    /// unCLIP's prior reads.
    #[must_use]
    pub fn with_embeds(self) -> Self {
        Self { embeds: true, ..self }
    }

    /// Under these controls, bound to the encoder's sites.
    ///
    /// # Errors
    /// [`Error::ForeignSites`] for another model's.
    pub fn with_controls(self, controls: Controls) -> Result<Self> {
        use controlgen_core::Encoder as _;
        Pass::with_controls(&controls).check_sites(self.encoder.sites())?;
        Ok(Self { controls: Some(controls), ..self })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &ClipTokenizer {
        &self.tokenizer
    }

    /// The encoder.
    pub fn encoder(&self) -> &ClipText {
        &self.encoder
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            tokenizer: self.tokenizer.clone(),
            encoder: self.encoder.share(),
            controls: self.controls.as_ref().map(Controls::handle),
            ..*self
        }
    }

    /// How many tokens a chunk has beside its frame: 75.
    fn room(&self) -> usize {
        self.tokenizer.context() - 2
    }

    fn read(&self, prompt: &str) -> Result<Read> {
        let mut read = Read::default();
        if self.weights {
            for part in parse_weights(prompt) {
                let ids = self.tokenizer.encode(&part.text)?;
                read.weights.extend(std::iter::repeat_n(part.weight, ids.len()));
                read.ids.extend(ids);
            }
        } else {
            read.ids = self.tokenizer.encode(prompt)?;
            read.weights = vec![1.0; read.ids.len()];
        }
        if self.long == LongPrompts::Truncate && read.ids.len() > self.room() {
            read.truncated = Some(self.tokenizer.decode(&read.ids[self.room()..])?);
            read.ids.truncate(self.room());
            read.weights.truncate(self.room());
        }
        Ok(read)
    }

    /// How many chunks these prompts need: as many as the longest.
    fn chunks(&self, prompts: &[&str]) -> Result<usize> {
        let longest =
            prompts.iter().map(|prompt| Ok(self.read(prompt)?.ids.len())).collect::<Result<Vec<_>>>()?;
        Ok(longest.into_iter().max().unwrap_or(0).div_ceil(self.room()).max(1))
    }

    /// All prompts, in so many chunks each.
    fn run(&self, prompts: &[&str], chunks: usize) -> Result<Encoded> {
        let read = prompts.iter().map(|prompt| self.read(prompt)).collect::<Result<Vec<_>>>()?;
        let (context, room) = (self.tokenizer.context(), self.room());
        let (mut ids, mut weights, mut keep) = (Vec::new(), Vec::new(), Vec::new());
        for prompt in &read {
            for chunk in 0..chunks {
                let from = (chunk * room).min(prompt.ids.len());
                let to = (from + room).min(prompt.ids.len());
                ids.extend(self.tokenizer.framed(&prompt.ids[from..to]));
                keep.extend(std::iter::repeat_n(true, to - from + 2));
                keep.extend(std::iter::repeat_n(false, room - (to - from)));
                weights.push(1.0);
                weights.extend(&prompt.weights[from..to]);
                weights.extend(std::iter::repeat_n(1.0, context - 1 - (to - from)));
            }
        }
        let (rows, t) =
            (i64::try_from(prompts.len() * chunks).unwrap_or(0), i64::try_from(context).unwrap_or(0));
        let device = self.encoder.placement().device;
        let ids = Tensor::f_from_slice(&ids)?.f_view([rows, t])?.f_to_device(device)?;
        let _no_gradients = tch::no_grad_guard();
        let pass = Pass { controls: self.controls.as_ref(), ..Pass::default() };
        let input = ClipTextInput { layer: self.layer, ..ClipTextInput::new(Tokens::Ids(&ids), None) };
        let features = self.encoder.forward(input, &pass)?;
        let mut hidden = features.hidden; // (prompts · chunks, T, D)
        if self.weights {
            let weights = Tensor::f_from_slice(&weights)?.f_view([rows, t])?;
            hidden = apply_weights(&hidden, &weights.f_to_kind(Kind::Float)?)?;
        }
        let each = i64::try_from(chunks).unwrap_or(1);
        let width = hidden.size()[2];
        let hidden = hidden.f_view([-1, each * t, width])?;
        let pooled = features
            .pooled
            .ok_or_else(|| Error::unsupported("a CLIP that pools nothing", "one that pools"))?;
        let pooled = pooled.f_view([-1, each, pooled.size()[1]])?.f_select(1, 0)?;
        Ok(Encoded {
            hidden: hidden.f_unbind(0)?,
            pooled: pooled.f_unbind(0)?,
            keep: Tensor::f_from_slice(&keep)?.f_view([-1, each * t])?.f_to_device(device)?.f_unbind(0)?,
            truncated: read.into_iter().map(|prompt| prompt.truncated).collect(),
        })
    }
}

fn at_least_one(prompts: &[&str]) -> Result<()> {
    if prompts.is_empty() { Err(Error::value("prompts", "at least one", 0)) } else { Ok(()) }
}

impl PromptEncoder for ClipPrompt {
    fn handle(&self) -> Box<dyn PromptEncoder> {
        Box::new(self.share())
    }

    fn encode(&self, prompts: &[&str]) -> Result<Vec<EncodedPrompt>> {
        at_least_one(prompts)?;
        let encoded = self.run(prompts, self.chunks(prompts)?)?;
        let one = |((hidden, truncated), (pooled, keep))| {
            let mut features = vec![("encoder_hidden_states".to_owned(), hidden)];
            if self.embeds {
                features.extend([("text_embeds".to_owned(), pooled), ("attention_mask".to_owned(), keep)]);
            }
            EncodedPrompt { features, truncated }
        };
        let besides = encoded.pooled.into_iter().zip(encoded.keep);
        Ok(encoded.hidden.into_iter().zip(encoded.truncated).zip(besides).map(one).collect())
    }
}

/// A prompt by two CLIPs, as Stable Diffusion XL reads it (Podell et al., "SDXL", 2023): `encoder_hidden_states`
/// `[T, D₁ + D₂]`, the penultimate states of both beside each other, and `text_embeds` `[P]`, the projected feature of the
/// second.
pub struct ClipPairPrompt {
    first: ClipPrompt,
    second: ClipPrompt,
}

impl ClipPairPrompt {
    /// With these two, each with its own settings, layers among them.
    ///
    /// # Errors
    /// [`Error::Value`] for two that give different numbers of positions, or a second one that does not project.
    pub fn new(first: ClipPrompt, second: ClipPrompt) -> Result<Self> {
        let (a, b) = (first.tokenizer.context(), second.tokenizer.context());
        if a != b {
            return Err(Error::value("positions of the second tokenizer", a, b));
        }
        if !second.encoder.projects() {
            return Err(Error::value("the second encoder", "one with text_projection", "one without"));
        }
        Ok(Self { first, second })
    }

    /// Opens `tokenizer`, `text_encoder`, `tokenizer_2` and `text_encoder_2` of a pipeline's directory.
    ///
    /// # Errors
    /// Those of [`ClipPrompt::open`] and [`Self::new`].
    pub fn open(directory: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let open = |names| -> Result<ClipPrompt> {
            let prompt = ClipPrompt::open_named(directory.as_ref(), names, placement)?;
            Ok(prompt.with_layer(ClipLayer::PENULTIMATE))
        };
        Self::new(open(["tokenizer", "text_encoder"])?, open(["tokenizer_2", "text_encoder_2"])?)
    }

    fn both(self, f: impl Fn(ClipPrompt) -> ClipPrompt) -> Self {
        Self { first: f(self.first), second: f(self.second) }
    }

    /// diffusers' `clip_skip`, which counts from the penultimate states on; of negative prompts too, unlike there.
    #[must_use]
    pub fn with_clip_skip(self, n: usize) -> Self {
        self.both(|prompt| prompt.with_layer(ClipLayer { before_last: n + 1, norm: false }))
    }

    /// As [`ClipPrompt::with_weights`].
    #[must_use]
    pub fn with_weights(self) -> Self {
        self.both(ClipPrompt::with_weights)
    }

    /// As [`ClipPrompt::with_long`].
    #[must_use]
    pub fn with_long(self, long: LongPrompts) -> Self {
        self.both(|prompt| prompt.with_long(long))
    }
}

impl PromptEncoder for ClipPairPrompt {
    fn handle(&self) -> Box<dyn PromptEncoder> {
        Box::new(Self { first: self.first.share(), second: self.second.share() })
    }

    fn encode(&self, prompts: &[&str]) -> Result<Vec<EncodedPrompt>> {
        at_least_one(prompts)?;
        // The two vocabularies need not split a prompt into as many tokens.
        let chunks = self.first.chunks(prompts)?.max(self.second.chunks(prompts)?);
        let (first, second) = (self.first.run(prompts, chunks)?, self.second.run(prompts, chunks)?);
        let states = first.hidden.iter().zip(&second.hidden);
        let states = states.map(|(a, b)| Ok(Tensor::f_cat(&[a, b], -1)?)).collect::<Result<Vec<_>>>()?;
        let truncated = first.truncated.into_iter().zip(second.truncated).map(|(a, b)| a.or(b));
        let one = |((hidden, pooled), truncated)| EncodedPrompt {
            features: vec![("encoder_hidden_states".to_owned(), hidden), ("text_embeds".to_owned(), pooled)],
            truncated,
        };
        Ok(states.into_iter().zip(second.pooled).zip(truncated).map(one).collect())
    }
}
