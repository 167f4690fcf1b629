//! The controls of the table, and what they promise of texts.

use controlgen_core::{Result as Made, TokenControl, TokenControls};
use controlgen_text::arithmetic::Term;
use controlgen_text::controls::features::{
    Alliteration, Features, Monosyllabic, Repetition, WordLength, WordList,
};
use controlgen_text::controls::{
    BannedWords, EpsilonCutoff, EtaCutoff, ForcedPrefix, FrequencyPresence, Fudge, FutureDiscriminator, Gedi,
    GumbelNoise, LexicalConstraints, LogitBias, MinLength, MinP, NoRepeatNgram, Regularised, Regulariser,
    RepetitionPenalty, Suppress, Temperature, TopK, TopP, Typical, Watermark,
};
use controlgen_text::grammar::{Grammar, GrammarControl, Vocabulary};
use controlgen_text::lexical::{Clause, Clauses};
use controlgen_text::search::Finish;
use controlgen_text::{Completion, TextModel};

use tch::{Kind, Tensor};

use crate::{EOS, NEW_TOKENS, table};

type Holds = Box<dyn Fn(&str, &Completion) -> Result<(), String>>;

pub struct Case {
    pub name: &'static str,
    pub stack: TokenControls,
    /// What the control promises of a completion of a prompt.
    pub holds: Holds,
}

/// One that promises nothing but to ban what it bans.
fn case(name: &'static str, control: impl TokenControl) -> Case {
    promising(name, control, |_, _| Ok(()))
}

fn promising(
    name: &'static str,
    control: impl TokenControl,
    holds: impl Fn(&str, &Completion) -> Result<(), String> + 'static,
) -> Case {
    Case { name, stack: TokenControls::new().with(control), holds: Box::new(holds) }
}

fn demand(holds: bool, broken: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(broken.to_owned()) }
}

/// Expects a text whose tokens sum to an even number, the more surely the longer it is.
#[derive(Clone)]
struct Even {
    vocab: i64,
}

impl FutureDiscriminator for Even {
    /// The sum and the length, `[B, 2]`.
    type State = Tensor;

    fn vocab(&self) -> i64 {
        self.vocab
    }

    fn start(&self, prompts: &[Vec<i64>]) -> Made<Tensor> {
        Ok(Tensor::zeros([prompts.len() as i64, 2], (Kind::Int64, tch::Device::Cpu)))
    }

    fn log_probs(&self, state: &mut Tensor, candidates: &Tensor) -> Made<Tensor> {
        let sign = ((state.narrow(1, 0, 1) + candidates).remainder(2) * -2 + 1).to_kind(Kind::Float);
        Ok((sign * (state.narrow(1, 1, 1) + 1).to_kind(Kind::Float)).log_sigmoid())
    }

    fn advance(&self, state: &mut Tensor, tokens: &[i64]) -> Made<()> {
        let tokens = Tensor::from_slice(tokens);
        *state = &*state + Tensor::stack(&[&tokens, &tokens.ones_like()], 1);
        Ok(())
    }
}

