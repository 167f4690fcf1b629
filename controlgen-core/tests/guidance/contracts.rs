//! The contracts on the mixture's denoiser and on every stage of these tests.

use controlgen_core::energy::{Image, Noised};
use controlgen_core::guidance::Branch;
use controlgen_core::testing::contract::{self, GuidanceCase};
use controlgen_core::{Condition, Energy, Guidance};
use tch::Kind;

use crate::stages::{ClassifierFree, Downhill, Perturbed};
use crate::{FORMS, Schedule, diffusion, flow, scheduled, step, x};

#[test]
fn the_denoiser_keeps_its() {
    for schedule in [diffusion as Schedule, flow] {
        for form in FORMS {
            let conditions = [Condition::Class(1), Condition::Null];
            contract::denoiser(&scheduled(form, schedule), &conditions, &[0.4, 0.7]).unwrap();
        }
    }
}

#[test]
fn stages_keep_theirs() {
    let x = x(3);
    let steps = [0.8, 0.5, 0.2].map(|t| step(t, diffusion));
    let check = |stage: &dyn Guidance, neutral: &dyn Guidance| {
        let case = GuidanceCase {
            x: &x,
            steps: &steps,
            base: Branch::of(1),
            neutral: Some(neutral),
            replaces_x: false,
        };
        contract::guidance(stage, &case).unwrap();
    };
    check(&ClassifierFree(7.5), &ClassifierFree(1.0));
    let perturbed = |scale| Perturbed(Branch::of(1).variant(1), scale);
    check(&perturbed(3.0), &perturbed(0.0));
    let sum = |t: &tch::Tensor| t.cos().sum_dim_intlist(&[1i64, 2, 3][..], false, Kind::Double);
    let at_x = Energy::from_fn(move |n: &Noised| Ok(sum(&n.x) * n.level.alpha()));
    let at_x0 = Energy::from_fn(move |i: &Image| Ok(sum(&i.0)));
    check(&Downhill::AtX(at_x.clone()), &Downhill::AtX(0.0 * at_x));
    check(&Downhill::AtX0(at_x0.clone()), &Downhill::AtX0(0.0 * at_x0));
}
