//! Valid files, damaged at random: readers must refuse them or read them, and never panic.
//!
//! `CONTROLGEN_FUZZ_CASES` sets how many cases each reader gets; a longer run is
//! `CONTROLGEN_FUZZ_CASES=100000 cargo test -p controlgen-core --test damaged -- --nocapture`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use common::{GgufBytes, alter_gguf, alter_safetensors, damage_bytes, damage_field, damage_json};
use controlgen_core::Error;
use controlgen_core::checkpoint::{Safetensors, TensorSource, save};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tch::{Device, Kind, Tensor};

const DEFAULT_CASES: u64 = 2000;

fn cases() -> u64 {
    std::env::var("CONTROLGEN_FUZZ_CASES").map_or(DEFAULT_CASES, |text| text.parse().unwrap())
}

/// How far a case got.
#[derive(Clone, Copy, PartialEq)]
enum Reached {
    Refused,
    /// The file was opened, but no tensor could be read.
    Opened,
    Tensors,
}

/// Reads every tensor as its own type, as bf16, and in the wrong shape.
fn read_all(source: &dyn TensorSource, file_length: usize) -> Reached {
    let mut reached = Reached::Opened;
    for name in source.names() {
        let info = source.info(&name).expect("a name that was listed");
        let count: i64 = info.shape.iter().product();
        assert!(count <= 4 * file_length as i64, "{name}: {count} elements from {file_length} bytes");
        for kind in [info.kind, Kind::BFloat16] {
            let mut tensor = Tensor::empty(&info.shape, (kind, Device::Cpu));
            match source.read(&name, &mut tensor) {
                Ok(()) => reached = Reached::Tensors,
                Err(error) => check(&error),
            }
        }
        let mut wrong: Vec<i64> = info.shape.iter().map(|&size| size.min(2)).collect();
        wrong.push(1);
        assert!(source.read(&name, &mut Tensor::empty(&wrong, (info.kind, Device::Cpu))).is_err());
    }
    reached
}

/// LibTorch must not be the one to refuse, and messages are short whatever the file holds.
fn check(error: &Error) {
    assert!(
        matches!(
            error,
            Error::Format { .. }
                | Error::Unsupported { .. }
                | Error::Config { .. }
                | Error::Kind { .. }
                | Error::Io { .. }
        ),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(text.len() < 1000, "{} characters: {text}", text.len());
}

/// Runs the cases: `damage` makes a file of a seed, `read` opens it.
fn run(
    what: &str,
    damage: impl Fn(&mut ChaCha8Rng) -> Vec<u8>,
    path: &Path,
    read: impl Fn(usize) -> Result<Reached, Error>,
) {
    let start = Instant::now();
    let (mut opened, mut tensors) = (0_u64, 0_u64);
    for seed in 0..cases() {
        let bytes = damage(&mut ChaCha8Rng::seed_from_u64(seed));
        fs::write(path, &bytes).unwrap();
        match catch_unwind(AssertUnwindSafe(|| read(bytes.len()))) {
            Ok(Ok(reached)) => {
                opened += u64::from(reached != Reached::Refused);
                tensors += u64::from(reached == Reached::Tensors);
            }
            Ok(Err(error)) => check(&error),
            Err(_) => panic!("{what}: seed {seed} panicked"),
        }
    }
    let share = |count: u64| 100.0 * count as f64 / cases() as f64;
    println!(
        "{what}: {} cases, {:.1} % opened, {:.1} % reached the tensors, {:.1} s",
        cases(),
        share(opened),
        share(tensors),
        start.elapsed().as_secs_f64()
    );
    // Damage that never gets past the first check would test nothing behind it, and damage that is never
    // found nothing at all.
    assert!((20.0..=80.0).contains(&share(tensors)), "{what}");
}

/// What we accept, the `safetensors` crate accepts with the same content; what it accepts beyond that, we
/// refuse for a reason of ours.
fn agree(path: &Path, ours: &Result<Safetensors, Error>) {
    let bytes = fs::read(path).unwrap();
    match (ours, safetensors::SafeTensors::deserialize(&bytes)) {
        (Ok(ours), Ok(theirs)) => {
            assert_eq!(ours.names().len(), theirs.len());
            for (name, tensor) in theirs.iter() {
                let info = ours.info(name).expect("a tensor of the other reader");
                assert!(
                    info.shape.iter().map(|&size| size as usize).eq(tensor.shape().iter().copied()),
                    "{name}"
                );
                let count: usize = tensor.shape().iter().product();
                let mut data = vec![0; tensor.data().len()];
                let mut into = Tensor::empty(&info.shape, (info.kind, Device::Cpu));
                // Truth values are checked when they are read.
                if info.kind != Kind::Bool {
                    ours.read(name, &mut into).unwrap();
                    into.copy_data_u8(&mut data, count);
                    assert_eq!(data, tensor.data(), "{name}");
                }
            }
        }
        (Ok(_), Err(error)) => panic!("only we accept it: {error}"),
        (Err(ours), Ok(theirs)) => {
            let text = ours.to_string();
            let reasons = ["twice", "at most 8 numbers", "element type", "overflows", "surrogate"];
            // Of a name that is there twice, they take the last and do not look at the first.
            let described = String::from_utf8_lossy(&bytes).matches("data_offsets").count();
            let known = reasons.iter().any(|reason| text.contains(reason)) || described > theirs.len();
            assert!(known, "only we refuse it: {text}");
        }
        (Err(_), Err(_)) => {}
    }
}

#[test]
fn safetensors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    let numbers = || Tensor::arange(24, (Kind::Float, Device::Cpu));
    let tensors: Vec<(String, Tensor)> = [
        ("model.layers.0.weight", numbers().reshape([4, 6])),
        ("model.layers.0.bias", numbers().narrow(0, 0, 4).to_kind(Kind::BFloat16)),
        ("flags", numbers().narrow(0, 0, 8).gt(3.0)),
        ("ids", numbers().to_kind(Kind::Int64)),
        ("three", numbers().reshape([2, 3, 4]).to_kind(Kind::Half)),
        ("empty", Tensor::zeros([0, 5], (Kind::Double, Device::Cpu))),
        ("scalar \"ü\"", Tensor::from(1.5)),
    ]
    .map(|(name, tensor)| (name.to_owned(), tensor))
    .into();
    save(&path, &tensors, &[("format", "pt"), ("note", "a \"b\"")]).unwrap();
    let valid = [
        fs::read(&path).unwrap(),
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kinds.safetensors")).unwrap(),
    ];
    let damage = |rng: &mut ChaCha8Rng| {
        let mut bytes = valid[rng.random_range(0..valid.len())].clone();
        for _ in 0..rng.random_range(0..=2) {
            alter_safetensors(rng, &mut bytes);
        }
        let head = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        match rng.random_range(0..4) {
            0 => damage_bytes(rng, &mut bytes, head),
            1 => damage_json(rng, &mut bytes, 8),
            2 => {
                damage_json(rng, &mut bytes, 8);
                damage_bytes(rng, &mut bytes, head);
            }
            _ => {}
        }
        bytes
    };
    run("safetensors", damage, &path, |length| {
        let opened = Safetensors::open(&path);
        agree(&path, &opened);
        let file = opened?;
        if let Err(error) = file.metadata("note") {
            check(&error);
        }
        Ok(read_all(&file, length))
    });
}

