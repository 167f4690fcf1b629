//! Pictures of shapes by their captions.

use std::path::{Path, PathBuf};

use controlgen_core::checkpoint::replace;
use controlgen_core::noise::{Noise, Stream};
use controlgen_core::{Condition, Denoiser, Error, Parameterisation, Result};
use controlgen_diffusion::losses::{Denoising, Timesteps, Weighting};
use controlgen_diffusion::pipelines::{Run, TextToImage};
use controlgen_diffusion::prompt::ClipPrompt;
use controlgen_diffusion::{DiffusionSchedule, PromptEncoder, Scheduler};
use serde_json::{Value, json};
use tch::Tensor;

use super::{Card, DenoiserRecipe, Options, Pictures, Settings, models_folder};
use crate::shapes::{
    Caption, NamedObject, Object, Reader, Renderer, SIDE, Scene, Split, measure, save_sheet,
};

/// How many captions there are of one object, and of two, in an evaluation.
const EACH: usize = 32;

/// What the pixel model is trained with.
pub(super) fn pixel_settings() -> Settings {
    Settings {
        steps: 10_000,
        batch: 32,
        rate: 2e-3,
        warmup: 100,
        evaluate_every: 1000,
        save_every: 250,
        ..Settings::default()
    }
}

/// Pictures of the training split, rendered as they are asked for.
pub(super) struct ShapePictures {
    renderer: Renderer,
    reader: Reader,
    prompts: ClipPrompt,
    scheduler: Value,
    sheets: PathBuf,
    evaluations: usize,
    /// How many captions of a hundred are dropped.
    dropped: f64,
}

/// The text-conditioned model of pixels: 1.6 million parameters.
pub(super) fn pixel(options: &Options, seed: u64) -> Result<DenoiserRecipe<ShapePictures>> {
    let unet = json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": SIDE,
        "in_channels": 3,
        "out_channels": 3,
        "center_input_sample": false,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        "block_out_channels": [32, 64, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 128,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "resnet_time_scale_shift": "scale_shift",
    });
    let scheduler = json!({
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": false,
        "set_alpha_to_one": true,
        "steps_offset": 0,
    });
    let schedule = DiffusionSchedule::cosine(1000)?;
    let training = Denoising::new(schedule, Timesteps::Shifted(3.0), Weighting::Simple)?;
    let pictures = ShapePictures {
        renderer: Renderer::new(SIDE)?,
        reader: Reader::new(SIDE)?,
        prompts: ClipPrompt::open(models_folder().join("shapes/text"), options.placement)?,
        scheduler: scheduler.clone(),
        sheets: options.run.clone(),
        evaluations: 0,
        dropped: 0.1,
    };
    DenoiserRecipe::new(unet, Parameterisation::V, (training, scheduler), pictures, (options.placement, seed))
}

impl ShapePictures {
    fn conditions(&self, texts: &[&str]) -> Result<Vec<Condition>> {
        let encoded = self.prompts.encode(texts)?;
        Ok(encoded.into_iter().map(|prompt| Condition::Features(prompt.features)).collect())
    }
}

impl Pictures for ShapePictures {
    fn examples(&self) -> usize {
        super::DRAWN_ANEW
    }

    fn batch(&mut self, examples: &[usize], stream: &mut Stream) -> Result<(Tensor, Vec<Condition>)> {
        let scenes: Vec<Scene> = examples.iter().map(|_| Scene::sample(stream, Split::Training)).collect();
        let captions: Vec<String> = scenes
            .iter()
            .map(|scene| {
                let caption = Caption::of(scene, stream).text;
                if stream.uniform() < self.dropped { String::new() } else { caption }
            })
            .collect();
        let texts: Vec<&str> = captions.iter().map(String::as_str).collect();
        Ok((self.renderer.render(&scenes)?, self.conditions(&texts)?))
    }

