//! Sentence embeddings: a text as one vector, so that texts of like meaning lie close (Reimers & Gurevych 2019).

use std::path::Path;

use controlgen_core::{Encoder, EncoderInput, Error, Pass, Placement, Reads, Result, Tokens};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::models::{Config, open_encoder};
use crate::tokenizer::{Special, Tokenizer};

/// How the states of a text's tokens become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// Their mean, padding left out.
    Mean,
    /// The first one's: what `[CLS]` has become.
    Cls,
    /// The largest of each component, padding left out.
    Max,
}

/// A text encoder, its tokenizer, and a pooling: texts to vectors.
///
/// ```text
/// e(x) = Σₜ hₜ(x) / T,  divided by its length ‖e(x)‖ where the model says so
/// ```
///
/// of the states hₜ of the T tokens, those that frame the text among them. Nils Reimers and Iryna Gurevych,
/// "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks" (EMNLP 2019), section 3.
///
/// *Cost*: one pass of the encoder over each text. Texts of like length are put together, so that little is padded.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::SentenceEncoder;
///
/// let encoder = SentenceEncoder::open("all-MiniLM-L6-v2", Placement::CPU)?;
/// let e = encoder.embed(&["The film was a delight.", "I loved that movie.", "Boil the eggs for six minutes."])?;
/// let cosines = e.f_matmul(&e.f_tr()?)?; // of vectors of length 1
/// // 0.584 0.077
/// println!("{:.3} {:.3}", cosines.double_value(&[0, 1]), cosines.double_value(&[0, 2]));
/// # Ok(())
/// # }
/// ```
pub struct SentenceEncoder {
    encoder: Box<dyn Encoder>,
    tokenizer: Tokenizer,
    pooling: Pooling,
    normalise: bool,
    /// The most tokens of a text, those that frame it among them.
    max_tokens: usize,
}

/// How many texts are encoded at once.
const BATCH: usize = 32;

impl SentenceEncoder {
    /// Opens a directory as sentence-transformers writes it: an encoder with its tokenizer, modules.json, the pooling's
    /// config.json, sentence_bert_config.json. Without modules.json the mean is taken, and not normalised.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for modules and poolings that are not known; what is wrong with the files, as
    /// [`open_encoder`] and [`Tokenizer::open`] say it.
    pub fn open(directory: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let directory = directory.as_ref();
        let (pooling, normalise) = modules(directory)?;
        let encoder = Self::new(open_encoder(directory, placement)?, Tokenizer::open(directory)?)?;
        let file = directory.join("sentence_bert_config.json");
        let longest =
            if file.exists() { Config::open(&file)?.int_if("max_seq_length", 1, 1 << 27)? } else { None };
        let longest = longest.and_then(|n| usize::try_from(n).ok()).unwrap_or(encoder.max_tokens);
        Self { pooling, normalise, ..encoder }.max_tokens(longest)
    }

    /// Puts an encoder and its tokenizer together: the mean, not normalised, of as many tokens as the encoder reads.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an encoder of images; [`Error::Value`] where the tokenizer knows more tokens than the
    /// encoder.
    pub fn new(encoder: Box<dyn Encoder>, tokenizer: Tokenizer) -> Result<Self> {
        let Reads::Text { vocab, context } = encoder.spec().reads else {
            return Err(Error::unsupported("sentences for an encoder of images", "encoders of text"));
        };
        if tokenizer.vocab_size() > vocab {
            let expected = format!("at most the encoder's {vocab}");
            return Err(Error::value("tokens of the tokenizer", expected, tokenizer.vocab_size()));
        }
        let max_tokens = context.and_then(|n| usize::try_from(n).ok()).unwrap_or(512);
        Ok(Self { encoder, tokenizer, pooling: Pooling::Mean, normalise: false, max_tokens })
    }

    /// Another pooling.
    #[must_use]
    pub fn pooling(self, pooling: Pooling) -> Self {
        Self { pooling, ..self }
    }

    /// Whether vectors are divided by their length.
    #[must_use]
    pub fn normalise(self, normalise: bool) -> Self {
        Self { normalise, ..self }
    }

