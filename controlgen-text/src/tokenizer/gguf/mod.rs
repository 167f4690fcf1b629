//! Tokenizers from GGUF metadata (`tokenizer.ggml.*`).
//!
//! A GGUF file states the vocabulary, the merges or scores, and the *name* of the pre-tokenizer; what the name means
//! is agreed upon outside the file. Two models are read: `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE with
//! byte fallback).

mod parts;

use std::collections::{BTreeMap, HashMap, HashSet};

use controlgen_core::gguf::{Gguf, Metadata};
use controlgen_core::{Error, Result};
use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;

use super::Tokenizer;
use super::files::Side;
use parts::{LLAMA3, Parts};

/// The longest ordinary token of a SentencePiece vocabulary, in bytes: finding its merges costs the square of it.
const LONGEST_PIECE: usize = 1024;

/// What kind of token each one is, as GGUF numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Tokenizer {
    /// The tokenizer in the metadata of a GGUF file, with its chat template.
    ///
    /// The pre-tokenizers known are `gpt-2` (also `default`), `smollm` (also `starcoder`, `refact`, `command-r`),
    /// `llama-bpe` and `qwen2` for the model `gpt2`; the model `llama` has none.
    ///
    /// # Errors
    /// [`Error::Config`] for metadata that is missing or makes no sense, [`Error::Unsupported`] for another
    /// tokenizer model or pre-tokenizer, naming those known.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        Vocabulary::read(&file.metadata())?.build()
    }
}

