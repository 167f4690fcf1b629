//! Tokenizers against transformers, tokenizers and sentencepiece (`benches/reference/tokenizer_fixtures.py`).
#![allow(clippy::unwrap_used, clippy::panic)]

use std::cell::Cell;
use std::path::{Path, PathBuf};

use controlgen_core::Error;
use controlgen_text::chat::{ChatOptions, Message};
use controlgen_text::tokenizer::{Special, TextStream, Tokenizer};
use proptest::prelude::*;
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer")
}

fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&std::fs::read(path.as_ref()).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

const FAMILIES: [&str; 3] = ["byte_level", "pieces", "wordpiece"];

#[test]
fn texts_are_encoded_as_by_transformers() {
    for family in FAMILIES {
        let folder = fixtures().join(family);
        let (tokenizer, cases) = (Tokenizer::open(&folder).unwrap(), json(folder.join("cases.json")));
        assert!(list(&cases["encode"]).len() > 120);
        for case in list(&cases["encode"]) {
            let text = case["text"].as_str().unwrap();
            assert_eq!(
                tokenizer.encode(text, Special::Add).unwrap(),
                ids(&case["ids"]),
                "{family}: {text:?}"
            );
            assert_eq!(
                tokenizer.encode(text, Special::Keep).unwrap(),
                ids(&case["plain"]),
                "{family}: {text:?}"
            );
        }
        let texts: Vec<&str> =
            list(&cases["encode"]).iter().map(|case| case["text"].as_str().unwrap()).collect();
        let batch = tokenizer.encode_batch(&texts, Special::Add).unwrap();
        assert_eq!(batch, list(&cases["encode"]).iter().map(|case| ids(&case["ids"])).collect::<Vec<_>>());
        assert_eq!(tokenizer.vocab_size(), cases["vocab_size"].as_i64().unwrap(), "{family}");
        assert_eq!(tokenizer.bos(), cases["bos"].as_i64(), "{family}");
    }
}

#[test]
fn ids_are_decoded_as_by_transformers() {
    for family in FAMILIES {
        let folder = fixtures().join(family);
        let (tokenizer, cases) = (Tokenizer::open(&folder).unwrap(), json(folder.join("cases.json")));
        assert!(list(&cases["decode"]).len() > 120);
        for case in list(&cases["decode"]) {
            let ids = ids(&case["ids"]);
            for (skip, field) in [(false, "text"), (true, "skipped")] {
                let expected = case[field].as_str().unwrap();
                assert_eq!(tokenizer.decode(&ids, skip).unwrap(), expected, "{family}: {ids:?}");
                let mut stream = TextStream::new(&tokenizer, skip);
                let parts: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
                assert_eq!(parts.concat() + &stream.finish().unwrap(), expected, "{family}: {ids:?}");
            }
        }
    }
}

/// Where byte tokens are not UTF-8, transformers loses the valid characters around them; SentencePiece does not.
#[test]
fn invalid_bytes_are_decoded_as_by_sentencepiece() {
    let folder = fixtures().join("pieces");
    let (tokenizer, cases) = (Tokenizer::open(&folder).unwrap(), json(folder.join("cases.json")));
    assert!(list(&cases["sentencepiece"]).len() > 80);
    for case in list(&cases["sentencepiece"]) {
        let ids = ids(&case["ids"]);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["text"].as_str().unwrap(), "{ids:?}");
    }
}

