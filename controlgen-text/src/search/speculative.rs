//! Speculative decoding: several tokens a pass of the model, of the model's own distribution.

use controlgen_core::noise::Stream;
use controlgen_core::progress::Flow;
use controlgen_core::{
    Error, LanguageModel, LmInput, Pass, Result, Rows, State, TokenControl, TokenControls,
};
use tch::{Kind, Tensor};

use super::draft::{DraftModel, Drafted, check_vocabulary, look_up};
use super::{After, Choice, Chosen, Finish, Hypothesis, Listener, Search, Task, prefill};
use crate::sample;

/// Sampling, or greedy search, that lets a cheaper source draft the next few tokens and reads them all in one pass of
/// the model, which costs little more than reading one.
///
/// A drafted token is kept with the probability that leaves the distribution of the model under its controls as it is;
/// at the first that is not, the model's own token is taken and the rest of the draft forgotten; where all are kept,
/// the pass gives one token more. A token x that a draft model drew from q is kept with probability min(1, p(x) / q(x)),
/// and replaced by one of max(0, p − q), normalised (Leviathan, Kalman and Matias, "Fast Inference from Transformers via
/// Speculative Decoding", ICML 2023, algorithm 1; Chen et al., "Accelerating Large Language Model Decoding with
/// Speculative Sampling", 2023). A token that was looked up in the text (Saxena, "Prompt Lookup Decoding", 2023) is kept
/// where it is the one that the model draws, which has the same probability p(x). So with look-up, and in greedy search
/// with either, the completions are those of [`Choice`], token by token and seed by seed, as far as the model's logits of
/// several positions at once are those of one after the other: their last bits may differ, which can tip what is nearly
/// tied.
///
/// It takes one completion after the other, each with a state of its own: what it is for is a batch of one. The listener
/// is told of a step after each pass. The pass of a draft model is a plain one, without controls at sites.
///
/// *Cost*: a pass of the model over `draft_tokens` + 1 positions for each round, which gives 1 to `draft_tokens` + 1 tokens;
/// for each of them what sampling costs; `draft_tokens` passes of the draft model. [`Speculative::complete`] tells how
/// many tokens were kept.
///
/// ```no_run
/// # fn main() -> controlgen_core::Result<()> {
/// use controlgen_core::Placement;
/// use controlgen_text::{TextModel, search::{Choice, Speculative}};
///
/// let model = TextModel::open("SmolLM2-135M-Instruct", Placement::CPU)?;
/// let list = "Item: 12 red apples. Item: 7 green pears. Item: 3 yellow melons.";
/// let done = model
///     .generate(format!("{list}\nThe same list: Item: 12 red"))
///     .search(Speculative::prompt_lookup(Choice::Greedy, 3, 7)?)
///     .max_new_tokens(16)
///     .run()?;
/// // " apples. Item: 12 green melons. Item: 3 yellow"
/// println!("{:?}", done.text());
/// # Ok(())
/// # }
/// ```
pub struct Speculative {
    choice: Choice,
    draft_tokens: usize,
    draft: Draft,
}

enum Draft {
    LookUp { ngram: usize },
    Model { lm: Box<dyn LanguageModel>, controls: TokenControls },
}

/// How much of what was drafted was kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acceptance {
    /// Tokens drafted that were looked at: those up to the first that was not kept.
    pub drafted: usize,
    /// Tokens of them that were kept.
    pub accepted: usize,
    /// Passes of the model after the prompts.
    pub passes: usize,
}

impl Acceptance {
    /// The share that was kept; 0 where nothing was drafted.
    pub fn rate(&self) -> f64 {
        self.accepted as f64 / self.drafted.max(1) as f64
    }
}

impl Speculative {
    /// Drafts by looking up the last tokens in the text itself: at most `ngram` of them, 1 or more; the paper takes 3.
    /// `draft_tokens` of at least 1; on the CPU 7 still go through the fastest products in bf16, 15 in f32.
    ///
    /// # Errors
    /// [`Error::Value`] for none of either.
    pub fn prompt_lookup(choice: Choice, ngram: usize, draft_tokens: usize) -> Result<Self> {
        if ngram == 0 {
            return Err(Error::value("ngram", "at least 1", 0));
        }
        Self::new(choice, draft_tokens, Draft::LookUp { ngram })
    }

    /// Drafts by another model of the same vocabulary; the model's own first layers
    /// ([`TextModel::first_layers`](crate::TextModel::first_layers)) are one.
    ///
    /// # Errors
    /// [`Error::Value`] for no tokens.
    pub fn draft_model(choice: Choice, lm: Box<dyn LanguageModel>, draft_tokens: usize) -> Result<Self> {
        Self::new(choice, draft_tokens, Draft::Model { lm, controls: TokenControls::new() })
    }

