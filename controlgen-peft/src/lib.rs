//! Controllable generation: parameter-efficient adapters, their file formats and training recipes.