    /// The most tokens of a text, those that frame it among them; what is longer is cut.
    ///
    /// # Errors
    /// [`Error::Value`] for less than 1 or more than the encoder reads.
    pub fn max_tokens(self, max_tokens: usize) -> Result<Self> {
        let most = match self.encoder.spec().reads {
            Reads::Text { context: Some(context), .. } => usize::try_from(context).unwrap_or(usize::MAX),
            _ => usize::MAX,
        };
        if max_tokens == 0 || max_tokens > most {
            return Err(Error::value("max_seq_length", format!("1 ..= {most}"), max_tokens));
        }
        Ok(Self { max_tokens, ..self })
    }

    /// Another handle over the same weights, for another thread.
    #[must_use]
    pub fn handle(&self) -> Self {
        Self { encoder: self.encoder.handle(), tokenizer: self.tokenizer.handle(), ..*self }
    }

    /// The encoder.
    pub fn encoder(&self) -> &dyn Encoder {
        &*self.encoder
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// D: width of a vector.
    pub fn width(&self) -> i64 {
        self.encoder.spec().width
    }

    /// The token ids of a text, cut to the most it may have with its frame kept.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let whole = self.tokenizer.encode(text, Special::Add)?;
        if whole.len() <= self.max_tokens {
            return Ok(whole);
        }
        let inner = self.tokenizer.encode(text, Special::Keep)?;
        let frame = whole.len().saturating_sub(inner.len());
        let front = (0..=frame).find(|&at| whole.get(at..at + inner.len()) == Some(&inner[..])).unwrap_or(0);
        let kept = self.max_tokens.saturating_sub(frame);
        let back = whole.get(front + inner.len()..).unwrap_or(&[]);
        let mut cut = [&whole[..front], &inner[..kept.min(inner.len())], back].concat();
        cut.truncate(self.max_tokens);
        Ok(cut)
    }

    /// The vectors of texts, f32 `[N, D]`, on the encoder's device.
    ///
    /// # Errors
    /// [`Error::Value`] for no texts, or one of no tokens; those of the tokenizer and the encoder.
    pub fn embed<S: AsRef<str>>(&self, texts: &[S]) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let ids = texts.iter().map(|text| self.encode(text.as_ref())).collect::<Result<Vec<_>>>()?;
        if let Some(text) = ids.iter().position(Vec::is_empty) {
            return Err(Error::value(format!("text {text}"), "at least one token", "none"));
        }
        if ids.is_empty() {
            return Err(Error::value("texts", "at least one", 0));
        }
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|&i| ids[i].len());
        let batches = order
            .chunks(BATCH)
            .map(|batch| self.embed_batch(&batch.iter().map(|&i| &ids[i][..]).collect::<Vec<_>>()))
            .collect::<Result<Vec<_>>>()?;
        let mut place = vec![0i64; order.len()];
        for (at, &i) in (0..).zip(&order) {
            place[i] = at;
        }
        let device = self.encoder.spec().placement.device;
        Ok(Tensor::f_cat(&batches, 0)?
            .f_index_select(0, &Tensor::f_from_slice(&place)?.f_to_device(device)?)?)
    }

    /// The vectors of tokens, f32 `[B, D]`, for ids `[B, T]` or embeddings `[B, T, D]`, in which they are differentiable.
    /// `keep` is boolean `[B, T]`, false for padding.
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    pub fn embed_tokens(&self, tokens: Tokens<'_>, keep: Option<&Tensor>, pass: &Pass<'_>) -> Result<Tensor> {
        let hidden = self.encoder.encode(EncoderInput::Text { tokens, keep }, pass)?.hidden;
        let hidden = hidden.f_to_kind(Kind::Float)?; // (B, T, D)
        let kept = keep.map(|keep| keep.f_unsqueeze(-1)).transpose()?; // (B, T, 1)
        let pooled = match (self.pooling, kept) {
            (Pooling::Cls, _) => hidden.f_select(1, 0)?,
            (Pooling::Mean, None) => hidden.f_mean_dim(&[1i64][..], false, Kind::Float)?,
            (Pooling::Mean, Some(kept)) => {
                let kept = kept.f_to_kind(Kind::Float)?;
                let sum = hidden.f_mul(&kept)?.f_sum_dim_intlist(&[1i64][..], false, Kind::Float)?;
                sum.f_div(&kept.f_sum_dim_intlist(&[1i64][..], false, Kind::Float)?.f_clamp_min(1.0)?)?
            }
            (Pooling::Max, None) => hidden.f_amax(&[1i64][..], false)?,
            (Pooling::Max, Some(kept)) => {
                hidden.f_masked_fill(&kept.f_logical_not()?, f64::NEG_INFINITY)?.f_amax(&[1i64][..], false)?
            }
        };
        if !self.normalise {
            return Ok(pooled);
        }
        let length = pooled.f_norm_scalaropt_dim(2.0, &[-1i64][..], true)?.f_clamp_min(1e-12)?;
        Ok(pooled.f_div(&length)?)
    }

    /// Rows of ids, the shorter ones padded on the right.
    fn embed_batch(&self, rows: &[&[i64]]) -> Result<Tensor> {
        let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let fill = self.tokenizer.pad().unwrap_or(0);
        let (mut ids, mut keep) = (Vec::with_capacity(rows.len() * longest), Vec::new());
        for row in rows {
            ids.extend_from_slice(row);
            ids.extend(std::iter::repeat_n(fill, longest - row.len()));
            keep.extend((0..longest).map(|t| t < row.len()));
        }
        let device = self.encoder.spec().placement.device;
        let shape = [rows.len() as i64, longest as i64];
        let ids = Tensor::f_from_slice(&ids)?.f_view(shape)?.f_to_device(device)?;
        let keep = if keep.contains(&false) {
            Some(Tensor::f_from_slice(&keep)?.f_view(shape)?.f_to_device(device)?)
        } else {
            None
        };
        self.embed_tokens(Tokens::Ids(&ids), keep.as_ref(), &Pass::default())
    }
}

