//! One forward pass: inputs, states and controls that are not what the model takes.

use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{
    At, Binding, Control, Controls, Error, Lanes, LanguageModel, LmInput, Pass, Result, Rows, SiteKind,
    SiteMap, Source,
};
use tch::{Device, Kind, Tensor};

use crate::support::{MODELS, forward, ids, open, refused, same, start};

#[test]
fn token_ids() {
    for model in MODELS {
        let lm = open(model);
        let vocab = lm.spec().vocab;
        let run = |tokens: &Tensor| forward(&*lm, LmInput::ids(tokens), &mut start(&*lm, 2));
        for bad in [-1, vocab, i64::MIN, i64::MAX] {
            let says = [format!("0 .. {vocab}"), bad.to_string()];
            refused(run(&ids(&[2, 2], &[1, 2, bad, 3])), &["token id", &says[0], &says[1]]);
        }
        refused(run(&ids(&[4], &[1, 2, 3, 4])), &["[B, T]", "[4]"]);
        refused(run(&ids(&[2, 1, 2], &[1, 2, 3, 4])), &["[B, T]", "[2, 1, 2]"]);
        refused(run(&Tensor::from(3i64)), &["[B, T]", "[]"]);
        refused(run(&ids(&[2, 1], &[1, 2]).to_kind(Kind::Int)), &["token ids", "Int64", "Int"]);
        refused(run(&ids(&[2, 1], &[1, 2]).to_kind(Kind::Float)), &["token ids", "Int64", "Float"]);
        refused(run(&Tensor::zeros([2, 0], (Kind::Int64, Device::Cpu))), &["at least one", "[2, 0]"]);
        refused(run(&Tensor::zeros([0, 2], (Kind::Int64, Device::Cpu))), &["at least one", "[0, 2]"]);
    }
}

#[test]
fn embeddings() {
    for model in MODELS {
        let lm = open(model);
        let width = lm.spec().width;
        let run = |embeds: &Tensor| forward(&*lm, LmInput::embeds(embeds), &mut start(&*lm, 1));
        let zeros = |shape: &[i64], kind| Tensor::zeros(shape, (kind, Device::Cpu));
        assert!(run(&zeros(&[1, 2, width], Kind::Float)).is_ok());
        refused(run(&zeros(&[1, 2, width + 1], Kind::Float)), &[&format!("[1, 2, {width}]")]);
        refused(run(&zeros(&[1, 2, 1], Kind::Float)), &[&format!("[1, 2, {width}]")]);
        refused(run(&zeros(&[1, width], Kind::Float)), &["[B, T, D]"]);
        refused(run(&zeros(&[1, 0, width], Kind::Float)), &["at least one"]);
        for kind in [Kind::Double, Kind::BFloat16, Kind::Int64] {
            refused(run(&zeros(&[1, 2, width], kind)), &["embeddings", "Float", &format!("{kind:?}")]);
        }
    }
}

#[test]
fn padding_and_positions() {
    for model in MODELS {
        let lm = open(model);
        let tokens = ids(&[2, 3], &[1, 2, 3, 4, 5, 6]);
        let keep = |keep: &Tensor| forward(&*lm, LmInput::ids(&tokens).keep(Some(keep)), &mut start(&*lm, 2));
        let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Bool, Device::Cpu));
        refused(keep(&ones(&[2, 2])), &["keep", "[2, 3]", "[2, 2]"]);
        refused(keep(&ones(&[1, 3])), &["keep", "[2, 3]", "[1, 3]"]);
        refused(keep(&ones(&[3])), &["keep", "[2, 3]", "[3]"]);
        refused(keep(&ones(&[2, 3]).to_kind(Kind::Int64)), &["keep", "Bool", "Int64"]);
        // A row of nothing but padding is strange, and no reason for a NaN in another row.
        let one_empty = ids(&[2, 3], &[0, 0, 0, 1, 1, 1]).ne(0);
        let logits = keep(&one_empty).unwrap();
        assert_eq!(logits.isfinite().all().int64_value(&[]), 1, "{model}");

        let positions = |positions: &Tensor| {
            forward(&*lm, LmInput::ids(&tokens).positions(Some(positions)), &mut start(&*lm, 2))
        };
        refused(positions(&ids(&[3], &[0, 1, 2])), &["positions", "[2, 3]", "[3]"]);
        refused(positions(&ids(&[1, 3], &[0, 1, 2])), &["positions", "[2, 3]", "[1, 3]"]);
        let float = ids(&[2, 3], &[0, 1, 2, 0, 1, 2]).to_kind(Kind::Float);
        refused(positions(&float), &["positions", "Int64", "Float"]);
        if model.starts_with("gpt2") {
            // Learned positions end.
            let context = lm.spec().context;
            refused(positions(&ids(&[2, 3], &[0, 1, context, 0, 1, 2])), &[&context.to_string()]);
            refused(positions(&ids(&[2, 3], &[0, 1, 2, 0, 1, i64::MAX])), &[&context.to_string()]);
            refused(positions(&ids(&[2, 3], &[0, 1, 2, -1, 1, 2])), &["position", "-1"]);
        }
    }
}

