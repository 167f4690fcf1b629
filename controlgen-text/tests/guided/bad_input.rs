//! What is refused.

use controlgen_core::testing::TableLm;
use controlgen_core::testing::TableLmConfig;
use controlgen_core::{
    Error, LanguageModel, LmInput, Pass, Result, Rows, Source, TokenControl, TokenControls,
};
use controlgen_text::arithmetic::{ModelArithmetic, Term, contrastive_decoding};
use controlgen_text::controls::{Fudge, FutureDiscriminator, Gedi};
use controlgen_text::search::{Choice, Search, Task};
use tch::{Kind, Tensor};

use crate::fudge::Letters;
use crate::table;

fn term(vocab: i64) -> Term {
    Term::new(Box::new(table(vocab, 1)))
}

#[track_caller]
pub fn told<T>(made: Result<T>, words: &str) {
    let Err(error) = made else { panic!("no error, where {words:?} was expected") };
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn expressions() {
    let a = term(5);
    told(
        ModelArithmetic::new(&a - &term(6)),
        "vocabulary of a term: expected 5 tokens, as the first term has, found 6",
    );
    told(ModelArithmetic::new(&a - &a), "at least one with a factor other than 0");
    told(ModelArithmetic::new(f64::NAN * &a), "factor: NaN at term 0");
    told(ModelArithmetic::new(&a + f64::INFINITY * a.instead([2])), "factor: infinity at term 1");
    told(ModelArithmetic::new(&a + a.instead([])), "text in the prompt's place: expected at least one token");
    told(ModelArithmetic::new(&a + a.after([5])), "token id of a term: expected 0 .. 5, found 5");
    told(ModelArithmetic::new(&a + a.instead([-1])), "token id of a term");
    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        told(ModelArithmetic::new(a.temperature(temperature)), "temperature of a term");
    }
    for alpha in [0.0, -0.1, 1.5, f64::NAN] {
        told(
            ModelArithmetic::new(contrastive_decoding(&a, &a.instead([2]), alpha)),
            "alpha of plausible tokens",
        );
    }
    told(
        ModelArithmetic::new(&a - a.instead([2])).unwrap().normalised(),
        "the sum of factors that is divided by",
    );
    told(ModelArithmetic::new(-&a).unwrap().normalised(), "above 0, found -1");
    told(a.first_layers(1), "not supported");
}

#[test]
fn texts_past_the_context() {
    let config = TableLmConfig { context: 8, ..TableLmConfig::default() };
    let a = Term::new(Box::new(TableLm::new(&config).unwrap()));
    let made = ModelArithmetic::new(&a + a.after([2; 8]));
    assert!(matches!(made, Err(Error::Context { limit: 8, needed: 9 })));
    let lm = ModelArithmetic::new(&a + a.after([2; 5]) - a.instead([3; 3])).unwrap();
    assert_eq!(lm.spec().context, 3);
    let controls = TokenControls::new();
    let run = |prompt: Vec<i64>| {
        let prompts = [prompt];
        let (pass, eos) = (Pass::default(), &[][..]);
        let task =
            Task { lm: &lm, prompts: &prompts, controls: &controls, pass, max_new_tokens: 9, eos, n: 1 };
        Choice::Greedy.run(&task, &mut ())
    };
    assert!(matches!(run(vec![2; 4]), Err(Error::Context { limit: 3, needed: 4 })));
    // One that fits ends where the longest term does.
    assert_eq!(run(vec![2, 3]).unwrap()[0].ids.len(), 2);
}

#[test]
fn what_was_not_read_is_not_told_and_not_forgotten() {
    let a = term(5);
    let lm = ModelArithmetic::new(&a - 0.5 * a.instead([2, 3, 4])).unwrap();
    let mut state = lm.start(Source::Rows(1), &Pass::default()).unwrap();
    let ids = Tensor::from_slice(&[0i64, 2, 3, 2]).unsqueeze(0);
    let logits = lm.forward(LmInput::ids(&ids), &mut state, &Pass::default()).unwrap().logits;
    assert!(logits.narrow(1, 0, 3).isnan().all().int64_value(&[]) == 1, "within the prompt");
    assert!(logits.narrow(1, 3, 1).isfinite().all().int64_value(&[]) == 1);
    told(state.truncate(2), "forgetting a part of a prompt that a term does not read");
    let scored = controlgen_text::score_text(&lm, &[0, 2, 3, 2], 4, 1, &Pass::default());
    assert!(matches!(scored, Err(Error::NotFinite { .. })));
    state.truncate(0).unwrap();
    let again = lm.forward(LmInput::ids(&ids).last(), &mut state, &Pass::default()).unwrap().logits;
    assert!(again.allclose(&logits.narrow(1, 3, 1), 1e-6, 1e-6, false));
    let mut other = ModelArithmetic::new(&a).unwrap().start(Source::Rows(1), &Pass::default()).unwrap();
    assert!(matches!(
        lm.forward(LmInput::ids(&ids), &mut other, &Pass::default()),
        Err(Error::ForeignState { .. })
    ));
    assert!(state.reorder(&[1]).is_err());
}

