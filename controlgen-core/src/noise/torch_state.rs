//! The state of a [`TorchGenerator`], in the bytes of PyTorch's `Generator.get_state()`.

use super::TorchGenerator;
use super::mt19937::{Mt19937, N};
use crate::{Error, Result};

/// Bytes of the state. Little-endian, as the struct lies in memory on a 64-bit machine:
///
/// | bytes | what |
/// |---|---|
/// | 8, 4, 4, 8 | seed, words left, seeded (1), next word |
/// | 624 × 8 | the words, 64 bits each |
/// | 8, 8, 8 | unused (0), the cached normal, unused (0) |
/// | 4 + 4 | whether a normal is cached, padding |
/// | 4, 1 + 3 | a cached `f32` normal (never used), whether it is valid (0), padding |
const BYTES: usize = 24 + N * 8 + 24 + 8 + 8;

impl TorchGenerator {
    /// The state, as the bytes of `torch.Generator.get_state()`: a training run saves them and resumes
    /// exactly, here or in Python.
    ///
    /// The [`Arithmetic`](super::Arithmetic) is not part of it.
    #[must_use]
    pub fn state(&self) -> Vec<u8> {
        let engine = &self.engine;
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.extend(engine.seed().to_le_bytes());
        bytes.extend(engine.left().to_le_bytes());
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend(u64::from(engine.next()).to_le_bytes());
        for word in engine.state() {
            bytes.extend(u64::from(*word).to_le_bytes());
        }
        bytes.extend(0_f64.to_le_bytes());
        bytes.extend(self.cached.unwrap_or(0.0).to_le_bytes());
        bytes.extend(0_f64.to_le_bytes());
        bytes.extend(u64::from(self.cached.is_some()).to_le_bytes());
        bytes.extend([0; 8]);
        bytes
    }

    /// Takes up a state that [`TorchGenerator::state`] or `torch.Generator.get_state()` gave.
    ///
    /// # Errors
    /// [`Error::Value`] if the bytes are not such a state; the generator stays as it was.
    pub fn set_state(&mut self, state: &[u8]) -> Result<()> {
        if state.len() != BYTES {
            return Err(Error::value("generator state", format!("{BYTES} bytes"), state.len()));
        }
        let mut at = 0;
        let seed = take_u64(state, &mut at);
        let left = take_u32(state, &mut at);
        let seeded = take_u32(state, &mut at);
        if seeded != 1 {
            return Err(Error::value("generator state: seeded", 1, seeded));
        }
        let next = word(take_u64(state, &mut at), "next")?;
        let mut words = [0_u32; N];
        for slot in &mut words {
            *slot = word(take_u64(state, &mut at), "word")?;
        }
        at += 8;
        let normal = f64::from_bits(take_u64(state, &mut at));
        at += 8;
        let valid = match take_u32(state, &mut at) {
            0 => false,
            1 if normal.is_finite() => true,
            1 => return Err(Error::value("generator state: cached normal", "a finite number", normal)),
            other => return Err(Error::value("generator state: normal is valid", "0 or 1", other)),
        };
        self.engine = Mt19937::from_parts(seed, words, left, next)?;
        self.cached = valid.then_some(normal);
        Ok(())
    }
}

fn word(value: u64, what: &str) -> Result<u32> {
    u32::try_from(value)
        .map_err(|_| Error::value(format!("generator state: {what}"), "a 32-bit number", value))
}

fn take_u64(bytes: &[u8], at: &mut usize) -> u64 {
    let low = u64::from(take_u32(bytes, at));
    low | (u64::from(take_u32(bytes, at)) << 32)
}

fn take_u32(bytes: &[u8], at: &mut usize) -> u32 {
    let value = bytes[*at..*at + 4].iter().rev().fold(0, |value, byte| (value << 8) | u32::from(*byte));
    *at += 4;
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn a_damaged_state_is_refused_and_changes_nothing() {
        let mut generator = TorchGenerator::new(3);
        let _ = generator.randn(&[3], Kind::Double, Device::Cpu).unwrap();
        let good = generator.state();
        let before = generator.clone();
        let patched = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        let nan = {
            let mut bytes = good.clone();
            bytes[24 + N * 8 + 8..][..8].copy_from_slice(&f64::NAN.to_le_bytes());
            bytes
        };
        for bad in [
            vec![],
            good[1..].to_vec(),
            [&good[..], &[0]].concat(),
            patched(8, 200),             // left
            patched(12, 0),              // seeded
            patched(20, 1),              // next above 32 bits
            patched(28, 1),              // the first word above 32 bits
            patched(24 + N * 8 + 24, 2), // valid
            nan,
        ] {
            assert!(matches!(generator.set_state(&bad), Err(Error::Value { .. })));
            assert_eq!(generator, before);
        }
        assert!(generator.set_state(&good).is_ok());
        assert_eq!(generator, before);
    }
}
