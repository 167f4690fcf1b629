//! What the reader of shapes sees in an image file.

use controlgen_core::{Error, Result};
use controlgen_diffusion::image::load_image;
use serde_json::{Value, json};

use super::arguments::Arguments;
use crate::shapes::{Reader, Scene};

pub fn run(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::parse_with(arguments, &[], &[])?;
    let [path] = arguments.paths(["FILE.png"])?;
    let image = load_image(&path, None)?;
    let size = image.size();
    let side = match size[..] {
        [.., height, width] if height == width => height,
        _ => return Err(Error::shape("image of shapes", "[3, S, S]", &size)),
    };
    let image = image.f_view([1, 3, side, side])?;
    for scene in Reader::new(side)?.read(&image)? {
        println!("{}", told(&scene));
    }
    Ok(())
}

/// The background, and the objects with their places: in the picture of one, beside each other of two, none of more.
fn told(scene: &Scene) -> Value {
    let positions = scene.positions();
    let objects: Vec<Value> = scene
        .objects
        .iter()
        .enumerate()
        .map(|(k, object)| {
            json!({
                "shape": object.shape.name(),
                "color": object.color.name(),
                "size": object.size.name(),
                "fill": object.fill.name(),
                "position": positions.get(k).map(|position| position.name()),
                "center": object.center,
            })
        })
        .collect();
    json!({ "background": scene.background.name(), "objects": objects })
}
