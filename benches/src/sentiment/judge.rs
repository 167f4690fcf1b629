//! The judge: two classifiers that guide nothing, and err differently.

use std::path::Path;

use controlgen_core::{Classifier, Result};
use controlgen_text::TextModel;
use controlgen_text::classifiers::{Ensemble, LmClassifier, NgramClassifier, OfStrings};
use tch::{Kind, Tensor};

use super::texts::{self, CLASSES};
use super::train::{by_group, said};

/// How many of a text's last tokens the half that is a language model reads.
const TOKENS: usize = 64;

/// What the judge says of a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// p(positive).
    pub positive: f64,
    /// The same by each half alone: hidden states, n-grams.
    pub halves: [f64; 2],
}

/// A judge of sentiment.
pub struct SentimentJudge {
    states: Box<dyn Classifier<[String]>>,
    ngrams: Box<dyn Classifier<[String]>>,
    both: Ensemble<[String]>,
}

impl SentimentJudge {
    /// From the folder of the directories `judge-states` and `judge-ngrams`.
    pub fn open(folder: &Path, model: &TextModel) -> Result<Self> {
        let states = LmClassifier::open(folder.join("judge-states"), model.lm())?;
        let states = OfStrings::new(&states, model.tokenizer(), TOKENS)?.handle();
        let ngrams = NgramClassifier::open(folder.join("judge-ngrams"))?.handle();
        let both = Ensemble::new(vec![(1.0, (*states).handle()), (1.0, (*ngrams).handle())])?;
        Ok(Self { states, ngrams, both })
    }

    /// What it says of each text.
    pub fn verdicts(&self, texts: &[String]) -> Result<Vec<Verdict>> {
        let _guard = tch::no_grad_guard();
        let of = |classifier: &dyn Classifier<[String]>| -> Result<Vec<f64>> {
            let logits = classifier.logits(texts)?.f_softmax(-1, Kind::Double)?;
            Ok(Vec::try_from(logits.f_select(-1, 1)?.f_contiguous()?)?)
        };
        let (states, ngrams, both) = (of(&*self.states)?, of(&*self.ngrams)?, of(&self.both)?);
        let each = both.into_iter().zip(states).zip(ngrams);
        Ok(each.map(|((positive, a), b)| Verdict { positive, halves: [a, b] }).collect())
    }
}

/// One of a verdict's numbers.
type Column = fn(&Verdict) -> f64;

/// Measures the judge and its halves on the held-out part, from the texts on.
pub fn measure(reviews: &Path, folder: &Path, model: &TextModel, most: Option<usize>) -> Result<()> {
    let judge = SentimentJudge::open(folder, model)?;
    let parts = texts::parts(reviews)?;
    let examples = parts.last().map_or(&[][..], |part| part.examples());
    let examples = &examples[..most.unwrap_or(examples.len()).min(examples.len())];
    let texts: Vec<String> = examples.iter().map(|example| example.text.clone()).collect();
    let verdicts = judge.verdicts(&texts)?;
    println!("classes: {}", CLASSES.join(", "));
    let columns: [(&str, Column); 3] =
        [("judge", |v| v.positive), ("hidden states", |v| v.halves[0]), ("n-grams", |v| v.halves[1])];
    for (name, of) in columns {
        let rows: Vec<f64> = verdicts.iter().flat_map(|v| [1.0 - of(v), of(v)]).collect();
        let logits = Tensor::f_from_slice(&rows)?.f_view([-1, 2])?;
        println!("{name}: {}", said(&by_group(&logits, examples)?));
    }
    Ok(())
}
