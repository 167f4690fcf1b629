//! What runs have in common: whose noise is whose, what is counted, how they are watched and stopped.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use controlgen_core::guidance::{Guided, Memory, Needs, Outputs, Step};
use controlgen_core::noise::{Noise, NoiseSource};
use controlgen_core::progress::{CancelToken, Flow, Progress};
use controlgen_core::testing::{Component, Mixture, MixtureDenoiser, ks_test, normal_cdf};
use controlgen_core::{
    At, Binding, Control, Controls, Guidance, ImageRequest, ImageSampler, Parameterisation, Placement,
    Result, SharedTensor, SiteKind, SiteMap,
};
use controlgen_diffusion::image::load_parameters;
use controlgen_diffusion::pipelines::{
    ClassConditional, DdpmPipeline, Defaults, Prompts, Run, Seeds, TextToImage,
};
use controlgen_diffusion::{Ddim, DpmSolver, EulerAncestral, Heun, Pndm, Sampler, Scheduler, UniPc};
use tch::{Device, Kind, Tensor};

use super::{directory, distance};

const DDIM: &str =
    r#"{"_class_name": "DDIMScheduler", "clip_sample": false, "timestep_spacing": "trailing"}"#;

fn scheduler() -> Scheduler {
    Scheduler::parse("ddim.json", DDIM).unwrap()
}

/// Two classes, around −1 and 2.
fn mixture() -> MixtureDenoiser {
    let part = |mean: f64, class| Component { mean: vec![mean], deviation: 0.3, weight: 1.0, class };
    let data = Mixture::new([1, 1, 1], vec![part(-1.0, 0), part(2.0, 1)]).unwrap();
    let schedule = scheduler().schedule().unwrap().clone();
    MixtureDenoiser::new(data, Parameterisation::Epsilon, move |t| schedule.level(t)).unwrap()
}

fn classes() -> ClassConditional {
    ClassConditional::new(Box::new(mixture()), scheduler(), None).unwrap()
}

/// Leaves predictions as they are, and remembers the last x̂₀.
#[derive(Clone, Default)]
struct Spy(Arc<Mutex<Vec<SharedTensor>>>);

impl Guidance for Spy {
    fn handle(&self) -> Box<dyn Guidance> {
        Box::new(self.clone())
    }
    fn name(&self) -> &'static str {
        "spy"
    }
    fn needs(&self, _: &Step) -> Needs {
        Needs::default()
    }
    fn guide(&self, step: &Step, _: &Outputs<'_>, so_far: Guided, _: &mut Memory) -> Result<Guided> {
        self.0.lock().unwrap().push(so_far.x0(step.level)?.into());
        Ok(so_far)
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let pipeline = classes();
    let labels = [0, 1, 1, 0, 1];
    let run = || Run::new().steps(6).guidance_scale(2.0).eta(1.0);
    let all = pipeline.run(&labels, run().seed(7)).unwrap();
    let halves = pipeline.run(&labels, run().seed(7).batch(2)).unwrap();
    assert!(distance(&all.latents, &halves.latents) < 1e-6);
    assert_eq!((halves.finished, halves.parameters.len()), (5, 5));
    // Image 0 of a seed is image 0 of another run of it; a seed of its own is its stream 0.
    let alone = pipeline.run(&labels[..1], run().seed(7)).unwrap();
    assert!(distance(&alone.latents, &all.latents.narrow(0, 0, 1)) < 1e-6);
    let each = pipeline.run(&labels, run().seeds(Seeds::Each(vec![1, 7, 7, 7, 2])).batch(3)).unwrap();
    assert!(distance(&each.latents.narrow(0, 3, 1), &alone.latents) < 1e-6);
    assert!(distance(&each.latents.narrow(0, 1, 1), &each.latents.narrow(0, 2, 1)) < 1e-6);
    assert!(distance(&each.latents.narrow(0, 0, 1), &all.latents.narrow(0, 0, 1)) > 1e-3);
    // The list of PyTorch's generators is row by row too.
    let torch = pipeline.run(&labels, run().seeds(Seeds::TorchEach(vec![5, 6, 7, 8, 9])).batch(2)).unwrap();
    let one = pipeline.run(&labels[3..4], run().seeds(Seeds::Torch(8))).unwrap();
    assert!(distance(&torch.latents.narrow(0, 3, 1), &one.latents) < 1e-6);
}

#[test]
fn images_are_of_their_distribution() {
    let pipeline = DdpmPipeline::new(Box::new(mixture()), scheduler());
    let images = pipeline.run(2000, Run::new().steps(200).seed(3).without_decoding()).unwrap();
    let mut found = Vec::<f64>::try_from(images.latents.to_kind(Kind::Double).view(-1)).unwrap();
    let cdf = |x: f64| 0.5 * (normal_cdf((x + 1.0) / 0.3) + normal_cdf((x - 2.0) / 0.3));
    found.sort_by(f64::total_cmp);
    assert!(ks_test(&found, cdf).unwrap() > 0.01);
    // Of a class, and of the mixture by the scale 0.
    let pipeline = classes();
    let run = |scale| {
        let run = Run::new().steps(200).seed(4).guidance_scale(scale).without_decoding();
        let images = pipeline.run(&[1; 2000], run).unwrap();
        let mut found = Vec::<f64>::try_from(images.latents.to_kind(Kind::Double).view(-1)).unwrap();
        found.sort_by(f64::total_cmp);
        found
    };
    assert!(ks_test(&run(1.0), |x| normal_cdf((x - 2.0) / 0.3)).unwrap() > 0.01);
    assert!(ks_test(&run(0.0), cdf).unwrap() > 0.01);
}

