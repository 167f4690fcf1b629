//! The conformance tool: one command line, so that anyone can hold controlgen against a peer.

mod arguments;
mod autoencode;
mod clip;
mod denoise;
mod forward;
mod generate;
mod inputs;
mod schedule;
mod shapes_read;
mod text_to_image;

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
    timesteps [K], samples [K, B, C, H, W] after each call.
conformance text-to-image MODEL --prompt TEXT --out FILE.png [--steps N] [--guidance-scale S] [--seed K] [--torch-seed] \
[--negative-prompt TEXT] [--images N] [--size HEIGHTxWIDTH] [--eta E] [--batch N] [--latents OUT.safetensors] \
[--image FILE] [--mask FILE] [--strength S] [--class C] [--upscaler DIR] [--dtype f32|f16|bf16|f64] \
[--device cpu|cuda:0]
    Makes images with the pipeline of MODEL/model_index.json. --prompt may be given several times, --negative-prompt once
    or as often; several images are FILE-0.png, FILE-1.png, …. --torch-seed draws the noise as PyTorch does from
    torch.Generator().manual_seed(K). --image starts from an image, --mask paints where it is white. Of a pipeline
    without prompts --images are made, or one for each --class, a number or a name. --upscaler names a next stage of
    DeepFloyd IF. --latents: latents [N, C, H, W], in which the sampler ended. MODEL may be the name of a model that is
    carried here: shapes-pixel.
conformance shapes-read FILE.png
    Prints what a picture of the world of shapes shows, as JSON: the background and the objects.";

/// Runs the tool.
///
/// # Errors
/// What is wrong with the arguments, the model or the inputs.
pub fn run(arguments: &[String]) -> Result<()> {
    match arguments.split_first() {
        Some((command, rest)) if command == "forward" => forward::run(rest),
        Some((command, rest)) if command == "generate" => generate::run(rest),
        Some((command, rest)) if command == "schedule" => schedule::run(rest),
        Some((command, rest)) if command == "text-to-image" => text_to_image::run(rest),
        Some((command, rest)) if command == "shapes-read" => shapes_read::run(rest),
        Some((command, _)) if command == "help" || command == "--help" => {
            println!("{USAGE}");
            Ok(())
        }
        other => {
            let found = other.map_or("nothing", |(command, _)| command);
            Err(Error::value(
                "command",
                format!("forward, generate, schedule, text-to-image or shapes-read\n{USAGE}"),
                found,
            ))
        }
    }
}
