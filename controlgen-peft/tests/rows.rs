//! Adapters row by row: a mixed batch is each row alone, through passes and through generation.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{difference, forward, ids, model, stir};
use controlgen_core::{Adapter, Controls, Error, Lanes, LanguageModel, LmInput, Offset, Pass, Rows, Source};
use controlgen_peft::{
    ActiveAdapters, Bottleneck, BottleneckConfig, Ia3, Ia3Config, Lora, LoraConfig, Prefix, PrefixConfig,
    Targets,
};
use controlgen_text::search::{Choice, Search, Task};
use tch::{Kind, Tensor};

const NAMES: [&str; 6] = ["a", "b", "ia3", "prefix", "long", "neck"];

/// Two LoRAs, (IA)³, two prefixes and a bottleneck for a model.
fn stack(lm: &dyn LanguageModel) -> Vec<Box<dyn Adapter>> {
    let sites = lm.sites();
    let gpt2 = lm.spec().architecture == "gpt2";
    let ia3: [&str; 3] =
        if gpt2 { ["c_attn.k", "c_attn.v", "mlp.c_proj"] } else { ["k_proj", "v_proj", "down_proj"] };
    let queries = if gpt2 { "c_attn.q" } else { "q_proj" };
    let b = LoraConfig { r: 2, target_modules: Targets::names([queries]), ..LoraConfig::default() };
    let config = Ia3Config {
        target_modules: Targets::names(ia3),
        feedforward_modules: Targets::names([ia3[2]]),
        ..Ia3Config::default()
    };
    let prefix = |num_virtual_tokens, seed| {
        let config = PrefixConfig { num_virtual_tokens, ..PrefixConfig::default() };
        Prefix::new(config, sites, seed).unwrap()
    };
    let all: Vec<Box<dyn Adapter>> = vec![
        Box::new(Lora::new(LoraConfig::default(), sites, 1).unwrap()),
        Box::new(Lora::new(b, sites, 2).unwrap()),
        Box::new(Ia3::new(config, sites).unwrap()),
        Box::new(prefix(3, 3)),
        Box::new(prefix(5, 4)),
        Box::new(Bottleneck::new(BottleneckConfig::default(), sites, 5).unwrap()),
    ];
    all.iter().zip([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).for_each(|(it, salt)| stir(&**it, salt));
    all
}

fn named(adapters: &[Box<dyn Adapter>]) -> Vec<(&'static str, &dyn Adapter)> {
    NAMES.into_iter().zip(adapters.iter().map(|it| &**it)).collect()
}

fn bind(lm: &dyn LanguageModel, adapters: &[&dyn Adapter]) -> Controls {
    Controls::bind(lm.sites(), adapters.iter().map(|it| it.handle()).collect()).unwrap()
}

/// What acts on each of eight rows.
fn mixture() -> Vec<Vec<&'static str>> {
    vec![
        vec!["a"],
        vec![],
        vec!["b", "prefix"],
        vec!["ia3"],
        vec!["prefix"],
        vec!["a", "b", "long", "neck"],
        vec!["a"],
        vec!["prefix", "ia3", "long"],
    ]
}

fn prompts() -> Vec<Vec<i64>> {
    let token = |row: i64, i: i64| 3 + (row * 17 + i * 29 + i * i) % 47;
    (0..8).map(|row| (0..4 + row % 4).map(|i| token(row, i)).collect()).collect()
}

