//! Language models and encoders, each read from top to bottom in one file.

mod bert;
mod bert_classifier;
mod bert_masked_lm;
mod gpt2;
mod kv_cache;
mod llama;
mod relative_bias;
mod t5;
mod t5_encoder;

use std::any::Any;
use std::path::Path;

use controlgen_core::checkpoint::{Safetensors, TensorSource, Weights, prefixes};
use controlgen_core::energy::Text;
use controlgen_core::layers::{Embedding, Linear};
use controlgen_core::{
    Classifier, Encoder, EncoderInput, Error, LanguageModel, Mask, MaskedLm, Placement, Result, SiteId,
    SiteMap, Source, Tokens, WeightMap,
};
use tch::{Device, Kind, Tensor};

pub use bert::{Bert, BertConfig, BertInput};
pub use bert_classifier::BertClassifier;
pub use bert_masked_lm::{BertMaskedLm, FramingTokens};
pub use controlgen_core::config::Config;
pub use gpt2::{Gpt2, Gpt2Config};
pub use llama::{Llama, LlamaConfig};
pub use t5::T5;
pub use t5_encoder::{T5Config, T5Encoder};

/// Opens the language model of a Hugging Face directory: config.json, and model.safetensors or its shards.
///
/// # Errors
/// [`Error::Unsupported`] for an architecture that is not known, naming those that are; [`Error::Config`],
/// [`Error::Keys`], [`Error::Shape`], [`Error::Format`], [`Error::Io`] for what is wrong with the files.
pub fn open(directory: &Path, placement: Placement) -> Result<Box<dyn LanguageModel>> {
    let config = Config::open(&directory.join("config.json"))?;
    let weights = Safetensors::open(directory)?;
    load(&config, &weights, placement)
}

/// Loads the language model that `config` describes from `source`.
///
/// # Errors
/// As [`open`].
pub fn load(
    config: &Config,
    source: &dyn TensorSource,
    placement: Placement,
) -> Result<Box<dyn LanguageModel>> {
    let known =
        || gpt2::MODEL_TYPES.iter().chain(&llama::MODEL_TYPES).chain(&t5_encoder::MODEL_TYPES).copied();
    let model_type = config.str("model_type")?.ok_or_else(|| {
        config.error("model_type", format!("one of {}", known().collect::<Vec<_>>().join(", ")), "nothing")
    })?;
    let weights = Weights::new(source, placement.options());
    let model: Box<dyn LanguageModel> = match model_type {
        name if gpt2::MODEL_TYPES.contains(&name) => {
            // Older files name the body alone.
            let weights = weights.rename(prefixes(&[("transformer.", "")]));
            let model = Gpt2::load(config, &weights, placement)?;
            // Causal masks that old files carry, and a tied output that is stored all the same.
            weights.finish(&leftovers(config, true, &["*.attn.bias", "*.attn.masked_bias"])?)?;
            Box::new(model)
        }
        name if llama::MODEL_TYPES.contains(&name) => {
            let model = Llama::load(config, &weights, placement)?;
            weights.finish(&leftovers(config, false, &["*.rotary_emb.inv_freq"])?)?;
            Box::new(model)
        }
        name if t5_encoder::MODEL_TYPES.contains(&name) => Box::new(T5::load(config, &weights, placement)?),
        name => {
            let supported = known().collect::<Vec<_>>().join(", ");
            return Err(Error::unsupported(format!("model_type `{name}`"), supported));
        }
    };
    Ok(model)
}

/// Opens the encoder of a Hugging Face directory: a BERT or RoBERTa, with or without a head, or a T5's.
///
/// # Errors
/// As [`open`].
pub fn open_encoder(directory: &Path, placement: Placement) -> Result<Box<dyn Encoder>> {
    let config = Config::open(&directory.join("config.json"))?;
    let weights = Safetensors::open(directory)?;
    load_encoder(&config, &weights, placement)
}

