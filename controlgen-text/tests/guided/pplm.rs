//! PPLM against the method in plain PyTorch: the cases of `benches/reference/pplm_fixtures.py`.

use controlgen_core::testing::contract;
use controlgen_core::{
    EnableGrad, Error, LanguageModel, LmInput, LmSpec, Pass, Placement, Result, TokenControls,
};
use controlgen_text::models;
use controlgen_text::pplm::{Attribute, BagOfWords, LinearHead, Pplm, PplmSettings, Seen};
use controlgen_text::search::{
    BeamSearch, Choice, ContrastiveSearch, Hypothesis, Search, Smc, Speculative, Task, prefill,
};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::bad_input::told;
use crate::{folder, table};

fn open(name: &str) -> Box<dyn LanguageModel> {
    tch::set_num_threads(1);
    models::open(&folder(name), Placement::CPU).unwrap()
}

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

fn numbers(value: &Value) -> Tensor {
    let all: Vec<f64> = value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    Tensor::from_slice(&all).to_kind(Kind::Float)
}

fn settings(value: &Value) -> PplmSettings {
    let number = |field: &str| value[field].as_f64().unwrap();
    PplmSettings {
        step_size: number("step_size"),
        num_iterations: value["num_iterations"].as_u64().unwrap() as usize,
        gamma: number("gamma"),
        kl_scale: number("kl_scale"),
        gm_scale: number("gm_scale"),
        window: value["window"].as_u64().map(|n| n as usize),
    }
}

/// log p `[B, n, V]` after each of the last `n` tokens, read one by one or at once.
fn steered(lm: &dyn LanguageModel, texts: &[Vec<i64>], n: usize, at_once: bool) -> Tensor {
    let pass = Pass::default();
    let prompts: Vec<Vec<i64>> = texts.iter().map(|text| text[..text.len() - n].to_vec()).collect();
    let (mut state, _) = prefill(lm, &prompts, &pass, 0).unwrap();
    let last: Vec<i64> = texts.iter().flat_map(|text| text[text.len() - n..].to_vec()).collect();
    let last = Tensor::from_slice(&last).view([texts.len() as i64, -1]);
    if at_once {
        return lm.forward(LmInput::ids(&last), &mut state, &pass).unwrap().logits;
    }
    let step =
        |at| lm.forward(LmInput::ids(&last.narrow(1, at, 1)).last(), &mut state, &pass).unwrap().logits;
    Tensor::cat(&(0..n as i64).map(step).collect::<Vec<_>>(), 1)
}

#[test]
fn log_probabilities_are_those_of_plain_pytorch() {
    let _guard = tch::no_grad_guard();
    let fixture: Value = serde_json::from_slice(&std::fs::read(folder("pplm.json")).unwrap()).unwrap();
    let texts: Vec<Vec<i64>> = fixture["texts"].as_array().unwrap().iter().map(ids).collect();
    let n = fixture["steered"].as_u64().unwrap() as usize;
    let mut worst = 0f64;
    for case in fixture["cases"].as_array().unwrap() {
        let lm = open(case["model"].as_str().unwrap());
        let width = lm.spec().width;
        let settings = settings(&case["settings"]);
        let pplm = if case["attribute"] == "bag" {
            Pplm::new(lm, BagOfWords::new(ids(&fixture["bag"])).unwrap(), settings)
        } else {
            let (weight, bias) = (numbers(&case["weight"]).view([3, width]), numbers(&case["bias"]));
            Pplm::new(lm, LinearHead::new(&weight, &bias, 1).unwrap(), settings)
        };
        let pplm = pplm.unwrap();
        let expected: Vec<Tensor> = case["expected"]
            .as_array()
            .unwrap()
            .iter()
            .map(|rows| Tensor::stack(&rows.as_array().unwrap().iter().map(numbers).collect::<Vec<_>>(), 0))
            .collect();
        // In one batch, with prompts of different lengths, and alone; one by one, and at once.
        let together = steered(&pplm, &texts, n, false);
        for (i, expected) in expected.iter().enumerate() {
            let alone = steered(&pplm, &texts[i..=i], n, true);
            for found in [together.get(i as i64), alone.get(0)] {
                let off = (found - expected).abs().max().double_value(&[]);
                assert!(off <= 1e-4, "text {i}, off by {off}: {}", case["settings"]);
                worst = worst.max(off);
            }
        }
    }
    println!("log-probabilities differ by at most {worst:.1e}");
}

