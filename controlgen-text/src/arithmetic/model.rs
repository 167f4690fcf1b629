//! A language model that is an arithmetic of others.

use std::sync::Arc;

use controlgen_core::{
    Error, LanguageModel, LmInput, LmOutput, LmSpec, Pass, Result, SiteMap, Source, State, WeightMap,
};
use tch::{Kind, Tensor};

use super::{Expression, Readings, Term};

/// The language model of an [`Expression`]: scores Σᵢ fᵢ log pᵢ(v | xᵢ), with each log pᵢ normalised and the sum as it is,
/// so that `a + b` is the product of two experts and `a - 0.6 * b + c` what is written. Softmax of the scores solves, if
/// Σ fᵢ = 1, min_p Σᵢ fᵢ KL(p ‖ pᵢ); for another sum [`normalised`](Self::normalised) does (Dekoninck et al. 2024, theorem 1).
///
/// The first call of `forward` reads the prompt, or `start` does, of an encoder–decoder: there the terms part. Terms with the same weights are computed as rows of
/// one call: with K of them a batch of B is one of K · B, and the state has as many rows. Prompts of different lengths
/// are padded on the left. A term that has another text in the prompt's place says nothing *within* the prompt: NaN, where
/// logits of all positions are asked for.
///
/// Sites, special tokens and embeddings are those of the first term's model. Controls at sites act on all terms that have
/// these sites, each row with its lane; taps see the first term alone.
///
/// *Cost*: a forward call for each model, with a row for each of its terms; K normalisations of `[B, V]`.
pub struct ModelArithmetic {
    readings: Readings,
    spec: LmSpec,
    plan: Arc<Plan>,
}

/// How what was read is added up.
#[derive(Clone)]
struct Plan {
    parts: Vec<Part>,
    /// The least log-probability, compared with the best one's.
    plausible: Vec<Part>,
    /// What the sum is multiplied by.
    scale: f64,
}

/// A factor, or the bound of a plausible token, and the reading that it is for.
#[derive(Clone, Copy)]
struct Part {
    number: f64,
    reading: usize,
    temperature: f64,
}

impl Part {
    /// log p `[B, T, V]`, f32.
    fn log_p(&self, read: &[Tensor]) -> Result<Tensor> {
        let logits = &read[self.reading];
        if self.temperature == 1.0 {
            return Ok(logits.f_log_softmax(-1, Kind::Float)?);
        }
        let logits = logits.f_to_kind(Kind::Float)?.f_div_scalar(self.temperature)?;
        Ok(logits.f_log_softmax(-1, Kind::Float)?)
    }
}

impl ModelArithmetic {
    /// Terms that are the same are added up first; of those that are left none has the factor 0.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a factor that is no number; [`Error::Value`] where nothing is left, for vocabularies that
    /// differ, a temperature that is not above 0, a token id that is none, an empty text in the prompt's place, or a
    /// share of plausible tokens outside (0, 1]; [`Error::Context`] for a text that leaves no room.
    pub fn new(expression: impl Into<Expression>) -> Result<Self> {
        let expression = expression.into();
        let mut terms: Vec<(f64, Term)> = Vec::new();
        for (i, (factor, term)) in expression.parts.into_iter().enumerate() {
            if !factor.is_finite() {
                let found = if factor.is_nan() { "NaN" } else { "infinity" }.to_owned();
                return Err(Error::NotFinite { what: "factor".into(), at: format!("term {i}"), found });
            }
            match terms.iter_mut().find(|(_, known)| known.is(&term)) {
                Some((sum, _)) => *sum += factor,
                None => terms.push((factor, term)),
            }
        }
        terms.retain(|(factor, _)| *factor != 0.0);
        if terms.is_empty() {
            return Err(Error::value("terms", "at least one with a factor other than 0", "none"));
        }
        let mut readings = Readings::new();
        let mut part = |(number, term): &(f64, Term)| -> Result<Part> {
            Ok(Part { number: *number, reading: readings.add(term)?, temperature: term.temperature })
        };
        let parts = terms.iter().map(&mut part).collect::<Result<_>>()?;
        if let Some((bound, _)) =
            expression.plausible.iter().find(|(bound, _)| !(*bound <= 0.0 && bound.is_finite()))
        {
            return Err(Error::value("alpha of plausible tokens", "above 0 and at most 1", bound.exp()));
        }
        let plausible = expression.plausible.iter().map(&mut part).collect::<Result<_>>()?;
        let spec = LmSpec { context: readings.context(), ..readings.base().spec().clone() };
        Ok(Self { readings, spec, plan: Arc::new(Plan { parts, plausible, scale: 1.0 }) })
    }

