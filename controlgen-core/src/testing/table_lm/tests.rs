use proptest::prelude::*;

use super::*;
use crate::testing::{left_padded, right_padded, strategies};
use crate::{At, Binding, Control, Controls, Rows, SiteKind};

const PROMPTS: [&[i64]; 3] = [&[0, 2, 3, 1], &[4], &[2, 2]];

fn model(order: usize) -> TableLm {
    TableLm::new(&TableLmConfig { order, seed: 7, scale: 1.5, ..TableLmConfig::default() }).unwrap()
}

fn ids(rows: &[Vec<i64>]) -> Tensor {
    left_padded(rows, 0).unwrap().0
}

fn start(lm: &TableLm, rows: i64) -> State {
    lm.start(Source::Rows(rows), &Pass::default()).unwrap()
}

fn forward(lm: &TableLm, input: LmInput<'_>, state: &mut State) -> Tensor {
    lm.forward(input, state, &Pass::default()).unwrap().logits
}

/// log p of the last position of row `i`, `[V]`.
fn row(logits: &Tensor, i: i64) -> Vec<f64> {
    let last = logits.get(i).get(-1).to_kind(Kind::Double).log_softmax(-1, None);
    Vec::try_from(last).unwrap()
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?}\n{b:?}");
}

#[test]
fn sequences_sum_to_one() {
    for order in [1, 2] {
        for (vocab, max_len) in [(2, 6), (4, 5), (5, 4), (8, 3)] {
            let lm = TableLm::new(&TableLmConfig { vocab, order, scale: 2.0, ..TableLmConfig::default() })
                .unwrap();
            let all = lm.enumerate(max_len).unwrap();
            let sum: f64 = all.iter().map(|(_, log_p)| log_p.exp()).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{sum}");
            // Complete, and once each: the end is at the end or not there.
            let v = usize::try_from(vocab - 1).unwrap();
            let expected = (1..max_len).map(|k| v.pow(k as u32 - 1)).sum::<usize>()
                + (v + 1) * v.pow(max_len as u32 - 1);
            assert_eq!(all.len(), expected);
            for (sequence, log_p) in &all {
                let end = sequence.iter().position(|&token| token == 1);
                assert!(end.map_or(sequence.len() == max_len, |end| end + 1 == sequence.len()));
                assert!((lm.log_prob(&[0], sequence).unwrap() - log_p).abs() < 1e-12);
            }
            assert_eq!(all.iter().map(|s| &s.0).collect::<std::collections::BTreeSet<_>>().len(), all.len());
        }
    }
}

#[test]
fn continuations_are_bayes_rule() {
    // p(continuation | prompt) = p(prompt + continuation) / p(prompt), both of the unconditional enumeration.
    let lm = model(2);
    let joint: f64 =
        lm.enumerate(4).unwrap().iter().filter(|s| s.0.starts_with(&[2, 3])).map(|s| s.1.exp()).sum();
    for (rest, log_p) in lm.enumerate_after(&[0, 2, 3], 2).unwrap() {
        let whole = [&[2, 3], rest.as_slice()].concat();
        let found = lm.enumerate(4).unwrap().into_iter().find(|s| s.0 == whole).unwrap().1;
        assert!((found - joint.ln() - log_p).abs() < 1e-12);
    }
}

#[test]
fn samplers_are_enumerated_too() {
    let lm = model(2);
    let mut ban = |_: &[i64], next: &mut [f64]| next[3] = f64::NEG_INFINITY;
    let all = lm.enumerate_with(&[0], 3, &mut ban).unwrap();
    assert!(all.iter().all(|(sequence, _)| !sequence.contains(&3)));
    assert!((all.iter().map(|s| s.1.exp()).sum::<f64>() - 1.0).abs() < 1e-12);
    let mut nothing = |said: &[i64], next: &mut [f64]| {
        if said.len() == 1 {
            next.fill(f64::NEG_INFINITY);
        }
    };
    assert!(matches!(lm.enumerate_with(&[0], 3, &mut nothing), Err(Error::AllBanned { step: 1, .. })));
}

