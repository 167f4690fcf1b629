//! One forward pass, tensors in and tensors out.

use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, Weights, save};
use controlgen_core::{
    Encoder, EncoderInput, Error, LanguageModel, LmInput, Logits, Pass, Placement, Result, Source, Tokens,
};
use controlgen_text::models::{
    self, Bert, BertClassifier, BertInput, BertMaskedLm, Config, FramingTokens, T5, T5Encoder,
};
use tch::{Kind, Tensor};

use super::arguments::Arguments;
use super::autoencode;
use super::clip;
use super::denoise;
use super::inputs::Inputs;

/// The arguments of `forward` that decoders know.
const DECODER: [&str; 4] = ["input_ids", "inputs_embeds", "attention_mask", "position_ids"];
const BERT: [&str; 5] = ["input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"];
const T5_ENCODER: [&str; 3] = ["input_ids", "inputs_embeds", "attention_mask"];
const T5_WHOLE: [&str; 6] = [
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "decoder_attention_mask",
];

/// Output fields by name.
type Outputs = Vec<(String, Tensor)>;

pub fn run(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::parse(arguments, &["dtype", "device"])?;
    let [model, inputs, outputs] =
        arguments.paths(["MODEL_DIR", "INPUTS.safetensors", "OUTPUTS.safetensors"])?;
    let placement = arguments.placement()?;
    let _guard = tch::no_grad_guard();
    let config = Config::open(&model.join("config.json"))?;
    let found = match (config.str("_class_name")?, config.str("model_type")?) {
        // diffusers tells its models by their class, and not by a type.
        (Some("AutoencoderKL"), None) => autoencode::run(&model, &inputs, placement)?,
        (Some("PriorTransformer"), None) => clip::prior(&model, &inputs, placement)?,
        (Some(_), None) => vec![output("sample", denoise::run(&config, &model, &inputs, placement)?)],
        (_, Some("bert" | "roberta")) => bert(&config, &model, &inputs, placement)?,
        (_, Some("clip_text_model")) => clip::text(&config, &model, &inputs, placement)?,
        (_, Some("clip_vision_model")) => clip::vision(&config, &model, &inputs, placement)?,
        (_, Some("t5")) => t5(&config, &model, &inputs, placement)?,
        _ => decoder(&model, &inputs, placement)?,
    };
    save(&outputs, &found, &[("format", "pt")])
}

/// The class that wrote config.json, if it says so.
fn architecture(config: &Config) -> &str {
    let names = config.get("architectures").and_then(|names| names.as_array());
    names.and_then(|names| names.first()).and_then(|name| name.as_str()).unwrap_or("")
}

fn output(name: &str, tensor: Tensor) -> (String, Tensor) {
    (name.to_owned(), tensor)
}

fn decoder(model: &Path, inputs: &Path, placement: Placement) -> Result<Outputs> {
    let inputs = Inputs::open(inputs, placement, &DECODER)?;
    let given = inputs.tokens("input_ids", "inputs_embeds")?;
    let (keep, positions) = (inputs.mask("attention_mask")?, inputs.integers("position_ids")?);
    let lm = models::open(model, placement)?;
    let mut state = lm.start(Source::Rows(given.shape().0), &Pass::default())?;
    let input = input(given.tokens(), keep.as_ref()).positions(positions.as_ref());
    let logits = lm.forward(input, &mut state, &Pass::default())?.logits;
    Ok(vec![output("logits", logits)])
}

fn input<'a>(tokens: Tokens<'a>, keep: Option<&'a Tensor>) -> LmInput<'a> {
    LmInput { tokens, keep, positions: None, logits: Logits::All }
}

fn bert(config: &Config, model: &Path, inputs: &Path, placement: Placement) -> Result<Outputs> {
    let inputs = Inputs::open(inputs, placement, &BERT)?;
    let given = inputs.tokens("input_ids", "inputs_embeds")?;
    let keep = inputs.mask("attention_mask")?;
    let (types, positions) = (inputs.integers("token_type_ids")?, inputs.integers("position_ids")?);
    let input = BertInput {
        tokens: given.tokens(),
        keep: keep.as_ref(),
        token_types: types.as_ref(),
        positions: positions.as_ref(),
    };
    let (source, pass) = (Safetensors::open(model)?, Pass::default());
    let weights = Weights::new(&source, placement.options());
    let class = architecture(config);
    if class.ends_with("ForMaskedLM") {
        // Which token stands for a gap makes no difference to a pass.
        let lm = BertMaskedLm::load(config, &weights, placement, FramingTokens::default())?;
        Ok(vec![output("logits", lm.forward(input, &pass)?)])
    } else if class.ends_with("ForSequenceClassification") {
        let classifier = BertClassifier::load(config, &weights, placement)?;
        Ok(vec![output("logits", classifier.forward(input, &pass)?)])
    } else if class.is_empty() || class.ends_with("Model") {
        let found = Bert::load(config, &weights, placement)?.forward(input, &pass)?;
        let pooled = found.pooled.map(|pooled| output("pooler_output", pooled));
        Ok(std::iter::once(output("last_hidden_state", found.hidden)).chain(pooled).collect())
    } else {
        let known = "a Model, ForMaskedLM or ForSequenceClassification";
        Err(Error::unsupported(format!("architecture `{class}`"), known))
    }
}

fn t5(config: &Config, model: &Path, inputs: &Path, placement: Placement) -> Result<Outputs> {
    let class = architecture(config);
    let alone = class == "T5EncoderModel";
    if !alone && !class.is_empty() && class != "T5ForConditionalGeneration" {
        let known = "T5ForConditionalGeneration, T5EncoderModel";
        return Err(Error::unsupported(format!("architecture `{class}`"), known));
    }
    let known: &[&str] = if alone { &T5_ENCODER } else { &T5_WHOLE };
    let inputs = Inputs::open(inputs, placement, known)?;
    let given = inputs.tokens("input_ids", "inputs_embeds")?;
    let keep = inputs.mask("attention_mask")?;
    let (source, pass) = (Safetensors::open(model)?, Pass::default());
    let weights = Weights::new(&source, placement.options());
    if alone {
        let encoder = T5Encoder::load(config, &weights, placement)?;
        let text = EncoderInput::Text { tokens: given.tokens(), keep: keep.as_ref() };
        return Ok(vec![output("last_hidden_state", encoder.encode(text, &pass)?.hidden)]);
    }
    let decoded = inputs.tokens("decoder_input_ids", "decoder_inputs_embeds")?;
    let decoder_keep = inputs.mask("decoder_attention_mask")?;
    let lm = T5::load(config, &weights, placement)?;
    let prompt = input(given.tokens(), keep.as_ref());
    let states = lm.encode(prompt, &pass)?;
    let mut state = lm.start(Source::Encoder(prompt), &pass)?;
    // transformers counts the decoder's padding, where controlgen does not unless it is told.
    let (rows, len) = decoded.shape();
    let places = Tensor::f_arange(len, (Kind::Int64, placement.device))?.f_unsqueeze(0)?;
    let places = places.f_expand([rows, len], false)?;
    let positions = decoder_keep.as_ref().map(|_| &places);
    let read = input(decoded.tokens(), decoder_keep.as_ref()).positions(positions);
    let logits = lm.forward(read, &mut state, &pass)?.logits;
    Ok(vec![output("logits", logits), output("encoder_last_hidden_state", states)])
}
