//! A model that counts what it is asked.

use std::sync::{Arc, Mutex};

use controlgen_core::{
    LanguageModel, LmInput, LmOutput, LmSpec, Pass, Result, SiteMap, Source, State, Tokens, WeightMap,
};
use tch::Tensor;

pub struct Counting {
    lm: Box<dyn LanguageModel>,
    /// Rows and tokens of each call.
    pub calls: Arc<Mutex<Vec<Vec<i64>>>>,
}

impl Counting {
    pub fn new(lm: impl LanguageModel) -> Self {
        Self { lm: Box::new(lm), calls: Arc::default() }
    }

    pub fn share(&self) -> Self {
        Self { lm: self.lm.handle(), calls: Arc::clone(&self.calls) }
    }
}

impl LanguageModel for Counting {
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
        self.calls.lock().unwrap().push(tokens.size()[..2].to_vec());
        self.lm.forward(input, state, pass)
    }
    fn map_weights(&self, f: WeightMap<'_>) -> Result<Box<dyn LanguageModel>> {
        self.lm.map_weights(f)
    }
}
