//! Diffusion transformers, autoencoders and image files against diffusers and Pillow.
#![allow(clippy::unwrap_used, clippy::panic)]

mod autoencoder_kl;
mod dit;
mod images;
mod support;
