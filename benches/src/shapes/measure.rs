//! How often the reader is wrong, and how often a model does what it was told.

use controlgen_core::noise::{Noise, Stream};
use controlgen_core::{Error, Result};
use controlgen_diffusion::pipelines::{Prompts, Run, TextToImage};
use tch::{Device, Kind, Tensor};

use super::{Caption, Object, Reader, Renderer, Scene, Split};

/// How many pictures are made or read at once.
const AT_ONCE: usize = 250;

/// Whether a reading is the scene: the same objects, in any order, their centres within half a pixel.
pub fn same(read: &Scene, scene: &Scene) -> bool {
    let alike = |a: &Object, b: &Object| {
        let near = a.center.iter().zip(&b.center).all(|(a, b)| (a - b).abs() <= 0.5);
        near && (a.shape, a.color, a.size, a.fill) == (b.shape, b.color, b.size, b.fill)
    };
    read.background == scene.background
        && read.objects.len() == scene.objects.len()
        && scene.objects.iter().all(|object| read.objects.iter().any(|found| alike(found, object)))
}

/// How many of `count` renders, every other one of held-out scenes, are read wrong under noise of this deviation.
///
/// # Errors
/// Those of rendering and reading.
pub fn misread(size: i64, count: usize, deviation: f64, seed: u64) -> Result<usize> {
    let (renderer, reader) = (Renderer::new(size)?, Reader::new(size)?);
    let mut stream = Noise::seeded(seed).stream(0);
    let (mut done, mut wrong) = (0, 0);
    while done < count {
        let splits =
            (0..AT_ONCE.min(count - done)).map(|k| if k % 2 == 0 { Split::Training } else { Split::HeldOut });
        let scenes: Vec<Scene> = splits.map(|split| Scene::sample(&mut stream, split)).collect();
        let pictures = renderer.render(&scenes)?;
        let noise = stream.normal(&pictures.size(), Kind::Float, Device::Cpu)?;
        let read = reader.read(&pictures.f_add(&noise.f_mul_scalar(deviation)?)?)?;
        wrong += read.iter().zip(&scenes).filter(|(read, scene)| !same(read, scene)).count();
        done += scenes.len();
    }
    Ok(wrong)
}

/// Captions of which a model makes pictures.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Of one object, or of two.
    pub objects: usize,
    /// Of which split.
    pub split: Split,
    /// How many.
    pub count: usize,
    /// Of the scenes, the captions and the noise.
    pub seed: u64,
}

impl Asked {
    /// The captions.
    pub fn captions(&self) -> Vec<Caption> {
        let mut stream = Noise::seeded(self.seed).stream(self.objects as u64);
        (0..self.count).map(|_| self.caption(&mut stream)).collect()
    }

    fn caption(&self, stream: &mut Stream) -> Caption {
        let scene = if self.objects == 1 {
            Scene::single(stream, self.split)
        } else {
            Scene::pair(stream, self.split)
        };
        Caption::of(&scene, stream)
    }
}

/// Makes pictures of captions, f32 `[B, 3, S, S]`.
///
/// # Errors
/// Those of the pipeline.
pub fn pictures(pipeline: &TextToImage, captions: &[Caption], run: Run<'_>) -> Result<Tensor> {
    let prompts = Prompts::new(captions.iter().map(|caption| caption.text.as_str()));
    let images = pipeline.run(prompts, run)?;
    images.pixels.ok_or_else(|| Error::value("images", "pixels", "none"))
}

/// Of how many captions' pictures the reader finds everything that is named, and no object more.
///
/// # Errors
/// Those of the pipeline and of reading.
pub fn right(pipeline: &TextToImage, asked: &Asked, steps: usize, scale: f64) -> Result<usize> {
    let captions = asked.captions();
    let (mut right, mut reader) = (0, None);
    for (captions, seed) in captions.chunks(AT_ONCE).zip(asked.seed..) {
        let run = Run::new().seed(seed).steps(steps).guidance_scale(scale).batch(50);
        let pixels = pictures(pipeline, captions, run)?;
        let reader = match &mut reader {
            Some(reader) => reader,
            none => none.insert(Reader::new(pixels.size()[2])?),
        };
        let read = reader.read(&pixels)?;
        right += captions.iter().zip(&read).filter(|(caption, scene)| caption.named.holds_of(scene)).count();
    }
    Ok(right)
}
