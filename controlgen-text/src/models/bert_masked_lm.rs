//! BERT and RoBERTa as masked language models.

use std::path::Path;
use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::layers::{LayerNorm, Linear};
use controlgen_core::{Dims, Error, LmSpec, MaskedLm, Pass, Placement, Result, SiteMap, Tokens, WeightMap};
use tch::Tensor;

use super::bert::{BertConfig, BertInput, Body, layer_norm, linear, named};
use super::{map_output, output_product, special_tokens};
use crate::tokenizer::Tokenizer;
use controlgen_core::config::Config;

/// A BERT or RoBERTa that fills gaps: logits = E · norm(act(W h + c)) + b, with E the table of embeddings unless the
/// checkpoint has an output of its own.
pub struct BertMaskedLm {
    body: Body,
    dense: Linear,
    norm: LayerNorm,
    decoder: Linear,
    tied: bool,
    spec: LmSpec,
    mask: i64,
    sites: Arc<SiteMap>,
}

/// The tokens that a masked language model knows apart. config.json names none of BERT's: its tokenizer does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FramingTokens {
    /// What opens a text, `[CLS]` or `<s>`.
    pub cls: Option<i64>,
    /// What closes it, `[SEP]` or `</s>`.
    pub sep: Option<i64>,
    /// What stands for a gap, `[MASK]` or `<mask>`.
    pub mask: i64,
}

impl FramingTokens {
    /// Those of the tokenizer in a Hugging Face directory.
    ///
    /// # Errors
    /// Those of [`Tokenizer::open`]; [`Error::Value`] for a tokenizer without a token for gaps.
    pub fn open(directory: &Path) -> Result<Self> {
        let tokenizer = Tokenizer::open(directory)?;
        let id = |role: &str, usual: &[&str]| {
            let named = tokenizer.special_tokens().find(|(name, _)| *name == role).map(|(_, token)| token);
            named.into_iter().chain(usual.iter().copied()).find_map(|token| tokenizer.token_to_id(token))
        };
        let mask = id("mask_token", &["[MASK]", "<mask>"]).ok_or_else(|| {
            Error::value("mask_token of the tokenizer", "a token that stands for a gap", "none")
        })?;
        Ok(Self { cls: id("cls_token", &["[CLS]", "<s>"]), sep: id("sep_token", &["[SEP]", "</s>"]), mask })
    }
}

impl BertMaskedLm {
    /// Loads the weights that config.json describes.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Unsupported`]; [`Error::Value`] for a mask that is no token; [`Error::Keys`],
    /// [`Error::Shape`] where the checkpoint is not the model that the configuration describes.
    pub fn load(
        config: &Config,
        weights: &Weights<'_>,
        placement: Placement,
        tokens: FramingTokens,
    ) -> Result<Self> {
        let c = BertConfig::from_config(config)?;
        let (d, vocab, context) = (c.hidden_size, c.vocab_size, c.context());
        if let Some(id) = [Some(tokens.mask), tokens.cls, tokens.sep]
            .into_iter()
            .flatten()
            .find(|id| !(0..vocab).contains(id))
        {
            return Err(Error::value("special token", format!("0 .. {vocab}"), id));
        }
        let weights = named(weights, &c);
        let mut sites = SiteMap::new();
        let prefix = format!("{}.", c.model_type);
        let roberta = c.model_type == "roberta";
        let (head, transform, norm, bias) = if roberta {
            ("lm_head.decoder", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder.bias")
        } else {
            let transform = "cls.predictions.transform.dense";
            let norm = "cls.predictions.transform.LayerNorm";
            ("cls.predictions.decoder", transform, norm, "cls.predictions.decoder.bias")
        };
        let (_, eos, pad) = special_tokens(config, vocab)?;
        let architecture = c.model_type.to_owned();
        let root = weights.scope(c.model_type);
        let body = Body::load(c, &root, &mut sites, &prefix, placement)?;
        let dense = linear(&weights, &mut sites, ("", transform), (d, d))?;
        let norm = layer_norm(&weights, norm, &body.config)?;
        let table = body.word_embeddings.weight();
        let name = format!("{head}.weight");
        let (weight, tied) = output_product(&weights, &name, table, body.config.tie_word_embeddings)?;
        let site = sites.add(head, Dims::Linear { inputs: d, outputs: vocab });
        let decoder = Linear::new(weight, Some(weights.get(bias, &[vocab])?), &[(site, vocab)])?;
        // The other objective of BERT, positions that old files count out, and a bias that is stored twice: where both
        // differ, as in files of an untied output, the output product's own is the one that is added.
        weights.finish(&[
            "*position_ids",
            "*pooler.dense.*",
            "cls.seq_relationship.*",
            "cls.predictions.bias",
            "lm_head.bias",
        ])?;
        let spec = LmSpec {
            architecture,
            vocab,
            width: d,
            context,
            bos: tokens.cls,
            eos: tokens.sep.map_or(eos, |sep| vec![sep]),
            pad,
            decoder_start: None,
            placement,
        };
        Ok(Self { body, dense, norm, decoder, tied, spec, mask: tokens.mask, sites: Arc::new(sites) })
    }

    /// Its dimensions.
    pub fn config(&self) -> &BertConfig {
        &self.body.config
    }

    /// The logits of each position, `[B, T, V]`, with everything that a BERT can be told.
    ///
    /// # Errors
    /// As [`MaskedLm::logits`]; [`Error::Value`] for a kind of token or a position that is none.
    pub fn forward(&self, input: BertInput<'_>, pass: &Pass<'_>) -> Result<Tensor> {
        let x = self.body.forward(input, &self.sites, pass)?;
        let x = self.body.config.hidden_act.forward(&self.dense.forward(&x, pass)?)?;
        self.decoder.forward(&self.norm.forward(&x)?, pass)
    }

    /// A handle in which the weights that `f` answers for are replaced and all others shared.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        let body = self.body.map(f)?;
        let dense = self.dense.map_weights(f)?;
        let tables = self.tied.then_some((&self.body.word_embeddings, &body.word_embeddings));
        let decoder = map_output(&self.decoder, tables, f)?;
        Ok(Self { body, dense, decoder, ..self.share() })
    }

    fn share(&self) -> Self {
        Self {
            body: self.body.share(),
            dense: self.dense.handle(),
            norm: self.norm.handle(),
            decoder: self.decoder.handle(),
            spec: self.spec.clone(),
            sites: Arc::clone(&self.sites),
            ..*self
        }
    }
}

impl MaskedLm for BertMaskedLm {
    fn handle(&self) -> Box<dyn MaskedLm> {
        Box::new(self.share())
    }

    fn spec(&self) -> &LmSpec {
        &self.spec
    }

    fn mask(&self) -> i64 {
        self.mask
    }

    fn sites(&self) -> &SiteMap {
        &self.sites
    }

    fn embeddings(&self) -> &Tensor {
        self.body.word_embeddings.weight()
    }

    fn logits(&self, tokens: Tokens<'_>, keep: Option<&Tensor>, pass: &Pass<'_>) -> Result<Tensor> {
        self.forward(BertInput::new(tokens, keep), pass)
    }
}
