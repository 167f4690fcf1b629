//! A pipeline's directory and prompts in, image files out.

use std::path::{Path, PathBuf};

use controlgen_core::checkpoint::save;
use controlgen_core::{Config, Error, Placement, Result};
use controlgen_diffusion::image::{load_image, load_mask};
use controlgen_diffusion::pipelines::{
    Cascade, ClassConditional, DdpmPipeline, ImageToImage, Images, Inpainting, Prompts, Run, Seeds,
    TextToImage, UnClip, Upscaler,
};
use controlgen_diffusion::prompt::T5Prompt;

use super::arguments::Arguments;

const OPTIONS: [&str; 18] = [
    "prompt",
    "negative-prompt",
    "class",
    "images",
    "steps",
    "guidance-scale",
    "seed",
    "size",
    "eta",
    "image",
    "mask",
    "strength",
    "upscaler",
    "batch",
    "out",
    "latents",
    "dtype",
    "device",
];

pub fn run(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::parse_with(arguments, &OPTIONS, &["torch-seed"])?;
    let [path] = arguments.paths(["MODEL"])?;
    let Some(out) = arguments.get("out") else {
        return Err(Error::value("--out", "a PNG or JPEG file", "nothing"));
    };
    let images = match path.to_str().and_then(crate::shapes::shipped) {
        Some(folder) => shapes(&folder, &arguments)?,
        None => make(&path, &arguments)?,
    };
    if let Some(file) = arguments.get("latents") {
        save(
            Path::new(file),
            &[("latents".to_owned(), images.latents.shallow_clone())],
            &[("format", "pt")],
        )?;
    }
    for (image, truncated) in images.truncated.iter().enumerate() {
        if let Some(rest) = truncated {
            eprintln!("image {image}: the prompt is too long; not read: {rest}");
        }
    }
    images.save(&numbered(Path::new(out), images.parameters.len()))
}

/// The file itself for one image, else `out-0.png`, `out-1.png`, ….
fn numbered(out: &Path, images: usize) -> Vec<PathBuf> {
    if images == 1 {
        return vec![out.to_owned()];
    }
    let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    let (stem, end) = (part(out.file_stem()), part(out.extension()));
    (0..images).map(|image| out.with_file_name(format!("{stem}-{image}.{end}"))).collect()
}

/// Pictures by a model of the world of shapes, whose captions have few words.
fn shapes(folder: &Path, arguments: &Arguments) -> Result<Images> {
    let negatives = arguments.all("negative-prompt");
    for prompt in arguments.all("prompt").chain(negatives).filter(|prompt| !prompt.is_empty()) {
        let _ = crate::shapes::Named::parse(prompt)?;
    }
    make(folder, arguments)
}

/// Runs the pipeline that model_index.json names.
fn make(path: &Path, arguments: &Arguments) -> Result<Images> {
    let index = Config::open(&path.join("model_index.json"))?;
    let (placement, run) = (arguments.placement()?, described(arguments)?);
    let images = usize::try_from(arguments.number("images", 1)?).unwrap_or(usize::MAX);
    let class = index.str("_class_name")?.unwrap_or("nothing");
    let prompts = || {
        let texts: Vec<&str> = arguments.all("prompt").collect();
        if texts.is_empty() {
            return Err(Error::value("--prompt", format!("a text, for {class}"), "nothing"));
        }
        let negatives = arguments.all("negative-prompt");
        Ok(Prompts::new(texts).images(images).negatives(negatives))
    };
    match class {
        class if TextToImage::CLASSES.contains(&class) => {
            let pipeline = TextToImage::open(path, placement)?;
            text_to_image(&pipeline, prompts()?, run, arguments)
        }
        class if DdpmPipeline::CLASSES.contains(&class) => {
            DdpmPipeline::open(path, placement)?.run(images, run)
        }
        class if ClassConditional::CLASSES.contains(&class) => {
            let pipeline = ClassConditional::open(path, placement)?;
            let class = |text: &str| text.parse().map_or_else(|_| pipeline.class(text), Ok);
            pipeline.run(&arguments.all("class").map(class).collect::<Result<Vec<i64>>>()?, run)
        }
        class if Cascade::CLASSES.contains(&class) => {
            cascade(path, placement, arguments)?.run(prompts()?, run)
        }
        class if UnClip::CLASSES.contains(&class) => UnClip::open(path, placement)?.run(prompts()?, run),
        class => {
            let known = [
                &TextToImage::CLASSES[..],
                &DdpmPipeline::CLASSES,
                &ClassConditional::CLASSES,
                &Cascade::CLASSES,
                &UnClip::CLASSES,
            ];
            Err(Error::unsupported(format!("pipeline `{class}`"), known.concat().join(", ")))
        }
    }
}

/// From noise, from an image, or an image under a mask.
fn text_to_image(
    pipeline: &TextToImage,
    prompts: Prompts,
    run: Run<'_>,
    arguments: &Arguments,
) -> Result<Images> {
    let size = size(arguments)?;
    match (arguments.get("image"), arguments.get("mask")) {
        (None, None) => pipeline.run(prompts, run),
        (None, Some(_)) => Err(Error::value("--image", "an image under the mask", "nothing")),
        (Some(image), None) => {
            let strength = arguments.real("strength")?.unwrap_or(0.8);
            let from = ImageToImage { image: load_image(image, size)?, strength };
            pipeline.image_to_image(prompts, &from, run)
        }
        (Some(image), Some(mask)) => {
            let strength = arguments.real("strength")?.unwrap_or(1.0);
            let (image, mask) = (load_image(image, size)?, load_mask(mask, size)?);
            pipeline.inpaint(prompts, &Inpainting { image, mask, strength }, run)
        }
    }
}

/// DeepFloyd IF's first stage, and those that are named after it.
fn cascade(path: &Path, placement: Placement, arguments: &Arguments) -> Result<Cascade> {
    let mut cascade = Cascade::open(path, Box::new(T5Prompt::open(path, placement)?), placement)?;
    for upscaler in arguments.all("upscaler") {
        cascade = cascade.with_upscaler(Upscaler::open(upscaler, placement)?)?;
    }
    Ok(cascade)
}

/// The run of the command line.
fn described(arguments: &Arguments) -> Result<Run<'static>> {
    let seed = arguments.number("seed", 0)?;
    let seeds = if arguments.has("torch-seed") { Seeds::Torch(seed) } else { Seeds::One(seed) };
    let mut run = Run::new().seeds(seeds);
    if arguments.get("steps").is_some() {
        run = run.steps(usize::try_from(arguments.number("steps", 0)?).unwrap_or(usize::MAX));
    }
    if let Some(scale) = arguments.real("guidance-scale")? {
        run = run.guidance_scale(scale);
    }
    if let Some(eta) = arguments.real("eta")? {
        run = run.eta(eta);
    }
    if arguments.get("batch").is_some() {
        run = run.batch(usize::try_from(arguments.number("batch", 0)?).unwrap_or(usize::MAX));
    }
    match size(arguments)? {
        Some([height, width]) => Ok(run.size(height, width)),
        None => Ok(run),
    }
}

/// `--size HEIGHTxWIDTH`, or one number for both.
fn size(arguments: &Arguments) -> Result<Option<[i64; 2]>> {
    let Some(text) = arguments.get("size") else { return Ok(None) };
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    match (height.parse(), width.parse()) {
        (Ok(height), Ok(width)) => Ok(Some([height, width])),
        _ => Err(Error::value("--size", "HEIGHTxWIDTH, or one number", text)),
    }
}
