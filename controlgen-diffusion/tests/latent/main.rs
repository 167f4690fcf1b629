//! Diffusion transformers, autoencoders and image files against diffusers and Pillow.
#![allow(clippy::unwrap_used, clippy::panic)]

mod dit;
mod images;
mod support;
