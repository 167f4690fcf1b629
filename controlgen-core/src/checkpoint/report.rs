//! What a model took from a checkpoint.

/// Which tensors of a checkpoint a model took, which it missed, and which it left. Each list is sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Names in the checkpoint that were read.
    pub used: Vec<String>,
    /// Names that the model asked for and the checkpoint lacks.
    pub missing: Vec<String>,
    /// Names in the checkpoint that nothing asked for and that were not to be ignored.
    pub unexpected: Vec<String>,
}

/// Whether a name matches a pattern in which `*` stands for any run of characters, dots included.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut at, mut position) = (0, 0);
    // Where the last star was, and how far its run reaches for now.
    let mut star: Option<(usize, usize)> = None;
    while position < name.len() {
        if pattern.get(at) == Some(&b'*') {
            star = Some((at, position));
            at += 1;
        } else if pattern.get(at) == name.get(position) {
            at += 1;
            position += 1;
        } else if let Some((star_at, reach)) = star {
            star = Some((star_at, reach + 1));
            at = star_at + 1;
            position = reach + 1;
        } else {
            return false;
        }
    }
    pattern[at..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name) in [
            ("a.b", "a.b"),
            ("*", ""),
            ("*.attn.bias", "h.0.attn.bias"),
            ("*.rotary_emb.inv_freq", "model.layers.10.self_attn.rotary_emb.inv_freq"),
            ("h.*.attn.*", "h.0.attn.attn.masked_bias"),
            ("a*b*c", "abbbcbc"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("a.b", "a.bc"),
            ("*.attn.bias", "h.0.attn.c_attn.bias"),
            ("a*b", "acbc"),
            ("", "a"),
            ("a**", "b"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }
}
