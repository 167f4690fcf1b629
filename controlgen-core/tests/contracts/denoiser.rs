//! Denoisers that break their contract, each in one place.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use controlgen_core::testing::contract;
use controlgen_core::{
    Condition, Controls, Denoiser, DenoiserSpec, Dims, EnableGrad, Error, Parameterisation, Pass, Placement,
    Prediction, Prepared, Result, SiteId, SiteMap, WeightMap,
};
use tch::{Kind, Tensor};

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    AnotherForm,
    OwnType,
    ForgetsItsVariance,
    CountsCalls,
    WritesToX,
    MixesRows,
    OneTimestep,
    PreparesByPlace,
    IgnoresConditions,
    HandleOfAnother,
    Detaches,
    TurnsGradientsOn,
    TakesAnyClass,
    TakesAnyPrepared,
    TakesAnyShape,
    TakesAnyLanes,
    TakesForeignSites,
    NamesTwice,
    NeverComesBy,
    ControlsShow,
    DropsWhatControlsDo,
    MapsInPlace,
}

/// x̂₀ = tanh(W x + class + t) by pixel, W at the linear site `mix`, and half of it as the variance.
struct Mixer {
    fault: Fault,
    spec: DenoiserSpec,
    sites: Arc<SiteMap>,
    embed: SiteId,
    mix: SiteId,
    out: SiteId,
    w: Tensor,
    calls: Arc<AtomicI64>,
}

impl Mixer {
    fn new(fault: Fault) -> Self {
        let mut sites = SiteMap::new();
        let embed = sites.add("class_embed", Dims::Linear { inputs: 2, outputs: 2 });
        let mix = sites.add("mix", Dims::Linear { inputs: 2, outputs: 2 });
        let out = sites.add("out", Dims::Hidden { width: 2 });
        match fault {
            Fault::NamesTwice => drop(sites.add("mix", Dims::Linear { inputs: 2, outputs: 2 })),
            Fault::NeverComesBy => drop(sites.add("mid", Dims::Hidden { width: 2 })),
            _ => {}
        }
        let spec = DenoiserSpec {
            architecture: "mixer".into(),
            channels: 2,
            size: [2, 2],
            multiple: 1,
            parameterisation: Parameterisation::Sample,
            learned_variance: true,
            placement: Placement::CPU.with_kind(Kind::Double),
        };
        let w = Tensor::from_slice2(&[[0.7, -0.4], [0.3, 0.9]]);
        Self { fault, spec, sites: sites.into(), embed, mix, out, w, calls: Arc::default() }
    }

    fn share(&self) -> Self {
        Self {
            spec: self.spec.clone(),
            sites: self.sites.clone(),
            w: self.w.shallow_clone(),
            calls: self.calls.clone(),
            ..*self
        }
    }
}

