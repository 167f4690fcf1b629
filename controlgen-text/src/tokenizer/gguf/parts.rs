//! What stands around the model: how text is normalised, split and joined again.

use controlgen_core::{Error, Result};
use serde_json::{Value, json};

/// GPT-2's split of text into words, which the `ByteLevel` pre-tokenizer has built in.
const GPT2: &[&str] = &["gpt-2", "gpt2", "default"];
/// As GPT-2, but every digit is a word of its own, split off first: " 12" is `Ġ`, `1`, `2`, and a run of spaces
/// before a digit stays whole. The models' own tokenizer.json say so, and llama.cpp does so; transformers 5.23
/// reads their GGUF files with GPT-2's split.
const DIGITS: &[&str] = &["smollm", "starcoder", "refact", "command-r"];
pub(super) const LLAMA3: &[&str] = &["llama-bpe", "llama3", "llama-v3"];
const QWEN2: &[&str] = &["qwen2", "deepseek-r1-qwen"];

/// Llama 3: numbers in groups of three.
const LLAMA3_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Qwen 2 and 3: digits one by one.
const QWEN2_SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// What stands around the model, as in a tokenizer.json.
pub(super) struct Parts {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub decoder: Value,
    pub ignore_merges: bool,
}

impl Parts {
    /// Those of a byte-level vocabulary, by the name of its pre-tokenizer; `file` is named in errors.
    pub fn byte_level(pre: &str, file: &str) -> Result<Self> {
        let byte_level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let then_bytes = |first: Value, regex: bool| json!({"type": "Sequence", "pretokenizers": [first, byte_level(regex)]});
        let split = |regex: &str| {
            let pattern = json!({"Regex": regex});
            let split = json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
            then_bytes(split, false)
        };
        let pre_tokenizer = match pre {
            pre if GPT2.contains(&pre) => byte_level(true),
            pre if DIGITS.contains(&pre) => {
                then_bytes(json!({"type": "Digits", "individual_digits": true}), true)
            }
            pre if LLAMA3.contains(&pre) => split(LLAMA3_SPLIT),
            pre if QWEN2.contains(&pre) => split(QWEN2_SPLIT),
            other => {
                let what = format!("{file}: the GGUF pre-tokenizer `{other}`");
                return Err(Error::unsupported(what, [GPT2, DIGITS, LLAMA3, QWEN2].concat().join(", ")));
            }
        };
        let normalizer = if QWEN2.contains(&pre) { json!({"type": "NFC"}) } else { Value::Null };
        let ignore_merges = LLAMA3.contains(&pre);
        Ok(Self { normalizer, pre_tokenizer, decoder: byte_level(true), ignore_merges })
    }

    /// SentencePiece's own order: a `▁` in front of every text (and of what follows a special token), then every
    /// space as `▁`, and no split into words.
    pub fn sentencepiece(add_space: bool) -> Self {
        let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let prepend = json!({"type": "Prepend", "prepend": "▁"});
        let normalizers = if add_space { vec![prepend, spaces] } else { vec![spaces] };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if add_space {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Self {
            normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
            pre_tokenizer: Value::Null,
            decoder: json!({"type": "Sequence", "decoders": decoders}),
            ignore_merges: false,
        }
    }
}
