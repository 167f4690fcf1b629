//! What parameters, gradients and optimizers do and refuse.

use controlgen_core::Error;
use controlgen_core::train::{
    Adafactor, AdafactorConfig, AdamW, AdamWConfig, Ema, EmaConfig, EmaWarmup, Gradients, Group, Optimizer,
    Parameters, Schedule, Sgd, SgdConfig,
};
use tch::{Kind, Tensor, kind::FLOAT_CPU};

fn leaf(shape: &[i64]) -> Tensor {
    Tensor::arange(shape.iter().product::<i64>(), FLOAT_CPU)
        .sin()
        .view(shape)
        .detach()
        .set_requires_grad(true)
}

fn named(list: &[(&str, &Tensor)]) -> Vec<(String, Tensor)> {
    list.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone())).collect()
}

fn optimizers(parameters: &Parameters) -> Vec<Box<dyn Optimizer>> {
    let decayed = AdamWConfig { weight_decay: 0.5, ..AdamWConfig::default() };
    let sgd = SgdConfig { weight_decay: 0.5, ..SgdConfig::default() };
    let factored = AdafactorConfig { weight_decay: 0.5, ..AdafactorConfig::absolute() };
    vec![
        Box::new(AdamW::new(parameters, decayed).unwrap()),
        Box::new(Sgd::new(parameters, sgd).unwrap()),
        Box::new(Adafactor::new(parameters, factored).unwrap()),
    ]
}

#[test]
fn rows_without_a_gradient_decay_only_if_they_shall() {
    for touched in [false, true] {
        for number in 0..3 {
            let table = leaf(&[5, 3]);
            let before = table.detach().copy();
            let group = Group { decay_touched_rows: touched, ..Group::default() };
            let parameters = Parameters::grouped(named(&[("table", &table)]), |_, _| group).unwrap();
            let mut optimizer = optimizers(&parameters).swap_remove(number);
            for _ in 0..3 {
                let rows = Tensor::from_slice(&[1i64, 3]);
                let loss = table.index_select(0, &rows).square().sum(Kind::Float);
                optimizer.step(&parameters.gradients(&loss).unwrap(), 0.1).unwrap();
            }
            let name = optimizer.configuration();
            for row in 0..5 {
                let same = table.get(row).equal(&before.get(row));
                // Adafactor's factored moments are above 0 in every row, but the gradient is not.
                assert_eq!(same, touched && row != 1 && row != 3, "{name}, row {row}, {touched}");
            }
        }
    }
}

#[test]
fn a_decay_of_touched_rows_is_that_of_all_where_all_are_touched() {
    for number in 0..3 {
        let ends = [false, true].map(|touched| {
            let table = leaf(&[5, 3]);
            let group = Group { decay_touched_rows: touched, ..Group::default() };
            let parameters = Parameters::grouped(named(&[("table", &table)]), |_, _| group).unwrap();
            let mut optimizer = optimizers(&parameters).swap_remove(number);
            for _ in 0..3 {
                let gradients = parameters.gradients(&table.exp().sum(Kind::Float)).unwrap();
                optimizer.step(&gradients, 0.1).unwrap();
            }
            table
        });
        assert!(ends[0].allclose(&ends[1], 1e-6, 1e-7, false), "optimizer {number}");
    }
}

#[test]
fn a_frozen_parameter_stays_and_one_without_a_gradient_too() {
    let (a, b, c) = (leaf(&[3]), leaf(&[4]), leaf(&[2]));
    let before = [&a, &b, &c].map(|t| t.detach().copy());
    let pick = |name: &str, _: &Tensor| Group { frozen: name == "frozen", ..Group::default() };
    let list = named(&[("a", &a), ("frozen", &b), ("unused", &c)]);
    let parameters = Parameters::grouped(list, pick).unwrap();
    assert_eq!(parameters.trainable(), 5);
    for mut optimizer in optimizers(&parameters) {
        let loss = a.square().sum(Kind::Float) + b.square().sum(Kind::Float);
        let gradients = parameters.gradients(&loss).unwrap();
        assert!(gradients.value(0).unwrap().is_some() && gradients.value(1).unwrap().is_none());
        optimizer.step(&gradients, 0.1).unwrap();
        assert!(optimizer.state().unwrap().iter().all(|(name, _)| name.ends_with(".a")));
    }
    assert!(!a.equal(&before[0]) && b.equal(&before[1]) && c.equal(&before[2]));
}