/// Prompts padded on the left, and what is no padding.
fn padded(prompts: &[Vec<i64>]) -> (Tensor, Tensor) {
    let longest = prompts.iter().map(Vec::len).max().unwrap();
    let fill = |prompt: &Vec<i64>| [vec![0; longest - prompt.len()], prompt.clone()].concat();
    let keep =
        |prompt: &Vec<i64>| (0..longest).map(|i| i64::from(i >= longest - prompt.len())).collect::<Vec<_>>();
    let matrix = |rows: Vec<Vec<i64>>| ids(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
    (
        matrix(prompts.iter().map(fill).collect()),
        matrix(prompts.iter().map(keep).collect()).to_kind(Kind::Bool),
    )
}

/// The adapters of a row, in the order of the stack, without the others.
fn of_row<'a>(all: &[(&'static str, &'a dyn Adapter)], names: &[&str]) -> Vec<&'a dyn Adapter> {
    all.iter().filter(|(name, _)| names.contains(name)).map(|(_, it)| *it).collect()
}

#[test]
fn a_mixed_batch_is_each_row_alone() {
    let _guard = tch::no_grad_guard();
    let mut worst: (f64, f64) = (0.0, 0.0);
    for name in ["llama_gqa_tied", "llama_biased", "gpt2_gelu_new", "qwen3"] {
        let lm = model(name);
        let all = stack(&*lm);
        let all = named(&all);
        let together = bind(&*lm, &all.iter().map(|(_, it)| *it).collect::<Vec<_>>());
        // Equal lengths without a mask, and unequal ones.
        for ragged in [false, true] {
            let prompts: Vec<Vec<i64>> =
                prompts().iter().map(|p| if ragged { p.clone() } else { p[..4].to_vec() }).collect();
            let (tokens, keep) = padded(&prompts);
            let keep = ragged.then_some(keep);
            let column = ActiveAdapters::new(&all, &mixture()).unwrap();
            let mut lanes = Lanes::samples(8).with(column);
            let pass = Pass { lanes: Some(&lanes), ..Pass::with_controls(&together) };
            let mut state = lm.start(Source::Rows(8), &pass).unwrap();
            let input = LmInput::ids(&tokens).keep(keep.as_ref()).last();
            let first = lm.forward(input, &mut state, &pass).unwrap().logits;
            // Two rows end, the others change places and one is there twice; then two tokens more, one by one.
            let left = [7i64, 2, 4, 4, 5, 0, 1];
            state.reorder(&left).unwrap();
            lanes.reorder(&left).unwrap();
            let pass = Pass { lanes: Some(&lanes), ..Pass::with_controls(&together) };
            let token = Tensor::from_slice(&[9i64, 11, 13, 15, 17, 19, 21]).unsqueeze(1);
            let second = lm.forward(LmInput::ids(&token).last(), &mut state, &pass).unwrap().logits;
            let third = lm.forward(LmInput::ids(&token).last(), &mut state, &pass).unwrap().logits;

            for (row, names) in mixture().iter().enumerate() {
                let alone = bind(&*lm, &of_row(&all, names));
                let pass = Pass::with_controls(&alone);
                let mut state = lm.start(Source::Rows(1), &pass).unwrap();
                let prompt = ids(&[&prompts[row]]);
                let out = lm.forward(LmInput::ids(&prompt).last(), &mut state, &pass).unwrap().logits;
                let mut diff = difference(&first.narrow(0, row as i64, 1), &out);
                for (to, _) in left.iter().enumerate().filter(|(_, from)| **from == row as i64) {
                    let mut state = state.fork().unwrap();
                    let token = token.narrow(0, to as i64, 1);
                    for there in [&second, &third] {
                        let out = lm.forward(LmInput::ids(&token).last(), &mut state, &pass).unwrap().logits;
                        diff = diff.max(difference(&there.narrow(0, to as i64, 1), &out));
                    }
                }
                // Relative to logits of up to 30: what f32 can say.
                let largest = out.abs().max().double_value(&[]);
                assert!(diff <= 1e-5 * largest, "{name}, row {row}, ragged {ragged}: {diff} of {largest}");
                worst = (worst.0.max(diff), worst.1.max(diff / largest));
            }
        }
    }
    println!(
        "a mixed batch from its rows alone: at most {:.2e}, {:.2e} of the largest logit",
        worst.0, worst.1
    );
}

/// Through the search, with rows that finish early and several samples of each prompt.
#[test]
fn generation_in_a_mixed_batch_is_each_prompt_alone() {
    let _guard = tch::no_grad_guard();
    let controls_none = controlgen_core::TokenControls::new();
    for name in ["llama_gqa_tied", "gpt2_gelu_new"] {
        let lm = model(name);
        let all = stack(&*lm);
        let all = named(&all);
        let together = bind(&*lm, &all.iter().map(|(_, it)| *it).collect::<Vec<_>>());
        let lanes = Lanes::samples(8).with(ActiveAdapters::new(&all, &mixture()).unwrap());
        let prompts = prompts();
        let run = |prompts: &[Vec<i64>], pass: Pass<'_>, first: usize| {
            let task = Task {
                lm: &*lm,
                prompts,
                controls: &controls_none,
                pass,
                max_new_tokens: 12,
                eos: &[7, 19, 23, 31, 40, 44],
                n: 2,
            };
            Choice::Sample { seed: 3, first: first as u64 }.run(&task, &mut ()).unwrap()
        };
        let mixed = run(&prompts, Pass { lanes: Some(&lanes), ..Pass::with_controls(&together) }, 0);
        let lengths: std::collections::HashSet<usize> = mixed.iter().map(|h| h.ids.len()).collect();
        assert!(lengths.len() >= 4, "rows end at different times: {lengths:?}");
        for (row, names) in mixture().iter().enumerate() {
            let alone = bind(&*lm, &of_row(&all, names));
            let hypotheses = run(&prompts[row..=row], Pass::with_controls(&alone), 0);
            for (mixed, alone) in mixed[2 * row..2 * row + 2].iter().zip(&hypotheses) {
                assert_eq!(mixed.ids, alone.ids, "{name}, row {row}");
                assert_eq!(mixed.finish, alone.finish, "{name}, row {row}");
                for (a, b) in mixed.logprobs.iter().zip(&alone.logprobs) {
                    assert!((a - b).abs() <= 1e-4, "{name}, row {row}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn without_a_column_all_act_on_all_rows() {
    let _guard = tch::no_grad_guard();
    let lm = model("llama_gqa_tied");
    let all = stack(&*lm);
    let all = named(&all);
    let together = bind(&*lm, &all.iter().map(|(_, it)| *it).collect::<Vec<_>>());
    let tokens = ids(&[&[5, 9, 14], &[8, 8, 30]]);
    let with = |lanes: &Lanes| {
        forward(&*lm, &Pass { lanes: Some(lanes), ..Pass::with_controls(&together) }, &tokens, None)
    };
    let plain = forward(&*lm, &Pass::with_controls(&together), &tokens, None);
    assert!(with(&Lanes::samples(2)).equal(&plain));
    let every = vec![NAMES.to_vec(); 2];
    assert!(with(&Lanes::samples(2).with(ActiveAdapters::new(&all, &every).unwrap())).equal(&plain));
    let none: Vec<Vec<&str>> = vec![vec![]; 2];
    let bare = with(&Lanes::samples(2).with(ActiveAdapters::new(&all, &none).unwrap()));
    assert!(bare.equal(&forward(&*lm, &Pass::default(), &tokens, None)), "to the bit");
}

/// Only rows under a prefix have their positions moved.
#[test]
fn positions_are_each_rows_own() {
    let lm = model("llama_gqa_tied");
    let all = stack(&*lm);
    let all = named(&all);
    let offset = |rows: &[Vec<&str>]| {
        let lanes = Lanes::samples(rows.len()).with(ActiveAdapters::new(&all, rows).unwrap());
        all[3].1.position_offset(Some(&lanes)).unwrap()
    };
    assert_eq!(all[3].1.position_offset(None).unwrap(), Offset::All(3));
    assert_eq!(offset(&[vec!["prefix"], vec![], vec!["a", "prefix"]]), Offset::Rows(vec![3, 0, 3]));
    assert_eq!(offset(&[vec!["prefix"], vec!["prefix"]]), Offset::All(3));
    assert_eq!(offset(&[vec!["long"], vec![]]), Offset::All(0));
}

/// Gradients go to the adapters of a row alone.
#[test]
fn gradients_keep_to_their_rows() {
    let lm = model("llama_gqa_tied");
    let all = stack(&*lm);
    let all = named(&all);
    let together = bind(&*lm, &all.iter().map(|(_, it)| *it).collect::<Vec<_>>());
    let rows = [vec!["a"], vec!["b", "prefix"], vec!["a", "neck"]];
    let lanes = Lanes::samples(3).with(ActiveAdapters::new(&all, &rows).unwrap());
    let tokens = ids(&[&[5, 9, 14], &[8, 8, 30], &[4, 6, 10]]);
    let pass = Pass { lanes: Some(&lanes), ..Pass::with_controls(&together) };
    let logits = forward(&*lm, &pass, &tokens, None).log_softmax(-1, None);
    for (row, of_this) in rows.iter().enumerate() {
        for (name, adapter) in &all {
            let leaves: Vec<Tensor> = adapter.parameters().into_iter().map(|(_, t)| t).collect();
            let loss = logits.get(row as i64).select(-1, 7).sum(Kind::Float);
            let zero: Tensor = leaves.iter().map(|t| t.sum(Kind::Float) * 0.0).sum();
            let gradients = Tensor::f_run_backward(&[loss + zero], &leaves, true, false).unwrap();
            let size = gradients.iter().map(|g| g.abs().sum(Kind::Double).double_value(&[])).sum::<f64>();
            assert_eq!(size > 1e-3, of_this.contains(name), "row {row}, {name}: {size}");
            assert!(size > 1e-3 || size == 0.0, "row {row}, {name}: {size}");
        }
    }
}

#[test]
fn columns_that_do_not_fit_are_refused() {
    let _guard = tch::no_grad_guard();
    let lm = model("llama_gqa_tied");
    let all = stack(&*lm);
    let all = named(&all);
    let refused = |result: controlgen_core::Result<ActiveAdapters>, parts: &[&str]| {
        let Err(error @ Error::Value { .. }) = result.map(drop) else { panic!("taken") };
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    };
    refused(ActiveAdapters::new(&all, &[vec!["a"], vec!["poet"]]), &["row 1", "poet", "prefix"]);
    refused(ActiveAdapters::new(&[all[0], all[0]], &[vec!["a"]]), &["once"]);
    refused(ActiveAdapters::new(&[("x", all[0].1), ("y", all[0].1)], &[vec!["x"]]), &["once"]);

    let tokens = ids(&[&[5, 9, 14], &[8, 8, 30]]);
    let run = |controls: &Controls, lanes: &Lanes| {
        let pass = Pass { lanes: Some(lanes), ..Pass::with_controls(controls) };
        let mut state = lm.start(Source::Rows(2), &pass).unwrap();
        lm.forward(LmInput::ids(&tokens), &mut state, &pass)
    };
    for kind in 0..6 {
        let controls = bind(&*lm, &[all[kind].1]);
        // A column of another number of rows than the lanes; lanes of another number than the batch's.
        let column = |rows: usize| ActiveAdapters::new(&all, &vec![vec!["a"]; rows]).unwrap();
        for (lanes, column) in [(2, column(3)), (3, column(3)), (2, column(0))] {
            let result = run(&controls, &Lanes::samples(lanes).with(column));
            assert!(matches!(result, Err(Error::Value { .. })), "{}", NAMES[kind]);
        }
        // An adapter of the stack that the column was not told of.
        let others: Vec<_> = (0..6).filter(|&i| i != kind).map(|i| all[i]).collect();
        let column = ActiveAdapters::new(&others, &[vec![others[0].0], vec![]]).unwrap();
        let result = run(&controls, &Lanes::samples(2).with(column));
        assert!(matches!(result, Err(Error::Value { .. })), "{}", NAMES[kind]);
    }
    let mut column = ActiveAdapters::new(&all, &[vec!["a"], vec![]]).unwrap();
    assert!(column.reorder(&[2]).is_err() && column.reorder(&[-1]).is_err());
}
