//! Contracts for every implementer of a trait, test models whose truth is known, statistics, and strategies for
//! property tests.

mod batch;
#[cfg(feature = "bench")]
pub mod bench;
pub mod contract;
mod counting_lm;
mod mixture;
mod mixture_denoiser;
mod statistics;
pub mod strategies;
mod table_lm;

pub use batch::{left_padded, right_padded};
pub use counting_lm::CountingLm;
pub use mixture::{Component, Mixture};
pub use mixture_denoiser::MixtureDenoiser;
pub use statistics::{chi_square, ks_test, normal_cdf};
pub use table_lm::{TableLm, TableLmConfig};
