//! The loop: order, accumulation, spikes, refusals.
