//! Prompt-to-Prompt against explicit attention maps.

use std::ops::Range;
use std::slice::from_ref;

use controlgen_core::{Attn, Control, Controls, Denoiser, Error, Lane, Lanes, Pass, Result, SiteId};
use controlgen_guidance::{Edit, PromptToPrompt};
use tch::{Kind, Tensor};

use crate::toy::{D, N, P, Toy, map, noise, prompt};

/// The edits as the paper has them, on maps.
#[derive(Clone)]
pub enum OnMaps {
    Swap,
    Replace(Vec<f64>, [f64; N as usize]),
    Refine([Option<usize>; N as usize], [f64; N as usize]),
    Reweight([f64; N as usize]),
}

impl OnMaps {
    /// Of the source's map `[heads, Tq, N]` and what earlier edits made of the row's own.
    fn of(&self, source: &Tensor, so_far: &Tensor) -> Tensor {
        let blend = |new: &Tensor, old: &Tensor, alpha: f64| new * alpha + old * (1.0 - alpha);
        let column = |map: &Tensor, j: i64| map.select(-1, j);
        let columns = |f: &dyn Fn(i64) -> Tensor| Tensor::stack(&(0..N).map(f).collect::<Vec<_>>(), -1);
        match self {
            Self::Swap => source.shallow_clone(),
            Self::Replace(mapper, alpha) => {
                let new = source.matmul(&Tensor::from_slice(mapper).view([N, N]));
                columns(&|j| blend(&column(&new, j), &column(so_far, j), alpha[j as usize]))
            }
            Self::Refine(of, alpha) => columns(&|j| match of[j as usize] {
                Some(i) => blend(&column(source, i as i64), &column(so_far, j), alpha[j as usize]),
                None => column(so_far, j),
            }),
            Self::Reweight(w) => columns(&|j| column(so_far, j) * w[j as usize]),
        }
    }

    fn edit(&self) -> Edit {
        match self {
            Self::Swap => Edit::swap(),
            Self::Replace(mapper, alpha) => Edit::replace(mapper).unwrap().blend(alpha).unwrap(),
            Self::Refine(map, alpha) => Edit::refine(map).unwrap().blend(alpha).unwrap(),
            Self::Reweight(w) => Edit::reweight(w).unwrap(),
        }
    }
}

/// Edits at the sites of a name, in steps.
pub type Chain = (&'static str, Vec<(OnMaps, Range<usize>)>);

pub fn controls(model: &Toy, chains: &[Chain], [source, edit]: [u32; 2]) -> Controls {
    let control = |(name, edits): &Chain| -> Box<dyn Control> {
        let start = PromptToPrompt::new(*name, source, edit);
        let add = |control: PromptToPrompt, (edit, steps): &(OnMaps, Range<usize>)| {
            control.with(edit.edit(), steps.clone()).unwrap()
        };
        Box::new(edits.iter().fold(start, add))
    };
    Controls::bind(model.sites(), chains.iter().map(control).collect()).unwrap()
}

/// Attention by maps, which are edited in rows `pairs` (edited, source).
pub fn explicit(
    model: &Toy,
    chains: &[Chain],
    pairs: &[(i64, i64)],
    step: usize,
    site: SiteId,
    a: &Attn,
) -> Tensor {
    let (maps, v) = map(a);
    let out = maps.matmul(&v);
    let kind = a.q.kind();
    let Some((_, edits)) = chains.iter().find(|(name, _)| model.sites.get(site).unwrap().matches(name))
    else {
        return out.to_kind(kind);
    };
    for &(row, source) in pairs {
        let active = edits.iter().filter(|(_, steps)| steps.contains(&step));
        let edited = active.fold(maps.get(row), |so_far, (edit, _)| edit.of(&maps.get(source), &so_far));
        out.get(row).copy_(&edited.matmul(&v.get(row)));
    }
    out.to_kind(kind)
}

/// Two samples, each [unconditional source, unconditional edit, source, edit], rows mixed, and a row of a variant.
fn batch() -> (Tensor, Tensor, Tensor, Lanes) {
    let lane = |sample, condition| Lane { sample, condition, variant: 0 };
    let mut rows = vec![lane(1, 3), lane(0, 0), lane(0, 1), lane(0, 2), lane(0, 3)];
    rows.extend([lane(1, 0), lane(1, 1), lane(1, 2)]);
    let x: Vec<Tensor> = (0..8).map(|i| noise(&[P, D], 7.0 * f64::from(i)) * 2.0).collect();
    let prompts =
        rows.iter().map(|lane| prompt(if lane.condition < 2 { 0 } else { i64::from(lane.condition) }));
    let (text, keep): (Vec<_>, Vec<_>) = prompts.unzip();
    (Tensor::stack(&x, 0), Tensor::stack(&text, 0), Tensor::stack(&keep, 0), Lanes::new(rows))
}

const PAIRS: [(i64, i64); 2] = [(0, 7), (4, 3)];

fn edited(model: &Toy, chains: &[Chain], step: usize, kind: Kind) -> Tensor {
    let (x, text, keep, lanes) = batch();
    let controls = controls(model, chains, [2, 3]);
    let pass = Pass { controls: Some(&controls), lanes: Some(&lanes), step, ..Pass::default() };
    model.run(&x.to_kind(kind), &text, &keep, &|site, attn| pass.attention(site, attn))
}

fn by_maps(model: &Toy, chains: &[Chain], step: usize, kind: Kind) -> Tensor {
    let (x, text, keep, _) = batch();
    model.run(&x.to_kind(kind), &text, &keep, &|site, attn| {
        Ok(explicit(model, chains, &PAIRS, step, site, &attn))
    })
}

/// The largest difference, relative to the largest number.
pub fn relative(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[]) / b.abs().max().double_value(&[])
}

