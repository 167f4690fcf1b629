//! GGUF files seen as what Hugging Face would hold: the same configuration fields, names and layouts.

use std::fs;
use std::path::Path;

use controlgen_core::checkpoint::{TensorInfo, TensorSource, replace, save};
use controlgen_core::gguf::Gguf;
use controlgen_core::{Error, Placement, Result};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::TextModel;
use crate::models::{self, Config};
use crate::tokenizer::Tokenizer;

/// The values of `general.architecture` that can be opened.
const ARCHITECTURES: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// Opens the language model of a GGUF file, de-quantised to `placement.kind`, with its tokenizer.
///
/// # Errors
/// [`Error::Unsupported`] for an architecture other than Llama's, Qwen2's and Qwen3's; [`Error::Config`],
/// [`Error::Format`], [`Error::Keys`], [`Error::Shape`] for what is wrong with the file.
pub fn open(path: impl AsRef<Path>, placement: Placement) -> Result<TextModel> {
    let file = Gguf::open(path)?;
    let config = Config::from_fields(file.what(), config(&file)?);
    let tokenizer = Tokenizer::from_gguf(&file)?;
    let checkpoint = Checkpoint::new(file, &config)?;
    TextModel::new(models::load(&config, &checkpoint, placement)?, tokenizer)
}

/// Writes the model of a GGUF file as a Hugging Face directory: config.json, generation_config.json, the
/// tokenizer's files, and model.safetensors with elements of type `kind`. Each file is written beside its place and
/// then renamed.
///
/// # Errors
/// As [`open`]; [`Error::Io`] where a file cannot be written.
pub fn write_directory(path: impl AsRef<Path>, directory: impl AsRef<Path>, kind: Kind) -> Result<()> {
    let directory = directory.as_ref();
    let file = Gguf::open(path)?;
    let mut fields = config(&file)?;
    let dtype = match kind {
        Kind::Float => "float32",
        Kind::Half => "float16",
        Kind::BFloat16 => "bfloat16",
        Kind::Double => "float64",
        other => {
            let found = format!("{other:?}");
            return Err(Error::value("element type of a checkpoint", "f32, f64, f16 or bf16", found));
        }
    };
    fields.insert("dtype".into(), json!(dtype));
    fs::create_dir_all(directory).map_err(|error| Error::io(directory, error))?;
    Tokenizer::from_gguf(&file)?.save(directory)?;
    write_json(&directory.join("config.json"), &Value::Object(fields.clone()))?;
    let mut generation = Map::new();
    for field in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(id) = fields.get(field) {
            generation.insert(field.into(), id.clone());
        }
    }
    write_json(&directory.join("generation_config.json"), &Value::Object(generation))?;

    let config = Config::from_fields(file.what(), fields);
    let checkpoint = Checkpoint::new(file, &config)?;
    let mut tensors = Vec::new();
    for name in checkpoint.names() {
        let Some(info) = checkpoint.info(&name) else { continue };
        let mut tensor = Tensor::f_empty(&info.shape, (kind, tch::Device::Cpu))?;
        checkpoint.read(&name, &mut tensor)?;
        tensors.push((name, tensor));
    }
    save(directory.join("model.safetensors"), &tensors, &[("format", "pt")])
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::format(path, error))?;
    replace(path, (text + "\n").as_bytes())
}

/// The fields of config.json that the metadata stand for.
fn config(file: &Gguf) -> Result<Map<String, Value>> {
    let metadata = file.metadata();
    let architecture = metadata.str("general.architecture")?;
    if !ARCHITECTURES.contains(&architecture) {
        let what = format!("GGUF architecture `{architecture}`");
        return Err(Error::unsupported(what, ARCHITECTURES.join(", ")));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let heads = metadata.u32(&key("attention.head_count"))?;
    let width = metadata.u32(&key("embedding_length"))?;
    let mut fields = Map::new();
    let mut put = |name: &str, value: Value| {
        fields.insert(name.to_owned(), value);
    };
    put("architectures", json!([class_name(architecture)]));
    put("model_type", json!(architecture));
    put("hidden_size", json!(width));
    put("num_attention_heads", json!(heads));
    put("num_hidden_layers", json!(metadata.u32(&key("block_count"))?));
    put("intermediate_size", json!(metadata.u32(&key("feed_forward_length"))?));
    put("max_position_embeddings", json!(metadata.u32(&key("context_length"))?));
    put("hidden_act", json!("silu"));
    let kv_heads: Option<u32> = metadata.optional(&key("attention.head_count_kv"))?;
    put("num_key_value_heads", json!(kv_heads.unwrap_or(heads)));
    let epsilon = metadata.f32(&key("attention.layer_norm_rms_epsilon"))?;
    put("rms_norm_eps", json!(shortest(epsilon)));
    let theta: Option<f32> = metadata.optional(&key("rope.freq_base"))?;
    put("rope_theta", json!(shortest(theta.unwrap_or(10000.0))));
    if let Some(head_dim) = metadata.optional::<u32>(&key("attention.key_length"))? {
        put("head_dim", json!(head_dim));
    } else if let Some(head_dim) = metadata.optional::<u32>(&key("rope.dimension_count"))? {
        put("head_dim", json!(head_dim));
    }
    match metadata.optional::<&str>(&key("rope.scaling.type"))?.unwrap_or("none") {
        "none" => {}
        "linear" => {
            let factor = metadata.f32(&key("rope.scaling.factor"))?;
            put("rope_scaling", json!({ "rope_type": "linear", "factor": shortest(factor) }));
        }
        other => return Err(Error::unsupported(format!("GGUF rope scaling `{other}`"), "none, linear")),
    }
    if file.info("rope_freqs.weight").is_some() {
        let supported = "files without rope_freqs.weight; the Hugging Face directory of the same model";
        return Err(Error::unsupported("GGUF rotary frequency factors (Llama 3.1 and later)", supported));
    }
    let vocab: Option<u32> = metadata.optional(&key("vocab_size"))?;
    let rows = file.info("token_embd.weight").and_then(|info| info.shape.first().copied());
    put("vocab_size", json!(rows.or(vocab.map(i64::from))));
    put("tie_word_embeddings", json!(file.info("output.weight").is_none()));
    put("attention_bias", json!(file.info("blk.0.attn_q.bias").is_some()));
    for (name, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
        if let Some(id) = metadata.optional::<u32>(&format!("tokenizer.ggml.{key}_token_id"))? {
            put(name, json!(id));
        }
    }
    Ok(fields)
}

fn class_name(architecture: &str) -> &'static str {
    match architecture {
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "LlamaForCausalLM",
    }
}

