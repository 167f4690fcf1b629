//! A Llama of SmolLM2-135M's dimensions with random weights: as heavy as the real one, and nothing to carry.

use controlgen_core::checkpoint::{TensorInfo, TensorSource};
use controlgen_core::{Error, LanguageModel, Placement, Result};
use controlgen_text::models::{self, Config};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// Dimensions, as config.json names them.
fn config() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100_000.0,
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
    })
}

/// The tensors of that model, made when they are read.
struct Random;

impl TensorSource for Random {
    fn what(&self) -> String {
        "random weights".into()
    }

    fn names(&self) -> Vec<String> {
        let parts = [
            "input_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ];
        let layer = |i| parts.map(|part| format!("model.layers.{i}.{part}.weight"));
        let ends = ["model.embed_tokens.weight", "model.norm.weight"].map(str::to_owned);
        (0..30).flat_map(layer).chain(ends).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let shape = match name.strip_suffix(".weight")?.rsplit('.').next()? {
            "embed_tokens" => vec![49152, 576],
            "input_layernorm" | "post_attention_layernorm" | "norm" => vec![576],
            "q_proj" | "o_proj" => vec![576, 576],
            "k_proj" | "v_proj" => vec![192, 576],
            "gate_proj" | "up_proj" => vec![1536, 576],
            "down_proj" => vec![576, 1536],
            _ => return None,
        };
        Some(TensorInfo { shape, kind: Kind::Float })
    }

    /// Weights that keep the size of what passes through: sines of large steps, over the root of the inputs.
    fn read(&self, name: &str, into: &mut Tensor) -> Result<()> {
        let shape = into.size();
        let [.., inputs] = shape.as_slice() else {
            return Err(Error::shape(name, "at least one dimension", &shape));
        };
        let n: i64 = shape.iter().product();
        let values = if shape.len() == 1 {
            Tensor::f_ones(&shape, (Kind::Float, into.device()))?
        } else {
            let numbers = Tensor::f_arange(n, (Kind::Float, into.device()))?.f_mul_scalar(12.9898)?;
            numbers.f_sin()?.f_mul_scalar((2.0 / *inputs as f64).sqrt())?.f_view(shape.as_slice())?
        };
        Ok(into.f_copy_(&values)?)
    }
}

/// The model.
///
/// # Errors
/// Those of LibTorch, as for lack of memory.
pub fn open(placement: Placement) -> Result<Box<dyn LanguageModel>> {
    let Value::Object(fields) = config() else {
        return Err(Error::value("configuration", "an object", "something else"));
    };
    let _no_gradients = tch::no_grad_guard();
    models::load(&Config::from_fields("random_llama", fields), &Random, placement)
}
