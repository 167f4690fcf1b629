//! A stranger's language model, control over the next token, and energy: the contracts hold for them too.

use std::sync::Arc;

use controlgen_core::energy::{Energy, EnergyFn, Image};
use controlgen_core::layers::{Embedding, Linear};
use controlgen_core::testing::contract;
use controlgen_core::{
    Dims, Error, LanguageModel, LmInput, LmOutput, LmSpec, Logits, Pass, PerRow, Placement, Result,
    RowControl, SiteMap, Source, State, StateImpl, WeightMap,
};
use tch::{Device, Kind, Tensor};

/// p(token | the token before it), a table.
struct Bigram {
    spec: LmSpec,
    sites: Arc<SiteMap>,
    embed: Embedding,
    head: Linear,
}

impl Bigram {
    fn new(vocab: i64) -> Result<Self> {
        let mut sites = SiteMap::new();
        let embed = sites.add("embed", Dims::Embedding { rows: vocab, width: vocab });
        let head = sites.add("head", Dims::Linear { inputs: vocab, outputs: vocab });
        let options = (Kind::Float, Device::Cpu);
        let table =
            Tensor::f_arange(vocab * vocab, options)?.f_mul_scalar(1.7)?.f_sin()?.f_view([vocab, vocab])?;
        let spec = LmSpec {
            architecture: "bigram".into(),
            vocab,
            width: vocab,
            context: 32,
            bos: None,
            eos: vec![],
            pad: None,
            decoder_start: None,
            placement: Placement::CPU,
        };
        Ok(Self {
            spec,
            sites: Arc::new(sites),
            embed: Embedding::new(Tensor::f_eye(vocab, options)?, embed),
            head: Linear::new(table, None, &[(head, vocab)])?,
        })
    }

    fn share(&self) -> Self {
        Self {
            spec: self.spec.clone(),
            sites: self.sites.clone(),
            embed: self.embed.handle(),
            head: self.head.handle(),
        }
    }
}

/// How much was read; what it was does not matter.
#[derive(Clone)]
struct Read {
    rows: i64,
    len: i64,
}

impl StateImpl for Read {
    fn fork(&self) -> Result<Box<dyn StateImpl>> {
        Ok(Box::new(self.clone()))
    }
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.rows = rows.len() as i64;
        Ok(())
    }
    fn truncate(&mut self, len: i64) -> Result<()> {
        self.len = len;
        Ok(())
    }
    fn len(&self) -> i64 {
        self.len
    }
    fn rows(&self) -> i64 {
        self.rows
    }
}

impl LanguageModel for Bigram {
    fn handle(&self) -> Box<dyn LanguageModel> {
        Box::new(self.share())
    }
    fn spec(&self) -> &LmSpec {
        &self.spec
    }
    fn sites(&self) -> &SiteMap {
        &self.sites
    }
    fn embeddings(&self) -> &Tensor {
        self.embed.weight()
    }
    fn start(&self, source: Source<'_>, _pass: &Pass<'_>) -> Result<State> {
        match source {
            Source::Rows(rows) if rows > 0 => Ok(State::new(Read { rows, len: 0 })),
            Source::Rows(rows) => Err(Error::value("rows", ">= 1", rows)),
            Source::Encoder(_) => Err(Error::unsupported("an encoder's input", "Source::Rows")),
        }
    }
    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        let (rows, len) = input.validate(&self.spec)?;
        pass.check(&self.sites, rows)?;
        let read: &mut Read = state.downcast("one that a bigram model started")?;
        if read.rows != rows {
            return Err(Error::value("rows of the input", read.rows, rows));
        }
        let (limit, needed) = (self.spec.context, read.len + len);
        if needed > limit {
            return Err(Error::Context { limit, needed });
        }
        let mut x = self.embed.forward(input.tokens, pass)?;
        if input.logits == Logits::Last {
            x = x.f_narrow(1, len - 1, 1)?;
        }
        let logits = self.head.forward(&x, pass)?;
        read.len = needed;
        Ok(LmOutput { logits })
    }
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        let (embed, head) = (self.embed.map_weights(f)?, self.head.map_weights(f)?);
        Ok(Box::new(Self { embed, head, ..self.share() }))
    }
}

/// Says nothing twice in a row.
#[derive(Clone)]
struct NoEcho;

impl RowControl for NoEcho {
    type State = Option<i64>;
    fn start(&self, prompt: &[i64]) -> Result<Option<i64>> {
        Ok(prompt.last().copied())
    }
    fn score(&self, last: &Option<i64>, row: &mut Tensor) -> Result<()> {
        if let Some(last) = last {
            let _ = row.f_narrow(0, *last, 1)?.f_fill_(f64::NEG_INFINITY)?;
        }
        Ok(())
    }
    fn advance(&self, last: &mut Option<i64>, token: i64) -> Result<()> {
        *last = Some(token);
        Ok(())
    }
}

/// How far an image's mean is from a brightness, squared.
#[derive(Clone)]
struct Brightness(f64);

impl EnergyFn<Image> for Brightness {
    fn energy(&self, x: &Image) -> Result<Tensor> {
        Ok(x.0.f_mean_dim(&[1i64, 2, 3][..], false, None::<Kind>)?.f_sub_scalar(self.0)?.f_square()?)
    }
}

#[test]
fn a_language_model() {
    contract::language_model(&Bigram::new(6).unwrap()).unwrap();
}

#[test]
fn a_control_over_the_next_token() {
    contract::token_control(&PerRow(NoEcho), 6).unwrap();
}

#[test]
fn an_energy() {
    let x = Image(Tensor::arange(24, (Kind::Double, Device::Cpu)).sin().view([2, 3, 2, 2]));
    contract::energy(&Brightness(0.4), &x).unwrap();
    let both = 2.0 * Energy::new(Brightness(0.4)) - Energy::new(Brightness(-1.0));
    contract::energy(&both, &x).unwrap();
}
