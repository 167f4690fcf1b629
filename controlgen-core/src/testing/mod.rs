//! Contracts for every implementer of a trait, test models whose truth is known, statistics, and strategies for
//! property tests.

mod batch;
#[cfg(feature = "bench")]
pub mod bench;
pub mod contract;
mod statistics;
pub mod strategies;
mod table_lm;

pub use batch::{left_padded, right_padded};
pub use statistics::{chi_square, ks_test};
pub use table_lm::{TableLm, TableLmConfig};
