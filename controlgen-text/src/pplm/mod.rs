//! PPLM: steering a language model by gradients of its activations.

mod attribute;
mod perturbation;

use controlgen_core::{
    EnableGrad, Error, LanguageModel, LmInput, LmOutput, LmSpec, Logits, Pass, Result, SiteId, SiteKind,
    SiteMap, Source, State, StateImpl, Taps, Tokens, WeightMap,
};
use tch::{Kind, Tensor};

use crate::search::hidden;
use perturbation::Deltas;

pub use attribute::{Attribute, BagOfWords, LinearHead, Seen};

/// How far, how often, and how much of it is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PplmSettings {
    /// α of equation 3, above 0.
    pub step_size: f64,
    /// m: how many steps, at least 1.
    pub num_iterations: usize,
    /// γ, the power of a gradient's norm that it is divided by, at least 0.
    pub gamma: f64,
    /// λ_KL, at least 0: what it costs to leave the model's own distribution.
    pub kl_scale: f64,
    /// γ_gm, in 0 ..= 1: the share of the steered distribution in the geometric mean with the model's own.
    pub gm_scale: f64,
    /// How many of the last positions are steered; all where `None`.
    pub window: Option<usize>,
}

/// Those of the authors' example for bags of words.
impl Default for PplmSettings {
    fn default() -> Self {
        Self {
            step_size: 0.03,
            num_iterations: 3,
            gamma: 1.5,
            kl_scale: 0.01,
            gm_scale: 0.99,
            window: Some(5),
        }
    }
}

impl PplmSettings {
    /// Those of the authors' example for discriminators.
    pub fn for_discriminators() -> Self {
        Self {
            step_size: 0.04,
            num_iterations: 10,
            gamma: 1.0,
            gm_scale: 0.95,
            window: None,
            ..Self::default()
        }
    }

    fn check(&self) -> Result<()> {
        let number = |what: &str, expected: &str, value: f64, holds: bool| {
            if holds { Ok(()) } else { Err(Error::value(what, expected, value)) }
        };
        let Self { step_size, num_iterations, gamma, kl_scale, gm_scale, window } = *self;
        number("step_size", "a number above 0", step_size, step_size > 0.0 && step_size.is_finite())?;
        number("num_iterations", "at least 1", num_iterations as f64, num_iterations > 0)?;
        number("gamma", "a number of at least 0", gamma, gamma >= 0.0 && gamma.is_finite())?;
        number("kl_scale", "a number of at least 0", kl_scale, kl_scale >= 0.0 && kl_scale.is_finite())?;
        number("gm_scale", "0 ..= 1", gm_scale, (0.0..=1.0).contains(&gm_scale))?;
        number("window", "at least 1", 0.0, window != Some(0))
    }
}

/// A language model whose past is changed a little, at each token, so that what it says next has an attribute: Dathathri,
/// Madotto, Lan, Hung, Frank, Molino, Yosinski and Liu, "Plug and Play Language Models: a Simple Approach to Controlled Text
/// Generation" (ICLR 2020), sections 3.2 and 3.3.
///
/// Before a token is said, the keys and values H of the positions before, in every layer, go a few steps down the gradient of
/// what the attribute lacks; the steps of each layer are normalised by their own norm, and each row goes its own way:
///
/// ```text
/// ΔH  ←  ΔH − α g / ‖g‖^γ,    g = ∇_ΔH [ −log p(a | H + ΔH) + λ_KL KL(p(· | H + ΔH) ‖ p(· | H)) ]
/// log p̂(v)  =  γ_gm log p(v | H + ΔH) + (1 − γ_gm) log p(v | H),  normalised
/// ```
///
/// The changes are forgotten after each token, as in the authors' code; a token with none before it is the model's own. Of
/// that code there is not: the window's decay, and the hidden state of a token expected to come.
///
/// As the changes are made at sites, it works with every decoder-only model that has attentions; and being a model, it goes with every search
/// and every control. Where logits of several positions are asked for, each is steered, one after the other; of a prompt the last
/// alone. Adapters and other controls at sites act as always; taps see the model's own pass. Gradients do not go through the
/// steps: to what is differentiated ΔH is a constant.
///
/// *Cost*: for each token `num_iterations` passes forward and back and one forward, beside the model's own, and copies of its
/// cache.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::TextModel;
/// use controlgen_text::pplm::{BagOfWords, Pplm, PplmSettings};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let space = BagOfWords::words(model.tokenizer(), ["planet", "star", "galaxy", "moon", "orbit", "space"])?;
/// let settings = PplmSettings { step_size: 0.06, ..PplmSettings::default() };
/// let steered = model.with_lm(Box::new(Pplm::new(model.lm().handle(), space, settings)?))?;
/// // " the potential for a new planet to exist in the galaxy, but it was the galaxy itself that was the planet's home",
/// // where the model says
/// // " the potential impact of climate change on the tourism industry, but it didn't provide a clear answer to the
/// // question of how"
/// println!("{:?}", steered.generate("The issue focused on").max_new_tokens(24).run()?.text());
/// # Ok(())
/// # }
/// ```
pub struct Pplm {
    lm: Box<dyn LanguageModel>,
    attribute: Box<dyn Attribute>,
    settings: PplmSettings,
}

