//! `TorchGenerator` against PyTorch, bit for bit.
//!
//! `benches/reference/noise_fixtures.py` wrote the fixture and says how its names are read.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use controlgen_core::noise::{Arithmetic, NoiseSource, TorchGenerator};
use safetensors::SafeTensors;
use tch::{Device, Kind, Tensor};

const FIXTURE: &[u8] = include_bytes!("fixtures/torch_noise.safetensors");

/// Doubles go through the C library; the fixture is glibc's.
const SAME_LIBRARY: bool = cfg!(all(target_os = "linux", target_env = "gnu", target_arch = "x86_64"));

struct Draw {
    call: String,
    argument: String,
    shape: Vec<i64>,
    /// The drawn values, little-endian.
    expected: Vec<u8>,
}

/// The fixture's draws by sequence and seed, in order.
fn sequences() -> BTreeMap<(String, i64), BTreeMap<u32, Draw>> {
    let mut all: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for (name, view) in SafeTensors::deserialize(FIXTURE).unwrap().tensors() {
        let parts: Vec<&str> = name.split('.').collect();
        let [sequence, seed, step, call, argument, shape] = parts[..] else { panic!("{name}") };
        let draw = Draw {
            call: call.into(),
            argument: argument.into(),
            shape: shape.split('x').filter(|s| !s.is_empty()).map(|s| s.parse().unwrap()).collect(),
            expected: view.data().to_vec(),
        };
        let key = (sequence.to_owned(), seed.parse().unwrap());
        assert!(all.entry(key).or_default().insert(step.parse().unwrap(), draw).is_none());
    }
    all
}

