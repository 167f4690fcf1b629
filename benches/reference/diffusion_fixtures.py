"""Noise schedules, timesteps and DDIM trajectories by diffusers, on random predictions.

    python diffusion_fixtures.py

writes controlgen-diffusion/tests/fixtures/ddim.safetensors. See README.md.
"""

from common import ROOT, fail, save_cases

import diffusers
import torch
from diffusers import DDIMScheduler

# STEPS divides T: diffusers takes a fixed stride for the previous timestep, which else is not the next of its list.
T, STEPS, SHAPE = 1000, 5, (2, 3, 2, 2)

SCHEDULES = {
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
}
SPACINGS = {
    "trailing": dict(timestep_spacing="trailing"),
    "leading": dict(timestep_spacing="leading", steps_offset=1),
    "linspace": dict(timestep_spacing="linspace"),
}
# (name, schedule, spacing, prediction, eta). With linspace the stride never fits: no trajectory with it.
CASES = [
    ("epsilon", "scaled_linear", "leading", "epsilon", 0.0),
    ("epsilon_eta", "linear", "trailing", "epsilon", 0.6),
    ("v", "cosine", "trailing", "v_prediction", 0.0),
    ("v_eta", "scaled_linear", "trailing", "v_prediction", 1.0),
    ("sample_eta", "linear", "leading", "sample", 1.0),
]


def betas(schedule: dict) -> torch.Tensor:
    """The same betas in f64."""
    start, end = schedule.get("beta_start"), schedule.get("beta_end")
    if schedule["beta_schedule"] == "linear":
        return torch.linspace(start, end, T, dtype=torch.float64)
    if schedule["beta_schedule"] == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
    u = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * torch.pi / 2
    f = torch.cos(u) ** 2
    return torch.clamp(1 - f[1:] / f[:-1], max=0.999)


def scheduler(schedule: str, **options) -> DDIMScheduler:
    made = DDIMScheduler(num_train_timesteps=T, clip_sample=False, **SCHEDULES[schedule], **options)
    exact = torch.cumprod(1 - betas(SCHEDULES[schedule]), 0)
    if not torch.allclose(made.alphas_cumprod.double(), exact, rtol=2e-4, atol=1e-6):
        fail(f"{schedule}: f64 betas are not those of diffusers")
    made.alphas_cumprod = exact
    made.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return made


def main():
    generator = torch.Generator().manual_seed(33)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    tensors = {}
    for name in SCHEDULES:
        table = DDIMScheduler(num_train_timesteps=T, **SCHEDULES[name]).alphas_cumprod
        tensors[f"{name}.alphas_cumprod"] = table[::37]
    for name, options in SPACINGS.items():
        for n in (1, 7, 50) if name != "leading" else (7, 50):
            made = scheduler("linear", **options)
            made.set_timesteps(n)
            tensors[f"{name}.timesteps.{n}"] = made.timesteps
    for name, schedule, spacing, prediction, eta in CASES:
        made = scheduler(schedule, prediction_type=prediction, **SPACINGS[spacing])
        made.set_timesteps(STEPS)
        outputs, noise = normal(STEPS, *SHAPE), normal(STEPS, *SHAPE)
        xs = [normal(*SHAPE)]
        for i, t in enumerate(made.timesteps):
            step = made.step(outputs[i], t, xs[-1], eta=eta, variance_noise=noise[i] if eta > 0 else None)
            xs.append(step.prev_sample)
        tensors[f"{name}.outputs"], tensors[f"{name}.x"] = outputs, torch.stack(xs)
        if eta > 0:
            tensors[f"{name}.noise"] = noise
    path = ROOT / "controlgen-diffusion" / "tests" / "fixtures" / "ddim.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_cases(path, tensors, f"diffusers {diffusers.__version__}")


main()