/// Loads the encoder that `config` describes from `source`.
///
/// # Errors
/// As [`open`].
pub fn load_encoder(
    config: &Config,
    source: &dyn TensorSource,
    placement: Placement,
) -> Result<Box<dyn Encoder>> {
    let weights = Weights::new(source, placement.options());
    match config.str("model_type")? {
        Some(name) if bert::MODEL_TYPES.contains(&name) => {
            Ok(Box::new(Bert::load(config, &weights, placement)?))
        }
        Some(name) if t5_encoder::MODEL_TYPES.contains(&name) => {
            Ok(Box::new(T5Encoder::load(config, &weights, placement)?))
        }
        found => {
            let what = format!("model_type `{}` as an encoder", found.unwrap_or("nothing"));
            let known: Vec<&str> =
                bert::MODEL_TYPES.iter().chain(&t5_encoder::MODEL_TYPES).copied().collect();
            Err(Error::unsupported(what, known.join(", ")))
        }
    }
}

/// Opens the masked language model of a Hugging Face directory: a BERT or RoBERTa. Which tokens open and close a text and
/// which stands for a gap, its tokenizer tells.
///
/// # Errors
/// As [`open`]; those of [`FramingTokens::open`].
pub fn open_masked_lm(directory: &Path, placement: Placement) -> Result<Box<dyn MaskedLm>> {
    let config = Config::open(&directory.join("config.json"))?;
    let source = Safetensors::open(directory)?;
    let weights = Weights::new(&source, placement.options());
    let tokens = FramingTokens::open(directory)?;
    Ok(Box::new(BertMaskedLm::load(&config, &weights, placement, tokens)?))
}

/// Opens the classifier of texts of a Hugging Face directory: a BERT or RoBERTa for sequence classification.
///
/// # Errors
/// As [`open`].
pub fn open_classifier(directory: &Path, placement: Placement) -> Result<Box<dyn Classifier<Text>>> {
    let config = Config::open(&directory.join("config.json"))?;
    let source = Safetensors::open(directory)?;
    let weights = Weights::new(&source, placement.options());
    Ok(Box::new(BertClassifier::load(&config, &weights, placement)?))
}

/// The model's first `layers` blocks, with its norm and its output right after them: a small model of the same vocabulary
/// over the same weights, as a draft for [`Speculative`](crate::search::Speculative). It has sites of its own.
///
/// How much it says like the whole depends on the model: none is trained to be cut off, unless it says so (LayerSkip, Elhoushi
/// et al. 2024).
///
/// # Errors
/// [`Error::Value`] for no layers or more than there are; [`Error::Unsupported`] for a model that is none of this module.
pub fn first_layers(lm: &dyn LanguageModel, layers: usize) -> Result<Box<dyn LanguageModel>> {
    let any: &dyn Any = lm;
    if let Some(boxed) = any.downcast_ref::<Box<dyn LanguageModel>>() {
        first_layers(&**boxed, layers)
    } else if let Some(llama) = any.downcast_ref::<Llama>() {
        Ok(Box::new(llama.first_layers(layers)?))
    } else if let Some(gpt2) = any.downcast_ref::<Gpt2>() {
        Ok(Box::new(gpt2.first_layers(layers)?))
    } else {
        let what = format!("the first layers of model_type `{}`", lm.spec().architecture);
        Err(Error::unsupported(what, "the models of controlgen-text"))
    }
}

/// The sites without those of the blocks from `layers` on, whose names are `blocks`, a dot and a number; then the site of
/// the norm that follows, and of the output product.
fn first_sites(sites: &SiteMap, blocks: &str, layers: usize) -> Result<(SiteMap, SiteId, SiteId)> {
    let block = |name: &str| -> Option<usize> {
        name.strip_prefix(blocks)?.strip_prefix('.')?.split('.').next()?.parse().ok()
    };
    let mut kept = SiteMap::new();
    let ids: Vec<SiteId> = sites
        .iter()
        .filter(|(_, site)| block(&site.name).is_none_or(|block| block < layers))
        .map(|(_, site)| kept.add_site(site.clone()))
        .collect();
    match ids[..] {
        [.., norm, head] => Ok((kept, norm, head)),
        _ => Err(Error::value("sites", "a norm and an output product after the blocks", ids.len())),
    }
}

/// As many blocks as a model has, or fewer.
fn check_layers(layers: usize, all: usize) -> Result<()> {
    if (1..=all).contains(&layers) {
        return Ok(());
    }
    Err(Error::value("first layers", format!("1 ..= {all}, which the model has"), layers))
}

/// Names that a sound checkpoint may hold though the model does not read them.
fn leftovers<'a>(config: &Config, tied_by_default: bool, always: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut names = always.to_vec();
    if config.bool("tie_word_embeddings", tied_by_default)? {
        names.push("lm_head.weight");
    }
    Ok(names)
}

