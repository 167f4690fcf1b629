//! A classifier of n-grams of words, which no language model has a part in.

use std::collections::BTreeSet;
use std::path::Path;

use controlgen_core::{Classifier, Error, Result, SharedTensor};
use tch::{Kind, Tensor};

use super::directory::{Directory, MOST, ModelCard, Settings};
use crate::evaluation::words;

/// p(y | x) of a linear classifier on which n-grams of [`words`] a text has, n from 1 to a bound:
///
/// ```text
/// logits = Σ_g W[hash(g)] / √|g| + b,   g the different n-grams, |g| how many there are
/// ```
///
/// N-grams share the rows of W, as many as `buckets`, by a hash: Weinberger et al., "Feature Hashing for Large Scale
/// Multitask Learning" (ICML 2009), without signs. It knows nothing of a model that it judges the texts of, and errs
/// otherwise than a head on that model's states.
#[derive(Clone)]
pub struct NgramClassifier {
    buckets: i64,
    longest: i64,
    /// `[buckets, K]`
    weight: SharedTensor,
    /// `[K]`
    bias: SharedTensor,
    classes: Vec<String>,
}

/// What a configuration calls this kind.
const TYPE: &str = "ngrams";

impl NgramClassifier {
    /// N-grams of up to `longest` words in so many buckets; it says the same of every text until it is trained.
    ///
    /// # Errors
    /// [`Error::Value`] for no buckets or more than 2²⁴, for a `longest` outside 1 ..= 8, and for classes that are fewer than
    /// two or not all different.
    pub fn new(buckets: i64, longest: i64, classes: &[impl AsRef<str>]) -> Result<Self> {
        if !(1..=MOST).contains(&buckets) {
            return Err(Error::value("buckets of n-grams", format!("1 ..= {MOST}"), buckets));
        }
        if !(1..=8).contains(&longest) {
            return Err(Error::value("words of an n-gram", "1 ..= 8", longest));
        }
        let classes = super::different(classes)?;
        let leaf = |shape: &[i64]| -> Result<SharedTensor> {
            let zeros = Tensor::f_zeros(shape, (Kind::Float, tch::Device::Cpu))?;
            Ok(zeros.f_set_requires_grad(true)?.into())
        };
        let k = classes.len() as i64;
        Ok(Self { buckets, longest, weight: leaf(&[buckets, k])?, bias: leaf(&[k])?, classes })
    }

    /// Opens a directory that [`NgramClassifier::save`] wrote.
    ///
    /// # Errors
    /// As [`LmClassifier::open`](super::LmClassifier::open), but for the model.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = Directory::open(directory.as_ref(), TYPE)?;
        let (buckets, longest) = (directory.number("buckets")?, directory.number("longest")?);
        let made = Self::new(buckets, longest, &directory.texts("classes")?)?;
        directory.read(&made.parameters())?;
        Ok(made)
    }

    /// Writes config.json, model.safetensors (f16) and the card.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, directory: impl AsRef<Path>, card: &ModelCard) -> Result<()> {
        let settings = Settings::new(TYPE, &self.classes);
        let settings = settings.number("buckets", self.buckets).number("longest", self.longest);
        settings.write(directory.as_ref(), &self.parameters(), card)
    }

    /// Names and values of what is trained.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("weight".into(), self.weight.shallow_clone()), ("bias".into(), self.bias.shallow_clone())]
    }

    /// The buckets of a text's n-grams, each once.
    pub fn buckets(&self, text: &str) -> Vec<i64> {
        let words = words(text);
        let mut found = BTreeSet::new();
        for n in 1..=self.longest as usize {
            found.extend(words.windows(n).map(|gram| (hash(gram) % self.buckets as u64) as i64));
        }
        found.into_iter().collect()
    }

    /// The logits `[B, K]` of texts by their buckets.
    ///
    /// # Errors
    /// [`Error::Value`] for a bucket that is none.
    pub fn logits_of(&self, texts: &[impl AsRef<[i64]>]) -> Result<Tensor> {
        let (mut all, mut starts, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        for text in texts {
            let text = text.as_ref();
            starts.push(all.len() as i64);
            all.extend_from_slice(text);
            scales.push(1.0 / (text.len().max(1) as f32).sqrt());
        }
        if let Some(bad) = all.iter().find(|bucket| !(0..self.buckets).contains(*bucket)) {
            return Err(Error::value("bucket of an n-gram", format!("0 .. {}", self.buckets), bad));
        }
        let (all, starts) = (Tensor::f_from_slice(&all)?, Tensor::f_from_slice(&starts)?);
        let sums =
            Tensor::f_embedding_bag(&self.weight, &all, &starts, false, 0, false, None::<Tensor>, false)?.0;
        let scales = Tensor::f_from_slice(&scales)?.f_unsqueeze(-1)?;
        Ok(sums.f_mul(&scales)?.f_add(&self.bias)?)
    }
}

/// 64-bit FNV-1a of the words, a space after each.
fn hash(words: &[String]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.bytes().chain([b' ']));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Classifier<[String]> for NgramClassifier {
    fn handle(&self) -> Box<dyn Classifier<[String]>> {
        Box::new(self.clone())
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn logits(&self, x: &[String]) -> Result<Tensor> {
        self.logits_of(&x.iter().map(|text| self.buckets(text)).collect::<Vec<_>>())
    }
}
