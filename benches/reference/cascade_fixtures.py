"""A random small cascade (DeepFloyd IF, stages I and II) and the images that diffusers makes with it.

    python cascade_fixtures.py

writes controlgen-diffusion/tests/fixtures/cascade/: a directory a stage, and `cases.safetensors`. See README.md.
"""

import shutil

from vision_weights import FIXTURES, randomise

import torch
from common import fail, save_cases
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel

TEXT = 12


def unet(seed: int, **changes) -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), out_channels=6, cross_attention_dim=32,
        encoder_hid_dim=TEXT, addition_embed_type="text", addition_embed_type_num_heads=2, cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift", act_fn="gelu", **changes,
    ).eval()
    randomise(model, seed)
    return model


def scheduler(**changes) -> DDPMScheduler:
    base = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    return DDPMScheduler(**{**base, **changes})


@torch.no_grad()
def main():
    folder = FIXTURES / "cascade"
    shutil.rmtree(folder, ignore_errors=True)
    # As IF's files say.
    learned = dict(thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.5, variance_type="learned_range")
    none = dict(tokenizer=None, text_encoder=None, safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False)
    first = IFPipeline(unet=unet(51, sample_size=8, in_channels=3), scheduler=scheduler(**learned), **none)
    second = IFSuperResolutionPipeline(
        unet=unet(52, sample_size=16, in_channels=6, class_embed_type="timestep", mid_block_scale_factor=1.414), scheduler=scheduler(**learned),
        image_noising_scheduler=scheduler(), **none,
    )
    for name, pipe in dict(first=first, second=second).items():
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.bfloat16()
        pipe.save_pretrained(folder / name)
        pipe.unet.float()
    generator = torch.Generator().manual_seed(71)
    embeds, negative = torch.randn(2, 2, 5, TEXT, generator=generator)
    given = dict(prompt_embeds=embeds, negative_prompt_embeds=negative, output_type="pt")
    generator = torch.Generator().manual_seed(37)
    small = first(**given, generator=generator, num_inference_steps=6, guidance_scale=7.0).images
    large = second(image=small, **given, generator=generator, num_inference_steps=5, guidance_scale=4.0, noise_level=250).images
    if not 0.1 < large.std() < 3 or not 0.1 < small.std() < 3:
        fail(f"images of nothing: {small.std()}, {large.std()}")
    save_cases(folder / "cases.safetensors", dict(embeds=embeds, negative=negative, small=small, large=large), "IF by diffusers")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    print("cascade", sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), "bytes", small.std(), large.std())


if __name__ == "__main__":
    main()