#[test]
fn special_tokens_are_read_from_the_files_around() {
    let open = |family: &str| Tokenizer::open(fixtures().join(family)).unwrap();
    let byte_level = open("byte_level");
    let id = |token: &str| byte_level.token_to_id(token);
    assert_eq!((byte_level.bos(), byte_level.pad(), byte_level.eos()), (Some(0), Some(2), &[1][..]));
    // In tokenizer_config.json only.
    assert!(id("<|tool|>").is_some() && id("<|image|>").is_some() && id("<never read>").is_none());
    let template = byte_level.chat_template().unwrap().unwrap();
    assert_eq!(template.render(&[], &ChatOptions::new()).unwrap(), "<|image|><s>");
    assert!(byte_level.is_special(id("<|tool|>").unwrap()) && byte_level.is_special(0));
    assert!(!byte_level.is_special(id("<think>").unwrap()) && !byte_level.is_special(-1));
    let pieces = open("pieces");
    assert_eq!((pieces.bos(), pieces.pad(), pieces.eos()), (Some(1), Some(0), &[2, 5][..]));
    let roles: Vec<_> = pieces.special_tokens().collect();
    assert_eq!(roles, [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]);
    // Alone, a file knows nothing of its neighbours.
    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("other.json");
    std::fs::copy(fixtures().join("pieces/tokenizer.json"), &alone).unwrap();
    let alone = Tokenizer::open(alone).unwrap();
    assert_eq!((alone.bos(), alone.eos().len(), alone.special_tokens().count()), (None, 0, 0));
}

#[test]
fn bytes_of_tokens_make_the_text() {
    for family in ["byte_level", "pieces"] {
        let folder = fixtures().join(family);
        let (tokenizer, cases) = (Tokenizer::open(&folder).unwrap(), json(folder.join("cases.json")));
        for case in list(&cases["encode"]) {
            let text = case["text"].as_str().unwrap();
            if family == "pieces" && text.contains('<') {
                continue; // a space stands before what follows a special token
            }
            let bytes = |id: i64| tokenizer.token_bytes(id).unwrap();
            let joined: Vec<u8> = ids(&case["plain"]).into_iter().flat_map(bytes).collect();
            let expected = match family {
                "pieces" if !text.is_empty() => format!(" {text}"),
                _ => text.to_owned(),
            };
            assert_eq!(String::from_utf8_lossy(&joined), expected, "{family}");
        }
        assert_eq!(tokenizer.token_bytes(tokenizer.vocab_size()), None);
        assert_eq!(tokenizer.token_bytes(-1), None);
    }
    assert_eq!(Tokenizer::open(fixtures().join("wordpiece")).unwrap().token_bytes(10), None);
}

#[test]
fn ids_that_no_token_has_are_errors() {
    for family in FAMILIES {
        let tokenizer = Tokenizer::open(fixtures().join(family)).unwrap();
        let mut stream = TextStream::new(&tokenizer, true);
        for id in [-1, tokenizer.vocab_size(), i64::from(u32::MAX) + 1, i64::MIN, i64::MAX] {
            assert!(matches!(tokenizer.decode(&[7, id], true), Err(Error::Value { .. })), "{family} {id}");
            assert!(matches!(stream.push(id), Err(Error::Value { .. })), "{family} {id}");
        }
        let error = tokenizer.decode(&[-1], true).unwrap_err().to_string();
        let last = tokenizer.vocab_size() - 1;
        assert_eq!(error, format!("token id: expected the id of a token, 0 ..= {last}, found -1"));
    }
}

#[test]
fn characters_come_with_their_last_token() {
    for family in ["byte_level", "pieces"] {
        let tokenizer = Tokenizer::open(fixtures().join(family)).unwrap();
        let ids = tokenizer.encode("😀é", Special::Keep).unwrap();
        let mut stream = TextStream::new(&tokenizer, true);
        let parts: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert!(parts.iter().any(String::is_empty), "{family}: {parts:?}");
        assert!(parts.contains(&"😀".to_owned()), "{family}: {parts:?}");
        // Forked in the midst of a character, both go on.
        let mut stream = TextStream::new(&tokenizer, true);
        let at = parts.iter().position(|part| part == "😀").unwrap();
        for &id in &ids[..at] {
            assert_eq!(stream.push(id).unwrap(), "");
        }
        let mut fork = stream.clone();
        assert_eq!(stream.push(ids[at]).unwrap(), "😀");
        assert_eq!(
            fork.finish().unwrap(),
            if family == "pieces" { "\u{FFFD}\u{FFFD}\u{FFFD}" } else { "\u{FFFD}" }
        );
        assert_eq!(fork.push(ids[usize::from(family == "pieces")]).unwrap(), "");
    }
}

