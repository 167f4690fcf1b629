//! Shapes: a world of captioned pictures in which success can be counted.

mod caption;
mod demo;
pub mod measure;
mod reader;
mod render;
mod scene;
mod sheet;
mod tokenizer;

use std::path::PathBuf;

use controlgen_core::noise::Noise;
use controlgen_core::{Error, Placement, Result};
use controlgen_diffusion::pipelines::TextToImage;

pub use caption::{Caption, Named, NamedObject, words};
pub use reader::Reader;
pub use render::Renderer;
pub use scene::{
    Background, Color, Fill, Object, Position, SIDE, Scene, Shape, Size, Split, held_out, pick, pixels,
    positions,
};
pub use sheet::{save_sheet, sheet};
pub use tokenizer::{tokenizer_folder, write as write_tokenizer};

/// What the command takes.
pub const USAGE: &str = "\
shapes tokenizer [--out FOLDER]
    Writes the tokenizer of captions; default benches/data/shapes/tokenizer.
shapes sheet --out FILE.png [--count N] [--seed K] [--size S] [--split training|held-out]
    Writes a sheet of scenes of the world, and prints their captions.
shapes misread [--count N] [--noise DEVIATION] [--seed K] [--size S]
    Counts the renders that the reader reads wrong.
shapes accuracy [--model NAME|FOLDER] [--count N] [--seed K] [--steps N] [--guidance-scale S]
    Makes pictures of captions of one object and of two, of the training split and held out, N of each, and counts those
    in which the reader finds everything that is named and no object more.
shapes demo --out FILE.png
    Writes a sheet of pictures of a few captions, and says what the reader finds in them.";

/// The folder of a model that the repository carries, by its name.
pub fn shipped(name: &str) -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data/shapes");
    let kinds = ["pixel"];
    kinds.into_iter().find(|kind| name.strip_prefix("shapes-") == Some(kind)).map(|kind| folder.join(kind))
}

/// Runs what the arguments say.
///
/// # Errors
/// What is wrong with the arguments or the files.
pub fn run(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let command = arguments.next().unwrap_or_default();
    let (mut out, mut count, mut seed, mut size, mut split) = (None, 64, 0, SIDE, Split::Training);
    let (mut noise, mut model, mut steps, mut scale) = (0.0, "shapes-pixel".to_owned(), 25, 3.0);
    while let Some(argument) = arguments.next() {
        let value =
            arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"))?;
        match argument.as_str() {
            "--out" => out = Some(PathBuf::from(value)),
            "--count" => count = number(&argument, &value)?,
            "--seed" => seed = number(&argument, &value)?,
            "--noise" => noise = crate::number(&argument, &value)?,
            "--model" => model = value,
            "--steps" => steps = number(&argument, &value)?,
            "--guidance-scale" => scale = crate::number(&argument, &value)?,
            "--size" => size = number(&argument, &value)?,
            "--split" => {
                split = match value.as_str() {
                    "training" => Split::Training,
                    "held-out" => Split::HeldOut,
                    other => return Err(Error::value("--split", "training or held-out", other)),
                }
            }
            other => return Err(Error::value("argument", format!("one of\n{USAGE}"), other)),
        }
    }
    match command.as_str() {
        "tokenizer" => write_tokenizer(&out.unwrap_or_else(tokenizer_folder)),
        "sheet" => {
            let out = out.ok_or_else(|| Error::value("--out", "a PNG file", "nothing"))?;
            let mut stream = Noise::seeded(seed).stream(0);
            let scenes: Vec<Scene> = (0..count).map(|_| Scene::sample(&mut stream, split)).collect();
            save_sheet(&out, &Renderer::new(size)?.render(&scenes)?, 8, 2)?;
            for scene in &scenes {
                println!("{}", Caption::of(scene, &mut stream).text);
            }
            Ok(())
        }
        "demo" => demo::run(&out.ok_or_else(|| Error::value("--out", "a PNG file", "nothing"))?),
        "misread" => {
            println!("{} of {count} read wrong", measure::misread(size, count, noise, seed)?);
            Ok(())
        }
        "accuracy" => {
            let folder = shipped(&model).unwrap_or_else(|| model.into());
            let pipeline = TextToImage::open(folder, Placement::CPU)?;
            for (split, name) in [(Split::HeldOut, "held out"), (Split::Training, "training")] {
                for objects in [1, 2] {
                    let asked = measure::Asked { objects, split, count, seed };
                    let right = measure::right(&pipeline, &asked, steps, scale)?;
                    println!("{objects} object(s), {name}: {right} of {count} right");
                }
            }
            Ok(())
        }
        other => Err(Error::value("command", format!("one of\n{USAGE}"), other)),
    }
}

fn number<T: std::str::FromStr>(what: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::value(what, "a whole number", text))
}