    fn evaluate(&mut self, denoiser: Box<dyn Denoiser>) -> Result<Vec<(String, f64)>> {
        let mut stream = Noise::seeded(0x6576_616c).stream(0);
        let mut scenes: Vec<Scene> = (0..EACH).map(|_| Scene::single(&mut stream, Split::HeldOut)).collect();
        scenes.extend((0..EACH).map(|_| Scene::pair(&mut stream, Split::HeldOut)));
        let captions: Vec<Caption> = scenes.iter().map(|scene| Caption::of(scene, &mut stream)).collect();
        let scheduler = Scheduler::parse("scheduler_config.json", &self.scheduler.to_string())?;
        let pipeline = TextToImage::new(denoiser, scheduler, None, self.prompts.handle())?;
        let run = Run::new().seed(1).steps(20).guidance_scale(3.0).batch(EACH);
        let pixels = measure::pictures(&pipeline, &captions, run)?;
        self.evaluations += 1;
        std::fs::create_dir_all(&self.sheets).map_err(|error| Error::io(&self.sheets, error))?;
        save_sheet(&self.sheets.join(format!("samples-{:03}.png", self.evaluations)), &pixels, 8, 2)?;
        let read = self.reader.read(&pixels)?;
        let right: Vec<bool> =
            captions.iter().zip(&read).map(|(caption, scene)| caption.named.holds_of(scene)).collect();
        let share = |right: &[bool]| right.iter().filter(|&&right| right).count() as f64 / EACH as f64;
        // Of the named objects, how many have a read one of their colour, their shape.
        let found = |same: &dyn Fn(&NamedObject, &Object) -> bool| {
            let pairs = captions.iter().zip(&read);
            let all =
                pairs.flat_map(|(caption, scene)| caption.named.objects.iter().map(move |o| (o, scene)));
            let (mut count, mut found) = (0.0, 0.0);
            for (named, scene) in all {
                count += 1.0;
                found += f64::from(u8::from(scene.objects.iter().any(|object| same(named, object))));
            }
            found / count
        };
        Ok(vec![
            ("one_object".to_owned(), share(&right[..EACH])),
            ("two_objects".to_owned(), share(&right[EACH..])),
            ("colors".to_owned(), found(&|named, object| named.color == object.color)),
            ("shapes".to_owned(), found(&|named, object| named.shape == object.shape)),
            ("objects".to_owned(), found(&|named, object| named.matches(object))),
        ])
    }

    fn configuration(&self) -> Value {
        json!({ "world": "shapes", "size": self.renderer.size(), "dropped": self.dropped })
    }

    fn write_more(&self, folder: &Path) -> Result<()> {
        let index = json!({
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "vae": [null, null],
        });
        replace(folder.join("model_index.json"), format!("{index:#}\n").as_bytes())?;
        for name in ["text_encoder", "tokenizer"] {
            copy(&models_folder().join("shapes/text").join(name), &folder.join(name))?;
        }
        Ok(())
    }

    fn card(&self) -> Card {
        Card {
            title: "An image of shapes from a text".to_owned(),
            data: "Pictures of 32×32 pixels with captions, drawn anew for each step from the training split of \
                   `benches::shapes`. Held out are five of 48 pairs of colour and shape, and a tenth of the ordered pairs of \
                   objects."
                .to_owned(),
            method: "A UNet of pixels with attention to the states of the text tower of shapes, which stays as it is, and its \
                     pooled states added to the time's embedding. Squared error of v, timesteps shifted by 3 towards noise; \
                     a tenth of the captions is dropped."
                .to_owned(),
            measures: "Of 32 held-out captions of one object and 32 of two, 20 steps of DDIM at guidance 3: the share of pictures \
                       in which the reader finds all that is named and no object more, and of the named objects those of which it \
                       finds the colour, the shape, and everything:"
                .to_owned(),
        }
    }
}

/// Copies the files of a folder.
fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to).map_err(|error| Error::io(to, error))?;
    for entry in std::fs::read_dir(from).map_err(|error| Error::io(from, error))? {
        let path = entry.map_err(|error| Error::io(from, error))?.path();
        let name = path.file_name().unwrap_or_default();
        let bytes = std::fs::read(&path).map_err(|error| Error::io(&path, error))?;
        replace(to.join(name), &bytes)?;
    }
    Ok(())
}