#[test]
fn gradients_of_parts_add_up_and_clip_as_one() {
    let (a, b) = (leaf(&[3, 2]), leaf(&[4]));
    let parameters = Parameters::new(named(&[("a", &a), ("b", &b)])).unwrap();
    let losses =
        || [a.square().sum(Kind::Float), (a.sum(Kind::Float) * b.exp().sum(Kind::Float)), b.sum(Kind::Float)];
    let mut parts = Gradients::none(&parameters);
    assert_eq!(parts.norm().unwrap(), 0.0);
    assert_eq!(parts.clip_norm(1.0).unwrap(), 0.0);
    for loss in losses() {
        parts.add(&loss, &parameters).unwrap();
    }
    let whole = parameters.gradients(&losses().into_iter().reduce(|a, b| a + b).unwrap()).unwrap();
    for number in 0..2 {
        let (part, whole) = (parts.value(number).unwrap().unwrap(), whole.value(number).unwrap().unwrap());
        assert!(part.allclose(&whole, 1e-6, 1e-6, false));
    }
    let norm = parts.clip_norm(0.5).unwrap();
    assert!(norm > 0.5 && (parts.norm().unwrap() - 0.5).abs() < 1e-5);
    parts.clip_value(0.1).unwrap();
    assert!(parts.value(0).unwrap().unwrap().abs().max().double_value(&[]) <= 0.1 + 1e-6);
}

#[test]
fn one_tensor_for_two_gradients_is_clipped_once_each() {
    // The gradient of a sum is the same tensor for both terms.
    let (a, b) = (leaf(&[4]), leaf(&[4]));
    let parameters = Parameters::new(named(&[("a", &a), ("b", &b)])).unwrap();
    let mut gradients = parameters.gradients(&((&a + &b) * leaf(&[4]).detach()).sum(Kind::Float)).unwrap();
    gradients.add(&((&a + &b) * 2.0).sum(Kind::Float), &parameters).unwrap();
    let expected = leaf(&[4]).detach() + 2.0;
    for number in 0..2 {
        assert!(gradients.value(number).unwrap().unwrap().allclose(&expected, 1e-6, 1e-6, false));
    }
}

#[test]
fn a_step_below_the_resolution_of_bf16_moves_a_parameter_that_is_cast() {
    let weight = Tensor::full([4], 1.0, FLOAT_CPU).set_requires_grad(true);
    let parameters = Parameters::new(named(&[("w", &weight)])).unwrap();
    let mut optimizer = AdamW::new(&parameters, AdamWConfig::default()).unwrap();
    for _ in 0..100 {
        let copies = parameters.to_kind(Kind::BFloat16).unwrap();
        assert_eq!(copies[0].1.kind(), Kind::BFloat16);
        let loss = copies[0].1.square().sum(Kind::Float);
        optimizer.step(&parameters.gradients(&loss).unwrap(), 1e-3).unwrap();
    }
    let moved = 1.0 - weight.double_value(&[0]);
    assert!((0.09..0.11).contains(&moved), "{moved}");
    assert!(matches!(parameters.to_kind(Kind::Int64), Err(Error::Kind { .. })));
}

