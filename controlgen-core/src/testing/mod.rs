//! Test models whose truth is known, statistics, and strategies for property tests.

mod batch;
#[cfg(feature = "bench")]
pub mod bench;
mod statistics;
pub mod strategies;
mod table_lm;

pub use batch::{left_padded, right_padded};
pub use statistics::{chi_square, ks_test};
pub use table_lm::{TableLm, TableLmConfig};
