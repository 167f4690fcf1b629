//! Images of prompts by way of their CLIP embeddings.

use std::path::Path;

use controlgen_core::progress::Flow;
use controlgen_core::{Condition, Denoiser, Error, Pass, Placement, Result};
use tch::{Kind, Tensor};

use super::batch::{Batch, Conditions, Denoise};
use super::directory::Directory;
use super::images::{Images, Made};
use super::prompts::{Distinct, Prompts};
use super::run::Run;
use super::stage::Stage;
use crate::image::Parameters;
use crate::models::{PriorTransformer, UnClipTextProj};
use crate::prompt::ClipPrompt;
use crate::{EncodedPrompt, Predicts, PromptEncoder, Scheduler};

/// unCLIP (Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", DALL·E 2, 2022), as Karlo
/// has it: a prior makes the CLIP embedding of an image from that of the text, a decoder the image from both, and a third
/// model enlarges it, of which the last step is another model's.
///
/// What a [`Run`] says of steps, guidance, latents and controls it says of the decoder; sizes are the models' own. With
/// PyTorch's seed the images are diffusers' but for 1 or 2 parts in a thousand, by which its f32 tables are off in each
/// model's last step.
pub struct UnClip {
    prompts: ClipPrompt,
    prior: PriorTransformer,
    /// How the prior is run: a handle of the same.
    priors: Stage,
    projections: UnClipTextProj,
    decoder: Stage,
    super_resolution: Stage,
    last: Box<dyn Denoiser>,
    name: Option<String>,
}

