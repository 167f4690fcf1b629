//! A classifier on the hidden states of a frozen language model.

use std::path::Path;

use controlgen_core::energy::Text;
use controlgen_core::{Classifier, LanguageModel, Result};
use tch::Tensor;

use super::directory::{Directory, ModelCard, Settings};
use super::{Head, LmStates, Pooling, check_classes};

/// p(y | x) of a head on the pooled hidden states of a frozen language model.
///
/// Of one-hot soft tokens it says what it says of the tokens, and it is differentiable in soft tokens.
///
/// *Cost*: one pass over the text, of the blocks up to the last one that is read.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::{Classifier, Placement, energy::Text};
/// use controlgen_text::{TextModel, classifiers::LmClassifier};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let sentiment = LmClassifier::open("benches/data/sentiment/judge-states", model.lm())?;
/// let ids = model.tokenizer().encode("A warm and funny film.", controlgen_text::tokenizer::Special::Add)?;
/// let ids = tch::Tensor::f_from_slice(&ids)?.f_unsqueeze(0)?;
/// println!("{:?}: {}", sentiment.classes(), sentiment.logits(&Text::hard(ids))?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LmClassifier {
    states: LmStates,
    pooling: Pooling,
    head: Head,
    classes: Vec<String>,
}

/// What a configuration calls this kind.
const TYPE: &str = "lm_states";

impl LmClassifier {
    /// These states, pooled, and a head on them.
    ///
    /// # Errors
    /// [`Error::Shape`](controlgen_core::Error::Shape) for a head of another width;
    /// [`Error::Value`](controlgen_core::Error::Value) for classes that are not the head's, or not all different.
    pub fn new(states: LmStates, pooling: Pooling, head: Head, classes: &[impl AsRef<str>]) -> Result<Self> {
        let classes = check_classes(&head, pooling.width(states.width()), classes)?;
        Ok(Self { states, pooling, head, classes })
    }

    /// Opens a directory that [`LmClassifier::save`] wrote, for the model it was trained on.
    ///
    /// # Errors
    /// [`Error::Config`](controlgen_core::Error::Config) for a configuration that is damaged, of another kind of classifier,
    /// or of a model of another architecture, width or vocabulary; [`Error::NoSite`](controlgen_core::Error::NoSite);
    /// [`Error::Keys`](controlgen_core::Error::Keys), [`Error::Shape`](controlgen_core::Error::Shape),
    /// [`Error::NotFinite`](controlgen_core::Error::NotFinite), [`Error::Format`](controlgen_core::Error::Format),
    /// [`Error::Io`](controlgen_core::Error::Io) for a file of parameters that is not whole.
    pub fn open(directory: impl AsRef<Path>, lm: &dyn LanguageModel) -> Result<Self> {
        let directory = Directory::open(directory.as_ref(), TYPE)?;
        directory.expect_base(lm.spec())?;
        let states = LmStates::at(lm, &directory.texts("sites")?)?;
        let pooling = directory.pooling()?;
        let classes = directory.texts("classes")?;
        let head = Head::new(pooling.width(states.width()), directory.hidden()?, classes.len(), 0)?;
        directory.read(&head.parameters())?;
        Self::new(states, pooling, head, &classes)
    }

    /// Writes config.json, model.safetensors (f16) and the card.
    ///
    /// # Errors
    /// [`Error::Io`](controlgen_core::Error::Io).
    pub fn save(&self, directory: impl AsRef<Path>, card: &ModelCard) -> Result<()> {
        let settings = Settings::new(TYPE, &self.classes)
            .base(self.states.lm().spec())
            .texts("sites", self.states.names())
            .text("pooling", self.pooling.name())
            .hidden(self.head.hidden());
        settings.write(directory.as_ref(), &self.head.parameters(), card)
    }

    /// The head.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// What the head reads of a text, `[B, D]`, f32.
    ///
    /// # Errors
    /// Those of [`LmStates::of`] and [`Pooling::pool`].
    pub fn features(&self, x: &Text) -> Result<Tensor> {
        self.pooling.pool(&self.states.of(x)?, x.keep())
    }
}

impl Classifier<Text> for LmClassifier {
    fn handle(&self) -> Box<dyn Classifier<Text>> {
        Box::new(self.clone())
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn logits(&self, x: &Text) -> Result<Tensor> {
        self.head.logits(&self.features(x)?)
    }
}
