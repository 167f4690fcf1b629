//! Tensors to files.

use std::io::Cursor;
use std::path::Path;

use controlgen_core::checkpoint::replace;
use controlgen_core::energy::checks;
use controlgen_core::{Error, Result};
use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder};
use tch::{Device, Kind, Tensor};

use super::image_error;
use super::parameters::{KEYWORD, Parameters};

/// The quality of a JPEG file, of 100.
const QUALITY: u8 = 95;

/// Images `[B, C, H, W]` of 1 or 3 channels, pixels in −1 ..= 1, as levels, u8 `[B, H, W, C]` on the CPU:
/// round(255 · clamp(x / 2 + ½, 0, 1)), halves to the even level.
///
/// # Errors
/// [`Error::Shape`], [`Error::Kind`] for what is no batch of images; [`Error::NotFinite`] for a NaN or an infinity,
/// naming its row.
pub fn levels(images: &Tensor) -> Result<Tensor> {
    Ok(planes(images)?.f_permute([0, 2, 3, 1])?.f_contiguous()?)
}

/// The same as `[B, C, H, W]`.
pub(super) fn planes(images: &Tensor) -> Result<Tensor> {
    let _no_gradients = tch::no_grad_guard();
    if !matches!(images.size()[..], [b, 1 | 3, h, w] if b > 0 && h > 0 && w > 0) {
        return Err(Error::shape("images", "[B, 3, H, W] or [B, 1, H, W]", &images.size()));
    }
    checks::floating("images", images)?;
    let images = images.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
    checks::finite("images", &images)?;
    let unit = images.f_mul_scalar(0.5)?.f_add_scalar(0.5)?.f_clamp(0.0, 1.0)?;
    Ok(unit.f_mul_scalar(255.0)?.f_round()?.f_to_kind(Kind::Uint8)?)
}

/// Writes one image, `[1, C, H, W]` or `[C, H, W]` of 1 or 3 channels, pixels in −1 ..= 1 or cut to it, as PNG or JPEG
/// (of quality 95): the end of the name says which. It appears complete or not at all. A PNG file also holds the
/// parameters it was made with.
///
/// # Errors
/// Those of [`levels`]; [`Error::Unsupported`] for another ending, and parameters in a JPEG file; [`Error::Io`] where
/// it cannot be written: what was there is as before.
pub fn save_image(path: impl AsRef<Path>, image: &Tensor, parameters: Option<&Parameters>) -> Result<()> {
    let image = if image.dim() == 3 { image.f_unsqueeze(0)? } else { image.shallow_clone() };
    if image.size().first() != Some(&1) {
        return Err(Error::shape("an image", "[1, C, H, W] or [C, H, W]", &image.size()));
    }
    let path = path.as_ref();
    replace(path, &encode(path, &levels(&image)?.f_get(0)?, parameters)?)
}

/// Writes images `[B, C, H, W]`, one a path, each as [`save_image`] does, with parameters one a path or none. All are
/// checked and encoded before the first is written.
///
/// # Errors
/// Those of [`save_image`]; [`Error::Value`] where paths or parameters are not as many as images.
pub fn save_images<P: AsRef<Path>>(paths: &[P], images: &Tensor, parameters: &[Parameters]) -> Result<()> {
    let levels = levels(images)?;
    let batch = levels.size()[0];
    if i64::try_from(paths.len()) != Ok(batch) {
        return Err(Error::value("paths of images", batch, paths.len()));
    }
    if !parameters.is_empty() && parameters.len() != paths.len() {
        return Err(Error::value("parameters of images", format!("{batch}, or none"), parameters.len()));
    }
    let encoded = paths.iter().enumerate().map(|(row, path)| {
        let path = path.as_ref();
        Ok((path, encode(path, &levels.f_get(row as i64)?, parameters.get(row))?))
    });
    let files = encoded.collect::<Result<Vec<_>>>()?;
    files.iter().try_for_each(|(path, bytes)| replace(path, bytes))
}

/// The bytes of a file, of levels `[H, W, C]`.
fn encode(path: &Path, levels: &Tensor, parameters: Option<&Parameters>) -> Result<Vec<u8>> {
    let (height, width, channels) = levels.size3()?;
    let side = |n: i64| u32::try_from(n).map_err(|_| Error::value("side of an image", "below 2³²", n));
    let (height, width) = (side(height)?, side(width)?);
    let bytes: Vec<u8> = Vec::try_from(levels.f_contiguous()?.f_view([-1])?)?;
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    let mut out = Cursor::new(Vec::new());
    match ending.as_str() {
        "png" => png(&mut out, &bytes, (width, height), channels, parameters)
            .map_err(|error| Error::format(path, error))?,
        "jpg" | "jpeg" if parameters.is_some() => {
            let what = format!("{}: parameters in a JPEG file", path.display());
            return Err(Error::unsupported(what, "PNG"));
        }
        "jpg" | "jpeg" => {
            let color = if channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
            JpegEncoder::new_with_quality(&mut out, QUALITY)
                .write_image(&bytes, width, height, color)
                .map_err(|error| image_error(path, error))?;
        }
        _ => {
            return Err(Error::unsupported(format!("an image file of ending `{ending}`"), "png, jpg, jpeg"));
        }
    }
    Ok(out.into_inner())
}

fn png(
    out: &mut Cursor<Vec<u8>>,
    bytes: &[u8],
    (width, height): (u32, u32),
    channels: i64,
    parameters: Option<&Parameters>,
) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(out, width, height);
    encoder.set_color(if channels == 1 { png::ColorType::Grayscale } else { png::ColorType::Rgb });
    encoder.set_depth(png::BitDepth::Eight);
    if let Some(parameters) = parameters {
        encoder.add_itxt_chunk(KEYWORD.to_owned(), parameters.to_json())?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(bytes)?;
    writer.finish()
}
