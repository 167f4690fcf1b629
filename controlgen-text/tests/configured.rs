//! What a configuration asks for is what the builder makes, search by search and control by control.
#![allow(clippy::unwrap_used, clippy::panic, clippy::needless_pass_by_value)] // `json!` is written where it is used

use std::path::Path;

use controlgen_core::Result;
use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_text::controls::features::{Features, WordList};
use controlgen_text::controls::{LexicalConstraints, Regularised, Regulariser, Temperature, Watermark};
use controlgen_text::grammar::Grammar;
use controlgen_text::lexical::{Clause, Clauses};
use controlgen_text::search::{
    BeamSearch, BestOf, Choice, ContrastiveSearch, DiverseBeamSearch, GridBeamSearch, NeuroLogic, Smc,
    Speculative, StochasticBeamSearch,
};
use controlgen_text::tokenizer::Tokenizer;
use controlgen_text::{Generate, GenerationConfig, TextModel};
use serde_json::{Value, json};

fn model() -> TextModel {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/byte_level");
    let tokenizer = Tokenizer::open(folder).unwrap();
    let vocab = tokenizer.vocab_size();
    let config = TableLmConfig { vocab, order: 1, eos: vec![300], scale: 2.5, ..TableLmConfig::default() };
    TextModel::new(Box::new(TableLm::new(&config).unwrap()), tokenizer).unwrap()
}

/// The texts of two prompts.
fn texts(generate: Generate<'_>) -> Result<Vec<(Vec<i64>, f64)>> {
    let completions = generate.run()?.completions;
    Ok(completions.into_iter().map(|completion| (completion.ids, completion.score)).collect())
}

#[track_caller]
fn same(model: &TextModel, json: Value, build: impl for<'a> FnOnce(Generate<'a>) -> Result<Generate<'a>>) {
    let start = || model.generate_batch(["The sky", "a"]).max_new_tokens(6).sample(9);
    let config: GenerationConfig = serde_json::from_value(json.clone()).unwrap();
    let said = texts(start().config(&config)).unwrap_or_else(|error| panic!("{json}: {error}"));
    let built = texts(build(start()).unwrap()).unwrap();
    assert_eq!(said, built, "{json}");
    let plain = texts(start().greedy()).unwrap();
    assert!(json["method"] == "greedy" || said != plain, "{json} changes nothing");
    // What is written down reads as the same.
    let written = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<GenerationConfig>(&written).unwrap(), config);
}

#[test]
fn methods() {
    let model = model();
    let sample = Choice::Sample { seed: 9, first: 0 };
    let beams = |n| BeamSearch::new(n);
    same(&model, json!({ "method": "greedy" }), |g| Ok(g.greedy()));
    same(&model, json!({ "method": "sample", "temperature": 0.5 }), |g| {
        Ok(g.with(Temperature::new(0.5)?).sample(9))
    });
    same(&model, json!({ "method": "beam" }), |g| Ok(g.search(beams(4)?)));
    same(&model, json!({ "method": "beam", "num_beams": 3, "length_penalty": 0.5 }), |g| {
        Ok(g.search(beams(3)?.length_penalty(0.5)?))
    });
    let groups = json!({ "method": "diverse_beam", "num_beam_groups": 2, "diversity_penalty": 2.0 });
    same(&model, groups, |g| Ok(g.search(DiverseBeamSearch::new(beams(4)?, 2, 2.0)?)));
    same(&model, json!({ "method": "stochastic_beam", "num_beams": 2 }), |g| {
        Ok(g.search(StochasticBeamSearch::new(2, 9)?))
    });
    same(
        &model,
        json!({ "method": "contrastive", "penalty_alpha": 0.9, "top_k": 5, "max_new_tokens": 30 }),
        |g| Ok(g.max_new_tokens(30).search(ContrastiveSearch::new(0.9, 5)?)),
    );
    same(&model, json!({ "method": "best_of", "num_samples": 3 }), |g| Ok(g.search(BestOf::new(3, 9)?)));
    same(&model, json!({ "method": "smc", "num_particles": 5, "temperature": 2.0 }), |g| {
        Ok(g.with(Temperature::new(2.0)?).search(Smc::new(5, 9)?))
    });
    let drafted = json!({ "method": "prompt_lookup", "do_sample": true, "prompt_lookup_num_tokens": 2 });
    same(&model, drafted, |g| Ok(g.search(Speculative::prompt_lookup(sample, 3, 2)?)));
}

