//! A grammar as a control over the next token.

use std::iter;
use std::sync::mpsc;
use std::time::Duration;

use controlgen_core::{Error, Result, Rows, TokenControl};
use llguidance::Matcher;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{SimpleVob, TokenId};
use tch::Tensor;

use super::number::NumberAtEnd;
use super::{Grammar, Vocabulary};
use crate::controls::{ban_where, dims};

/// Bans every token after which no text of a grammar could follow: E(x) is 0 for texts of the grammar and ∞ for others.
///
/// A token that ends the text is allowed where the text may end, and nothing else where it must. Ids past the
/// tokenizer's (a model's vocabulary may be padded) are banned. The prompt is not part of the text.
///
/// Where only one string of bytes can follow, its tokens are those that the tokenizer spells it with, one by one: other
/// spellings of the same bytes are banned.
///
/// `finish` weighs a text that is not whole with −∞: it has no probability under the grammar. So a search by beams drops
/// what the length cuts off; sampling gives it, with that score and [`Finish::Length`](crate::search::Finish::Length).
///
/// The engine is the `llguidance` crate: Earley's parser (Earley, "An efficient context-free parsing algorithm", 1970)
/// over lexemes that are recognised by derivatives of regular expressions (Brzozowski, 1964), with the tokens in a trie.
///
/// *Cost*: at 50,000 tokens 0.1 to 0.2 ms a row, one mask in a hundred 0.8 ms (1.1 ms where a regular expression has
/// Unicode classes or no case), more while the lexer is new to a grammar: half a percent of a step of a model of 135 M
/// parameters; a fork copies the parser's rows, and
/// shares the lexer's states with the other rows of its run.
pub struct GrammarControl {
    matcher: Matcher,
    vocabulary: Vocabulary,
    longest_number: Option<usize>,
    jump_forward: bool,
}

impl Clone for GrammarControl {
    fn clone(&self) -> Self {
        Self { matcher: self.matcher.deep_clone(), vocabulary: self.vocabulary.clone(), ..*self }
    }
}

impl GrammarControl {
    /// The grammar over this vocabulary. A grammar of usual size compiles in milliseconds; one that takes more than the
    /// bounds on size, states and work is refused, and so is any that takes longer than 10 seconds. (What intersects
    /// dozens of patterns goes by the clock alone: its thread is left to itself.)
    ///
    /// # Errors
    /// [`Error::Value`] for a grammar that does not compile: bad syntax, no text at all, more work than that.
    pub fn new(grammar: &Grammar, vocabulary: &Vocabulary) -> Result<Self> {
        let wrong = |problem: &str| Error::value(grammar.what, "one that compiles", trimmed(problem));
        let (mut matcher, first) = compile(grammar.top_level(), vocabulary.clone()).map_err(|p| wrong(&p))?;
        let warnings = matcher.grammar_warnings();
        if !warnings.is_empty() {
            return Err(wrong(&warnings.join("; ")));
        }
        if !first.iter().any(|id| (id as usize) < vocabulary.size()) {
            return Err(wrong("no token of the vocabulary may come first"));
        }
        let (vocabulary, longest_number) = (vocabulary.clone(), grammar.longest_number);
        Ok(Self { matcher, vocabulary, longest_number, jump_forward: true })
    }

    /// Whether searches are told of tokens that must follow, so that they may take several before they ask the model
    /// again. They are, unless said: the outcome is the same.
    #[must_use]
    pub fn jump_forward(self, jump_forward: bool) -> Self {
        Self { jump_forward, ..self }
    }
}

/// The compiled grammar with its first mask, or what is wrong with it; on a thread, since compilers recur, deeper than a
/// thread's usual stack allows, and since what has no bound can be left.
fn compile(grammar: TopLevelGrammar, vocabulary: Vocabulary) -> Result<(Matcher, SimpleVob), String> {
    const STACK: usize = 256 << 20; // what is not used is not allocated
    const PATIENCE: Duration = Duration::from_secs(10);
    let (done, compiled) = mpsc::channel();
    let work = move || {
        let mut matcher = Matcher::new(vocabulary.factory().create_parser(grammar));
        let first = matcher.compute_mask_or_eos().map_err(|problem| format!("{problem:#}"));
        // Nobody waits any more where it took too long.
        let _ = done.send(first.map(|first| (matcher, first)));
    };
    let thread = std::thread::Builder::new().name("grammar".into()).stack_size(STACK).spawn(work);
    thread.map_err(|error| format!("no thread to compile it on: {error}"))?;
    compiled.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(format!("no end of compiling after {PATIENCE:?}")))
}

/// The problem, without what llguidance tells of its own state.
fn trimmed(problem: &str) -> &str {
    if problem.starts_with("NoExtension") {
        return "no text that it allows";
    }
    let end =
        ["\n<state>", "\n<non-verbose/>", "\n<backtrace>"].iter().filter_map(|mark| problem.find(mark)).min();
    problem[..end.unwrap_or(problem.len())].trim()
}

/// Where each row is in the grammar.
pub struct GrammarState {
    rows: Vec<Row>,
    /// Which cells are banned; kept for the next step.
    banned: Vec<bool>,
}

#[derive(Clone)]
struct Row {
    matcher: Matcher,
    /// Whether the text may end here.
    whole: bool,
    /// Whether a token has ended it.
    ended: bool,
    number: NumberAtEnd,
}

