//! Classifiers of texts: p(y | x), trained on labelled files, over frozen language models.
//!
//! | classifier | of | sees | for |
//! |---|---|---|---|
//! | [`LmClassifier`] | [`Text`](controlgen_core::energy::Text) | hidden states of a language model, pooled | energies, reranking |
//! | [`EmbeddingClassifier`] | [`Text`](controlgen_core::energy::Text) | its table of embeddings alone | gradients by the token |
//! | [`PrefixDiscriminator`] | beginnings of texts | the hidden state of each position | [`Fudge`](crate::controls::Fudge) |
//! | [`NgramClassifier`] | strings | n-grams of words | judging what the others led to |
//!
//! [`OfStrings`] makes a classifier of strings of one of tokens, [`Ensemble`] one of several.
//!
//! Data come from [`Labelled`] files, parted by [`Split`]. [`CrossEntropy`] trains with
//! [`controlgen_core::train`]. Each is saved as a directory: config.json, model.safetensors, and a README.md that says what it
//! was made of ([`ModelCard`]); a directory opens for the model that it was trained on, and is refused for any other.

mod directory;
mod embedding_classifier;
mod head;
mod labelled;
mod lm_classifier;
mod ngrams;
mod pooling;
mod prefix;
mod split;
mod states;
mod strings;
mod training;

use std::collections::BTreeSet;

use controlgen_core::{Error, Result};

pub use directory::ModelCard;
pub use embedding_classifier::EmbeddingClassifier;
pub use head::Head;
pub use labelled::{Columns, Example, Labelled};
pub use lm_classifier::LmClassifier;
pub use ngrams::NgramClassifier;
pub use pooling::Pooling;
pub use prefix::{PrefixDiscriminator, PrefixState};
pub use split::Split;
pub use states::LmStates;
pub use strings::{Ensemble, OfStrings, padded_text};
pub use training::{CrossEntropy, accuracy, trainable};

/// Two or more names, all different.
fn different(classes: &[impl AsRef<str>]) -> Result<Vec<String>> {
    let classes: Vec<String> = classes.iter().map(|class| class.as_ref().to_owned()).collect();
    let set: BTreeSet<&String> = classes.iter().collect();
    if set.len() < 2 || set.len() < classes.len() {
        return Err(Error::value("classes", "two or more, all different", classes.join(", ")));
    }
    Ok(classes)
}

/// Classes that are the head's, and a head for features of this width.
fn check_classes(head: &Head, width: i64, classes: &[impl AsRef<str>]) -> Result<Vec<String>> {
    let classes = different(classes)?;
    if classes.len() as i64 != head.classes() {
        return Err(Error::value("classes", format!("{}, as the head has", head.classes()), classes.len()));
    }
    if head.inputs() != width {
        return Err(Error::shape("features of a head", format!("[.., {}]", head.inputs()), &[-1, width]));
    }
    Ok(classes)
}
