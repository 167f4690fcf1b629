//! How the elements of a tensor are stored.

use candle_core::quantized::GgmlDType;
use tch::Kind;

/// The encodings that are read, for errors.
pub(super) const SUPPORTED: &str =
    "F32, F16, BF16, F64, I8 to I64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, Q8_K";

/// How the elements of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As LibTorch has them.
    Plain(Kind),
    /// In blocks that share scales.
    Quantised(GgmlDType),
}

/// An encoding by its number in the file, or what to call one that is not read.
pub(super) fn encoding(number: u32) -> Result<Encoding, Option<&'static str>> {
    use Encoding::{Plain, Quantised};
    Ok(match number {
        0 => Plain(Kind::Float),
        1 => Plain(Kind::Half),
        2 => Quantised(GgmlDType::Q4_0),
        3 => Quantised(GgmlDType::Q4_1),
        6 => Quantised(GgmlDType::Q5_0),
        7 => Quantised(GgmlDType::Q5_1),
        8 => Quantised(GgmlDType::Q8_0),
        10 => Quantised(GgmlDType::Q2K),
        11 => Quantised(GgmlDType::Q3K),
        12 => Quantised(GgmlDType::Q4K),
        13 => Quantised(GgmlDType::Q5K),
        14 => Quantised(GgmlDType::Q6K),
        15 => Quantised(GgmlDType::Q8K),
        24 => Plain(Kind::Int8),
        25 => Plain(Kind::Int16),
        26 => Plain(Kind::Int),
        27 => Plain(Kind::Int64),
        28 => Plain(Kind::Double),
        30 => Plain(Kind::BFloat16),
        9 => return Err(Some("Q8_1")),
        16 => return Err(Some("IQ2_XXS")),
        17 => return Err(Some("IQ2_XS")),
        18 => return Err(Some("IQ3_XXS")),
        19 => return Err(Some("IQ1_S")),
        20 => return Err(Some("IQ4_NL")),
        21 => return Err(Some("IQ3_S")),
        22 => return Err(Some("IQ2_S")),
        23 => return Err(Some("IQ4_XS")),
        29 => return Err(Some("IQ1_M")),
        34 => return Err(Some("TQ1_0")),
        35 => return Err(Some("TQ2_0")),
        39 => return Err(Some("MXFP4")),
        _ => return Err(None),
    })
}

impl Encoding {
    /// The element type that a tensor is read as.
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::Plain(kind) => kind,
            Self::Quantised(_) => Kind::Float,
        }
    }

    /// Elements a block, and bytes a block.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::Plain(kind) => (1, kind.elt_size_in_bytes()),
            Self::Quantised(kind) => (kind.block_size(), kind.type_size()),
        }
    }
}