/// What the metadata says, checked.
struct Vocabulary<'a> {
    /// The file, for errors.
    file: String,
    model: &'a str,
    pre: &'a str,
    tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
    merges: Vec<(&'a str, &'a str)>,
    scores: Vec<f32>,
    add_space: bool,
    side: Side,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &Metadata<'a>) -> Result<Self> {
        let file = metadata.path().display().to_string();
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let model = metadata.str(&key("model"))?;
        if !["gpt2", "llama"].contains(&model) {
            return Err(Error::unsupported(format!("{file}: the GGUF tokenizer `{model}`"), "gpt2, llama"));
        }
        let tokens = metadata.strings(&key("tokens"))?;
        let refuse = |name: &str, expected: String, found: &dyn std::fmt::Display| {
            Error::config(&file, key(name), expected, found)
        };
        let of_each = |name: &str, found: usize| match found == tokens.len() {
            true => Ok(()),
            false => Err(refuse(name, format!("one for each of the {} tokens", tokens.len()), &found)),
        };
        let kinds = match metadata.optional::<Vec<i64>>(&key("token_type"))? {
            None => vec![Kind::Normal; tokens.len()],
            Some(types) => {
                of_each("token_type", types.len())?;
                let kind = |&number: &i64| {
                    Kind::of(number).ok_or_else(|| refuse("token_type", "1 ..= 6".into(), &number))
                };
                types.iter().map(kind).collect::<Result<_>>()?
            }
        };
        let scores = match model {
            "llama" => metadata.f32s(&key("scores"))?,
            _ => Vec::new(),
        };
        if model == "llama" {
            of_each("scores", scores.len())?;
            if let Some(score) = scores.iter().find(|score| score.is_nan()) {
                return Err(refuse("scores", "numbers".into(), score));
            }
        }
        let pair = |merge: &'a str| {
            let pair = merge.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty());
            pair.ok_or_else(|| {
                refuse("merges", "two tokens with a space between".into(), &format!("{merge:?}"))
            })
        };
        let merges = match model {
            "gpt2" => metadata.strings(&key("merges"))?.into_iter().map(pair).collect::<Result<_>>()?,
            _ => Vec::new(),
        };
        // Files older than the key are GPT-2's.
        let pre = metadata.optional(&key("pre"))?.unwrap_or("default");
        let side = side(metadata, &tokens, model == "llama" || LLAMA3.contains(&pre))?;
        let add_space = metadata.optional(&key("add_space_prefix"))?.unwrap_or(true);
        Ok(Self { model, pre, tokens, kinds, merges, scores, add_space, side, file })
    }

    fn build(mut self) -> Result<Tokenizer> {
        let ids = self.ids()?;
        let parts = match self.model {
            "gpt2" => Parts::byte_level(self.pre, &self.file)?,
            _ => Parts::sentencepiece(self.add_space),
        };
        let merges = match self.model {
            "gpt2" => self.stated_merges(&ids)?,
            _ => self.merges_of_scores(&ids)?,
        };
        let vocabulary = ids.iter().map(|(&token, &id)| (token.to_owned(), id));
        // `BPE::new` only tells which kind of map is wanted.
        let vocabulary = collect_for(BPE::new, vocabulary);
        let mut model =
            BPE::builder().vocab_and_merges(vocabulary, merges).ignore_merges(parts.ignore_merges);
        if self.model == "llama" {
            model = model.fuse_unk(true).byte_fallback(true);
            if let Some(unknown) = self.kinds.iter().position(|kind| *kind == Kind::Unknown) {
                model = model.unk_token(self.tokens[unknown].to_owned());
            }
        }
        let refused = |source: tokenizers::Error| {
            Error::config(&self.file, "tokenizer.ggml.merges", "merges of tokens", source)
        };
        let mut backend = tokenizers::Tokenizer::new(super::guarded(|| model.build()).map_err(refused)?);
        let wrong = |source: serde_json::Error| {
            Error::config(&self.file, "tokenizer.ggml.pre", "a known one", source)
        };
        let normalizer: Option<tokenizers::NormalizerWrapper> =
            serde_json::from_value(parts.normalizer).map_err(wrong)?;
        let pre_tokenizer: Option<tokenizers::PreTokenizerWrapper> =
            serde_json::from_value(parts.pre_tokenizer).map_err(wrong)?;
        let decoder: Option<tokenizers::DecoderWrapper> =
            serde_json::from_value(parts.decoder).map_err(wrong)?;
        backend.with_normalizer(normalizer).map_err(refused)?;
        backend.with_pre_tokenizer(pre_tokenizer).with_decoder(decoder);
        self.side.added = self.added();
        Tokenizer::new(backend, self.side)
    }

    /// The id of each token.
    fn ids(&self) -> Result<HashMap<&'a str, u32>> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in (0u32..).zip(&self.tokens) {
            if let Some(first) = ids.insert(*token, id) {
                let expected = "tokens that differ";
                let found = format!("`{token}` as {first} and {id}");
                return Err(Error::config(&self.file, "tokenizer.ggml.tokens", expected, found));
            }
        }
        Ok(ids)
    }

    /// Tokens which are found in a text before it is split: control tokens, which are special, and user-defined ones.
    fn added(&self) -> BTreeMap<u32, AddedToken> {
        let tokens = (0u32..).zip(self.tokens.iter().zip(&self.kinds));
        tokens
            .filter(|(_, (token, _))| !token.is_empty())
            .filter_map(|(id, (&token, kind))| match kind {
                Kind::Control | Kind::Unknown => Some((id, AddedToken::from(token, true))),
                Kind::UserDefined => Some((id, AddedToken::from(token, false).normalized(false))),
                Kind::Normal | Kind::Unused | Kind::Byte => None,
            })
            .collect()
    }

    /// The merges as stated; each must join two tokens into a third.
    fn stated_merges(&self, ids: &HashMap<&str, u32>) -> Result<Vec<(String, String)>> {
        let mut joined = String::new();
        for (left, right) in &self.merges {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            if let Some(missing) =
                [left, right, joined.as_str()].into_iter().find(|token| !ids.contains_key(token))
            {
                let found = format!("{left:?} {right:?}, where {missing:?} is no token");
                let expected = "two tokens that join into a third";
                return Err(Error::config(&self.file, "tokenizer.ggml.merges", expected, found));
            }
        }
        Ok(self.merges.iter().map(|(left, right)| ((*left).to_owned(), (*right).to_owned())).collect())
    }

    /// SentencePiece joins, again and again, the neighbours whose joint token has the highest score. As ranked merges:
    /// every split of every token into two tokens, by the token's score.
    fn merges_of_scores(&self, ids: &HashMap<&str, u32>) -> Result<Vec<(String, String)>> {
        let ordinary = |kind: &Kind| matches!(kind, Kind::Normal | Kind::UserDefined);
        let tokens = self.tokens.iter().zip(&self.kinds).zip(&self.scores);
        let tokens: Vec<(&str, f32)> = tokens
            .filter(|((_, kind), _)| ordinary(kind))
            .map(|((token, _), score)| (*token, *score))
            .collect();
        let known: HashSet<&str> = tokens.iter().map(|(token, _)| *token).collect();
        let mut merges = Vec::new();
        for &(token, score) in &tokens {
            if token.len() > LONGEST_PIECE {
                let expected = format!("ordinary tokens of at most {LONGEST_PIECE} bytes");
                return Err(Error::config(&self.file, "tokenizer.ggml.tokens", expected, token.len()));
            }
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if known.contains(left) && known.contains(right) {
                    merges.push((score, ids[left], ids[right], left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        Ok(merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
    }
}

impl Kind {
    fn of(number: i64) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// Special tokens, EOS ids and chat templates.
fn side(metadata: &Metadata<'_>, tokens: &[&str], bos_by_default: bool) -> Result<Side> {
    let file = metadata.path().display().to_string();
    let id = |name: &str| -> Result<Option<(u32, AddedToken)>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = metadata.optional::<u32>(&key)? else { return Ok(None) };
        match usize::try_from(id).ok().and_then(|at| tokens.get(at)).filter(|token| !token.is_empty()) {
            Some(&token) => Ok(Some((id, AddedToken::from(token, true)))),
            None => Err(Error::config(&file, key, format!("the id of one of {} tokens", tokens.len()), id)),
        }
    };
    let mut side = Side {
        frame: Some((
            metadata.optional("tokenizer.ggml.add_bos_token")?.unwrap_or(bos_by_default),
            metadata.optional("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
        )),
        ..Side::default()
    };
    for (role, name) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        if let Some((_, token)) = id(name)? {
            side.roles.push((role.to_owned(), token));
        }
    }
    // The end of a turn or of a message ends a text too.
    let mut ends: Vec<i64> = Vec::new();
    for name in ["eos", "eot", "eom"] {
        if let Some((id, _)) = id(name)?
            && !ends.contains(&i64::from(id))
        {
            ends.push(id.into());
        }
    }
    side.eos_ids = Some(ends);
    if let Some(text) = metadata.optional::<&str>("tokenizer.chat_template")? {
        side.templates.push(("default".to_owned(), text.to_owned()));
    }
    for name in metadata.optional::<Vec<&str>>("tokenizer.chat_templates")?.unwrap_or_default() {
        let text = metadata.str(&format!("tokenizer.chat_template.{name}"))?;
        side.templates.push((name.to_owned(), text.to_owned()));
    }
    if let Some(architecture) = metadata.optional::<&str>("general.architecture")? {
        side.max_length = metadata.optional(&format!("{architecture}.context_length"))?;
    }
    Ok(side)
}

/// Collects into the map that `_consumer` takes: its type is private to the crate that declares it.
fn collect_for<M: FromIterator<T>, T, B, C>(_consumer: fn(M, B) -> C, items: impl Iterator<Item = T>) -> M {
    items.collect()
}
