//! Opening a file allocates at most twice its size, whatever the file claims.
//!
//! One test function: the counts are of the whole process.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests
#![allow(unsafe_code)] // a global allocator

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use common::{damage_bytes, damage_json, safetensors};
use controlgen_core::checkpoint::{Safetensors, TensorSource, save};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tch::{Device, Kind, Tensor};

/// What paths, error messages and the like may take besides.
const CONSTANT: usize = 32 << 10;

/// Bytes ever allocated, not counting what was freed.
static TOTAL: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TOTAL.fetch_add(layout.size(), Relaxed);
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Calls `open`, and gives its value with the bytes allocated by it: in all, and at most at a time.
fn measure<T>(open: impl FnOnce() -> T) -> (T, usize, usize) {
    let (total, live) = (TOTAL.load(Relaxed), LIVE.load(Relaxed));
    PEAK.store(live, Relaxed);
    let value = open();
    (value, TOTAL.load(Relaxed) - total, PEAK.load(Relaxed) - live)
}

/// Opens a file and checks what that took. Gives whether it was accepted.
fn check<T>(what: &str, path: &Path, bytes: &[u8], open: impl FnOnce() -> Option<T>) -> bool {
    fs::write(path, bytes).unwrap();
    let (opened, total, peak) = measure(open);
    let ratio = |count: usize| count as f64 / bytes.len() as f64;
    if bytes.len() > 1 << 19 {
        let verdict = if opened.is_some() { "accepted" } else { "refused" };
        println!("{what}: {verdict}, {:.2} of its size in all, {:.2} at a time", ratio(total), ratio(peak));
    }
    assert!(total <= 2 * bytes.len() + CONSTANT, "{what}: {total} bytes for a file of {}", bytes.len());
    opened.is_some()
}

fn repeated(count: usize, item: impl Fn(usize) -> String) -> String {
    (0..count).map(item).collect::<Vec<_>>().join(",")
}

#[test]
fn opening_takes_at_most_twice_the_size() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.safetensors");
    let open = || Safetensors::open(&path).ok();
    let empty = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    let at = |shape: &str, at: usize| {
        format!(r#"{{"dtype":"U8","shape":{shape},"data_offsets":[{at},{}]}}"#, at + 1)
    };
    let long = "x".repeat(1 << 20);
    let escaped = r"\u0041".repeat(1 << 17);
    let object = |members: String| format!("{{{members}}}");
    for (what, accepted, header, data) in [
        ("many tensors", true, object(repeated(30_000, |n| format!("\"{n}\":{empty}"))), 0),
        (
            "many dimensions",
            true,
            object(repeated(20_000, |n| format!("\"{n}\":{}", at("[1,1,1,1,1,1,1,1]", n)))),
            20_000,
        ),
        ("long names", true, object(repeated(16, |n| format!("\"{n}{}\":{empty}", &long[..60_000]))), 0),
        (
            "escaped names",
            true,
            object(repeated(16, |n| format!("\"{n}{}\":{empty}", &escaped[..60_000]))),
            0,
        ),
        ("one long name", false, object(format!("\"{long}\":{empty}")), 0),
        ("one escaped name", false, object(format!("\"{escaped}\":{empty}")), 0),
        ("the same name", false, object(repeated(30_000, |_| format!("\"a\":{empty}"))), 0),
        ("long metadata", true, object(format!("\"__metadata__\":{{\"a\":\"{escaped}\"}}")), 0),
        (
            "much metadata",
            true,
            object(format!("\"__metadata__\":{{{}}}", repeated(100_000, |n| format!("\"{n}\":\"\"")))),
            0,
        ),
        ("long type", false, object(format!("\"a\":{{\"dtype\":\"{long}\"}}")), 0),
        ("escaped type", false, object(format!("\"a\":{{\"dtype\":\"{escaped}\"}}")), 0),
        (
            "long shape",
            false,
            object(format!("\"a\":{{\"shape\":[{}]}}", repeated(500_000, |_| "1".to_owned()))),
            0,
        ),
        (
            "unknown field",
            true,
            object(format!(
                "\"a\":{}",
                empty.replace('}', &format!(",\"x\":[{}]}}", repeated(500_000, |_| "1".to_owned())))
            )),
            0,
        ),
        ("deep", false, format!("{{\"a\":{{\"x\":{}", "[".repeat(1 << 20)), 0),
    ] {
        assert_eq!(check(what, &path, &safetensors(&header, &vec![0; data]), open), accepted, "{what}");
    }
    for length in [0, 1, 1 << 20, 100_000_000, 100_000_001, u64::MAX] {
        let bytes = [&length.to_le_bytes()[..], &b"{".repeat(1 << 10)].concat();
        check("false length", &path, &bytes, open);
    }

    let tensors: Vec<(String, Tensor)> =
        (0..20).map(|n| (format!("layer.{n}"), Tensor::ones([2, 3], (Kind::Float, Device::Cpu)))).collect();
    save(&path, &tensors, &[("format", "pt")]).unwrap();
    let valid = fs::read(&path).unwrap();
    for seed in 0..1000 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut bytes = valid.clone();
        if rng.random() {
            damage_bytes(&mut rng, &mut bytes, 1600);
        } else {
            damage_json(&mut rng, &mut bytes, 8);
        }
        check("damaged", &path, &bytes, open);
    }

    save(directory.path().join("s"), &tensors[..1], &[]).unwrap();
    let path = directory.path().join("model.safetensors.index.json");
    let open = || Safetensors::open(&path).ok();
    let index = |members: String| format!("{{\"weight_map\":{{{members}}}}}");
    for (what, accepted, index) in [
        ("index of one shard", true, index(repeated(40_000, |_| "\"layer.0\":\"s\"".to_owned()))),
        ("index of many shards", false, index(repeated(50_000, |n| format!("\"{n}\":\"{n}\"")))),
        ("index with long names", false, index(repeated(16, |n| format!("\"{n}\":\"{}\"", &long[..60_000])))),
    ] {
        fs::write(&path, &index).unwrap();
        let (opened, _, peak) = measure(open);
        println!("{what}: {:.2} at a time", peak as f64 / index.len() as f64);
        assert_eq!(opened.is_some(), accepted, "{what}");
        assert!(
            peak <= 2 * index.len() + 4 * CONSTANT,
            "{what}: {peak} bytes for an index of {}",
            index.len()
        );
    }

    #[cfg(feature = "gguf")]
    gguf(&directory.path().join("test.gguf"));
    #[cfg(target_os = "linux")]
    pages_are_given_back(&directory.path().join("large.safetensors"));
}

