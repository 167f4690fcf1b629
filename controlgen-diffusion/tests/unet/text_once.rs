//! Text is read once.