#[test]
fn the_context_ends() {
    let _guard = tch::no_grad_guard();
    for model in MODELS {
        let lm = open(model);
        let context = lm.spec().context;
        let mut state = start(&*lm, 1);
        let zeros = |len| Tensor::zeros([1, len], (Kind::Int64, Device::Cpu));
        refused(forward(&*lm, LmInput::ids(&zeros(context + 1)), &mut state), &[&context.to_string()]);
        assert_eq!(state.len(), 0, "what was refused was not read");
        let _ = forward(&*lm, LmInput::ids(&zeros(context - 1)), &mut state).unwrap();
        let error = refused(forward(&*lm, LmInput::ids(&zeros(2)), &mut state), &[]);
        assert!(
            matches!(error, Error::Context { limit, needed } if limit == context && needed == context + 1)
        );
        assert!(forward(&*lm, LmInput::ids(&zeros(1)), &mut state).is_ok());
        refused(forward(&*lm, LmInput::ids(&zeros(1)), &mut state), &["positions"]);
        assert_eq!(state.len(), context);
    }
}

#[test]
fn batches_that_differ() {
    let lm = open("mistral");
    for bad in [0, -1, i64::MIN] {
        refused(lm.start(Source::Rows(bad), &Pass::default()), &["at least 1", &bad.to_string()]);
    }
    let tokens = ids(&[1, 2], &[1, 2]);
    refused(lm.start(Source::Encoder(LmInput::ids(&tokens)), &Pass::default()), &["encoder"]);
    let mut state = start(&*lm, 3);
    let run = |rows: i64, state: &mut _| forward(&*lm, LmInput::ids(&tokens.repeat([rows, 1])), state);
    refused(run(2, &mut state), &["rows", "3", "2"]);
    let _ = run(3, &mut state).unwrap();
    refused(run(1, &mut state), &["rows", "3", "1"]);
    refused(state.reorder(&[0, 3]), &["row", "0 .. 3", "3"]);
    refused(state.reorder(&[-1]), &["row", "0 .. 3", "-1"]);
    refused(state.truncate(3), &["0 ..= 2", "3"]);
    refused(state.truncate(-1), &["0 ..= 2", "-1"]);
    assert_eq!((state.rows(), state.len()), (3, 2));
    state.reorder(&[]).unwrap();
    refused(run(1, &mut state), &["rows", "0", "1"]);
}

