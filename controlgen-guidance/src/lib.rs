//! Controllable generation of images: guidance, attention edits, inversion and masks.