    fn new(choice: Choice, draft_tokens: usize, draft: Draft) -> Result<Self> {
        if draft_tokens == 0 {
            return Err(Error::value("draft_tokens", "at least 1", 0));
        }
        Ok(Self { choice, draft_tokens, draft })
    }

    /// Puts controls on the draft model's tokens too: those with which the model is sampled (temperature, top-p) let more
    /// of the draft be kept. They start anew at each round, with what has been said as the prompt. The distribution is
    /// the model's whatever they do. Look-up has no use for them.
    #[must_use]
    pub fn draft_controls(mut self, stack: TokenControls) -> Self {
        if let Draft::Model { controls, .. } = &mut self.draft {
            *controls = stack;
        }
        self
    }

    /// Completes each prompt `task.n` times, prompt by prompt and sample by sample, and counts.
    ///
    /// # Errors
    /// Those of [`Choice`]'s run; [`Error::Value`] for a draft model of another vocabulary; the draft's.
    pub fn complete(
        &self,
        task: &Task<'_>,
        listener: &mut dyn Listener,
    ) -> Result<(Vec<Hypothesis>, Acceptance)> {
        let _guard = tch::no_grad_guard();
        task.validate()?;
        if let Draft::Model { lm, .. } = &self.draft {
            check_vocabulary(task.lm, &**lm)?;
        }
        let (mut completions, mut count) = (Vec::new(), Acceptance::default());
        let mut cancelled = false;
        let openings = task.openings();
        for (prompt, ids) in task.prompts.iter().enumerate() {
            let mut lanes = task.pass.lanes.cloned();
            lanes.as_mut().map_or(Ok(()), |lanes| lanes.reorder(&[prompt as i64]))?;
            let pass = Pass { lanes: lanes.as_ref(), ..task.pass };
            let prompt_alone = std::slice::from_ref(ids);
            let (state, logits) = prefill(task.lm, prompt_alone, &pass, task.max_new_tokens)?;
            for sample in 0..task.n {
                let mut writer = Writer {
                    search: self,
                    task,
                    pass,
                    row: completions.len(),
                    state: state.fork()?,
                    controls: task.controls.start(std::slice::from_ref(&openings[prompt]))?,
                    stream: match self.choice {
                        Choice::Greedy => None,
                        Choice::Sample { seed, first } => {
                            Some(Stream::new(seed, first.wrapping_add(sample as u64)))
                        }
                    },
                    text: openings[prompt].clone(),
                    so_far: Hypothesis::empty(prompt, sample),
                };
                if cancelled {
                    writer.so_far.finish = Finish::Cancelled;
                } else if task.max_new_tokens > 0 {
                    cancelled = writer.write(logits.shallow_clone(), listener, &mut count)? == Flow::Stop;
                }
                completions.push(writer.so_far);
            }
        }
        Ok((completions, count))
    }
}

/// As a search it is [`Choice`] by other means.
impl Search for Speculative {
    fn run(&self, task: &Task<'_>, listener: &mut dyn Listener) -> Result<Vec<Hypothesis>> {
        Ok(self.complete(task, listener)?.0)
    }

    fn takes_back(&self) -> bool {
        false
    }
}

/// One completion.
struct Writer<'w> {
    search: &'w Speculative,
    task: &'w Task<'w>,
    pass: Pass<'w>,
    /// Its number among all.
    row: usize,
    /// It has read all of the text but its last token.
    state: State,
    controls: <TokenControls as TokenControl>::State,
    stream: Option<Stream>,
    /// What the model goes on from (the prompt, or the token that a decoder starts with), and what has been said.
    text: Vec<i64>,
    so_far: Hypothesis,
}

