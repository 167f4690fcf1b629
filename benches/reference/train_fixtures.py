"""Optimizers, schedules and averages, 20 steps, by PyTorch, transformers and diffusers.

    python train_fixtures.py

writes controlgen-core/tests/fixtures/train.safetensors and train.json. See README.md.
"""

from common import ROOT, save_cases, write_json

import diffusers
import torch
from diffusers.training_utils import EMAModel
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from transformers import get_linear_schedule_with_warmup
from transformers.optimization import Adafactor

FIXTURES = ROOT / "controlgen-core" / "tests" / "fixtures"
STEPS = 20
SHAPES = {"matrix": (6, 4), "vector": (5,), "cube": (2, 3, 4), "sometimes": (4, 3), "number": ()}
# `sometimes` has no gradient at these steps: a parameter that the loss does not depend on.
ABSENT = (0, 5, 6, 7, 13)
# The group of `vector`: another rate and no decay.
VECTOR = {"rate": 0.5, "weight_decay": 0.0}

T_FEW = dict(relative_step=False, scale_parameter=True, warmup_init=False)
CASES = [
    ("adamw", "AdamW", 1e-2, {}, {}),
    ("adamw_decay", "AdamW", 3e-3, dict(betas=(0.8, 0.95), eps=1e-4, weight_decay=0.3), {}),
    ("adamw_clip_norm", "AdamW", 1e-2, {}, dict(clip_norm=0.7)),
    ("adamw_clip_value", "AdamW", 1e-2, {}, dict(clip_value=0.2)),
    ("adamw_linear", "AdamW", 2e-2, {}, dict(schedule="linear")),
    ("sgd", "SGD", 3e-2, {}, {}),
    ("sgd_decay", "SGD", 3e-2, dict(weight_decay=0.3), {}),
    ("sgd_momentum", "SGD", 3e-2, dict(momentum=0.9, weight_decay=0.1), {}),
    ("sgd_dampening", "SGD", 3e-2, dict(momentum=0.7, dampening=0.4), {}),
    ("sgd_nesterov", "SGD", 3e-2, dict(momentum=0.9, nesterov=True, weight_decay=0.1), dict(clip_norm=2.0)),
    ("adafactor", "Adafactor", None, {}, {}),
    ("adafactor_warmup", "Adafactor", None, dict(warmup_init=True), {}),
    ("adafactor_unscaled", "Adafactor", None, dict(scale_parameter=False, clip_threshold=0.5), {}),
    ("adafactor_t_few", "Adafactor", 3e-3, T_FEW, dict(clip_norm=1.0, schedule="linear")),
    ("adafactor_plain", "Adafactor", 1e-2, dict(relative_step=False, scale_parameter=False, decay_rate=-0.6), {}),
    ("adafactor_beta1", "Adafactor", 1e-2, dict(relative_step=False, beta1=0.9, weight_decay=0.1), {}),
]
EMAS = {
    "ema_ramp": dict(decay=0.7, min_decay=0.2),
    "ema_power": dict(decay=0.8, use_ema_warmup=True, inv_gamma=2.0, power=0.75),
    "ema_after": dict(decay=0.9, update_after_step=6),
}
SCHEDULES = {
    "constant": (get_constant_schedule_with_warmup, dict(num_warmup_steps=7)),
    "linear": (get_linear_schedule_with_warmup, dict(num_warmup_steps=13, num_training_steps=100)),
    "linear_unwarmed": (get_linear_schedule_with_warmup, dict(num_warmup_steps=0, num_training_steps=100)),
    "cosine": (get_cosine_schedule_with_warmup, dict(num_warmup_steps=10, num_training_steps=100)),
    "cosine_waves": (
        get_cosine_schedule_with_warmup,
        dict(num_warmup_steps=5, num_training_steps=100, num_cycles=1.75),
    ),
}


def run(start, gradients, kind, rate, settings, around):
    """The parameters after each step, by name."""
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    own = {name: p for name, p in parameters.items() if name == "vector"}
    group = {"params": list(own.values()), "weight_decay": VECTOR["weight_decay"]}
    if rate is not None:
        group["lr"] = rate * VECTOR["rate"]
    rest = {"params": [p for name, p in parameters.items() if name not in own]}
    if kind == "Adafactor":
        optimizer = Adafactor([rest, group], lr=rate, **settings)
    else:
        optimizer = getattr(torch.optim, kind)([rest, group], lr=rate, **settings)
    schedule = None
    if around.get("schedule") == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer, 4, STEPS)
    trace = {name: [] for name in parameters}
    for step in range(STEPS):
        for name, parameter in parameters.items():
            absent = name == "sometimes" and step in ABSENT
            parameter.grad = None if absent else gradients[name][step].clone()
        if "clip_value" in around:
            torch.nn.utils.clip_grad_value_(parameters.values(), around["clip_value"])
        if "clip_norm" in around:
            torch.nn.utils.clip_grad_norm_(parameters.values(), around["clip_norm"])
        optimizer.step()
        if schedule is not None:
            schedule.step()
        for name, parameter in parameters.items():
            trace[name].append(parameter.detach().clone())
    return {name: torch.stack(values) for name, values in trace.items()}


def main():
    generator = torch.Generator().manual_seed(55)
    normal = lambda shape: torch.randn(shape, generator=generator)
    tensors = {}
    start = {name: normal(shape) for name, shape in SHAPES.items()}
    # Of sizes that differ by a thousand between steps, as they do in training.
    sizes = 10 ** (3 * torch.rand(STEPS, generator=generator) - 2.5)
    gradients = {name: torch.stack([size * normal(shape) for size in sizes]) for name, shape in SHAPES.items()}
    for name in SHAPES:
        tensors[f"start.{name}"], tensors[f"gradients.{name}"] = start[name], gradients[name]
    cases = []
    for name, kind, rate, settings, around in CASES:
        found = run(start, gradients, kind, rate, settings, around)
        tensors |= {f"{name}.{parameter}": values for parameter, values in found.items()}
        cases.append(dict(name=name, optimizer=kind, rate=rate, settings=settings, **around))
    for name, settings in EMAS.items():
        average = EMAModel([tensors["adamw.matrix"][0].clone().requires_grad_()], **settings)
        average.shadow_params = [start["matrix"].clone()]
        trace = []
        for value in tensors["adamw.matrix"]:
            average.step([value.clone().requires_grad_()])
            trace.append(average.shadow_params[0].clone())
        tensors[name] = torch.stack(trace)
    for name, (make, settings) in SCHEDULES.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
        schedule = make(optimizer, **settings)
        rates = []
        for _ in range(101):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        tensors[f"schedule.{name}"] = torch.tensor(rates, dtype=torch.float64)
    save_cases(FIXTURES / "train.safetensors", tensors, f"diffusers {diffusers.__version__}")
    write_json(FIXTURES / "train.json", dict(absent=ABSENT, vector=VECTOR, emas=EMAS, cases=cases))


main()
