//! Stages and controls to guide it with.

use controlgen_core::energy::{Image, Noised};
use controlgen_core::guidance::{Branch, Grad, Guided, Memory, Needs, Outputs, Step};
use controlgen_core::{
    At, Binding, Control, Energy, EnergyFn, Guidance, Prediction, Result, SiteKind, SiteMap,
};
use tch::Tensor;

/// p_u + s (p_c − p_u), Ho & Salimans 2022.
pub struct ClassifierFree(pub f64);
impl Guidance for ClassifierFree {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(Self(self.0))
    }
    fn name(&self) -> &'static str {
        "classifier-free guidance"
    }
    fn needs(&self, _step: &Step) -> Needs {
        Needs::branches([Branch::of(0), Branch::of(1)])
    }
    fn guide(&self, _step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let (u, c) = (out.get(Branch::of(0))?, out.get(Branch::of(1))?);
        Ok(Guided { prediction: Prediction::combine(&[(1.0 - self.0, u), (self.0, c)])?, ..so_far })
    }
}

/// + s (p_c − p_perturbed).
pub struct Perturbed(pub Branch, pub f64);
impl Guidance for Perturbed {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(Self(self.0, self.1))
    }
    fn name(&self) -> &'static str {
        "perturbed guidance"
    }
    fn needs(&self, _step: &Step) -> Needs {
        Needs::branches([Branch::of(self.0.condition), self.0])
    }
    fn guide(&self, _step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let (c, p) = (out.get(Branch::of(self.0.condition))?, out.get(self.0)?);
        let prediction = Prediction::combine(&[(1.0, &so_far.prediction), (self.1, c), (-self.1, p)])?;
        Ok(Guided { prediction, ..so_far })
    }
}

/// −s ∇E at x_t, or through the denoiser at x̂₀.
#[derive(Clone)]
pub enum Downhill {
    AtX(Energy<Noised>),
    AtX0(Energy<Image>),
}
impl Guidance for Downhill {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(self.clone())
    }
    fn name(&self) -> &'static str {
        "downhill"
    }
    fn needs(&self, _step: &Step) -> Needs {
        Needs::grad(match self {
            Self::AtX(_) => Grad::AtX,
            Self::AtX0(_) => Grad::ThroughDenoiser,
        })
    }
    fn guide(&self, step: &Step, out: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        let energy = match self {
            Self::AtX(e) => e.energy(&Noised { x: out.x().shallow_clone(), level: step.level })?,
            Self::AtX0(e) => e.energy(&Image(so_far.prediction.x0(&so_far.x, step.level)?))?,
        };
        let shift = out.grad(&energy)?.f_neg()?;
        so_far.shifted(shift)
    }
}

/// On the lanes of variant 1, or on all, the components have their weights, whatever x is.
pub struct Forget {
    pub by_lane: bool,
}
impl Control for Forget {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self { ..*self })
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Hidden, "responsibilities")?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn hidden(&self, at: At<'_>, h: Tensor, prior: &Tensor) -> Result<Tensor> {
        let plain = |variant: u8| !self.by_lane || variant == 1;
        let rows: Vec<bool> = at.pass.lanes.unwrap().rows().iter().map(|lane| plain(lane.variant)).collect();
        Ok(prior.f_where_self(&Tensor::from_slice(&rows).view([-1, 1, 1]), &h)?)
    }
}

/// More weight to the first component of class 3, in `prepare`.
pub struct Tilt;
impl Tilt {
    pub const FACTOR: f64 = 20.0;
}
impl Control for Tilt {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(Self)
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Linear, "to_k")?.into_iter().for_each(|site| to.at(site, 0));
        Ok(())
    }
    fn linear(&self, _at: At<'_>, _x: &Tensor, y: Tensor) -> Result<Tensor> {
        Ok(y.f_add(&Tensor::f_from_slice(&[0.0, 0.0, 0.0, Self::FACTOR.ln(), 0.0])?)?)
    }
}
