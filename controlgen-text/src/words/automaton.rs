//! Words and phrases as an automaton over characters.

use std::collections::{HashMap, HashSet, VecDeque};

use controlgen_core::{Error, Result};

/// How words are recognised in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WordOptions {
    /// Only as whole words (the default): where a phrase begins or ends with a word character, none stands beside it.
    /// Word characters are those of Unicode's `\w` (UTS #18, annex C): letters, marks, digits, `_`. To be turned off
    /// for writing without spaces between words.
    pub whole: bool,
    /// Whether upper and lower case differ (not, unless said). Case is folded character by character, so that "ß" and
    /// "SS" stay different, as in Unicode's simple folding.
    pub case_sensitive: bool,
}

impl Default for WordOptions {
    fn default() -> Self {
        Self { whole: true, case_sensitive: false }
    }
}

/// Where a text stands: the longest end of it that begins a phrase, whether a word goes on, and the bytes of a
/// character that is not complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Place {
    pub(super) node: u32,
    /// Whether the last character is a word character; not followed where words need not be whole.
    pub(super) word: bool,
    pub(super) pending: Pending,
}

/// Bytes of a character that is not complete: three at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Pending {
    bytes: [u8; 3],
    len: u8,
}

impl Place {
    /// Whether no character is left open.
    pub(crate) fn is_between(&self) -> bool {
        self.pending.len == 0
    }

    /// Whether a word goes on; not followed where words need not be whole.
    pub(crate) fn is_inside(&self) -> bool {
        self.word
    }

    /// The place of a text that begins no phrase, after a word character or another.
    pub(crate) fn plain(inside: bool) -> Self {
        Self { word: inside, ..Self::default() }
    }

    /// The place of a text that ends alike, but begins no phrase.
    pub(crate) fn elsewhere(self) -> Self {
        Self { node: 0, ..self }
    }
}

/// Characters that no phrase has; between words, the marks of where one begins and ends.
const OTHER: u16 = 0;
const BEGIN: u16 = 1;
const END: u16 = 2;

/// Aho and Corasick, "Efficient string matching" (CACM 1975), over the folded characters of a text, between which a
/// mark stands wherever a word begins or ends. Words begin and end in phrases too, so that a phrase is whole where its
/// marks are the text's.
#[derive(Debug)]
pub(super) struct Automaton {
    options: WordOptions,
    ascii: [u16; 128],
    beyond: HashMap<char, u16>,
    symbols: usize,
    /// The node after each symbol, [nodes × symbols].
    next: Vec<u32>,
    /// The words that have occurred once a node is reached, without repetition.
    occurring: Vec<Vec<u32>>,
    /// How far the words have come at a node: the number of the word, and the share of its characters.
    progress: Vec<Vec<(u32, f32)>>,
}

/// As many cells may the table of an automaton have: a gigabyte.
const MOST_CELLS: usize = 1 << 28;

impl Automaton {
    /// Each word is several phrases that count as one.
    pub(super) fn new(words: &[Vec<String>], options: WordOptions) -> Result<Self> {
        if words.is_empty() {
            return Err(Error::value("words", "at least one", "none"));
        }
        let mut automaton = Self {
            options,
            ascii: [OTHER; 128],
            beyond: HashMap::new(),
            symbols: 3,
            next: Vec::new(),
            occurring: Vec::new(),
            progress: Vec::new(),
        };
        let mut phrases = Vec::new();
        for (word, spelled) in (0u32..).zip(words) {
            let mut of_word = Vec::new();
            for phrase in spelled {
                if phrase.trim().is_empty() {
                    let found = format!("{phrase:?}");
                    return Err(Error::value("phrase", "at least one character that is no space", found));
                }
                of_word.push(automaton.spell(phrase));
            }
            if of_word.is_empty() {
                return Err(Error::value(format!("phrases of word {word}"), "at least one", "none"));
            }
            phrases.extend(minimal(of_word).into_iter().map(|phrase| (phrase, word)));
        }
        let nodes: usize = 1 + phrases.iter().map(|(phrase, _)| phrase.len()).sum::<usize>();
        if nodes.saturating_mul(automaton.symbols) > MOST_CELLS {
            let expected = format!("characters times different ones of at most {MOST_CELLS}");
            return Err(Error::value("words", expected, format!("{nodes} · {}", automaton.symbols)));
        }
        automaton.build(&phrases);
        Ok(automaton)
    }