impl Pplm {
    /// Steers a model to an attribute.
    ///
    /// # Errors
    /// [`Error::Value`] for settings outside their ranges; [`Error::Shape`], [`Error::Value`] for an attribute that is not of
    /// this model's; [`Error::Unsupported`] for an encoder–decoder, a model without attentions, or for an attribute of hidden states of a model
    /// whose last linear site is not its output product.
    pub fn new(
        lm: Box<dyn LanguageModel>,
        attribute: impl Attribute,
        settings: PplmSettings,
    ) -> Result<Self> {
        settings.check()?;
        attribute.check(lm.spec())?;
        if lm.spec().decoder_start.is_some() {
            return Err(Error::unsupported("PPLM over an encoder–decoder", "decoder-only models"));
        }
        if lm.sites().of_kind(SiteKind::Attention).next().is_none() {
            return Err(Error::unsupported(
                "PPLM over a model without attention sites",
                "models that have them",
            ));
        }
        if attribute.reads_hidden() {
            hidden::tapped(&*lm, None)?;
        }
        Ok(Self { lm, attribute: Box::new(attribute), settings })
    }

    /// Reads one token `[B, 1]`, and steers what comes after it: logits `[B, 1, V]`.
    fn step(&self, input: LmInput<'_>, state: &mut PplmState, pass: &Pass<'_>) -> Result<Tensor> {
        let before = state.lm.fork()?;
        let plain = self.read(input, state, pass)?.f_log_softmax(-1, Kind::Float)?;
        if before.is_empty() {
            return Ok(plain);
        }
        let own = plain.f_select(1, -1)?; // (B, V)
        let mean = state.hidden.as_ref().map(Hidden::sums).transpose()?;
        let quiet = Pass { taps: None, ..*pass };
        let steered = |deltas: &Deltas| -> Result<(Tensor, Option<Tensor>)> {
            let mut state = before.fork()?;
            let controls = deltas.over(&*self.lm, pass.controls, self.attribute.reads_hidden())?;
            let pass = Pass { controls: Some(&controls), ..quiet };
            let run = |pass: &Pass<'_>| Ok(self.lm.forward(input, &mut state, pass)?.logits);
            let (logits, hidden) = if self.attribute.reads_hidden() {
                let (logits, hidden) = hidden::forward(&*self.lm, &pass, run)?;
                (logits, Some(hidden.f_select(1, -1)?))
            } else {
                let mut run = run;
                (run(&pass)?, None)
            };
            Ok((logits.f_select(1, -1)?.f_log_softmax(-1, Kind::Float)?, hidden))
        };
        let mut deltas = Deltas::zeros(&*self.lm, before.rows(), before.len(), self.settings.window)?;
        for _ in 0..self.settings.num_iterations {
            let _gradients = EnableGrad::new();
            let leaves = deltas.leaves()?;
            let (log_p, hidden) = steered(&leaves)?;
            let mean = match (&mean, hidden) {
                // The state has this token's own hidden state: the steered one takes its place.
                (Some((others, count)), Some(hidden)) => Some(others.f_add(&hidden)?.f_div(count)?),
                _ => None,
            };
            let loss = self.attribute.loss(&Seen { log_p: &log_p, hidden: mean.as_ref() })?;
            if loss.size() != [before.rows()] {
                let expected = format!("[{}], one a row", before.rows());
                return Err(Error::shape("loss of an attribute", expected, &loss.size()));
            }
            let kl = log_p.f_exp()?.f_mul(&log_p.f_sub(&own)?)?;
            let kl = kl.f_sum_dim_intlist([-1].as_slice(), false, Kind::Float)?;
            let mut loss = loss.f_to_kind(Kind::Float)?.f_add(&kl.f_mul_scalar(self.settings.kl_scale)?)?;
            if let Some(keep) = input.keep {
                // Padding sees nothing, and nobody sees it.
                let padding = keep.f_to_device(loss.device())?.f_logical_not()?.f_select(1, -1)?;
                loss = loss.f_masked_fill(&padding, 0.0)?;
            }
            if !loss.f_isfinite()?.f_all()?.f_int64_value(&[])?.eq(&1) {
                let (at, found) = ("a row".to_owned(), "NaN or infinity".to_owned());
                return Err(Error::NotFinite { what: "loss of an attribute".into(), at, found });
            }
            deltas = leaves.down(&loss, self.settings.step_size, self.settings.gamma)?;
        }
        let (log_p, _) = steered(&deltas)?;
        let gm = self.settings.gm_scale;
        let mixed = log_p.f_mul_scalar(gm)?.f_add(&own.f_mul_scalar(1.0 - gm)?)?;
        Ok(mixed.f_log_softmax(-1, Kind::Float)?.f_unsqueeze(1)?)
    }

