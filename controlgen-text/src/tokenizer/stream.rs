//! Text as it comes, one token at a time.

use controlgen_core::Result;

use super::Tokenizer;
use super::pieces::Joiner;

/// Turns token ids into text as soon as it is complete UTF-8.
///
/// What the pushes and [`finish`](Self::finish) give, one after the other, is what [`Tokenizer::decode`] gives for
/// all ids at once: a character that is spread over several tokens comes with its last token, and bytes that can
/// never become a character come as U+FFFD. A push costs the length of its token, whatever came before.
/// A clone continues on its own, as the rows of a batch do when they fork.
///
/// For vocabularies that are neither byte-level nor SentencePiece, the text is the difference that a token makes to
/// the decoding of the last few.
#[derive(Clone)]
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    state: State,
}

#[derive(Clone)]
enum State {
    Joined(Joiner),
    Opaque(Window),
}

impl TextStream {
    /// A stream at the beginning of a text; `skip_special` leaves special tokens out.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer: tokenizer.handle(), skip_special, state: State::new(tokenizer) }
    }

    /// A stream that continues a text, whose ids `prompt` are: the space that SentencePiece drops at the beginning
    /// of a text then stays, and a character that the prompt left open is completed.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for an id that no token has, among the last few.
    pub fn after(tokenizer: &Tokenizer, prompt: &[i64], skip_special: bool) -> Result<Self> {
        let mut stream = Self::new(tokenizer, skip_special);
        if let (State::Joined(joiner), false) = (&mut stream.state, prompt.is_empty()) {
            joiner.inside();
        }
        // A character has four bytes at most.
        for &id in &prompt[prompt.len().saturating_sub(PATIENCE)..] {
            stream.push(id)?;
        }
        Ok(stream)
    }

    /// The text that `id` completes; it may be empty.
    ///
    /// # Errors
    /// [`Error::Value`](controlgen_core::Error::Value) for an id that no token has. The stream is then as before.
    pub fn push(&mut self, id: i64) -> Result<String> {
        let (id, token) = self.tokenizer.token(id)?;
        let mut out = String::new();
        if self.skip_special && self.tokenizer.is_special_text(&token) {
            return Ok(out);
        }
        match &mut self.state {
            State::Joined(joiner) => joiner.push(&token, &mut out),
            State::Opaque(window) => out = window.push(&self.tokenizer, id)?,
        }
        Ok(out)
    }

    /// The rest: what was held back for want of more bytes. The stream is then at the beginning of a new text.
    ///
    /// # Errors
    /// Those of the `tokenizers` crate's decoder, for vocabularies that are neither byte-level nor SentencePiece.
    pub fn finish(&mut self) -> Result<String> {
        let mut out = String::new();
        match &mut self.state {
            State::Joined(joiner) => joiner.finish(&mut out),
            State::Opaque(window) => out = window.take(&self.tokenizer)?,
        }
        self.state = State::new(&self.tokenizer);
        Ok(out)
    }
}

impl State {
    fn new(tokenizer: &Tokenizer) -> Self {
        Joiner::new(tokenizer.decoding()).map_or_else(|| Self::Opaque(Window::default()), Self::Joined)
    }
}

/// The last few ids, decoded again with each new one.
#[derive(Clone, Default)]
struct Window {
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    given: usize,
}

/// As many ids are kept, once given out, as context for the next.
const CONTEXT: usize = 4;
/// As many ids are held back while the text ends in U+FFFD.
const PATIENCE: usize = 8;

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        self.ids.push(id);
        let patient = self.ids.len() - self.given < PATIENCE;
        let all = tokenizer.decode_opaque(&self.ids)?;
        if patient && all.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        let new = self.beyond(tokenizer, &all)?;
        self.ids.drain(..self.ids.len().saturating_sub(CONTEXT));
        self.given = self.ids.len();
        Ok(new)
    }

    fn take(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let all = tokenizer.decode_opaque(&self.ids)?;
        self.beyond(tokenizer, &all)
    }

    /// What `all` has beyond the text that was given out.
    fn beyond(&self, tokenizer: &Tokenizer, all: &str) -> Result<String> {
        let before = tokenizer.decode_opaque(&self.ids[..self.given])?;
        let same = before.bytes().zip(all.bytes()).take_while(|(a, b)| a == b).count();
        let cut = (0..=same).rev().find(|&at| all.is_char_boundary(at)).unwrap_or(0);
        Ok(all[cut..].to_owned())
    }
}