/// The shortest decimal that is this f32, so that 1e-5 does not become 9.999999747378752e-6.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// A GGUF file under Hugging Face's names.
struct Checkpoint {
    file: Gguf,
    /// Heads of queries and of keys, where their rows are interleaved.
    interleaved: Option<(i64, i64)>,
}

impl Checkpoint {
    fn new(file: Gguf, config: &Config) -> Result<Self> {
        let heads = config.int("num_attention_heads", 1, i64::from(u32::MAX))?;
        let kv_heads = config.int("num_key_value_heads", 1, heads)?;
        // llama.cpp turns pairs of neighbours for this architecture, and orders rows for it.
        let interleaved = (config.str("model_type")? == Some("llama")).then_some((heads, kv_heads));
        Ok(Self { file, interleaved })
    }
}

/// The names outside blocks, ours and GGUF's.
const OUTER: [(&str, &str); 3] =
    [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// The names inside blocks, ours and GGUF's.
const INNER: [(&str, &str); 11] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];

/// Our name to GGUF's; a name that neither knows stays as it is.
fn theirs(name: &str) -> String {
    let Some((stem, suffix)) = name.rsplit_once('.') else { return name.to_owned() };
    if let Some((_, theirs)) = OUTER.iter().find(|(ours, _)| *ours == stem) {
        return format!("{theirs}.{suffix}");
    }
    let inner = stem.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let found = inner.and_then(|(layer, part)| {
        let (_, theirs) = INNER.iter().find(|(ours, _)| *ours == part)?;
        Some(format!("blk.{layer}.{theirs}.{suffix}"))
    });
    found.unwrap_or_else(|| name.to_owned())
}

/// GGUF's name to ours.
fn ours(name: &str) -> String {
    let Some((stem, suffix)) = name.rsplit_once('.') else { return name.to_owned() };
    if let Some((ours, _)) = OUTER.iter().find(|(_, theirs)| *theirs == stem) {
        return format!("{ours}.{suffix}");
    }
    let inner = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let found = inner.and_then(|(layer, part)| {
        let (ours, _) = INNER.iter().find(|(_, theirs)| *theirs == part)?;
        Some(format!("model.layers.{layer}.{ours}.{suffix}"))
    });
    found.unwrap_or_else(|| name.to_owned())
}

impl TensorSource for Checkpoint {
    fn what(&self) -> String {
        self.file.what()
    }

    fn finished(&self) {
        self.file.finished();
    }

    fn names(&self) -> Vec<String> {
        self.file.names().iter().map(|name| ours(name)).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.file.info(&theirs(name))
    }

    fn read(&self, name: &str, into: &mut Tensor) -> Result<()> {
        let heads = self.interleaved.and_then(|(heads, kv_heads)| {
            if name.contains(".self_attn.q_proj.") {
                Some(heads)
            } else if name.contains(".self_attn.k_proj.") {
                Some(kv_heads)
            } else {
                None
            }
        });
        let Some(heads) = heads else { return self.file.read(&theirs(name), into) };
        let shape = into.size();
        let rows = shape.first().copied().unwrap_or(0);
        if rows % (2 * heads) != 0 {
            return Err(Error::shape(name, format!("rows a multiple of {}", 2 * heads), &shape));
        }
        let mut stored = Tensor::f_empty(&shape, (into.f_kind()?, tch::Device::Cpu))?;
        self.file.read(&theirs(name), &mut stored)?;
        // Stored (heads, head_dim / 2, 2), wanted (heads, 2, head_dim / 2).
        let ordered =
            stored.f_reshape([heads, -1, 2, shape.get(1).copied().unwrap_or(1)])?.f_transpose(1, 2)?;
        into.f_copy_(&ordered.f_reshape(&shape)?)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_both_ways() {
        for (a, b) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("model.layers.12.self_attn.q_proj.weight", "blk.12.attn_q.weight"),
            ("model.layers.0.self_attn.k_norm.weight", "blk.0.attn_k_norm.weight"),
            ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("blk.1.ffn_gate_inp.weight", "blk.1.ffn_gate_inp.weight"),
        ] {
            assert_eq!(theirs(a), b);
            assert_eq!(ours(b), a);
        }
    }

    #[test]
    fn numbers_keep_their_decimals() {
        assert_eq!(shortest(1e-5), 1e-5);
        assert_eq!(shortest(100_000.0), 100_000.0);
    }
}
