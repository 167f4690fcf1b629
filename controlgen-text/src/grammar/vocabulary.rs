//! A tokenizer's tokens, as bytes in a trie.

use std::sync::Arc;

use controlgen_core::{Error, Result};
use llguidance::ParserFactory;
use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use super::number;
use crate::tokenizer::{Special, Tokenizer};

/// The tokens of a tokenizer, as bytes, and those that end a text: what grammars are compiled for.
///
/// A clone shares all data. `Send` and `Sync`. Making one takes a tenth of a second for 50,000 tokens:
/// [`TextModel::vocabulary`](crate::TextModel::vocabulary) keeps its own.
///
/// Token bytes are those of [`Tokenizer::token_bytes`]. Special tokens spell no text: of them, a grammar allows those
/// that end a text, once it may end, and others where it names them (`<|tool|>` in Lark).
#[derive(Clone)]
pub struct Vocabulary {
    shared: Arc<Shared>,
}

struct Shared {
    factory: ParserFactory,
    eos: Vec<i64>,
    size: usize,
    /// The tokens that begin with what may continue a number.
    numeric: Vec<u32>,
}

impl Vocabulary {
    /// The tokens of `tokenizer`, with `eos`, one or more ids, to end a text.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tokenizer whose tokens have no bytes of their own (WordPiece) and for tokens of
    /// more than 2²² bytes in all; [`Error::Value`] for no token that ends a text or one that the tokenizer lacks.
    pub fn new(tokenizer: &Tokenizer, eos: &[i64]) -> Result<Self> {
        let size = tokenizer.vocab_size();
        let known = 0..size;
        if let Some(id) = eos.iter().find(|id| !known.contains(id)) {
            return Err(Error::value("EOS token id", format!("0 .. {size}"), id));
        }
        if eos.is_empty() {
            let what = "tokens that end a text under a grammar";
            return Err(Error::value(what, "at least one", "none"));
        }
        let mut words: Vec<Vec<u8>> = known.map(|id| word(tokenizer, id, eos)).collect();
        let bytes = words.iter().map(|word| word.len().max(1)).sum::<usize>() + UNSPELLABLE.len();
        let count = u32::try_from(size).ok().filter(|_| bytes < MOST_BYTES).ok_or_else(|| {
            Error::unsupported(
                format!("a grammar over tokens of {bytes} bytes"),
                format!("{MOST_BYTES} in all"),
            )
        })?;
        if !words.iter().any(|word| word.first().is_some_and(|&byte| byte != MARKER)) {
            let what = "a grammar over a vocabulary whose tokens have no bytes of their own";
            return Err(Error::unsupported(what, "byte-level and SentencePiece vocabularies"));
        }
        words.push(UNSPELLABLE.to_vec());
        let mut ends: Vec<i64> = eos.to_vec();
        ends.sort_unstable();
        ends.dedup();
        let ids: Vec<TokenId> = ends.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        let trie = TokTrie::from(&TokRxInfo::new(count + 1, ids[0]), &words).with_eos_tokens(&ids);
        let continues = |&id: &u32| trie.token(id).first().is_some_and(|&byte| number::continues(byte));
        let numeric = (0..count).filter(continues).collect();
        let env: TokEnv = Arc::new(Tokens { trie, tokenizer: tokenizer.handle(), unspellable: count });
        let caps = InferenceCapabilities { ff_tokens: true, ..InferenceCapabilities::default() };
        let mut factory =
            ParserFactory::new(&env, caps, &SlicedBiasComputer::general_slices()).map_err(|problem| {
                Error::value("vocabulary", "one that grammars can be compiled for", problem)
            })?;
        factory.quiet();
        *factory.limits_mut() =
            ParserLimits { max_lexer_states: 50_000, verbose_errors: false, ..ParserLimits::default() };
        let size = usize::try_from(size).unwrap_or(0);
        Ok(Self { shared: Arc::new(Shared { factory, eos: ends, size, numeric }) })
    }

