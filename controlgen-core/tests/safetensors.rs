//! Safetensors files, against files written by torch and files read and written by the `safetensors` crate.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::{fixture, read, safetensors};
use controlgen_core::Error;
use controlgen_core::checkpoint::{Safetensors, TensorInfo, TensorSource, save};
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn named(name: &str, tensor: Tensor) -> (String, Tensor) {
    (name.to_owned(), tensor)
}

fn open_bytes(bytes: &[u8]) -> Result<Safetensors, Error> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.safetensors");
    fs::write(&path, bytes).unwrap();
    Safetensors::open(&path)
}

fn refusal(result: Result<Safetensors, Error>) -> String {
    result.map_or_else(|error| error.to_string(), |_| "accepted".to_owned())
}

#[test]
fn every_element_type_equals_torch() {
    let file = Safetensors::open(fixture("kinds.safetensors")).unwrap();
    let kinds = [
        ("BOOL", Kind::Bool),
        ("U8", Kind::Uint8),
        ("I8", Kind::Int8),
        ("I16", Kind::Int16),
        ("I32", Kind::Int),
        ("I64", Kind::Int64),
        ("F16", Kind::Half),
        ("BF16", Kind::BFloat16),
        ("F32", Kind::Float),
        ("F64", Kind::Double),
        ("F8_E4M3", Kind::Float8e4m3fn),
        ("F8_E5M2", Kind::Float8e5m2),
        ("F8_E4M3FNUZ", Kind::Float8e4m3fnuz),
        ("F8_E5M2FNUZ", Kind::Float8e5m2fnuz),
    ];
    for (name, kind) in kinds {
        assert_eq!(file.info(name), Some(TensorInfo { shape: vec![3, 5], kind }), "{name}");
        let expected = format!("{name}.float");
        if file.info(&expected).is_some() {
            assert_eq!(read(&file, name, Kind::Float), read(&file, &expected, Kind::Float), "{name}");
        }
        // Without conversion, the bytes are those of the file.
        let bytes = fs::read(fixture("kinds.safetensors")).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let ours = read(&file, name, kind);
        let mut data = vec![0; 15 * kind.elt_size_in_bytes()];
        ours.copy_data_u8(&mut data, 15);
        assert_eq!(data, theirs.tensor(name).unwrap().data(), "{name}");
    }
    assert_eq!(read(&file, "scalar", Kind::Double).double_value(&[]), 2.5);
    assert_eq!(file.info("scalar").unwrap().shape, [0_i64; 0]);
    assert_eq!(read(&file, "empty", Kind::Float).size(), [0, 7]);
    assert_eq!(read(&file, "quote \" slash \\ tab \t ü 日本 😀", Kind::Float).double_value(&[0]), 1.0);
    assert_eq!(file.names().len(), 14 + 7 + 3);
    assert_eq!(file.metadata("note").unwrap().unwrap(), "a \"quoted\" ü");
    assert_eq!(file.metadata("format").unwrap().unwrap(), "pt");
    assert_eq!(file.metadata("absent").unwrap(), None);
}

#[test]
fn what_is_saved_is_read_back_by_the_safetensors_crate() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved.safetensors");
    let kinds = [
        Kind::BFloat16,
        Kind::Half,
        Kind::Float,
        Kind::Double,
        Kind::Int64,
        Kind::Int,
        Kind::Int16,
        Kind::Int8,
        Kind::Uint8,
        Kind::Bool,
        Kind::Float8e4m3fn,
    ];
    let mut tensors: Vec<(String, Tensor)> = kinds
        .iter()
        .map(|&kind| named(&format!("{kind:?} \"\n"), (Tensor::rand([3, 5], FLOAT) * 10.0).to_kind(kind)))
        .collect();
    let matrix = Tensor::arange(12, FLOAT).reshape([3, 4]);
    tensors.push(named("transposed", matrix.transpose(0, 1)));
    tensors.push(named("column", matrix.select(1, 2)));
    tensors.push(named("scalar", Tensor::from(1.5_f32)));
    tensors.push(named("empty", Tensor::zeros([0, 3], FLOAT)));
    tensors.push(named("leaf", Tensor::ones([2], FLOAT).set_requires_grad(true)));
    save(&path, &tensors, &[("format", "pt"), ("b", "ü\"\\\n")]).unwrap();

    let bytes = fs::read(&path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), tensors.len());
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header % 8, 0);
    let metadata: BTreeMap<_, _> = metadata.metadata().clone().unwrap().into_iter().collect();
    assert_eq!(
        metadata.into_iter().collect::<Vec<_>>(),
        [("b".to_owned(), "ü\"\\\n".to_owned()), ("format".to_owned(), "pt".to_owned())]
    );
    let ours = Safetensors::open(&path).unwrap();
    for (name, tensor) in &tensors {
        let view = theirs.tensor(name).unwrap();
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        assert_eq!(shape, tensor.size(), "{name}");
        let mut data = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut data, tensor.numel());
        assert_eq!(data, view.data(), "{name}");
        let back = read(&ours, name, tensor.kind());
        if tensor.kind() == Kind::Float8e4m3fn {
            assert_eq!(back.to_kind(Kind::Float), tensor.to_kind(Kind::Float), "{name}");
        } else {
            assert_eq!(back, *tensor, "{name}");
        }
    }
    // Equal input, equal bytes.
    save(&path, &tensors, &[("b", "ü\"\\\n"), ("format", "pt")]).unwrap();
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "temporary files are gone");
}