impl Writer<'_> {
    /// Until it ends; `logits` `[1, V]` are the prompt's.
    fn write(
        &mut self,
        mut logits: Tensor,
        listener: &mut dyn Listener,
        count: &mut Acceptance,
    ) -> Result<Flow> {
        let mut model = match &self.search.draft {
            Draft::LookUp { .. } => None,
            Draft::Model { lm, controls } => {
                Some(DraftModel::new(&**lm, controls, &self.task.prompts[self.so_far.prompt])?)
            }
        };
        let mut drafted = Drafted::default();
        loop {
            let (before, read) = (self.text.len(), self.state.len());
            let (kept, goes_on) = self.verify(&logits, &drafted, listener)?;
            count.drafted += drafted.tokens.len().min(kept + 1);
            count.accepted += kept;
            let flow = listener.step((self.text.len() - before).max(1) as u64);
            if !goes_on {
                return Ok(flow);
            }
            // What was read of the draft and is not in the text is forgotten.
            self.state.truncate(read - drafted.tokens.len() as i64 + kept as i64)?;
            if let Some(model) = &mut model {
                model.keep(before + kept)?;
            }
            let left = self.task.max_new_tokens - self.so_far.ids.len();
            let room = self.task.lm.spec().context - self.state.len() - self.pass.position_offset()?.most();
            let room = usize::try_from(room).unwrap_or(0);
            if left == 0 || room == 0 || flow == Flow::Stop {
                let context = if room == 0 { Finish::Context } else { Finish::Cancelled };
                self.end(if left == 0 { Finish::Length } else { context })?;
                return Ok(flow);
            }
            let wanted = self.search.draft_tokens.min(left - 1).min(room - 1);
            drafted = match (&self.search.draft, &mut model) {
                (Draft::LookUp { ngram }, _) => look_up(&self.text, *ngram, wanted),
                (_, Some(model)) => model.draft(&self.text, wanted, self.stream.as_mut())?,
                _ => Drafted::default(),
            };
            logits = self.read(&drafted.tokens)?;
            count.passes += 1;
        }
    }

    /// Says what is kept of the draft, and one token of the model's own: of logits `[1 + drafted, V]`, after the text and
    /// after each drafted token. Gives how many were kept, and whether the text goes on.
    fn verify(
        &mut self,
        logits: &Tensor,
        drafted: &Drafted,
        listener: &mut dyn Listener,
    ) -> Result<(usize, bool)> {
        for at in 0.. {
            let own = logits.f_narrow(0, at as i64, 1)?;
            let mut scores = own.shallow_clone();
            if !self.task.controls.is_empty() {
                scores = self.task.controls.score(&mut self.controls, own.f_detach_copy()?)?;
            }
            let step = self.so_far.ids.len();
            let token = self.choose(&scores, drafted, at).map_err(|error| match error {
                Error::AllBanned { .. } => Error::AllBanned { row: self.row, step },
                other => other,
            })?;
            let keeps = drafted.tokens.get(at) == Some(&token);
            if !self.say(token, &own, &scores, listener)? {
                return Ok((at + usize::from(keeps), false));
            }
            if !keeps {
                return Ok((at, true));
            }
        }
        Ok((0, false))
    }

    /// The next token, of scores `[1, V]`: the draft's at `at`, if it is kept.
    fn choose(&mut self, scores: &Tensor, drafted: &Drafted, at: usize) -> Result<i64> {
        let Some(stream) = &mut self.stream else { return first(&sample::greedy(scores)?) };
        let (Some(&token), Some(log_q)) = (drafted.tokens.get(at), drafted.log_q.get(at)) else {
            return first(&sample::categorical(scores, &[stream.uniform()])?);
        };
        let p = sample::log_prob_of(scores, &[token])?.iter().sum::<f64>().exp();
        let q = log_q.f_double_value(&[0, token])?.exp();
        if stream.uniform() * q < p {
            return Ok(token);
        }
        let rest = scores.f_softmax(-1, Kind::Double)?.f_sub(&log_q.f_exp()?)?.f_clamp_min(0.0)?; // (1, V)
        first(&sample::categorical(&rest.f_log()?.f_to_kind(Kind::Float)?, &[stream.uniform()])?)
    }

    /// Adds a token; whether the text goes on.
    fn say(
        &mut self,
        token: i64,
        own: &Tensor,
        scores: &Tensor,
        listener: &mut dyn Listener,
    ) -> Result<bool> {
        let logprob = sample::log_prob_of(own, &[token])?.iter().sum::<f64>();
        let controlled = !self.task.controls.is_empty();
        let scored = if controlled { sample::log_prob_of(scores, &[token])?.iter().sum() } else { logprob };
        self.task.controls.advance(&mut self.controls, &[token])?;
        self.so_far.score += scored;
        if self.task.eos.contains(&token) {
            self.end(Finish::Eos(token))?;
            return Ok(false);
        }
        self.text.push(token);
        self.so_far.ids.push(token);
        self.so_far.logprobs.push(logprob);
        if listener.token(Chosen { so_far: &self.so_far, token, row: self.row })? == After::Finish {
            self.end(Finish::Stopped)?;
            return Ok(false);
        }
        Ok(true)
    }

    fn end(&mut self, finish: Finish) -> Result<()> {
        self.so_far.finish = finish;
        self.so_far.score += self.task.controls.finish(&self.controls, 0)?;
        Ok(())
    }

    /// Reads the last token and the draft: logits `[1 + drafted, V]`, f32.
    fn read(&mut self, drafted: &[i64]) -> Result<Tensor> {
        let device = self.task.lm.spec().placement.device;
        let last = &self.text[self.text.len() - 1..];
        let ids = Tensor::f_from_slice(&[last, drafted].concat())?.f_unsqueeze(0)?.f_to_device(device)?;
        let output = self.task.lm.forward(LmInput::ids(&ids), &mut self.state, &self.pass)?;
        Ok(output.logits.f_select(0, 0)?.f_to_kind(Kind::Float)?.f_contiguous()?)
    }
}

/// The one token of one row.
fn first(tokens: &[i64]) -> Result<i64> {
    tokens.first().copied().ok_or_else(|| Error::value("rows of the scores", 1, 0))
}
