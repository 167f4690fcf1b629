//! The search that a configuration asks for.

use controlgen_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::GenerationConfig;
use crate::generate::Generate;
use crate::lexical::Clauses;
use crate::search::{
    BeamSearch, BestOf, Choice, ContrastiveSearch, DiverseBeamSearch, GridBeamSearch, NeuroLogic, Search,
    Smc, Speculative, StochasticBeamSearch,
};

/// How tokens are searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The most probable token each time.
    Greedy,
    /// Tokens drawn one by one.
    Sample,
    /// [`BeamSearch`].
    Beam,
    /// [`DiverseBeamSearch`]: `num_beam_groups`, `diversity_penalty`.
    DiverseBeam,
    /// [`StochasticBeamSearch`].
    StochasticBeam,
    /// [`ContrastiveSearch`]: `top_k`, `penalty_alpha`.
    Contrastive,
    /// [`BestOf`] `num_samples` by mean log-probability.
    BestOf,
    /// [`Smc`]: `num_particles`. With `clauses`, `clause_reward` leads the particles.
    Smc,
    /// [`Speculative`] decoding by look-up in the text: `prompt_lookup_num_tokens`; greedy unless `do_sample`.
    PromptLookup,
    /// [`NeuroLogic`]: `clauses`, `look_ahead`.
    Neurologic,
    /// [`GridBeamSearch`]: `clauses`.
    GridBeam,
}

impl Method {
    /// Whether tokens are drawn, so that what shapes the distribution acts.
    fn draws(self) -> Option<bool> {
        match self {
            Self::Sample | Self::BestOf | Self::Smc | Self::StochasticBeam => Some(true),
            Self::PromptLookup => None,
            _ => Some(false),
        }
    }

    fn by_beams(self) -> bool {
        matches!(
            self,
            Self::Beam | Self::DiverseBeam | Self::StochasticBeam | Self::Neurologic | Self::GridBeam
        )
    }

    fn meets_clauses(self) -> bool {
        matches!(self, Self::Neurologic | Self::GridBeam)
    }
}

/// What a method takes that is not said, as [`GenerationConfig`] documents it.
const NUM_BEAMS: usize = 4;
const NUM_BEAMS_UNDER_CLAUSES: usize = 20;
const NUM_SAMPLES: usize = 8;
const NUM_PARTICLES: usize = 32;
const LOOKED_UP: usize = 3;
const DRAFTED: usize = 10;
const PENALTY_ALPHA: f64 = 0.6;
const CONTRASTED: usize = 4;

impl GenerationConfig {
    /// The method that is named, or the one that transformers' fields mean.
    pub(super) fn method(&self) -> Result<Method> {
        let beams = self.num_beams.unwrap_or(1);
        let Some(method) = self.method else {
            return match (self.do_sample, beams) {
                (sampled, 0 | 1) => Ok(if sampled { Method::Sample } else { Method::Greedy }),
                (true, _) => {
                    let what = format!("do_sample with num_beams = {beams}");
                    Err(Error::unsupported(what, "one of the two, or method = \"stochastic_beam\""))
                }
                (false, _) if self.num_beam_groups.unwrap_or(1) > 1 => Ok(Method::DiverseBeam),
                (false, _) => Ok(Method::Beam),
            };
        };
        if self.do_sample && method.draws() == Some(false) {
            let what = format!("do_sample with method = {}", name(method));
            return Err(Error::unsupported(what, "the methods that draw tokens"));
        }
        if beams > 1 && !method.by_beams() {
            let what = format!("num_beams = {beams} with method = {}", name(method));
            return Err(Error::unsupported(what, "the methods by beams"));
        }
        Ok(method)
    }

    /// Whether the search draws tokens.
    pub(super) fn draws(&self) -> Result<bool> {
        Ok(self.method()?.draws().unwrap_or(self.do_sample))
    }

