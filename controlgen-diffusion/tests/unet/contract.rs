//! What every denoiser keeps.

use controlgen_core::testing::contract;
use controlgen_core::Placement;

use crate::support::{Case, MODELS, open};
