//! Images in and out: files to tensors and back, at the size that a model wants.
//!
//! A tensor of images is `[B, C, H, W]`, f32, pixels in −1 ..= 1; a mask `[B, 1, H, W]` is 0 or 1. Levels, numbers in
//! 0 ..= 255, come and go as diffusers' `VaeImageProcessor` takes and gives them.

mod parameters;
mod read;
mod resize;
mod write;

pub use parameters::{Parameters, load_parameters};
pub use read::{load_image, load_mask};
pub use resize::resize;
pub use write::{levels, save_image, save_images};

use std::path::Path;

use controlgen_core::Error;
use image::ImageError;

/// What the image crate says, as an error of ours.
fn image_error(path: &Path, error: ImageError) -> Error {
    match error {
        ImageError::IoError(error) => Error::io(path, error),
        ImageError::Unsupported(error) => {
            Error::unsupported(format!("{}: {error}", path.display()), "PNG and JPEG")
        }
        error => Error::format(path, error),
    }
}