    /// The symbols of a phrase, with its marks. Characters that are new get a symbol.
    fn spell(&mut self, phrase: &str) -> Vec<u16> {
        let (mut spelled, mut word) = (Vec::new(), false);
        for c in phrase.chars() {
            spelled.extend(self.mark(word, c));
            word = is_word(c);
            let folded = self.fold(c);
            let symbol = match self.symbol(c) {
                OTHER => {
                    let fresh = u16::try_from(self.symbols).unwrap_or(OTHER);
                    self.symbols += 1;
                    self.beyond.insert(folded, fresh);
                    for other in 0u8..128 {
                        if self.fold(char::from(other)) == folded {
                            self.ascii[usize::from(other)] = fresh;
                        }
                    }
                    fresh
                }
                known => known,
            };
            spelled.push(symbol);
        }
        if self.options.whole && word {
            spelled.push(END);
        }
        spelled
    }

    /// The mark before this character, after one that is a word character or not.
    fn mark(&self, word: bool, c: char) -> Option<u16> {
        match (word, is_word(c)) {
            (false, true) if self.options.whole => Some(BEGIN),
            (true, false) if self.options.whole => Some(END),
            _ => None,
        }
    }

    fn fold(&self, c: char) -> char {
        if self.options.case_sensitive { c } else { fold(c) }
    }

    fn symbol(&self, c: char) -> u16 {
        match self.ascii.get(c as usize) {
            Some(&symbol) => symbol,
            None => self.beyond.get(&self.fold(c)).copied().unwrap_or(OTHER),
        }
    }

    fn build(&mut self, phrases: &[(Vec<u16>, u32)]) {
        let mut children: Vec<HashMap<u16, u32>> = vec![HashMap::new()];
        self.occurring = vec![Vec::new()];
        self.progress = vec![Vec::new()];
        for (phrase, word) in phrases {
            let letters = phrase.iter().filter(|&&symbol| symbol > END).count();
            let (mut at, mut come) = (0usize, 0usize);
            for (i, &symbol) in phrase.iter().enumerate() {
                let fresh = children.len();
                at = *children[at].entry(symbol).or_insert(fresh as u32) as usize;
                if at == fresh {
                    children.push(HashMap::new());
                    self.occurring.push(Vec::new());
                    self.progress.push(Vec::new());
                }
                come += usize::from(symbol > END);
                if come > 0 && i + 1 < phrase.len() {
                    further(&mut self.progress[at], *word, come as f32 / letters as f32);
                }
            }
            if !self.occurring[at].contains(word) {
                self.occurring[at].push(*word);
            }
        }
        // Breadth first: where a node has no child, its longest proper end is asked, which has been linked before.
        let symbols = self.symbols;
        self.next = vec![0; children.len() * symbols];
        let mut queue = VecDeque::from([(0usize, 0usize)]);
        while let Some((at, shorter)) = queue.pop_front() {
            if at != 0 {
                for word in self.occurring[shorter].clone() {
                    if !self.occurring[at].contains(&word) {
                        self.occurring[at].push(word);
                    }
                }
                for (word, share) in self.progress[shorter].clone() {
                    further(&mut self.progress[at], word, share);
                }
            }
            for symbol in 0..symbols {
                let after = if at == 0 { 0 } else { self.next[shorter * symbols + symbol] };
                self.next[at * symbols + symbol] = match children[at].get(&(symbol as u16)) {
                    Some(&child) => {
                        queue.push_back((child as usize, after as usize));
                        child
                    }
                    None => after,
                };
            }
        }
    }