/// Tokens 1, 2 of the source become token 2 of the edit; token 1 gets what token 3 had, in two parts.
pub fn mapper() -> Vec<f64> {
    let rows = [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.0, 0.0],
        [0.0, 0.5, 0.0, 0.5, 0.0],
        [0.0, 0.0, 0.0, 0.0, 1.0],
    ];
    rows.concat()
}

const ALL: [f64; N as usize] = [1.0; N as usize];
const SOME: [f64; N as usize] = [1.0, 0.3, 0.0, 0.8, 1.0];
const WEIGHTS: [f64; N as usize] = [1.0, 3.0, -2.0, 1.0, 0.0];
const SOURCES: [Option<usize>; N as usize] = [Some(0), None, Some(1), Some(2), None];

fn replace(alpha: [f64; N as usize]) -> OnMaps {
    OnMaps::Replace(mapper(), alpha)
}

#[test]
fn edits_are_those_of_explicit_maps() {
    let model = Toy::new();
    let all = 0..9usize;
    let cross = |edits: &[OnMaps]| -> Chain {
        ("attn2", edits.iter().map(|edit| (edit.clone(), all.clone())).collect())
    };
    let swap = || -> Chain { ("attn1", vec![(OnMaps::Swap, all.clone())]) };
    let (refine, blended, weigh) =
        (OnMaps::Refine(SOURCES, ALL), OnMaps::Refine(SOURCES, SOME), OnMaps::Reweight(WEIGHTS));
    let cases: Vec<(&str, Vec<Chain>)> = vec![
        ("self-attention swapped", vec![swap()]),
        ("cross-attention swapped", vec![cross(&[OnMaps::Swap])]),
        ("replace", vec![cross(&[replace(ALL)])]),
        ("replace, word by word", vec![cross(&[replace(SOME)])]),
        ("refine", vec![cross(from_ref(&refine))]),
        ("refine, word by word", vec![cross(from_ref(&blended))]),
        ("re-weight", vec![cross(from_ref(&weigh))]),
        ("replace, re-weight", vec![cross(&[replace(ALL), weigh.clone()])]),
        ("replace word by word, re-weight", vec![cross(&[replace(SOME), weigh.clone()])]),
        ("refine, re-weight", vec![cross(&[refine.clone(), weigh.clone()])]),
        ("re-weight, refine", vec![cross(&[weigh.clone(), refine.clone()])]),
        ("replace, refine word by word", vec![cross(&[replace(ALL), blended.clone()])]),
        ("re-weight, re-weight", vec![cross(&[weigh.clone(), weigh.clone()])]),
        ("swap, re-weight", vec![cross(&[OnMaps::Swap, weigh.clone()])]),
        ("all at once", vec![swap(), cross(&[refine, replace(SOME), weigh, blended])]),
    ];
    let edited = |chains: &[Chain], kind| edited(&model, chains, 4, kind);
    let by_maps = |chains: &[Chain], kind| by_maps(&model, chains, 4, kind);
    let unedited = edited(&[], Kind::Float);
    for (name, chains) in cases {
        let error = relative(&edited(&chains, Kind::Double), &by_maps(&chains, Kind::Double));
        assert!(error < 1e-12, "{name}: {error:e}");
        let found = edited(&chains, Kind::Float);
        let single = relative(&found, &by_maps(&chains, Kind::Float));
        assert!(single < 1e-5, "{name}: {single:e}");
        for (row, _) in PAIRS {
            let effect = relative(&found.get(row), &unedited.get(row));
            assert!(effect > 1e-2, "{name}: row {row} hardly changes, {effect}");
        }
        for row in [1, 2, 3, 5, 6, 7] {
            assert!(found.get(row).equal(&unedited.get(row)), "{name}: row {row} is no edited row");
        }
    }
}

