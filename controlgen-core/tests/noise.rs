//! Streams: their values, their independence, and whether what they draw has the distribution that it should.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashSet;

use controlgen_core::Error;
use controlgen_core::noise::{Noise, NoiseSource, Stream, StreamState, TorchGenerator, normal_batch};
use proptest::prelude::*;
use rand::Rng;
use safetensors::SafeTensors;
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

fn doubles(tensor: &Tensor) -> Vec<f64> {
    tensor.to_kind(Kind::Double).flatten(0, -1).try_into().unwrap()
}

// ---- Values
// -------------------------------------------------------------------------------------------------

/// The generator against a ChaCha8 written from the paper (`benches/reference/noise_fixtures.py`).
#[test]
fn words_are_chachas() {
    let fixture = include_bytes!("fixtures/stream_words.safetensors");
    let file = SafeTensors::deserialize(fixture).unwrap();
    assert_eq!(file.len(), 5);
    for (name, view) in file.tensors() {
        let (seed, sample) = name.split_once('.').unwrap();
        let (seed, sample) = (seed.parse().unwrap(), sample.parse().unwrap());
        let (mut words, mut uniforms) = (Stream::new(seed, sample), Stream::new(seed, sample));
        assert_eq!(words.sample(), sample);
        for expected in view.data().chunks_exact(8) {
            let expected = u64::from_le_bytes(expected.try_into().unwrap());
            assert_eq!(words.rng().next_u64(), expected, "{name}");
            assert_eq!(uniforms.uniform(), (expected >> 11) as f64 / 2_f64.powi(53), "{name}");
        }
    }
}

/// Pinned: a change here changes every user's samples, and needs a new minor version.
#[test]
fn normals_are_stable() {
    let first = doubles(&Stream::new(42, 0).normal(&[6], Kind::Double, CPU).unwrap());
    let pinned = [
        0.6142747595381803,
        -1.572707362441277,
        -1.5224463852292809,
        0.16677454707480496,
        -0.6393118158221297,
        1.0401044316784667,
    ];
    assert_eq!(first, pinned);
    // Far enough to meet the ziggurat's wedges and its tail.
    let many = doubles(&Stream::new(42, 1).normal(&[100_000], Kind::Double, CPU).unwrap());
    assert!(many.iter().any(|x| x.abs() > 3.654_152_885_361_009));
    assert_eq!(many[99_998..], [0.008664098532308682, -1.1369330971220468]);
    assert_eq!(Stream::new(42, 0).fork().uniform(), 0.8899089951769654);
}

#[test]
fn kinds_are_roundings_of_one_draw() {
    let exact = Stream::new(1, 2).normal(&[3, 50], Kind::Double, CPU).unwrap();
    let single = exact.to_kind(Kind::Float);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        let drawn = Stream::new(1, 2).normal(&[3, 50], kind, CPU).unwrap();
        assert_eq!((drawn.kind(), drawn.size()), (kind, vec![3, 50]));
        assert_eq!(drawn, single.to_kind(kind));
    }
}

// ---- Streams
// ------------------------------------------------------------------------------------------------

#[test]
fn a_sample_does_not_depend_on_its_batch() {
    let shape = [4, 3, 5];
    let alone: Vec<Tensor> =
        (0..5).map(|i| Noise::seeded(9).stream(i).normal(&shape, Kind::Float, CPU).unwrap()).collect();
    let batch = Noise::seeded(9).streams(5).normal(&[5, 4, 3, 5], Kind::Float, CPU).unwrap();
    for (i, row) in (0..).zip(&alone) {
        assert_eq!(batch.get(i), *row);
    }
    let mut backwards: Vec<Stream> = Noise::seeded(9).streams(5).into_iter().rev().collect();
    let reversed = normal_batch(&mut backwards, &shape, Kind::Float, CPU).unwrap();
    assert_eq!(reversed.flip([0]), batch);
    // Drawing in two parts is drawing at once.
    let mut stream = Stream::new(9, 3);
    let parts = [30, 30].map(|n| stream.normal(&[n], Kind::Float, CPU).unwrap());
    assert_eq!(Tensor::cat(&parts, 0), alone[3].flatten(0, -1));
}