fn kind(name: &str) -> Kind {
    match name {
        "f64" => Kind::Double,
        "f32" => Kind::Float,
        "f16" => Kind::Half,
        "bf16" => Kind::BFloat16,
        other => panic!("{other}"),
    }
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let width = tensor.kind().elt_size_in_bytes();
    let mut bytes = vec![0; tensor.numel() * width];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

fn draw(generator: &mut TorchGenerator, call: &str, argument: &str, shape: &[i64]) -> (Vec<u8>, usize) {
    let tensor = match call {
        "randn" => generator.randn(shape, kind(argument), Device::Cpu),
        "rand" => generator.rand(shape, kind(argument), Device::Cpu),
        "randint" => {
            let (low, high) = argument.split_once(':').unwrap();
            generator.randint(low.parse().unwrap(), high.parse().unwrap(), shape, Device::Cpu)
        }
        "randperm" => generator.randperm(argument.parse().unwrap(), Device::Cpu),
        "state" => return (generator.state(), 1),
        other => panic!("{other}"),
    }
    .unwrap();
    if call != "randperm" {
        assert_eq!(tensor.size(), shape);
    }
    (bytes(&tensor), tensor.kind().elt_size_in_bytes())
}

fn digest(bytes: &[u8], width: usize) -> Vec<u8> {
    let mut sum = 0_u64;
    for (weight, value) in (1_u64..).zip(bytes.chunks_exact(width)) {
        let bits = value.iter().rev().fold(0, |bits, byte| (bits << 8) | u64::from(*byte));
        sum = sum.wrapping_add(bits.wrapping_mul(weight));
    }
    sum.to_le_bytes().to_vec()
}

fn replay(wanted: impl Fn(&str) -> bool, arithmetic: Arithmetic) -> usize {
    let mut draws = 0;
    for ((sequence, seed), steps) in sequences().into_iter().filter(|((name, _), _)| wanted(name)) {
        let mut generator = TorchGenerator::new(seed as u64).with_arithmetic(arithmetic);
        for (at, (step, expected)) in steps.into_iter().enumerate() {
            assert_eq!(at as u32, step);
            let (call, digested) = match expected.call.strip_prefix("digest-") {
                Some(call) => (call, true),
                None => (expected.call.as_str(), false),
            };
            let (found, width) = draw(&mut generator, call, &expected.argument, &expected.shape);
            let of_library = expected.argument == "f64" || call == "state";
            if of_library && !SAME_LIBRARY {
                continue;
            }
            let found = if digested { digest(&found, width) } else { found };
            assert!(
                found == expected.expected,
                "{sequence}, seed {seed}, step {step}: {} {} {:?}",
                expected.call,
                expected.argument,
                expected.shape
            );
            draws += 1;
        }
    }
    draws
}

#[test]
fn draws_equal_torchs() {
    let draws = replay(|name| !name.starts_with("scalar"), Arithmetic::Avx2);
    assert!(!SAME_LIBRARY || draws == 285, "{draws} draws");
}

#[test]
fn scalar_draws_equal_torchs() {
    let draws = replay(|name| name.starts_with("scalar"), Arithmetic::Scalar);
    assert_eq!(draws, 15);
}

/// The two ways of `f32` are two: a test that took one for the other would pass unnoticed.
#[test]
fn arithmetics_differ_in_the_last_bits() {
    let draw = |arithmetic| {
        let mut generator = TorchGenerator::new(42).with_arithmetic(arithmetic);
        generator.randn(&[1000], Kind::Float, Device::Cpu).unwrap()
    };
    let (a, b) = (draw(Arithmetic::Avx2), draw(Arithmetic::Scalar));
    assert_ne!(a, b);
    assert!((a - b).abs().max().double_value(&[]) < 1e-5);
}

/// A state that Python saved is taken up, and the draws go on as Python's did.
#[test]
fn torchs_state_is_taken_up() {
    let all = sequences();
    let steps = &all[&("mixed".to_owned(), 42)];
    let (&at, saved) = steps.iter().find(|(_, draw)| draw.call == "state").unwrap();
    let mut generator = TorchGenerator::new(0);
    generator.set_state(&saved.expected).unwrap();
    assert_eq!(generator.initial_seed(), 42);
    assert_eq!(generator.state(), saved.expected);
    let next = &steps[&(at + 1)];
    assert_eq!((next.call.as_str(), next.argument.as_str()), ("randn", "f32"));
    let (found, _) = draw(&mut generator, "randn", "f32", &next.shape);
    assert_eq!(found, next.expected);
}

#[test]
fn a_list_of_generators_draws_each_row_alone() {
    let mut list = vec![TorchGenerator::new(42), TorchGenerator::new(7)];
    let batch = list.normal(&[2, 4, 8, 8], Kind::Float, Device::Cpu).unwrap();
    for (row, seed) in [(0, 42), (1, 7)] {
        let alone = TorchGenerator::new(seed).randn(&[1, 4, 8, 8], Kind::Float, Device::Cpu).unwrap();
        assert_eq!(batch.get(row), alone.get(0));
    }
    let flat = TorchGenerator::new(42).normal(&[2, 4, 8, 8], Kind::Float, Device::Cpu).unwrap();
    assert_eq!(flat.size(), [2, 4, 8, 8]);
    assert_ne!(flat.get(0), flat.get(1));
}

#[test]
fn bad_arguments_are_refused_and_draw_nothing() {
    use controlgen_core::Error;
    let mut generator = TorchGenerator::new(1);
    let before = generator.clone();
    for kind in [Kind::Int64, Kind::Bool, Kind::ComplexFloat, Kind::Uint8] {
        assert!(matches!(generator.randn(&[3], kind, Device::Cpu), Err(Error::Kind { .. })));
        assert!(matches!(generator.rand(&[3], kind, Device::Cpu), Err(Error::Kind { .. })));
    }
    for shape in [&[-1][..], &[2, -3], &[0, -1], &[i64::MAX, 2], &[1 << 31, 1 << 31], &[i64::MAX]] {
        assert!(
            matches!(generator.randn(shape, Kind::Float, Device::Cpu), Err(Error::Value { .. })),
            "{shape:?}"
        );
        assert!(matches!(generator.randint(0, 2, shape, Device::Cpu), Err(Error::Value { .. })), "{shape:?}");
    }
    for (low, high) in [(0, 0), (3, 2), (i64::MAX, i64::MIN)] {
        assert!(matches!(generator.randint(low, high, &[2], Device::Cpu), Err(Error::Value { .. })));
    }
    for n in [-1, i64::MIN, i64::MAX] {
        assert!(matches!(generator.randperm(n, Device::Cpu), Err(Error::Value { .. })));
    }
    assert_eq!(generator, before);
}

/// From 2^32 / 20 elements on `torch.randperm` shuffles in another way. Needs 4 GB:
///
/// ```python
/// p = torch.randperm(214748364, generator=torch.Generator().manual_seed(42))
/// p[:4], (p * torch.arange(1, len(p) + 1)).sum()
/// ```
#[test]
#[ignore = "takes 4 GB of memory"]
fn large_permutations_equal_torchs() {
    let n = 214_748_364;
    let order = TorchGenerator::new(42).randperm(n, Device::Cpu).unwrap();
    let first: Vec<i64> = order.slice(0, 0, 4, 1).try_into().unwrap();
    let sum = (order * Tensor::arange_start(1, n + 1, (Kind::Int64, Device::Cpu))).sum(Kind::Int64);
    assert_eq!(first, [85_514_504, 93_417_259, 199_404_010, 60_269_803]);
    assert_eq!(sum.int64_value(&[]), -1_666_687_420_648_446_839);
}
