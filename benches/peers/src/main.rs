//! candle's Llama behind the command line of `conformance generate`: greedy, one JSON line a run.
//!
//! ```text
//! candle-generate MODEL_DIR --input-ids 1,2,3 [--max-new-tokens 64] [--batch 1] [--repeat 1] [--dtype f32|bf16]
//! ```
//!
//! The directory holds `config.json` and `model.safetensors` (or its sharded form). `--batch B` runs the same prompt
//! in B rows. The end token does not stop it. Threads: `RAYON_NUM_THREADS`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama, LlamaConfig};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "usage: candle-generate MODEL_DIR --input-ids 1,2,3 [--max-new-tokens N] [--batch B] \
                     [--repeat R] [--dtype f32|bf16]";

struct Arguments {
    model: PathBuf,
    ids: Vec<u32>,
    new_tokens: usize,
    batch: usize,
    repeat: usize,
    dtype: DType,
}

impl Arguments {
    fn parse() -> Result<Self> {
        let mut out = Self {
            model: PathBuf::new(),
            ids: Vec::new(),
            new_tokens: 64,
            batch: 1,
            repeat: 1,
            dtype: DType::F32,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let Some(name) = word.strip_prefix("--") else {
                out.model = PathBuf::from(word);
                continue;
            };
            let value = words.next().ok_or(format!("--{name} wants a value\n{USAGE}"))?;
            match name {
                "input-ids" => {
                    out.ids = value.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?
                }
                "max-new-tokens" => out.new_tokens = value.parse()?,
                "batch" => out.batch = value.parse()?,
                "repeat" => out.repeat = value.parse()?,
                "dtype" => {
                    out.dtype = match value.as_str() {
                        "f32" => DType::F32,
                        "bf16" => DType::BF16,
                        _ => return Err(format!("--dtype {value}: expected f32 or bf16").into()),
                    }
                }
                _ => return Err(format!("unknown option --{name}\n{USAGE}").into()),
            }
        }
        if out.model.as_os_str().is_empty() || out.ids.is_empty() || out.new_tokens == 0 || out.batch == 0 {
            return Err(USAGE.into());
        }
        Ok(out)
    }
}

/// The configuration in the form that candle reads. transformers 5 keeps the rotary base inside `rope_parameters`,
/// where candle does not look: it would take 10000 in silence.
fn config(folder: &Path) -> Result<Config> {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut config: Value = serde_json::from_str(&text)?;
    if config["model_type"] != "llama" {
        return Err(format!("model_type {}: this peer runs llama", config["model_type"]).into());
    }
    if let Some(rope) = config.get("rope_parameters").cloned() {
        config["rope_theta"] = rope["rope_theta"].clone();
        let default = rope["rope_type"] == "default";
        config["rope_scaling"] = if default { Value::Null } else { rope };
    }
    let head_dim = config["head_dim"].as_u64();
    let config: LlamaConfig = serde_json::from_value(config)?;
    if head_dim.is_some_and(|d| d as usize * config.num_attention_heads != config.hidden_size) {
        return Err("candle's Llama derives head_dim from hidden_size".into());
    }
    Ok(config.into_config(false))
}

fn weights(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(format!("{}: no safetensors file", folder.display()).into());
    }
    Ok(files)
}

/// One run from an empty cache: new ids of every row, seconds to the first token, seconds for the rest.
fn run(model: &Llama, config: &Config, a: &Arguments) -> Result<(Vec<Vec<u32>>, f64, f64)> {
    let device = Device::Cpu;
    let mut cache = Cache::new(true, a.dtype, config, &device)?;
    let start = Instant::now();
    let prompt = Tensor::new(a.ids.as_slice(), &device)?.unsqueeze(0)?.repeat((a.batch, 1))?;
    let mut steps: Vec<Vec<u32>> = Vec::with_capacity(a.new_tokens);
    let mut input = prompt;
    let mut position = 0;
    let mut prefill = 0.0;
    for step in 0..a.new_tokens {
        let logits = model.forward(&input, position, &mut cache)?;
        position += input.dim(1)?;
        let next = logits.argmax(D::Minus1)?;
        steps.push(next.to_vec1()?);
        if step == 0 {
            prefill = start.elapsed().as_secs_f64();
        }
        input = next.unsqueeze(1)?;
    }
    let decode = start.elapsed().as_secs_f64() - prefill;
    let rows = (0..a.batch).map(|row| steps.iter().map(|step| step[row]).collect()).collect();
    Ok((rows, prefill, decode))
}

fn main_inner() -> Result<()> {
    let a = Arguments::parse()?;
    let config = config(&a.model)?;
    // SAFETY: the files are not changed while this process reads them.
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(&weights(&a.model)?, a.dtype, &Device::Cpu)? };
    let model = Llama::load(vb, &config)?;
    for _ in 0..a.repeat {
        let (rows, prefill, decode) = run(&model, &config, &a)?;
        let sequences: Vec<Value> = rows.iter().map(|ids| json!({ "ids": ids })).collect();
        let line = json!({
            "sequences": sequences,
            "prompt_tokens": a.ids.len(),
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "tokens_per_second": (a.batch * a.new_tokens) as f64 / (prefill + decode),
        });
        println!("{line}");
    }
    Ok(())
}

fn main() {
    if let Err(error) = main_inner() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}