#[test]
fn the_tensor_path_is_the_enumerated_one() {
    for order in [1, 2] {
        let lm = model(order);
        for prompt in PROMPTS {
            let logits = forward(&lm, LmInput::ids(&ids(&[prompt.to_vec()])), &mut start(&lm, 1));
            assert_eq!(logits.size(), [1, prompt.len() as i64, 5]);
            for end in 1..=prompt.len() {
                close(&row(&logits.narrow(1, 0, end as i64), 0), &lm.log_probs(&prompt[..end]).unwrap());
            }
        }
    }
    // Order 1 forgets, order 2 does not.
    assert_eq!(model(1).log_probs(&[2, 3]).unwrap(), model(1).log_probs(&[4, 3]).unwrap());
    assert_ne!(model(2).log_probs(&[2, 3]).unwrap(), model(2).log_probs(&[4, 3]).unwrap());
}

#[test]
fn a_seed_is_a_model() {
    let p = |seed| TableLm::random(6, seed).unwrap().log_probs(&[0]).unwrap();
    assert_eq!(p(1), p(1));
    assert_ne!(p(1), p(2));
    let uniform = TableLm::new(&TableLmConfig { scale: 0.0, ..TableLmConfig::default() }).unwrap();
    close(&uniform.log_probs(&[3]).unwrap(), &[-(5f64.ln()); 5]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Padding left, right or between, and any way to cut the input into passes, change nothing.
    #[test]
    fn padding_and_cutting_change_nothing(
        prompts in strategies::prompts(5, 1..4, 1..6),
        holes in prop::collection::vec(0usize..3, 6),
        cut in 0usize..20,
    ) {
        let lm = model(2);
        // Holes of padding between tokens, then everything filled to one length on the left.
        let (mut spread, mut kept) = (Vec::new(), Vec::new());
        for prompt in &prompts {
            let (mut row, mut keep) = (Vec::new(), Vec::new());
            for (&token, &hole) in prompt.iter().zip(&holes) {
                row.extend(std::iter::repeat_n(4, hole).chain([token]));
                keep.extend(std::iter::repeat_n(0, hole).chain([1]));
            }
            spread.push(row);
            kept.push(keep);
        }
        let (ids, _) = left_padded(&spread, 3).unwrap();
        let keep = left_padded(&kept, 0).unwrap().0.to_kind(Kind::Bool);
        let (b, t) = ids.size2().unwrap();
        let cut = cut as i64 % (t + 1);
        let mut state = start(&lm, b);
        let mut logits = Vec::new();
        for (from, len) in [(0, cut), (cut, t - cut)] {
            if len > 0 {
                let (ids, keep) = (ids.narrow(1, from, len), keep.narrow(1, from, len));
                logits.push(forward(&lm, LmInput::ids(&ids).keep(Some(&keep)), &mut state));
            }
        }
        let logits = Tensor::cat(&logits, 1);
        for (i, prompt) in (0i64..).zip(&prompts) {
            close(&row(&logits, i), &lm.log_probs(prompt).unwrap());
        }
        // And the next token sees the same past.
        let next = Tensor::full([b, 1], 2, (Kind::Int64, tch::Device::Cpu));
        let logits = forward(&lm, LmInput::ids(&next), &mut state);
        for (i, prompt) in (0i64..).zip(&prompts) {
            close(&row(&logits, i), &lm.log_probs(&[prompt.as_slice(), &[2]].concat()).unwrap());
        }
    }
}

#[test]
fn right_padding_is_skipped_by_the_next_token() {
    let lm = model(2);
    let (ids, keep) = right_padded(&[vec![2, 3], vec![4]], 0).unwrap();
    let mut state = start(&lm, 2);
    let _ = forward(&lm, LmInput::ids(&ids).keep(Some(&keep)), &mut state);
    let logits = forward(&lm, LmInput::ids(&Tensor::from_slice2(&[[1i64], [1]])), &mut state);
    close(&row(&logits, 0), &lm.log_probs(&[2, 3, 1]).unwrap());
    close(&row(&logits, 1), &lm.log_probs(&[4, 1]).unwrap());
}

#[test]
fn states_fork_reorder_and_truncate() {
    let lm = model(2);
    let prompt = ids(&[vec![0, 2], vec![0, 3]]);
    let mut state = start(&lm, 2);
    let _ = forward(&lm, LmInput::ids(&prompt), &mut state);
    let next = |state: &mut State, tokens: &[i64]| {
        forward(&lm, LmInput::ids(&Tensor::from_slice(tokens).unsqueeze(-1)), state)
    };
    let mut fork = state.fork().unwrap();
    let _ = next(&mut fork, &[4, 4]);
    fork.reorder(&[1, 1, 0]).unwrap();
    assert_eq!((fork.rows(), fork.len(), state.rows(), state.len()), (3, 3, 2, 2));
    // The original has not seen what the fork read.
    let logits = next(&mut state, &[1, 1]);
    close(&row(&logits, 1), &lm.log_probs(&[0, 3, 1]).unwrap());
    fork.truncate(2).unwrap();
    let logits = next(&mut fork, &[1, 4, 1]);
    for (i, context) in [[0, 3, 1], [0, 3, 4], [0, 2, 1]].iter().enumerate() {
        close(&row(&logits, i as i64), &lm.log_probs(context).unwrap());
    }
    fork.truncate(0).unwrap();
    close(&row(&next(&mut fork, &[2, 2, 2]), 0), &lm.log_probs(&[2]).unwrap());
    assert!(fork.truncate(9).is_err());
    assert!(fork.reorder(&[3]).is_err());
}

#[test]
fn soft_tokens_are_tokens() {
    let lm = model(2);
    let prompt = ids(&[vec![0, 2, 3], vec![4, 1, 1]]);
    let hard = forward(&lm, LmInput::ids(&prompt), &mut start(&lm, 2));
    let one_hot = Tensor::embedding(lm.embeddings(), &prompt, -1, false, false).set_requires_grad(true);
    let soft = forward(&lm, LmInput::embeds(&one_hot), &mut start(&lm, 2));
    assert!(hard.equal(&soft));
    assert!(soft.requires_grad());
    let last = forward(&lm, LmInput::ids(&prompt).last(), &mut start(&lm, 2));
    assert!(last.equal(&hard.narrow(1, 2, 1)));
    // A mixture of tokens mixes the logits.
    let mixed = Tensor::from_slice2(&[[0.0f32, 0.0, 0.25, 0.75, 0.0]]).view([1, 1, 5]);
    let logits = forward(&lm, LmInput::embeds(&mixed), &mut start(&lm, 1));
    let each = forward(&lm, LmInput::ids(&ids(&[vec![2], vec![3]])), &mut start(&lm, 2));
    let expected = (each.get(0) * 0.25 + each.get(1) * 0.75).unsqueeze(0);
    assert!(logits.allclose(&expected, 1e-6, 1e-6, false));
}

/// Adds to the logit of one token, at the head.
struct Favour(i64);

impl Control for Favour {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self(self.0))
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Linear, "lm_head")?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn linear(&self, _at: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
        let add = Tensor::f_zeros_like(&y)?;
        let _ = add.f_select(-1, self.0)?.f_fill_(5.0)?;
        Ok(y.f_add(&add)?)
    }
}

