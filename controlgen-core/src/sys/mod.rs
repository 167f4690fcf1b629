//! Everything unsafe, and nothing else.
#![allow(unsafe_code)]

mod cuda;

pub(crate) use cuda::open_cuda;