#[test]
fn clauses() {
    let model = model();
    let words = json!([["a", "I"], ["!the", "of"]]);
    let clauses =
        Clauses::new(&model.token_trie().unwrap(), [Clause::any(["a", "I"]), Clause::any(["!the", "of"])]);
    let clauses = clauses.unwrap();
    let beams = || BeamSearch::new(4);
    same(&model, json!({ "method": "neurologic", "num_beams": 4, "clauses": words }), |g| {
        Ok(g.search(NeuroLogic::new(beams()?, &clauses)))
    });
    same(&model, json!({ "method": "neurologic", "num_beams": 4, "look_ahead": 2, "clauses": words }), |g| {
        Ok(g.search(NeuroLogic::new(beams()?, &clauses).look_ahead(2, 1.0)?))
    });
    same(&model, json!({ "method": "grid_beam", "num_beams": 4, "clauses": words }), |g| {
        Ok(g.search(GridBeamSearch::new(beams()?, &clauses)))
    });
    let control = || LexicalConstraints::new(&clauses, model.eos().to_vec());
    same(&model, json!({ "num_beams": 4, "clauses": words, "max_new_tokens": 6 }), |g| {
        Ok(g.with(control()?.within(6)).search(beams()?))
    });
    same(
        &model,
        json!({ "method": "smc", "num_particles": 60, "clause_reward": 2.0, "clauses": words }),
        |g| Ok(g.with(control()?.reward(2.0)?).search(Smc::new(60, 9)?)),
    );
}

#[test]
fn grammars_and_scores() {
    let model = model();
    let schema = json!({ "type": "array", "items": { "enum": [1, 22] }, "minItems": 1, "maxItems": 2 });
    same(&model, json!({ "json_schema": schema }), |g| {
        Ok(g.greedy().grammar(&Grammar::json_schema(&schema)?))
    });
    same(&model, json!({ "regex": "[a-c]{2,3}" }), |g| {
        Ok(g.greedy().grammar(&Grammar::regex("[a-c]{2,3}")?))
    });
    let lark = "start: \"x\" start | \"y\"";
    same(&model, json!({ "lark": lark }), |g| Ok(g.greedy().grammar(&Grammar::lark(lark)?)));
    same(&model, json!({ "choices": ["yes", "no"] }), |g| {
        Ok(g.greedy().grammar(&Grammar::choices(["yes", "no"])?))
    });
    for (name, regulariser) in [
        ("greedy", Regulariser::Greedy),
        ("variance", Regulariser::Variance),
        ("local", Regulariser::Local),
        ("max", Regulariser::Max),
        ("squared", Regulariser::Squared),
    ] {
        let said = json!({ "regularizer": name, "regularizer_weight": 0.8, "num_beams": 3 });
        same(&model, said, |g| Ok(g.with(Regularised::new(regulariser, 0.8)?).search(BeamSearch::new(3)?)));
    }
    let said =
        json!({ "features": [{ "words": ["a", "of"], "weight": 9.0 }, { "words": ["the"], "weight": -3 }] });
    let trie = model.token_trie().unwrap();
    same(&model, said, |g| {
        let features = Features::new(&trie)
            .with(9.0, WordList::new(["a", "of"])?)?
            .with(-3.0, WordList::new(["the"])?)?;
        Ok(g.greedy().with(features))
    });
    same(&model, json!({ "watermarking_config": { "bias": 6.0, "greenlist_ratio": 0.5 } }), |g| {
        Ok(g.greedy().with(Watermark::new(15_485_863, 0.5, 6.0)?))
    });
}

#[track_caller]
fn refused(model: &TextModel, json: Value, told: &[&str]) {
    let config: GenerationConfig = serde_json::from_value(json.clone()).unwrap();
    let error = model.generate("The sky").max_new_tokens(4).config(&config).run().unwrap_err().to_string();
    for part in told {
        assert!(error.contains(part), "{json}: {error}, without {part}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let model = model();
    refused(&model, json!({ "method": "neurologic" }), &["clauses", "neurologic", "at least one"]);
    refused(&model, json!({ "method": "contrastive", "do_sample": true }), &["do_sample", "contrastive"]);
    refused(&model, json!({ "method": "smc", "num_beams": 4 }), &["num_beams = 4", "smc"]);
    refused(&model, json!({ "method": "contrastive", "top_k": 4 }), &["penalty_alpha", "top_k"]);
    refused(&model, json!({ "method": "smc", "num_particles": 0 }), &["num_particles", "at least 1"]);
    refused(&model, json!({ "method": "diverse_beam" }), &["num_beam_groups", "at least 2"]);
    refused(&model, json!({ "clauses": [["a"], []] }), &["clause 1", "at least one"]);
    refused(&model, json!({ "clauses": [["of"], ["!of"]] }), &["clause 1", "contradicts"]);
    refused(&model, json!({ "regex": "a", "choices": ["a"] }), &["one of json_schema"]);
    refused(&model, json!({ "regex": "(" }), &["regular expression"]);
    refused(&model, json!({ "choices": [] }), &["choices", "at least one"]);
    refused(&model, json!({ "json_schema": { "not": {} } }), &["`not`"]);
    refused(&model, json!({ "regularizer": "max" }), &["regularizer_weight"]);
    refused(&model, json!({ "regularizer_weight": 0.5 }), &["regularizer"]);
    refused(&model, json!({ "watermarking_config": { "greenlist_ratio": 1.5 } }), &["gamma", "1.5"]);
    refused(&model, json!({ "features": [{ "words": [], "weight": 1.0 }] }), &["at least one"]);
    let unknown =
        serde_json::from_value::<GenerationConfig>(json!({ "method": "guess" })).unwrap_err().to_string();
    assert!(unknown.contains("guess") && unknown.contains("neurologic"), "{unknown}");
}
