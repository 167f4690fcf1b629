//! From blocks of quantised numbers to f32.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use tch::Tensor;

use crate::checkpoint::fill::{self, Block, SERIAL};
use crate::sys::{Map, copy_from_floats};
use crate::{Error, Result};

/// De-quantises the tensor whose blocks lie in `range` into `into`, which has the same shape.
pub(super) fn read(map: &Map, range: Range<usize>, encoding: GgmlDType, into: &mut Tensor) -> Result<()> {
    let failed = |reason: String| Error::format(map.path(), format!("de-quantising {encoding:?}: {reason}"));
    let block = Block { elements: encoding.block_size(), bytes: encoding.type_size() };
    fill::chunks(map, range, block, SERIAL, into, |data, count, slice| {
        // `from_data` asserts that the data are aligned for the block type; the widest has 4 bytes. Offsets
        // in a file are multiples of at least 8, and maps begin at a page.
        if data.as_ptr().align_offset(align_of::<u32>()) != 0 {
            return Err(failed("the data are not aligned".to_owned()));
        }
        let numbers = encoding.from_data(Cow::Borrowed(data)).dequantize(count);
        match numbers.map_err(|error| failed(error.to_string()))? {
            CpuStorage::F32(numbers) => copy_from_floats(&numbers, slice),
            _ => Err(failed("expected 32-bit floating-point numbers".to_owned())),
        }
    })
}