impl Rows for GrammarState {
    /// A row that is taken once is moved.
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let mut uses = vec![0usize; self.rows.len()];
        for &row in rows {
            let used = usize::try_from(row).ok().and_then(|row| uses.get_mut(row));
            *used.ok_or_else(|| Error::value("row", format!("0 .. {}", self.rows.len()), row))? += 1;
        }
        let mut old: Vec<Option<Row>> = std::mem::take(&mut self.rows).into_iter().map(Some).collect();
        self.rows = rows
            .iter()
            .filter_map(|&row| {
                let row = row as usize;
                uses[row] -= 1;
                if uses[row] == 0 { old[row].take() } else { old[row].clone() }
            })
            .collect();
        Ok(())
    }
}

impl TokenControl for GrammarControl {
    type State = GrammarState;

    fn start(&self, prompts: &[Vec<i64>]) -> Result<GrammarState> {
        // The rows share a lexer, which other runs, on other threads, do not wait for.
        let mut matcher = self.matcher.deep_clone();
        let whole = matcher.is_accepting().map_err(failed)?;
        let row = Row { matcher, whole, ended: false, number: NumberAtEnd::default() };
        Ok(GrammarState { rows: vec![row; prompts.len()], banned: Vec::new() })
    }

    fn score(&self, state: &mut GrammarState, mut logits: Tensor) -> Result<Tensor> {
        let (rows, vocab) = dims(&logits)?;
        let (size, vocab) = (self.vocabulary.size(), usize::try_from(vocab).unwrap_or(0));
        if usize::try_from(rows).ok() != Some(state.rows.len()) {
            return Err(Error::value("rows of logits", state.rows.len(), rows));
        }
        if vocab < size {
            return Err(Error::value(
                "logits",
                format!("one for each of the grammar's {size} tokens"),
                vocab,
            ));
        }
        state.banned.clear();
        state.banned.resize(state.rows.len() * vocab, true);
        for (row, banned) in iter::zip(&mut state.rows, state.banned.chunks_exact_mut(vocab)) {
            row.mask(&self.vocabulary, &mut banned[..size])?;
            if self.longest_number.is_some_and(|longest| row.number.length() >= longest) {
                end_number(&self.vocabulary, &mut banned[..size]);
            }
        }
        let banned = Tensor::f_from_slice(&state.banned)?.f_view_as(&logits)?.f_to_device(logits.device())?;
        ban_where(&mut logits, &banned)?;
        Ok(logits)
    }

    fn advance(&self, state: &mut GrammarState, tokens: &[i64]) -> Result<()> {
        if tokens.len() != state.rows.len() {
            return Err(Error::value("tokens", format!("{}, one a row", state.rows.len()), tokens.len()));
        }
        iter::zip(&mut state.rows, tokens).try_for_each(|(row, &token)| row.advance(&self.vocabulary, token))
    }

    fn finish(&self, state: &GrammarState, row: usize) -> Result<f64> {
        let whole = state.rows.get(row).is_none_or(|row| row.ended || row.whole);
        Ok(if whole { 0.0 } else { f64::NEG_INFINITY })
    }

    fn forced(&self, state: &mut GrammarState, row: usize) -> Result<Option<i64>> {
        let rows = state.rows.len();
        let row = state.rows.get_mut(row).ok_or_else(|| Error::value("row", format!("0 .. {rows}"), row))?;
        Ok(if self.jump_forward { row.forced(&self.vocabulary) } else { None })
    }
}

impl Row {
    /// Marks as not banned what may follow.
    fn mask(&mut self, vocabulary: &Vocabulary, banned: &mut [bool]) -> Result<()> {
        if self.ended {
            for &id in vocabulary.eos() {
                banned[id as usize] = false;
            }
            return Ok(());
        }
        let allowed = self.matcher.compute_mask_or_eos().map_err(failed)?;
        for (banned, &word) in iter::zip(banned.chunks_mut(32), allowed.as_slice()) {
            for (bit, banned) in banned.iter_mut().enumerate() {
                *banned = (word >> bit) & 1 == 0;
            }
        }
        Ok(())
    }

    /// The only token that `mask` would leave.
    fn forced(&mut self, vocabulary: &Vocabulary) -> Option<i64> {
        if self.ended || self.matcher.is_stopped() {
            return if let [end] = vocabulary.eos() { Some(*end) } else { None };
        }
        let spelled = self.matcher.compute_ff_tokens();
        spelled.first().map(|&id| i64::from(id)).filter(|&id| id < vocabulary.size() as i64)
    }

    fn advance(&mut self, vocabulary: &Vocabulary, token: i64) -> Result<()> {
        if self.ended {
            return Ok(());
        }
        let refused = || Error::value("token under a grammar", "one that the grammar allows", token);
        if vocabulary.eos().binary_search(&token).is_ok() {
            self.ended = self.whole;
            return if self.whole { Ok(()) } else { Err(refused()) };
        }
        let id = TokenId::try_from(token)
            .ok()
            .filter(|&id| (id as usize) < vocabulary.size())
            .ok_or_else(refused)?;
        self.matcher.consume_token(id).map_err(failed)?;
        self.number.read(vocabulary.bytes(id));
        self.whole = self.matcher.is_accepting().map_err(failed)?;
        Ok(())
    }
}

/// Bans what would continue a number, if anything else is left.
fn end_number(vocabulary: &Vocabulary, banned: &mut [bool]) {
    let mut numeric = vocabulary.numeric().iter().peekable();
    let others = (0u32..).zip(banned.iter()).any(|(id, banned)| {
        let continues = numeric.next_if(|&&next| next == id).is_some();
        !(continues || *banned)
    });
    if others {
        vocabulary.numeric().iter().for_each(|&id| banned[id as usize] = true);
    }
}

/// The parser gave up in the middle of a text.
#[allow(clippy::needless_pass_by_value)] // a `map_err` function
fn failed(problem: impl std::fmt::Display) -> Error {
    let expected = "one whose every step is within the bounds of work";
    Error::value("grammar", expected, trimmed(&format!("{problem:#}")))
}
