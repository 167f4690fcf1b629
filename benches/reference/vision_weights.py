"""Random weights of networks of images, and their directories as diffusers writes them."""

import shutil

from common import ROOT, fail, save_cases

import torch
from safetensors.torch import load_file, save_file

FIXTURES = ROOT / "controlgen-diffusion" / "tests" / "fixtures"


def randomise(model: torch.nn.Module, seed: int, gain: float = 1.0) -> None:
    """Overwrites every parameter from one seed, so that each matters and activations stay of order one.

    Matrices and kernels: normal with deviation gain / sqrt(inputs). Tables: 0.8 n. Gains of norms: 1 + 0.3 n. Biases:
    0.2 n. Rounded to bfloat16, in which they are stored.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in tables:
                value = 0.8 * noise
            elif parameter.ndim >= 2:
                value = gain * noise * parameter[0].numel() ** -0.5
            elif name.endswith("bias"):
                value = 0.2 * noise
            else:
                value = 1.0 + 0.3 * noise
            parameter.copy_(value.bfloat16().float())


def write(model, folder, cases: dict, rename=lambda name: name, config=lambda config: config) -> None:
    """A directory of `config.json` and bf16 weights, under names and with fields that may be changed, and the cases."""
    import json

    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = {rename(k): v.bfloat16().contiguous() for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    fields = config(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    import diffusers

    save_cases(folder / "cases.safetensors", cases, f"diffusers {diffusers.__version__}, float32")
    for path in folder.iterdir():
        path.chmod(0o644)


def check(name: str, found: torch.Tensor, expected: torch.Tensor, agree: float = 2e-5) -> None:
    """Refuses numbers that another way of computing them does not give."""
    distance = (found - expected).abs().max().item()
    if distance > agree:
        fail(f"{name}: {distance:.1e} apart, more than {agree}")


def sensitive(name: str, model, run, truth: torch.Tensor, least: float = 1e-3) -> None:
    """Refuses a model some of whose parameters hardly matter: each, set to the mean of itself, must move the output."""
    for parameter, tensor in list(model.named_parameters()):
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.copy_(kept.mean().expand_as(kept) if kept.numel() > 1 else kept + 1)
            moved = (run(model) - truth).abs().max().item()
            tensor.copy_(kept)
        if moved < least and not parameter.endswith(("to_k.bias", "key.bias")):  # softmax takes it out
            fail(f"{name}: {parameter} would not be noticed ({moved:.1e})")