/// With steps too small to see it is the model, and keeps what a model keeps; gradients take the changes for constants.
#[test]
fn contract_of_language_models() {
    let small = PplmSettings { step_size: 1e-9, num_iterations: 1, window: None, ..PplmSettings::default() };
    for name in ["gpt2_gelu_new", "llama_gqa_tied"] {
        let lm = open(name);
        let head = Tensor::ones([2, lm.spec().width], (Kind::Float, tch::Device::Cpu));
        let head = LinearHead::new(&head, &Tensor::from_slice(&[0.0f32, 1.0]), 0).unwrap();
        let bag = BagOfWords::new([3, 5]).unwrap();
        contract::language_model(&Pplm::new(lm.handle(), bag, small).unwrap())
            .unwrap_or_else(|violation| panic!("{name}, bag: {violation}"));
        contract::language_model(&Pplm::new(lm, head, small).unwrap())
            .unwrap_or_else(|violation| panic!("{name}, head: {violation}"));
    }
}

fn complete(lm: &dyn LanguageModel, prompts: &[Vec<i64>], search: &dyn Search) -> Vec<Hypothesis> {
    let (controls, pass) = (TokenControls::new(), Pass::default());
    let task = Task { lm, prompts, controls: &controls, pass, max_new_tokens: 5, eos: &[], n: 1 };
    search.run(&task, &mut ()).unwrap()
}

/// Every search, and what a prompt gets does not depend on the batch.
#[test]
fn searches() {
    let lm = open("llama_rope_llama3");
    let strong = PplmSettings { step_size: 0.3, gamma: 1.0, gm_scale: 0.95, ..PplmSettings::default() };
    let bag = BagOfWords::new([4, 19, 27]).unwrap();
    let pplm = Pplm::new(lm.handle(), bag.clone(), strong).unwrap();
    let prompts = [vec![5i64, 17, 40, 8], vec![33, 2], vec![9]];
    let sampled = Choice::Sample { seed: 3, first: 0 };
    let searches: [(&str, Box<dyn Search>); 6] = [
        ("greedy", Box::new(Choice::Greedy)),
        ("sampling", Box::new(sampled)),
        ("beams", Box::new(BeamSearch::new(3).unwrap())),
        ("contrastive search", Box::new(ContrastiveSearch::new(0.5, 3).unwrap())),
        ("particles", Box::new(Smc::new(4, 1).unwrap())),
        ("look-up", Box::new(Speculative::prompt_lookup(Choice::Greedy, 2, 3).unwrap())),
    ];
    let mut greedy = Vec::new();
    for (name, search) in searches {
        let together = complete(&pplm, &prompts, &*search);
        for (i, prompt) in prompts.iter().enumerate().take(if name == "sampling" { 1 } else { 3 }) {
            let alone = complete(&pplm, std::slice::from_ref(prompt), &*search);
            if name != "particles" || i == 0 {
                assert_eq!(alone[0].ids, together[i].ids, "{name}, prompt {i}");
            }
        }
        if name == "greedy" {
            greedy = together.iter().map(|h| h.ids.clone()).collect();
        } else if name == "look-up" {
            assert_eq!(greedy, together.iter().map(|h| h.ids.clone()).collect::<Vec<_>>());
        }
    }
    // The words come: that is what it is for.
    let share = |lm: &dyn LanguageModel| {
        let done = complete(lm, &prompts, &Choice::Greedy);
        done.iter().flat_map(|h| &h.ids).filter(|id| [4, 19, 27].contains(id)).count()
    };
    let (steered, own) = (share(&pplm), share(&*lm));
    println!("{steered} words of the bag, {own} without");
    assert!(steered > own);
}

