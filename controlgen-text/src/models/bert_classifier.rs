//! BERT and RoBERTa with a classification head.

use std::sync::Arc;

use controlgen_core::checkpoint::Weights;
use controlgen_core::energy::Text;
use controlgen_core::layers::Linear;
use controlgen_core::{Classifier, Error, Pass, Placement, Result, SiteMap, Tokens, WeightMap};
use tch::Tensor;

use super::bert::{BertConfig, BertInput, Body, linear, named, pool};
use super::expected_embeddings;
use controlgen_core::config::Config;

/// A BERT or RoBERTa that tells classes of texts apart: W tanh(W₀ h₀ + b₀) + b of the first position's state h₀, as
/// `BertForSequenceClassification` and `RobertaForSequenceClassification` do.
///
/// Texts carry the tokens that frame them (`[CLS] … [SEP]`), which the tokenizer adds. Soft tokens are read as expected
/// embeddings Σᵥ π(v) eᵥ, and the logits are differentiable in π.
pub struct BertClassifier {
    body: Body,
    pooler: Linear,
    out: Linear,
    classes: Vec<String>,
    sites: Arc<SiteMap>,
}

impl BertClassifier {
    /// Loads the weights that config.json describes; classes are named by its `id2label`.
    ///
    /// # Errors
    /// [`Error::Config`]; [`Error::Unsupported`] for a `problem_type` whose logits are no log-probabilities of classes;
    /// [`Error::Keys`], [`Error::Shape`] where the checkpoint is not the model that the configuration describes.
    pub fn load(config: &Config, weights: &Weights<'_>, placement: Placement) -> Result<Self> {
        if let Some(kind) = config.str("problem_type")?.filter(|&kind| kind != "single_label_classification")
        {
            let what = format!("problem_type `{kind}`");
            return Err(Error::unsupported(what, "single_label_classification"));
        }
        let classes = classes(config)?;
        let c = BertConfig::from_config(config)?;
        let weights = named(weights, &c);
        let (d, mut sites) = (c.hidden_size, SiteMap::new());
        let prefix = format!("{}.", c.model_type);
        let roberta = c.model_type == "roberta";
        let root = weights.scope(c.model_type);
        let body = Body::load(c, &root, &mut sites, &prefix, placement)?;
        let (pooler, out) = if roberta {
            (linear(&weights, &mut sites, ("", "classifier.dense"), (d, d))?, "classifier.out_proj")
        } else {
            (linear(&root, &mut sites, (&prefix, "pooler.dense"), (d, d))?, "classifier")
        };
        let outputs = i64::try_from(classes.len()).unwrap_or(i64::MAX);
        let out = linear(&weights, &mut sites, ("", out), (d, outputs))?;
        weights.finish(if roberta { &["*position_ids", "roberta.pooler.*"] } else { &["*position_ids"] })?;
        Ok(Self { body, pooler, out, classes, sites: Arc::new(sites) })
    }

    /// Its dimensions.
    pub fn config(&self) -> &BertConfig {
        &self.body.config
    }

    /// Where controls may act.
    pub fn sites(&self) -> &SiteMap {
        &self.sites
    }

    /// The table of token embeddings, `[V, D]`.
    pub fn embeddings(&self) -> &Tensor {
        self.body.word_embeddings.weight()
    }

    /// The logits of the classes, `[B, K]`, with everything that a BERT can be told, under controls.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`]; [`Error::Value`] for what is no token, kind of token or position;
    /// [`Error::Context`] past the last position; [`Error::ForeignSites`]; the controls'.
    pub fn forward(&self, input: BertInput<'_>, pass: &Pass<'_>) -> Result<Tensor> {
        let hidden = self.body.forward(input, &self.sites, pass)?;
        self.out.forward(&pool(&self.pooler, &hidden, pass)?, pass)
    }

    /// A handle in which the weights that `f` answers for are replaced and all others shared.
    ///
    /// # Errors
    /// [`Error::Shape`] for a weight of another shape; `f`'s own.
    pub fn map_weights(&self, f: WeightMap<'_>) -> Result<Self> {
        let (body, pooler) = (self.body.map(f)?, self.pooler.map_weights(f)?);
        Ok(Self { body, pooler, out: self.out.map_weights(f)?, ..self.share() })
    }

    fn share(&self) -> Self {
        Self {
            body: self.body.share(),
            pooler: self.pooler.handle(),
            out: self.out.handle(),
            classes: self.classes.clone(),
            sites: Arc::clone(&self.sites),
        }
    }
}

/// The names of `id2label` in order; LABEL_0, LABEL_1 where there is none, as transformers has it.
fn classes(config: &Config) -> Result<Vec<String>> {
    let Some(labels) = config.object("id2label")? else {
        let count = config.int_if("num_labels", 1, 1 << 20)?.unwrap_or(2);
        return Ok((0..count).map(|i| format!("LABEL_{i}")).collect());
    };
    let mut names = Vec::with_capacity(labels.len());
    for i in 0..labels.len() {
        let name = labels.str(&i.to_string())?;
        names
            .push(name.ok_or_else(|| labels.error(&i.to_string(), "the name of a class", "nothing"))?.into());
    }
    if names.is_empty() {
        return Err(config.error("id2label", "at least one class", "none"));
    }
    Ok(names)
}

impl Classifier<Text> for BertClassifier {
    fn handle(&self) -> Box<dyn Classifier<Text>> {
        Box::new(self.share())
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn logits(&self, x: &Text) -> Result<Tensor> {
        let table = self.embeddings();
        let keep = x.keep().map(|keep| keep.f_to_device(table.device())).transpose()?;
        match x {
            Text::Hard { ids, .. } => {
                let ids = ids.f_to_device(table.device())?;
                self.forward(BertInput::new(Tokens::Ids(&ids), keep.as_ref()), &Pass::default())
            }
            Text::Soft { probs, .. } => {
                let embeds = expected_embeddings(table, probs)?;
                self.forward(BertInput::new(Tokens::Embeds(&embeds), keep.as_ref()), &Pass::default())
            }
        }
    }
}