    /// Reads tokens as the model does.
    fn read(&self, input: LmInput<'_>, state: &mut PplmState, pass: &Pass<'_>) -> Result<Tensor> {
        let Some(hidden) = &mut state.hidden else {
            return Ok(self.lm.forward(input, &mut state.lm, pass)?.logits);
        };
        // The states of all positions are wanted, hence their logits are computed.
        let all = LmInput { logits: Logits::All, ..input };
        let stack = hidden::tapped(&*self.lm, pass.controls)?;
        let pass = Pass { controls: Some(&stack), ..*pass };
        let lm = &mut state.lm;
        let (logits, new) =
            hidden::forward(&*self.lm, &pass, |pass| Ok(self.lm.forward(all, lm, pass)?.logits))?;
        hidden.push(&new, input.keep)?;
        Ok(match input.logits {
            Logits::All => logits,
            Logits::Last => logits.f_narrow(1, logits.size()[1] - 1, 1)?,
        })
    }

    /// Reads tokens, the last or each of them steered.
    fn run(&self, input: LmInput<'_>, len: i64, state: &mut PplmState, pass: &Pass<'_>) -> Result<Tensor> {
        match input.logits {
            Logits::Last if len == 1 => self.step(input, state, pass),
            Logits::Last => {
                let before = Part::of(&input, 0, len - 1)?;
                let _ = self.read(before.input().last(), state, pass)?;
                self.step(Part::of(&input, len - 1, 1)?.input().last(), state, pass)
            }
            Logits::All => {
                let (mut all, mut seen) = (Vec::new(), Vec::new());
                for at in 0..len {
                    let taps = Taps::new();
                    let pass = Pass { taps: pass.taps.map(|_| &taps), ..*pass };
                    all.push(self.step(Part::of(&input, at, 1)?.input().last(), state, &pass)?);
                    seen.push(taps.take());
                }
                if let Some(taps) = pass.taps {
                    join(seen, taps)?;
                }
                Ok(Tensor::f_cat(&all, 1)?)
            }
        }
    }
}

/// What was seen of each token, `[B, 1, ..]`, as if all had been read at once.
fn join(mut seen: Vec<Vec<(SiteId, Tensor)>>, taps: &Taps) -> Result<()> {
    while seen.iter().all(|of_one| !of_one.is_empty()) {
        let of_all: Vec<(SiteId, Tensor)> = seen.iter_mut().map(|of_one| of_one.remove(0)).collect();
        let site = of_all[0].0;
        let columns: Vec<Tensor> = of_all.into_iter().map(|(_, tensor)| tensor).collect();
        taps.push(site, Tensor::f_cat(&columns, 1)?);
    }
    Ok(())
}

/// A part of an input's columns.
struct Part {
    tokens: Tensor,
    are_ids: bool,
    keep: Option<Tensor>,
    positions: Option<Tensor>,
}

impl Part {
    fn of(input: &LmInput<'_>, start: i64, len: i64) -> Result<Self> {
        let cut = |t: &Tensor| -> Result<Tensor> { Ok(t.f_narrow(1, start, len)?) };
        let (tokens, are_ids) = match input.tokens {
            Tokens::Ids(t) => (cut(t)?, true),
            Tokens::Embeds(t) => (cut(t)?, false),
        };
        let (keep, positions) = (input.keep.map(cut).transpose()?, input.positions.map(cut).transpose()?);
        Ok(Self { tokens, are_ids, keep, positions })
    }

    fn input(&self) -> LmInput<'_> {
        let input = if self.are_ids { LmInput::ids(&self.tokens) } else { LmInput::embeds(&self.tokens) };
        input.keep(self.keep.as_ref()).positions(self.positions.as_ref())
    }
}

impl LanguageModel for Pplm {
    fn handle(&self) -> Box<dyn LanguageModel> {
        Box::new(Self { lm: self.lm.handle(), attribute: self.attribute.handle(), settings: self.settings })
    }

