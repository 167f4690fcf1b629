//! Files to tensors.

use std::path::Path;

use controlgen_core::{Error, Result};
use image::{DynamicImage, ImageDecoder, ImageReader};
use tch::Tensor;

use super::image_error;
use super::resize::resize_levels;

/// Reads a PNG or JPEG file, as its content says: `[1, 3, H, W]`, f32 on the CPU, pixels in −1 ..= 1.
///
/// With a `size` `[H, W]` it is resized as [`resize`](super::resize) does. Gray becomes three equal channels, 16 bits
/// are rounded to 8, an alpha channel that hides nothing is dropped, and a photograph is turned as its EXIF data say.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for a broken file; [`Error::Unsupported`] for another format, or pixels that are
/// not opaque: what is behind them is for the caller to say; [`Error::Value`] for a size below 1.
pub fn load_image(path: impl AsRef<Path>, size: Option<[i64; 2]>) -> Result<Tensor> {
    let image = open(path.as_ref())?.into_rgb8();
    let (width, height) = image.dimensions();
    let shape = [1, i64::from(height), i64::from(width), 3];
    let levels = Tensor::f_from_slice(&image.into_raw())?.f_view(shape)?.f_permute([0, 3, 1, 2])?;
    from_levels(&levels, size)
}

/// Reads a mask: `[1, 1, H, W]`, 1 where the gray level is 128 or more, else 0.
///
/// With a `size` `[H, W]` it is resized first, as [`resize`](super::resize) does, then cut, as diffusers' inpainting
/// does. Colours count by their luma, (19595 R + 38470 G + 7471 B) / 2¹⁶ (ITU-R 601-2).
///
/// # Errors
/// As [`load_image`].
pub fn load_mask(path: impl AsRef<Path>, size: Option<[i64; 2]>) -> Result<Tensor> {
    let image = open(path.as_ref())?.into_rgb8();
    let (width, height) = image.dimensions();
    let luma = |p: &image::Rgb<u8>| {
        let [r, g, b] = p.0.map(u32::from);
        u8::try_from((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).unwrap_or(u8::MAX)
    };
    let gray: Vec<u8> = image.pixels().map(luma).collect();
    let levels = Tensor::f_from_slice(&gray)?.f_view([1, 1, i64::from(height), i64::from(width)])?;
    Ok(from_levels(&levels, size)?.f_ge(0.0)?.f_to_kind(tch::Kind::Float)?)
}

/// Levels `[B, C, H, W]` to pixels, l / 255 · 2 − 1, of this size.
fn from_levels(levels: &Tensor, size: Option<[i64; 2]>) -> Result<Tensor> {
    let levels = match size {
        None => levels.f_contiguous()?,
        Some(size) => resize_levels(levels, size)?,
    };
    Ok(levels.f_to_kind(tch::Kind::Float)?.f_div_scalar(255.0)?.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?)
}

/// An image as it is to be looked at: turned, and opaque.
fn open(path: &Path) -> Result<DynamicImage> {
    let io = |error| Error::io(path, error);
    let reader = ImageReader::open(path).map_err(io)?.with_guessed_format().map_err(io)?;
    let failed = |error| image_error(path, error);
    let mut decoder = reader.into_decoder().map_err(failed)?;
    let orientation = decoder.orientation().map_err(failed)?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(failed)?;
    let color = image.color();
    if color.has_alpha() && image.to_rgba8().pixels().any(|pixel| pixel.0[3] < u8::MAX) {
        let what = format!("{}: transparent pixels ({color:?})", path.display());
        return Err(Error::unsupported(what, "opaque images: lay it over a colour first"));
    }
    image.apply_orientation(orientation);
    Ok(image)
}
