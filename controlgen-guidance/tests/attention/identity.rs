//! Identity attention: the perturbed branch of Ahn et al. 2024.

use controlgen_core::guidance::{Guider, Step};
use controlgen_core::{
    Condition, Control, Controls, Denoiser, Error, Lane, Lanes, NoiseLevel, Pass, Result, SiteId,
};
use controlgen_guidance::{
    ClassifierFreeGuidance, Edit, IdentityAttention, PerturbedAttentionGuidance, PromptToPrompt,
};
use tch::Tensor;

use crate::edits::relative;
use crate::toy::{D, N, P, Toy, level, map, noise, positions, prompt};

fn bind(model: &Toy, control: IdentityAttention) -> Result<Controls> {
    let control: Box<dyn Control> = Box::new(control);
    Controls::bind(model.sites(), vec![control])
}

/// v where attention is self-attention and the row is among `rows`.
fn explicit(model: &Toy, rows: &[i64], site: SiteId, a: &controlgen_core::Attn) -> Tensor {
    let (maps, v) = map(a);
    let out = maps.matmul(&v);
    if model.sites.get(site).unwrap().matches("attn1") {
        rows.iter().for_each(|&row| out.get(row).copy_(&v.get(row)));
    }
    out.to_kind(tch::Kind::Float)
}

#[test]
fn its_map_is_the_identity_on_its_rows() {
    let model = Toy::new();
    let x = noise(&[3, P, D], 3.0) * 2.0;
    let (text, keep) = prompt(1);
    let (text, keep) = (text.expand([3, N, D], false), keep.expand([3, N], false));
    let lane = |variant| Lane { variant, ..Lane::default() };
    let run = |control: Option<IdentityAttention>, variants: [u8; 3]| {
        let controls = control.map(|control| bind(&model, control).unwrap());
        let lanes = Lanes::new(variants.map(lane).into());
        let pass = Pass { controls: controls.as_ref(), lanes: Some(&lanes), ..Pass::default() };
        model.run(&x, &text, &keep, &|site, attn| pass.attention(site, attn))
    };
    let by_maps =
        |rows: &[i64]| model.run(&x, &text, &keep, &|site, attn| Ok(explicit(&model, rows, site, &attn)));
    let control = || IdentityAttention::new("attn1");
    let plain = run(None, [0, 1, 2]);
    let cases = [
        (control(), [0, 1, 2], vec![1]),
        (control(), [1, 0, 1], vec![0, 2]),
        (control(), [1, 1, 1], vec![0, 1, 2]),
        (control(), [0, 2, 0], vec![]),
        (control().variant(2), [0, 1, 2], vec![2]),
        (control().all_rows(), [0, 1, 2], vec![0, 1, 2]),
    ];
    for (control, variants, rows) in cases {
        let found = run(Some(control), variants);
        assert!(relative(&found, &by_maps(&rows)) < 1e-5, "{rows:?}");
        for row in 0..3 {
            let same = found.get(row).equal(&plain.get(row));
            assert_eq!(same, !rows.contains(&row), "{rows:?} {row}");
        }
    }
    // Without lanes no row is of a variant.
    let controls = bind(&model, control()).unwrap();
    let pass = Pass::with_controls(&controls);
    assert!(model.run(&x, &text, &keep, &|site, attn| pass.attention(site, attn)).equal(&plain));
}

#[test]
fn in_a_guider_it_is_a_row_and_no_call() {
    let model = Toy::new();
    let step = Step { index: 0, of: 1, timestep: 10.0, level: level(), next: NoiseLevel::CLEAN };
    let conditions = vec![vec![Condition::Null], vec![Condition::Class(1)]];
    let controls = bind(&model, IdentityAttention::new("attn1")).unwrap();
    let guider = Guider::new(Box::new(model.handle()), conditions, Some(controls), 1).unwrap();
    let guider = guider
        .with(ClassifierFreeGuidance::new(3.0).unwrap())
        .with(PerturbedAttentionGuidance::new(2.0).unwrap());
    let x = noise(&[2, D, 1, P], 8.0);
    let found = guider.predict(&x, &step, &mut guider.start(&[step]).unwrap()).unwrap();
    let alone = |number: i64, rows: &[i64]| {
        let (text, keep) = prompt(number);
        let (text, keep) = (text.expand([2, N, D], false), keep.expand([2, N], false));
        let y =
            model.run(&positions(&x), &text, &keep, &|site, attn| Ok(explicit(&model, rows, site, &attn)));
        y.transpose(1, 2).unsqueeze(2)
    };
    let (u, c, p) = (alone(0, &[]), alone(2, &[]), alone(2, &[0, 1]));
    let expected = &u + (&c - &u) * 3.0 + (&c - &p) * 2.0;
    assert!(relative(&found.prediction.value, &expected) < 1e-5);
    assert!(relative(&p, &c) > 1e-2);
}

#[test]
fn cross_attention_has_no_identity() {
    let model = Toy::new();
    let error = bind(&model, IdentityAttention::new("attn2")).map(drop).unwrap_err();
    assert!(error.to_string().contains("`blocks.0.attn2`"), "{error}");
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(matches!(bind(&model, IdentityAttention::new("attn")), Err(Error::NoSite { .. })));
}

#[test]
fn controls_within_see_the_lanes_of_the_rows_that_are_left() {
    // Row 0 follows row 2; rows 1 and 3 are of the variant, and follow nobody.
    let model = Toy::new();
    let lane = |condition, variant| Lane { sample: 0, condition, variant };
    let lanes = Lanes::new(vec![lane(3, 0), lane(2, 1), lane(2, 0), lane(3, 1)]);
    let x = noise(&[4, P, D], 3.0) * 2.0;
    let (text, keep) = prompt(1);
    let (text, keep) = (text.expand([4, N, D], false), keep.expand([4, N], false));
    let swap = PromptToPrompt::new("attn1", 2, 3).with(Edit::swap(), 0..1).unwrap();
    let stack: Vec<Box<dyn Control>> = vec![Box::new(swap), Box::new(IdentityAttention::new("attn1"))];
    let controls = Controls::bind(model.sites(), stack).unwrap();
    let pass = Pass { controls: Some(&controls), lanes: Some(&lanes), ..Pass::default() };
    let found = model.run(&x, &text, &keep, &|site, attn| pass.attention(site, attn));
    let expected = model.run(&x, &text, &keep, &|site, attn| {
        let out = explicit(&model, &[1, 3], site, &attn);
        if model.sites.get(site).unwrap().matches("attn1") {
            let (maps, v) = map(&attn);
            out.get(0).copy_(&maps.get(2).matmul(&v.get(0)));
        }
        Ok(out)
    });
    assert!(relative(&found, &expected) < 1e-5);
}
