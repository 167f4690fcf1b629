//! Controllable generation of images: denoisers, noise schedules, samplers and pipelines.
