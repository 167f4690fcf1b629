//! A language model that counts what it is asked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::Tensor;

use crate::{
    LanguageModel, LmInput, LmOutput, LmSpec, Pass, Result, SiteMap, Source, State, Tokens, WeightMap,
};

/// Another model, of whose forward calls it keeps rows and tokens, B and T. All handles keep one count; what
/// [`map_weights`](LanguageModel::map_weights) makes is not counted.
pub struct CountingLm {
    lm: Box<dyn LanguageModel>,
    calls: Arc<Mutex<Vec<Vec<i64>>>>,
}

impl CountingLm {
    /// Counts the calls of a model.
    pub fn new(lm: impl LanguageModel) -> Self {
        Self { lm: Box::new(lm), calls: Arc::default() }
    }

    /// Another handle, with the same count.
    #[must_use]
    pub fn share(&self) -> Self {
        Self { lm: self.lm.handle(), calls: Arc::clone(&self.calls) }
    }

    /// B and T of each call since it was made, or since the last [`take`](Self::take).
    pub fn calls(&self) -> Vec<Vec<i64>> {
        self.locked().clone()
    }

    /// The same, and counts from none again.
    pub fn take(&self) -> Vec<Vec<i64>> {
        std::mem::take(&mut *self.locked())
    }

    fn locked(&self) -> MutexGuard<'_, Vec<Vec<i64>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LanguageModel for CountingLm {
    fn handle(&self) -> Box<dyn LanguageModel> {
        Box::new(self.share())
    }
    fn spec(&self) -> &LmSpec {
        self.lm.spec()
    }
    fn sites(&self) -> &SiteMap {
        self.lm.sites()
    }
    fn embeddings(&self) -> &Tensor {
        self.lm.embeddings()
    }
    fn start(&self, source: Source<'_>, pass: &Pass<'_>) -> Result<State> {
        self.lm.start(source, pass)
    }
    fn forward(&self, input: LmInput<'_>, state: &mut State, pass: &Pass<'_>) -> Result<LmOutput> {
        let (Tokens::Ids(tokens) | Tokens::Embeds(tokens)) = input.tokens;
        self.locked().push(tokens.size().into_iter().take(2).collect());
        self.lm.forward(input, state, pass)
    }
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        self.lm.map_weights(f)
    }
}
