//! Encoders that break their contract, each in one place.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use controlgen_core::layers::{Embedding, Linear};
use controlgen_core::testing::contract::{self, Violation};
use controlgen_core::{
    Dims, EnableGrad, Encoder, EncoderInput, EncoderSpec, Error, Features, Pass, Placement, Reads, Result,
    SiteId, SiteMap, Tokens, WeightMap,
};
use tch::{Kind, Tensor};

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    SaysItPools,
    CountsCalls,
    EmbeddingsDiffer,
    MixesRows,
    SeesPadding,
    Detaches,
    LeavesGradientsOn,
    HandleOfAnother,
    NamesTwice,
    NeverComesBy,
    ControlsShow,
    DropsWhatControlsDo,
    HidesAWeight,
    ForgetsAnAnswer,
    SwallowsErrors,
    TakesForeignSites,
    TakesAnyLanes,
    ClampsTokens,
    TakesPaddingAlone,
    NoContext,
}

/// h = W (x + mean of what is kept), pooled by the mean; over 9 tokens, 4 wide, at most 8 of them.
struct Tiny {
    fault: Fault,
    table: Embedding,
    dense: Linear,
    branch: SiteId,
    spec: EncoderSpec,
    sites: Arc<SiteMap>,
    calls: Arc<AtomicI64>,
}

