//! Adapters that break their contract, each in one place.

use std::path::Path;
use std::sync::LazyLock;

use controlgen_core::testing::contract::{self, Options};
use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{
    Adapter, AdapterId, At, Binding, Control, Error, MergedWeights, Result, SiteKind, SiteMap,
    copy_parameters,
};
use tch::{Kind, Tensor, kind::FLOAT_CPU};

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    NoParameters,
    HalfPrecision,
    GivesCopies,
    HandlesApart,
    StartsTrained,
    Forgets,
    Detaches,
    HandleOfAnother,
    HandleWithAnId,
    OneIdForAll,
    BindsNowhere,
    SavesHalf,
    LoadsIntoNewStorage,
    LoadsPieceByPiece,
    TakesAnEmptyFolder,
    MergesTwice,
    MergesInPlace,
    CannotMerge,
}

/// y + B A x at `lm_head`, saved in two files.
struct LowRank {
    id: AdapterId,
    fault: Fault,
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl LowRank {
    fn boxed(fault: Fault) -> Result<Box<dyn Adapter>> {
        let kind = if fault == Fault::HalfPrecision { Kind::Half } else { Kind::Float };
        let a = (Tensor::arange(60, FLOAT_CPU) * 1.7).sin().view([2, 30]).to_kind(kind);
        let b = Tensor::zeros([5, 2], FLOAT_CPU).to_kind(kind);
        let b = if fault == Fault::StartsTrained { b + 0.01 } else { b };
        static ONE: LazyLock<AdapterId> = LazyLock::new(AdapterId::unique);
        let id = if fault == Fault::OneIdForAll { *ONE } else { AdapterId::unique() };
        let (a, b) = (a.set_requires_grad(true), b.set_requires_grad(true));
        Ok(Box::new(Self { id, fault, a, b, scale: 1.0 }))
    }

    fn share(&self) -> Self {
        Self { a: self.a.shallow_clone(), b: self.b.shallow_clone(), ..*self }
    }
}

impl Control for LowRank {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.share())
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        match sites.select(SiteKind::Linear, "lm_head") {
            Err(_) if self.fault == Fault::BindsNowhere => Ok(()),
            other => {
                other?.into_iter().for_each(|site| to.at(site, 0));
                Ok(())
            }
        }
    }
    fn linear(&self, _at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let (a, b) = (self.a.to_kind(Kind::Float), self.b.to_kind(Kind::Float));
        let low = x.f_linear(&a, None::<&Tensor>)?.f_linear(&b, None::<&Tensor>)?;
        Ok(match self.fault {
            Fault::Forgets => y,
            Fault::Detaches => y + low.detach() * self.scale,
            _ => y + low * self.scale,
        })
    }
}

impl Adapter for LowRank {
    fn id(&self) -> AdapterId {
        self.id
    }
    fn adapter_handle(&self) -> Box<dyn Adapter> {
        let mut handle = self.share();
        match self.fault {
            Fault::HandlesApart => {
                handle.a = self.a.detach().copy().set_requires_grad(true);
                handle.b = self.b.detach().copy().set_requires_grad(true);
            }
            Fault::HandleOfAnother => handle.scale = 2.0,
            Fault::HandleWithAnId => handle.id = AdapterId::unique(),
            _ => {}
        }
        Box::new(handle)
    }
    fn parameters(&self) -> Vec<(String, Tensor)> {
        let give = |t: &Tensor| if self.fault == Fault::GivesCopies { t * 1.0 } else { t.shallow_clone() };
        match self.fault {
            Fault::NoParameters => vec![],
            _ => vec![("lora_A".into(), give(&self.a)), ("lora_B".into(), give(&self.b))],
        }
    }
    fn save(&self, directory: &Path) -> Result<()> {
        Tensor::write_safetensors(&[("lora_A", &self.a)], directory.join("a.safetensors"))?;
        let b = if self.fault == Fault::SavesHalf { &self.b * 0.0 } else { self.b.shallow_clone() };
        Tensor::write_safetensors(&[("lora_B", &b)], directory.join("b.safetensors"))?;
        Ok(())
    }
    fn load(&mut self, directory: &Path) -> Result<()> {
        if self.fault == Fault::TakesAnEmptyFolder && !directory.join("a.safetensors").exists() {
            return Ok(());
        }
        let mut read = Vec::new();
        for (name, own) in [("a", ("lora_A", &self.a)), ("b", ("lora_B", &self.b))] {
            let file = format!("{name}.safetensors");
            let found = Tensor::read_safetensors(directory.join(&file))?;
            if self.fault == Fault::LoadsPieceByPiece {
                copy_parameters(&file, &found, &[(own.0.to_owned(), own.1.shallow_clone())])?;
            }
            read.extend(found);
        }
        if self.fault == Fault::LoadsIntoNewStorage {
            let mut read = read.into_iter().map(|(_, t)| t.set_requires_grad(true));
            (self.a, self.b) = (read.next().unwrap(), read.next().unwrap());
            return Ok(());
        }
        copy_parameters("the adapter", &read, &self.parameters())
    }
    fn merged<'a>(&'a self, sites: &SiteMap) -> Result<MergedWeights<'a>> {
        if self.fault == Fault::CannotMerge {
            return Err(Error::unsupported("merging", "running it as a control"));
        }
        let at = sites.select(SiteKind::Linear, "lm_head")?;
        Ok(Box::new(move |site, w| {
            let _no_gradients = tch::no_grad_guard();
            if !at.contains(&site) {
                return Ok(None);
            }
            let change = self.b.f_matmul(&self.a)?;
            Ok(Some(match self.fault {
                Fault::MergesTwice => w + change * 2.0,
                Fault::MergesInPlace => w.shallow_clone().f_add_(&change)?,
                _ => w + change,
            }))
        }))
    }
}

fn check(fault: Fault) -> Result<(), contract::Violation> {
    let lm = TableLm::new(&TableLmConfig { seed: 4, ..TableLmConfig::default() }).unwrap();
    contract::adapter(&lm, || LowRank::boxed(fault))
}

#[test]
fn adapters_keep_it() {
    check(Fault::None).unwrap();
    check(Fault::CannotMerge).unwrap();
    // One that is not made as the identity, and says so.
    let lm = TableLm::random(5, 4).unwrap();
    let options = Options { identity: false, ..Options::default() };
    options.adapter(&lm, || LowRank::boxed(Fault::StartsTrained)).unwrap();
}

#[test]
fn every_broken_adapter_is_caught() {
    use Fault::*;
    let broken = [
        ("parameters", NoParameters),
        ("parameters", HalfPrecision),
        ("parameters", GivesCopies),
        ("parameters", HandlesApart),
        ("identity", StartsTrained),
        ("effect", Forgets),
        ("gradients", Detaches),
        ("handle", HandleOfAnother),
        ("handle", HandleWithAnId),
        ("handle", OneIdForAll),
        ("bind", BindsNowhere),
        ("save and load", SavesHalf),
        ("save and load", LoadsIntoNewStorage),
        ("damaged", LoadsPieceByPiece),
        ("damaged", TakesAnEmptyFolder),
        ("merged", MergesTwice),
        ("unmerged", MergesInPlace),
    ];
    super::all_caught("adapter", &broken.map(|(clause, fault)| (clause, check(fault))));
}
