"""One step of a UNet, controlgen beside diffusers eager, alternating in one run; and the peak memory of each.

    python unet_side_by_side.py --controlgen target/release/denoiser-step [--models small,medium,sd15]
        [--alternations N] [--threads 2] [--folder DIRECTORY] [--json FILE] [--train] [--batches 16,32]

prints Markdown. How it is kept fair, and where it leans:

* Both load the same random weights from the same files (f32), are told the same inputs, and what they predict is
  compared. Both stay loaded; a step is timed inside each process, without start, loading or preparing. One runs at a
  time, the order turns at each alternation; each runs two steps first that do not count.
* controlgen has the text's keys and values from before the step: it computes them once an image. diffusers computes
  them in every step; that is part of what is compared.
* Two threads each. Ratio: the median over alternations of diffusers' time over controlgen's, with an interval of 95 %
  by the percentile bootstrap.
* With --train a step is one of training: forward, mean squared error, backward, gradients clipped to norm 1, AdamW
  (PyTorch's fused one). Both begin with the same weights and see the same batch, so that their losses after as many
  steps are compared.
* Memory: the greatest resident set (ru_maxrss) of a process that loads, and runs the steps. diffusers loads by
  from_pretrained as its pipelines do. An interpreter and its libraries count: they are there when it runs.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCKS = dict(down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
              up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
# name: (configuration, text, sizes, batches, alternations)
MODELS = {
    "small": (dict(BLOCKS, sample_size=32, block_out_channels=(32, 64, 80), layers_per_block=2, norm_num_groups=8,
                   cross_attention_dim=64, attention_head_dim=4), (16, 64), 32, (2, 16), 40),
    "medium": (dict(BLOCKS, sample_size=32, block_out_channels=(48, 96, 120), layers_per_block=2, norm_num_groups=8,
                    cross_attention_dim=64, attention_head_dim=4), (16, 64), 32, (2, 16), 30),
    "sd15": (dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8), (77, 768), 64, (2,), 5),
}


def train(model, inputs):
    """diffusers in training, answering lines."""
    import time

    import torch

    target, _ = inputs.pop("target"), inputs.pop("output", None)
    parameters = list(model.train().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)
    value = float("nan")
    for line in sys.stdin:
        if line.strip() == "step":
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(**inputs).sample, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            value = loss.item()
            print(time.perf_counter() - start, flush=True)
        else:
            print(value, flush=True)


def serve(folder, batch, threads, training):
    """diffusers, answering lines as `denoiser-step` does; first makes the model and its inputs where they are missing."""
    import time

    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(threads)
    folder = Path(folder)
    inputs_at = folder / f"inputs-{batch}.safetensors"
    model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    if not inputs_at.exists():
        _, text, size, *_ = MODELS[folder.name]
        generator = torch.Generator().manual_seed(5)
        inputs = {
            "sample": torch.randn(batch, 4, size, size, generator=generator),
            "timestep": torch.full((batch,), 501.0),
            "encoder_hidden_states": torch.randn(batch, *text, generator=generator),
        }
        with torch.inference_mode():
            made = model(**inputs).sample.contiguous()
            target = torch.randn(made.shape, generator=generator)
            save_file({**inputs, "output": made, "target": target}, inputs_at)
        return
    inputs = load_file(inputs_at)
    if training:
        return train(model, inputs)
    inputs.pop("target", None)
    output = inputs.pop("output")
    with torch.inference_mode():
        for line in sys.stdin:
            if line.strip() == "step":
                start = time.perf_counter()
                made = model(**inputs).sample
                print(time.perf_counter() - start, flush=True)
            else:
                print((made - output).abs().max().item(), flush=True)


def make(folder):
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    UNet2DConditionModel(**MODELS[Path(folder).name][0]).save_pretrained(folder, max_shard_size="5GB")


def child(*arguments, environment):
    subprocess.run([sys.executable, __file__, *map(str, arguments)], check=True, env=environment)


class Peer:
    def __init__(self, name, command, environment):
        self.name = name
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment)

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"error: {self.name} ended")
        return float(answer)

    def close(self):
        self.process.stdin.close()
        _, _, usage = os.wait4(self.process.pid, 0)
        return usage.ru_maxrss * 1024


def measure(a, name, batch, environment):
    folder = Path(a.folder) / name
    if not (folder / "config.json").exists():
        child("--make", folder, environment=environment)
    inputs = folder / f"inputs-{batch}.safetensors"
    serving = ["--serve", folder, "--batch", batch, "--threads", a.threads]
    if not inputs.exists():
        child(*serving, environment=environment)
    if a.train:
        serving.append("--train")
    ours = Peer("controlgen", [a.controlgen, folder, inputs] + (["--train"] if a.train else []), environment)
    theirs = Peer("diffusers", [sys.executable, __file__, *serving], environment)
    for peer in (ours, theirs):
        for _ in range(2 if name != "sd15" else 1):
            peer.ask("step")
    distance = abs(ours.ask("check") - (theirs.ask("check") if a.train else 0.0))
    times = {ours.name: [], theirs.name: []}
    for i in range(a.alternations or MODELS[name][4]):
        for peer in (ours, theirs) if i % 2 == 0 else (theirs, ours):
            times[peer.name].append(peer.ask("step"))
    ratios = [them / us for us, them in zip(times["controlgen"], times["diffusers"])]
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    memory = {peer.name: peer.close() for peer in (ours, theirs)}
    return dict(model=name, batch=batch, times=times, ratio=statistics.median(ratios), low=medians[100],
                high=medians[-101], memory=memory, distance=distance)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--controlgen")
    parser.add_argument("--models", default="small,medium,sd15")
    parser.add_argument("--alternations", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "controlgen-unets"))
    parser.add_argument("--json")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--batches", help="instead of each model's own: 16,32")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.make:
        return make(a.make)
    if a.serve:
        return serve(a.serve, a.batch, a.threads, a.train)
    if not a.controlgen or not Path(a.controlgen).is_file():
        raise SystemExit("error: --controlgen: no such file; build it with `cargo build --release -p benches --bin "
                         "denoiser-step`")
    threads = str(a.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    print(f"{threads} threads a peer, load before the run {os.getloadavg()[0]:.2f}; medians.\n")
    print("| UNet | batch | controlgen, ms | diffusers, ms | ratio (95 %) | peak MB | of diffusers' | distance |")
    print("|---|---|---|---|---|---|---|---|")
    kept = []
    for name in a.models.split(","):
        for batch in map(int, a.batches.split(",")) if a.batches else MODELS[name][3]:
            m = measure(a, name, batch, environment)
            kept.append(m)
            us, them = (statistics.median(m["times"][peer]) * 1e3 for peer in ("controlgen", "diffusers"))
            our, their = (m["memory"][peer] for peer in ("controlgen", "diffusers"))
            print(f"| {name} | {batch} | {us:.2f} | {them:.2f} | {m['ratio']:.2f}× ({m['low']:.2f}–{m['high']:.2f}) | "
                  f"{our / 1e6:.0f}, {their / 1e6:.0f} | {our / their:.2f} | {m['distance']:.1e} |", flush=True)
    if a.json:
        Path(a.json).write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
