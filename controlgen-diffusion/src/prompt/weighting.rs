//! Words of a prompt that count for more or less: the grammar of AUTOMATIC1111's web interface.

use controlgen_core::{Error, Result};
use tch::{Kind, Tensor};

/// A part of a prompt and its weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighted {
    /// The text, without brackets.
    pub text: String,
    /// What its embeddings are multiplied with.
    pub weight: f64,
}

/// What a plain bracket multiplies with: `(text)` by it, `[text]` by its inverse.
const BRACKET: f64 = 1.1;

/// Splits a prompt into parts of one weight.
///
/// `(text)` weighs 1.1 times as much, `[text]` 1.1 times less, `(text:1.3)` 1.3 times as much; they nest, and multiply. `\(`,
/// `\)`, `\[`, `\]` and `\\` are the characters themselves. A bracket that is not closed reaches to the end; one that was
/// not opened is a character. A prompt without brackets is one part of weight 1.
pub fn parse_weights(prompt: &str) -> Vec<Weighted> {
    let mut parts: Vec<Weighted> = Vec::new();
    // Where each open bracket began.
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let multiply = |parts: &mut [Weighted], from: usize, by: f64| {
        parts.iter_mut().skip(from).for_each(|part| part.weight *= by);
    };
    let push =
        |parts: &mut Vec<Weighted>, text: &str| parts.push(Weighted { text: text.to_owned(), weight: 1.0 });
    let mut rest = prompt;
    while let Some(first) = rest.chars().next() {
        let mut used = first.len_utf8();
        match first {
            '\\' => {
                let next = rest[1..].chars().next().filter(|c| r"()[]\".contains(*c));
                used += next.map_or(0, char::len_utf8);
                push(&mut parts, &rest[used - 1..used]);
            }
            '(' => round.push(parts.len()),
            '[' => square.push(parts.len()),
            ')' if !round.is_empty() => multiply(&mut parts, round.pop().unwrap_or(0), BRACKET),
            ']' if !square.is_empty() => multiply(&mut parts, square.pop().unwrap_or(0), 1.0 / BRACKET),
            ':' if !round.is_empty() && stated(rest).is_some() => {
                let (weight, len) = stated(rest).unwrap_or((1.0, 1));
                multiply(&mut parts, round.pop().unwrap_or(0), weight);
                used = len;
            }
            ')' | ']' | ':' => push(&mut parts, &rest[..1]),
            _ => {
                used = rest.find(['\\', '(', ')', '[', ']', ':']).unwrap_or(rest.len());
                push(&mut parts, &rest[..used]);
            }
        }
        rest = &rest[used..];
    }
    round.into_iter().for_each(|from| multiply(&mut parts, from, BRACKET));
    square.into_iter().for_each(|from| multiply(&mut parts, from, 1.0 / BRACKET));
    let mut joined: Vec<Weighted> = Vec::new();
    for part in parts {
        match joined.last_mut() {
            Some(last) if last.weight == part.weight => last.text.push_str(&part.text),
            _ => joined.push(part),
        }
    }
    if joined.is_empty() {
        joined.push(Weighted { text: String::new(), weight: 1.0 });
    }
    joined
}

/// The number of `: 1.3 )` at the beginning, and how long that is.
fn stated(text: &str) -> Option<(f64, usize)> {
    let inside = text.strip_prefix(':')?;
    let end = inside.find(')')?;
    let number = inside[..end].trim();
    let plain = number.trim_start_matches(['+', '-']);
    if plain.is_empty() || !plain.chars().all(|c| c.is_ascii_digit() || c == '.') {
        return None;
    }
    Some((number.parse().ok().filter(|weight: &f64| weight.is_finite())?, end + 2))
}

/// z' = (z ∘ w) · mean z / mean (z ∘ w): states `[B, T, D]` of positions with weights `[B, T]`, the mean of each row
/// restored. Rows whose weights are all 1 stay as they are.
///
/// # Errors
/// [`Error::Shape`] for weights of another shape.
pub fn apply_weights(states: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (b, t, _) = states.size3()?;
    if weights.size() != [b, t] {
        return Err(Error::shape("weights of the positions", format!("[{b}, {t}]"), &weights.size()));
    }
    let weights = weights.f_to_device(states.device())?.f_to_kind(states.f_kind()?)?.f_unsqueeze(2)?;
    let mean = |t: &Tensor| t.f_mean_dim(&[1i64, 2][..], true, None::<Kind>);
    let weighted = states.f_mul(&weights)?;
    let (old, new) = (mean(states)?, mean(&weighted)?);
    // A mean of nothing cannot be restored.
    let ratio = old.f_div(&new)?.f_where_self(&new.f_ne(0.0)?, &Tensor::f_ones_like(&new)?)?;
    let plain = weights.f_eq(1.0)?.f_all_dim(1, true)?; // (B, 1, 1)
    Ok(states.f_where_self(&plain, &weighted.f_mul(&ratio)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples that the web interface's own documentation gives.
    #[test]
    fn prompts_are_split_as_documented() {
        let cases: [(&str, &[(&str, f64)]); 9] = [
            ("normal text", &[("normal text", 1.0)]),
            ("an (important) word", &[("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
            ("(unbalanced", &[("unbalanced", 1.1)]),
            (r"\(literal\]", &[("(literal]", 1.0)]),
            ("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]),
            (
                "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
                &[
                    ("a ", 1.0),
                    ("house", 1.573),
                    (" ", 1.1),
                    ("on", 1.0),
                    (" a ", 1.1),
                    ("hill", 0.55),
                    (", sun, ", 1.1),
                    ("sky", 1.4641),
                    (".", 1.1),
                ],
            ),
            ("", &[("", 1.0)]),
            ("a: b) c] (d:x) (e: 2 )", &[("a: b) c] ", 1.0), ("d:x", 1.1), (" ", 1.0), ("e", 2.0)]),
            ("é(ü:-0.5)\\", &[("é", 1.0), ("ü", -0.5), ("\\", 1.0)]),
        ];
        for (prompt, expected) in cases {
            let found = parse_weights(prompt);
            let texts: Vec<&str> = found.iter().map(|part| part.text.as_str()).collect();
            assert_eq!(texts, expected.iter().map(|part| part.0).collect::<Vec<_>>(), "{prompt}");
            for (part, expected) in found.iter().zip(expected) {
                assert!((part.weight - expected.1).abs() < 1e-12, "{prompt}: {part:?}");
            }
        }
    }

    #[test]
    fn weighting_keeps_the_mean() {
        let z = (Tensor::arange(24, tch::kind::DOUBLE_CPU) * 1.7).sin().view([2, 3, 4]) + 0.3;
        let w = Tensor::from_slice(&[1.0, 1.3, 0.5, 1.0, 1.0, 1.0]).view([2, 3]);
        let found = apply_weights(&z, &w).unwrap();
        // By the formula, number by number.
        let all = Vec::<f64>::try_from(z.get(0).view(-1)).unwrap();
        let by = [1.0, 1.3, 0.5];
        let weighted: Vec<f64> = all.iter().enumerate().map(|(i, z)| z * by[i.div_euclid(4)]).collect();
        let ratio = all.iter().sum::<f64>() / weighted.iter().sum::<f64>();
        for (a, b) in Vec::<f64>::try_from(found.get(0).view(-1)).unwrap().iter().zip(weighted) {
            assert!((a - b * ratio).abs() < 1e-12, "{a}, {}", b * ratio);
        }
        assert!(found.get(1).equal(&z.get(1)), "weights of 1 leave it to the bit");
        assert!(matches!(apply_weights(&z, &w.narrow(1, 0, 2)), Err(Error::Shape { .. })));
    }
}