/// The text of an encoder's input.
fn text_of(input: EncoderInput<'_>) -> Result<(Tokens<'_>, Option<&Tensor>)> {
    match input {
        EncoderInput::Text { tokens, keep } => Ok((tokens, keep)),
        _ => Err(Error::unsupported("images given to an encoder of text", "EncoderInput::Text")),
    }
}

/// What an encoder's queries see: all that is no padding. `keep` is boolean `[B, T]`.
///
/// A row of nothing but padding is refused: its attention would be over no key.
fn encoder_mask(keep: Option<&Tensor>, device: Device) -> Result<Mask> {
    let Some(keep) = keep else { return Ok(Mask::Full) };
    let kept: Vec<i64> = Vec::try_from(keep.f_sum_dim_intlist(&[1i64][..], false, Kind::Int64)?)?;
    if let Some(row) = kept.iter().position(|&n| n == 0) {
        return Err(Error::value(format!("keep, row {row}"), "at least one token", "padding alone"));
    }
    if kept.iter().all(|&n| n == keep.size()[1]) {
        return Ok(Mask::Full);
    }
    Ok(Mask::Keep(keep.f_to_device(device)?.f_unsqueeze(1)?.f_unsqueeze(1)?)) // (B, 1, 1, T)
}

/// The weight of an output product, and whether it is the table of embeddings: the checkpoint's own where it has one that
/// differs, as transformers reads it.
fn output_product(weights: &Weights<'_>, name: &str, table: &Tensor, tied: bool) -> Result<(Tensor, bool)> {
    let own =
        if tied { weights.optional(name, &table.size())? } else { Some(weights.get(name, &table.size())?) };
    match own {
        Some(own) if !tied || !own.f_equal(table)? => Ok((own, false)),
        _ => Ok((table.shallow_clone(), true)),
    }
}

/// The rows of a source that has no encoder's input.
fn decoder_only(source: Source<'_>) -> Result<i64> {
    match source {
        Source::Rows(rows) if rows > 0 => Ok(rows),
        Source::Rows(rows) => Err(Error::value("rows of a state", "at least 1", rows)),
        Source::Encoder(_) => {
            Err(Error::unsupported("an encoder's input to a decoder-only model", "Source::Rows"))
        }
    }
}

/// The first of `bos_token_id`, all of `eos_token_id`, the first of `pad_token_id`.
fn special_tokens(config: &Config, vocab: i64) -> Result<(Option<i64>, Vec<i64>, Option<i64>)> {
    let first = |field| Ok::<_, Error>(config.token_ids(field, vocab)?.first().copied());
    Ok((first("bos_token_id")?, config.token_ids("eos_token_id", vocab)?, first("pad_token_id")?))
}

/// The output product with the weight that `f` answers with. One that is tied to the table of embeddings, given
/// before and after its own mapping, follows it.
fn map_output(head: &Linear, tables: Option<(&Embedding, &Embedding)>, f: WeightMap<'_>) -> Result<Linear> {
    match tables {
        Some((before, after)) if before.weight().data_ptr() != after.weight().data_ptr() => {
            head.retied(after.weight())?.map_weights(f)
        }
        _ => head.map_weights(f),
    }
}

/// Σᵥ π(v) eᵥ, of soft tokens `[B, T, V]` and a table `[V, D]`, in the table's element type: `[B, T, D]`.
///
/// # Errors
/// [`Error::Shape`] for another vocabulary; [`Error::Kind`] for what is not floating-point.
pub(crate) fn expected_embeddings(table: &Tensor, probs: &Tensor) -> Result<Tensor> {
    let vocab = table.size().first().copied().unwrap_or(0);
    match probs.size().as_slice() {
        [_, _, found] if *found == vocab => {}
        other => return Err(Error::shape("soft tokens", format!("[B, T, {vocab}]"), other)),
    }
    if !probs.is_floating_point() {
        let found = format!("{:?}", probs.f_kind()?);
        return Err(Error::Kind {
            what: "soft tokens".into(),
            expected: "a floating-point type".into(),
            found,
        });
    }
    Ok(probs.f_to_device(table.device())?.f_to_kind(table.f_kind()?)?.f_matmul(table)?)
}
