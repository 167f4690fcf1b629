//! Tokenizers: text to token ids and back, from a tokenizer.json, a Hugging Face directory or GGUF metadata.
//!
//! The `tokenizers` crate splits text; this module reads what stands around it (special tokens, chat templates),
//! gives the bytes of each token, and streams text out ([`TextStream`], [`StopStrings`]).

mod files;
#[cfg(feature = "gguf")]
mod gguf;
mod pieces;
mod save;
mod spellings;
mod stop;
mod stream;

use std::path::Path;
use std::sync::Arc;

use controlgen_core::{Error, Result};

use crate::chat::ChatTemplate;
use files::Side;
use pieces::{Decoding, Joiner};

pub use stop::{StopHit, StopStrings};
pub use stream::TextStream;

/// Whether [`Tokenizer::encode`] adds the special tokens that frame a text.
///
/// Special tokens that are spelled out in the text are recognised in both cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Add what the tokenizer's post-processor adds (often `<s>` in front): for raw text.
    Add,
    /// Keep the text as it is: for text that has its special tokens, such as a rendered chat template.
    Keep,
}

/// Turns text into token ids and back.
///
/// A clone (or [`handle`](Self::handle)) shares all data with the original. `Send` and `Sync`.
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    backend: tokenizers::Tokenizer,
    decoding: Decoding,
    side: Side,
    bos: Option<i64>,
    eos: Vec<i64>,
    pad: Option<i64>,
    /// One more than the highest id.
    size: i64,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.shared.size)
            .field("decoding", &self.shared.decoding)
            .field("bos", &self.shared.bos)
            .field("eos", &self.shared.eos)
            .field("pad", &self.shared.pad)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Opens a tokenizer.json, or the one in a Hugging Face directory.
    ///
    /// The files beside a `tokenizer.json` are read where they are present: tokenizer_config.json,
    /// special_tokens_map.json (special tokens, chat templates), chat_template.jinja,
    /// `additional_chat_templates/*.jinja`, and generation_config.json (the EOS ids). A file of any other name is
    /// read alone.
    ///
    /// Read as by transformers' `PreTrainedTokenizerFast`: which tokens frame a text is for tokenizer.json's
    /// post-processor to say (`add_bos_token` is not read), and its truncation and padding are left out. (For some
    /// models, transformers 5 has classes that keep only the vocabulary of a tokenizer.json.)
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::Format`] for one that is not JSON or not a tokenizer,
    /// [`Error::Config`] for a field that makes no sense, [`Error::Unsupported`] for a directory which has
    /// other tokenizer files only.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        if path.is_dir() && !file.exists() {
            for other in ["tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model"] {
                if path.join(other).exists() {
                    let what = format!("{}, without a tokenizer.json beside it,", path.join(other).display());
                    return Err(Error::unsupported(what, "tokenizer.json and GGUF metadata"));
                }
            }
        }
        let bytes = std::fs::read(&file).map_err(|source| Error::io(&file, source))?;
        let backend = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .map_err(|source| Error::format(&file, format!("not a tokenizer.json: {source}")))?;
        let side = match file.parent() {
            Some(folder) if file.file_name().is_some_and(|name| name == "tokenizer.json") => {
                Side::read(folder)?
            }
            _ => Side::default(),
        };
        Self::new(backend, side)
    }

    /// A tokenizer from its parts: adds the special tokens that the backend lacks, as transformers does.
    fn new(mut backend: tokenizers::Tokenizer, side: Side) -> Result<Self> {
        side.complete(&mut backend)?;
        let refused = |source| Error::value("tokenizer", "no truncation", source);
        backend.with_truncation(None).map_err(refused)?;
        backend.with_padding(None);
        let id = |role: &str| side.special(role).and_then(|token| backend.token_to_id(token)).map(i64::from);
        let bos = id("bos_token").or(side.bos_id);
        let pad = id("pad_token").or(side.pad_id);
        let eos = side.eos_ids.clone().unwrap_or_else(|| id("eos_token").into_iter().collect());
        let size = size(&backend);
        let decoder = serde_json::to_value(backend.get_decoder())
            .map_err(|source| Error::value("tokenizer decoder", "one that is written as JSON", source))?;
        let decoding = Decoding::of(&decoder);
        Ok(Self { shared: Arc::new(Shared { backend, decoding, side, bos, eos, pad, size }) })
    }

    /// Another handle on the same data; costs a reference count.
    #[must_use]
    pub fn handle(&self) -> Self {
        self.clone()
    }

    /// The token ids of `text`.
    ///
    /// A byte-level vocabulary that lacks some bytes (SmolLM2's lacks 21 control and invalid ones) drops characters
    /// that need them, as in transformers.
    ///
    /// # Errors
    /// [`Error::Value`] for text that the vocabulary cannot spell (only vocabularies without bytes and without an
    /// unknown token have such).
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<i64>> {
        let add = special == Special::Add;
        let encoding = guarded(|| self.shared.backend.encode_fast(text, add)).map_err(unspelled)?;
        Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
    }

    /// The token ids of several texts, computed in parallel.
    ///
    /// # Errors
    /// Those of [`encode`](Self::encode).
    pub fn encode_batch<S: AsRef<str>>(&self, texts: &[S], special: Special) -> Result<Vec<Vec<i64>>> {
        let texts: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        let add = special == Special::Add;
        let encodings = guarded(|| self.shared.backend.encode_batch_fast(texts, add)).map_err(unspelled)?;
        Ok(encodings.iter().map(|one| one.get_ids().iter().map(|&id| i64::from(id)).collect()).collect())
    }

    /// The text of `ids`; `skip_special` leaves special tokens out.
    ///
    /// Equal to the decoding of transformers, but for one case: where byte-fallback tokens (`<0xAB>`) in a row are
    /// not valid UTF-8, the `tokenizers` crate replaces all of them, valid characters included; here, as in
    /// SentencePiece itself, only the invalid bytes are replaced, by U+FFFD each. (Else, text that a stream gave
    /// out would have to be taken back.) transformers' `clean_up_tokenization_spaces`, which it ignores for
    /// BPE too, is not applied.
    ///
    /// # Errors
    /// [`Error::Value`] for an id that no token has.
    pub fn decode(&self, ids: &[i64], skip_special: bool) -> Result<String> {
        let Some(mut joiner) = Joiner::new(self.shared.decoding) else {
            let ids = ids.iter().map(|&id| Ok(self.token(id)?.0)).collect::<Result<Vec<_>>>()?;
            return guarded(|| self.shared.backend.decode(&ids, skip_special)).map_err(undecoded);
        };
        let mut out = String::new();
        for &id in ids {
            let (_, token) = self.token(id)?;
            if !(skip_special && self.is_special_text(&token)) {
                joiner.push(&token, &mut out);
            }
        }
        joiner.finish(&mut out);
        Ok(out)
    }

    /// One more than the highest token id. A model's logits may be wider, where its vocabulary was padded.
    pub fn vocab_size(&self) -> i64 {
        self.shared.size
    }

    /// The id of the token that is spelled `token` in the vocabulary (`Ġthe`, `▁the`, `<|im_end|>`).
    pub fn token_to_id(&self, token: &str) -> Option<i64> {
        self.shared.backend.token_to_id(token).map(i64::from)
    }

    /// How the token `id` is spelled in the vocabulary; `None` if there is no such id.
    pub fn id_to_token(&self, id: i64) -> Option<String> {
        self.shared.backend.id_to_token(u32::try_from(id).ok()?)
    }

    /// The bytes that the token `id` stands for inside a text: the byte-level spelling undone (`Ġthe` is ` the`),
    /// `<0xAB>` the byte AB, SentencePiece's `▁` a space. Special tokens stand for their spelling.
    ///
    /// `None` for an id that no token has, and for vocabularies where the text of a token depends on its neighbours
    /// (WordPiece). At the beginning of a text, SentencePiece drops the first space.
    pub fn token_bytes(&self, id: i64) -> Option<Vec<u8>> {
        self.shared.decoding.bytes(&self.id_to_token(id)?)
    }

    /// The token that begins a text, if the tokenizer has one.
    pub fn bos(&self) -> Option<i64> {
        self.shared.bos
    }

    /// The tokens that end a text: those of generation_config.json where it states them, else the tokenizer's.
    pub fn eos(&self) -> &[i64] {
        &self.shared.eos
    }

    /// The token that fills short rows of a batch, if the tokenizer has one.
    pub fn pad(&self) -> Option<i64> {
        self.shared.pad
    }

    /// Whether `id` is a special token: one which `skip_special` leaves out.
    pub fn is_special(&self, id: i64) -> bool {
        self.id_to_token(id).is_some_and(|token| self.is_special_text(&token))
    }

    /// The special tokens by their role, as the tokenizer's files name them: `("bos_token", "<s>")`.
    pub fn special_tokens(&self) -> impl Iterator<Item = (&str, &str)> {
        self.shared.side.roles.iter().map(|(role, token)| (role.as_str(), token.content.as_str()))
    }

    /// The chat template that came with the tokenizer, with its special tokens as variables; `None` if none came.
    ///
    /// # Errors
    /// [`Error::Template`] for a template that does not compile.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        let side = &self.shared.side;
        if side.templates.is_empty() {
            return Ok(None);
        }
        ChatTemplate::with_templates(side.templates.clone(), self.special_tokens()).map(Some)
    }

    fn decoding(&self) -> Decoding {
        self.shared.decoding
    }

    /// The token `id`, as the decoder wants it.
    fn token(&self, id: i64) -> Result<(u32, String)> {
        let known = u32::try_from(id).ok();
        known.and_then(|id| Some((id, self.shared.backend.id_to_token(id)?))).ok_or_else(|| {
            let expected = match self.shared.size {
                0 => "no id: the vocabulary is empty".to_owned(),
                size => format!("the id of a token, 0 ..= {}", size - 1),
            };
            Error::value("token id", expected, id)
        })
    }

    fn is_special_text(&self, token: &str) -> bool {
        self.shared.backend.get_added_vocabulary().is_special_token(token)
    }

    /// The `tokenizers` crate's decoding, for ids that exist and, where special tokens are skipped, are not special.
    fn decode_opaque(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.shared.backend.decode(ids, false)).map_err(undecoded)
    }
}

/// One more than the highest id.
fn size(backend: &tokenizers::Tokenizer) -> i64 {
    let count = u32::try_from(backend.get_vocab_size(true)).unwrap_or(u32::MAX);
    if (0..count).all(|id| backend.id_to_token(id).is_some()) {
        return i64::from(count);
    }
    // Ids with gaps: copies the vocabulary, which takes longer.
    backend.get_vocab(true).into_values().max().map_or(0, |last| i64::from(last) + 1)
}

/// Runs a part of the `tokenizers` crate, which panics where a tokenizer.json contradicts itself: on a merge longer
/// than every token, on a decoder that strips more than there is.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|cause| {
        let text = cause.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| cause.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(format!("the tokenizers crate panicked: {text}").into())
    })
}

#[allow(clippy::needless_pass_by_value)] // a `map_err` function
fn unspelled(source: tokenizers::Error) -> Error {
    Error::value("text", "text which the vocabulary can spell", source)
}

#[allow(clippy::needless_pass_by_value)]
fn undecoded(source: tokenizers::Error) -> Error {
    Error::value("token ids", "tokens which the decoder can join", source)
}
