//! What a text is steered to.

use controlgen_core::{Error, LmSpec, Result, SharedTensor};
use tch::{Kind, Tensor};

use crate::controls::in_vocabulary;
use crate::tokenizer::{Special, Tokenizer};

/// What an attribute is told of, for each row.
pub struct Seen<'a> {
    /// log p of the next token `[B, V]`, f32.
    pub log_p: &'a Tensor,
    /// The mean of the last hidden states, which the output product reads, of all positions so far: `[B, D]`, f32. There
    /// where [`Attribute::reads_hidden`] says so.
    pub hidden: Option<&'a Tensor>,
}

/// An attribute model p(a | x) that [`Pplm`](super::Pplm) goes up the gradient of.
pub trait Attribute: Send + 'static {
    /// Another handle over the same weights.
    fn handle(&self) -> Box<dyn Attribute>;

    /// Refuses a model that it is not made for.
    ///
    /// # Errors
    /// [`Error::Value`] for another vocabulary, [`Error::Shape`] for another width.
    fn check(&self, spec: &LmSpec) -> Result<()>;

    /// −log p(a | x) of each row, `[B]`, differentiable in what it is told.
    ///
    /// # Errors
    /// The attribute's own.
    fn loss(&self, seen: &Seen<'_>) -> Result<Tensor>;

    /// Whether it wants hidden states.
    fn reads_hidden(&self) -> bool {
        false
    }
}

/// A topic: words that are to come, log p(a | x) = log Σ p(w) over the words w (equation 4 of the paper).
#[derive(Clone, Debug)]
pub struct BagOfWords {
    tokens: SharedTensor,
    largest: i64,
}

impl BagOfWords {
    /// Words of one token each.
    ///
    /// # Errors
    /// [`Error::Value`] for none, or a negative id.
    pub fn new(tokens: impl IntoIterator<Item = i64>) -> Result<Self> {
        let mut tokens: Vec<i64> = tokens.into_iter().collect();
        tokens.sort_unstable();
        tokens.dedup();
        let (Some(&least), Some(&largest)) = (tokens.first(), tokens.last()) else {
            return Err(Error::value("words of a bag", "at least one token", "none"));
        };
        if least < 0 {
            return Err(Error::value("token id of a bag", "at least 0", least));
        }
        Ok(Self { tokens: Tensor::f_from_slice(&tokens)?.into(), largest })
    }

    /// Those of the words that are one token after a space, as the authors take them.
    ///
    /// # Errors
    /// [`Error::Value`] where there are none; the tokenizer's.
    pub fn words<S: AsRef<str>>(tokenizer: &Tokenizer, words: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut tokens = Vec::new();
        for word in words {
            let ids = tokenizer.encode(&format!(" {}", word.as_ref()), Special::Keep)?;
            if let [token] = ids[..] {
                tokens.push(token);
            }
        }
        if tokens.is_empty() {
            let expected = "at least one that is one token after a space";
            return Err(Error::value("words of a bag", expected, "none"));
        }
        Self::new(tokens)
    }
}

impl Attribute for BagOfWords {
    fn handle(&self) -> Box<dyn Attribute> {
        Box::new(self.clone())
    }

    fn check(&self, spec: &LmSpec) -> Result<()> {
        in_vocabulary("token id of a bag", self.largest, spec.vocab)
    }

    fn loss(&self, seen: &Seen<'_>) -> Result<Tensor> {
        let tokens = self.tokens.f_to_device(seen.log_p.device())?;
        let log_p = seen.log_p.f_index_select(1, &tokens)?;
        Ok(log_p.f_logsumexp([-1].as_slice(), false)?.f_neg()?)
    }
}

/// A class of a linear head on the mean hidden state: −log softmax(W h̄ + b) of the class.
#[derive(Clone, Debug)]
pub struct LinearHead {
    weight: SharedTensor,
    bias: SharedTensor,
    class: i64,
}

impl LinearHead {
    /// W `[C, D]`, b `[C]`, and the class that is wanted.
    ///
    /// # Errors
    /// [`Error::Shape`] for weights that do not fit each other; [`Error::Value`] for a class that is none.
    pub fn new(weight: &Tensor, bias: &Tensor, class: usize) -> Result<Self> {
        let &[classes, _] = weight.size().as_slice() else {
            return Err(Error::shape("weight of a linear head", "[C, D]", &weight.size()));
        };
        if bias.size() != [classes] {
            return Err(Error::shape("bias of a linear head", format!("[{classes}]"), &bias.size()));
        }
        let wanted = i64::try_from(class).unwrap_or(i64::MAX);
        if wanted >= classes {
            return Err(Error::value("class of a linear head", format!("0 .. {classes}"), class));
        }
        let of = |t: &Tensor| -> Result<SharedTensor> { Ok(t.f_detach()?.f_to_kind(Kind::Float)?.into()) };
        Ok(Self { weight: of(weight)?, bias: of(bias)?, class: wanted })
    }
}

impl Attribute for LinearHead {
    fn handle(&self) -> Box<dyn Attribute> {
        Box::new(self.clone())
    }

    fn check(&self, spec: &LmSpec) -> Result<()> {
        let size = self.weight.size();
        if size[1] == spec.width {
            return Ok(());
        }
        let expected = format!("[{}, {}], as wide as the model", size[0], spec.width);
        Err(Error::shape("weight of a linear head", expected, &size))
    }

    fn loss(&self, seen: &Seen<'_>) -> Result<Tensor> {
        let hidden = seen.hidden.ok_or_else(|| Error::value("hidden states", "[B, D]", "none"))?;
        let device = hidden.device();
        let scores = hidden.f_matmul(&self.weight.f_to_device(device)?.f_tr()?)?; // (B, C)
        let scores = scores.f_add(&self.bias.f_to_device(device)?)?;
        Ok(scores.f_log_softmax(-1, Kind::Float)?.f_select(1, self.class)?.f_neg()?)
    }

    fn reads_hidden(&self) -> bool {
        true
    }
}
