//! From two prompts to the numbers of an edit.

use std::ops::Range;

use controlgen_core::{Error, Result};

use super::Edit;

impl Edit {
    /// [`Self::replace`] of words: each pair has the tokens of a word in the source prompt and of the word in its
    /// place. Words of as many tokens go token by token; else each of m new tokens gets 1/m of the attention of each
    /// old one. Tokens between the words go one to one, in order; N is `length`, that of the padded prompts.
    ///
    /// Tokens after the last word keep their counterparts too where a word's length has changed; the paper's code then
    /// takes those of the same position, as is done here for padding that the source has no more of.
    ///
    /// # Errors
    /// [`Error::Value`] for words that are empty, out of order, or beyond `length`, or that do not have as many tokens
    /// between them in both prompts.
    pub fn replace_words(words: &[(Range<usize>, Range<usize>)], length: usize) -> Result<Self> {
        let length = super::edit::length(length)?;
        let mut mapper = vec![0.0; length * length];
        let mut link = |from: usize, to: usize, share: f64| mapper[from * length + to] = share;
        let (mut from, mut to) = (0, 0);
        for (source, edit) in words {
            let fits =
                |word: &Range<usize>, at: usize| at <= word.start && !word.is_empty() && word.end <= length;
            if !fits(source, from) || !fits(edit, to) {
                let expected = format!("tokens in order, below {length}");
                return Err(Error::value("word to replace", expected, format!("{source:?} and {edit:?}")));
            }
            if source.start - from != edit.start - to {
                let expected = format!("{}, as in the source", source.start - from);
                return Err(Error::value("tokens before a new word", expected, edit.start - to));
            }
            (from..source.start).zip(to..edit.start).for_each(|(i, j)| link(i, j, 1.0));
            for (a, i) in source.clone().enumerate() {
                for (b, j) in edit.clone().enumerate() {
                    if source.len() != edit.len() {
                        link(i, j, 1.0 / edit.len() as f64);
                    } else if a == b {
                        link(i, j, 1.0);
                    }
                }
            }
            (from, to) = (source.end, edit.end);
        }
        (from..length).zip(to..length).for_each(|(i, j)| link(i, j, 1.0));
        (to + (length - from).min(length - to)..length).for_each(|j| link(j, j, 1.0));
        Self::replace(&mapper)
    }

    /// [`Self::refine`] of the tokens that both prompts have, in order: a longest common subsequence of their ids,
    /// which is the alignment of Needleman & Wunsch (1970) with match 1, mismatch −1 and gap 0, as in the paper's
    /// code. N is `length`, that of the padded prompts; padding goes with padding.
    ///
    /// # Errors
    /// [`Error::Value`] for no tokens, or more than `length`.
    pub fn refine_tokens(source: &[i64], edit: &[i64], length: usize) -> Result<Self> {
        let length = super::edit::length(length)?;
        for ids in [source, edit] {
            if ids.is_empty() || ids.len() > length {
                return Err(Error::value("tokens of a prompt", format!("1 ..= {length}"), ids.len()));
            }
        }
        let mut map = common(source, edit);
        map.extend((edit.len()..length).map(Some));
        Self::refine(&map)
    }
}