/// Says the wrong thing.
#[derive(Clone)]
struct Wrong(Says);

type Says = fn(&Tensor) -> Tensor;

impl FutureDiscriminator for Wrong {
    type State = ();
    fn vocab(&self) -> i64 {
        5
    }
    fn start(&self, _prompts: &[Vec<i64>]) -> Result<()> {
        Ok(())
    }
    fn log_probs(&self, _state: &mut (), candidates: &Tensor) -> Result<Tensor> {
        Ok((self.0)(candidates))
    }
    fn advance(&self, _state: &mut (), _tokens: &[i64]) -> Result<()> {
        Ok(())
    }
}

#[test]
fn discriminators() {
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        told(Fudge::new(Letters { vocab: 5 }, weight, 5), "FUDGE's weight");
    }
    told(Fudge::new(Letters { vocab: 5 }, 1.0, 0), "FUDGE's top_k");
    let prompts = [vec![0i64], vec![2]];
    let logits = || Tensor::zeros([2, 5], (Kind::Float, tch::Device::Cpu));
    let wider = Fudge::new(Letters { vocab: 6 }, 1.0, 3).unwrap();
    let mut state = wider.start(&prompts).unwrap();
    told(
        wider.score(&mut state, logits()),
        "vocabulary of a discriminator: expected 5 tokens, as the model has, found 6",
    );
    let wrong: [(Says, &str); 4] = [
        (|c| c.narrow(1, 0, 1).to_kind(Kind::Float), "expected shape [2, 3], one a candidate, found [2, 1]"),
        (Tensor::shallow_clone, "expected element type a floating-point type, found Int64"),
        (|c| c.to_kind(Kind::Float) * f64::NAN, "NaN at a candidate"),
        (|c| c.to_kind(Kind::Float) * 0.0 + 0.5, "expected at most 0, found 0.5"),
    ];
    for (wrong, words) in wrong {
        let control = Fudge::new(Wrong(wrong), 1.0, 3).unwrap();
        let mut state = control.start(&prompts).unwrap();
        told(control.score(&mut state, logits()), words);
    }
    let control = Fudge::new(Letters { vocab: 5 }, 1.0, 3).unwrap();
    let mut state = control.start(&prompts).unwrap();
    told(control.score(&mut state, logits().narrow(0, 0, 1)), "rows of logits");
    told(control.advance(&mut state, &[1]), "rows of tokens");
}

#[test]
fn classes() {
    let a = term(5);
    let two = [a.after([2]), a.after([3])];
    told(Gedi::new(&two[..1], 0, 1.0), "classes: expected at least 2");
    told(Gedi::new(&two, 2, 1.0), "the desired class: expected 0 .. 2, found 2");
    told(Gedi::new(&[a.prompt(), term(6)], 0, 1.0), "vocabulary of a term");
    told(Gedi::new(&[a.prompt(), a.after([9])], 0, 1.0), "token id of a term");
    for number in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        told(Gedi::new(&two, 0, number), "GeDi's weight");
        told(Gedi::new(&two, 0, 1.0).unwrap().length_scale(number), "GeDi's alpha");
    }
    let gedi = || Gedi::new(&two, 0, 1.0).unwrap();
    told(gedi().biases(&[0.0]), "biases: expected 2, one a class, found 1");
    told(gedi().biases(&[0.0, f64::NAN]), "bias: NaN");
    for (rho, tau) in [(0.0, 0.5), (1.1, 0.5), (f64::NAN, 0.5)] {
        told(gedi().filter(rho, tau), "GeDi's rho");
    }
    for tau in [-0.1, 1.1, f64::NAN] {
        told(gedi().filter(0.5, tau), "GeDi's tau");
    }
    let mut state = gedi().start(&[vec![0], vec![2, 3]]).unwrap();
    let logits = |rows, vocab| Tensor::zeros([rows, vocab], (Kind::Float, tch::Device::Cpu));
    told(
        gedi().score(&mut state, logits(2, 6)),
        "vocabulary of GeDi's classes: expected 6 tokens, as the model has, found 5",
    );
    told(gedi().score(&mut state, logits(1, 5)), "rows of logits");
    told(gedi().advance(&mut state, &[1, 5]), "chosen token");
    told(gedi().advance(&mut state, &[1]), "rows of tokens");
    told(gedi().start(&[vec![]]), "prompt 0");
    told(gedi().start(&[vec![7]]), "token id");
    let config = TableLmConfig { context: 4, ..TableLmConfig::default() };
    let short = Term::new(Box::new(TableLm::new(&config).unwrap()));
    let control = Gedi::new(&[short.after([2]), short.after([3, 3])], 0, 1.0).unwrap();
    let mut state = control.start(&[vec![0, 2]]).unwrap();
    control.advance(&mut state, &[2]).unwrap();
    assert!(matches!(control.score(&mut state, logits(1, 5)), Err(Error::Context { limit: 4, needed: 5 })));
}