#[test]
fn sources_stand_behind_one_trait() {
    fn assert_send_sync<T: Send + Sync + Clone + 'static>() {}
    assert_send_sync::<Stream>();
    assert_send_sync::<TorchGenerator>();
    let mut boxed: Vec<Box<dyn NoiseSource>> =
        vec![Box::new(Stream::new(4, 0)), Box::new(TorchGenerator::new(4))];
    let batch = boxed.normal(&[2, 20], Kind::Double, CPU).unwrap();
    assert_eq!(batch.get(0), Stream::new(4, 0).normal(&[20], Kind::Double, CPU).unwrap());
    assert_eq!(batch.get(1), TorchGenerator::new(4).randn(&[20], Kind::Double, CPU).unwrap());
    let mut stream = Stream::new(4, 0);
    let mut borrowed: &mut dyn NoiseSource = &mut stream;
    assert_eq!(NoiseSource::normal(&mut borrowed, &[20], Kind::Double, CPU).unwrap(), batch.get(0));
    let mut none: Vec<Stream> = Noise::seeded(1).streams(0);
    assert_eq!(none.normal(&[0, 7], Kind::Half, CPU).unwrap().size(), [0, 7]);
}

#[test]
fn wrong_batches_and_shapes_are_refused() {
    let mut two = Noise::seeded(1).streams(2);
    let before = two.clone();
    for shape in [&[][..], &[3, 4], &[1, 4], &[-2, 4], &[0]] {
        assert!(matches!(two.normal(shape, Kind::Float, CPU), Err(Error::Shape { .. })), "{shape:?}");
    }
    for shape in [&[2, -4][..], &[2, i64::MAX, i64::MAX], &[2, 1 << 59]] {
        assert!(matches!(two.normal(shape, Kind::Float, CPU), Err(Error::Value { .. })), "{shape:?}");
    }
    assert!(matches!(two.normal(&[2, 4], Kind::Int64, CPU), Err(Error::Kind { .. })));
    let mut none = Noise::seeded(1).streams(0);
    assert!(matches!(none.normal(&[0, -1], Kind::Float, CPU), Err(Error::Value { .. })));
    assert_eq!(two, before);
}

#[test]
fn seeds_samples_and_forks_differ() {
    let mut seen = HashSet::new();
    let mut fresh = |stream: &mut Stream| seen.insert(stream.uniform().to_bits());
    for seed in [0, 1, 2, 1 << 32, u64::MAX] {
        for sample in [0, 1, 2, 1 << 32, u64::MAX] {
            let mut stream = Stream::new(seed, sample);
            let (mut a, mut b) = (stream.fork(), stream.fork());
            assert_eq!((a.sample(), b.sample()), (sample, sample));
            let mut nested = a.fork();
            for one in [&mut stream, &mut a, &mut b, &mut nested] {
                assert!(fresh(one), "seed {seed}, sample {sample}");
            }
        }
    }
}

#[test]
fn a_position_beyond_the_counter_is_refused() {
    let state = StreamState { position: 1 << 68, ..Stream::new(1, 1).state() };
    assert!(matches!(Stream::resume(&state), Err(Error::Value { .. })));
}

proptest! {
    /// A clone, and a stream resumed from a saved state, repeat the future, wherever the stream stands.
    #[test]
    fn clones_and_resumed_streams_go_on(
        seed: u64, sample: u64, calls in prop::collection::vec((0..4_u8, 0..300_usize), 0..12),
    ) {
        let mut stream = Stream::new(seed, sample);
        for (call, n) in calls {
            match call {
                0 => { let _ = stream.rng().next_u32(); }
                1 => stream.rng().fill_bytes(&mut vec![0; n]),
                2 => { let _ = stream.fork(); }
                _ => { let _ = stream.normal(&[n as i64], Kind::Float, CPU).unwrap(); }
            }
            let saved = serde_json::to_string(&stream.state()).unwrap();
            let resumed = Stream::resume(&serde_json::from_str(&saved).unwrap()).unwrap();
            for mut other in [stream.clone(), resumed] {
                prop_assert_eq!(&other, &stream);
                let mut original = stream.clone();
                let _ = original.rng().next_u32();
                let _ = other.rng().next_u32();
                let [a, b] = [&mut original, &mut other].map(|s| (0..200).map(|_| s.uniform()).collect::<Vec<_>>());
                prop_assert_eq!(a, b);
            }
        }
    }
}

// ---- Distributions: alpha = 0.001, fixed seeds
// --------------------------------------------------------------