#[test]
fn noise_that_is_given_is_noise_that_is_drawn() {
    let pipeline = classes();
    let drawn = pipeline.run(&[0, 1, 1], Run::new().steps(5).seed(9)).unwrap();
    let noise = Noise::seeded(9).streams(3).normal(&[3, 1, 1, 1], Kind::Float, Device::Cpu).unwrap();
    let given = pipeline.run(&[0, 1, 1], Run::new().steps(5).seed(1).latents(noise).batch(2)).unwrap();
    assert!(distance(&given.latents, &drawn.latents) < 1e-6);
    assert!(drawn.pixels.unwrap().abs().max().double_value(&[]) <= 1.0, "pixels are cut");
    assert!(drawn.latents.max().double_value(&[]) > 1.0, "latents are not");
}

#[test]
fn every_step_of_every_batch_is_told() {
    let mut seen = Vec::new();
    let mut observer = |p: &Progress| {
        seen.push((p.done, p.total, p.unit));
        Flow::Continue
    };
    classes().run(&[0, 1, 1], Run::new().steps(4).batch(2).observer(&mut observer)).unwrap();
    let expected: Vec<_> = (1..=8).map(|done| (done, Some(8), "steps")).collect();
    assert_eq!(seen, expected);
}

fn stops<S: Sampler + 'static>(sampler: S) {
    let spy = Spy::default();
    let mut third = |p: &Progress| if p.done < 3 { Flow::Continue } else { Flow::Stop };
    let run = Run::new().steps(8).batch(2).with(spy.clone()).sampler(sampler).observer(&mut third);
    let images = classes().run(&[0, 1, 1], run).unwrap();
    assert_eq!((images.finished, images.latents.size()[0]), (0, 2), "the batch that it was at, unfinished");
    let seen = spy.0.lock().unwrap();
    assert!((3..6).contains(&seen.len()), "{} predictions", seen.len());
    assert!(distance(&images.latents, seen.last().unwrap()) < 1e-6, "the last estimate");
}

#[test]
fn any_sampler_is_stopped_with_its_last_estimate() {
    stops(Ddim::new(0.0).unwrap());
    stops(EulerAncestral::default());
    stops(Heun);
    stops(Pndm::default());
    stops(DpmSolver::new(2).unwrap());
    stops(UniPc::new(2).unwrap());
}

#[test]
fn a_cancelled_run_gives_what_there_is() {
    let cancel = CancelToken::new();
    cancel.cancel();
    let images = classes().run(&[0, 1, 1], Run::new().steps(8).batch(1).cancel(&cancel)).unwrap();
    assert_eq!((images.finished, images.latents.size()[0], images.parameters.len()), (0, 1, 1));
    // After its last step a batch is finished.
    let mut fourth = |p: &Progress| if p.done < 4 { Flow::Continue } else { Flow::Stop };
    let images = classes().run(&[0, 1, 1], Run::new().steps(4).batch(2).observer(&mut fourth)).unwrap();
    assert_eq!((images.finished, images.latents.size()[0]), (2, 2));
}

/// Counts the passes, their rows, and the projections of text.
#[derive(Clone, Default)]
struct Count {
    text: Arc<AtomicUsize>,
    passes: Arc<AtomicUsize>,
    rows: Arc<AtomicUsize>,
}

impl Control for Count {
    fn handle(&self) -> Box<dyn Control> {
        Box::new(self.clone())
    }
    fn bind(&self, sites: &SiteMap, to: &mut Binding<'_>) -> Result<()> {
        sites.select(SiteKind::Linear, "attn2.to_k")?.into_iter().for_each(|site| to.at(site, 0));
        sites.select(SiteKind::Conv, "conv_in")?.into_iter().for_each(|site| to.at(site, 1));
        Ok(())
    }
    fn linear(&self, at: At<'_>, x: &Tensor, y: Tensor) -> Result<Tensor> {
        if at.slot == 0 {
            self.text.fetch_add(usize::try_from(x.size()[0]).unwrap(), Relaxed);
        } else {
            self.passes.fetch_add(1, Relaxed);
            self.rows.fetch_add(usize::try_from(x.size()[0]).unwrap(), Relaxed);
        }
        Ok(y)
    }
}

fn stable_diffusion() -> TextToImage {
    TextToImage::open(directory("stable_diffusion").path(), Placement::CPU).unwrap()
}

