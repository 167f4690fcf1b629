//! GGUF files, against files written by the `gguf` package and files built by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests
#![cfg(feature = "gguf")]

mod common;

use common::{GgufBytes, fixture, read};
use controlgen_core::Error;
use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::gguf::{Gguf, Value, ValueKind};
use tch::{Device, Kind, Tensor};

/// Writes a file and opens it.
fn open(bytes: &[u8]) -> Result<Gguf, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(&path)
}

fn refusal(bytes: &[u8]) -> String {
    match open(bytes) {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_encoding_equals_the_gguf_package() {
    let gguf = Gguf::open(fixture("quants.gguf")).unwrap();
    let expected = Safetensors::open(fixture("quants.safetensors")).unwrap();
    assert_eq!(gguf.version(), 3);
    let mut names = expected.names();
    names.sort();
    assert_eq!(gguf.names(), names);
    assert_eq!(names.len(), 19);
    for name in names {
        let (ours, theirs) = (gguf.info(&name).unwrap(), expected.info(&name).unwrap());
        assert_eq!(ours, theirs, "{name}");
        let (ours, theirs) = (read(&gguf, &name, ours.kind), read(&expected, &name, theirs.kind));
        assert_eq!(ours, theirs, "{name}");
        if name.starts_with('Q') {
            // Converted on the way, it is the same as converted afterwards.
            assert_eq!(read(&gguf, &name, Kind::BFloat16), ours.to_kind(Kind::BFloat16), "{name}");
        }
    }
}

#[test]
fn metadata_of_every_type() {
    let gguf = Gguf::open(fixture("quants.gguf")).unwrap();
    let metadata = gguf.metadata();
    assert_eq!(metadata.str("general.architecture").unwrap(), "test");
    assert_eq!(metadata.u32("general.alignment").unwrap(), 64);
    assert_eq!(metadata.u32("a.u8").unwrap(), 200);
    assert_eq!(metadata.i64("a.i8").unwrap(), -100);
    assert_eq!(metadata.u64("a.u16").unwrap(), 60_000);
    assert_eq!(metadata.i64("a.i16").unwrap(), -30_000);
    assert_eq!(metadata.u32("a.u32").unwrap(), 4_000_000_000);
    assert_eq!(metadata.i64("a.i32").unwrap(), -2_000_000_000);
    assert_eq!(metadata.u64("a.u64").unwrap(), u64::MAX);
    assert_eq!(metadata.i64("a.i64").unwrap(), i64::MIN);
    assert_eq!(metadata.f32("a.f32").unwrap(), 0.1_f32);
    assert_eq!(metadata.f64("a.f64").unwrap(), 0.1_f64);
    assert!(metadata.bool("a.true").unwrap() && !metadata.bool("a.false").unwrap());
    assert_eq!(metadata.str("a.string").unwrap(), "héllo — wörld");
    assert_eq!(metadata.strings("list.string").unwrap(), ["", "a", "Ġthe", "日本"]);
    assert_eq!(metadata.i64s("list.i32").unwrap(), [1, -2, 3]);
    assert_eq!(metadata.f32s("list.f32").unwrap(), [0.5, -1.5]);
    assert_eq!(metadata.bools("list.bool").unwrap(), [true, false, true]);
    let Some(Value::Array(outer)) = metadata.get("list.list") else { panic!("no array") };
    let inner: Vec<Vec<String>> = outer
        .iter()
        .map(|value| match value {
            Value::Array(inner) => inner.iter().map(|value| value.to_string()).collect(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(
        (outer.kind(), inner),
        (ValueKind::Array, vec![vec!["1".to_owned(), "2".to_owned()], vec!["3".to_owned()]])
    );
    assert_eq!(metadata.keys().count(), 20);
    assert!(metadata.keys().is_sorted());
}

#[test]
fn typed_look_up_says_what_it_expected() {
    let gguf = Gguf::open(fixture("quants.gguf")).unwrap();
    let metadata = gguf.metadata();
    let text = |result: Result<u32, Error>| result.unwrap_err().to_string();
    let range = "expected an integer in 0 ..= 4294967295, found";
    assert!(
        text(metadata.u32("llama.block_count"))
            .contains(&format!("field `llama.block_count`: {range} nothing"))
    );
    assert!(text(metadata.u32("a.i8")).contains(&format!("field `a.i8`: {range} -100")));
    assert!(text(metadata.u32("a.f32")).contains(&format!("{range} 0.1")));
    assert!(text(metadata.u32("list.i32")).contains(&format!("{range} an array of 3 I32")));
    assert!(metadata.u64("a.i64").is_err() && metadata.i64("a.u64").is_err());
    assert!(metadata.bool("a.u8").is_err() && metadata.f32("a.u8").is_err() && metadata.str("a.u8").is_err());
    assert!(metadata.strings("list.i32").is_err() && metadata.required::<Vec<u32>>("list.i32").is_err());
    assert!(metadata.optional::<u32>("absent").unwrap().is_none());
    assert!(metadata.optional::<bool>("a.u8").is_err());
    assert!(matches!(metadata.u32("absent"), Err(Error::Config { .. })));
}

#[test]
fn tensors_are_not_broadcast_or_reinterpreted() {
    let gguf = Gguf::open(fixture("quants.gguf")).unwrap();
    let into = |shape: &[i64], kind: Kind, name: &str| {
        gguf.read(name, &mut Tensor::zeros(shape, (kind, Device::Cpu))).map_err(|error| error.to_string())
    };
    assert!(
        into(&[1, 2, 3, 4], Kind::Float, "F32")
            .unwrap_err()
            .contains("expected shape [1, 2, 3, 4], found [2, 3, 4]")
    );
    assert!(into(&[4, 3, 2], Kind::Float, "F32").is_err());
    assert!(into(&[5], Kind::Float, "I8").unwrap_err().contains("Int8"));
    assert!(into(&[2, 3, 4], Kind::Int64, "F32").is_err());
    assert!(into(&[5], Kind::Int64, "I8").is_ok());
    assert!(into(&[5], Kind::Int8, "I64").is_err());
    assert!(into(&[1], Kind::Float, "absent").unwrap_err().contains("no tensor `absent`"));
}

#[test]
fn views_receive_their_part_alone() {
    let gguf = Gguf::open(fixture("quants.gguf")).unwrap();
    let expected = read(&gguf, "Q4_K", Kind::Float); // [2, 512]
    let whole = Tensor::full([4, 512], 7.0, (Kind::Float, Device::Cpu));
    gguf.read("Q4_K", &mut whole.narrow(0, 1, 2)).unwrap();
    assert_eq!(whole.narrow(0, 1, 2), expected);
    assert_eq!(whole.narrow(0, 0, 1), Tensor::full([1, 512], 7.0, (Kind::Float, Device::Cpu)));
    assert_eq!(whole.narrow(0, 3, 1), Tensor::full([1, 512], 7.0, (Kind::Float, Device::Cpu)));
    let wide = Tensor::full([2, 1024], 7.0, (Kind::Float, Device::Cpu));
    gguf.read("Q4_K", &mut wide.narrow(1, 100, 512)).unwrap();
    assert_eq!(wide.narrow(1, 100, 512), expected);
    assert_eq!(wide.narrow(1, 0, 100), Tensor::full([2, 100], 7.0, (Kind::Float, Device::Cpu)));
}

/// A file with one F32 tensor of shape [2].
fn small() -> GgufBytes {
    let mut file = GgufBytes::new(3, 1, 1);
    file.key("k", 4, &7_u32.to_le_bytes()).tensor("t", &[2], 0, 0);
    file
}

#[test]
fn hand_built_files_are_read() {
    for version in [2, 3] {
        let mut file = GgufBytes::new(version, 1, 1);
        file.key("k", 4, &7_u32.to_le_bytes()).tensor("t", &[2], 0, 0);
        let gguf = open(&file.data(32, &[0, 0, 128, 63, 0, 0, 0, 64])).unwrap();
        assert_eq!(gguf.version(), version);
        assert_eq!(read(&gguf, "t", Kind::Float), Tensor::from_slice(&[1.0_f32, 2.0]));
        assert_eq!(gguf.metadata().u32("k").unwrap(), 7);
    }
}

#[test]
fn damaged_files_are_refused() {
    let data = [0; 8];
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "magic number: expected 4 bytes, found 0"),
        ("other magic", b"PK\x03\x04............".to_vec(), "expected `GGUF`, found `PK\\x03\\x04`"),
        ("version 1", GgufBytes::new(1, 0, 0).bytes, "GGUF version 1 is not supported"),
        ("version 4", GgufBytes::new(4, 0, 0).bytes, "expected 2 or 3, found 4"),
        ("big-endian", GgufBytes::new(3_u32.swap_bytes(), 0, 0).bytes, "big-endian"),
        ("too many tensors", GgufBytes::new(3, u64::MAX, 0).bytes, "number of tensors: 18446744073709551615"),
        (
            "too many keys",
            GgufBytes::new(3, 0, 1 << 61).bytes,
            "number of metadata values: 2305843009213693952",
        ),
        ("truncated data", small().data(32, &data[..7]), "end after the file's"),
        ("truncated header", small().bytes[..60].to_vec(), "expected 8 bytes"),
        (
            "same key twice",
            {
                let mut file = GgufBytes::new(3, 0, 2);
                file.key("k", 0, &[1]).key("k", 0, &[2]).bytes.clone()
            },
            "the key `k` is there twice",
        ),
        (
            "same tensor twice",
            {
                let mut file = GgufBytes::new(3, 2, 0);
                file.tensor("t", &[0], 0, 0).tensor("t", &[0], 0, 0).data(32, &[])
            },
            "the tensor `t` is there twice",
        ),
        (
            "overlap",
            {
                let mut file = GgufBytes::new(3, 2, 0);
                file.tensor("a", &[16], 0, 0).tensor("b", &[16], 0, 32).data(32, &[0; 128])
            },
            "two tensors overlap",
        ),
        (
            "unaligned",
            GgufBytes::new(3, 1, 0).tensor("t", &[1], 0, 4).data(32, &data),
            "multiple of 32, found 4",
        ),
        (
            "offset overflow",
            GgufBytes::new(3, 1, 0).tensor("t", &[1], 0, u64::MAX - 31).data(32, &data),
            "end after",
        ),
        (
            "shape overflow",
            GgufBytes::new(3, 1, 0).tensor("t", &[1 << 40, 1 << 40], 0, 0).data(32, &data),
            "overflows",
        ),
        (
            "zero hides overflow",
            { GgufBytes::new(3, 1, 0).tensor("t", &[0, 1 << 40, 1 << 40], 0, 0).data(32, &data) },
            "overflows",
        ),
        ("huge size", GgufBytes::new(3, 1, 0).tensor("t", &[u64::MAX], 0, 0).data(32, &data), "overflows"),
        (
            "rank",
            GgufBytes::new(3, 1, 0).tensor("t", &[1; 9], 0, 0).data(32, &data),
            "at most 8 dimensions, found 9",
        ),
        (
            "half a block",
            GgufBytes::new(3, 1, 0).tensor("t", &[16, 2], 2, 0).data(32, &[0; 18]),
            "multiple of 32 elements",
        ),
        (
            "unknown encoding",
            GgufBytes::new(3, 1, 0).tensor("t", &[1], 99, 0).data(32, &data),
            "unknown encoding 99",
        ),
        (
            "IQ encoding",
            GgufBytes::new(3, 1, 0).tensor("t", &[256], 16, 0).data(32, &[0; 66]),
            "`t` in IQ2_XXS is not supported; supported: F32",
        ),
        (
            "name not UTF-8",
            {
                let mut file = GgufBytes::new(3, 0, 1);
                file.string([255]).u32(0).bytes.push(1);
                file.bytes
            },
            "not UTF-8",
        ),
        (
            "value type",
            GgufBytes::new(3, 0, 1).key("k", 13, &[0]).bytes.clone(),
            "expected 0 ..= 12, found 13",
        ),
        ("bool", GgufBytes::new(3, 0, 1).key("k", 7, &[2]).bytes.clone(), "expected 0 or 1, found 2"),
        (
            "long string",
            GgufBytes::new(3, 0, 1).key("k", 8, &u64::MAX.to_le_bytes()).bytes.clone(),
            "string: 18446744073709551615",
        ),
        (
            "long array",
            {
                let mut file = GgufBytes::new(3, 0, 1);
                file.string("k").u32(9).u32(12).u64(1 << 61).bytes.clone()
            },
            "length of an array: 2305843009213693952",
        ),
        (
            "deep arrays",
            {
                let mut file = GgufBytes::new(3, 0, 1);
                file.string("k").u32(9);
                for _ in 0..100 {
                    file.u32(9).u64(1);
                }
                file.bytes
            },
            "nested more than 4 deep",
        ),
        ("parts", GgufBytes::new(3, 0, 1).key("split.count", 2, &[3, 0]).data(32, &[]), "one of 3 parts"),
        (
            "alignment 0",
            GgufBytes::new(3, 0, 1).key("general.alignment", 4, &[0; 4]).data(32, &[]),
            "found 0",
        ),
        (
            "alignment 24",
            GgufBytes::new(3, 0, 1).key("general.alignment", 0, &[24]).data(32, &[]),
            "power of two",
        ),
        (
            "alignment a string",
            GgufBytes::new(3, 0, 1).key("general.alignment", 8, &[0; 8]).data(32, &[]),
            "found the string \"\"",
        ),
    ];
    for (case, bytes, expected) in cases {
        let found = refusal(&bytes);
        assert!(found.contains(expected), "{case}: {found}");
        assert!(found.len() < 400, "{case}: {} characters", found.len());
    }
}

#[test]
fn what_is_no_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(Gguf::open(directory.path()), Err(Error::Io { .. })));
    assert!(matches!(Gguf::open(directory.path().join("absent")), Err(Error::Io { .. })));
}
