//! CLIP's tokenizer for the words of captions: each of them is one token.

use std::path::{Path, PathBuf};

use controlgen_core::checkpoint::replace;
use controlgen_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::caption::words;

/// Positions of a text: the beginning, the words, the end, padding.
const CONTEXT: usize = 32;

/// What stands behind the last letter of a word.
const END: &str = "</w>";

const SPECIAL: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

/// Where the tokenizer of the shipped models lies.
pub fn tokenizer_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data/shapes/tokenizer")
}

/// Pairs of tokens that become one, the first first.
type Merges = Vec<[String; 2]>;

/// The tokens of a word (Sennrich et al., "Neural machine translation of rare words with subword units", 2016): the pair
/// that comes first among the merges becomes one token, everywhere and again.
fn tokens(word: &str, merges: &Merges) -> Vec<String> {
    let mut tokens: Vec<String> = word.chars().map(String::from).collect();
    if let Some(last) = tokens.last_mut() {
        last.push_str(END);
    }
    while let Some([a, b]) = merges.iter().find(|merge| tokens.windows(2).any(|pair| pair == &merge[..])) {
        let mut merged: Vec<String> = Vec::new();
        let mut rest = tokens.into_iter().peekable();
        while let Some(token) = rest.next() {
            let second = rest.next_if(|next| token == *a && next == b);
            merged.push(token + second.as_deref().unwrap_or_default());
        }
        tokens = merged;
    }
    tokens
}

/// Merges by which each word is one token. Those of a word come behind those of the words before it, and so do not
/// change what these are.
fn merges(words: &[&str]) -> Merges {
    let mut merges = Merges::new();
    for word in words {
        while let [a, b, ..] = &tokens(word, &merges)[..] {
            merges.push([a.clone(), b.clone()]);
        }
    }
    merges
}

/// Writes the tokenizer's directory: the special tokens, the letters a to z within and at the end of words, and the
/// parts of words.
///
/// # Errors
/// [`Error::Io`] where it cannot be written.
pub fn write(folder: &Path) -> Result<()> {
    let merges = merges(&words());
    let mut vocab = Map::new();
    let letters = || ('a'..='z').map(String::from);
    let pairs = merges.iter().map(|[a, b]| format!("{a}{b}"));
    let ends = letters().map(|letter| letter + END);
    for token in SPECIAL.map(str::to_owned).into_iter().chain(letters()).chain(ends).chain(pairs) {
        let id = vocab.len();
        let _ = vocab.entry(token).or_insert_with(|| id.into());
    }
    let lines: String = merges.iter().map(|[a, b]| format!("{a} {b}\n")).collect();
    let special = json!({
        "bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "unk_token": SPECIAL[1], "pad_token": SPECIAL[1],
    });
    let mut config = special.clone();
    config["tokenizer_class"] = "CLIPTokenizer".into();
    config["model_max_length"] = CONTEXT.into();
    std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
    let json = |value: &Value| format!("{value:#}\n");
    for (name, text) in [
        ("vocab.json", json(&vocab.into())),
        ("merges.txt", format!("#version: 0.2\n{lines}")),
        ("special_tokens_map.json", json(&special)),
        ("tokenizer_config.json", json(&config)),
    ] {
        replace(folder.join(name), text.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use controlgen_core::noise::Noise;
    use controlgen_diffusion::prompt::ClipTokenizer;

    use super::*;
    use crate::shapes::{Caption, Scene, Split};

    #[test]
    fn every_word_is_one_token_of_clips_tokenizer() {
        let tokenizer = ClipTokenizer::open(tokenizer_folder()).unwrap();
        let mut ids = Vec::new();
        for word in words() {
            let id = tokenizer.encode(word).unwrap();
            assert_eq!(id.len(), 1, "{word}");
            assert_eq!(tokenizer.decode(&id).unwrap(), word);
            ids.extend(id);
        }
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), words().len());
        let mut stream = Noise::seeded(1).stream(0);
        for _ in 0..200 {
            let text = Caption::of(&Scene::sample(&mut stream, Split::HeldOut), &mut stream).text;
            let ids = tokenizer.encode(&text).unwrap();
            assert_eq!(ids.len(), text.split(' ').count(), "{text}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            assert_eq!(tokenizer.framed(&ids).len(), CONTEXT);
        }
        // Other words are spelled.
        assert_eq!(
            tokenizer.decode(&tokenizer.encode("reddish hexagons").unwrap()).unwrap(),
            "reddish hexagons"
        );
    }

    #[test]
    fn what_is_committed_is_what_the_command_writes() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_owned();
            let committed = std::fs::read(tokenizer_folder().join(&name)).unwrap();
            assert!(committed == std::fs::read(&path).unwrap(), "{}", name.display());
            names.push(name);
        }
        assert_eq!(names.len(), 4);
    }
}