pub fn all(model: &TextModel) -> Vec<Case> {
    let tokenizer = model.tokenizer();
    let trie = model.token_trie().unwrap();
    let regularised = |regulariser| Regularised::new(regulariser, 0.7).unwrap();
    let features = Features::new(&trie)
        .with(2.0, WordList::new(["a", "the", "of"]).unwrap())
        .and_then(|all| all.with(-1.0, Repetition::new()))
        .and_then(|all| all.with(0.5, Alliteration))
        .and_then(|all| all.with(0.1, WordLength))
        .and_then(|all| all.with(0.2, Monosyllabic))
        .unwrap();
    let clauses = Clauses::new(&trie, [Clause::any(["a", "I"]), Clause::any(["!the", "of"])]).unwrap();
    let constraints =
        LexicalConstraints::new(&clauses, [EOS]).unwrap().within(NEW_TOKENS).reward(1.0).unwrap();
    let vocabulary = Vocabulary::new(tokenizer, &[EOS]).unwrap();
    let classes = [1, 2].map(|seed| Term::new(Box::new(table(tokenizer.vocab_size(), seed))));
    let grammar = |grammar: &Grammar| GrammarControl::new(grammar, &vocabulary).unwrap();
    vec![
        Case { name: "none", stack: TokenControls::new(), holds: Box::new(|_, _| Ok(())) },
        case("temperature", Temperature::new(0.7).unwrap()),
        case("top-k", TopK::new(1).unwrap()),
        case("top-p", TopP::new(0.8).unwrap()),
        case("min-p", MinP::new(0.1).unwrap()),
        case("typical", Typical::new(0.6).unwrap()),
        case("epsilon cutoff", EpsilonCutoff::new(1e-3).unwrap()),
        case("eta cutoff", EtaCutoff::new(1e-3).unwrap()),
        case("repetition penalty", RepetitionPenalty::new(1.4).unwrap()),
        case("frequency and presence", FrequencyPresence::new(0.3, 0.4).unwrap()),
        promising("no repeated n-gram", NoRepeatNgram::new(1).unwrap(), |_, c| {
            let mut ids = c.ids.clone();
            ids.sort_unstable();
            ids.dedup();
            demand(ids.len() == c.ids.len(), "a token twice")
        }),
        promising("suppress", Suppress::new([EOS]).unwrap(), |_, c| {
            demand(c.finish == Finish::Length, "it ended")
        }),
        promising("banned words", BannedWords::words(tokenizer, ["e", "the"]).unwrap(), |_, c| {
            demand(!c.text.split(' ').any(|word| word == "the"), "the word")
        }),
        promising("letters", grammar(&Grammar::regex("[ab]{2,4}").unwrap()), |_, c| {
            let letters = c.text.bytes().all(|b| b"ab".contains(&b)) && (2..=4).contains(&c.text.len());
            demand(letters && matches!(c.finish, Finish::Eos(_)), "not of the grammar")
        }),
        case("logit bias", LogitBias::new([(5, 3.0), (7, f64::NEG_INFINITY)]).unwrap()),
        promising("minimum length", MinLength::new(4, [EOS]).unwrap(), |_, c| {
            demand(c.ids.len() >= 4, "too short")
        }),
        promising("forced prefix", ForcedPrefix::new([40, 41, 42]).unwrap(), |_, c| {
            demand(c.ids.starts_with(&[40, 41, 42]), "another beginning")
        }),
        case("regulariser: greedy", regularised(Regulariser::Greedy)),
        case("regulariser: variance", regularised(Regulariser::Variance)),
        case("regulariser: local", regularised(Regulariser::Local)),
        case("regulariser: max", regularised(Regulariser::Max)),
        case("regulariser: squared", regularised(Regulariser::Squared)),
        case("features", features),
        case("GeDi", Gedi::new(&classes, 0, 3.0).unwrap()),
        case("GeDi, filtered", Gedi::new(&classes, 1, 3.0).unwrap().filter(0.6, 0.5).unwrap()),
        case("FUDGE", Fudge::new(Even { vocab: tokenizer.vocab_size() }, 2.0, 50).unwrap()),
        case("Gumbel noise", GumbelNoise::new(3, 0.5).unwrap()),
        case("watermark", Watermark::new(7, 0.4, 2.0).unwrap()),
        promising("clauses", constraints, move |_, c| {
            let unmet = clauses.unmet(&c.text);
            demand(c.score == f64::NEG_INFINITY || unmet.is_empty(), "a clause is not met")
        }),
        promising("a regular expression", grammar(&Grammar::regex("[a-z]{1,3} [0-9]").unwrap()), |_, c| {
            let (letters, digit) = c.text.split_once(' ').ok_or("no space")?;
            let holds = (1..=3).contains(&letters.len()) && letters.bytes().all(|b| b.is_ascii_lowercase());
            demand(holds && digit.len() == 1 && digit.bytes().all(|b| b.is_ascii_digit()), "another text")
        }),
        promising("choices", grammar(&Grammar::choices(["yes", "no", "not now"]).unwrap()), |_, c| {
            demand(["yes", "no", "not now"].contains(&&*c.text), "no choice")
        }),
    ]
}