    /// Whether clauses are for the search to meet, not for a control.
    pub(super) fn search_meets_clauses(&self) -> Result<bool> {
        Ok(self.method()?.meets_clauses())
    }

    /// The search, with these clauses.
    pub(super) fn search(&self, to: &Generate<'_>, clauses: Option<&Clauses>) -> Result<Box<dyn Search>> {
        let method = self.method()?;
        // What is said of beams must make sense, used or not.
        let beams = self.beams(method)?;
        let diverse = self.diverse(beams)?;
        let seed = to.seed;
        let choice = if self.draws()? { Choice::Sample { seed, first: 0 } } else { Choice::Greedy };
        let clauses = || {
            let missing =
                || Error::value(format!("clauses of method = {}", name(method)), "at least one", "none");
            clauses.ok_or_else(missing)
        };
        Ok(match method {
            Method::Greedy | Method::Sample => Box::new(choice),
            Method::Beam => Box::new(beams),
            Method::DiverseBeam => match diverse {
                Some(diverse) => Box::new(diverse),
                None => {
                    return Err(Error::value(
                        "num_beam_groups of method = \"diverse_beam\"",
                        "at least 2",
                        "none",
                    ));
                }
            },
            Method::StochasticBeam => {
                Box::new(StochasticBeamSearch::new(self.num_beams.unwrap_or(NUM_BEAMS), seed)?)
            }
            Method::Contrastive => Box::new(self.contrastive()?),
            Method::BestOf => Box::new(BestOf::new(self.num_samples.unwrap_or(NUM_SAMPLES), seed)?),
            Method::Smc => Box::new(Smc::new(self.num_particles.unwrap_or(NUM_PARTICLES), seed)?),
            Method::PromptLookup => {
                let tokens = self.prompt_lookup_num_tokens.unwrap_or(DRAFTED);
                Box::new(Speculative::prompt_lookup(choice, LOOKED_UP, tokens)?)
            }
            Method::Neurologic => {
                let search = NeuroLogic::new(beams, clauses()?);
                match self.look_ahead.filter(|&tokens| tokens > 0) {
                    Some(tokens) => Box::new(search.look_ahead(tokens, 1.0)?),
                    None => Box::new(search),
                }
            }
            Method::GridBeam => Box::new(GridBeamSearch::new(beams, clauses()?)),
        })
    }

    fn beams(&self, method: Method) -> Result<BeamSearch> {
        let unsaid = match method {
            Method::Neurologic | Method::GridBeam => NUM_BEAMS_UNDER_CLAUSES,
            method if method.by_beams() => NUM_BEAMS,
            _ => 1,
        };
        Ok(BeamSearch::new(self.num_beams.unwrap_or(unsaid))?
            .length_penalty(self.length_penalty.unwrap_or(1.0))?
            .early_stopping(self.early_stopping.unwrap_or_default()))
    }

    fn contrastive(&self) -> Result<ContrastiveSearch> {
        match (self.penalty_alpha, self.top_k) {
            (None, None) => ContrastiveSearch::new(PENALTY_ALPHA, CONTRASTED),
            (Some(alpha), Some(k)) => ContrastiveSearch::new(alpha, k),
            (alpha, k) => {
                let found = format!("penalty_alpha {alpha:?} and top_k {k:?}");
                Err(Error::value("contrastive search", "both penalty_alpha and top_k, or neither", found))
            }
        }
    }

    fn diverse(&self, beams: BeamSearch) -> Result<Option<DiverseBeamSearch>> {
        match (self.num_beam_groups.unwrap_or(1), self.diversity_penalty.unwrap_or(0.0)) {
            (1, 0.0) => Ok(None),
            (1, penalty) => Err(Error::value("diversity_penalty", "0 with num_beam_groups = 1", penalty)),
            (groups, penalty) => DiverseBeamSearch::new(beams, groups, penalty).map(Some),
        }
    }
}

/// As it is written in a file.
fn name(method: Method) -> String {
    serde_json::to_string(&method).unwrap_or_default()
}