/// Kolmogorov's statistic √n · sup |F_n − F| of values already mapped by F to [0, 1].
fn kolmogorov(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len() as f64;
    let gap = (0_u32..).zip(&values).map(|(i, f)| (f - f64::from(i) / n).max(f64::from(i + 1) / n - f));
    n.sqrt() * gap.fold(0.0, f64::max)
}

/// The statistic's quantile at 1 − 0.001: P(K > x) ≈ 2 exp(−2x²).
const CRITICAL: f64 = 1.9495;

/// The normal distribution function, LibTorch's.
fn phi(normals: &Tensor) -> Vec<f64> {
    doubles(&normals.to_kind(Kind::Double).special_ndtr())
}

#[test]
fn uniforms_are_uniform() {
    for (seed, sample) in [(0, 0), (42, 7), (u64::MAX, u64::MAX)] {
        let mut stream = Stream::new(seed, sample);
        let values: Vec<f64> = (0..100_000).map(|_| stream.uniform()).collect();
        assert!(values.iter().all(|x| (0.0..1.0).contains(x)));
        assert!(kolmogorov(values) < CRITICAL, "{seed} {sample}");
    }
    let torch = TorchGenerator::new(42);
    for kind in [Kind::Float, Kind::Double] {
        assert!(kolmogorov(doubles(&torch.clone().rand(&[100_000], kind, CPU).unwrap())) < CRITICAL);
    }
}

#[test]
fn normals_are_normal() {
    for (seed, sample) in [(0, 0), (42, 7), (u64::MAX, u64::MAX)] {
        for kind in [Kind::Float, Kind::Double] {
            let normals = Stream::new(seed, sample).normal(&[100_000], kind, CPU).unwrap();
            assert!(kolmogorov(phi(&normals)) < CRITICAL, "{seed} {sample} {kind:?}");
        }
    }
    for kind in [Kind::Float, Kind::Double] {
        let mut torch = TorchGenerator::new(1);
        assert!(kolmogorov(phi(&torch.randn(&[100_000], kind, CPU).unwrap())) < CRITICAL);
        let few: Vec<Tensor> = (0..20_000).map(|_| torch.randn(&[5], kind, CPU).unwrap()).collect();
        assert!(kolmogorov(phi(&Tensor::cat(&few, 0))) < CRITICAL);
    }
}

/// The tests above would notice a mean that is 0.02 off, or a deviation that is 2 % off.
#[test]
fn the_test_can_fail() {
    let normals = Stream::new(0, 0).normal(&[100_000], Kind::Double, CPU).unwrap();
    assert!(kolmogorov(phi(&(&normals + 0.02))) > CRITICAL);
    assert!(kolmogorov(phi(&(&normals * 1.02))) > CRITICAL);
}

/// Over streams, at one position: neighbouring samples, and neighbouring seeds, are as good as one long
/// stream.
#[test]
fn streams_are_independent() {
    let rows = 20_000;
    for by_seed in [false, true] {
        let mut streams: Vec<Stream> =
            (0..rows).map(|i| if by_seed { Stream::new(i, 3) } else { Stream::new(3, i) }).collect();
        let drawn = normal_batch(&mut streams, &[4], Kind::Double, CPU).unwrap(); // [rows, 4]
        for column in 0..4 {
            assert!(kolmogorov(phi(&drawn.select(1, column))) < CRITICAL);
        }
        // Correlations of neighbours, and of the columns: each is normal with deviation 1 / √n.
        let bound = 3.2905 / ((rows - 1) as f64).sqrt();
        let correlation = |a: &Tensor, b: &Tensor| (a * b).mean(Kind::Double).double_value(&[]).abs();
        for column in 0..4 {
            let x = drawn.select(1, column);
            let (a, b) = (x.slice(0, 0, rows as i64 - 1, 1), x.slice(0, 1, rows as i64, 1));
            assert!(correlation(&a, &b) < bound, "neighbours, column {column}");
            for other in 0..column {
                assert!(correlation(&x, &drawn.select(1, other)) < bound, "columns {column} and {other}");
            }
        }
    }
    let mut parent = Stream::new(8, 8);
    let mut forks: Vec<Stream> = (0..rows).map(|_| parent.fork()).collect();
    let drawn = normal_batch(&mut forks, &[1], Kind::Double, CPU).unwrap();
    assert!(kolmogorov(phi(&drawn)) < CRITICAL);
}