    /// The place after one byte more. `occurs` is told of the words that occur.
    pub(super) fn byte(&self, mut at: Place, byte: u8, occurs: &mut impl FnMut(Heard, u32)) -> Place {
        if at.pending.len == 0 && byte < 128 {
            return self.character(at, char::from(byte), occurs);
        }
        let mut buffer = [0u8; 4];
        let mut len = usize::from(at.pending.len);
        buffer[..len].copy_from_slice(&at.pending.bytes[..len]);
        buffer[len] = byte;
        len += 1;
        at.pending = Pending::default();
        let mut rest = &buffer[..len];
        while !rest.is_empty() {
            let (valid, invalid) = match std::str::from_utf8(rest) {
                Ok(text) => (text.len(), Some(0)),
                Err(error) => (error.valid_up_to(), error.error_len()),
            };
            for c in std::str::from_utf8(&rest[..valid]).unwrap_or_default().chars() {
                at = self.character(at, c, occurs);
            }
            rest = &rest[valid..];
            match invalid {
                Some(0) => {}
                Some(invalid) => {
                    at = self.character(at, char::REPLACEMENT_CHARACTER, occurs);
                    rest = &rest[invalid..];
                }
                None => {
                    at.pending.len = rest.len() as u8;
                    at.pending.bytes[..rest.len()].copy_from_slice(rest);
                    break;
                }
            }
        }
        at
    }

    fn character(&self, at: Place, c: char, occurs: &mut impl FnMut(Heard, u32)) -> Place {
        let mut node = at.node;
        if let Some(mark) = self.mark(at.word, c) {
            node = self.next[node as usize * self.symbols + usize::from(mark)];
            self.occurring[node as usize].iter().for_each(|&word| occurs(Heard::Before, word));
        }
        node = self.next[node as usize * self.symbols + usize::from(self.symbol(c))];
        self.occurring[node as usize].iter().for_each(|&word| occurs(Heard::With, word));
        Place { node, word: self.options.whole && is_word(c), pending: Pending::default() }
    }

    /// The words that occur if the text ends here.
    pub(super) fn ended(&self, at: Place) -> &[u32] {
        if at.word {
            &self.occurring[self.next[at.node as usize * self.symbols + usize::from(END)] as usize]
        } else {
            &[]
        }
    }

    /// How far words have come that have not occurred yet.
    pub(super) fn progress(&self, at: Place) -> &[(u32, f32)] {
        &self.progress[at.node as usize]
    }
}

/// Where a word occurs: before the character read, as it ends there, or with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Before,
    With,
}

/// Keeps the greatest share of each word.
fn further(progress: &mut Vec<(u32, f32)>, word: u32, share: f32) {
    match progress.iter_mut().find(|(known, _)| *known == word) {
        Some((_, known)) => *known = known.max(share),
        None => progress.push((word, share)),
    }
}

/// The phrases without those that hold another: where they occur, the other does.
fn minimal(phrases: Vec<Vec<u16>>) -> Vec<Vec<u16>> {
    let all: HashSet<Vec<u16>> = phrases.into_iter().collect();
    let holds = |long: &Vec<u16>, short: &Vec<u16>| {
        short.len() < long.len() && long.windows(short.len()).any(|part| part == short.as_slice())
    };
    let mut kept: Vec<Vec<u16>> =
        all.iter().filter(|long| !all.iter().any(|short| holds(long, short))).cloned().collect();
    kept.sort();
    kept
}

/// Whether a character is part of words: Unicode's `\w`.
pub(crate) fn is_word(c: char) -> bool {
    if c.is_ascii() {
        c.is_ascii_alphanumeric() || c == '_'
    } else {
        regex_syntax::try_is_word_character(c).unwrap_or(false)
    }
}

/// Folds case, where that is one character again.
fn fold(c: char) -> char {
    fn only(mut chars: impl Iterator<Item = char>) -> Option<char> {
        chars.next().filter(|_| chars.next().is_none())
    }
    let upper = only(c.to_uppercase()).unwrap_or(c);
    only(upper.to_lowercase()).unwrap_or(upper)
}