impl Denoiser for Mixer {
    fn handle(&self) -> Box<dyn Denoiser> {
        let mut handle = self.share();
        if self.fault == Fault::HandleOfAnother {
            handle.w = &self.w * 2.0;
        }
        Box::new(handle)
    }
    fn spec(&self) -> &DenoiserSpec {
        &self.spec
    }
    fn sites(&self) -> &SiteMap {
        &self.sites
    }
    fn prepare(&self, conditions: &[Condition], pass: &Pass<'_>) -> Result<Prepared> {
        let mut pass = *pass;
        if self.fault == Fault::TakesForeignSites && pass.check_sites(&self.sites).is_err() {
            pass.controls = None;
        }
        pass.check_sites(&self.sites)?;
        let class = |(i, condition): (usize, &Condition)| match condition {
            Condition::Class(class) if self.fault == Fault::PreparesByPlace => {
                Ok([*class as f64 + i as f64, 0.3])
            }
            Condition::Class(_) if self.fault == Fault::IgnoresConditions => Ok([0.0, 0.3]),
            Condition::Class(class) if *class >= 0 || self.fault == Fault::TakesAnyClass => {
                Ok([*class as f64, 0.3])
            }
            _ => Err(Error::unsupported("such a condition", "classes from 0")),
        };
        let classes = conditions.iter().enumerate().map(class).collect::<Result<Vec<_>>>()?;
        let classes = Tensor::from_slice2(&classes).view([-1, 2]);
        let y = pass.linear(self.embed, &classes, &classes * 0.5)?;
        Prepared::new(&self.sites, &pass, conditions.len() as i64, vec![y])
    }
    fn predict(&self, x: &Tensor, t: &Tensor, prepared: &Prepared, pass: &Pass<'_>) -> Result<Prediction> {
        let fault = self.fault;
        let pass = match fault {
            Fault::TakesAnyLanes => &Pass { lanes: None, ..*pass },
            _ => pass,
        };
        if fault != Fault::TakesAnyPrepared {
            prepared.check(&self.sites, pass)?;
        }
        let checked = self.spec.validate(x, t, prepared);
        let wide;
        let x = match checked {
            Err(Error::Shape { .. }) if fault == Fault::TakesAnyShape && x.dim() == 4 => {
                wide = x.narrow(1, 0, 2);
                &wide
            }
            other => {
                other?;
                x
            }
        };
        pass.check(&self.sites, x.size()[0])?;
        let _gradients = (fault == Fault::TurnsGradientsOn).then(EnableGrad::new);
        if fault == Fault::WritesToX && !x.requires_grad() {
            let _ = x.shallow_clone().multiply_scalar_(1.1);
        }
        let kind = x.kind();
        let own = if fault == Fault::Detaches { x.detach() } else { x.shallow_clone() }.to_kind(Kind::Double);
        let t = t.to_kind(Kind::Double).view([-1, 1, 1, 1]);
        let t = if fault == Fault::OneTimestep { t.narrow(0, 0, 1) } else { t };
        let pixels = own.permute([0, 2, 3, 1]); // (B, H, W, C)
        let y = pixels.linear::<&Tensor>(&self.w, None);
        let y = match fault {
            Fault::DropsWhatControlsDo => {
                let _ = pass.linear(self.mix, &pixels, y.shallow_clone())?;
                y
            }
            _ => pass.linear(self.mix, &pixels, y)?,
        };
        let classes = prepared.tensors()[0].view([-1, 2, 1, 1]);
        let y = (y.permute([0, 3, 1, 2]) + classes + t).tanh();
        let mut y = pass.hidden(self.out, y, &own)?;
        match fault {
            Fault::CountsCalls => y = &y + self.calls.fetch_add(1, Relaxed) as f64 * 1e-3,
            Fault::MixesRows => y = &y + y.mean_dim(&[0i64][..], true, None::<Kind>) * 0.1,
            Fault::ControlsShow if pass.controls.is_some_and(|c: &Controls| !c.is_empty()) => y = &y + 1e-9,
            _ => {}
        }
        let y = if fault == Fault::OwnType { y } else { y.to_kind(kind) };
        let parameterisation =
            if fault == Fault::AnotherForm { Parameterisation::V } else { self.spec.parameterisation };
        let variance = (fault != Fault::ForgetsItsVariance).then(|| &y * 0.5);
        Ok(Prediction { value: y, parameterisation, variance })
    }
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Denoiser>> {
        let w = match f(self.mix, &self.w)? {
            Some(new) if self.fault == Fault::MapsInPlace => {
                self.w.shallow_clone().copy_(&new);
                new
            }
            Some(new) => new,
            None => self.w.shallow_clone(),
        };
        Ok(Box::new(Self { w, ..self.share() }))
    }
}

fn check(fault: Fault) -> Result<(), contract::Violation> {
    contract::denoiser(&Mixer::new(fault), &[Condition::Class(0), Condition::Class(2)], &[0.3, 0.8])
}

#[test]
fn denoisers_keep_it() {
    check(Fault::None).unwrap();
    let one = contract::denoiser(&Mixer::new(Fault::None), &[Condition::Class(0)], &[0.3, 0.8]).unwrap_err();
    assert_eq!((one.clause, one.found.as_str()), ("spec", "1"));
}

#[test]
fn every_broken_denoiser_is_caught() {
    use Fault::*;
    let broken = [
        ("spec", AnotherForm),
        ("spec", OwnType),
        ("spec", ForgetsItsVariance),
        ("repeatable", CountsCalls),
        ("repeatable", WritesToX),
        ("rows", MixesRows),
        ("rows", OneTimestep),
        ("rows", PreparesByPlace),
        ("select", IgnoresConditions),
        ("handle", HandleOfAnother),
        ("gradients", Detaches),
        ("no gradients", TurnsGradientsOn),
        ("conditions", TakesAnyClass),
        ("prepared", TakesAnyPrepared),
        ("bad input", TakesAnyShape),
        ("lanes", TakesAnyLanes),
        ("foreign sites", TakesForeignSites),
        ("sites", NamesTwice),
        ("hooks", NeverComesBy),
        ("identity control", ControlsShow),
        ("effect", DropsWhatControlsDo),
        ("map_weights", MapsInPlace),
    ];
    super::all_caught("denoiser", &broken.map(|(clause, fault)| (clause, check(fault))));
}
