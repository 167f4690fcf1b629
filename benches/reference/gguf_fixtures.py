"""Writes controlgen-core/tests/fixtures/quants.gguf and quants.safetensors.

The first holds random blocks of every encoding and a metadata value of every type, written by the `gguf` package; the second
the same tensors, de-quantised by that package. Run from the root of the repository.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import save_file

FIXTURES = Path("controlgen-core/tests/fixtures")

# Where the scales lie in a block, as (offset, dtype): all other bytes may be anything.
SCALES = {
    Q.Q4_0: [(0, "<f2")],
    Q.Q4_1: [(0, "<f2"), (2, "<f2")],
    Q.Q5_0: [(0, "<f2")],
    Q.Q5_1: [(0, "<f2"), (2, "<f2")],
    Q.Q8_0: [(0, "<f2")],
    Q.Q2_K: [(80, "<f2"), (82, "<f2")],
    Q.Q3_K: [(108, "<f2")],
    Q.Q4_K: [(0, "<f2"), (2, "<f2")],
    Q.Q5_K: [(0, "<f2"), (2, "<f2")],
    Q.Q6_K: [(208, "<f2")],
    Q.Q8_K: [(0, "<f4")],
}


def blocks(rng, encoding, rows, blocks_per_row):
    """Random bytes with finite scales: [rows, bytes]."""
    _, size = gguf.GGML_QUANT_SIZES[encoding]
    data = rng.integers(0, 256, (rows * blocks_per_row, size), dtype=np.uint8)
    for offset, dtype in SCALES[encoding]:
        scale = rng.normal(size=(len(data), 1)).astype(dtype)
        data[:, offset : offset + scale.itemsize] = scale.view(np.uint8)
    return data.reshape(rows, -1)


def dequantise(data, encoding):
    if encoding is Q.Q8_K:  # not in gguf.quants; ggml's definition: a float, then 256 signed bytes
        block = data.reshape(-1, 292)
        numbers = block[:, :4].copy().view("<f4") * block[:, 4:260].view(np.int8).astype(np.float32)
        return numbers.reshape(len(data), -1)
    return gguf.quants.dequantize(data, encoding)


def main():
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(FIXTURES / "quants.gguf", "test")
    writer.add_custom_alignment(64)
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60_000)
    writer.add_int16("a.i16", -30_000)
    writer.add_uint32("a.u32", 4_000_000_000)
    writer.add_int32("a.i32", -2_000_000_000)
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_int64("a.i64", -(2**63))
    writer.add_float32("a.f32", 0.1)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.true", True)
    writer.add_bool("a.false", False)
    writer.add_string("a.string", "héllo \u2014 wörld")
    writer.add_array("list.string", ["", "a", "Ġthe", "日本"])
    writer.add_array("list.i32", [1, -2, 3])
    writer.add_array("list.f32", [0.5, -1.5])
    writer.add_array("list.bool", [True, False, True])
    writer.add_array("list.list", [[1, 2], [3]])

    expected = {}
    for encoding in SCALES:
        k = gguf.GGML_QUANT_SIZES[encoding][0] == 256
        rows, per_row = (2, 2) if k else (3, 2)
        data = blocks(rng, encoding, rows, per_row)
        writer.add_tensor(encoding.name, data, raw_dtype=encoding)
        expected[encoding.name] = torch.from_numpy(dequantise(data, encoding).copy())

    plain = rng.normal(size=(2, 3, 4))
    for name, dtype in [("F16", np.float16), ("F32", np.float32), ("F64", np.float64)]:
        array = plain.astype(dtype)
        writer.add_tensor(name, array)
        expected[name] = torch.from_numpy(array)
    bf16 = torch.from_numpy(plain).to(torch.bfloat16)
    raw = bf16.view(torch.int16).numpy().view(np.uint8).reshape(2, 3, 8)
    writer.add_tensor("BF16", raw, raw_dtype=Q.BF16)
    expected["BF16"] = bf16
    for name, dtype in [("I8", np.int8), ("I16", np.int16), ("I32", np.int32), ("I64", np.int64)]:
        info = np.iinfo(dtype)
        array = rng.integers(info.min, info.max, (5,), dtype=dtype, endpoint=True)
        writer.add_tensor(name, array)
        expected[name] = torch.from_numpy(array)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, FIXTURES / "quants.safetensors")


if __name__ == "__main__":
    main()
