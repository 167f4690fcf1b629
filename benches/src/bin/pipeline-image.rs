//! The time of whole images by a pipeline, for `benches/reference/pipeline_side_by_side.py`: `pipeline-image DIRECTORY
//! TRUTH.safetensors`. It answers each line on stdin with a number: `image` with the seconds that an image takes, from the
//! prompt to pixels, `check` with how far its pixels are from the tensor `pixels`.

use std::io::{BufRead, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use controlgen_core::checkpoint::{Safetensors, TensorSource};
use controlgen_core::{Error, Placement, Result};
use controlgen_diffusion::pipelines::{Prompts, Run, Seeds, TextToImage};
use tch::Tensor;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    benches::exit(serve(&arguments))
}

fn serve(arguments: &[String]) -> Result<()> {
    let [directory, truth] = arguments else {
        return Err(Error::value("arguments", "DIRECTORY TRUTH.safetensors", arguments.len()));
    };
    let truth = Safetensors::open(Path::new(truth))?.load("pixels")?;
    let truth = truth.ok_or_else(|| Error::value("tensor `pixels`", "one", "none"))?;
    let pipeline = TextToImage::open(directory, Placement::CPU)?;
    let image = || -> Result<Tensor> {
        let prompt = Prompts::from("a photo of a cat").negative("blurry");
        let run = Run::new().seeds(Seeds::Torch(42)).steps(25).guidance_scale(7.5);
        let pixels = pipeline.run(prompt, run)?.pixels;
        pixels.ok_or_else(|| Error::value("pixels", "some", "none"))
    };
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| Error::io("stdin", error))?;
        let answer = match line.trim() {
            "image" => {
                let start = Instant::now();
                let _made = image()?;
                start.elapsed().as_secs_f64()
            }
            "check" => image()?.f_sub(&truth)?.f_abs()?.f_max()?.f_double_value(&[])?,
            other => return Err(Error::value("line", "image or check", other)),
        };
        let mut out = std::io::stdout();
        writeln!(out, "{answer}").and_then(|()| out.flush()).map_err(|error| Error::io("stdout", error))?;
    }
    Ok(())
}