    /// The scores are divided by Σ fᵢ, as in theorem 1 of the paper.
    ///
    /// # Errors
    /// [`Error::Value`] where Σ fᵢ is not above 0: then there is no distribution that is best.
    pub fn normalised(self) -> Result<Self> {
        let sum: f64 = self.plan.parts.iter().map(|part| part.number).sum();
        let scale = sum.recip();
        if !(sum > 0.0 && scale.is_finite()) {
            return Err(Error::value("the sum of factors that is divided by", "above 0", sum));
        }
        let plan = Plan { scale, ..(*self.plan).clone() };
        Ok(Self { plan: Arc::new(plan), ..self })
    }

    /// Another handle over the same weights.
    fn share(&self) -> Self {
        Self { readings: self.readings.handle(), spec: self.spec.clone(), plan: Arc::clone(&self.plan) }
    }

    /// The scores `[B, T, V]`, f32, of each reading's logits.
    fn value(&self, read: &[Tensor]) -> Result<Tensor> {
        let Plan { parts, plausible, scale } = &*self.plan;
        let mut sum: Option<Tensor> = None;
        for part in parts {
            let factor = part.number * scale;
            let log_p = part.log_p(read)?;
            let value = if factor == 1.0 { log_p } else { log_p.f_mul_scalar(factor)? };
            sum = Some(match sum {
                None => value,
                Some(sum) => sum.f_add(&value)?,
            });
        }
        let mut sum = sum.ok_or_else(|| Error::value("terms", "at least one", 0))?;
        for part in plausible {
            let log_p = part.log_p(read)?;
            let least = log_p.f_amax([-1].as_slice(), true)?.f_add_scalar(part.number)?;
            sum = sum.f_masked_fill(&log_p.f_lt_tensor(&least)?, f64::NEG_INFINITY)?;
        }
        Ok(sum)
    }
}

impl LanguageModel for ModelArithmetic {
    fn handle(&self) -> Box<dyn LanguageModel> {
        Box::new(self.share())
    }

    fn spec(&self) -> &LmSpec {
        &self.spec
    }

    fn sites(&self) -> &SiteMap {
        self.readings.base().sites()
    }

    fn embeddings(&self) -> &Tensor {
        self.readings.base().embeddings()
    }

    fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<State> {
        let rows = match source {
            Source::Rows(rows) => rows,
            Source::Encoder(input) => input.validate(&self.spec)?.0,
        };
        pass.check(self.sites(), rows)?;
        Ok(State::new(self.readings.start(source, pass)?))
    }

    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        let (batch, len) = input.validate(&self.spec)?;
        pass.check(self.sites(), batch)?;
        let (limit, held) = (self.spec.context, state.len());
        let state = self.readings.own(state)?;
        let needed = held + len + pass.position_offset()?.most();
        if needed > limit {
            return Err(Error::Context { limit, needed });
        }
        let read = self.readings.forward(input, state, pass)?;
        Ok(LmOutput { logits: self.value(&read)? })
    }

    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        let readings = self.readings.map_weights(f)?;
        Ok(Box::new(Self { readings, ..self.share() }))
    }
}