    fn spec(&self) -> &LmSpec {
        self.lm.spec()
    }

    fn sites(&self) -> &SiteMap {
        self.lm.sites()
    }

    fn embeddings(&self) -> &Tensor {
        self.lm.embeddings()
    }

    fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<State> {
        let lm = self.lm.start(source, pass)?;
        let spec = self.lm.spec();
        let hidden = if self.attribute.reads_hidden() { Some(Hidden::new(lm.rows(), spec)?) } else { None };
        Ok(State::new(PplmState { lm, hidden }))
    }

    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        let (batch, len) = input.validate(self.spec())?;
        pass.check(self.sites(), batch)?;
        let state: &mut PplmState = state.downcast("one that this PPLM started")?;
        let (held, limit) = (state.lm.len(), self.spec().context);
        // Before a part of it is read.
        let needed = held + len + pass.position_offset()?.most();
        if needed > limit {
            return Err(Error::Context { limit, needed });
        }
        match self.run(input, len, state, pass) {
            Ok(logits) => Ok(LmOutput { logits }),
            Err(error) => {
                // A part of it may have been read.
                state.truncate(held)?;
                Err(error)
            }
        }
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        let (attribute, settings) = (self.attribute.handle(), self.settings);
        Ok(Box::new(Self { lm: self.lm.map_weights(f)?, attribute, settings }))
    }
}

/// What the model has read, and its hidden states where the attribute reads them.
struct PplmState {
    lm: State,
    hidden: Option<Hidden>,
}

impl StateImpl for PplmState {
    fn fork(&self) -> Result<Box<dyn StateImpl>> {
        Ok(Box::new(Self { lm: self.lm.fork()?, hidden: self.hidden.as_ref().map(Hidden::handle) }))
    }

    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        use controlgen_core::Rows;
        self.lm.reorder(rows)?;
        self.hidden.as_mut().map_or(Ok(()), |hidden| hidden.reorder(rows))
    }

    fn truncate(&mut self, len: i64) -> Result<()> {
        self.lm.truncate(len)?;
        self.hidden.as_mut().map_or(Ok(()), |hidden| hidden.truncate(len))
    }

    fn len(&self) -> i64 {
        self.lm.len()
    }

    fn rows(&self) -> i64 {
        self.lm.rows()
    }

    fn reserve(&mut self, len: i64) -> Result<()> {
        self.lm.reserve(len)
    }
}

/// The last hidden states of all positions.
struct Hidden {
    /// `[B, T, D]`, f32; 0 at padding.
    states: Tensor,
    /// How many positions are no padding, up to each: `[B, T]`, f32.
    kept: Tensor,
}

impl Hidden {
    fn new(rows: i64, spec: &LmSpec) -> Result<Self> {
        let options = (Kind::Float, spec.placement.device);
        let states = Tensor::f_zeros([rows, 0, spec.width], options)?;
        Ok(Self { states, kept: Tensor::f_zeros([rows, 0], options)? })
    }

    fn handle(&self) -> Self {
        Self { states: self.states.shallow_clone(), kept: self.kept.shallow_clone() }
    }

    fn push(&mut self, new: &Tensor, keep: Option<&Tensor>) -> Result<()> {
        let kept = match keep {
            Some(keep) => keep.f_to_device(new.device())?.f_to_kind(Kind::Float)?,
            None => Tensor::f_ones(&new.size()[..2], (Kind::Float, new.device()))?,
        };
        let new = new.f_mul(&kept.f_unsqueeze(-1)?)?;
        let states = Tensor::f_cat(&[&self.states, &new], 1)?;
        self.kept = Tensor::f_cat(&[&self.kept, &kept], 1)?;
        self.states = states;
        Ok(())
    }

    /// The sum of all but the last `[B, D]`, and how many there are with it `[B, 1]`, at least 1.
    fn sums(&self) -> Result<(Tensor, Tensor)> {
        let len = self.states.size()[1];
        let others = self.states.f_narrow(1, 0, len - 1)?;
        let sum = others.f_sum_dim_intlist([1].as_slice(), false, Kind::Float)?;
        let count = self.kept.f_sum_dim_intlist([1].as_slice(), true, Kind::Float)?;
        Ok((sum, count.f_clamp_min(1.0)?))
    }

    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        use controlgen_core::Rows;
        self.states.reorder(rows)?;
        self.kept.reorder(rows)
    }

    fn truncate(&mut self, len: i64) -> Result<()> {
        let states = self.states.f_narrow(1, 0, len)?;
        (self.states, self.kept) = (states, self.kept.f_narrow(1, 0, len)?);
        Ok(())
    }
}