#[test]
fn index() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for (shard, tensor) in [("one.safetensors", "a.weight"), ("two.safetensors", "b.weight")] {
        save(at(shard), &[(tensor.to_owned(), Tensor::ones([3], (Kind::Float, Device::Cpu)))], &[]).unwrap();
    }
    let valid = br#"{"metadata":{"total_size":24,"x":[1,{"y":null}]},
        "weight_map":{"a.weight":"one.safetensors","b.weight":"two.safetensors"}}"#;
    let damage = |rng: &mut ChaCha8Rng| {
        let mut bytes = valid.to_vec();
        if rng.random() {
            let head = bytes.len();
            damage_bytes(rng, &mut bytes, head);
        } else {
            damage_json(rng, &mut bytes, 0);
        }
        bytes
    };
    let path = at("model.safetensors.index.json");
    run("index", damage, &path, |_| Ok(read_all(&Safetensors::open(&path)?, 1000)));
}

#[cfg(feature = "gguf")]
#[test]
fn gguf() {
    use controlgen_core::gguf::{Gguf, Value};

    fn walk(value: Value<'_>) -> usize {
        match value {
            Value::Array(array) => array.iter().map(walk).sum(),
            _ => 1,
        }
    }

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.gguf");
    let mut file = GgufBytes::new(3, 4, 7);
    file.key("general.architecture", 8, b"\x05\0\0\0\0\0\0\0llama");
    file.key("general.alignment", 4, &32_u32.to_le_bytes());
    file.key("flag", 7, &[1]).key("epsilon", 6, &1e-5_f32.to_le_bytes());
    file.string("tokens").u32(9).u32(8).u64(3).string("a").string("bc").string("Ġthe");
    file.string("types").u32(9).u32(5).u64(2).bytes.extend([1, 0, 0, 0, 2, 0, 0, 0]);
    file.string("nested").u32(9).u32(9).u64(2).u32(0).u64(2).bytes.extend([1, 2]);
    file.u32(7).u64(1).bytes.push(1);
    file.tensor("norm", &[6], 0, 0).tensor("half", &[2, 3, 2], 1, 32).tensor("q4", &[64, 2], 2, 64);
    file.tensor("q6", &[256], 14, 160);
    let built = file.data(32, &[3; 160 + 210]);
    let written = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quants.gguf")).unwrap();
    let damage = |rng: &mut ChaCha8Rng| {
        if rng.random_range(0..5) == 0 {
            let mut bytes = written.clone();
            damage_bytes(rng, &mut bytes, 1900);
            return bytes;
        }
        let mut bytes = built.clone();
        for _ in 0..rng.random_range(0..=3) {
            alter_gguf(rng, &mut bytes, &file);
        }
        match rng.random_range(0..4) {
            0 => damage_bytes(rng, &mut bytes, file.bytes.len()),
            1 => damage_field(rng, &mut bytes, &file.fields),
            2 => {
                damage_field(rng, &mut bytes, &file.fields);
                damage_field(rng, &mut bytes, &file.fields);
            }
            _ => {}
        }
        bytes
    };
    run("gguf", damage, &path, |length| {
        let file = Gguf::open(&path)?;
        let metadata = file.metadata();
        for key in metadata.keys() {
            let value = metadata.get(key).expect("a key that was listed");
            assert!(walk(value) <= length, "{key}");
            let _ = (
                metadata.u32(key),
                metadata.str(key),
                metadata.strings(key),
                metadata.f32s(key),
                value.to_string(),
            );
        }
        Ok(read_all(&file, length))
    });
}
