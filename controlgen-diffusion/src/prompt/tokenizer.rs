//! CLIP's tokenizer: byte pairs of lower-cased words.

use std::path::Path;
use std::sync::Arc;

use controlgen_core::{Config, Error, Result};
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{
    Lowercase, NFC, NormalizerWrapper, Replace, Sequence, replace::ReplacePattern,
};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as Splits;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

/// What a word is: CLIP's own expression (Radford et al. 2021, `simple_tokenizer.py`).
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's tokenizer, with the token ids of transformers' `CLIPTokenizer`.
///
/// A clone shares all data with the original. `Send` and `Sync`.
#[derive(Clone)]
pub struct ClipTokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    backend: Tokenizer,
    bos: i64,
    eos: i64,
    pad: i64,
    context: usize,
}

impl std::fmt::Debug for ClipTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shared { bos, eos, pad, context, .. } = &*self.shared;
        write!(f, "ClipTokenizer {{ bos: {bos}, eos: {eos}, pad: {pad}, context: {context} }}")
    }
}

impl ClipTokenizer {
    /// Opens the `tokenizer` directory of a pipeline: vocab.json and merges.txt, or tokenizer.json, and
    /// tokenizer_config.json and special_tokens_map.json beside them. As transformers 5 does, it takes the vocabulary, the
    /// merges and the added tokens from a tokenizer.json, and the rest from what CLIP's tokenizer is.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::Format`] for one that is no vocabulary,
    /// [`Error::Config`] for a field that makes no sense.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let side = |name: &str| -> Result<Config> {
            let path = directory.join(name);
            if path.exists() {
                Config::open(&path)
            } else {
                Ok(Config::from_fields(name, serde_json::Map::new()))
            }
        };
        let (config, special) = (side("tokenizer_config.json")?, side("special_tokens_map.json")?);
        let whole = directory.join("tokenizer.json");
        let files = ["vocab.json", "merges.txt"].map(|name| directory.join(name));
        let (vocab, merges, mut added) = if whole.exists() && !files.iter().all(|file| file.exists()) {
            read_whole(&whole)?
        } else {
            (read_vocab(&files[0])?, read_merges(&files[1])?, Vec::new())
        };
        // As in transformers: the map is of old directories, whose configuration does not list the tokens.
        let listed = config.get("added_tokens_decoder").is_some();
        let sources = if listed { vec![&config] } else { vec![&special, &config] };
        let of_role = |role: &str, default: &str| -> Result<String> {
            for config in &sources {
                match config.get(role) {
                    None => {}
                    Some(Value::String(text)) => return Ok(text.clone()),
                    Some(Value::Object(token)) if token.get("content").is_some_and(Value::is_string) => {
                        return Ok(token["content"].as_str().unwrap_or(default).to_owned());
                    }
                    Some(other) => return Err(config.error(role, "a token", other)),
                }
            }
            Ok(default.to_owned())
        };
        let (start, end) = ("<|startoftext|>", "<|endoftext|>");
        let roles = [
            of_role("bos_token", start)?,
            of_role("eos_token", end)?,
            of_role("pad_token", end)?,
            of_role("unk_token", end)?,
        ];
        added.extend(decoder_tokens(&config)?);
        let context = config.get("model_max_length").and_then(Value::as_f64).unwrap_or(77.0);
        // Without a bound transformers writes a number of thirty digits.
        let context =
            if context.is_finite() && (3.0..1e6).contains(&context) { context as usize } else { 77 };

        let refused = |source| Error::format(directory, format!("no vocabulary of CLIP: {source}"));
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .unk_token(roles[3].clone())
            .end_of_word_suffix("</w>".to_owned())
            .build()
            .map_err(refused)?;
        let mut backend = Tokenizer::new(bpe);
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ").map_err(refused)?;
        let normalizers: Vec<NormalizerWrapper> = vec![NFC.into(), spaces.into(), Lowercase.into()];
        backend.with_normalizer(Some(Sequence::new(normalizers))).map_err(refused)?;
        let words = SplitPattern::Regex(WORDS.to_owned());
        let words = Split::new(words, SplitDelimiterBehavior::Removed, true).map_err(refused)?;
        let bytes = ByteLevel::new(false, true, true);
        let splits: Vec<PreTokenizerWrapper> = vec![words.into(), bytes.into()];
        backend.with_pre_tokenizer(Some(Splits::new(splits)));
        backend.with_decoder(Some(bytes));
        let special: Vec<AddedToken> =
            roles.iter().map(|token| AddedToken::from(token.as_str(), true).normalized(false)).collect();
        backend.add_special_tokens(special).map_err(refused)?;
        backend.add_tokens(added).map_err(refused)?;
        let id = |token: &str| -> Result<i64> {
            let id = backend.token_to_id(token).map(i64::from);
            id.ok_or_else(|| Error::format(directory, format!("the vocabulary lacks `{token}`")))
        };
        let (bos, eos, pad) = (id(&roles[0])?, id(&roles[1])?, id(&roles[2])?);
        Ok(Self { shared: Arc::new(Shared { backend, bos, eos, pad, context }) })
    }

    /// The token ids of a text, without what frames it.
    ///
    /// # Errors
    /// [`Error::Value`] for a text that the vocabulary cannot spell.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let encoding = self.shared.backend.encode_fast(text, false);
        let encoding =
            encoding.map_err(|source| Error::value("text", "one that tokens can spell", source))?;
        Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
    }

    /// The text of token ids: lower-cased, its words apart.
    ///
    /// # Errors
    /// [`Error::Value`] for an id that no token has.
    pub fn decode(&self, ids: &[i64]) -> Result<String> {
        let known = |id: &i64| {
            let token = u32::try_from(*id).ok().filter(|&id| self.shared.backend.id_to_token(id).is_some());
            token.ok_or_else(|| Error::value("token id", "one of the vocabulary", id))
        };
        let ids = ids.iter().map(known).collect::<Result<Vec<_>>>()?;
        let text = self.shared.backend.decode(&ids, false);
        let text = text.map_err(|source| Error::value("token ids", "ids that make a text", source))?;
        Ok(text.replace("</w>", " ").trim().to_owned())
    }

    /// The token that begins a text.
    pub fn bos(&self) -> i64 {
        self.shared.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> i64 {
        self.shared.eos
    }

    /// The token that fills a short text: the end again, or `!`.
    pub fn pad(&self) -> i64 {
        self.shared.pad
    }

    /// How many positions a text has, framed: 77.
    pub fn context(&self) -> usize {
        self.shared.context
    }

    /// A framed text of [`Self::context`] positions: beginning, ids, end, padding. Ids that are too many are cut off.
    pub fn framed(&self, ids: &[i64]) -> Vec<i64> {
        let Shared { bos, eos, pad, context, .. } = *self.shared;
        let mut framed = vec![bos];
        framed.extend(ids.iter().take(context - 2));
        framed.push(eos);
        framed.resize(context, pad);
        framed
    }
}

