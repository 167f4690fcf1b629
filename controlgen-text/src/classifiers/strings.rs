//! Classifiers of strings: of any classifier of tokens one of strings, and of several one.

use controlgen_core::energy::Text;
use controlgen_core::{Classifier, Error, Result};
use tch::{Kind, Tensor};

use crate::tokenizer::{Special, Tokenizer};

/// Classifies this many strings at once.
const BATCH: usize = 16;

/// A classifier of tokens as one of strings, of which it reads the last tokens, up to a bound: in a review the end says
/// most.
pub struct OfStrings {
    classifier: Box<dyn Classifier<Text>>,
    tokenizer: Tokenizer,
    longest: usize,
}

impl OfStrings {
    /// By this tokenizer, the last `longest` tokens.
    ///
    /// # Errors
    /// [`Error::Value`] for 0 tokens.
    pub fn new(classifier: &dyn Classifier<Text>, tokenizer: &Tokenizer, longest: usize) -> Result<Self> {
        if longest == 0 {
            return Err(Error::value("tokens to classify a text by", "≥ 1", 0));
        }
        Ok(Self { classifier: classifier.handle(), tokenizer: tokenizer.handle(), longest })
    }
}

impl Classifier<[String]> for OfStrings {
    fn handle(&self) -> Box<dyn Classifier<[String]>> {
        let classifier = (*self.classifier).handle();
        Box::new(Self { classifier, tokenizer: self.tokenizer.handle(), longest: self.longest })
    }

    fn classes(&self) -> &[String] {
        self.classifier.classes()
    }

    /// # Errors
    /// [`Error::Value`] for a string without tokens; the classifier's.
    fn logits(&self, x: &[String]) -> Result<Tensor> {
        let mut rows = self.tokenizer.encode_batch(x, Special::Add)?;
        for row in &mut rows {
            row.drain(..row.len().saturating_sub(self.longest));
        }
        // Texts of like length together, so that there is little padding.
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&i| rows[i].len());
        let mut found = Vec::new();
        for batch in order.chunks(BATCH) {
            let rows: Vec<&[i64]> = batch.iter().map(|&i| &rows[i][..]).collect();
            found.push(self.classifier.logits(&padded_text(&rows)?)?);
        }
        if found.is_empty() {
            let classes = self.classes().len() as i64;
            return Ok(Tensor::f_zeros([0, classes], (Kind::Float, tch::Device::Cpu))?);
        }
        let mut back = vec![0i64; order.len()];
        (0i64..).zip(&order).for_each(|(row, &i)| back[i] = row);
        Ok(Tensor::f_cat(&found, 0)?.f_index_select(0, &Tensor::f_from_slice(&back)?)?)
    }
}

/// Rows of token ids as one text, the shorter ones padded on the right.
///
/// # Errors
/// [`Error::Value`] for no rows, and for a row without tokens.
pub fn padded_text(rows: &[impl AsRef<[i64]>]) -> Result<Text> {
    let longest = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0);
    if rows.is_empty() || rows.iter().any(|row| row.as_ref().is_empty()) {
        return Err(Error::value("text", "at least one row, of at least one token each", "one without"));
    }
    let (mut ids, mut keep) = (Vec::new(), Vec::new());
    for row in rows {
        let row = row.as_ref();
        ids.extend(row.iter().copied().chain(std::iter::repeat_n(0, longest - row.len())));
        keep.extend((0..longest).map(|t| t < row.len()));
    }
    let shape = [rows.len() as i64, longest as i64];
    let text = Text::hard(Tensor::f_from_slice(&ids)?.f_view(shape)?);
    let ragged = keep.contains(&false);
    Ok(if ragged { text.keeping(Tensor::f_from_slice(&keep)?.f_view(shape)?) } else { text })
}

/// Several classifiers of the same classes as one: logits are the sum of theirs, each times its weight. With weights of 1
/// and independent evidence that is Bayes' rule for balanced classes.
pub struct Ensemble<X: ?Sized>(Vec<(f64, Box<dyn Classifier<X>>)>);

impl<X: ?Sized + 'static> Ensemble<X> {
    /// These, each with its weight.
    ///
    /// # Errors
    /// [`Error::Value`] for none, for other classes than the first's, and for a weight that is not finite.
    pub fn new(members: Vec<(f64, Box<dyn Classifier<X>>)>) -> Result<Self> {
        let Some((_, first)) = members.first() else {
            return Err(Error::value("classifiers of an ensemble", "at least one", "none"));
        };
        let expected = first.classes();
        for (weight, member) in &members {
            if member.classes() != expected {
                let found = member.classes().join(", ");
                return Err(Error::value("classes of an ensemble's member", expected.join(", "), found));
            }
            if !weight.is_finite() {
                return Err(Error::value("weight of an ensemble's member", "a finite number", weight));
            }
        }
        Ok(Self(members))
    }
}

impl<X: ?Sized + 'static> Classifier<X> for Ensemble<X> {
    fn handle(&self) -> Box<dyn Classifier<X>> {
        Box::new(Self(self.0.iter().map(|(weight, member)| (*weight, (**member).handle())).collect()))
    }

    fn classes(&self) -> &[String] {
        self.0.first().map_or(&[], |(_, member)| member.classes())
    }

    fn logits(&self, x: &X) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (weight, member) in &self.0 {
            // Log-probabilities: a constant of one's logits is no evidence.
            let mine = member.logits(x)?.f_log_softmax(-1, Kind::Float)?.f_mul_scalar(*weight)?;
            sum = Some(match sum {
                Some(sum) => sum.f_add(&mine)?,
                None => mine,
            });
        }
        sum.ok_or_else(|| Error::value("classifiers of an ensemble", "at least one", "none"))
    }
}
