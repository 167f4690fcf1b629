//! Weights in oneDNN's own layout, and products with them.
//!
//! LibTorch reorders a bf16 weight before every product, which for a few rows costs more than the product. Its own
//! compiler avoids that with two operators of the namespace `mkldnn`, which have no function in LibTorch's headers and
//! hence none in tch. They are called here through the dispatcher's C interface (torch/csrc/stable/c/shim.h), which
//! is looked up when the program runs: where LibTorch lacks it, or the processor lacks what oneDNN wants, nothing is
//! packed.

use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// An owned `at::Tensor*`, which is what tch's pointers are too.
type Handle = *mut c_void;

/// The functions of the C interface that are used.
struct Dispatcher {
    call: unsafe extern "C" fn(*const c_char, *const c_char, *mut u64, u64) -> i32,
    new_tensor: unsafe extern "C" fn(Handle, *mut Handle) -> i32,
    new_string: unsafe extern "C" fn(*const c_char, usize, *mut *mut c_void) -> i32,
}

/// The version of LibTorch whose calling convention this is: 2.11.0.
const VERSION: u64 = (2 << 56) | (11 << 48);

fn dispatcher() -> Option<&'static Dispatcher> {
    static FOUND: OnceLock<Option<Dispatcher>> = OnceLock::new();
    FOUND.get_or_init(find).as_ref()
}

#[cfg(unix)]
fn find() -> Option<Dispatcher> {
    let this = libloading::os::unix::Library::this();
    // SAFETY: the types are those of shim.h; the functions live in libtorch_cpu, which stays loaded for the life of
    // the process.
    unsafe {
        Some(Dispatcher {
            call: *this.get(b"torch_call_dispatcher\0").ok()?,
            new_tensor: *this.get(b"aoti_torch_new_tensor_handle\0").ok()?,
            new_string: *this.get(b"torch_new_string_handle\0").ok()?,
        })
    }
}

#[cfg(not(unix))]
fn find() -> Option<Dispatcher> {
    None
}

impl Dispatcher {
    /// A new reference to a tensor, which the call takes over.
    fn tensor(&self, tensor: &Tensor) -> Result<u64> {
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: tch's pointer is an `at::Tensor*`, of which a new reference is written to `handle`.
        let failed = unsafe { (self.new_tensor)(tensor.as_ptr().cast_mut().cast(), &raw mut handle) };
        if failed != 0 { Err(refused("a tensor handle")) } else { Ok(handle as u64) }
    }

    /// Calls an operator that returns one tensor. `stack` holds the arguments, which the call takes over.
    fn call(&self, name: &CStr, overload: &CStr, stack: &mut [u64]) -> Result<Tensor> {
        // SAFETY: `stack` holds the operator's arguments in order, each in the form that shim.h asks for; the result
        // is written to its first place, an `at::Tensor*` that we own, as tch's `from_ptr` wants it.
        unsafe {
            if (self.call)(name.as_ptr(), overload.as_ptr(), stack.as_mut_ptr(), VERSION) != 0 {
                return Err(refused(&name.to_string_lossy()));
            }
            Ok(Tensor::from_ptr(stack[0] as *mut _))
        }
    }
}

/// LibTorch has printed its reason; the C interface gives a code only.
fn refused(what: &str) -> Error {
    Error::Torch { message: format!("{what} was refused by the dispatcher") }
}

/// A weight `[outputs, inputs]`, bf16 on the CPU, in oneDNN's layout; `None` where this machine cannot.
pub(crate) fn pack(weight: &Tensor) -> Result<Option<Tensor>> {
    static WORKS: OnceLock<bool> = OnceLock::new();
    let Some(dispatcher) = dispatcher() else { return Ok(None) };
    let works = *WORKS.get_or_init(|| supported() && try_out(dispatcher).unwrap_or(false));
    if !works { Ok(None) } else { reorder(dispatcher, weight).map(Some) }
}

/// What oneDNN needs to multiply bf16 without emulating it.
fn supported() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bw")
        && std::arch::is_x86_feature_detected!("avx512vl");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether a small product comes out as it should.
fn try_out(dispatcher: &Dispatcher) -> Result<bool> {
    let _guard = tch::no_grad_guard();
    let options = (Kind::BFloat16, tch::Device::Cpu);
    let weight = Tensor::f_arange(32 * 16, (Kind::Float, tch::Device::Cpu))?.f_cos()?.f_view([32, 16])?;
    let weight = weight.f_to_kind(Kind::BFloat16)?;
    let x = Tensor::f_ones([1, 2, 16], options)?;
    let y = linear(dispatcher, &x, &reorder(dispatcher, &weight)?, None, 32)?;
    let expected = x.f_linear(&weight, None::<&Tensor>)?;
    let diff = y.f_sub(&expected)?.f_abs()?.f_max()?.f_to_kind(Kind::Double)?;
    Ok(y.size() == expected.size() && diff.f_double_value(&[])? <= 0.1)
}

fn reorder(dispatcher: &Dispatcher, weight: &Tensor) -> Result<Tensor> {
    // (Tensor self, int? batch_size=None)
    let mut stack = [dispatcher.tensor(&weight.f_detach()?)?, 0];
    dispatcher.call(c"mkldnn::_reorder_linear_weight", c"", &mut stack)
}

/// x Wᵀ + b with a packed W of `outputs` rows: x `[.., inputs]`, bf16, without gradients.
pub(crate) fn packed_linear(
    x: &Tensor,
    packed: &Tensor,
    bias: Option<&Tensor>,
    outputs: i64,
) -> Result<Tensor> {
    let dispatcher = dispatcher().ok_or_else(|| refused("a packed product"))?;
    linear(dispatcher, x, packed, bias, outputs)
}

fn linear(
    dispatcher: &Dispatcher,
    x: &Tensor,
    packed: &Tensor,
    bias: Option<&Tensor>,
    outputs: i64,
) -> Result<Tensor> {
    let mut shape = x.size();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    // The variant that adds a tensor to the product is the one whose arguments the C interface can pass.
    let added = match bias {
        Some(bias) => bias.f_to_kind(x.f_kind()?)?.f_expand(shape, false)?.f_contiguous()?,
        None => Tensor::f_zeros(shape, (x.f_kind()?, x.device()))?,
    };
    let mut add: *mut c_void = std::ptr::null_mut();
    // SAFETY: three bytes are read from a literal of three bytes.
    if unsafe { (dispatcher.new_string)(c"add".as_ptr(), 3, &raw mut add) } != 0 {
        return Err(refused("a string"));
    }
    // (Tensor X, Tensor other, Tensor W, Tensor? B, str attr)
    let mut stack =
        [dispatcher.tensor(x)?, dispatcher.tensor(&added)?, dispatcher.tensor(packed)?, 0, add as u64];
    dispatcher.call(c"mkldnn::_linear_pointwise", c"binary", &mut stack)
}
