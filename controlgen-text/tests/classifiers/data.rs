//! Labelled files and splits.

use std::path::PathBuf;

use controlgen_core::Error;
use controlgen_text::classifiers::{Columns, Example, Labelled, Split};

fn file(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn example(text: &str, label: usize, group: &str) -> Example {
    Example { text: text.into(), label, group: group.into() }
}

#[test]
fn three_formats_say_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let csv = b"id,label,text,source\n1,pos,\"A \"\"fine\"\" film,\nover two lines\",x\n2, neg ,Dull.,y\n";
    let tsv =
        "id\tlabel\ttext\tsource\n1\tpos\tA \"fine\" film, on one line\tx\n2\tneg\tDull.\ty\n".as_bytes();
    let jsonl = "{\"text\": \"A \\\"fine\\\" film,\\nover two lines\", \"label\": \"pos\", \"source\": \"x\"}\n\
                 {\"label\": \"neg\", \"text\": \"Dull.\", \"source\": \"y\"}\n";
    let columns = Columns { group: Some("source".into()), ..Columns::default() };
    let expected = |text| vec![example(text, 1, "x"), example("Dull.", 0, "y")];
    for (name, bytes, text) in [
        ("a.csv", &csv[..], "A \"fine\" film,\nover two lines"),
        ("a.tsv", tsv, "A \"fine\" film, on one line"),
        ("a.jsonl", jsonl.as_bytes(), "A \"fine\" film,\nover two lines"),
    ] {
        let read = Labelled::open(file(&folder, name, bytes), &columns).unwrap();
        assert_eq!(read.classes(), ["neg", "pos"], "{name}");
        assert_eq!(read.examples(), expected(text), "{name}");
    }
    // The classes in another order, and one that no text has.
    let classes = Some(["pos", "neg", "none"].map(String::from).to_vec());
    let read = Labelled::open(folder.path().join("a.csv"), &Columns { classes, ..columns }).unwrap();
    assert_eq!(read.examples()[0].label, 0);
    // Numbers and booleans are labels.
    let path =
        file(&folder, "b.jsonl", b"{\"text\": \"a\", \"label\": 1}\n{\"text\": \"b\", \"label\": 0}\n");
    assert_eq!(Labelled::open(path, &Columns::default()).unwrap().classes(), ["0", "1"]);
}

#[test]
fn bad_files_are_refused_with_their_line() {
    let folder = tempfile::tempdir().unwrap();
    let known = Columns { classes: Some(vec!["0".into(), "1".into()]), ..Columns::default() };
    let cases: [(&str, &[u8], &str); 18] = [
        ("a.csv", b"text,label\ngood,1\n  ,0\n", "line 3: expected a text in `text`, found a blank one"),
        ("a.csv", b"text,label\ngood,1\nbad\n", "line 3: expected 2 fields, found 1"),
        ("a.csv", b"text,label\ngood,1\nbad,0,0\n", "line 3: expected 2 fields, found 3"),
        (
            "a.csv",
            b"text,label\n\"two\nlines\",1\nbad,2\n",
            "line 4: expected one of `0`, `1` in `label`, found `2`",
        ),
        ("a.csv", b"text,label\ngood,1\nbad, \n", "line 3: expected a label in `label`, found nothing"),
        ("a.csv", b"text,label\ngood,1\nb\xffd,0\n", "line 3: expected UTF-8"),
        ("a.csv", b"text,class\ngood,1\n", "line 1: expected a column `label`, found `text`, `class`"),
        ("a.csv", b"text,label\n", "expected rows of labelled texts, found none"),
        ("a.csv", b"", "line 1: expected a column `text`"),
        ("a.csv", b"text,label\ngood,1\nbetter,1\n", "expected two or more, found 1"),
        ("a.tsv", b"text\tlabel\ngood\t1\nbad\n", "line 3: expected 2 fields, found 1"),
        ("a.jsonl", b"{\"text\": \"a\", \"label\": 1}\n\n", "line 2: EOF"),
        ("a.jsonl", b"{\"text\": \"a\", \"label\": 1}\n[1]\n", "line 2: expected a JSON object"),
        (
            "a.jsonl",
            b"{\"text\": \"a\", \"label\": 1}\n{\"text\": \"b\"}\n",
            "line 2: expected a field `label`, found none",
        ),
        ("a.jsonl", b"{\"text\": [], \"label\": 1}\n", "line 1: expected a string or a number in `text`"),
        ("a.jsonl", b"{\"text\": \"a\", \"label\": \"x\"}\n", "line 1: expected one of `0`, `1`"),
        ("a.jsonl", b"{\"text\": \"a\", \"label\": 1}\n\xff\n", "line 2: expected UTF-8"),
        ("a.jsonl", b"{\"text\": \"\", \"label\": 1}\n", "line 1: expected a text"),
    ];
    for (name, bytes, expected) in cases {
        let path = file(&folder, name, bytes);
        let error = Labelled::open(&path, &known).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error} instead of {expected}");
    }
    let error = Labelled::open(file(&folder, "a.txt", b"x"), &known).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let error = Labelled::open(folder.path().join("none.csv"), &known).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn a_split_is_a_function_of_the_words() {
    // The hashes are computed elsewhere: FNV-1a and SplitMix64's finaliser of "a fine film ", "dull ", "über alles ".
    let split = Split::new(&[1; 100]).unwrap();
    for (text, part) in [("A fine film.", 48), ("dull!", 99), ("Über, alles", 10)] {
        assert_eq!(split.part(text), part, "{text}");
    }
    for bad in [&[][..], &[1], &[1, 0]] {
        assert!(matches!(Split::new(bad), Err(Error::Value { .. })), "{bad:?}");
    }
}

#[test]
fn no_text_is_in_two_parts() {
    let mut examples = Vec::new();
    for i in 0..4000 {
        let label = usize::from(i % 3 == 0);
        examples.push(example(&format!("Text number {i}"), label, ""));
        if i % 5 == 0 {
            examples.push(example(&format!("text, NUMBER {i}!"), label, ""));
        }
    }
    // The same words under both labels.
    examples.push(example("Good or bad?", 0, ""));
    examples.push(example("good OR bad", 1, ""));
    let all = Labelled::new(vec!["n".into(), "p".into()], examples).unwrap();
    let parts = Split::new(&[45, 45, 10]).unwrap().parts(&all).unwrap();
    let texts = |i: usize| parts[i].examples().iter().map(|e| e.text.to_lowercase().replace([',', '!'], ""));
    let mut seen: Vec<String> = (0..3).flat_map(texts).collect();
    assert_eq!(seen.len(), 4000);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 4000, "duplicates");
    assert!(!seen.iter().any(|text| text.contains("good")), "of two minds");
    // Five deviations of binomial counts.
    for (part, share) in parts.iter().zip([0.45_f64, 0.45, 0.1]) {
        let deviation = (4000.0 * share * (1.0 - share)).sqrt();
        let off = (part.examples().len() as f64 - 4000.0 * share).abs();
        assert!(off < 5.0 * deviation, "{} of {share}", part.examples().len());
    }
}
