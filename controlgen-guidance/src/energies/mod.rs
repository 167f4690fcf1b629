//! Energies over images, one a file.

mod class;

pub use class::class_energy;
