"""Writes the noise fixtures of controlgen-core/tests/fixtures.

    python benches/reference/noise_fixtures.py

stream_words.safetensors: the first 64-bit draws of our own streams, by a ChaCha8 written here from the paper
(D. J. Bernstein, "ChaCha, a variant of Salsa20", 2008); a tensor's name is {seed}.{sample}.

torch_noise.safetensors: what PyTorch's CPU generator draws. The test replays it: a tensor's name says which call made it,

    {sequence}.{seed}.{step}.{call}.{argument}.{shape}

where all steps of one sequence and seed come from one generator, in order. `digest-` before a call's name means that the file
holds not the drawn values but the sum of (index + 1) · bits over them, modulo 2^64. Sequences whose names begin
with `scalar` are drawn with ATEN_CPU_CAPABILITY=default.
"""

import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).resolve().parents[2] / "controlgen-core/tests/fixtures"
KINDS = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}
SEEDS = [0, 42, 2**32 - 1, 2**40 + 7, -1, -12345]

MIXED = [
    ("randn", "f32", [3]),
    ("randn", "f64", [5]),
    ("randn", "f32", [17]),
    ("randn", "f32", [1]),
    ("rand", "f32", [7]),
    ("rand", "f64", [3]),
    ("randn", "f16", [5]),
    ("randn", "bf16", [20]),
    ("rand", "f16", [4]),
    ("rand", "bf16", [4]),
    ("randint", "0:10", [9]),
    ("randint", f"-5:{2**28 - 5}", [4]),
    ("randint", f"-5:{2**28 - 6}", [4]),
    ("randint", f"{-2**63}:{2**63 - 1}", [3]),
    ("randperm", "33", []),
    ("randn", "f64", [2, 3, 5]),
    ("randn", "f32", [0, 4]),
    ("randn", "f32", []),
    ("state", "", []),
    ("randn", "f32", [2, 1, 8, 8]),
    ("randn", "f64", [1]),
    ("randperm", "1", []),
    ("digest-randn", "f32", [5000]),
    ("digest-randn", "f64", [5000]),
    ("digest-state", "", []),
    ("randn", "f32", [4]),
]


def digest(values):
    signed, unsigned = BITS[values.element_size()]
    bits = values.contiguous().view(signed).numpy().view(unsigned).astype(np.uint64).ravel()
    weights = np.arange(1, bits.size + 1, dtype=np.uint64)
    return torch.from_numpy(np.array([(bits * weights).sum(dtype=np.uint64)]).view(np.int64))


def call(name, argument, shape, generator):
    if name.startswith("digest-"):
        return digest(call(name.removeprefix("digest-"), argument, shape, generator))
    if name == "randn":
        return torch.randn(shape, dtype=KINDS[argument], generator=generator)
    if name == "rand":
        return torch.rand(shape, dtype=KINDS[argument], generator=generator)
    if name == "randint":
        low, high = map(int, argument.split(":"))
        return torch.randint(low, high, shape, generator=generator)
    if name == "randperm":
        return torch.randperm(int(argument), generator=generator)
    if name == "state":
        return generator.get_state()
    raise ValueError(name)


def draw(sequence, seed, calls, out):
    generator = torch.Generator().manual_seed(seed)
    for step, (name, argument, shape) in enumerate(calls):
        dims = "x".join(map(str, shape))
        out[f"{sequence}.{seed}.{step:02}.{name}.{argument}.{dims}"] = call(name, argument, shape, generator)


def vectorised(out):
    for seed in SEEDS:
        draw("mixed", seed, MIXED, out)
    for kind in KINDS:
        for n in (15, 16, 17, 31, 1000):
            # the long ones in full for one seed, digests for the others
            for seed in SEEDS:
                name = "randn" if n < 1000 or seed == 42 else "digest-randn"
                draw(f"fresh-{kind}-{n}", seed, [(name, kind, [n])], out)
        draw(f"large-{kind}", 42, [("digest-randn", kind, [2, 4, 64, 64]), ("digest-rand", kind, [4097])], out)
    # enough pairs to meet every octant and exponent of the polynomials
    draw("million", 7, [("digest-randn", "f32", [1 << 20])], out)


def scalar(out):
    for seed in SEEDS:
        for n in (16, 17):
            draw(f"scalar-{n}", seed, [("randn", "f32", [n])], out)
    draw("scalar-mixed", 42, [("randn", "f32", [1000]), ("randn", "f32", [3]), ("digest-randn", "f32", [9999])], out)


def chacha8(key, stream, block):
    """One block, 16 words: 64-bit counter, 64-bit stream number."""

    def quarter(a, b, c, d):
        for left, add, turn, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[left] = (x[left] + x[add]) & 0xFFFFFFFF
            x[turn] ^= x[left]
            x[turn] = ((x[turn] << by) | (x[turn] >> (32 - by))) & 0xFFFFFFFF

    words = list(struct.unpack("<4I", b"expand 32-byte k")) + list(struct.unpack("<8I", key))
    words += struct.unpack("<4I", struct.pack("<QQ", block, stream))
    x = words[:]
    for _ in range(4):
        for i in range(4):
            quarter(i, i + 4, i + 8, i + 12)
        for i in range(4):
            quarter(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12)
    return [(a + b) & 0xFFFFFFFF for a, b in zip(x, words)]


def streams(out):
    for seed, sample in [(0, 0), (42, 0), (42, 1), (2**64 - 1, 2**64 - 1), (42, 2**32)]:
        key = struct.pack("<Q", seed) + b"controlgen::noise stream"
        words = [word for block in range(6) for word in chacha8(key, sample, block)]
        pairs = np.array(words, dtype="<u4").view("<u8")
        out[f"{seed}.{sample}"] = torch.from_numpy(pairs.view(np.int64))


def save(out, name, **metadata):
    path = FIXTURES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, path, metadata=metadata or None)
    print(f"{path.name}: {len(out)} tensors, {path.stat().st_size} bytes")


def main():
    if len(sys.argv) > 1:
        out = {}
        scalar(out)
        save_file(out, sys.argv[1])
        return
    capability = torch.backends.cpu.get_cpu_capability()
    assert capability in ("AVX2", "AVX512"), f"the fixture needs a processor with AVX2, this is {capability}"
    out = {}
    vectorised(out)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "scalar.safetensors")
        subprocess.run(
            [sys.executable, __file__, path], check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": "default"}
        )
        out |= load_file(path)
    save(out, "torch_noise.safetensors", torch=torch.__version__)
    out = {}
    streams(out)
    save(out, "stream_words.safetensors")


if __name__ == "__main__":
    main()
