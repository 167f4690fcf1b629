//! The methods of the table: a name, and what it makes of a generation.

use controlgen_core::Result;
use controlgen_text::arithmetic::{classifier_free_guidance, dexperts};
use controlgen_text::classifiers::PrefixDiscriminator;
use controlgen_text::controls::{Fudge, Gedi, TopK, TopP};
use controlgen_text::pplm::{BagOfWords, Pplm, PplmSettings};
use controlgen_text::{Generate, Generation, TextModel};

use super::words;

/// How many of the best tokens FUDGE weighs. Few: each is a token for the guide to read.
const CANDIDATES: usize = 10;
/// λ of FUDGE by itself. The best ten tokens are far likelier than what top-p samples, so that much can be asked of them.
const WEIGHT: f64 = 20.0;
/// Of how many texts the best is taken where a method says so.
const BEST_OF: usize = 4;

/// What texts are to be made of.
pub struct Job<'j> {
    /// The model.
    pub model: &'j TextModel,
    /// What leads FUDGE.
    pub guide: &'j PrefixDiscriminator,
    /// What a text of each prompt begins with; one text each.
    pub prompts: &'j [String],
    /// `positive` or `negative`.
    pub target: &'static str,
    /// How many new tokens each has.
    pub tokens: usize,
    /// The seed of these texts.
    pub seed: u64,
}

impl Job<'_> {
    /// The target first, then its opposite.
    fn instructions(&self) -> [&'static str; 2] {
        let [positive, negative] = words::INSTRUCTIONS;
        if self.target == "positive" { [positive, negative] } else { [negative, positive] }
    }

    fn fudge(&self, weight: f64) -> Result<Fudge<PrefixDiscriminator>> {
        Fudge::new(self.guide.of(self.target)?, weight, CANDIDATES)
    }

    /// Of lengths that are all the same: a text ends by its length alone.
    fn generate<'a>(&self, model: &'a TextModel) -> Generate<'a> {
        model.generate_batch(self.prompts.iter().cloned()).max_new_tokens(self.tokens).eos(Vec::new())
    }

    fn sampled(&self, generate: Generate<'_>) -> Result<Generation> {
        generate.with(TopP::new(0.9)?).sample(self.seed).run()
    }

    /// A model that the instructions lead by DExperts' formula.
    fn experts(&self, alpha: f64) -> Result<TextModel> {
        let [wanted, other] = self.instructions();
        self.model.arithmetic(|m| Ok(dexperts(&m.prompt(), &m.after(wanted)?, &m.after(other)?, alpha)))
    }
}

/// One row of the table.
pub struct Method {
    /// As it is asked for and printed.
    pub name: &'static str,
    /// A text a prompt, in their order.
    pub make: fn(&Job<'_>) -> Result<Vec<String>>,
}

/// What the other rows are held against: texts of nothing but the model.
pub const REFERENCE: &str = "reference";

fn texts(generation: &Generation) -> Vec<String> {
    generation.completions.iter().map(|completion| completion.text.clone()).collect()
}

/// In the order of the table. All draw from the 0.9 of the mass that the control leaves (top-p).
pub const METHODS: &[Method] = &[
    Method { name: REFERENCE, make: |job| Ok(texts(&job.sampled(job.generate(job.model))?)) },
    // What FUDGE's ban of all other tokens does by itself to fluency.
    Method {
        name: "top_k_10",
        make: |job| Ok(texts(&job.sampled(job.generate(job.model).with(TopK::new(CANDIDATES)?))?)),
    },
    // Prompt and negative prompt are instructions before the text.
    Method {
        name: "cfg",
        make: |job| {
            let [wanted, other] = job.instructions();
            let model = job
                .model
                .arithmetic(|m| Ok(classifier_free_guidance(&m.after(wanted)?, &m.after(other)?, 2.0)))?;
            Ok(texts(&job.sampled(job.generate(&model))?))
        },
    },
    Method {
        name: "dexperts",
        make: |job| {
            let model = job.experts(2.0)?;
            Ok(texts(&job.sampled(job.generate(&model))?))
        },
    },
    Method {
        name: "gedi",
        make: |job| {
            let terms = job.model.terms();
            let [wanted, other] = job.instructions();
            let control = Gedi::new(&[terms.after(wanted)?, terms.after(other)?], 0, 30.0)?;
            Ok(texts(&job.sampled(job.generate(job.model).with(control))?))
        },
    },
    Method {
        name: "fudge",
        make: |job| Ok(texts(&job.sampled(job.generate(job.model).with(job.fudge(WEIGHT)?))?)),
    },
    Method {
        name: "pplm",
        make: |job| {
            let [positive, negative] = words::BAGS;
            let bag = if job.target == "positive" { positive } else { negative };
            let bag = BagOfWords::words(job.model.tokenizer(), bag.split_whitespace())?;
            let settings = PplmSettings::default();
            let model = job.model.with_lm(Box::new(Pplm::new(job.model.lm().handle(), bag, settings)?))?;
            Ok(texts(&job.sampled(job.generate(&model))?))
        },
    },
    // The experts move the distribution, the discriminator picks from it.
    Method {
        name: "dexperts_fudge",
        make: |job| {
            let model = job.experts(1.0)?;
            Ok(texts(&job.sampled(job.generate(&model).with(job.fudge(WEIGHT)?))?))
        },
    },
    // The best of several by the discriminator that led them, at the whole text.
    Method {
        name: "fudge_best_of_4",
        make: |job| best(job, job.generate(job.model).with(job.fudge(WEIGHT)?)),
    },
    Method {
        name: "dexperts_best_of_4",
        make: |job| {
            let model = job.experts(1.5)?;
            best(job, job.generate(&model))
        },
    },
];

/// Of several samples of each prompt the one that the guide finds most like the target.
fn best(job: &Job<'_>, generate: Generate<'_>) -> Result<Vec<String>> {
    let made = texts(&job.sampled(generate.n(BEST_OF))?);
    let guide = job.guide.of(job.target)?;
    let mut chosen = Vec::with_capacity(job.prompts.len());
    for (prompt, completions) in job.prompts.iter().zip(made.chunks(BEST_OF)) {
        let wholes: Vec<String> = completions.iter().map(|text| [prompt.as_str(), text].concat()).collect();
        let scores = guide.of_strings(job.model.tokenizer(), &wholes)?;
        let best = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i);
        chosen.extend(completions.get(best).cloned());
    }
    Ok(chosen)
}