/// For each of `edit` the place in `source` of the same entry, in order, for as many as can be.
fn common(source: &[i64], edit: &[i64]) -> Vec<Option<usize>> {
    // longest[i][j]: of the first i of the source and the first j of the edit.
    let mut longest = vec![vec![0usize; edit.len() + 1]; source.len() + 1];
    for (i, a) in source.iter().enumerate() {
        for (j, b) in edit.iter().enumerate() {
            let apart = longest[i][j + 1].max(longest[i + 1][j]);
            longest[i + 1][j + 1] = if a == b { apart.max(longest[i][j] + 1) } else { apart };
        }
    }
    let mut map = vec![None; edit.len()];
    let (mut i, mut j) = (source.len(), edit.len());
    while i > 0 && j > 0 {
        // Ties go as in the paper's code: a new token first, then a dropped one, then a match.
        if longest[i][j] == longest[i][j - 1] {
            j -= 1;
        } else if longest[i][j] == longest[i - 1][j] {
            i -= 1;
        } else {
            (i, j) = (i - 1, j - 1);
            map[j] = Some(i);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_share_their_tokens() {
        // "<s> a grey squirrel </s> pad", two tokens becoming three, and back: the columns of the new tokens.
        let grown = Edit::replace_words(&[(2..4, 2..5)], 7).unwrap();
        let third = 1.0 / 3.0;
        let rows = [
            [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, third, third, third, 0.0, 0.0],
            [0.0, 0.0, third, third, third, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
            [0.0; 7],
        ];
        assert_eq!(grown, Edit::replace(&rows.concat()).unwrap());
        let shrunk = Edit::replace_words(&[(1..3, 1..2)], 4).unwrap();
        let rows = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]];
        assert_eq!(shrunk, Edit::replace(&rows.concat()).unwrap());
        assert!(matches!(Edit::replace_words(&[], usize::MAX), Err(Error::Value { .. })));
        // As many tokens: one to one. Two words, and one token between them.
        let eye: Vec<f64> = (0..25).map(|i: usize| if i.is_multiple_of(6) { 1.0 } else { 0.0 }).collect();
        let same = Edit::replace_words(&[(1..2, 1..2), (3..5, 3..5)], 5).unwrap();
        assert_eq!(same, Edit::replace(&eye).unwrap());
        for bad in [
            vec![(1..1, 1..2)],
            vec![(1..2, 2..3)],
            vec![(4..6, 4..5)],
            vec![(3..4, 3..4), (1..2, 1..2)],
            vec![(1..2, 1..2), (3..4, 4..5)],
            vec![(1..usize::MAX, 1..2)],
        ] {
            assert!(matches!(Edit::replace_words(&bad, 5), Err(Error::Value { .. })), "{bad:?}");
        }
    }

    #[test]
    fn tokens_are_aligned_to_the_longest_common_subsequence() {
        // "a cat on a mat" to "a black cat on the red mat".
        let map = common(&[1, 2, 3, 1, 4], &[1, 9, 2, 3, 8, 7, 4]);
        assert_eq!(map, [Some(0), None, Some(1), Some(2), None, None, Some(4)]);
        let padded = Edit::refine_tokens(&[1, 2], &[1, 5, 2], 5).unwrap();
        assert_eq!(padded, Edit::refine(&[Some(0), None, Some(1), Some(3), Some(4)]).unwrap());
        assert!(matches!(Edit::refine_tokens(&[], &[1], 3), Err(Error::Value { .. })));
        assert!(matches!(Edit::refine_tokens(&[1], &[1; 4], 3), Err(Error::Value { .. })));
        // Against every subsequence there is, of all strings of three letters up to five long.
        let strings: Vec<Vec<i64>> =
            (0..6u32).flat_map(|n| (0..3i64.pow(n)).map(move |c| digits(c, n))).step_by(5).collect();
        for a in &strings {
            for b in &strings {
                let map = common(a, b);
                let matched: Vec<(usize, usize)> =
                    map.iter().enumerate().filter_map(|(j, i)| Some(((*i)?, j))).collect();
                assert!(matched.iter().all(|&(i, j)| a[i] == b[j]));
                assert!(matched.windows(2).all(|w| w[0].0 < w[1].0));
                let most = (0..1u32 << a.len())
                    .filter(|&set| contained(&pick(a, set), b))
                    .map(u32::count_ones)
                    .max();
                assert_eq!(Some(matched.len()), most.map(|n| n as usize), "{a:?} {b:?}");
            }
        }
    }

    fn digits(code: i64, n: u32) -> Vec<i64> {
        (0..n).map(|i| code.div_euclid(3i64.pow(i)) % 3).collect()
    }

    fn pick(a: &[i64], set: u32) -> Vec<i64> {
        a.iter().enumerate().filter(|(i, _)| set >> i & 1 == 1).map(|(_, x)| *x).collect()
    }

    fn contained(part: &[i64], whole: &[i64]) -> bool {
        let mut rest = whole.iter();
        part.iter().all(|x| rest.any(|y| x == y))
    }
}
