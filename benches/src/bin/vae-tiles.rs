//! Memory and picture of an autoencoder that decodes tile by tile, beside one that decodes the whole.
//!
//! `vae-tiles MODEL_DIR [TILE OVERLAP] …`
//!
//! Random latents of 64 × 64 are decoded by a process of their own for the whole and for each pair of sizes, in latents (32
//! and 8, and 24 and 6, where none is given). `benches/reference/vae_fixtures.py sd1 MODEL_DIR` makes a model of Stable
//! Diffusion 1's size. Of each there is said: the peak of resident memory in all, that above the loaded model, both as parts of
//! the whole's; the seconds; how far the picture is from the whole's, as a part of its deviation, at most and on average;
//! and how much more it changes from one pixel to the next where a tile ends than the whole does there.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use controlgen_core::checkpoint::{Safetensors, TensorSource, Weights, save};
use controlgen_core::noise::{Noise, NoiseSource};
use controlgen_core::{Autoencoder, Config, Error, Placement, Result};
use controlgen_diffusion::models::{AutoencoderKl, Tiling};
use tch::{Device, Kind, Tensor};

/// Latents along each side.
const SIDE: i64 = 64;

/// A line of /proc/self/status, in MB.
fn memory(field: &str) -> Result<f64> {
    let path = "/proc/self/status";
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    Ok(number.ok_or_else(|| Error::format(path, format!("no {field}")))? / 1024.0)
}

/// Decodes, says `peak above seconds`, and leaves the picture in a file.
fn child(model: &str, tiling: Option<Tiling>, out: &str) -> Result<()> {
    let _no_gradients = tch::no_grad_guard();
    let config = Config::open(&Path::new(model).join("config.json"))?;
    let source = Safetensors::open(model)?;
    let weights = Weights::new(&source, Placement::CPU.options());
    let vae = AutoencoderKl::load(&config, &weights, Placement::CPU)?.with_tiling(tiling);
    let shape = [1, vae.spec().latent_channels, SIDE, SIDE];
    let latents = Noise::seeded(1).streams(1).normal(&shape, Kind::Float, Device::Cpu)?;
    // The peak of loading does not count.
    let path = "/proc/self/clear_refs";
    std::fs::write(path, "5").map_err(|error| Error::io(path, error))?;
    let (before, start) = (memory("VmRSS")?, Instant::now());
    let picture = vae.decode(&latents)?;
    let seconds = start.elapsed().as_secs_f64();
    let peak = memory("VmHWM")?;
    println!("{peak} {} {seconds}", peak - before);
    save(out, &[("picture".to_owned(), picture)], &[])
}

/// What a child says, and its picture.
fn measure(model: &str, sizes: &[String]) -> Result<([f64; 3], Tensor)> {
    let out = std::env::temp_dir().join(format!("vae-tiles-{}.safetensors", std::process::id()));
    let own = std::env::current_exe().map_err(|error| Error::io("the binary", error))?;
    let mut command = Command::new(own);
    command.arg("--child").arg(&out).arg(model).args(sizes);
    let done = command.output().map_err(|error| Error::io("the binary", error))?;
    let said = String::from_utf8_lossy(&done.stdout);
    let numbers: Vec<f64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let Ok(numbers) = <[f64; 3]>::try_from(numbers) else {
        return Err(Error::format("the child", String::from_utf8_lossy(&done.stderr)));
    };
    let picture = Safetensors::open(&out)?.load("picture")?;
    std::fs::remove_file(&out).map_err(|error| Error::io(&out, error))?;
    Ok((numbers, picture.ok_or_else(|| Error::value("picture", "one", "none"))?))
}

/// Mean |x(c) − x(c − 1)| over columns c where tiles begin to be blended, or to count alone.
fn jumps(picture: &Tensor, tiling: Tiling) -> Result<f64> {
    let f = picture.size()[3].div_euclid(SIDE);
    let step = tiling.tile() - tiling.overlap();
    let (mut sum, mut n) = (0.0, 0);
    for start in (step..SIDE).step_by(usize::try_from(step).unwrap_or(1)) {
        for c in [start, start + tiling.overlap()].into_iter().filter(|&c| c < SIDE) {
            let here = picture.f_narrow(3, c * f, 1)?.f_sub(&picture.f_narrow(3, c * f - 1, 1)?)?;
            sum += here.f_abs()?.f_mean(Kind::Double)?.f_double_value(&[])?;
            n += 1;
        }
    }
    Ok(sum / f64::from(n))
}

fn tiling(sizes: &[String]) -> Result<Option<Tiling>> {
    let number = |text: &String| text.parse().map_err(|_| Error::value("size", "a whole number", text));
    match sizes {
        [] => Ok(None),
        [tile, overlap] => Tiling::new(number(tile)?, number(overlap)?).map(Some),
        _ => Err(Error::value("sizes", "TILE OVERLAP", sizes.len())),
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, sizes) = match &arguments[..] {
        [child_flag, out, model, sizes @ ..] if child_flag == "--child" => {
            return child(model, tiling(sizes)?, out);
        }
        [model, sizes @ ..] => (model, sizes.to_vec()),
        [] => return Err(Error::value("arguments", "MODEL_DIR [TILE OVERLAP] …", "none")),
    };
    let sizes = if sizes.is_empty() { ["32", "8", "24", "6"].map(str::to_owned).to_vec() } else { sizes };
    let (whole, picture) = measure(model, &[])?;
    println!("| latents | peak MB (part) | above the model MB (part) | s | worst, mean distance | jumps |");
    println!("|---|---|---|---|---|---|");
    println!("| whole | {:.0} | {:.0} | {:.1} | | |", whole[0], whole[1], whole[2]);
    let deviation = picture.f_std(true)?.f_double_value(&[])?;
    for sizes in sizes.chunks(2) {
        let Some(tiling) = tiling(sizes)? else { continue };
        let (found, tiled) = measure(model, sizes)?;
        let far = tiled.f_sub(&picture)?.f_abs()?.f_div_scalar(deviation)?;
        let (worst, mean) =
            (far.f_max()?.f_double_value(&[])?, far.f_mean(Kind::Double)?.f_double_value(&[])?);
        println!(
            "| {} by {} | {:.0} ({:.2}) | {:.0} ({:.2}) | {:.1} | {worst:.3}, {mean:.4} | {:.2} |",
            tiling.tile(),
            tiling.overlap(),
            found[0],
            found[0] / whole[0],
            found[1],
            found[1] / whole[1],
            found[2],
            jumps(&tiled, tiling)? / jumps(&picture, tiling)?,
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    benches::exit(run())
}