#[test]
fn what_is_no_list_of_leaves_is_refused() {
    let (a, b) = (leaf(&[3]), leaf(&[4]));
    let refused = |list: &[(&str, &Tensor)]| Parameters::new(named(list)).err().unwrap().to_string();
    assert!(refused(&[]).contains("one at least"));
    assert!(refused(&[("a", &a), ("a", &b)]).contains("`a` twice"));
    assert!(refused(&[("a", &a), ("b", &a)]).contains("`a` and `b`"));
    assert!(refused(&[("a", &(&a * 2.0))]).contains("expected a leaf"));
    assert!(refused(&[("a", &a.detach())]).contains("requires gradients"));
    assert!(
        refused(&[("a", &a.detach().to_kind(Kind::BFloat16).set_requires_grad(true))]).contains("BFloat16")
    );
    assert!(refused(&[("a", &Tensor::new())]).contains("undefined"));
    let grouped =
        |group: Group| Parameters::grouped(named(&[("a", &a)]), |_, _| group).err().unwrap().to_string();
    assert!(grouped(Group { rate: -1.0, ..Group::default() }).contains("rate"));
    assert!(grouped(Group { weight_decay: Some(f64::NAN), ..Group::default() }).contains("weight decay"));
    assert!(grouped(Group { decay_touched_rows: true, ..Group::default() }).contains("[rows, ..]"));
    let frozen = Group { frozen: true, ..Group::default() };
    assert!(Parameters::grouped(named(&[("a", &a.detach())]), |_, _| frozen).is_ok());
}

#[test]
fn what_is_no_loss_is_refused() {
    let (a, b) = (leaf(&[3]), leaf(&[4]));
    let parameters = Parameters::new(named(&[("a", &a)])).unwrap();
    let refused = |loss: &Tensor| parameters.gradients(loss).err().unwrap();
    assert!(matches!(refused(&(&a * 2.0)), Error::Shape { .. }));
    assert!(matches!(refused(&b.sum(Kind::Float)), Error::NotDifferentiable { .. }));
    assert!(matches!(refused(&b.detach().sum(Kind::Float)), Error::NotDifferentiable { .. }));
    assert!(matches!(refused(&(a.sum(Kind::Float) / 0.0)), Error::NotFinite { .. }));
    assert!(matches!(refused(&Tensor::from(3i64)), Error::Kind { .. }));
    assert!(matches!(refused(&Tensor::new()), Error::Value { .. }));
    let others = Parameters::new(named(&[("a", &a)])).unwrap();
    let gradients = parameters.gradients(&a.sum(Kind::Float)).unwrap();
    for mut optimizer in optimizers(&others) {
        assert!(matches!(optimizer.step(&gradients, 0.1), Err(Error::ForeignState { .. })));
    }
    for mut optimizer in optimizers(&parameters) {
        assert!(matches!(optimizer.step(&gradients, -0.1), Err(Error::Value { .. })));
        assert!(matches!(optimizer.step(&gradients, f64::NAN), Err(Error::Value { .. })));
    }
    let mut gradients = gradients;
    assert!(matches!(gradients.clip_norm(0.0), Err(Error::Value { .. })));
    assert!(matches!(gradients.clip_value(f64::NAN), Err(Error::Value { .. })));
}

#[test]
fn settings_outside_their_ranges_are_refused() {
    let a = leaf(&[3]);
    let p = Parameters::new(named(&[("a", &a)])).unwrap();
    let adamw = AdamWConfig::default();
    for config in [
        AdamWConfig { beta1: 1.0, ..adamw },
        AdamWConfig { beta2: -0.1, ..adamw },
        AdamWConfig { epsilon: -1.0, ..adamw },
        AdamWConfig { weight_decay: f64::INFINITY, ..adamw },
    ] {
        assert!(matches!(AdamW::new(&p, config), Err(Error::Value { .. })), "{config:?}");
    }
    let sgd = SgdConfig::default();
    for config in [
        SgdConfig { momentum: -1.0, ..sgd },
        SgdConfig { nesterov: true, ..sgd },
        SgdConfig { nesterov: true, momentum: 0.9, dampening: 0.1, ..sgd },
    ] {
        assert!(matches!(Sgd::new(&p, config), Err(Error::Value { .. })), "{config:?}");
    }
    let adafactor = AdafactorConfig::default();
    for config in [
        AdafactorConfig { clip_threshold: 0.0, ..adafactor },
        AdafactorConfig { decay_rate: 0.8, ..adafactor },
        AdafactorConfig { beta1: Some(1.0), ..adafactor },
        AdafactorConfig { warmup_init: true, relative_step: false, ..adafactor },
    ] {
        assert!(matches!(Adafactor::new(&p, config), Err(Error::Value { .. })), "{config:?}");
    }
    let ema = EmaConfig::default();
    for config in [
        EmaConfig { decay: 1.0, ..ema },
        EmaConfig { decay: 0.1, min_decay: 0.2, ..ema },
        EmaConfig { warmup: EmaWarmup::Power { inverse_gamma: 0.0, power: 1.0 }, ..ema },
    ] {
        assert!(matches!(Ema::new(&p, config), Err(Error::Value { .. })), "{config:?}");
    }
    assert!(matches!(Schedule::constant(-1.0), Err(Error::Value { .. })));
    assert!(matches!(Schedule::linear(f64::NAN, 5), Err(Error::Value { .. })));
    assert!(matches!(Schedule::linear(1.0, 5).unwrap().with_warmup(6), Err(Error::Value { .. })));
}

