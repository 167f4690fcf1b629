"""Whole images, controlgen beside diffusers eager, alternating in one run.

    python pipeline_side_by_side.py --controlgen target/release/pipeline-image [--alternations N] [--threads 2]
        [--folder DIRECTORY] [--json FILE]

prints Markdown: the time from a prompt to pixels, 25 steps of PNDM (26 calls of the denoiser) with classifier-free
guidance and a negative prompt, by a random Stable Diffusion with a UNet of 5.9 million parameters at 32 × 32 latents, a
small text encoder and a small autoencoder (64 × 64 pixels).

Both load the same files, in f32, and draw the same noise; the pixels are compared. Both stay loaded and make one image
that does not count. One runs at a time, and the order turns at each alternation. diffusers' progress bar is off. Ratio:
the median over alternations of diffusers' time over controlgen's, with an interval of 95 % by the percentile bootstrap.
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

UNET = dict(
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), sample_size=32,
    block_out_channels=(48, 96, 120), layers_per_block=2, norm_num_groups=8, cross_attention_dim=64, attention_head_dim=4,
)


def make(folder):
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from pipeline_fixtures import SD, TOKENS, tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    text = CLIPTextConfig(vocab_size=TOKENS, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                          num_attention_heads=4, bos_token_id=TOKENS - 2, eos_token_id=TOKENS - 1)
    vae = AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=64,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8)
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer("tokenizer_sd1"), unet=UNet2DConditionModel(**UNET),
        scheduler=PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)


def serve(folder, threads):
    """diffusers, answering lines as `pipeline-image` does; first leaves its pixels where there are none."""
    import time

    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(threads)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    truth = Path(folder) / "truth.safetensors"

    def image():
        return pipeline("a photo of a cat", negative_prompt="blurry", num_inference_steps=25, guidance_scale=7.5,
                        generator=torch.Generator().manual_seed(42), output_type="pt").images

    if not truth.exists():
        save_file({"pixels": image() * 2 - 1}, truth)
        return
    for line in sys.stdin:
        start = time.perf_counter()
        made = image()
        seconds = time.perf_counter() - start
        distance = (made * 2 - 1 - load_file(truth)["pixels"]).abs().max().item()
        print(seconds if line.strip() == "image" else distance, flush=True)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--controlgen")
    parser.add_argument("--alternations", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "controlgen-pipeline"))
    parser.add_argument("--json")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.make:
        return make(a.folder)
    if a.serve:
        return serve(a.folder, a.threads)
    if not a.controlgen or not Path(a.controlgen).is_file():
        raise SystemExit("error: --controlgen: no such file; build it with `cargo build --release -p benches --bin "
                         "pipeline-image`")
    from unet_side_by_side import Peer

    threads, folder = str(a.threads), Path(a.folder)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    own = [sys.executable, __file__, "--folder", a.folder, "--threads", threads]
    if not (folder / "model_index.json").exists():
        subprocess.run([*own, "--make"], check=True, env=environment)
    if not (folder / "truth.safetensors").exists():
        subprocess.run([*own, "--serve"], check=True, env=environment)
    ours = Peer("controlgen", [a.controlgen, folder, folder / "truth.safetensors"], environment)
    theirs = Peer("diffusers", [*own, "--serve"], environment)
    for peer in (ours, theirs):
        peer.ask("image")
    distance = ours.ask("check")
    times = {ours.name: [], theirs.name: []}
    print(f"{threads} threads a peer, load before the run {os.getloadavg()[0]:.2f}; medians.\n")
    for i in range(a.alternations):
        for peer in (ours, theirs) if i % 2 == 0 else (theirs, ours):
            times[peer.name].append(peer.ask("image"))
    ratios = [them / us for us, them in zip(times["controlgen"], times["diffusers"])]
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    us, them = (statistics.median(times[name]) for name in ("controlgen", "diffusers"))
    print("| image | controlgen, s | diffusers, s | ratio (95 %) | pixels apart |")
    print("|---|---|---|---|---|")
    print(f"| 25 steps, guided | {us:.3f} | {them:.3f} | {statistics.median(ratios):.2f}× "
          f"({medians[100]:.2f}–{medians[-101]:.2f}) | {distance:.1e} |")
    for peer in (ours, theirs):
        peer.close()
    if a.json:
        Path(a.json).write_text(json.dumps(dict(times=times, distance=distance)) + "\n")


if __name__ == "__main__":
    main()