#[test]
fn controls_act_and_weights_are_mapped() {
    let lm = model(2);
    let prompt = ids(&[vec![0, 2]]);
    let plain = forward(&lm, LmInput::ids(&prompt), &mut start(&lm, 1));
    let controls = Controls::bind(lm.sites(), vec![Box::new(Favour(3))]).unwrap();
    let pass = Pass::with_controls(&controls);
    let logits = lm.handle().forward(LmInput::ids(&prompt), &mut start(&lm, 1), &pass).unwrap().logits;
    let difference =
        Vec::<f64>::try_from((logits - &plain).view([-1, 5]).get(1).to_kind(Kind::Double)).unwrap();
    close(&difference, &[0.0, 0.0, 0.0, 5.0, 0.0]);
    assert!(matches!(
        model(2).forward(LmInput::ids(&prompt), &mut start(&lm, 1), &pass),
        Err(Error::ForeignSites)
    ));

    let head = lm.sites().select(SiteKind::Linear, "lm_head").unwrap()[0];
    let mapped = lm.mapped(&mut |site, w| Ok((site == head).then(|| w * 2.0))).unwrap();
    let logits = forward(&mapped, LmInput::ids(&prompt), &mut start(&lm, 1));
    assert!(logits.equal(&(&plain * 2.0)));
    close(&row(&logits, 0), &mapped.log_probs(&[0, 2]).unwrap());
    assert!(forward(&lm, LmInput::ids(&prompt), &mut start(&lm, 1)).equal(&plain));
    assert_eq!(mapped.embeddings().data_ptr(), lm.embeddings().data_ptr(), "the rest is shared");
    assert_eq!(lm.handle().embeddings().data_ptr(), lm.embeddings().data_ptr());
}

