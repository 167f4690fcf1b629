//! Stages of guidance that break their contract, each in one place.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use controlgen_core::guidance::{Branch, Grad, Guided, Memory, Needs, Outputs, Step};
use controlgen_core::testing::contract::{self, GuidanceCase};
use controlgen_core::{Guidance, NoiseLevel, Parameterisation, Prediction, Result};
use tch::{Kind, Tensor, kind::DOUBLE_CPU};

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    NeedsByTurns,
    NeedsTwice,
    MovesX,
    DeclaresTooLittle,
    DeclaresNoGradient,
    AsksLateForDeclared,
    ShiftOfOneRow,
    ReplacesX,
    LeavesGradientsOff,
    KnowsEpsilonAlone,
    MixesRows,
    RemembersInItself,
    HandleOfAnother,
    NeverNeutral,
}

/// Classifier-free guidance with momentum, and downhill on Σ cos x.
struct Stage {
    fault: Fault,
    scale: f64,
    downhill: f64,
    asked: Arc<AtomicU32>,
    ran: Arc<AtomicU32>,
}

fn stage(fault: Fault, scale: f64, downhill: f64) -> Stage {
    Stage { fault, scale, downhill, asked: Arc::default(), ran: Arc::default() }
}

/// How often a run came by.
struct Count(f64);

impl Guidance for Stage {
    fn handle(&self) -> Box<dyn Guidance> {
        let scale = if self.fault == Fault::HandleOfAnother { self.scale + 1.0 } else { self.scale };
        Box::new(Self { scale, asked: self.asked.clone(), ran: self.ran.clone(), ..*self })
    }
    fn name(&self) -> &'static str {
        "guidance of the contract's tests"
    }
    fn needs(&self, _step: &Step) -> Needs {
        let turn = if self.fault == Fault::NeedsByTurns { self.asked.fetch_add(1, Relaxed) % 2 } else { 0 };
        let mut branches = vec![Branch::of(1)];
        if self.fault != Fault::DeclaresTooLittle {
            branches.push(Branch::of(0));
        }
        if self.fault == Fault::NeedsTwice {
            branches.push(Branch::of(1));
        }
        if turn == 1 {
            branches.push(Branch::of(2));
        }
        let grad = if self.fault == Fault::DeclaresNoGradient { Grad::None } else { Grad::AtX };
        Needs { branches, grad }
    }
    fn before(&self, _step: &Step, x: Tensor) -> Result<Tensor> {
        Ok(if self.fault == Fault::MovesX { x + 1e-6 } else { x })
    }
    fn guide(&self, step: &Step, out: &Outputs<'_>, so_far: Guided, memory: &mut Memory) -> Result<Guided> {
        let fault = self.fault;
        let count: &mut Count = memory.get_or(|| Ok(Count(0.0)))?;
        count.0 += 1.0;
        let ran = f64::from(self.ran.fetch_add(1, Relaxed));
        let momentum = if fault == Fault::RemembersInItself { ran } else { count.0 };
        let late;
        let u = match fault {
            Fault::AsksLateForDeclared => {
                late = out.extra(Branch::of(0))?;
                &late
            }
            _ => out.get(Branch::of(0))?,
        };
        let scale = 1.0 + (self.scale - 1.0) * (1.0 + 0.1 * momentum);
        let mut prediction = Prediction::combine(&[(1.0 - scale, u), (scale, out.get(Branch::of(1))?)])?;
        match fault {
            Fault::KnowsEpsilonAlone => {
                prediction.value = &prediction.value * 0.5;
                if prediction.parameterisation == Parameterisation::Epsilon {
                    prediction.value = &prediction.value * 2.0;
                }
            }
            Fault::MixesRows => {
                let mean = prediction.value.mean_dim(&[0i64][..], true, None::<Kind>);
                let mean = Prediction { value: mean.expand_as(&prediction.value), ..prediction.handle() };
                prediction = Prediction::combine(&[(0.9, &prediction), (0.1, &mean)])?;
            }
            Fault::NeverNeutral => prediction = u.handle(),
            _ => {}
        }
        let energy = out.x().cos().flatten(1, -1).sum_dim_intlist(&[1i64][..], false, None::<Kind>);
        let shift = if self.downhill == 0.0 && fault != Fault::DeclaresNoGradient {
            Tensor::zeros_like(out.x())
        } else {
            out.grad(&energy)? * (-self.downhill * step.level.sigma())
        };
        let shift = if fault == Fault::ShiftOfOneRow { shift.narrow(0, 0, 1) } else { shift };
        let x = if fault == Fault::ReplacesX { &so_far.x * 1.01 } else { so_far.x.shallow_clone() };
        if fault == Fault::LeavesGradientsOff {
            std::mem::forget(tch::no_grad_guard());
        }
        Guided { prediction, x, ..so_far }.shifted(shift)
    }
}

fn check(fault: Fault) -> Result<(), contract::Violation> {
    let level = |t: f64| NoiseLevel::from_alpha_bar(1.0 - t).unwrap();
    let steps = [0, 1, 2].map(|index| {
        let t = 0.9 - 0.3 * f64::from(index);
        Step { index: index as usize, of: 3, timestep: t, level: level(t), next: level(t - 0.2) }
    });
    let x = (Tensor::arange(12, DOUBLE_CPU) * 1.3 + 0.2).sin().view([3, 2, 2, 1]);
    let neutral = stage(fault, 1.0, 0.0);
    let case = GuidanceCase {
        x: &x,
        steps: &steps,
        base: Branch::of(1),
        neutral: Some(&neutral),
        replaces_x: false,
    };
    contract::guidance(&stage(fault, 3.0, 0.5), &case)
}

#[test]
fn stages_keep_it() {
    check(Fault::None).unwrap();
}

#[test]
fn every_broken_stage_is_caught() {
    use Fault::*;
    let broken = [
        ("needs", NeedsByTurns),
        ("needs", NeedsTwice),
        ("before", MovesX),
        ("declared", DeclaresTooLittle),
        ("declared", DeclaresNoGradient),
        ("declared", AsksLateForDeclared),
        ("shape", ShiftOfOneRow),
        ("shape", ReplacesX),
        ("gradient mode", LeavesGradientsOff),
        ("memory", RemembersInItself),
        ("rows", MixesRows),
        ("forms", KnowsEpsilonAlone),
        ("handle", HandleOfAnother),
        ("neutral", NeverNeutral),
    ];
    let caught = broken.map(|(clause, fault)| {
        // One of them leaves gradients off.
        (clause, std::thread::spawn(move || check(fault)).join().unwrap())
    });
    super::all_caught("guidance", &caught);
}
