//! Beams through `Generate`: texts, stop strings, the configuration.

use controlgen_core::progress::CancelToken;
use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{Error, Result, Rows, TokenControls};
use controlgen_text::search::{
    After, BeamSearch, Chosen, DiverseBeamSearch, Finish, Listener, Search as _, Task,
};
use controlgen_text::tokenizer::{Special, Tokenizer};
use controlgen_text::{GenerationConfig, TextModel};

use crate::{folder, task};

const PROMPTS: [&str; 2] = ["The sky", "a"];

/// A table over a tokenizer of 704 tokens, so that its texts are what they are by chance.
fn model() -> TextModel {
    let tokenizer = Tokenizer::open(folder("tokenizer/byte_level")).unwrap();
    let vocab = tokenizer.vocab_size();
    let config = TableLmConfig { vocab, order: 1, eos: vec![], scale: 2.5, ..TableLmConfig::default() };
    TextModel::new(Box::new(TableLm::new(&config).unwrap()), tokenizer).unwrap()
}

fn search(num_beams: usize) -> BeamSearch {
    BeamSearch::new(num_beams).unwrap()
}

/// Decodes everything anew at each token.
struct Decoded<'t> {
    tokenizer: &'t Tokenizer,
    stop: &'t str,
    rows: Vec<()>,
}

impl Listener for Decoded<'_> {
    fn token(&mut self, chosen: Chosen<'_>) -> Result<After> {
        let text = self.tokenizer.decode(&chosen.so_far.ids, true)?;
        Ok(if text.contains(self.stop) { After::Finish } else { After::Continue })
    }
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        self.rows.reorder(rows)
    }
}

#[test]
fn stop_strings_end_beams() {
    let model = model();
    let prompts: Vec<Vec<i64>> =
        PROMPTS.iter().map(|p| model.tokenizer().encode(p, Special::Add).unwrap()).collect();
    let plain = model.generate_batch(PROMPTS).eos([]).search(search(5)).n(5).max_new_tokens(6).run();
    let plain = plain.unwrap().completions;
    let (mut hits, none) = (0, TokenControls::new());
    // Pieces of what would have been said: each is hit by some beam, on the way or at the end.
    for of in &plain {
        let text: Vec<char> = of.text.chars().collect();
        for stop in text.windows(1).chain(text.windows(3)) {
            if stop.contains(&'\u{FFFD}') {
                continue; // half a character, which a token more may complete
            }
            let stop: String = stop.iter().collect();
            let done = model.generate_batch(PROMPTS).eos([]).stop([stop.as_str()]);
            let done = done.search(search(5)).n(5).max_new_tokens(6).run().unwrap();
            let task = Task { eos: &[], n: 5, max_new_tokens: 6, ..task(model.lm(), &prompts, &none) };
            let mut listener = Decoded { tokenizer: model.tokenizer(), stop: &stop, rows: vec![(); 2] };
            let expected = search(5).run(&task, &mut listener).unwrap();
            assert_eq!(done.completions.len(), expected.len());
            for (found, expected) in done.completions.iter().zip(&expected) {
                assert_eq!(
                    (&found.ids, &found.finish, found.prompt),
                    (&expected.ids, &expected.finish, expected.prompt),
                    "{stop:?}"
                );
                let whole = model.tokenizer().decode(&found.ids, true).unwrap();
                let cut = whole.find(&stop).unwrap_or(whole.len());
                assert_eq!(found.text, whole[..cut], "{stop:?}");
                let stopped = found.finish == Finish::Stopped;
                assert_eq!(found.stopped_by.as_deref(), stopped.then_some(stop.as_str()));
                hits += usize::from(stopped);
            }
        }
    }
    assert!(hits > 30, "{hits} texts were stopped");
}

