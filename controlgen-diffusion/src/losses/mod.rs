//! What models of images are trained with. The loop is `controlgen_core::train`'s.

mod autoencoding;
mod contrastive;
mod denoising;

pub use autoencoding::{Autoencoding, AutoencodingLoss, Reconstruction};
pub use contrastive::{contrastive_loss, retrieval_accuracy};
pub use denoising::{Denoising, NoisedBatch, Timesteps, Weighting};
