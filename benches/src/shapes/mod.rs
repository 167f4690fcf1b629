//! Shapes: a world of captioned pictures in which success can be counted.

mod caption;
mod reader;
mod render;
mod scene;
mod sheet;
mod tokenizer;

use std::path::PathBuf;

use controlgen_core::noise::Noise;
use controlgen_core::{Error, Result};

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
    Writes a sheet of scenes of the world, and prints their captions.";

/// Runs what the arguments say.
///
/// # Errors
/// What is wrong with the arguments or the files.
pub fn run(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let command = arguments.next().unwrap_or_default();
    let (mut out, mut count, mut seed, mut size, mut split) = (None, 64, 0, SIDE, Split::Training);
    while let Some(argument) = arguments.next() {
        let value =
            arguments.next().ok_or_else(|| Error::value(argument.as_str(), "a value after it", "nothing"))?;
        match argument.as_str() {
            "--out" => out = Some(PathBuf::from(value)),
            "--count" => count = number(&argument, &value)?,
            "--seed" => seed = number(&argument, &value)?,
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
        other => Err(Error::value("command", format!("one of\n{USAGE}"), other)),
    }
}

fn number<T: std::str::FromStr>(what: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::value(what, "a whole number", text))
}