#[test]
fn a_state_of_something_else_is_refused_and_changes_nothing() {
    let a = leaf(&[3, 2]);
    let p = Parameters::new(named(&[("a", &a)])).unwrap();
    let mut optimizers = optimizers(&p);
    for optimizer in &mut optimizers {
        optimizer.step(&p.gradients(&a.square().sum(Kind::Float)).unwrap(), 0.1).unwrap();
    }
    let states: Vec<_> = optimizers.iter().map(|o| o.state().unwrap()).collect();
    let adamw = optimizers.swap_remove(0);
    let mut adamw = adamw;
    let bits = |state: Vec<(String, Tensor)>| {
        state
            .iter()
            .map(|(n, t)| format!("{n} {t:?} {}", t.to_kind(Kind::Double).sum(Kind::Double)))
            .collect::<Vec<_>>()
    };
    let before = bits(adamw.state().unwrap());
    assert!(matches!(adamw.load_state(states.into_iter().nth(2).unwrap()), Err(Error::Keys { .. })));
    let other = |name: &str, tensor: Tensor| {
        let mut state = adamw.state().unwrap();
        state.retain(|(other, _)| other != name);
        state.push((name.to_owned(), tensor));
        state
    };
    let wrong = [
        other("exp_avg.a", Tensor::zeros([2, 3], FLOAT_CPU)),
        other("exp_avg.a", Tensor::zeros([3, 2], (Kind::Double, tch::Device::Cpu))),
        other("step.a", Tensor::from_slice(&[-1i64])),
        other("step.a", Tensor::from_slice(&[1f32])),
        other("exp_avg.b", Tensor::zeros([3, 2], FLOAT_CPU)),
    ];
    for state in wrong {
        assert!(adamw.load_state(state).is_err());
    }
    assert_eq!(bits(adamw.state().unwrap()), before);
}

#[test]
fn an_average_without_warm_up_is_the_closed_form() {
    let value = Tensor::full([2], 4.0, FLOAT_CPU).set_requires_grad(true);
    let parameters = Parameters::new(named(&[("a", &value)])).unwrap();
    for after in [0, 2] {
        let _ = tch::no_grad(|| value.shallow_clone().fill_(4.0));
        let config = EmaConfig {
            decay: 0.5,
            warmup: EmaWarmup::None,
            update_after_step: after,
            ..EmaConfig::default()
        };
        let mut ema = Ema::new(&parameters, config).unwrap();
        let _ = tch::no_grad(|| value.shallow_clone().fill_(8.0));
        let found = [0; 4].map(|_| {
            ema.update().unwrap();
            ema.averages()[0].1.double_value(&[0])
        });
        assert_eq!(found, if after == 0 { [6.0, 7.0, 7.5, 7.75] } else { [8.0; 4] });
    }
    let mut ema = Ema::new(&parameters, EmaConfig::default()).unwrap();
    let _ = tch::no_grad(|| value.shallow_clone().fill_(1.0));
    let during = ema.with_averages(|| {
        assert_eq!(value.double_value(&[0]), 8.0);
        Err::<(), _>(Error::value("what", "it", "is"))
    });
    assert!(during.is_err());
    assert_eq!(value.double_value(&[0]), 1.0, "they are put back");
}