/// Caches of two models are of one type, and hold what the other cannot read.
#[test]
fn the_state_of_another_model() {
    let _guard = tch::no_grad_guard();
    let tokens = ids(&[1, 2], &[1, 2]);
    for (mine, other) in [
        ("mistral", "gpt2_gelu_new"),
        ("gpt2_gelu_new", "mistral"),
        ("llama_gqa_tied", "llama_mha_untied"),
        ("mistral", "mistral"),
    ] {
        let (lm, other) = (open(mine), open(other));
        let mut state = start(&*other, 1);
        for _ in 0..2 {
            let error = refused(forward(&*lm, LmInput::ids(&tokens), &mut state), &["this model"]);
            assert!(matches!(error, Error::ForeignState { .. }), "{error}");
            let _ = forward(&*other, LmInput::ids(&tokens), &mut state).unwrap();
        }
    }
    let table = TableLm::new(&TableLmConfig::default()).unwrap();
    let lm = open("mistral");
    refused(forward(&*lm, LmInput::ids(&tokens), &mut start(&table, 1)), &["state"]);
    refused(forward(&table, LmInput::ids(&tokens), &mut start(&*lm, 1)), &["state"]);

    // Handles and merged models are the same model.
    let mut state = start(&*lm, 1);
    let _ = forward(&*lm, LmInput::ids(&tokens), &mut state).unwrap();
    let _ = forward(&*lm.handle(), LmInput::ids(&tokens), &mut state).unwrap();
    let merged = lm.map_weights(&mut |_, w| Ok(Some(w * 2.0))).unwrap();
    let _ = forward(&*merged, LmInput::ids(&tokens), &mut state.fork().unwrap()).unwrap();
}

/// Fails at one site.
struct Failing(&'static str);

impl Control for Failing {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self(self.0))
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Hidden, self.0)?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn hidden(&self, _at: At<'_>, _h: Tensor, _residual: &Tensor) -> Result<Tensor> {
        Err(Error::unsupported("this control", "others"))
    }
}

#[test]
fn lanes_of_another_number_of_rows() {
    for name in MODELS {
        let lm = open(name);
        let lanes = Lanes::samples(3);
        let pass = Pass { lanes: Some(&lanes), ..Pass::default() };
        let mut state = start(&*lm, 1);
        let output = lm.forward(LmInput::ids(&ids(&[1, 2], &[1, 2])), &mut state, &pass);
        refused(output, &["lanes", "1, one a row", "3"]);
        assert!(state.is_empty());
    }
}

#[test]
fn the_controls_of_another_model() {
    let tokens = ids(&[1, 2], &[1, 2]);
    let (lm, other) = (open("mistral"), open("mistral"));
    let controls = Controls::bind(other.sites(), vec![]).unwrap();
    let pass = Pass::with_controls(&controls);
    let mut state = start(&*lm, 1);
    let error = refused(lm.forward(LmInput::ids(&tokens), &mut state, &pass), &["bound to another model"]);
    assert!(matches!(error, Error::ForeignSites));
    assert_eq!(state.len(), 0);
    lm.forward(LmInput::ids(&tokens), &mut state, &Pass::default()).unwrap();

    let error = refused(
        Controls::bind(lm.sites(), vec![Box::new(Failing("model.layers.1.mpl"))]),
        &["model.layers.1.mpl", "near it are", "model.layers.1.mlp"],
    );
    assert!(matches!(error, Error::NoSite { .. }));
}

/// A pass that failed half-way has read nothing: the state goes on as if it had not been.
#[test]
fn a_failed_pass_leaves_the_state_as_it_was() {
    let _guard = tch::no_grad_guard();
    let pairs = [("gpt2_gelu_new", "transformer.h.1.mlp"), ("mistral", "model.layers.1.mlp")];
    for (model, site) in pairs {
        let lm = open(model);
        let controls = Controls::bind(lm.sites(), vec![Box::new(Failing(site))]).unwrap();
        let (head, lost, tail) =
            (ids(&[2, 2], &[1, 2, 3, 4]), ids(&[2, 40], &[9; 80]), ids(&[2, 1], &[5, 6]));
        let mask = ids(&[2, 40], &[0; 80]).eq(1);
        let run = |fail: bool| {
            let mut state = start(&*lm, 2);
            let _ = forward(&*lm, LmInput::ids(&head), &mut state).unwrap();
            if fail {
                let pass = Pass::with_controls(&controls);
                // Padded, and longer than the room there was.
                let input = LmInput::ids(&lost).keep(Some(&mask));
                refused(lm.forward(input, &mut state, &pass), &["this control"]);
                assert_eq!((state.rows(), state.len()), (2, 2));
                // In a fork, too.
                refused(lm.forward(input, &mut state.fork().unwrap(), &pass), &["this control"]);
            }
            forward(&*lm, LmInput::ids(&tail), &mut state).unwrap()
        };
        assert!(same(&run(true), &run(false)), "{model}");
    }
}