#[test]
fn a_step_is_one_call_and_the_text_is_read_once() {
    let pipeline = stable_diffusion().with_scheduler(scheduler());
    let count = Count::default();
    let controls = Controls::bind(pipeline.denoiser().sites(), vec![Box::new(count.clone())]).unwrap();
    let read = || {
        let counters = [&count.text, &count.passes, &count.rows];
        counters.map(|counter| counter.swap(0, Relaxed))
    };
    let layers = pipeline.denoiser().sites().select(SiteKind::Linear, "attn2.to_k").unwrap().len();
    let run = || Run::new().steps(7).controls(&controls).without_decoding();
    pipeline.run("a cat", run().guidance_scale(7.5)).unwrap();
    // Each layer's keys of the prompt and of the negative one, for all seven steps.
    assert_eq!(read(), [2 * layers, 7, 14]);
    pipeline.run("a cat", run().guidance_scale(1.0)).unwrap();
    assert_eq!(read(), [layers, 7, 7]);
    // Images of one prompt have one condition; two prompts and what both avoid are three.
    pipeline.run(Prompts::new(["a cat"]).images(3), run()).unwrap();
    assert_eq!(read(), [2 * layers, 7, 42]);
    pipeline.run(Prompts::new(["a cat", "a dog"]), run()).unwrap();
    assert_eq!(read(), [3 * layers, 7, 28]);
}

#[test]
fn prompts_are_told_from_each_other() {
    let pipeline = stable_diffusion();
    let run = || Run::new().steps(3).without_decoding();
    let prompts = Prompts::new(["a cat", "a castle"]).negatives(["ugly", ""]).images(2);
    let seeds = || Seeds::Each(vec![1, 2, 3, 4]);
    let all = pipeline.run(prompts, run().seeds(seeds()).batch(3)).unwrap();
    for (image, (prompt, negative)) in
        [("a cat", "ugly"), ("a cat", "ugly"), ("a castle", ""), ("a castle", "")].into_iter().enumerate()
    {
        let alone = run().seeds(Seeds::Each(vec![image as u64 + 1]));
        let alone = pipeline.run(Prompts::new([prompt]).negative(negative), alone).unwrap();
        assert!(distance(&alone.latents, &all.latents.narrow(0, image as i64, 1)) < 1e-4, "{image}");
        let parameters = &all.parameters[image];
        assert_eq!(parameters.prompt.as_deref(), Some(prompt));
        assert_eq!(parameters.negative_prompt.as_deref(), Some(negative));
        assert_eq!((parameters.seed, parameters.steps), (Some(image as u64 + 1), Some(3)));
    }
}

#[test]
fn what_was_not_read_is_reported() {
    let long = "a photo of a castle ".repeat(40);
    let prompts = Prompts::new(["a cat".to_owned(), long]);
    let images = stable_diffusion().run(prompts, Run::new().steps(2).without_decoding()).unwrap();
    assert_eq!(images.truncated[0], None);
    assert!(
        images.truncated[1].as_ref().unwrap().ends_with("a photo of a castle"),
        "{:?}",
        images.truncated[1]
    );
}

#[test]
fn it_samples_images_for_others() {
    let defaults = Defaults { steps: 3, guidance_scale: 2.0, size: [16, 24] };
    let pipeline = stable_diffusion().with_defaults(defaults);
    let request =
        |prompt: &str, seed| ImageRequest { prompt: prompt.into(), negative_prompt: String::new(), seed };
    let sampler: Box<dyn ImageSampler> = ImageSampler::handle(&pipeline);
    let both = sampler.sample(&[request("a cat", 3), request("a dog", 8)]).unwrap().0;
    assert_eq!(both.size(), [2, 3, 16, 24]);
    let one = pipeline.run("a dog", Run::new().seed(8)).unwrap();
    assert!(distance(&both.narrow(0, 1, 1), &one.pixels.unwrap()) < 1e-4);
}

#[test]
fn files_hold_what_they_were_made_with() {
    let folder = tempfile::tempdir().unwrap();
    let (png, jpg) = (folder.path().join("a.png"), folder.path().join("a.jpg"));
    let run = Run::new().steps(2).seed(5).guidance_scale(3.0).size(16, 24);
    let images = stable_diffusion().run(Prompts::from("a cat").negative("blurry"), run).unwrap();
    images.save(&[&png]).unwrap();
    let read = load_parameters(&png).unwrap().unwrap();
    assert_eq!(read, images.parameters[0]);
    assert_eq!((read.height, read.width, read.seed), (Some(16), Some(24), Some(5)));
    assert_eq!((read.sampler.as_deref(), read.guidance_scale), (Some("PNDMScheduler"), Some(3.0)));
    images.save(&[&jpg]).unwrap();
    assert!(jpg.exists());
}

#[test]
fn one_model_may_lie_beside_its_index() {
    let (folder, flat) = (directory("ddpm"), tempfile::tempdir().unwrap());
    for part in ["", "unet", "scheduler"] {
        for entry in std::fs::read_dir(folder.path().join(part)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                std::fs::copy(&path, flat.path().join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    let run = |path| {
        let pipeline = DdpmPipeline::open(path, Placement::CPU).unwrap();
        pipeline.run(1, Run::new().steps(2)).unwrap().pixels.unwrap()
    };
    assert!(run(flat.path()).equal(&run(folder.path())));
}