/// Loses the graph, or says the wrong thing.
struct Broken(Loss);

type Loss = fn(&Seen<'_>) -> Tensor;

impl Attribute for Broken {
    fn handle(&self) -> Box<dyn Attribute> {
        Box::new(Self(self.0))
    }
    fn check(&self, _spec: &LmSpec) -> Result<()> {
        Ok(())
    }
    fn loss(&self, seen: &Seen<'_>) -> Result<Tensor> {
        Ok((self.0)(seen))
    }
}

#[test]
fn bad_input() {
    let lm = open("gpt2_gelu_new");
    let bag = || BagOfWords::new([3]).unwrap();
    let of = |settings| Pplm::new(lm.handle(), bag(), settings);
    let usual = PplmSettings::default();
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        told(of(PplmSettings { step_size: bad, ..usual }), "step_size");
    }
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        told(of(PplmSettings { gamma: bad, ..usual }), "gamma");
        told(of(PplmSettings { kl_scale: bad, ..usual }), "kl_scale");
        told(of(PplmSettings { gm_scale: bad, ..usual }), "gm_scale");
    }
    told(of(PplmSettings { num_iterations: 0, ..usual }), "num_iterations");
    told(of(PplmSettings { window: Some(0), ..usual }), "window");
    told(BagOfWords::new([]), "words of a bag");
    told(BagOfWords::new([-1]), "token id of a bag");
    let vocab = lm.spec().vocab;
    told(Pplm::new(lm.handle(), BagOfWords::new([vocab]).unwrap(), usual), "token id of a bag");
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, tch::Device::Cpu));
    told(LinearHead::new(&zeros(&[3]), &zeros(&[3]), 0), "weight of a linear head: expected shape [C, D]");
    told(LinearHead::new(&zeros(&[3, 4]), &zeros(&[2]), 0), "bias of a linear head: expected shape [3]");
    told(
        LinearHead::new(&zeros(&[3, 4]), &zeros(&[3]), 3),
        "class of a linear head: expected 0 .. 3, found 3",
    );
    let narrow = LinearHead::new(&zeros(&[3, 4]), &zeros(&[3]), 0).unwrap();
    told(Pplm::new(lm.handle(), narrow, usual), "as wide as the model, found [3, 4]");
    told(Pplm::new(Box::new(table(5, 1)), bag(), usual), "PPLM over a model without attention sites");
    let t5 = Pplm::new(open("t5_v1_0"), bag(), usual);
    told(t5, "PPLM over an encoder–decoder");
    let _guard = tch::no_grad_guard();
    let wrong: [(Loss, &str); 2] = [
        (|seen| seen.log_p.sum(Kind::Float), "loss of an attribute: expected shape [1], one a row, found []"),
        (|seen| seen.log_p.narrow(1, 0, 1).squeeze_dim(1) * f64::NAN, "NaN"),
    ];
    for (loss, words) in wrong {
        let pplm = Pplm::new(lm.handle(), Broken(loss), usual).unwrap();
        let (mut state, _) = prefill(&lm.handle(), &[vec![1, 2]], &Pass::default(), 0).unwrap();
        let input = Tensor::from_slice(&[3i64]).unsqueeze(0);
        let foreign = pplm.forward(LmInput::ids(&input), &mut state, &Pass::default());
        assert!(matches!(foreign, Err(Error::ForeignState { .. })));
        let mut state = pplm.start(controlgen_core::Source::Rows(1), &Pass::default()).unwrap();
        let first = Tensor::from_slice(&[1i64]).unsqueeze(0);
        let _ = pplm.forward(LmInput::ids(&first), &mut state, &Pass::default()).unwrap();
        told(pplm.forward(LmInput::ids(&input), &mut state, &Pass::default()), words);
        assert_eq!(state.len(), 1, "the state is as it was");
    }
    // Gradients are as they were after an error.
    assert!(!controlgen_core::is_recording());
    let _on = EnableGrad::new();
}
