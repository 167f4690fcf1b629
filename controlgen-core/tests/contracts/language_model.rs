//! Language models that break their contract, each in one place.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

use controlgen_core::testing::contract::{self, Options};
use controlgen_core::testing::{TableLm, TableLmConfig};
use controlgen_core::{
    Dims, EnableGrad, Error, LanguageModel, LmInput, LmOutput, LmSpec, Logits, Pass, Placement, Result, Rows,
    SiteMap, Source, State, StateImpl, Tokens, WeightMap,
};
use tch::{Kind, Tensor};

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    SpecTooNarrow,
    StartsWithoutRows,
    CountsCalls,
    ForgetsWhatItRead,
    LooksAhead,
    LastIsFirst,
    ForksShare,
    TruncatesOnPaper,
    KeepsItsOrder,
    EmbeddingsDiffer,
    MixesRows,
    SeesPadding,
    PositionsDiffer,
    Detaches,
    DetachesItsCache,
    TurnsGradientsOn,
    LeavesGradientsOn,
    HandleOfAnother,
    HandleForgetsOnThreads,
    MapsWithoutAnswer,
    MapsInPlace,
    MapsAnyShape,
    HidesAWeight,
    NamesTwice,
    NeverComesBy,
    ControlsShow,
    DropsWhatControlsDo,
    CommitsBeforeItFails,
    SwallowsErrors,
    TakesForeignSites,
    TakesForeignStates,
    TakesAnyLanes,
    ClampsTokens,
    ChangesOnBadInput,
    NoContext,
    ContextOffByOne,
}

/// A table model with a fault.
struct Broken {
    fault: Fault,
    lm: Box<dyn LanguageModel>,
    spec: LmSpec,
    sites: Arc<SiteMap>,
    /// The table of embeddings that it shows.
    shown: Tensor,
    calls: Arc<AtomicI64>,
    on_thread: std::thread::ThreadId,
}

fn config() -> TableLmConfig {
    let placement = Placement::CPU.with_kind(Kind::Double);
    TableLmConfig { vocab: 7, context: 12, seed: 3, placement, ..TableLmConfig::default() }
}

