//! One sheet of pictures by their captions.

use std::path::Path;
use std::time::Instant;

use controlgen_core::{Error, Placement, Result};
use controlgen_diffusion::pipelines::{Run, TextToImage};

use super::{Caption, Named, Reader, measure, save_sheet, shipped};

/// What is asked for, a row each; models saw no green triangles, blue stars and purple squares in training.
const CAPTIONS: [&str; 7] = [
    "a large red circle on a white background",
    "a small solid yellow star at the top on black",
    "a striped cyan cross on the left",
    "a large green triangle on a black background",
    "a blue star in the middle on white",
    "a red square left of a yellow circle",
    "an orange triangle above a small purple square on a white background",
];

/// How many pictures of each.
const EACH: usize = 8;

/// Writes a sheet of pictures: nothing asked for in the first row, then a caption a row; and says what the reader finds.
///
/// # Errors
/// Those of the pipeline and of writing; [`Error::Value`] where less than three quarters of the pictures show all that was
/// asked for, and no object more.
pub fn run(out: &Path) -> Result<()> {
    let begin = Instant::now();
    let folder = shipped("shapes-pixel").ok_or_else(|| Error::value("model", "shapes-pixel", "none"))?;
    let pipeline = TextToImage::open(folder, Placement::CPU)?;
    let captions = std::iter::once("").chain(CAPTIONS).map(|text| {
        let named = match text {
            "" => Named { objects: Vec::new(), position: None, background: None },
            text => Named::parse(text)?,
        };
        Ok(Caption { text: text.to_owned(), named })
    });
    let captions = captions.collect::<Result<Vec<_>>>()?;
    let rows: Vec<Caption> = captions.iter().flat_map(|row| std::iter::repeat_n(row.clone(), EACH)).collect();
    let pixels = measure::pictures(&pipeline, &rows, Run::new().seed(0).steps(25).guidance_scale(3.0))?;
    save_sheet(out, &pixels, EACH as i64, 3)?;
    let read = Reader::new(pixels.size()[2])?.read(&pixels)?;
    let mut all = 0;
    for (caption, scenes) in captions.iter().zip(read.chunks(EACH)).skip(1) {
        let right = scenes.iter().filter(|scene| caption.named.holds_of(scene)).count();
        println!("{right} of {EACH}   {}", caption.text);
        all += right;
    }
    let asked = EACH * CAPTIONS.len();
    println!("{all} of {asked} pictures show what was asked for; {:.1} s", begin.elapsed().as_secs_f64());
    println!("{}: the first row is what the model makes of nothing", out.display());
    if 4 * all < 3 * asked {
        return Err(Error::value("pictures that show what was asked for", "three quarters", all));
    }
    Ok(())
}