/// Reading 256 MB through one tensor of 16 MB takes little more than that.
#[cfg(target_os = "linux")]
fn pages_are_given_back(path: &Path) {
    let peak = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() >> 10
    };
    let (count, size) = (8, 32 << 20);
    let tensor = |n: usize| {
        let (from, to) = (n * size, (n + 1) * size);
        format!("\"{n}\":{{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[{from},{to}]}}", size >> 2)
    };
    fs::write(path, safetensors(&format!("{{{}}}", repeated(count, tensor)), &[])).unwrap();
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() + (count * size) as u64).unwrap();
    let checkpoint = Safetensors::open(path).unwrap();
    let mut tensor = Tensor::empty([size as i64 >> 2], (Kind::BFloat16, Device::Cpu));
    let before = peak();
    for n in 0..count {
        checkpoint.read(&n.to_string(), &mut tensor).unwrap();
    }
    let taken = peak() - before;
    println!("reading 256 MB: {taken} MB");
    assert!(taken <= 40, "{taken} MB");
}

#[cfg(feature = "gguf")]
fn gguf(path: &Path) {
    use common::{GgufBytes, damage_field};
    use controlgen_core::gguf::Gguf;

    let open = || Gguf::open(path).ok();
    let built = |tensors: u64, keys: u64, build: &dyn Fn(&mut GgufBytes)| {
        let mut file = GgufBytes::new(3, tensors, keys);
        build(&mut file);
        file.data(32, &[])
    };
    let list = |file: &mut GgufBytes, kind: u32, count: u64, item: &[u8]| {
        file.string("a").u32(9).u32(kind).u64(count).bytes.extend(item);
    };
    let strings = vec![0; 8 << 17]; // empty strings
    let nested: Vec<u8> = [&0_u32.to_le_bytes()[..], &[0; 8]].concat().repeat(1 << 16); // empty arrays
    for (what, accepted, bytes) in [
        (
            "many keys",
            true,
            built(0, 50_000, &|file| {
                for n in 0..50_000 {
                    file.key(&n.to_string(), 0, &[0]);
                }
            }),
        ),
        (
            "the same key",
            false,
            built(0, 50_000, &|file| {
                for _ in 0..50_000 {
                    file.key("", 0, &[0]);
                }
            }),
        ),
        (
            "many tensors",
            true,
            built(50_000, 0, &|file| {
                for n in 0..50_000 {
                    file.tensor(&n.to_string(), &[0], 0, 0);
                }
            }),
        ),
        (
            "the same tensor",
            false,
            built(50_000, 0, &|file| {
                for _ in 0..50_000 {
                    file.tensor("", &[0], 0, 0);
                }
            }),
        ),
        (
            "many dimensions",
            true,
            built(20_000, 0, &|file| {
                for n in 0..20_000 {
                    file.tensor(&n.to_string(), &[0, 1, 1, 1, 1, 1, 1, 1], 0, 0);
                }
            }),
        ),
        (
            "long name",
            true,
            built(1, 0, &|file| {
                file.tensor(&"x".repeat(1 << 20), &[0], 0, 0);
            }),
        ),
        ("many strings", true, built(0, 1, &|file| list(file, 8, 1 << 17, &strings))),
        ("more strings than there are", false, built(0, 1, &|file| list(file, 8, 1 << 18, &strings))),
        ("many arrays", true, built(0, 1, &|file| list(file, 9, 1 << 16, &nested))),
        ("many numbers", true, built(0, 1, &|file| list(file, 4, 1 << 18, &strings))),
        ("false counts", false, built(1 << 15, 1 << 15, &|file| file.bytes.resize(1 << 20, 0))),
    ] {
        assert_eq!(check(what, path, &bytes, open), accepted, "{what}");
    }
    for count in [1, 1 << 20, 1 << 32, 1 << 60, u64::MAX] {
        check("false count of tensors", path, &built(count, 0, &|_| ()), open);
        check("false count of keys", path, &built(0, count, &|_| ()), open);
        check(
            "false length of a string",
            path,
            &built(0, 1, &|file| {
                file.u64(count);
            }),
            open,
        );
        check("false length of an array", path, &built(0, 1, &|file| list(file, 8, count, &[])), open);
    }

    let mut file = GgufBytes::new(3, 2, 2);
    file.string("a").u32(9).u32(8).u64(2).string("b").string("c").key("d", 4, &[0; 4]);
    file.tensor("e", &[4, 2], 0, 0).tensor("f", &[32], 2, 32);
    let valid = file.data(32, &[0; 64]);
    for seed in 0..1000 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut bytes = valid.clone();
        if rng.random() {
            damage_field(&mut rng, &mut bytes, &file.fields);
        } else {
            damage_bytes(&mut rng, &mut bytes, file.bytes.len());
        }
        check("damaged", path, &bytes, open);
    }
}