impl Broken {
    fn new(fault: Fault) -> Self {
        let lm = TableLm::new(&TableLmConfig { context: 40, ..config() }).unwrap();
        let mut spec = lm.spec().clone();
        spec.context = 12;
        if fault == Fault::SpecTooNarrow {
            spec.width = 6;
        }
        let shown = lm.embeddings().shallow_clone();
        // Its own map; the identity of sites stays that of the model inside, which alone calls hooks.
        let mut sites = SiteMap::new();
        for (_, site) in lm.sites().iter() {
            sites.add_site(site.clone());
        }
        match fault {
            Fault::NamesTwice => drop(sites.add("lm_head", Dims::Linear { inputs: 56, outputs: 7 })),
            Fault::NeverComesBy => drop(sites.add("model.norm", Dims::Hidden { width: 7 })),
            _ => {}
        }
        Self {
            fault,
            lm: Box::new(lm),
            spec,
            sites: sites.into(),
            shown,
            calls: Arc::default(),
            on_thread: std::thread::current().id(),
        }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn share(&self) -> Self {
        Self {
            lm: self.lm.handle(),
            spec: self.spec.clone(),
            sites: self.sites.clone(),
            shown: self.shown.shallow_clone(),
            calls: self.calls.clone(),
            ..*self
        }
    }
}

/// A state that may be shared by its forks.
struct Memory {
    state: Arc<Mutex<State>>,
    fault: Fault,
    /// What it says it holds.
    len: i64,
    rows: i64,
}

impl Memory {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl StateImpl for Memory {
    fn fork(&self) -> Result<Box<dyn StateImpl>> {
        let state = match self.fault {
            Fault::ForksShare => self.state.clone(),
            _ => Arc::new(Mutex::new(self.lock().fork()?)),
        };
        Ok(Box::new(Self { state, ..*self }))
    }
    fn reorder(&mut self, rows: &[i64]) -> Result<()> {
        let mut rows = rows.to_vec();
        if self.fault == Fault::KeepsItsOrder {
            rows.sort_unstable();
        }
        self.rows = rows.len() as i64;
        self.lock().reorder(&rows)
    }
    fn truncate(&mut self, len: i64) -> Result<()> {
        self.len = len;
        if self.fault == Fault::TruncatesOnPaper { Ok(()) } else { self.lock().truncate(len) }
    }
    fn len(&self) -> i64 {
        self.len
    }
    fn rows(&self) -> i64 {
        self.rows
    }
}

impl LanguageModel for Broken {
    fn handle(&self) -> Box<dyn LanguageModel> {
        let mut handle = self.share();
        if self.is(Fault::HandleOfAnother) {
            handle.lm = Box::new(TableLm::new(&TableLmConfig { seed: 4, ..config() }).unwrap());
        }
        Box::new(handle)
    }
    fn spec(&self) -> &LmSpec {
        &self.spec
    }
    fn sites(&self) -> &SiteMap {
        match self.fault {
            Fault::NamesTwice | Fault::NeverComesBy => &self.sites,
            _ => self.lm.sites(),
        }
    }
    fn embeddings(&self) -> &Tensor {
        &self.shown
    }
    fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<State> {
        let source = match source {
            Source::Rows(rows) if self.is(Fault::StartsWithoutRows) => Source::Rows(rows.max(1)),
            other => other,
        };
        let state = self.lm.start(source, &Pass { controls: None, ..*pass })?;
        let (len, rows) = (state.len(), state.rows());
        Ok(State::new(Memory { state: Arc::new(Mutex::new(state)), fault: self.fault, len, rows }))
    }
    fn forward(&self, input: LmInput<'_>, outer: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        let mut pass = *pass;
        let own = pass.check_sites(self.sites()).is_ok();
        if pass.controls.is_some() && self.is(Fault::TakesForeignSites) && !own {
            pass.controls = None;
        }
        if self.is(Fault::TakesAnyLanes) {
            pass.lanes = None;
        }
        let mut fresh;
        let memory: &mut Memory = match outer.downcast("a memory") {
            Ok(memory) => memory,
            Err(_) if self.is(Fault::TakesForeignStates) => {
                fresh = self.start(Source::Rows(3), &Pass::default())?;
                fresh.downcast("a memory")?
            }
            Err(error) => return Err(error),
        };
        let fault = self.fault;
        let fixed;
        let input = match input.tokens {
            Tokens::Ids(ids) if fault == Fault::ClampsTokens && ids.kind() == Kind::Int64 => {
                fixed = ids.clamp(0, self.spec.vocab - 1);
                LmInput { tokens: Tokens::Ids(&fixed), ..input }
            }
            Tokens::Embeds(embeds) => {
                fixed = match fault {
                    Fault::EmbeddingsDiffer => embeds * 1.01,
                    Fault::Detaches => embeds.detach(),
                    Fault::DetachesItsCache if memory.len == 0 => embeds.detach() * 2.0 - embeds.detach(),
                    _ => embeds.shallow_clone(),
                };
                LmInput { tokens: Tokens::Embeds(&fixed), ..input }
            }
            Tokens::Ids(_) => input,
        };
        let (_, len) = match input.validate(&self.spec) {
            Err(_) if fault == Fault::ChangesOnBadInput && memory.len > 0 => {
                memory.len -= 1;
                return input.validate(&self.spec).map(|_| unreachable!());
            }
            other => other?,
        };
        let spare = i64::from(fault == Fault::ContextOffByOne);
        if memory.len + len > self.spec.context + spare && fault != Fault::NoContext {
            return Err(Error::Context { limit: self.spec.context, needed: memory.len + len });
        }
        let input = match fault {
            Fault::SeesPadding => input.keep(None),
            _ => input,
        };
        let mut state = memory.state.lock().unwrap();
        if fault == Fault::ForgetsWhatItRead
            || (fault == Fault::HandleForgetsOnThreads && std::thread::current().id() != self.on_thread)
        {
            *state = self.lm.start(Source::Rows(state.rows()), &Pass::default())?;
        }
        let _gradients = (fault == Fault::TurnsGradientsOn).then(EnableGrad::new);
        if fault == Fault::LeavesGradientsOn {
            std::mem::forget(EnableGrad::new());
        }
        let made = match std::ptr::eq(self.sites(), self.lm.sites()) {
            true if fault != Fault::DropsWhatControlsDo => self.lm.forward(input, &mut state, &pass),
            // The hooks are called, and what they give is not used.
            true => {
                let mut fork = state.fork()?;
                let made = self.lm.forward(input, &mut state, &pass)?;
                let plain = self.lm.forward(input, &mut fork, &Pass { controls: None, ..pass })?;
                drop(made);
                Ok(plain)
            }
            false => {
                pass.check_sites(&self.sites)?;
                self.lm.forward(input, &mut state, &Pass { controls: None, ..pass })
            }
        };
        let mut logits = match made {
            Err(Error::Unsupported { .. }) if fault == Fault::SwallowsErrors => {
                self.lm.forward(input, &mut state, &Pass { controls: None, ..pass })?.logits
            }
            Err(error) => {
                if fault == Fault::CommitsBeforeItFails && matches!(error, Error::Unsupported { .. }) {
                    self.lm.forward(input, &mut state, &Pass { controls: None, ..pass })?;
                    drop(state);
                    memory.len += len;
                }
                return Err(error);
            }
            Ok(made) => made.logits,
        };
        drop(state);
        memory.len += len;
        let calls = self.calls.fetch_add(1, Relaxed);
        match fault {
            Fault::CountsCalls => logits = &logits + calls as f64 * 1e-12,
            Fault::LooksAhead if logits.size()[1] > 1 => logits = &logits + logits.narrow(1, -1, 1) * 0.01,
            Fault::LastIsFirst if input.logits == Logits::Last && len > 1 => {
                let mut state = self.lm.start(Source::Rows(memory.rows), &Pass::default())?;
                let all = self.lm.forward(LmInput { logits: Logits::All, ..input }, &mut state, &pass)?;
                logits = all.logits.narrow(1, 0, 1);
            }
            Fault::MixesRows => logits = &logits + logits.mean_dim(&[0i64][..], true, None::<Kind>) * 0.01,
            Fault::PositionsDiffer if input.positions.is_some() => logits = &logits * 1.01,
            Fault::ControlsShow if pass.controls.is_some() => logits = &logits + 1e-9,
            _ => {}
        }
        Ok(LmOutput { logits })
    }
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        let head = self.lm.sites().iter().last().unwrap().0;
        let fault = self.fault;
        let mut g = |site, w: &Tensor| {
            if fault == Fault::HidesAWeight && site == head {
                return Ok(None);
            }
            let answer = f(site, w)?;
            Ok(match (fault, answer) {
                (Fault::MapsWithoutAnswer, None) => Some(w * 1.001),
                (Fault::MapsInPlace, Some(new)) if new.size() == w.size() => {
                    w.shallow_clone().copy_(&new);
                    Some(new)
                }
                (Fault::MapsAnyShape, Some(new)) if new.size() != w.size() => None,
                (_, answer) => answer,
            })
        };
        Ok(Box::new(Self { lm: self.lm.map_weights(&mut g)?, ..self.share() }))
    }
}

#[test]
fn table_models_keep_it() {
    for (order, kind) in [(1, Kind::Float), (2, Kind::Float), (1, Kind::Double), (2, Kind::Double)] {
        let placement = Placement::CPU.with_kind(kind);
        let lm = TableLm::new(&TableLmConfig { order, placement, ..config() }).unwrap();
        contract::language_model(&lm).unwrap();
        Options { seed: 5, ..Options::default() }.language_model(&lm).unwrap();
    }
    contract::language_model(&TableLm::random(2, 0).unwrap()).unwrap();
}

#[test]
fn too_short_a_context_is_told() {
    let lm = TableLm::new(&TableLmConfig { context: 7, ..config() }).unwrap();
    let violation = contract::language_model(&lm).unwrap_err();
    assert_eq!((violation.clause, violation.found.as_str()), ("spec", "7"));
}

#[test]
fn every_broken_model_is_caught() {
    use Fault::*;
    // The models are small: threads would only wait for each other.
    tch::set_num_threads(1);
    let broken = [
        ("spec", SpecTooNarrow),
        ("start", StartsWithoutRows),
        ("repeatable", CountsCalls),
        ("cached", ForgetsWhatItRead),
        ("cached", LooksAhead),
        ("last", LastIsFirst),
        ("fork", ForksShare),
        ("truncate", TruncatesOnPaper),
        ("reorder", KeepsItsOrder),
        ("embeddings", EmbeddingsDiffer),
        ("rows", MixesRows),
        ("padding", SeesPadding),
        ("positions", PositionsDiffer),
        ("gradients", Detaches),
        ("gradients", DetachesItsCache),
        ("no gradients", TurnsGradientsOn),
        ("no gradients", LeavesGradientsOn),
        ("handle", HandleOfAnother),
        ("handle", HandleForgetsOnThreads),
        ("map_weights", MapsWithoutAnswer),
        ("map_weights", MapsInPlace),
        ("map_weights", MapsAnyShape),
        ("map_weights", HidesAWeight),
        ("sites", NamesTwice),
        ("hooks", NeverComesBy),
        ("identity control", ControlsShow),
        ("effect", DropsWhatControlsDo),
        ("failing control", CommitsBeforeItFails),
        ("failing control", SwallowsErrors),
        ("foreign sites", TakesForeignSites),
        ("foreign state", TakesForeignStates),
        ("lanes", TakesAnyLanes),
        ("bad input", ClampsTokens),
        ("bad input", ChangesOnBadInput),
        ("context", NoContext),
        ("context", ContextOffByOne),
    ];
    let caught = broken.map(|(clause, fault)| {
        // One of them leaves gradients on.
        let result = std::thread::spawn(move || contract::language_model(&Broken::new(fault))).join();
        (clause, result.unwrap())
    });
    super::all_caught("language_model", &caught);
}