#[test]
fn each_edit_has_its_steps() {
    let model = Toy::new();
    let edited = |model: &Toy, chains: &[Chain], step| edited(model, chains, step, Kind::Float);
    let chain = |edits: &[(OnMaps, Range<usize>)]| -> [Chain; 1] { [("attn2", edits.to_vec())] };
    let edits = chain(&[(replace(ALL), 1..4), (OnMaps::Reweight(WEIGHTS), 3..6)]);
    let always = |edit: OnMaps| chain(&[(edit, 0..10)]);
    let plain = edited(&model, &[], 0);
    for step in [0, 6, 100] {
        assert!(edited(&model, &edits, step).equal(&plain), "{step}");
    }
    for step in [1, 2] {
        assert!(edited(&model, &edits, step).equal(&edited(&model, &always(replace(ALL)), step)));
    }
    let both = chain(&[(replace(ALL), 0..9), (OnMaps::Reweight(WEIGHTS), 0..9)]);
    assert!(edited(&model, &edits, 3).equal(&edited(&model, &both, 0)));
    for step in [4, 5] {
        let expected = edited(&model, &always(OnMaps::Reweight(WEIGHTS)), step);
        assert!(edited(&model, &edits, step).equal(&expected));
    }
    for step in 0..7 {
        assert!(relative(&edited(&model, &edits, step), &by_maps(&model, &edits, step, Kind::Float)) < 1e-5);
    }
}

#[test]
fn large_maps_may_be_left_alone() {
    let model = Toy::new();
    let run = |positions: i64| {
        let (x, text, keep, lanes) = batch();
        let swap = PromptToPrompt::new("attn1", 2, 3).with(Edit::swap(), 0..9).unwrap();
        let swap = swap.up_to(positions).unwrap();
        let controls = Controls::bind(model.sites(), vec![Box::new(swap)]).unwrap();
        let pass = Pass { controls: Some(&controls), lanes: Some(&lanes), ..Pass::default() };
        model.run(&x, &text, &keep, &|site, attn| pass.attention(site, attn))
    };
    let plain = edited(&model, &[], 0, Kind::Float);
    assert!(run(P - 1).equal(&plain));
    assert!(!run(P).equal(&plain));
}

