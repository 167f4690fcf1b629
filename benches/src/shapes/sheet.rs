//! Pictures side by side in one file.

use std::path::Path;

use controlgen_core::{Error, Result};
use controlgen_diffusion::image::save_image;
use tch::{Kind, Tensor};

/// Pixels between pictures, white.
const GAP: i64 = 4;

/// Pictures `[B, 3, H, W]` in rows of `columns`, each pixel `zoom` times as wide and high: `[3, H', W']`.
///
/// # Errors
/// [`Error::Shape`] for no pictures, [`Error::Value`] for 0 columns or zoom.
pub fn sheet(pictures: &Tensor, columns: i64, zoom: i64) -> Result<Tensor> {
    let [count, channels, height, width] = pictures.size()[..] else {
        return Err(Error::shape("pictures of a sheet", "[B, 3, H, W]", &pictures.size()));
    };
    if count == 0 || columns < 1 || zoom < 1 {
        let found = format!("{count} in {columns} columns, zoom {zoom}");
        return Err(Error::value("pictures of a sheet", "at least one, in columns, zoom >= 1", found));
    }
    let (height, width) = (height * zoom, width * zoom);
    let large = pictures.f_to_kind(Kind::Float)?.f_upsample_nearest2d([height, width], None, None)?;
    let columns = columns.min(count);
    let rows = count.unsigned_abs().div_ceil(columns.unsigned_abs()) as i64;
    let shape = [channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP];
    let out = Tensor::f_ones(shape, (Kind::Float, pictures.device()))?;
    for k in 0..count {
        let (row, column) = (k.div_euclid(columns), k % columns);
        let place = out.f_narrow(1, GAP + row * (height + GAP), height)?;
        place.f_narrow(2, GAP + column * (width + GAP), width)?.f_copy_(&large.f_get(k)?)?;
    }
    Ok(out)
}

/// Writes [`sheet`] as a PNG file.
///
/// # Errors
/// Its own, and those of [`save_image`].
pub fn save_sheet(path: &Path, pictures: &Tensor, columns: i64, zoom: i64) -> Result<()> {
    save_image(path, &sheet(pictures, columns, zoom)?, None)
}