#[test]
fn streams_continue_a_prompt() {
    for family in FAMILIES {
        let tokenizer = Tokenizer::open(fixtures().join(family)).unwrap();
        let ids = tokenizer.encode("A text, 😀 split anywhere at all", Special::Keep).unwrap();
        let whole = tokenizer.decode(&ids, true).unwrap();
        for at in 1..ids.len() {
            // What the prompt gives before its last character is complete.
            let mut prompt = TextStream::new(&tokenizer, true);
            let before: String = ids[..at].iter().map(|&id| prompt.push(id).unwrap()).collect();
            let mut stream = TextStream::after(&tokenizer, &ids[..at], true).unwrap();
            let after: String = ids[at..].iter().map(|&id| stream.push(id).unwrap()).collect();
            assert_eq!(before + &after + &stream.finish().unwrap(), whole, "{family} {at}");
        }
        assert!(TextStream::after(&tokenizer, &[1, -1], true).is_err());
    }
}

fn streamed(tokenizer: &Tokenizer, ids: &[i64], skip: bool) -> String {
    let mut stream = TextStream::new(tokenizer, skip);
    let mut text = String::new();
    for &id in ids {
        text += &stream.push(id).unwrap();
    }
    text + &stream.finish().unwrap()
}

proptest! {
    #[test]
    fn streams_give_what_decoding_gives(seed in proptest::collection::vec((any::<bool>(), 0..100_000i64), 0..60), skip: bool) {
        static OPEN: std::sync::OnceLock<Vec<Tokenizer>> = std::sync::OnceLock::new();
        let open = || FAMILIES.iter().map(|family| Tokenizer::open(fixtures().join(family)).unwrap()).collect();
        for tokenizer in OPEN.get_or_init(open) {
            let size = tokenizer.vocab_size();
            // Half of the ids among the first 259, where the bytes are.
            let ids: Vec<i64> = seed.iter().map(|(low, id)| id % if *low { size.min(259) } else { size }).collect();
            prop_assert_eq!(streamed(tokenizer, &ids, skip), tokenizer.decode(&ids, skip).unwrap());
        }
    }
}

#[test]
fn saved_tokenizers_are_the_same() {
    for family in FAMILIES {
        let (original, folder) =
            (Tokenizer::open(fixtures().join(family)).unwrap(), tempfile::tempdir().unwrap());
        original.save(folder.path()).unwrap();
        let again = Tokenizer::open(folder.path()).unwrap();
        for case in list(&json(fixtures().join(family).join("cases.json"))["encode"]) {
            let text = case["text"].as_str().unwrap();
            assert_eq!(again.encode(text, Special::Add).unwrap(), ids(&case["ids"]), "{family}: {text:?}");
        }
        assert_eq!(
            (again.bos(), again.pad(), again.vocab_size()),
            (original.bos(), original.special_pad(), original.vocab_size())
        );
        assert_eq!(again.special_tokens().collect::<Vec<_>>(), original.special_tokens().collect::<Vec<_>>());
    }
}

trait SpecialPad {
    /// The padding token that has a role; the ids of generation_config.json are not the tokenizer's to save.
    fn special_pad(&self) -> Option<i64>;
}

impl SpecialPad for Tokenizer {
    fn special_pad(&self) -> Option<i64> {
        let token = self.special_tokens().find(|(role, _)| *role == "pad_token");
        token.and_then(|(_, token)| self.token_to_id(token))
    }
}

#[test]
fn ids_may_have_gaps() {
    let folder = tempfile::tempdir().unwrap();
    let mut file = json(fixtures().join("byte_level/tokenizer.json"));
    let (token, id) = ("zzz gap", 5000);
    file["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({
        "id": id, "content": token, "special": true, "normalized": false, "lstrip": false, "rstrip": false, "single_word": false
    }));
    // The library numbers added tokens itself, unless the model knows them.
    file["model"]["vocab"][token] = id.into();
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).unwrap();
    let tokenizer = Tokenizer::open(folder.path()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 5001);
    assert_eq!(tokenizer.encode(token, Special::Keep).unwrap(), [5000]);
    assert!(matches!(tokenizer.decode(&[4999], false), Err(Error::Value { .. })));
    assert_eq!((tokenizer.token_bytes(4999), tokenizer.id_to_token(4999)), (None, None));
}

