//! Lanczos resampling.

use std::f64::consts::PI;

use controlgen_core::{Error, Result};
use tch::{Device, Kind, Tensor};

use super::write::planes;

/// Bits after the point of a weight.
const BITS: u32 = 22;

/// Pixels along a side, at most.
const LARGEST: i64 = 1 << 16;

/// Images `[B, C, H, W]`, pixels in −1 ..= 1, at another size `[H', W']`: Lanczos' window of 3 lobes,
/// w(x) = sinc(x) sinc(x / 3), stretched where the image shrinks, along one side and then the other.
///
/// It works on levels 0 ..= 255, rounded after each pass, with weights in fixed point: bit by bit what `resize` with
/// `LANCZOS` of Pillow 13 does, which diffusers' pipelines use. Not differentiable.
///
/// # Errors
/// [`Error::Shape`], [`Error::Kind`] for no images; [`Error::NotFinite`]; [`Error::Value`] for a size outside 1 ..= 65536.
pub fn resize(images: &Tensor, size: [i64; 2]) -> Result<Tensor> {
    let resized = resize_levels(&planes(images)?, size)?.f_to_device(images.device())?;
    let unit = resized.f_to_kind(Kind::Float)?.f_div_scalar(255.0)?;
    Ok(unit.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?)
}

/// u8 `[B, C, H, W]` to `[B, C, H', W']`, on the CPU.
pub(super) fn resize_levels(levels: &Tensor, [height, width]: [i64; 2]) -> Result<Tensor> {
    if ![height, width].iter().all(|side| (1..=LARGEST).contains(side)) {
        let expected = format!("[H, W], both in 1 ..= {LARGEST}");
        return Err(Error::value("size of an image", expected, format!("[{height}, {width}]")));
    }
    let shape = levels.size();
    let (from_height, from_width) = (shape[2], shape[3]);
    let along_columns = |t: &Tensor| -> Result<Tensor> {
        Ok(resample(&t.f_transpose(2, 3)?, height)?.f_transpose(2, 3)?.f_contiguous()?)
    };
    // Pillow's order, which shows where levels are cut: the height comes first if it loses more than twice what the
    // width does. Before version 13 the width always did.
    if height < from_height && 2 * (from_width - width) < from_height - height {
        resample(&along_columns(levels)?, width)
    } else {
        along_columns(&resample(levels, width)?)
    }
}

/// The last dimension at another length.
fn resample(levels: &Tensor, length: i64) -> Result<Tensor> {
    let mut shape = levels.size();
    let Some(last) = shape.last_mut() else { return Ok(levels.shallow_clone()) };
    let input = std::mem::replace(last, length);
    if input == length {
        return Ok(levels.shallow_clone());
    }
    let bytes: Vec<u8> = Vec::try_from(levels.f_to_device(Device::Cpu)?.f_contiguous()?.f_view([-1])?)?;
    let weights = weights(input, length);
    let mut out = Vec::with_capacity(weights.len() * bytes.len().div_euclid(input.max(1) as usize));
    for row in bytes.chunks_exact(input.max(1) as usize) {
        for (start, weights) in &weights {
            let sum: i64 = weights.iter().zip(&row[*start..]).map(|(w, &level)| w * i64::from(level)).sum();
            out.push(((sum + (1 << (BITS - 1))) >> BITS).clamp(0, 255) as u8);
        }
    }
    Ok(Tensor::f_from_slice(&out)?.f_view(&shape[..])?)
}

/// For each number out: the first number in that counts, and what it and those after it count for. They sum to 2²².
fn weights(input: i64, output: i64) -> Vec<(usize, Vec<i64>)> {
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let reach = 3.0 * stretch;
    let one = f64::from(1u32 << BITS);
    (0..output)
        .map(|i| {
            let centre = (i as f64 + 0.5) * scale;
            // As integers: casts cut towards zero, and what is below zero is cut off.
            let start = ((centre - reach + 0.5) as i64).max(0);
            let end = ((centre + reach + 0.5) as i64).min(input);
            let raw: Vec<f64> =
                (start..end).map(|j| lanczos((j as f64 - centre + 0.5) * stretch.recip())).collect();
            let sum: f64 = raw.iter().sum();
            (start as usize, raw.into_iter().map(|w| (w / sum * one).round() as i64).collect())
        })
        .collect()
}

fn lanczos(x: f64) -> f64 {
    let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) };
    if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }
}
