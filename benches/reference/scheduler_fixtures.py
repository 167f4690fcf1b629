"""diffusers' schedulers on random model outputs, in f64: fixtures, and a sweep of the conformance tool.

    python scheduler_fixtures.py
    python scheduler_fixtures.py sweep CONFORMANCE [CLASS ..]

The first writes controlgen-diffusion/tests/fixtures/schedulers.{json,safetensors}. The second runs CONFORMANCE, the
conformance tool's binary, over classes, steps, parameterisations and spacings, against diffusers as it is (f32) and
against the same code computed in f64, and prints the greatest |Δ| / (|ref| + 1) a class. See README.md.

diffusers' tables are f32 by casts in the code. The f64 reference is each scheduler's own source in which float32 reads
float64, run under torch's default type f64.
"""

import inspect
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path

from common import ROOT, fail, save_cases, write_json

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file, save_file

SHAPE, STEPS = (2, 2, 2, 2), 10
CLASSES = [
    "DDPMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UnCLIPScheduler",
]
# Classes that have no spacings and betas to choose from.
ALONE = ["FlowMatchEulerDiscreteScheduler", "UnCLIPScheduler"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = [
    dict(timestep_spacing="leading", steps_offset=1),
    dict(timestep_spacing="trailing"),
    dict(timestep_spacing="linspace"),
]
BETAS = [
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    dict(beta_schedule="squaredcos_cap_v2"),
]
# What else a class has, each tried with every parameterisation and spacing by turns.
KARRAS = [dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True)]
OPTIONS = {
    "DDPMScheduler": [
        dict(),
        dict(variance_type="fixed_large", clip_sample=False),
        dict(variance_type="learned_range", clip_sample_range=2.0),
        dict(variance_type="learned_range", thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9),
        dict(beta_schedule="sigmoid", beta_start=1e-4, beta_end=0.02),
    ],
    "DDIMScheduler": [
        dict(),
        dict(clip_sample=False, set_alpha_to_one=False),
        dict(thresholding=True, sample_max_value=3.0),
        dict(clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ],
    "EulerDiscreteScheduler": [
        dict(),
        *KARRAS,
        dict(use_karras_sigmas=True, sigma_min=0.02, sigma_max=20.0),
        dict(interpolation_type="log_linear", final_sigmas_type="sigma_min"),
        dict(prediction_type="v_prediction", timestep_type="continuous", rescale_betas_zero_snr=True),
    ],
    "EulerAncestralDiscreteScheduler": [dict(), dict(prediction_type="v_prediction", rescale_betas_zero_snr=True)],
    "HeunDiscreteScheduler": [dict(), *KARRAS, dict(clip_sample=True), dict(beta_schedule="exp")],
    "DPMSolverMultistepScheduler": [
        dict(),
        dict(solver_type="heun"),
        dict(solver_order=3),
        dict(solver_order=1, final_sigmas_type="sigma_min"),
        dict(algorithm_type="sde-dpmsolver++"),
        dict(algorithm_type="sde-dpmsolver++", solver_type="heun", use_karras_sigmas=True),
        *KARRAS,
        dict(thresholding=True, sample_max_value=1.5),
        dict(lambda_min_clipped=-5.1, euler_at_final=True, lower_order_final=False),
        dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    "UniPCMultistepScheduler": [
        dict(),
        # diffusers gives NaN for bh1 to zero.
        dict(solver_type="bh1", final_sigmas_type="sigma_min"),
        dict(solver_order=3),
        dict(solver_order=3, solver_type="bh1", final_sigmas_type="sigma_min", disable_corrector=[0, 1]),
        dict(solver_order=1),
        *KARRAS,
        dict(thresholding=True, sample_max_value=1.5),
        dict(final_sigmas_type="sigma_min", use_karras_sigmas=True),
        dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    "PNDMScheduler": [dict(skip_prk_steps=True, set_alpha_to_one=True)],
    "LCMScheduler": [dict(), dict(clip_sample=True), dict(timestep_scaling=5.0)],
    "FlowMatchEulerDiscreteScheduler": [
        dict(),
        dict(shift=3.0),
        dict(shift=3.0, use_karras_sigmas=True),
        dict(shift=2.0, use_exponential_sigmas=True),
        dict(shift=3.0, shift_terminal=0.1),
        dict(shift=3.0, stochastic_sampling=True),
    ],
    "UnCLIPScheduler": [
        dict(),
        dict(variance_type="learned_range"),
        dict(prediction_type="sample", clip_sample_range=5.0),
        dict(clip_sample=False, variance_type="learned_range", prediction_type="sample"),
    ],
}
DOUBLED = {}


def doubled(name: str):
    """The class `name` of diffusers whose every float32 is float64."""
    if name not in DOUBLED:
        original = inspect.getmodule(getattr(diffusers, name))
        module = types.ModuleType(original.__name__ + "_f64")
        module.__package__, module.__file__ = original.__package__, original.__file__
        sys.modules[module.__name__] = module
        exec(compile(inspect.getsource(original).replace("float32", "float64"), original.__file__, "exec"), module.__dict__)
        DOUBLED[name] = module
    return DOUBLED[name]


def run(config: dict, steps: int, inputs: dict, dtype: torch.dtype, eta: float = 0.0) -> dict:
    """diffusers' `timesteps` and `samples` after each call."""
    name = config["_class_name"]
    module = doubled(name) if dtype == torch.float64 else inspect.getmodule(getattr(diffusers, name))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        scheduler = getattr(module, name)(**{k: v for k, v in config.items() if not k.startswith("_")})
        scheduler.set_timesteps(steps)
        # Without it a first timestep that is there twice would count as the second.
        scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
        x, samples = inputs["sample"].to(dtype), []
        options = dict(eta=eta) if name == "DDIMScheduler" else {}
        for k, t in enumerate(scheduler.timesteps):
            module.randn_tensor = lambda *_, **__: inputs["noise"][k].to(dtype)
            if name == "UnCLIPScheduler":
                options = dict(prev_timestep=next(iter(scheduler.timesteps[k + 1 :]), None))
            scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else None
            x = scheduler.step(inputs["model_outputs"][k].to(dtype), t, x, **options).prev_sample
            samples.append(x)
        return dict(timesteps=scheduler.timesteps.to(torch.float64), samples=torch.stack(samples))
    finally:
        torch.set_default_dtype(before)


def random_inputs(calls: int, learned: bool, seed: int, scale: float = 1.0) -> dict:
    """Of `calls` model calls."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).float()
    outputs = normal(calls, *SHAPE)
    if learned:
        outputs = torch.cat([outputs, torch.rand(calls, *SHAPE, generator=generator) * 2 - 1], 2)
    return dict(sample=normal(*SHAPE) * scale, model_outputs=outputs, noise=normal(calls, *SHAPE))


def refused(config: dict) -> bool:
    """What diffusers itself does not do, or does with NaN: x0 of epsilon where there is no signal."""
    name = config["_class_name"]
    if name == "EulerAncestralDiscreteScheduler" and config["prediction_type"] == "sample":
        return True
    if name == "PNDMScheduler" and (config["prediction_type"] == "sample" or config["timestep_spacing"] == "linspace"):
        return True  # with linspace its stride does not lead from a timestep to the next
    return config.get("rescale_betas_zero_snr", False) and config["prediction_type"] == "epsilon"


def configs(name: str):
    """Every parameterisation with every spacing, options and betas by turns; and every option."""
    if name in ALONE:
        yield from (dict(_class_name=name, **option) for option in OPTIONS[name])
        return
    options, seen = OPTIONS[name], []
    grid = [(p, s) for p in PREDICTIONS for s in (SPACINGS if name != "LCMScheduler" else SPACINGS[:1])]
    plain = [(p, s, {}) for p, s in grid]
    turns = [(*grid[i % len(grid)], option) for i, option in enumerate(options)]
    for i, (prediction, spacing, option) in enumerate(plain + turns):
        config = dict(_class_name=name, prediction_type=prediction, **spacing)
        config.update(BETAS[i % len(BETAS)])
        config.update(option)
        if name == "PNDMScheduler":
            config["skip_prk_steps"] = True
        if config not in seen and not refused(config):
            seen.append(config)
            yield config


def initial(config: dict, steps: int) -> float:
    """diffusers' init_noise_sigma."""
    scheduler = getattr(diffusers, config["_class_name"])(**{k: v for k, v in config.items() if not k.startswith("_")})
    scheduler.set_timesteps(steps)
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def fixtures() -> None:
    cases, tensors = [], {}
    inputs = random_inputs(2 * STEPS - 1, True, 2042)
    for name in ("sample", "model_outputs", "noise"):
        tensors[name] = inputs[name]
    plain = inputs | dict(model_outputs=inputs["model_outputs"][:, :, : SHAPE[1]])
    for name in CLASSES:
        for i, config in enumerate(configs(name)):
            # One in three of the plain ones: parameterisations and spacings change together.
            if name not in ALONE and i < 9 and i % 4 != 0 and i != 2:
                continue
            key = f"{name.removesuffix('Scheduler')}.{i}"
            learned = config.get("variance_type") == "learned_range"
            eta = 0.5 if key == "DDIM.4" else 0.0
            made = run(config, STEPS, inputs if learned else plain, torch.float64, eta)
            if not made["samples"].isfinite().all():
                fail(f"{key}: diffusers gives NaN")
            cases.append(dict(name=key, eta=eta, config=config))
            tensors[f"{key}.timesteps"], tensors[f"{key}.samples"] = made["timesteps"], made["samples"]
    folder = ROOT / "controlgen-diffusion" / "tests" / "fixtures"
    write_json(folder / "schedulers.json", cases, compact=True)
    save_cases(folder / "schedulers.safetensors", tensors, f"diffusers {diffusers.__version__}")
    print(len(cases), "cases")


def error(found: torch.Tensor, ref: torch.Tensor) -> float:
    """The greatest |Δ| / (|ref| + 1)."""
    ref = ref.double()
    return ((found.double() - ref).abs() / (ref.abs() + 1)).max().item()


def conformance(tool: str, folder: Path, config: dict, steps: int, inputs: dict, dtype: torch.dtype) -> dict:
    """The tool's outputs, or its message."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.to(dtype).contiguous() for k, v in inputs.items()}, folder / "in.safetensors")
    command = [tool, "schedule", "config.json", "in.safetensors", "out.safetensors", "--steps", str(steps)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return load_file(folder / "out.safetensors") if done.returncode == 0 else dict(message=done.stderr.strip())


def sweep(tool: str, names: list) -> None:
    """A line a class: f64, f32, and how far diffusers and the tool are in f32 from diffusers in f64."""
    columns, failed = ["f64", "f32", "diffusers f32 to f64", "tool f32 to f64"], 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names or CLASSES:
            worst, above = {}, {}
            for config in configs(name):
                for steps in (10, 25, 50, 999 if "Multistep" in name else 1000):
                    now = dict(config)
                    if steps > 50:
                        now.pop("steps_offset", None)  # with 1 they go beyond training
                        if name == "LCMScheduler":
                            now["original_inference_steps"] = 1000
                        if "lambda_min_clipped" in now:
                            continue  # less timesteps are left than steps
                    learned = now.get("variance_type") == "learned_range"
                    calls = 2 * steps - 1 if name == "HeunDiscreteScheduler" else steps + 1
                    inputs = random_inputs(calls, learned, steps, initial(now, steps))
                    single = run(now, steps, inputs, torch.float32)
                    exact = run(now, steps, inputs, torch.float64)
                    if not (single["samples"].isfinite().all() and exact["samples"].isfinite().all()):
                        print("diffusers gives NaN:", steps, json.dumps(now), flush=True)
                        continue
                    made = [conformance(tool, Path(folder), now, steps, inputs, t) for t in (torch.float64, torch.float32)]
                    if messages := [m["message"] for m in made if "message" in m]:
                        failed += 1
                        print("FAILED", steps, json.dumps(now), messages[0], flush=True)
                        continue
                    times = (made[0]["timesteps"] - exact["timesteps"]).abs().max().item()
                    errors = [
                        error(made[0]["samples"], exact["samples"]),
                        error(made[1]["samples"], single["samples"]),
                        error(single["samples"], exact["samples"]),
                        error(made[1]["samples"], exact["samples"]),
                    ]
                    limit = 2e-5 if steps < 50 else 5e-5 if steps == 50 else 3e-4
                    count = above.setdefault(steps, [0, 0, 0])
                    count[2] += 1
                    if errors[1] > limit:
                        # The reference's own rounding, unless diffusers is nearer to the truth than the tool.
                        count[0 if errors[3] <= max(errors[2], limit) else 1] += 1
                    if errors[0] > 1e-6 or times > 1e-6 or errors[1] > limit and errors[3] > max(errors[2], limit):
                        failed += 1
                        print("ABOVE", steps, [f"{e:.1e}" for e in errors], f"{times:.1e}", json.dumps(now), flush=True)
                    for column, value in zip(columns, errors):
                        key = (column, steps)
                        worst[key] = max(worst.get(key, 0.0), value)
            for column in columns:
                row = "  ".join(f"{steps}: {v:.1e}" for (c, steps), v in worst.items() if c == column)
                print(f"{name}, {column}: {row}", flush=True)
            row = "  ".join(f"{steps}: {own} and {ours} of {n}" for steps, (own, ours, n) in above.items())
            print(f"{name}, above the limit in f32 by diffusers' rounding and by ours: {row}", flush=True)
    if failed:
        fail(f"{failed} runs failed")


if sys.argv[1:2] == ["sweep"] and len(sys.argv) > 2:
    sweep(str(Path(sys.argv[2]).resolve()), sys.argv[3:])
elif len(sys.argv) == 1:
    fixtures()
else:
    fail("usage: scheduler_fixtures.py [sweep CONFORMANCE [CLASS ..]]")