/// The pooling that modules.json leads to, and whether vectors are normalised.
fn modules(directory: &Path) -> Result<(Pooling, bool)> {
    let file = directory.join("modules.json");
    if !file.exists() {
        return Ok((Pooling::Mean, false));
    }
    let text = std::fs::read_to_string(&file).map_err(|error| Error::io(&file, error))?;
    let modules: Value = serde_json::from_str(&text).map_err(|error| Error::format(&file, error))?;
    let Value::Array(modules) = modules else {
        return Err(Error::format(&file, "expected a list of modules"));
    };
    let (mut pooling, mut normalise) = (Pooling::Mean, false);
    for module in &modules {
        let kind = module.get("type").and_then(Value::as_str).unwrap_or("nothing");
        let path = module.get("path").and_then(Value::as_str).unwrap_or("");
        match kind.rsplit('.').next().unwrap_or(kind) {
            "Transformer" if path.is_empty() => {}
            "Pooling" => pooling = read_pooling(&Config::open(&directory.join(path).join("config.json"))?)?,
            "Normalize" => normalise = true,
            _ => {
                let what = format!("module `{kind}` at `{path}` of a sentence encoder");
                return Err(Error::unsupported(
                    what,
                    "Transformer at the directory itself, Pooling, Normalize",
                ));
            }
        }
    }
    Ok((pooling, normalise))
}

/// The one pooling that a configuration turns on.
fn read_pooling(config: &Config) -> Result<Pooling> {
    if let Some(mode) = config.str("pooling_mode")? {
        return match mode {
            "mean" => Ok(Pooling::Mean),
            "cls" => Ok(Pooling::Cls),
            "max" => Ok(Pooling::Max),
            other => Err(Error::unsupported(format!("pooling_mode `{other}`"), "mean, cls or max")),
        };
    }
    let mut on = Vec::new();
    for (field, pooling) in [
        ("pooling_mode_mean_tokens", Some(Pooling::Mean)),
        ("pooling_mode_cls_token", Some(Pooling::Cls)),
        ("pooling_mode_max_tokens", Some(Pooling::Max)),
        ("pooling_mode_mean_sqrt_len_tokens", None),
        ("pooling_mode_weightedmean_tokens", None),
        ("pooling_mode_lasttoken", None),
    ] {
        if config.bool(field, false)? {
            on.push((field, pooling));
        }
    }
    match on[..] {
        [(_, Some(pooling))] => Ok(pooling),
        _ => {
            let names: Vec<&str> = on.iter().map(|(field, _)| *field).collect();
            let what = format!("pooling by [{}]", names.join(", "));
            Err(Error::unsupported(what, "one of mean tokens, the CLS token, max tokens"))
        }
    }
}