#[test]
fn rows_go_by_lanes() {
    let model = Toy::new();
    let controls = controls(&model, &[("attn2", vec![(replace(ALL), 0..9)])], [2, 3]);
    let (x, text, keep, lanes) = batch();
    let first_cross = model.sites.select(controlgen_core::SiteKind::Attention, "blocks.0.attn2").unwrap()[0];
    let run = |lanes: Option<Lanes>| -> Result<Tensor> {
        let pass = Pass { controls: Some(&controls), lanes: lanes.as_ref(), ..Pass::default() };
        let seen = std::cell::RefCell::new(Ok(Tensor::new()));
        let _ = model.run(&x, &text, &keep, &|site, attn| {
            let plain = attn.handle().sdpa()?;
            if site == first_cross {
                *seen.borrow_mut() = pass.attention(site, attn);
            }
            Ok(plain)
        });
        seen.into_inner()
    };
    assert!(run(Some(lanes.clone())).is_ok());
    // An edited row without a source, by sample or by variant; no lanes at all.
    let with = |row: usize, lane: Lane| {
        let mut rows = lanes.rows().to_vec();
        rows[row] = lane;
        run(Some(Lanes::new(rows))).unwrap_err()
    };
    let error = with(7, Lane { sample: 5, condition: 2, variant: 0 });
    assert!(matches!(error, Error::Value { .. }));
    assert_eq!(
        error.to_string(),
        "source of row 0 (sample 1, variant 0): expected a row of condition 2, found none"
    );
    let error = with(4, Lane { sample: 0, condition: 3, variant: 1 });
    assert!(error.to_string().starts_with("source of row 4 (sample 0, variant 1)"), "{error}");
    assert!(matches!(run(None), Err(Error::Value { .. })));
    // A batch without edited rows is none of its business.
    let others: Vec<Lane> =
        lanes.rows().iter().map(|lane| Lane { condition: lane.condition % 2, ..*lane }).collect();
    assert!(run(Some(Lanes::new(others))).is_ok());
}

#[test]
fn what_is_no_edit_is_refused() {
    fn value<T>(result: &Result<T>) -> bool {
        matches!(result, Err(Error::Value { .. }))
    }
    fn shape<T>(result: &Result<T>) -> bool {
        matches!(result, Err(Error::Shape { .. }))
    }
    assert!(shape(&Edit::replace(&[1.0; 6])) && value(&Edit::replace(&[])) && value(&Edit::refine(&[])));
    assert!(matches!(Edit::replace(&[f64::NAN]), Err(Error::NotFinite { .. })));
    assert!(matches!(Edit::reweight(&[1.0, f64::INFINITY]), Err(Error::NotFinite { .. })));
    assert!(value(&Edit::refine(&[None, Some(2)])));
    let replace = || Edit::replace(&mapper()).unwrap();
    assert!(shape(&replace().blend(&[1.0; 4])) && value(&replace().blend(&[1.0, 0.0, 1.1, 0.0, 1.0])));
    assert!(value(&replace().blend(&[f64::NAN; 5])));
    assert!(matches!(Edit::swap().blend(&[1.0]), Err(Error::Unsupported { .. })));
    let new = || PromptToPrompt::new("attn2", 2, 3);
    assert!(value(&new().with(replace(), 3..3)) && value(&new().up_to(0)));
    let chained = new().with(replace(), 0..1).unwrap().with(Edit::swap(), 0..1).unwrap();
    assert!(value(&chained.with(Edit::reweight(&[1.0; 4]).unwrap(), 0..1)), "4 tokens after 5");

    let model = Toy::new();
    let bind = |control: PromptToPrompt| Controls::bind(model.sites(), vec![Box::new(control)]);
    let named = bind(PromptToPrompt::new("attn3", 2, 3)).map(drop).unwrap_err();
    assert!(matches!(&named, Error::NoSite { near, .. } if near.contains(&"attn2".to_owned())), "{named}");
    // Four tokens where the model has five keys, whether they would change anything or not.
    let (x, text, keep, lanes) = batch();
    for weight in [1.0, 0.5] {
        let four = Edit::reweight(&[weight, 1.0, 1.0, 1.0]).unwrap();
        let controls = bind(new().with(four, 0..1).unwrap()).unwrap();
        let pass = Pass { controls: Some(&controls), lanes: Some(&lanes), ..Pass::default() };
        let errors = std::cell::RefCell::new(Vec::new());
        let _ = model.run(&x, &text, &keep, &|site, attn| {
            let plain = attn.handle().sdpa()?;
            errors.borrow_mut().extend(pass.attention(site, attn).err());
            Ok(plain)
        });
        let errors = errors.into_inner();
        assert_eq!(errors.len(), 2);
        for error in errors {
            assert_eq!(
                error.to_string(),
                "tokens of an attention edit: expected 5, as there are keys, found 4"
            );
        }
    }
}
