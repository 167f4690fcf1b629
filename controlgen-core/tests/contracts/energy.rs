//! Energies that break their contract, each in one place.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use controlgen_core::energy::{Energy, Image, Noised};
use controlgen_core::testing::contract;
use controlgen_core::{EnableGrad, EnergyFn, NoiseLevel, Result};
use tch::{Kind, Tensor, kind::DOUBLE_CPU};

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    OneNumber,
    KeepsADimension,
    Integers,
    CountsCalls,
    WritesToX,
    MixesRows,
    Detaches,
    DetachesAFactor,
    TurnsGradientsOn,
    LeavesGradientsOn,
    CloneOfAnother,
}

/// Σ x² + sin(2 x) over a row.
struct Waves {
    fault: Fault,
    by: f64,
    calls: Arc<AtomicI64>,
}

impl Clone for Waves {
    fn clone(&self) -> Self {
        let by = if self.fault == Fault::CloneOfAnother { self.by + 1.0 } else { self.by };
        Self { by, calls: self.calls.clone(), ..*self }
    }
}

impl EnergyFn<Image> for Waves {
    fn energy(&self, x: &Image) -> Result<Tensor> {
        let _gradients = (self.fault == Fault::TurnsGradientsOn).then(EnableGrad::new);
        if self.fault == Fault::LeavesGradientsOn {
            std::mem::forget(EnableGrad::new());
        }
        let x = match self.fault {
            Fault::Detaches => x.0.detach(),
            Fault::WritesToX => x.0.detach().multiply_scalar_(1.5),
            _ => x.0.shallow_clone(),
        };
        let square = if self.fault == Fault::DetachesAFactor { x.detach() * &x } else { x.square() };
        let each = (square + (&x * self.by).sin()).flatten(1, -1);
        let value = each.sum_dim_intlist(&[1i64][..], false, None::<Kind>);
        let calls = self.calls.fetch_add(1, Relaxed) as f64;
        Ok(match self.fault {
            Fault::OneNumber => value.sum(None::<Kind>),
            Fault::KeepsADimension => value.unsqueeze(1),
            Fault::Integers => value.to_kind(Kind::Int64),
            Fault::CountsCalls => value + calls,
            Fault::MixesRows => &value - value.mean(None::<Kind>),
            _ => value,
        })
    }
}

fn waves(fault: Fault) -> Waves {
    Waves { fault, by: 2.0, calls: Arc::default() }
}

fn x(rows: i64) -> Tensor {
    (Tensor::arange(rows * 8, DOUBLE_CPU) * 1.7 + 0.3).sin().view([rows, 2, 2, 2])
}

#[test]
fn energies_keep_it() {
    contract::energy(&waves(Fault::None), &Image(x(3))).unwrap();
    contract::energy(&waves(Fault::None), &Image(x(2).to_kind(Kind::Float))).unwrap();
    let sum = 2.0 * Energy::new(waves(Fault::None)) - Energy::new(waves(Fault::None)) * 0.5;
    contract::energy(&sum, &Image(x(3))).unwrap();
    let level = NoiseLevel::from_alpha_bar(0.3).unwrap();
    let noised = Energy::from_fn(|n: &Noised| {
        Ok((&n.x * n.level.alpha()).square().sum_dim_intlist(&[1i64, 2, 3][..], false, None::<Kind>))
    });
    contract::energy(&noised, &Noised { x: x(2), level }).unwrap();
    let violation = contract::energy(&waves(Fault::None), &Image(x(1))).unwrap_err();
    assert_eq!(violation.expected, "a point of at least 2 rows");
}

#[test]
fn every_broken_energy_is_caught() {
    use Fault::*;
    let broken = [
        ("shape", OneNumber),
        ("shape", KeepsADimension),
        ("shape", Integers),
        ("repeatable", CountsCalls),
        ("repeatable", WritesToX),
        ("rows", MixesRows),
        ("gradient", Detaches),
        ("gradient", DetachesAFactor),
        ("gradient mode", TurnsGradientsOn),
        ("gradient mode", LeavesGradientsOn),
        ("clone", CloneOfAnother),
    ];
    let caught = broken.map(|(clause, fault)| {
        // One of them leaves gradients on.
        let check = move || contract::energy(&waves(fault), &Image(x(3)));
        (clause, std::thread::spawn(check).join().unwrap())
    });
    super::all_caught("energy", &caught);
}
