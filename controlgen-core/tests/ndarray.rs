//! Tensors to arrays and back.

#![allow(clippy::unwrap_used, clippy::panic)]

use controlgen_core::Error;
use controlgen_core::ndarray::{Element, from_array, to_array};
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn, Slice, arr0};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

fn arange(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::arange(shape.iter().product::<i64>(), (Kind::Int64, Device::Cpu)).reshape(shape).to_kind(kind)
}

/// `numbers` are the values in double precision, which holds each exactly.
fn round_trip<T: Element + PartialEq + std::fmt::Debug>(values: [T; 4], numbers: [f64; 4], kind: Kind) {
    assert_eq!(T::DTYPE, kind);
    let array = ArrayD::from_shape_vec(IxDyn(&[2, 2]), values.to_vec()).unwrap();
    let tensor = from_array(&array).unwrap();
    assert_eq!((tensor.kind(), tensor.size()), (kind, vec![2, 2]));
    // LibTorch reads the values that were written.
    let read: Vec<f64> = tensor.to_kind(Kind::Double).flatten(0, -1).try_into().unwrap();
    assert_eq!(read, numbers);
    assert_eq!(to_array::<T>(&tensor).unwrap(), array);
}

#[test]
fn every_element_type_keeps_its_kind_and_values() {
    round_trip([true, false, false, true], [1.0, 0.0, 0.0, 1.0], Kind::Bool);
    round_trip([0_u8, 1, 128, 255], [0.0, 1.0, 128.0, 255.0], Kind::Uint8);
    round_trip([0_i8, 1, -128, 127], [0.0, 1.0, -128.0, 127.0], Kind::Int8);
    round_trip([0_i16, 1, i16::MIN, i16::MAX], [0.0, 1.0, -32768.0, 32767.0], Kind::Int16);
    round_trip([0_i32, 1, i32::MIN, i32::MAX], [0.0, 1.0, -2_147_483_648.0, 2_147_483_647.0], Kind::Int);
    round_trip([0_i64, 1, i64::MIN, 1 << 53], [0.0, 1.0, -(2_f64.powi(63)), 2_f64.powi(53)], Kind::Int64);
    let halves = [1.5, -65504.0, 2_f64.powi(-24), -0.25];
    round_trip(halves.map(f16::from_f64), halves, Kind::Half);
    let wide = [1.5, -(2_f64.powi(127)), 2_f64.powi(-133), -0.25];
    round_trip(wide.map(bf16::from_f64), wide, Kind::BFloat16);
    round_trip(wide.map(|x| x as f32), wide, Kind::Float);
    let doubles = [0.1, f64::MAX, 5e-324, -1e300];
    round_trip(doubles, doubles, Kind::Double);
}