#[test]
fn damaged_files_are_errors() {
    let good = std::fs::read_to_string(fixtures().join("byte_level/tokenizer.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let open = |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
        Tokenizer::open(folder.path()).map(|_| ())
    };
    assert!(matches!(Tokenizer::open(folder.path()), Err(Error::Io { .. })));
    std::fs::write(folder.path().join("vocab.json"), "{}").unwrap();
    let error = Tokenizer::open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    for text in ["", "{}", "[]", "null", "{\"model\": 3}", &good[..good.len() - 10], "\u{0}"] {
        assert!(matches!(open("tokenizer.json", text), Err(Error::Format { .. })), "{text:.20}");
    }
    // A merge that is longer than every token.
    let long = json(fixtures().join("byte_level/tokenizer.json"))["model"]["vocab"]
        .as_object()
        .unwrap()
        .keys()
        .max_by_key(|token| token.len())
        .unwrap()
        .clone();
    let start = good.find("\"merges\":[").unwrap();
    let merges = format!("{}\"merges\":[[{long:?},{long:?}]]}}}}", &good[..start]);
    assert!(matches!(open("tokenizer.json", &merges), Err(Error::Format { .. })));
    std::fs::write(&path, &good).unwrap();
    for (name, text, field) in [
        ("tokenizer_config.json", "{\"bos_token\": 3}", "bos_token"),
        ("tokenizer_config.json", "{\"bos_token\": {\"text\": \"x\"}}", "bos_token"),
        ("tokenizer_config.json", "{\"chat_template\": {\"a\": 1}}", "chat_template"),
        (
            "tokenizer_config.json",
            "{\"added_tokens_decoder\": {\"x\": {\"content\": \"y\"}}}",
            "added_tokens_decoder.x",
        ),
        (
            "tokenizer_config.json",
            "{\"added_tokens_decoder\": {\"5\": {\"content\": \"</s>\"}}}",
            "added_tokens_decoder.5",
        ),
        ("generation_config.json", "{\"eos_token_id\": -1}", "eos_token_id"),
        ("generation_config.json", "{\"eos_token_id\": [1, \"x\"]}", "eos_token_id"),
    ] {
        match open(name, text) {
            Err(Error::Config { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{text}: {other:?}"),
        }
        std::fs::remove_file(folder.path().join(name)).unwrap();
    }
    for text in ["[]", "{", "7"] {
        assert!(matches!(open("tokenizer_config.json", text), Err(Error::Format { .. })), "{text}");
    }
}

#[test]
fn chat_templates_come_with_the_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixtures().join("byte_level/tokenizer.json"), folder.path().join("tokenizer.json"))
        .unwrap();
    let open = || Tokenizer::open(folder.path()).unwrap();
    assert!(open().chat_template().unwrap().is_none());
    let render = |name: Option<&str>| {
        let options = name.map_or_else(ChatOptions::new, |name| ChatOptions::new().template(name));
        open().chat_template().unwrap().unwrap().render(&[Message::user("hi")], &options).unwrap()
    };
    let config = r#"{"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    assert_eq!(render(None), "<s>hi");
    let list =
        r#"{"chat_template": [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), list).unwrap();
    assert_eq!((render(None), render(Some("rag"))), ("d".into(), "r".into()));
    std::fs::write(folder.path().join("chat_template.jinja"), "jinja").unwrap();
    assert_eq!(render(None), "jinja");
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    std::fs::write(folder.path().join("additional_chat_templates/more.jinja"), "m").unwrap();
    assert_eq!((render(None), render(Some("more"))), ("jinja".into(), "m".into()));
    let saved = tempfile::tempdir().unwrap();
    open().save(saved.path()).unwrap();
    let names = |tokenizer: Tokenizer| {
        tokenizer.chat_template().unwrap().unwrap().names().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(names(Tokenizer::open(saved.path()).unwrap()), names(open()));
}

/// A tokenizer.json with one value changed, or a few bytes.
fn mutated(file: &Value, text: &str, choice: (u8, usize, usize)) -> String {
    let (how, at, by) = choice;
    if how < 64 {
        let mut bytes = text.as_bytes().to_vec();
        let at = at % bytes.len();
        match how % 3 {
            0 => bytes.truncate(at),
            1 => bytes[at] = u8::try_from(by % 128).unwrap(),
            _ => drop(bytes.splice(at..(at + by % 40).min(text.len()), [])),
        }
        return String::from_utf8_lossy(&bytes).into_owned();
    }
    let mut file = file.clone();
    // Down from the root: the vocabulary and the merges count as much as the rest.
    let mut node = &mut file;
    let mut seed = at;
    loop {
        let next = seed % 16;
        seed = (seed >> 3) + at % 1009;
        let length = match &*node {
            Value::Array(list) => list.len(),
            Value::Object(map) => map.len(),
            _ => 0,
        };
        if length == 0 || next == 0 {
            break;
        }
        let pick = seed % length;
        node = match node {
            Value::Array(list) => &mut list[pick],
            Value::Object(map) => map.values_mut().nth(pick).unwrap(),
            _ => unreachable!(),
        };
    }
    let values = [
        Value::Null,
        0.into(),
        (-1).into(),
        u64::from(u32::MAX).into(),
        u64::MAX.into(),
        1e300.into(),
        true.into(),
        "".into(),
        "é".into(),
        "▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁".into(),
        "(a*)*(".into(),
        "<0xFF>".into(),
        serde_json::json!([]),
        serde_json::json!({}),
        serde_json::json!({"type": "ByteLevel"}),
        serde_json::json!({"type": "Strip", "content": " ", "start": 3, "stop": 3}),
        serde_json::json!({"type": "Fuse"}),
        serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        serde_json::json!(["a", "b", "c"]),
    ];
    // As often as not, a value of the same type.
    let same = |value: &&Value| std::mem::discriminant(*value) == std::mem::discriminant(&*node);
    let alike: Vec<&Value> = values.iter().filter(same).collect();
    *node = match how % 2 {
        0 if !alike.is_empty() => alike[by % alike.len()].clone(),
        _ => values[by % values.len()].clone(),
    };
    file.to_string()
}

/// `CONTROLGEN_FUZZ_CASES` sets how many files of each family are tried.
#[test]
fn mutated_files_do_not_panic() {
    let files = std::env::var("CONTROLGEN_FUZZ_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(300u32);
    let config =
        ProptestConfig { cases: files.div_ceil(10), failure_persistence: None, ..ProptestConfig::default() };
    let (tried, opened) = (Cell::new(0), Cell::new(0));
    let choices = proptest::collection::vec(any::<(u8, usize, usize)>(), 10);
    let run = |choices: Vec<(u8, usize, usize)>| {
        for family in FAMILIES {
            let text = std::fs::read_to_string(fixtures().join(family).join("tokenizer.json")).unwrap();
            let file: Value = serde_json::from_str(&text).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("mutated.json");
            for &choice in &choices {
                std::fs::write(&path, mutated(&file, &text, choice)).unwrap();
                tried.set(tried.get() + 1);
                let Ok(tokenizer) = Tokenizer::open(&path) else { continue };
                opened.set(opened.get() + 1);
                for special in [Special::Add, Special::Keep] {
                    if let Ok(ids) = tokenizer.encode("<s>The 12 é😀\n\n x</s>", special) {
                        let _ = tokenizer.decode(&ids, false);
                    }
                }
                let ids: Vec<i64> = (0..300).collect();
                if let Ok(text) = tokenizer.decode(&ids, true) {
                    let mut stream = TextStream::new(&tokenizer, true);
                    for id in ids {
                        let _ = stream.push(id);
                    }
                    let _ = (stream.finish(), text);
                }
            }
        }
        Ok(())
    };
    proptest::test_runner::TestRunner::new(config).run(&choices, run).unwrap();
    println!("{} of {} mutated files opened", opened.get(), tried.get());
    assert!(opened.get() * 5 > tried.get());
}
