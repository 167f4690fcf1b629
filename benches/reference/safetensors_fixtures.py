"""Writes controlgen-core/tests/fixtures/kinds.safetensors.

It holds a tensor of every element type that the reader knows, and of the other floating-point ones what torch makes of
them in f32 (`NAME.float`). Run from the root of the repository.
"""

import torch
from safetensors.torch import save_file

KINDS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


def main():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in KINDS.items():
        if dtype.is_floating_point:
            tensors[name] = torch.randn(3, 5, generator=generator, dtype=torch.float64).to(dtype)
            if dtype is not torch.float32:
                tensors[name + ".float"] = tensors[name].to(torch.float32)
        else:
            tensors[name] = torch.randint(0, 2 if dtype is torch.bool else 100, (3, 5), generator=generator).to(dtype)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.zeros(0, 7)
    tensors['quote " slash \\ tab \t ü 日本 😀'] = torch.ones(1)
    save_file(tensors, "controlgen-core/tests/fixtures/kinds.safetensors", {"format": "pt", "note": 'a "quoted" ü'})


if __name__ == "__main__":
    main()
