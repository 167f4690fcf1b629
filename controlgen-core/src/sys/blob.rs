//! Copies from borrowed memory into tensors.

use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

#[cfg(target_endian = "big")]
compile_error!("checkpoints are little-endian and are copied without swapping bytes");

/// Copies elements of `kind`, stored row by row, into a tensor, converting to its element type and device.
///
/// There must be exactly as many as the tensor has. The bytes need no alignment. They are only borrowed:
/// nothing of LibTorch refers to them afterwards.
pub(crate) fn copy_from_bytes(bytes: &[u8], kind: Kind, into: &mut Tensor) -> Result<()> {
    let width = kind.elt_size_in_bytes();
    let shape = into.size();
    if into.numel().checked_mul(width) != Some(bytes.len()) {
        return Err(Error::value(
            "bytes of a copied tensor",
            format!("{kind:?} of shape {shape:?}"),
            format!("{} bytes", bytes.len()),
        ));
    }
    if bytes.is_empty() {
        return Ok(());
    }
    if into.device() == Device::Cpu && into.f_kind()? == kind && into.is_contiguous() {
        let to = into.data_ptr();
        if to.is_null() {
            return Err(Error::value("copied tensor", "one with memory", "one without"));
        }
        // SAFETY: a contiguous tensor on the CPU has `numel * width` bytes from its `data_ptr`, which are
        // `bytes.len()`, as checked above. LibTorch allocated them, so that they are not those of `bytes`. No
        // reference to them is made; that nobody else reads them meanwhile is what `&mut` asks of the caller.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast::<u8>(), bytes.len()) };
        return Ok(());
    }
    let _guard = tch::no_grad_guard();
    if bytes.as_ptr().align_offset(width.min(8)) != 0 {
        return Ok(into.f_copy_(&Tensor::f_from_data_size(bytes, &shape, kind)?)?);
    }
    // SAFETY: the pointer is aligned and holds exactly the elements of `shape`, as checked above. The tensor
    // is dropped before `bytes` can be, is never written to, and no handle of it leaves this function:
    // `copy_` has read its source when it returns, for every device, as it is not told to be non-blocking.
    let source = unsafe { Tensor::f_from_blob(bytes.as_ptr(), &shape, &[], kind, Device::Cpu) }?;
    Ok(into.f_copy_(&source)?)
}

/// Copies 32-bit floating-point numbers into a tensor; otherwise as [`copy_from_bytes`].
#[cfg(feature = "gguf")]
pub(crate) fn copy_from_floats(numbers: &[f32], into: &mut Tensor) -> Result<()> {
    // SAFETY: the bytes of initialised f32 are initialised, lie in one allocation, and bytes need no
    // alignment.
    let bytes = unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) };
    copy_from_bytes(bytes, Kind::Float, into)
}