type Merges = Vec<(String, String)>;

fn json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    serde_json::from_str(&text).map_err(|error| Error::format(path, error))
}

fn vocab_of(path: &Path, value: &Value) -> Result<Vocab> {
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    let entries =
        value.as_object().map(|map| map.iter().map(|(token, n)| Some((token.clone(), id(n)?))).collect());
    entries.flatten().ok_or_else(|| Error::format(path, "expected an object from tokens to ids"))
}

fn read_vocab(path: &Path) -> Result<Vocab> {
    vocab_of(path, &json(path)?)
}

fn pair(path: &Path, line: &str) -> Result<(String, String)> {
    match line.split(' ').collect::<Vec<_>>()[..] {
        [a, b] => Ok((a.to_owned(), b.to_owned())),
        _ => Err(Error::format(path, format!("expected two tokens, found `{line}`"))),
    }
}

fn read_merges(path: &Path) -> Result<Merges> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    let lines = text.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty());
    lines.map(|line| pair(path, line.trim_end())).collect()
}

/// Vocabulary, merges and added tokens of a tokenizer.json.
fn read_whole(path: &Path) -> Result<(Vocab, Merges, Vec<AddedToken>)> {
    let whole = json(path)?;
    let model = &whole["model"];
    let Some(list) = model["merges"].as_array() else {
        return Err(Error::format(path, "expected a list of merges: a BPE tokenizer"));
    };
    let merge = |merge: &Value| match (merge.as_str(), merge.as_array().map(Vec::as_slice)) {
        (Some(line), _) => pair(path, line),
        (_, Some([Value::String(a), Value::String(b)])) => Ok((a.clone(), b.clone())),
        _ => Err(Error::format(path, format!("expected two tokens, found {merge}"))),
    };
    let merges = list.iter().map(merge).collect::<Result<_>>()?;
    let added = whole["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let added = added.iter().filter_map(added_token).collect();
    Ok((vocab_of(path, &model["vocab"])?, merges, added))
}

/// Tokens of `added_tokens_decoder`, in the order of their ids.
fn decoder_tokens(config: &Config) -> Result<Vec<AddedToken>> {
    let Some(tokens) = config.get("added_tokens_decoder") else { return Ok(Vec::new()) };
    let one = |(id, token): (&String, &Value)| Some((id.parse::<u32>().ok()?, added_token(token)?));
    let found = tokens.as_object().map(|tokens| tokens.iter().map(one).collect::<Option<Vec<_>>>());
    let Some(mut found) = found.flatten() else {
        return Err(config.error("added_tokens_decoder", "an object from ids to tokens", tokens));
    };
    found.sort_by_key(|token| token.0);
    Ok(found.into_iter().map(|token| token.1).collect())
}

fn added_token(token: &Value) -> Option<AddedToken> {
    let flag = |name: &str| token[name].as_bool().unwrap_or(false);
    let made = AddedToken::from(token["content"].as_str()?, flag("special"));
    Some(
        made.normalized(flag("normalized"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .single_word(flag("single_word")),
    )
}
