"""Random small pipelines of diffusers, and the images that they make.

    python pipeline_fixtures.py [NAME ...]

writes controlgen-diffusion/tests/fixtures/pipelines/NAME/: a directory as `save_pretrained` writes it, weights in bf16,
with `cases.safetensors` and `cases.json`. What all of them share lies in `stable_diffusion` alone. See README.md beside
this file.

Everything runs in f32 from `torch.Generator().manual_seed(seed)`. A case is refused if nothing of its request matters
(the same images as another), or if it is no number.
"""

import json
import shutil
import sys

from common import ROOT, fail, save_cases, write_json
from vision_weights import randomise

import diffusers
import torch
from diffusers import (
    AutoencoderKL, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, DiTTransformer2DModel,
    DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, PNDMScheduler,
    StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel, UNet2DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

FIXTURES = ROOT / "controlgen-diffusion" / "tests" / "fixtures"
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
diffusers.utils.logging.disable_progress_bar()


def wave(*shape: int, speed: float) -> torch.Tensor:
    """Numbers in 0 .. 1 that need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (torch.sin(n * speed) * 0.5 + 0.5).reshape(shape).float()


def made(model, seed: int, gain: float = 1.0):
    randomise(model, seed, gain)
    return model.eval()


def vae(seed: int) -> AutoencoderKL:
    return made(AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, layers_per_block=1, scaling_factor=0.7,
    ), seed)


def text(seed: int, projection: bool):
    config = CLIPTextConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=12, hidden_act="gelu" if projection else "quick_gelu",
        bos_token_id=TOKENS - 2, eos_token_id=TOKENS - 1,
    )
    return made((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def unet(seed: int, **fields) -> UNet2DConditionModel:
    config = dict(
        sample_size=8, norm_num_groups=4, layers_per_block=1, block_out_channels=(8, 12), cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return made(UNet2DConditionModel(**{**config, **fields}), seed)


def tokenizer(name: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(FIXTURES / "clip" / name)


TOKENS = len(tokenizer("tokenizer_sd1"))
VAE, TEXT = vae(501), text(502, False)
# What these and stable_diffusion have in common is stored there alone.
SHARED = ("vae", "text_encoder", "tokenizer")
PNDM = PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
EULER = EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
SCHEDULERS = {
    "pndm": PNDM,
    "ddim": DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "v": DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction",
                       timestep_spacing="trailing", rescale_betas_zero_snr=True),
    "euler": EULER,
    "ancestral": EulerAncestralDiscreteScheduler(**SD),
    "dpm": DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing"),
    "unipc": UniPCMultistepScheduler(**SD),
    "ddpm": DDPMScheduler(),
    "clipped": DDIMScheduler(),
}


def stable_diffusion():
    return StableDiffusionPipeline(
        vae=VAE, text_encoder=TEXT, tokenizer=tokenizer("tokenizer_sd1"),
        unet=unet(503), scheduler=PNDM, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def inpainting():
    return StableDiffusionInpaintPipeline(**{
        **stable_diffusion().components, "unet": unet(511, in_channels=9), "scheduler": SCHEDULERS["ddim"],
    }, requires_safety_checker=False)


def xl():
    return StableDiffusionXLPipeline(
        vae=VAE, text_encoder=TEXT, text_encoder_2=text(523, True),
        tokenizer=tokenizer("tokenizer_sd1"), tokenizer_2=tokenizer("tokenizer_sd2"), scheduler=EULER,
        unet=unet(524, cross_attention_dim=32, attention_head_dim=[2, 4], transformer_layers_per_block=[1, 2],
                  use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
                  projection_class_embeddings_input_dim=4 * 6 + 12,
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                  up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )


def ddpm():
    return DDPMPipeline(unet=made(UNet2DModel(
        sample_size=8, norm_num_groups=4, layers_per_block=1, block_out_channels=(8, 12), attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ), 531), scheduler=SCHEDULERS["ddpm"])


def dit():
    return DiTPipeline(
        transformer=made(DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        ), 541, 0.7),
        vae=VAE, scheduler=SCHEDULERS["dpm"],
    )


IMAGE, MASK = wave(1, 3, 16, 24, speed=0.37), torch.zeros(1, 1, 16, 24)
MASK[:, :, 3:11, 5:19] = 1.0
LONG = "a photo of a cat " * 30
# name -> (pipeline, cases): a case is (what it is run by, scheduler or None for the directory's own, request)
PIPELINES = {
    "stable_diffusion": (stable_diffusion, {
        "plain": ("text", None, dict(prompt="a photo of a cat", steps=6, scale=7.5, seed=42)),
        "batch": ("text", "ddim", dict(prompt=["a photo of a cat", "a castle on the hill"], images=2, eta=0.6,
                                       negative=["blurry", ""], steps=5, scale=4.0, seed=7, size=[16, 24])),
        "list": ("text", "ancestral", dict(prompt=["a red chair", "mountains"], seeds=[3, 9], steps=5, scale=5.0,
                                           negative="ugly")),
        "unguided": ("text", "dpm", dict(prompt=LONG, steps=6, scale=1.0, seed=1)),
        "v": ("text", "v", dict(prompt="", steps=5, scale=3.0, seed=5)),
        "unipc": ("text", "unipc", dict(prompt="sunset", steps=6, scale=7.5, seed=2)),
        # Not PNDM: diffusers begins in the middle of its list, in which one timestep stands twice, and takes the second
        # step for the repetition of the first.
        "from_image": ("image", "dpm", dict(prompt="a painting", strength=0.7, steps=8, scale=6.0, seed=11)),
        "from_image_list": ("image", "ancestral", dict(prompt=["a painting", "a dog"], strength=0.5, steps=8, scale=6.0,
                                                       seeds=[5, 6])),
        "inpaint": ("inpaint", "ddim", dict(prompt="a dog", strength=1.0, steps=5, scale=6.0, seed=12, eta=0.5)),
        "inpaint_part": ("inpaint", "euler", dict(prompt=["a dog", "a cat"], strength=0.6, steps=7, scale=6.0, seed=13)),
    }),
    "inpainting": (inpainting, {
        "inpaint": ("inpaint", None, dict(prompt="a dog", strength=1.0, steps=5, scale=6.0, seed=14, eta=0.4)),
        "inpaint_part": ("inpaint", "euler", dict(prompt=["a dog", "a cat"], strength=0.6, steps=7, scale=6.0, seed=15)),
    }),
    "xl": (xl, {
        "plain": ("text", None, dict(prompt="a photo of a cat", steps=6, scale=5.0, seed=42)),
        "negative": ("text", "ddim", dict(prompt=["a castle", "flowers"], negative="low quality", steps=5, scale=5.0, seed=8,
                                          size=[24, 16], original_size=[64, 48], crop=[3, 5])),
        "from_image": ("image", "ddim", dict(prompt="a painting", negative="blurry", strength=0.6, steps=8, scale=6.0,
                                             seed=11)),
    }),
    "ddpm": (ddpm, {
        "plain": ("none", None, dict(images=2, steps=10, seed=42)),
        "clipped": ("none", "clipped", dict(images=2, steps=10, seed=4)),
    }),
    "dit": (dit, {
        "plain": ("class", None, dict(classes=[3, 7], steps=6, scale=4.0, seed=42)),
        "unguided": ("class", "clipped", dict(classes=[999], steps=6, scale=1.0, seed=4)),
    }),
}


@torch.no_grad()
def run(pipeline, how: str, request: dict, pixels: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(request["seed"]) if "seed" in request else \
        [torch.Generator().manual_seed(seed) for seed in request["seeds"]]
    common = dict(generator=generator, num_inference_steps=request["steps"], output_type="pt")
    if how == "none":
        return pipeline(batch_size=request["images"], **common).images
    if how == "class":
        # There is no way out of this pipeline before the decoder.
        caught = {}
        decode = pipeline.vae.decode
        pipeline.vae.decode = lambda z, *a, **k: caught.update(z=z) or decode(z, *a, **k)
        images = pipeline(class_labels=request["classes"], guidance_scale=request["scale"], **common).images
        pipeline.vae.decode = decode
        return images if pixels else caught["z"] * pipeline.vae.config.scaling_factor
    more = dict(prompt=request["prompt"], guidance_scale=request["scale"], num_images_per_prompt=request.get("images", 1))
    if "negative" in request:
        negative = request["negative"]
        many = isinstance(request["prompt"], list) and isinstance(negative, str)
        more["negative_prompt"] = [negative] * len(request["prompt"]) if many else negative
    if "eta" in request:
        more["eta"] = request["eta"]
    if "original_size" in request:
        more.update(original_size=tuple(request["original_size"]), crops_coords_top_left=tuple(request["crop"]))
    if how == "text":
        height, width = request.get("size", [16, 16])
        more.update(height=height, width=width)
    else:
        more.update(image=IMAGE, strength=request["strength"])
    if how == "inpaint":
        more.update(mask_image=MASK, height=16, width=24)
    return pipeline(**more, **{**common, "output_type": "pt" if pixels else "latent"}).images


RUN_BY = {"image": {"StableDiffusionPipeline": StableDiffusionImg2ImgPipeline,
                    "StableDiffusionXLPipeline": StableDiffusionXLImg2ImgPipeline},
          "inpaint": {"StableDiffusionPipeline": StableDiffusionInpaintPipeline}}


def make(name: str) -> None:
    build, cases = PIPELINES[name]
    folder = FIXTURES / "pipelines" / name
    shutil.rmtree(folder, ignore_errors=True)
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    if name == "dit":  # which save_pretrained leaves out, and DiT-XL-2-256 has
        index = json.loads((folder / "model_index.json").read_text())
        write_json(folder / "model_index.json", {**index, "id2label": {"3": "tench, Tinca tinca", "7": "cock"}})
    tensors, seen = {}, []
    for case, (how, scheduler, request) in cases.items():
        kind = RUN_BY.get(how, {}).get(type(pipeline).__name__)
        runner = pipeline
        if kind is not None:
            extra = {} if "XL" in kind.__name__ else dict(requires_safety_checker=False)
            runner = kind(**pipeline.components, **extra)
            runner.set_progress_bar_config(disable=True)
        own = runner.scheduler
        if scheduler is not None:
            runner.scheduler = SCHEDULERS[scheduler]
            own_file = folder / "scheduler" / f"{scheduler}.json"
            own_file.write_text(SCHEDULERS[scheduler].to_json_string())
        latents, images = (run(runner, how, request, pixels) for pixels in (False, True))
        runner.scheduler = own
        if not (latents.isfinite().all() and images.isfinite().all()):
            fail(f"{name}.{case}: no numbers")
        if any(latents.shape == other.shape and (latents - other).abs().max() < 1e-2 for other in seen):
            fail(f"{name}.{case}: as another case")
        seen.append(latents)
        print(f"{name}.{case}: latents {tuple(latents.shape)} of deviation {latents.std():.2f}, "
              f"pixels of mean {images.mean():.2f} and deviation {images.std():.2f}")
        if how != "none":
            tensors[f"{case}.latents"] = latents
        if case in ("plain", "inpaint", "clipped"):
            tensors[f"{case}.pixels"] = images * 2 - 1
    if any(how in ("image", "inpaint") for how, _, _ in cases.values()):
        tensors.update(image=IMAGE * 2 - 1, mask=MASK)
    save_cases(folder / "cases.safetensors", tensors, f"diffusers {diffusers.__version__}, float32")
    listed = {case: dict(how=how, scheduler=scheduler, **request) for case, (how, scheduler, request) in cases.items()}
    write_json(folder / "cases.json", listed)
    for file in folder.rglob("*.safetensors"):
        if file.name != "cases.safetensors":
            weights = {k: v.bfloat16().contiguous() for k, v in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})
    if name != "stable_diffusion":
        for component in SHARED:
            shutil.rmtree(folder / component, ignore_errors=True)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


if __name__ == "__main__":
    for name in sys.argv[1:] or PIPELINES:
        if name not in PIPELINES:
            fail(f"unknown pipeline {name}: one of {', '.join(PIPELINES)}")
        make(name)