#[test]
fn a_configuration_says_the_same() {
    let model = model();
    let config = |json: &str| serde_json::from_str::<GenerationConfig>(json).unwrap();
    let run = |generate: controlgen_text::Generate<'_>| {
        let done = generate.run().unwrap().completions;
        done.into_iter().map(|c| (c.ids, c.score)).collect::<Vec<_>>()
    };
    let eos = [11, 19, 77];
    let start = || model.generate_batch(PROMPTS).max_new_tokens(7).eos(eos);
    for (word, mode) in [("true", "WhenFull"), ("false", "Heuristic"), ("\"never\"", "Never")] {
        let beam = search(4).length_penalty(0.3).unwrap();
        let beam = beam.early_stopping(serde_json::from_str(word).unwrap());
        assert!(format!("{beam:?}").contains(mode), "{beam:?}");
        let said = config(&format!(
            r#"{{ "num_beams": 4, "length_penalty": 0.3, "early_stopping": {word}, "num_return_sequences": 3 }}"#
        ));
        assert_eq!(run(start().config(&said)), run(start().search(beam).n(3)));
        assert_eq!(serde_json::to_value(&said).unwrap()["early_stopping"].to_string(), word);
        let said = config(&format!(
            r#"{{ "num_beams": 4, "length_penalty": 0.3, "early_stopping": {word}, "num_return_sequences": 3,
                "num_beam_groups": 2, "diversity_penalty": 1.5 }}"#
        ));
        let diverse = DiverseBeamSearch::new(beam, 2, 1.5).unwrap();
        let found = run(start().config(&said));
        assert_eq!(found, run(start().search(diverse).n(3)));
        assert_ne!(found, run(start().search(beam).n(3)));
    }
    // What files of transformers say of beams without using any.
    let one = config(
        r#"{ "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "length_penalty": 2.0, "early_stopping": false }"#,
    );
    assert_eq!(run(start().config(&one)), run(start().greedy()));
}

#[test]
fn what_beams_cannot_do_is_refused() {
    let model = model();
    let refused = |json: &str, says: &[&str]| {
        let config: GenerationConfig = serde_json::from_str(json).unwrap();
        let error = model.generate("a").config(&config).run().unwrap_err().to_string();
        assert!(says.iter().all(|part| error.contains(part)), "{json}: {error}");
    };
    refused(r#"{ "num_beams": 0 }"#, &["num_beams", "at least 1"]);
    refused(r#"{ "num_beams": 4, "do_sample": true }"#, &["do_sample with num_beams = 4", "not supported"]);
    refused(r#"{ "num_beams": 4, "num_return_sequences": 5 }"#, &["n, completions", "num_beams = 4", "5"]);
    refused(r#"{ "num_beams": 4, "length_penalty": 51 }"#, &["length_penalty", "-50 ..= 50", "51"]);
    refused(r#"{ "num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1 }"#, &["divisor", "4", "3"]);
    refused(r#"{ "num_beams": 4, "num_beam_groups": 0 }"#, &["num_beam_groups", "0"]);
    refused(r#"{ "num_beam_groups": 2, "diversity_penalty": 1 }"#, &["divisor of num_beams = 1", "2"]);
    refused(r#"{ "num_beams": 4, "num_beam_groups": 2 }"#, &["diversity_penalty", "> 0", "0"]);
    refused(r#"{ "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": -1 }"#, &["> 0", "-1"]);
    refused(r#"{ "num_beams": 4, "diversity_penalty": 1 }"#, &["diversity_penalty", "num_beam_groups = 1"]);
    refused(r#"{ "num_beams": 2000000 }"#, &["num_beams", "at most 1048576", "2000000"]);
    for bad in ["1", "\"always\"", "null, \"x\": 1"] {
        let json = format!(r#"{{ "early_stopping": {bad} }}"#);
        assert!(serde_json::from_str::<GenerationConfig>(&json).is_err(), "{json}");
    }
    let streamed = model.generate("a").search(search(2)).on_text(|_| {}).run().unwrap_err();
    assert!(matches!(streamed, Error::Unsupported { .. }), "{streamed}");
    assert!(streamed.to_string().contains("taken back"), "{streamed}");
}

#[test]
fn steps_are_told_and_stop() {
    let model = model();
    let (mut steps, cancel) = (0, CancelToken::new());
    let done = model
        .generate_batch(PROMPTS)
        .eos([])
        .search(search(3))
        .max_new_tokens(6)
        .cancel(&cancel)
        .on_step(|tokens| {
            assert_eq!(tokens, 6, "three beams of two prompts");
            steps += 1;
            if steps == 4 {
                cancel.cancel();
            }
            controlgen_core::progress::Flow::Continue
        })
        .run()
        .unwrap();
    for completion in &done.completions {
        // The token is looked at before the step is told.
        assert_eq!((completion.ids.len(), &completion.finish), (5, &Finish::Cancelled));
    }
    assert_eq!(done.completions.iter().map(|c| c.prompt).collect::<Vec<_>>(), [0, 1]);
}
