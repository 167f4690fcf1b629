//! A discriminator of beginnings, for FUDGE.

use std::path::Path;

use controlgen_core::{Error, LanguageModel, LmInput, Pass, Result, Rows, Source, State};
use tch::{Kind, Tensor};

use super::directory::{Directory, ModelCard, Settings};
use super::{Head, LmStates, Pooling, check_classes, padded_text};
use crate::controls::FutureDiscriminator;
use crate::search::padded;
use crate::tokenizer::{Special, Tokenizer};

/// log p(y | x₁ … xₜ): what will be said of the whole text, from any beginning of it. A head on the hidden state of a frozen
/// language model at each position, trained on all beginnings of labelled texts; Yang and Klein, "FUDGE: Controlled Text
/// Generation With Future Discriminators" (NAACL 2021), section 3.
///
/// As a [`FutureDiscriminator`] it speaks for one class ([`PrefixDiscriminator::of`]).
///
/// *Cost*: for k candidates of B rows one pass of the blocks up to the site that is read, over `[B k, 1]` tokens with the
/// rows' caches repeated; one over `[B, 1]` for the tokens chosen.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::TextModel;
/// use controlgen_text::classifiers::PrefixDiscriminator;
/// use controlgen_text::controls::{Fudge, TopP};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let sentiment = PrefixDiscriminator::open("benches/data/sentiment/guide-prefixes", model.lm())?;
/// let good = Fudge::new(sentiment.of("positive")?, 6.0, 10)?;
/// let done = model.generate("The painting").with(good).with(TopP::new(0.9)?).sample(0).max_new_tokens(20).run()?;
/// println!("{:?}", done.text());
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct PrefixDiscriminator {
    states: LmStates,
    head: Head,
    classes: Vec<String>,
    /// The class that is wanted.
    class: usize,
}

/// What a configuration calls this kind.
const TYPE: &str = "prefixes";

impl PrefixDiscriminator {
    /// A head on the state of each position, for the first class.
    ///
    /// # Errors
    /// [`Error::Shape`] for a head of another width; [`Error::Value`] for classes that are not the head's, or not all different.
    pub fn new(states: LmStates, head: Head, classes: &[impl AsRef<str>]) -> Result<Self> {
        let classes = check_classes(&head, states.width(), classes)?;
        Ok(Self { states, head, classes, class: 0 })
    }

    /// Opens a directory that [`PrefixDiscriminator::save`] wrote, for the model it was trained on.
    ///
    /// # Errors
    /// As [`LmClassifier::open`](super::LmClassifier::open).
    pub fn open(directory: impl AsRef<Path>, lm: &dyn LanguageModel) -> Result<Self> {
        let directory = Directory::open(directory.as_ref(), TYPE)?;
        directory.expect_base(lm.spec())?;
        let states = LmStates::at(lm, &directory.texts("sites")?)?;
        let classes = directory.texts("classes")?;
        let head = Head::new(states.width(), directory.hidden()?, classes.len(), 0)?;
        directory.read(&head.parameters())?;
        Self::new(states, head, &classes)
    }

    /// Writes config.json, model.safetensors (f16) and the card.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, directory: impl AsRef<Path>, card: &ModelCard) -> Result<()> {
        let settings = Settings::new(TYPE, &self.classes)
            .base(self.states.lm().spec())
            .texts("sites", self.states.names())
            .hidden(self.head.hidden());
        settings.write(directory.as_ref(), &self.head.parameters(), card)
    }

    /// The names of the classes.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The head.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The same, as the discriminator of another class.
    ///
    /// # Errors
    /// [`Error::Value`] for a name that is none of the classes.
    pub fn of(&self, class: &str) -> Result<Self> {
        let found = self.classes.iter().position(|known| known == class);
        let class =
            found.ok_or_else(|| Error::value("class of a discriminator", self.classes.join(", "), class))?;
        Ok(Self { class, ..self.clone() })
    }

    /// Logits `[B, T, K]` after each position of token ids `[B, T]`.
    ///
    /// # Errors
    /// Those of [`LmStates::of`].
    pub fn logits(&self, x: &controlgen_core::energy::Text) -> Result<Tensor> {
        self.head.logits(&self.states.of(x)?)
    }

    /// log p(class | text) of whole strings, each as the discriminator sees it after its last token.
    ///
    /// # Errors
    /// [`Error::Value`] for a string without tokens; those of [`LmStates::of`].
    pub fn of_strings(&self, tokenizer: &Tokenizer, texts: &[impl AsRef<str>]) -> Result<Vec<f64>> {
        let _guard = tch::no_grad_guard();
        let rows = texts.iter().map(|text| tokenizer.encode(text.as_ref(), Special::Add));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let x = padded_text(&rows)?;
        let last = Pooling::Last.pool(&self.states.of(&x)?, x.keep())?; // (B, D)
        let class = i64::try_from(self.class).unwrap_or(0);
        let found = self.head.logits(&last)?.f_log_softmax(-1, Kind::Double)?.f_select(-1, class)?;
        Ok(Vec::try_from(found.f_contiguous()?)?)
    }
}

/// What the language model remembers of each row.
pub struct PrefixState(State);

impl Rows for PrefixState {
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.0.reorder(rows)
    }
}

impl FutureDiscriminator for PrefixDiscriminator {
    type State = PrefixState;

    fn vocab(&self) -> i64 {
        self.states.lm().spec().vocab
    }

    fn start(&self, prompts: &[Vec<i64>]) -> Result<PrefixState> {
        let _guard = tch::no_grad_guard();
        let (ids, keep) = padded(self.states.lm(), prompts)?;
        let rows = i64::try_from(prompts.len()).unwrap_or(i64::MAX);
        let mut state = self.states.lm().start(Source::Rows(rows), &Pass::default())?;
        let _ = self.states.read(LmInput::ids(&ids).keep(keep.as_ref()), &mut state)?;
        Ok(PrefixState(state))
    }

    fn log_probs(&self, state: &mut PrefixState, candidates: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let &[rows, k] = candidates.size().as_slice() else {
            return Err(Error::shape("candidates of a discriminator", "[B, k]", &candidates.size()));
        };
        let mut each = state.0.fork()?;
        let repeated: Vec<i64> = (0..rows).flat_map(|row| (0..k).map(move |_| row)).collect();
        each.reorder(&repeated)?;
        let device = self.states.lm().spec().placement.device;
        let ids = candidates.f_reshape([rows * k, 1])?.f_to_device(device)?;
        let found = self.states.read(LmInput::ids(&ids), &mut each)?; // (B k, 1, D)
        let class = i64::try_from(self.class).unwrap_or(0);
        let logits = self.head.logits(&found)?.f_log_softmax(-1, Kind::Float)?.f_select(-1, class)?;
        Ok(logits.f_view([rows, k])?)
    }

    fn advance(&self, state: &mut PrefixState, tokens: &[i64]) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let device = self.states.lm().spec().placement.device;
        let ids = Tensor::f_from_slice(tokens)?.f_unsqueeze(-1)?.f_to_device(device)?; // (B, 1)
        let _ = self.states.read(LmInput::ids(&ids), &mut state.0)?;
        Ok(())
    }
}