/// Every other kind is refused for every element type: a cast is never silent.
#[test]
fn another_kind_is_refused() {
    const KINDS: [Kind; 11] = [
        Kind::Bool,
        Kind::Uint8,
        Kind::Int8,
        Kind::Int16,
        Kind::Int,
        Kind::Int64,
        Kind::Half,
        Kind::BFloat16,
        Kind::Float,
        Kind::Double,
        Kind::ComplexFloat,
    ];
    fn check<T: Element + std::fmt::Debug>() {
        for kind in KINDS {
            match to_array::<T>(&arange(&[2, 2], kind)) {
                Ok(_) => assert_eq!(kind, T::DTYPE),
                Err(Error::Kind { expected, found, .. }) => {
                    assert_ne!(kind, T::DTYPE);
                    assert_eq!((expected, found), (format!("{:?}", T::DTYPE), format!("{kind:?}")));
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
    check::<bool>();
    check::<u8>();
    check::<i8>();
    check::<i16>();
    check::<i32>();
    check::<i64>();
    check::<f16>();
    check::<bf16>();
    check::<f32>();
    check::<f64>();
}

#[test]
fn layouts_convert_as_what_they_show() {
    let x = arange(&[2, 3, 4], Kind::Float);
    let whole = to_array::<f32>(&x).unwrap();
    assert_eq!(whole[[1, 2, 3]], 23.0);
    let transposed = to_array::<f32>(&x.permute([2, 0, 1])).unwrap();
    assert_eq!(transposed, whole.clone().permuted_axes(IxDyn(&[2, 0, 1])));
    let sliced = to_array::<f32>(&x.slice(2, 1, 4, 2)).unwrap();
    assert_eq!(sliced, whole.slice_axis(ndarray::Axis(2), Slice::new(1, None, 2)));
    let expanded = to_array::<f32>(&x.select(0, 1).unsqueeze(0).expand([5, 3, 4], false)).unwrap();
    assert_eq!(expanded.shape(), [5, 3, 4]);
    assert_eq!(expanded[[4, 2, 3]], 23.0);
    let conjugate = Tensor::complex(&x, &(&x + 1.0)).conj().imag();
    assert_eq!(to_array::<f32>(&conjugate).unwrap()[[1, 2, 3]], -24.0);

    for array in [
        whole.view().reversed_axes(),
        whole.slice_axis(ndarray::Axis(1), Slice::new(0, None, -2)),
        whole.slice_axis(ndarray::Axis(0), Slice::from(1..)),
        whole.broadcast(IxDyn(&[7, 2, 3, 4])).unwrap(),
    ] {
        let tensor = from_array(&array).unwrap();
        assert!(tensor.is_contiguous());
        assert_eq!(to_array::<f32>(&tensor).unwrap(), array);
    }
}

#[test]
fn scalars_and_empty_tensors_convert() {
    let scalar = from_array(&arr0(2.5_f64)).unwrap();
    assert_eq!((scalar.dim(), scalar.double_value(&[])), (0, 2.5));
    assert_eq!(to_array::<f64>(&scalar).unwrap(), arr0(2.5).into_dyn());
    for shape in [&[0][..], &[0, 3], &[3, 0], &[2, 0, 5]] {
        let empty = to_array::<i64>(&arange(shape, Kind::Int64)).unwrap();
        let dims: Vec<i64> = empty.shape().iter().map(|&dim| dim as i64).collect();
        assert_eq!(dims, shape);
        assert_eq!(from_array(&empty).unwrap().size(), shape);
    }
}

#[test]
fn gradients_are_left_behind_and_memory_is_not_shared() {
    let leaf = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let mut array = to_array::<f32>(&(&leaf * 2.0)).unwrap();
    assert_eq!(array, ndarray::arr1(&[2.0; 3]).into_dyn());
    let tensor = from_array(&array).unwrap();
    assert!(!tensor.requires_grad());
    array.fill(7.0);
    assert_eq!(tensor.double_value(&[0]), 2.0);
    assert!(leaf.requires_grad());
}

#[test]
fn what_has_no_values_is_refused() {
    assert!(to_array::<f32>(&Tensor::new()).is_err());
    let sparse = Tensor::ones([2, 2], (Kind::Float, Device::Cpu)).to_sparse_sparse_dim(2);
    assert!(matches!(to_array::<f32>(&sparse), Err(Error::Torch { .. })));
}

fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0..5_usize, 0..5)
}

fn filled<T: Copy>(shape: &[usize], values: &[T]) -> ArrayD<T> {
    let n = shape.iter().product();
    ArrayD::from_shape_vec(IxDyn(shape), values.iter().copied().cycle().take(n).collect()).unwrap()
}

proptest! {
    #[test]
    fn arrays_round_trip_in_any_layout(
        shape in shapes(), bits in prop::collection::vec(any::<u32>(), 1..64), reversed: bool, step in 1..3_isize,
    ) {
        let values: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        let array = filled(&shape, &values);
        let mut view = array.view();
        if let Some(last) = shape.len().checked_sub(1) {
            let step = if reversed { -step } else { step };
            view.slice_axis_inplace(ndarray::Axis(0), Slice::new(0, None, step));
            if reversed {
                view.swap_axes(0, last);
            }
        }
        let back = to_array::<f32>(&from_array(&view).unwrap()).unwrap();
        prop_assert_eq!(back.shape(), view.shape());
        // Bits, so that NaNs count.
        prop_assert!(back.iter().zip(&view).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn tensors_round_trip(shape in shapes(), values in prop::collection::vec(any::<i64>(), 1..64)) {
        let tensor = from_array(&filled(&shape, &values)).unwrap();
        let turned = if shape.is_empty() { tensor } else { tensor.transpose(0, -1) };
        let back = from_array(&to_array::<i64>(&turned).unwrap()).unwrap();
        prop_assert_eq!(back.size(), turned.size());
        prop_assert!(back.equal(&turned));
    }
}
