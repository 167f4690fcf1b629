"""What the fixture scripts share: seeded weights, deterministic files, the versions they were made with."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[2]
TEXT_FIXTURES = ROOT / "controlgen-text" / "tests" / "fixtures"
VERSIONS = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}


def fail(message: str) -> None:
    """One clear message on stderr and exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def write_json(path: Path, value, compact: bool = False) -> None:
    """JSON with a final newline; `compact` drops the white space."""
    layout = {"separators": (",", ":")} if compact else {"indent": 2}
    path.write_text(json.dumps(value, ensure_ascii=False, **layout) + "\n", encoding="utf-8")


def save_cases(path: Path, tensors: dict, about: str) -> None:
    """Tensors in one safetensors file whose metadata says how they were made."""
    tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
    # One entry: several would be written in a random order, and the files would not repeat byte for byte.
    made_by = f"{about}; transformers {VERSIONS['transformers']}, torch {VERSIONS['torch']}"
    save_file(tensors, path, metadata={"about": made_by})


def randomise(model: torch.nn.Module, seed: int, gain: float = 1.3, table_std: float = 0.8) -> None:
    """Overwrites every parameter from one seed, so that each of them matters to the logits.

    Matrices: normal with deviation gain / sqrt(inputs). Embedding tables: normal with deviation `table_std`.
    Norm gains: 1 + 0.3 n. Biases: 0.3 n. The values are rounded to bfloat16, so that a file can hold
    them in any of f32, bf16 and (within its range) f16 without loss.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    linears = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in tables:
                value = table_std * noise
            elif parameter.ndim == 2:
                inputs = parameter.shape[1] if id(parameter) in linears else parameter.shape[0]
                value = gain * noise * inputs**-0.5
            elif name.endswith("bias"):
                value = 0.3 * noise
            else:
                value = 1.0 + 0.3 * noise
            parameter.copy_(value.bfloat16().float())