    /// The tokens that end a text, in ascending order.
    pub fn eos(&self) -> &[i64] {
        &self.shared.eos
    }

    /// One more than the tokenizer's highest id.
    pub(super) fn size(&self) -> usize {
        self.shared.size
    }

    /// The tokens that begin with what may continue a number, in ascending order.
    pub(super) fn numeric(&self) -> &[u32] {
        &self.shared.numeric
    }

    /// The text of a token that the tokenizer has.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        self.shared.factory.tok_env().tok_trie().token(id)
    }

    pub(super) fn factory(&self) -> &ParserFactory {
        &self.shared.factory
    }
}

/// The trie's nodes have 22 bits for the size of what is below them, and 10 for their depth.
const MOST_BYTES: usize = 1 << 22;
const LONGEST: usize = 1000;

/// What a special token's bytes begin with, in the trie: a byte that no UTF-8 has.
const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// A token of the trie alone, which stands for what no token spells. Its id is past the tokenizer's.
const UNSPELLABLE: &[u8] = b"\xff<|what no token of this vocabulary spells|>";

/// A token's bytes in the trie; none for an id that no token has.
fn word(tokenizer: &Tokenizer, id: i64, eos: &[i64]) -> Vec<u8> {
    if tokenizer.is_special(id) || eos.contains(&id) {
        let name = tokenizer.id_to_token(id).unwrap_or_default();
        return [&[MARKER], name.as_bytes()].concat();
    }
    // The marker's own byte may be a token; longer ones with it would pass for special tokens, and are no UTF-8.
    let fits = |bytes: &Vec<u8>| bytes.len() == 1 || bytes.len() <= LONGEST && !bytes.contains(&MARKER);
    tokenizer.token_bytes(id).filter(fits).unwrap_or_default()
}

/// What llguidance asks of a tokenizer: the trie, and how bytes that must follow are spelled.
struct Tokens {
    trie: TokTrie,
    tokenizer: Tokenizer,
    unspellable: TokenId,
}

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// The tokenizer's own spelling; where it has none of just these bytes, the longest token each time.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let text = std::str::from_utf8(bytes).ok();
        text.and_then(|text| self.spelled(text, "").or_else(|| self.spelled(text, BEFORE)))
            .unwrap_or_else(|| self.longest(bytes))
    }
}

/// What may stand before a text, so that SentencePiece puts no space there.
const BEFORE: &str = "\n";

impl Tokens {
    /// How the tokenizer spells `text` after `before`, if that is the same bytes with no special token.
    fn spelled(&self, text: &str, before: &str) -> Option<Vec<TokenId>> {
        let ids = self.tokenizer.encode(&format!("{before}{text}"), Special::Keep).ok()?;
        let ids: Vec<TokenId> = ids.into_iter().map(u32::try_from).collect::<Result<_, _>>().ok()?;
        let spells = |ids: &[TokenId]| {
            let mut rest = text.as_bytes();
            ids.iter().all(|&id| {
                let word = self.trie.token(id);
                let left = rest.strip_prefix(word).filter(|_| !word.is_empty());
                left.map(|left| rest = left).is_some()
            }) && rest.is_empty()
        };
        let skipped = if before.is_empty() { 0..=0 } else { 1..=ids.len().min(2) };
        skipped.filter_map(|skip| ids.get(skip..)).find(|ids| spells(ids)).map(<[TokenId]>::to_vec)
    }

    /// The longest token each time, until there is none.
    fn longest(&self, mut bytes: &[u8]) -> Vec<TokenId> {
        let mut ids = Vec::new();
        while !bytes.is_empty() {
            let (id, len) = self.trie.prefix_token_id(bytes);
            if len == 0 || self.trie.is_special_token(id) && len > 1 {
                ids.push(self.unspellable);
                break;
            }
            ids.push(id);
            bytes = &bytes[len..];
        }
        ids
    }
}
