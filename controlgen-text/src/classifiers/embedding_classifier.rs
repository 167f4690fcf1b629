//! A classifier on a language model's table of embeddings, for gradients.

use std::path::Path;

use controlgen_core::energy::Text;
use controlgen_core::{Classifier, Error, LanguageModel, LmSpec, Result, SharedTensor, Tokens};
use tch::{Kind, Tensor};

use super::directory::{Directory, ModelCard, Settings};
use super::head::uniform;
use super::{Head, Pooling, check_classes};
use crate::models::expected_embeddings;

/// How many neighbouring tokens a channel sees.
const WINDOW: i64 = 3;

/// p(y | x) from the frozen embeddings of a language model alone: what an energy wants whose gradient moves soft tokens of that
/// model (MuCoLa, Kumar, Paria and Tsvetkov 2022, demands that classifiers share the model's table). A projection, a
/// convolution over three tokens, the mean, a linear head: Kim, "Convolutional Neural Networks for Sentence Classification"
/// (EMNLP 2014), with the mean for the maximum over time and GELU for ReLU, so that every token has a gradient everywhere:
///
/// ```text
/// uₜ = P e(xₜ),   cₜ = gelu(W [uₜ₋₁, uₜ, uₜ₊₁] + b),   logits = head(mean cₜ)
/// ```
///
/// e(πₜ) = Σᵥ πₜ(v) eᵥ of soft tokens π; of one-hot ones it says what it says of the tokens. Padding and what lies beyond the
/// text are zeros to the convolution.
///
/// *Cost*: of ids a look-up and T · C · (D + 3 C) multiplications; of soft tokens T · V · D besides.
#[derive(Clone)]
pub struct EmbeddingClassifier {
    /// `[V, D]`, as the model has it.
    table: SharedTensor,
    /// What is known of it.
    base: LmSpec,
    channels: i64,
    /// `projection` `[C, D]`, `convolution.weight` `[C, C, 3]`, `convolution.bias` `[C]`.
    body: Vec<(&'static str, SharedTensor)>,
    head: Head,
    classes: Vec<String>,
}

/// What a configuration calls this kind.
const TYPE: &str = "embeddings";

impl EmbeddingClassifier {
    /// One of C = `channels` over the table of `lm` that says the same of every text until it is trained.
    ///
    /// # Errors
    /// [`Error::Value`] for no channels, and for classes that are fewer than two or not all different.
    pub fn new(
        lm: &dyn LanguageModel,
        channels: i64,
        classes: &[impl AsRef<str>],
        seed: u64,
    ) -> Result<Self> {
        if channels < 1 {
            return Err(Error::value("channels", "≥ 1", channels));
        }
        let head = Head::new(channels, None, classes.len(), seed)?;
        let classes = check_classes(&head, channels, classes)?;
        let width = lm.spec().width;
        let leaf = |shape: &[i64], inputs, stream| -> Result<SharedTensor> {
            Ok(uniform(shape, inputs, seed, stream)?.f_set_requires_grad(true)?.into())
        };
        let body = vec![
            // Embeddings are small; what comes out is of size 1.
            ("projection", leaf(&[channels, width], width, 10)?),
            ("convolution.weight", leaf(&[channels, channels, WINDOW], channels * WINDOW, 11)?),
            ("convolution.bias", leaf(&[channels], channels * WINDOW, 12)?),
        ];
        let table = lm.embeddings().shallow_clone().into();
        Ok(Self { table, base: lm.spec().clone(), channels, body, head, classes })
    }

    /// Opens a directory that [`EmbeddingClassifier::save`] wrote, for the model it was trained on.
    ///
    /// # Errors
    /// As [`LmClassifier::open`](super::LmClassifier::open).
    pub fn open(directory: impl AsRef<Path>, lm: &dyn LanguageModel) -> Result<Self> {
        let directory = Directory::open(directory.as_ref(), TYPE)?;
        directory.expect_base(lm.spec())?;
        let made = Self::new(lm, directory.number("channels")?, &directory.texts("classes")?, 0)?;
        directory.read(&made.parameters())?;
        Ok(made)
    }

    /// Writes config.json, model.safetensors (f16) and the card.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, directory: impl AsRef<Path>, card: &ModelCard) -> Result<()> {
        let settings = Settings::new(TYPE, &self.classes).base(&self.base);
        settings.number("channels", self.channels).write(directory.as_ref(), &self.parameters(), card)
    }

    /// Names and values of what is trained, and of the head's standardisation, which is not.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let body = self.body.iter().map(|(name, value)| ((*name).to_owned(), value.shallow_clone()));
        let head = self.head.parameters().into_iter().map(|(name, value)| (format!("head.{name}"), value));
        body.chain(head).collect()
    }

    fn embed(&self, x: &Text) -> Result<Tensor> {
        match x {
            Text::Soft { probs, .. } => expected_embeddings(&self.table, probs),
            Text::Hard { ids, .. } => {
                let (vocab, width) = self.table.size2()?;
                Tokens::Ids(ids).validate(None, vocab, width, self.table.f_kind()?)?;
                let ids = ids.f_to_device(self.table.device())?;
                Ok(Tensor::f_embedding(&self.table, &ids, -1, false, false)?)
            }
        }
    }
}

impl Classifier<Text> for EmbeddingClassifier {
    fn handle(&self) -> Box<dyn Classifier<Text>> {
        Box::new(self.clone())
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`], [`Error::Value`] for a text that is none of this vocabulary, or a row of padding
    /// alone.
    fn logits(&self, x: &Text) -> Result<Tensor> {
        let e = self.embed(x)?.f_to_kind(Kind::Float)?; // (B, T, D)
        let device = e.device();
        let get = |i: usize| self.body[i].1.f_to_device(device);
        let mut u = e.f_linear(&get(0)?, None::<Tensor>)?; // (B, T, C)
        if let Some(keep) = x.keep() {
            if keep.size() != u.size()[..2] {
                return Err(Error::shape("keep", format!("{:?}", &u.size()[..2]), &keep.size()));
            }
            let padding = keep.f_to_device(device)?.f_logical_not()?.f_unsqueeze(-1)?;
            u = u.f_masked_fill(&padding, 0.0)?;
        }
        let u = u.f_transpose(1, 2)?; // (B, C, T)
        let c = u.f_conv1d(&get(1)?, Some(&get(2)?), 1i64, WINDOW.div_euclid(2), 1i64, 1)?.f_gelu("none")?;
        self.head.logits(&Pooling::Mean.pool(&c.f_transpose(1, 2)?, x.keep())?)
    }
}