impl Tiny {
    fn new(fault: Fault) -> Self {
        let options = (Kind::Double, tch::Device::Cpu);
        let mut sites = SiteMap::new();
        let embedding = sites.add("embed", Dims::Embedding { rows: 9, width: 4 });
        let linear = sites.add("dense", Dims::Linear { inputs: 4, outputs: 4 });
        let branch = sites.add("mean", Dims::Hidden { width: 4 });
        match fault {
            Fault::NamesTwice => drop(sites.add("dense", Dims::Linear { inputs: 4, outputs: 4 })),
            Fault::NeverComesBy => drop(sites.add("norm", Dims::Hidden { width: 4 })),
            _ => {}
        }
        let numbers = |rows: i64| (Tensor::arange(rows * 4, options) * 1.7).sin().view([rows, 4]);
        Self {
            fault,
            table: Embedding::new(numbers(9), embedding),
            dense: Linear::new(numbers(4), None, &[(linear, 4)]).unwrap(),
            branch,
            spec: EncoderSpec {
                architecture: "tiny".into(),
                width: 4,
                pooled: Some(if fault == Fault::SaysItPools { 3 } else { 4 }),
                reads: Reads::Text { vocab: 9, context: Some(8) },
                placement: Placement::CPU.with_kind(Kind::Double),
            },
            sites: Arc::new(sites),
            calls: Arc::default(),
        }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn share(&self) -> Self {
        Self {
            table: self.table.handle(),
            dense: self.dense.handle(),
            spec: self.spec.clone(),
            sites: self.sites.clone(),
            calls: self.calls.clone(),
            ..*self
        }
    }

    fn run(&self, tokens: Tokens<'_>, keep: Option<&Tensor>, pass: &Pass<'_>) -> Result<Features> {
        let x = self.table.forward(tokens, pass)?; // (B, T, 4)
        let mean = match keep.filter(|_| !self.is(Fault::SeesPadding)) {
            None => x.mean_dim(&[1i64][..], true, Kind::Double),
            Some(keep) => {
                let keep = keep.to_kind(Kind::Double).unsqueeze(-1);
                (&x * &keep).sum_dim_intlist(&[1i64][..], true, Kind::Double)
                    / keep.sum_dim_intlist(&[1i64][..], true, Kind::Double)
            }
        };
        let h = &x + pass.hidden(self.branch, mean.expand_as(&x), &x)?;
        let mut hidden = self.dense.forward(&h, pass)?;
        match self.fault {
            Fault::CountsCalls => hidden = &hidden + self.calls.fetch_add(1, Relaxed) as f64 * 1e-12,
            Fault::MixesRows => hidden = &hidden + hidden.mean_dim(&[0i64][..], true, Kind::Double) * 0.01,
            Fault::ControlsShow if pass.controls.is_some() => hidden = &hidden + 1e-9,
            _ => {}
        }
        Ok(Features { pooled: Some(hidden.select(1, 0).shallow_clone()), hidden })
    }
}

impl Encoder for Tiny {
    fn handle(&self) -> Box<dyn Encoder> {
        let mut handle = self.share();
        if self.is(Fault::HandleOfAnother) {
            handle.table = Embedding::new(self.table.weight() * 2.0, handle.sites.iter().next().unwrap().0);
        }
        Box::new(handle)
    }
    fn spec(&self) -> &EncoderSpec {
        &self.spec
    }
    fn sites(&self) -> &SiteMap {
        &self.sites
    }
    fn embeddings(&self) -> Option<&Tensor> {
        Some(self.table.weight())
    }
    fn encode(&self, input: EncoderInput<'_>, pass: &Pass<'_>) -> Result<Features> {
        let EncoderInput::Text { tokens, keep } = input else {
            return Err(Error::unsupported("images", "text"));
        };
        let fixed;
        let tokens = match tokens {
            Tokens::Ids(ids) if self.is(Fault::ClampsTokens) && ids.kind() == Kind::Int64 => {
                fixed = ids.clamp(0, 8);
                Tokens::Ids(&fixed)
            }
            Tokens::Embeds(embeds) if self.is(Fault::EmbeddingsDiffer) => {
                fixed = embeds * 1.01;
                Tokens::Embeds(&fixed)
            }
            Tokens::Embeds(embeds) if self.is(Fault::Detaches) => {
                fixed = embeds.detach();
                Tokens::Embeds(&fixed)
            }
            other => other,
        };
        let (rows, len) = tokens.validate(keep, 9, 4, Kind::Double)?;
        let empty = keep.is_some_and(|keep| keep.any_dim(1, false).all().int64_value(&[]) == 0);
        if empty && !self.is(Fault::TakesPaddingAlone) {
            return Err(Error::value("keep", "a token a row", "none"));
        }
        if len > 8 && !self.is(Fault::NoContext) {
            return Err(Error::Context { limit: 8, needed: len });
        }
        let mut pass = *pass;
        if self.is(Fault::TakesAnyLanes) {
            pass.lanes = None;
        }
        if self.is(Fault::TakesForeignSites) && pass.check_sites(&self.sites).is_err() {
            pass.controls = None;
        }
        pass.check(&self.sites, rows)?;
        if self.is(Fault::LeavesGradientsOn) {
            std::mem::forget(EnableGrad::new());
        }
        let plain = Pass { controls: None, ..pass };
        match self.run(tokens, keep, &pass) {
            Ok(_) if self.is(Fault::DropsWhatControlsDo) => self.run(tokens, keep, &plain),
            Err(_) if self.is(Fault::SwallowsErrors) => self.run(tokens, keep, &plain),
            other => other,
        }
    }
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn Encoder>> {
        let table = self.table.map_weights(f)?;
        let dense = match self.fault {
            Fault::HidesAWeight => self.dense.handle(),
            Fault::ForgetsAnAnswer => {
                self.dense.map_weights(f)?;
                self.dense.handle()
            }
            _ => self.dense.map_weights(f)?,
        };
        Ok(Box::new(Self { table, dense, ..self.share() }))
    }
}

#[test]
fn a_sound_encoder_keeps_it() {
    contract::encoder(&Tiny::new(Fault::None)).unwrap();
}

#[test]
fn every_broken_encoder_is_caught() {
    use Fault::*;
    tch::set_num_threads(1);
    let broken = [
        ("spec", SaysItPools),
        ("repeatable", CountsCalls),
        ("embeddings", EmbeddingsDiffer),
        ("rows", MixesRows),
        ("padding", SeesPadding),
        ("gradients", Detaches),
        ("no gradients", LeavesGradientsOn),
        ("handle", HandleOfAnother),
        ("sites", NamesTwice),
        ("hooks", NeverComesBy),
        ("identity control", ControlsShow),
        ("effect", DropsWhatControlsDo),
        ("map_weights", HidesAWeight),
        ("map_weights", ForgetsAnAnswer),
        ("failing control", SwallowsErrors),
        ("foreign sites", TakesForeignSites),
        ("lanes", TakesAnyLanes),
        ("bad input", ClampsTokens),
        ("bad input", TakesPaddingAlone),
        ("context", NoContext),
    ];
    let caught = broken.map(|(clause, fault)| -> (&'static str, Result<(), Violation>) {
        // One of them leaves gradients on.
        let result = std::thread::spawn(move || contract::encoder(&Tiny::new(fault))).join();
        (clause, result.unwrap())
    });
    super::all_caught("encoder", &caught);
}