impl UnClip {
    /// The classes of model_index.json that can be opened.
    pub const CLASSES: [&'static str; 1] = ["UnCLIPPipeline"];

    /// Opens a directory of diffusers. By default it takes 25 steps with s = 4 for the prior, 25 with s = 8 for the
    /// decoder, and 7 to enlarge.
    ///
    /// # Errors
    /// As [`TextToImage::open`](super::TextToImage::open); [`Error::Value`] for components that do not fit each other.
    pub fn open(path: impl AsRef<Path>, placement: Placement) -> Result<Self> {
        let directory = Directory::open(path.as_ref(), &Self::CLASSES)?;
        let components = [
            "tokenizer",
            "text_encoder",
            "prior",
            "prior_scheduler",
            "text_proj",
            "decoder",
            "decoder_scheduler",
            "super_res_first",
            "super_res_last",
            "super_res_scheduler",
        ];
        directory.require(&components)?;
        let scheduler = |name: &str| Scheduler::open(directory.folder(name).join("scheduler_config.json"));
        let stage = |name, of: &str, steps, scale| -> Result<Stage> {
            let scheduler = scheduler(of)?;
            Ok(Stage { denoiser: directory.denoiser(name, &scheduler, placement)?, scheduler, steps, scale })
        };
        let schedules = scheduler("prior_scheduler")?;
        let predicts = Predicts {
            parameterisation: schedules.parameterisation(),
            learned_variance: schedules.learned_variance(),
        };
        let prior = PriorTransformer::open(directory.folder("prior"), predicts, placement)?;
        let super_resolution = stage("super_res_first", "super_res_scheduler", 7, 1.0)?;
        let last = directory.denoiser("super_res_last", &super_resolution.scheduler, placement)?;
        let made = Self {
            prompts: ClipPrompt::open(path.as_ref(), placement)?.with_embeds(),
            priors: Stage { denoiser: prior.handle(), scheduler: schedules, steps: 25, scale: 4.0 },
            prior,
            projections: UnClipTextProj::open(directory.folder("text_proj"), placement)?,
            decoder: stage("decoder", "decoder_scheduler", 25, 8.0)?,
            super_resolution,
            last,
            name: Some(directory.name()),
        };
        made.check()?;
        Ok(made)
    }

    /// Refuses components that do not fit each other.
    fn check(&self) -> Result<()> {
        let (text, prior) = (self.prompts.encoder().config(), self.prior.config());
        let width = self.projections.config().clip_embeddings_dim;
        let equal = |what: &str, expected: i64, found: i64| {
            if expected == found { Ok(()) } else { Err(Error::value(what, expected, found)) }
        };
        if !self.prompts.encoder().projects() {
            return Err(Error::value("the text encoder", "one with text_projection", "one without"));
        }
        equal("width of the text's states, as the prior's", prior.embedding_dim, text.blocks.hidden_size)?;
        equal(
            "width of the text's embedding, as the prior's",
            prior.embedding_proj_dim,
            text.projection_dim,
        )?;
        equal("width of embeddings, as the prior's", prior.embedding_dim, width)?;
        let context = i64::try_from(self.prompts.tokenizer().context()).unwrap_or(0);
        equal("positions of the text, as the prior's", prior.num_embeddings, context)?;
        let (small, large) = (self.decoder.denoiser.spec(), self.super_resolution.denoiser.spec());
        equal("channels of the enlarged images", small.channels, large.channels)?;
        equal("channels of the last step", large.channels, self.last.spec().channels)
    }

    /// With so many steps of the prior, and s of its guidance.
    #[must_use]
    pub fn with_prior(self, steps: usize, scale: f64) -> Self {
        Self { priors: Stage { steps, scale, ..self.priors }, ..self }
    }

    /// With so many steps to enlarge.
    #[must_use]
    pub fn with_super_resolution(self, steps: usize) -> Self {
        Self { super_resolution: Stage { steps, ..self.super_resolution }, ..self }
    }

    /// Another handle over the same weights.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            prompts: self.prompts.share(),
            prior: self.prior.share(),
            priors: self.priors.share(),
            projections: self.projections.share(),
            decoder: self.decoder.share(),
            super_resolution: self.super_resolution.share(),
            last: (*self.last).handle(),
            name: self.name.clone(),
        }
    }

    /// The decoder, to whose sites a run's controls are bound.
    pub fn decoder(&self) -> &dyn Denoiser {
        &*self.decoder.denoiser
    }

    /// The embeddings `[N, P]` of the images that the prior sees in prompts, of the same noise that [`Self::run`] draws.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn embeddings(&self, prompts: impl Into<Prompts>, mut run: Run<'_>) -> Result<Tensor> {
        let (watch, prompts) = (run.watch(), prompts.into());
        let (texts, way) = (self.texts(&prompts)?, self.priors.way()?);
        let made = watch
            .batches(&run, prompts.count()?, way.steps.len(), |batch| self.embed(batch, &way, &texts))?;
        Ok(Tensor::f_cat(&made, 0)?)
    }

    /// Images of prompts. A run that is stopped has what there is: the last estimates of the stage that it was at.
    ///
    /// # Errors
    /// As [`TextToImage::run`](super::TextToImage::run); [`Error::Unsupported`] for another size than the models'.
    pub fn run(&self, prompts: impl Into<Prompts>, mut run: Run<'_>) -> Result<Images> {
        let (watch, prompts) = (run.watch(), prompts.into());
        let images = prompts.count()?;
        let large = self.super_resolution.denoiser.spec().clone();
        if let Some(size) = run.size.filter(|&size| size != large.size) {
            return Err(Error::unsupported(format!("a size of {size:?}"), format!("{:?}", large.size)));
        }
        let spec = self.decoder.denoiser.spec();
        let shape = [spec.channels, spec.size[0], spec.size[1]];
        let scale = run.guidance_scale.unwrap_or(self.decoder.scale);
        let texts = self.texts(&prompts)?;
        let prior = self.priors.way()?;
        let way = run.way(&self.decoder.scheduler, self.decoder.steps)?;
        let way = run.denoise(&*self.decoder.denoiser, way, scale);
        let mut first = self.super_resolution.way()?;
        let mut last = Denoise { denoiser: &*self.last, ..first.share() };
        last.steps = first.steps.split_off(first.steps.len().saturating_sub(1));
        let steps = [&prior, &way, &first, &last].iter().map(|way| way.steps.len()).sum();
        let made = watch.batches(&run, images, steps, |batch| {
            let embeddings = self.embed(batch, &prior, &texts)?;
            let x = batch.noise(images, shape, &run, spec.placement)?;
            let mut x = if batch.flow() == Flow::Continue {
                batch.denoise(&way, &self.conditions(batch, &texts, &embeddings, &way)?, x)?
            } else {
                x
            };
            // Bicubic, with the filter that PyTorch uses where it may smooth.
            let small = x.f_clamp(-1.0, 1.0)?;
            let image = small.f_internal_upsample_bicubic2d_aa(large.size, false, None, None)?;
            x = image.shallow_clone();
            if batch.flow() == Flow::Continue {
                x = self.super_resolution.noise(batch)?;
                let none = Conditions { negative: None, prompt: vec![Condition::Features(Vec::new())] };
                let conditions = none.with("concat", &image)?;
                for way in [&first, &last].into_iter().filter(|way| !way.steps.is_empty()) {
                    if batch.flow() == Flow::Continue {
                        x = batch.denoise(way, &conditions, x)?;
                    }
                }
            }
            Made::new(batch, x, None, run.decode)
        })?;
        let parameters = |image: usize| Parameters {
            prompt: Some(prompts.prompt(image).to_owned()),
            negative_prompt: prompts.negative_of(image).map(str::to_owned),
            guidance_scale: Some(scale),
            ..run.parameters(image, &way, &self.decoder.scheduler, self.name.as_deref())
        };
        let truncated = (0..images).map(|image| texts.prompt[image].truncated.clone()).collect();
        Images::gather(&made, (0..images).map(parameters).collect(), truncated)
    }

    /// What each image's prompt is read as, and what is to be avoided.
    fn texts(&self, prompts: &Prompts) -> Result<Texts> {
        let images = prompts.count()?;
        let _no_gradients = tch::no_grad_guard();
        let mut texts = Distinct::default();
        let of: Vec<usize> = (0..images)
            .map(|image| prompts.prompt(image))
            .chain((0..images).map(|image| prompts.negative_of(image).unwrap_or("")))
            .map(|text| texts.place(text))
            .collect();
        let encoded =
            self.prompts.encode(&texts.0)?.into_iter().map(Text::new).collect::<Result<Vec<_>>>()?;
        let mut prompt: Vec<Text> = of.iter().filter_map(|&at| encoded.get(at).map(Text::share)).collect();
        let negative = prompt.split_off(images.min(prompt.len()));
        Ok(Texts { prompt, negative })
    }

    /// The embeddings `[B, P]` of a batch's images, by the prior.
    fn embed(&self, batch: &mut Batch<'_, '_>, way: &Denoise<'_>, texts: &Texts) -> Result<Tensor> {
        let condition = |text: &Text| {
            Condition::Features(vec![
                ("proj_embedding".to_owned(), text.embeds.shallow_clone()),
                ("encoder_hidden_states".to_owned(), text.states.shallow_clone()),
                ("attention_mask".to_owned(), text.mask.shallow_clone()),
            ])
        };
        let of = |texts: &[Text]| texts.iter().map(condition).collect::<Vec<_>>();
        let negative = way.needs_negative().then(|| of(&texts.negative));
        let conditions = Conditions { negative, prompt: of(&texts.prompt) }.rows(&batch.rows())?;
        let x = self.priors.noise(batch)?;
        self.prior.embeddings(&batch.denoise(way, &conditions, x)?)
    }

    /// What the decoder is told of a batch's texts and images; of no image where it is led away from.
    fn conditions(
        &self,
        batch: &Batch<'_, '_>,
        texts: &Texts,
        embeddings: &Tensor,
        way: &Denoise<'_>,
    ) -> Result<Conditions> {
        let told = |texts: &[Text], image: Option<&Tensor>| -> Result<Vec<Condition>> {
            let texts = texts.get(batch.rows()).unwrap_or_default();
            let stack =
                |part: fn(&Text) -> &Tensor| Tensor::f_stack(&texts.iter().map(part).collect::<Vec<_>>(), 0);
            let (embeds, states) = (stack(|text| &text.embeds)?, stack(|text| &text.states)?);
            let made = self.projections.forward(image, &embeds, &states, &Pass::default())?;
            let tokens = made.encoder_hidden_states.size3()?.1 - states.size3()?.1;
            let row = |(row, text): (i64, &Text)| -> Result<Condition> {
                let seen = Tensor::f_ones([tokens], (Kind::Bool, text.mask.device()))?;
                Ok(Condition::Features(vec![
                    ("encoder_hidden_states".to_owned(), made.encoder_hidden_states.f_get(row)?),
                    ("class_labels".to_owned(), made.class_labels.f_get(row)?),
                    ("encoder_attention_mask".to_owned(), Tensor::f_cat(&[&seen, &text.mask], 0)?),
                ]))
            };
            (0i64..).zip(texts).map(row).collect()
        };
        let negative = way.needs_negative().then(|| told(&texts.negative, None)).transpose()?;
        Ok(Conditions { negative, prompt: told(&texts.prompt, Some(embeddings))? })
    }
}

/// What the prompts of all images are read as.
struct Texts {
    prompt: Vec<Text>,
    negative: Vec<Text>,
}

/// What a prompt is read as.
struct Text {
    /// `[P]`
    embeds: Tensor,
    /// `[T, P]`
    states: Tensor,
    /// Boolean `[T]`
    mask: Tensor,
    truncated: Option<String>,
}

impl Text {
    fn new(encoded: EncodedPrompt) -> Result<Self> {
        let feature = |name: &str| {
            let found = encoded.features.iter().find(|feature| feature.0 == name);
            found.map(|feature| feature.1.shallow_clone()).ok_or_else(|| {
                Error::unsupported(format!("an encoded prompt without `{name}`"), format!("`{name}`"))
            })
        };
        Ok(Self {
            embeds: feature("text_embeds")?,
            states: feature("encoder_hidden_states")?,
            mask: feature("attention_mask")?,
            truncated: encoded.truncated,
        })
    }

    fn share(&self) -> Self {
        Self {
            embeds: self.embeds.shallow_clone(),
            states: self.states.shallow_clone(),
            mask: self.mask.shallow_clone(),
            truncated: self.truncated.clone(),
        }
    }
}
