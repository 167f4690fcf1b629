//! Guidance against transformers'.
