//! Whatever makes images of prompts.

use crate::Result;
use crate::energy::Image;

/// What an image is to be of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageRequest {
    /// The prompt; empty for the unconditional model.
    pub prompt: String,
    /// What is to be avoided, for samplers with classifier-free guidance.
    pub negative_prompt: String,
    /// The seed of this image's own stream of noise: the image does not depend on the others of its batch.
    pub seed: u64,
}

/// A sampler of images: a whole pipeline, for those that need images and no more, such as the prior preservation of
/// DreamBooth (Ruiz et al. 2023).
pub trait ImageSampler: Send {
    /// Another handle over the same weights.
    fn handle(&self) -> Box<dyn ImageSampler>;

    /// One image a request, `[B, 3, H, W]`, pixels in −1 ..= 1, on the CPU in f32.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for no requests; the pipeline's own.
    fn sample(&self, requests: &[ImageRequest]) -> Result<Image>;
}
