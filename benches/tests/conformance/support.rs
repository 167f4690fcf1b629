//! Running the binary; tensors in and out of files; a fixture with a tokenizer beside it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const MODELS: [&str; 12] = [
    "gpt2_gelu_new",
    "gpt2_gelu_hub",
    "gpt2_relu_untied",
    "llama_mha_untied",
    "llama_gqa_tied",
    "llama_biased",
    "llama_head_dim",
    "llama_rope_linear",
    "llama_rope_llama3",
    "mistral",
    "qwen2",
    "qwen3",
];

/// Encoders and encoder-decoders, and the output fields of a pass.
pub const ENCODERS: [(&str, &[&str]); 7] = [
    ("bert", &["last_hidden_state", "pooler_output"]),
    ("bert_masked_lm", &["logits"]),
    ("bert_classifier", &["logits"]),
    ("roberta_masked_lm", &["logits"]),
    ("roberta_classifier", &["logits"]),
    ("t5_v1_0", &["encoder_last_hidden_state", "logits"]),
    ("t5_v1_1", &["encoder_last_hidden_state", "logits"]),
];

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../controlgen-text/tests/fixtures").join(name)
}

/// The binary, on one thread: the fixtures are too small for more.
pub fn tool() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_conformance"));
    command.env("OMP_NUM_THREADS", "1");
    command
}

/// Runs a command that should end well, and gives its stdout.
pub fn succeed(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}\n{status}: {stderr}");
    String::from_utf8(stdout).unwrap()
}

/// Runs a command that should fail as the tool promises: code 1, nothing on stdout, one message on stderr.
pub fn fail(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let message = String::from_utf8(stderr).unwrap();
    let said = String::from_utf8_lossy(&stdout);
    assert_eq!(status.code(), Some(1), "{command:?}\n{message}{said}");
    assert!(stdout.is_empty(), "{command:?} wrote to stdout: {said}");
    assert!(
        message.starts_with("error: ") && message.matches("error: ").count() == 1,
        "{command:?}\n{message}"
    );
    for noise in ["panicked", "Exception raised", "stack backtrace", "Torch("] {
        assert!(!message.contains(noise), "{command:?}\n{message}");
    }
    message
}

/// A tensor in plain bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Array {
    pub fn new(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Self {
        Self { dtype, shape: shape.to_vec(), bytes }
    }

    pub fn ids(shape: &[usize], ids: &[i64]) -> Self {
        Self::new(Dtype::I64, shape, ids.iter().flat_map(|id| id.to_le_bytes()).collect())
    }

    /// The elements of a floating type.
    pub fn floats(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            // bf16 is the upper half of an f32.
            Dtype::BF16 => {
                self.bytes.as_chunks().0.iter().map(|&[a, b]| f32::from_le_bytes([0, 0, a, b])).collect()
            }
            other => panic!("floats of {other:?}"),
        }
    }

    /// The elements of an int64 tensor.
    pub fn integers(&self) -> Vec<i64> {
        assert_eq!(self.dtype, Dtype::I64);
        self.bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
    }

    /// The rows of a matrix of int64.
    pub fn rows(&self) -> Vec<Vec<i64>> {
        self.integers().chunks(self.shape[1]).map(<[i64]>::to_vec).collect()
    }
}

pub type Arrays = BTreeMap<String, Array>;

pub fn read(path: &Path) -> Arrays {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| (name.to_owned(), Array::new(view.dtype(), view.shape(), view.data().to_vec())))
        .collect()
}

pub fn write(path: &Path, arrays: &[(&str, &Array)]) {
    let views =
        arrays.iter().map(|(name, a)| (*name, TensorView::new(a.dtype, a.shape.clone(), &a.bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// The tensors of a fixture's cases.
pub fn cases(name: &str) -> Arrays {
    read(&fixture(name).join("cases.safetensors"))
}

/// The text of tokens of the tokenizer that [`with_tokenizer`] writes. It has 53: a space, A to Z, a to z. Some
/// models have more, as those whose vocabulary was padded; these have no text.
pub fn spelled(ids: &[i64]) -> String {
    let letters: Vec<char> = std::iter::once(' ').chain('A'..='Z').chain('a'..='z').collect();
    ids.iter().filter_map(|&id| letters.get(usize::try_from(id).unwrap())).collect()
}

/// A copy of a fixture with a tokenizer of single letters, for the fixtures have none.
pub fn with_tokenizer(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with("cases.safetensors") {
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let token = |c: char| if c == ' ' { "Ġ".to_owned() } else { c.to_string() };
    let vocab: serde_json::Map<String, Value> =
        (0..53).map(|id| (token(spelled(&[id]).chars().next().unwrap()), json!(id))).collect();
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    });
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    folder
}