#[test]
fn bad_input_is_refused() {
    let bad = |change: fn(&mut TableLmConfig)| {
        let mut config = TableLmConfig::default();
        change(&mut config);
        assert!(matches!(TableLm::new(&config), Err(Error::Value { .. })), "{config:?}");
    };
    bad(|c| c.vocab = 1);
    bad(|c| c.order = 3);
    bad(|c| c.context = 0);
    bad(|c| c.bos = Some(5));
    bad(|c| c.eos = vec![-1]);
    bad(|c| c.pad = Some(9));
    bad(|c| c.scale = f64::NAN);
    let config = TableLmConfig { vocab: 2, order: 1, bos: None, ..TableLmConfig::default() };
    assert!(matches!(TableLm::from_logits(&config, &[0.0; 3]), Err(Error::Shape { .. })));
    assert!(matches!(
        TableLm::from_logits(&config, &[0.0, 0.0, f64::NAN, 0.0]),
        Err(Error::NotFinite { .. })
    ));
    let no_bos = TableLm::from_logits(&config, &[0.0; 4]).unwrap();
    assert!(matches!(no_bos.enumerate(2), Err(Error::Value { .. })));

    let lm = TableLm::new(&TableLmConfig { context: 4, ..TableLmConfig::default() }).unwrap();
    let one = |lm: &TableLm, input: LmInput<'_>| lm.forward(input, &mut start(lm, 1), &Pass::default());
    assert!(matches!(one(&lm, LmInput::ids(&ids(&[vec![5]]))), Err(Error::Value { .. })));
    assert!(matches!(one(&lm, LmInput::ids(&ids(&[vec![1], vec![1]]))), Err(Error::Value { .. })));
    let long = one(&lm, LmInput::ids(&ids(&[vec![1; 5]])));
    assert!(matches!(long, Err(Error::Context { limit: 4, needed: 5 })));
    let four = ids(&[vec![4]]);
    assert!(matches!(
        one(&lm, LmInput::ids(&ids(&[vec![2]])).positions(Some(&four))),
        Err(Error::Value { .. })
    ));
    assert!(lm.start(Source::Rows(0), &Pass::default()).is_err());
    let encoder = lm.start(Source::Encoder(LmInput::ids(&four)), &Pass::default());
    assert!(matches!(encoder, Err(Error::Unsupported { .. })));
    assert!(lm.log_probs(&[]).is_err() && lm.log_probs(&[5]).is_err() && lm.log_prob(&[0], &[7]).is_err());
    let big = TableLm::random(64, 0).unwrap();
    assert!(big.enumerate(6).is_err(), "too many sequences");
    // A refused pass leaves the state as it was.
    let mut state = start(&lm, 1);
    assert!(lm.forward(LmInput::ids(&ids(&[vec![1; 5]])), &mut state, &Pass::default()).is_err());
    assert_eq!(state.len(), 0);
}
