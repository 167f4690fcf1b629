//! The conformance tool: one command line, so that anyone can hold controlgen against a peer.

mod arguments;
mod autoencode;
mod denoise;
mod forward;
mod generate;
mod inputs;
mod schedule;

use controlgen_core::{Error, Result};

/// What the tool takes.
pub const USAGE: &str = "\
conformance forward MODEL_DIR INPUTS.safetensors OUTPUTS.safetensors [--dtype f32|f16|bf16|f64] [--device cpu|cuda:0]
    Runs the model of MODEL_DIR/config.json once. Input tensors carry the names of the Hugging Face forward arguments
    (input_ids, attention_mask, decoder_input_ids, sample, timestep, encoder_hidden_states, text_embeds, time_ids, …),
    outputs those of the output fields (logits, pooler_output, sample, …).
conformance generate MODEL_DIR --prompt TEXT | --input-ids 1,2,3 [--config generation.json] [--seed S] \
[--repeat R] [--dtype f32|f16|bf16|f64] [--device cpu|cuda:0]
    Completes a prompt; one JSON line on stdout. MODEL_DIR may be a GGUF file. --prompt and --input-ids may be given
    several times: one batch.
conformance schedule SCHEDULER_CONFIG.json INPUTS.safetensors OUTPUTS.safetensors --steps N [--eta E]
    Runs a scheduler of diffusers over given model outputs. In: sample [B, C, H, W], model_outputs [K, B, C, H, W] for
    the K calls in order (2 C channels with a learned variance), noise [K, B, C, H, W] where it is drawn. Out:
    timesteps [K], samples [K, B, C, H, W] after each call.";

/// Runs the tool.
///
/// # Errors
/// What is wrong with the arguments, the model or the inputs.
pub fn run(arguments: &[String]) -> Result<()> {
    match arguments.split_first() {
        Some((command, rest)) if command == "forward" => forward::run(rest),
        Some((command, rest)) if command == "generate" => generate::run(rest),
        Some((command, rest)) if command == "schedule" => schedule::run(rest),
        Some((command, _)) if command == "help" || command == "--help" => {
            println!("{USAGE}");
            Ok(())
        }
        other => {
            let found = other.map_or("nothing", |(command, _)| command);
            Err(Error::value("command", format!("forward, generate or schedule\n{USAGE}"), found))
        }
    }
}