#[test]
fn large_tensors_go_through_in_pieces() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.safetensors");
    let large = Tensor::arange(5_000_003, FLOAT);
    save(
        &path,
        &[named("large", large.shallow_clone()), named("odd", Tensor::ones([3], (Kind::Int8, Device::Cpu)))],
        &[],
    )
    .unwrap();
    let file = Safetensors::open(&path).unwrap();
    assert_eq!(read(&file, "large", Kind::Float), large);
    assert_eq!(read(&file, "large", Kind::BFloat16), large.to_kind(Kind::BFloat16));
    let wide = Tensor::zeros([5_000_003, 2], FLOAT);
    file.read("large", &mut wide.select(1, 1)).unwrap();
    assert_eq!(wide.select(1, 1), large);
    assert_eq!(wide.select(1, 0).abs().max().double_value(&[]), 0.0);
}

#[test]
fn data_need_no_alignment() {
    for padding in 0..8 {
        let header =
            format!(r#"{{"t":{{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}{}}}"#, " ".repeat(padding));
        let data: Vec<u8> = [1.5_f64, -2.0].iter().flat_map(|number| number.to_le_bytes()).collect();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.safetensors");
        fs::write(&path, safetensors(&header, &data)).unwrap();
        let file = Safetensors::open(&path).unwrap();
        assert_eq!(read(&file, "t", Kind::Double), Tensor::from_slice(&[1.5_f64, -2.0]), "{padding}");
        assert_eq!(read(&file, "t", Kind::Float), Tensor::from_slice(&[1.5_f32, -2.0]), "{padding}");
    }
}

#[test]
fn tensors_are_not_broadcast_or_reinterpreted() {
    let file = Safetensors::open(fixture("kinds.safetensors")).unwrap();
    let into = |shape: &[i64], kind: Kind, name: &str| {
        file.read(name, &mut Tensor::zeros(shape, (kind, Device::Cpu))).map_err(|error| error.to_string())
    };
    assert!(
        into(&[2, 3, 5], Kind::Float, "F32").unwrap_err().contains("expected shape [2, 3, 5], found [3, 5]")
    );
    assert!(into(&[5, 3], Kind::Float, "F32").is_err() && into(&[15], Kind::Float, "F32").is_err());
    assert!(into(&[1], Kind::Float, "scalar").is_err());
    assert!(
        into(&[3, 5], Kind::Float, "I8")
            .unwrap_err()
            .contains("expected element type Float or what converts")
    );
    assert!(into(&[3, 5], Kind::Int64, "F32").is_err() && into(&[3, 5], Kind::Int, "I64").is_err());
    assert!(into(&[3, 5], Kind::Uint8, "BOOL").is_err() && into(&[3, 5], Kind::Bool, "U8").is_err());
    assert!(into(&[3, 5], Kind::Float8e5m2, "F32").is_err());
    assert!(into(&[3, 5], Kind::Int64, "U8").is_ok() && into(&[3, 5], Kind::Int, "I16").is_ok());
    assert!(matches!(file.read("F32", &mut Tensor::new()), Err(Error::Value { .. })));
    assert!(matches!(file.read("absent", &mut Tensor::zeros([1], FLOAT)), Err(Error::Format { .. })));
    // A leaf that requires grad is written to, and still requires grad.
    let mut leaf = Tensor::zeros([3, 5], FLOAT).set_requires_grad(true);
    file.read("F32", &mut leaf).unwrap();
    assert!(leaf.requires_grad() && leaf.is_leaf());
}

const TENSOR: &str = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;

const EMPTY: &str = r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#;

#[test]
fn damaged_files_are_refused() {
    let tensor =
        |description: &str, data: usize| safetensors(&format!("{{\"t\":{description}}}"), &vec![0; data]);
    let field = |dtype: &str, shape: &str, offsets: &str, data: usize| {
        tensor(&format!(r#"{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}"#), data)
    };
    assert_eq!(refusal(open_bytes(&tensor(TENSOR, 8))), "accepted");
    let long = "x".repeat(70_000);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "expected at least 8 bytes, found 0"),
        ("length only", vec![0; 8], "expected `{`, found the end"),
        (
            "long header",
            [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
            "a header of 18446744073709551615 bytes, expected at most 2",
        ),
        ("truncated header", tensor(TENSOR, 8)[..40].to_vec(), "expected at most 32"),
        ("truncated data", tensor(TENSOR, 7), "end by 7, found 0 to 8"),
        ("more data", tensor(TENSOR, 9), "the tensors take 8 bytes, the file holds 9"),
        ("not JSON", safetensors("hello", &[]), "expected `{`, found `h`"),
        ("JSON goes on", safetensors("{}{}", &[]), "expected the end, found `{`"),
        ("unclosed string", safetensors("{\"abc", &[]), "a string without an end"),
        ("escape at the end", safetensors("{\"abc\\", &[]), "a string without an end"),
        ("not UTF-8", [&8_u64.to_le_bytes()[..], b"{\"\xff\":{}}"].concat(), "UTF-8"),
        (
            "bad escape",
            safetensors(&format!(r#"{{"\u12":{TENSOR}}}"#), &[0; 8]),
            "expected four hexadecimal digits",
        ),
        (
            "lone surrogate",
            safetensors(&format!(r#"{{"\ud800":{TENSOR}}}"#), &[0; 8]),
            "half of a surrogate pair",
        ),
        (
            "surrogates",
            safetensors(&format!(r#"{{"\ud83d\u0061":{TENSOR}}}"#), &[0; 8]),
            "half of a surrogate pair",
        ),
        (
            "second half",
            safetensors(&format!(r#"{{"\ude00":{TENSOR}}}"#), &[0; 8]),
            "half of a surrogate pair",
        ),
        ("unknown escape", safetensors(&format!(r#"{{"\x":{TENSOR}}}"#), &[0; 8]), "an unknown escape"),
        ("control", safetensors("{\"__metadata__\":{\"a\":\"\n\"}}", &[]), "a control character"),
        ("bad number", safetensors(r#"{"a":{"x":1.}}"#, &[]), "invalid number"),
        ("bad word", safetensors(r#"{"a":{"x":nul}}"#, &[]), "EOF"),
        ("tensor is a list", safetensors(r#"{"t":[]}"#, &[]), "expected `{`, found `[`"),
        ("no dtype", tensor(r#"{"shape":[2],"data_offsets":[0,8]}"#, 8), "a tensor without `dtype`"),
        ("no shape", tensor(r#"{"dtype":"F32","data_offsets":[0,8]}"#, 8), "a tensor without `shape`"),
        ("no offsets", tensor(r#"{"dtype":"F32","shape":[2]}"#, 8), "a tensor without `data_offsets`"),
        (
            "two dtypes",
            tensor(r#"{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}"#, 8),
            "a field is there twice",
        ),
        ("unknown dtype", field("\"F33\"", "[2]", "[0,8]", 8), "element type `F33`, expected one of BOOL"),
        ("4-bit dtype", field("\"F4\"", "[2]", "[0,1]", 1), "element type `F4`"),
        ("dtype a number", field("3", "[2]", "[0,8]", 8), "expected a string, found `3`"),
        ("negative size", field("\"F32\"", "[-2]", "[0,8]", 8), "expected an integer >= 0, found `-`"),
        ("fraction", field("\"F32\"", "[2.0]", "[0,8]", 8), "found a fraction"),
        ("leading zero", field("\"F32\"", "[02]", "[0,8]", 8), "begins with 0"),
        ("huge number", field("\"F32\"", "[18446744073709551616]", "[0,8]", 8), "exceeds 2^64"),
        ("shape overflow", field("\"F32\"", "[4294967296,4294967296]", "[0,8]", 8), "overflows"),
        ("zero hides overflow", field("\"F32\"", "[0,9223372036854775807,3]", "[0,0]", 0), "overflows"),
        ("rank", field("\"F32\"", "[1,1,1,1,1,1,1,1,1]", "[0,4]", 4), "at most 8 numbers"),
        ("wrong size", field("\"F32\"", "[3]", "[0,8]", 8), "Float of shape [3] takes 12 bytes"),
        ("other dtype", field("\"F16\"", "[2]", "[0,8]", 8), "takes 4 bytes"),
        ("reversed offsets", field("\"F32\"", "[2]", "[8,0]", 8), "takes 8 bytes"),
        ("three offsets", field("\"F32\"", "[2]", "[0,4,8]", 8), "at most 2 numbers"),
        ("one offset", field("\"F32\"", "[2]", "[8]", 8), "expected two numbers"),
        ("hole", field("\"F32\"", "[2]", "[8,16]", 16), "begin at 0"),
        ("out of range", field("\"F32\"", "[2]", "[0,18446744073709551615]", 8), "takes 8 bytes"),
        (
            "overlap",
            safetensors(&format!(r#"{{"a":{TENSOR},"b":{TENSOR}}}"#), &[0; 8]),
            "begin at 8 and end by 8, found 0 to 8",
        ),
        (
            "same name twice",
            safetensors(&format!(r#"{{"a":{TENSOR},"a":{}}}"#, TENSOR.replace("0,8", "8,16")), &[0; 16]),
            "the tensor `a` is there twice",
        ),
        (
            "same name, escaped",
            safetensors(&format!(r#"{{"a":{TENSOR},"\u0061":{}}}"#, TENSOR.replace("0,8", "8,16")), &[0; 16]),
            "the tensor `a` is there twice",
        ),
        ("empty name twice", safetensors(&format!(r#"{{"a":{EMPTY},"a":{EMPTY}}}"#), &[]), "twice"),
        ("long name", safetensors(&format!(r#"{{"{long}":{TENSOR}}}"#), &[0; 8]), "a name of 70002 bytes"),
        ("metadata twice", safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]), "twice"),
        (
            "metadata of numbers",
            safetensors(r#"{"__metadata__":{"a":1}}"#, &[]),
            "expected a string, found `1`",
        ),
        ("deep", tensor(&format!(r#"{{"x":{}"#, "[".repeat(100_000)), 0), "nested more than 32 deep"),
    ];
    for (case, bytes, expected) in cases {
        let result = open_bytes(&bytes);
        assert!(matches!(&result, Err(Error::Format { .. })), "{case}: {}", refusal(result));
        let found = refusal(result);
        assert!(found.contains(expected), "{case}: {found}");
        assert!(found.len() < 400, "{case}: {} characters", found.len());
    }
}

#[test]
fn names_may_be_escaped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.safetensors");
    let header = format!(
        r#"{{"\ud83d\ude00 \u00FC\/\b\f\n\r\t\"\\":{TENSOR},"x":{}}}"#,
        TENSOR.replace("0,8", "8,16")
    );
    fs::write(&path, safetensors(&header, &[0; 16])).unwrap();
    assert_eq!(Safetensors::open(&path).unwrap().names(), ["x", "😀 ü/\u{8}\u{c}\n\r\t\"\\"]);
}

#[test]
fn truth_values_are_zero_or_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.safetensors");
    let header = r#"{"t":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}}"#;
    fs::write(&path, safetensors(header, &[0, 1, 2])).unwrap();
    let file = Safetensors::open(&path).unwrap();
    let error = file.read("t", &mut Tensor::zeros([3], (Kind::Bool, Device::Cpu))).unwrap_err().to_string();
    assert!(error.contains("expected truth values 0 or 1, found 2"), "{error}");
}

/// A directory with two shards and an index of them.
fn sharded() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    save(
        at("model-1.safetensors"),
        &[named("a", Tensor::full([2], 1.0, FLOAT)), named("b", Tensor::full([3], 2.0, FLOAT))],
        &[("format", "pt")],
    )
    .unwrap();
    save(at("model-2.safetensors"), &[named("c", Tensor::full([4], 3.0, FLOAT))], &[("only", "here")])
        .unwrap();
    let index = r#"{"metadata": {"total_size": 36, "more": [1, {"x": null}, true, -1.5e3]},
        "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}"#;
    fs::write(at("model.safetensors.index.json"), index).unwrap();
    directory
}

#[test]
fn shards_are_one_checkpoint() {
    let directory = sharded();
    for path in [directory.path().to_owned(), directory.path().join("model.safetensors.index.json")] {
        let checkpoint = Safetensors::open(path).unwrap();
        let mut names = checkpoint.names();
        names.sort();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(read(&checkpoint, "b", Kind::Float), Tensor::full([3], 2.0, FLOAT));
        assert_eq!(read(&checkpoint, "c", Kind::Float), Tensor::full([4], 3.0, FLOAT));
        assert_eq!(checkpoint.metadata("only").unwrap().unwrap(), "here");
    }
}

#[test]
fn bad_indices_are_refused() {
    let replaced = |from: &str, to: &str| {
        let directory = sharded();
        let path = directory.path().join("model.safetensors.index.json");
        fs::write(&path, fs::read_to_string(&path).unwrap().replace(from, to)).unwrap();
        refusal(Safetensors::open(directory.path()))
    };
    let shard = "\"model-2.safetensors\"";
    let outside = ["../x", "/etc/passwd", "a/b", "..", "", ".", "C:x", r"..\\x", r"a\u0000b", r"\u002e./x"];
    for name in outside {
        let found = replaced(shard, &format!("\"{name}\""));
        assert!(found.contains("expected a file beside the index"), "{name}: {found}");
    }
    let found = replaced(shard, "\"model-9.safetensors\"");
    assert!(found.contains("model-9.safetensors") && found.contains("No such file"), "{found}");
    let found = replaced(shard, "\"model-1.safetensors\"");
    assert!(found.contains("tensor `c` is not in its shard `model-1.safetensors`"), "{found}");
    assert!(replaced("weight_map", "weights").contains("an index without `weight_map`"));
    assert!(replaced("\"weight_map\": {", "\"weight_map\": [").contains("expected `{`, found `[`"));
    assert!(replaced(shard, "2").contains("expected a string, found `2`"));

    let directory = sharded();
    save(
        directory.path().join("model-2.safetensors"),
        &[named("c", Tensor::ones([4], FLOAT)), named("a", Tensor::ones([2], FLOAT))],
        &[],
    )
    .unwrap();
    let found = refusal(Safetensors::open(directory.path()));
    assert!(found.contains("tensor `a` is in two shards"), "{found}");
}

#[test]
fn directories_without_a_checkpoint_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let found = refusal(Safetensors::open(directory.path()));
    assert!(found.contains("model.safetensors: neither this file nor its index is there"), "{found}");
    fs::write(directory.path().join("pytorch_model.bin"), b"x").unwrap();
    let found = refusal(Safetensors::open(directory.path()));
    assert!(
        found.contains("a pickle, which could run code, is not supported; supported: safetensors"),
        "{found}"
    );
    let found = refusal(Safetensors::open(directory.path().join("pytorch_model.bin")));
    assert!(found.contains("a pickle"), "{found}");
    let tensors = [named("a", Tensor::ones([2], FLOAT))];
    save(directory.path().join("model.fp16.safetensors"), &tensors, &[]).unwrap();
    // A variant, where there is nothing else.
    assert_eq!(Safetensors::open(directory.path()).unwrap().names(), ["a"]);
    assert_eq!(Safetensors::open_named(directory.path(), "model.fp16").unwrap().names(), ["a"]);
    let whole = [named("whole", Tensor::ones([2], FLOAT))];
    save(directory.path().join("diffusion_pytorch_model.safetensors"), &whole, &[]).unwrap();
    assert_eq!(Safetensors::open(directory.path()).unwrap().names(), ["whole"]);
}

#[test]
fn what_cannot_be_saved_is_refused_and_leaves_the_file_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kept.safetensors");
    save(&path, &[named("a", Tensor::ones([2], FLOAT))], &[]).unwrap();
    let before = fs::read(&path).unwrap();
    let one = || Tensor::ones([1], FLOAT);
    let sparse = Tensor::ones([2, 2], FLOAT).to_sparse(None, None::<i64>, None);
    let complex = Tensor::ones([1], (Kind::ComplexFloat, Device::Cpu));
    for (tensors, metadata) in [
        (vec![named("a", one()), named("a", one())], vec![]),
        (vec![named("__metadata__", one())], vec![]),
        (vec![named("a", Tensor::new())], vec![]),
        (vec![named("a", complex)], vec![]),
        (vec![named("a", sparse)], vec![]),
        (vec![named("a", one())], vec![("k", "1"), ("k", "2")]),
    ] {
        let error = save(&path, &tensors, &metadata).unwrap_err();
        assert!(matches!(error, Error::Value { .. } | Error::Kind { .. }), "{error}");
    }
    assert!(matches!(save(directory.path().join("absent/x"), &[], &[]), Err(Error::Io { .. })));
    assert!(matches!(save("/", &[], &[]), Err(Error::Value { .. })));
    fs::create_dir(directory.path().join("folder")).unwrap();
    assert!(matches!(save(directory.path().join("folder"), &[], &[]), Err(Error::Io { .. })));
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "temporary files are gone");
}
