"""A random small cascade (DeepFloyd IF, stages I and II) and the images that diffusers makes with it.

    python cascade_fixtures.py [images | prompts]

writes controlgen-diffusion/tests/fixtures/cascade/: a directory a stage, `cases.safetensors`, and in `t5` a random small
T5, its tokenizer and prompts as IF encodes them. See README.md.
"""

import shutil
import sys

from vision_weights import FIXTURES, randomise

import torch
from common import fail, save_cases
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel

TEXT = 12


def unet(seed: int, **changes) -> UNet2DConditionModel:
    model = UNet2DConditionModel(
        layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=4,
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
def images():
    folder = FIXTURES / "cascade"
    for name in ("first", "second"):
        shutil.rmtree(folder / name, ignore_errors=True)
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


PROMPTS = ["A Photo of a Cat ", "", "a castle on the hill " * 40]


@torch.no_grad()
def prompts():
    """Prompts as IF's pipeline encodes them, by a T5 of a few pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = FIXTURES / "cascade" / "t5"
    shutil.rmtree(folder, ignore_errors=True)
    pieces = ["▁a", "▁photo", "▁of", "▁c", "at", "▁castle", "▁on", "▁the", "▁hill", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0 - 0.1 * i) for i, piece in enumerate(pieces))]
    raw = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    config = T5Config(
        vocab_size=len(vocab), d_model=TEXT, d_kv=4, d_ff=16, num_layers=2, num_heads=3, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
    )
    model = T5EncoderModel(config).eval()
    randomise(model, 61)
    model.bfloat16().save_pretrained(folder / "text_encoder")
    model.float()
    none = dict(unet=None, scheduler=None, safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False)
    pipe = IFPipeline(tokenizer=tokenizer, text_encoder=model, **none)
    embeds, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    ids = tokenizer([p.lower().strip() for p in PROMPTS], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    save_cases(folder / "cases.safetensors", dict(embeds=embeds[:, ::4].float(), ids=ids), "prompts by IFPipeline of diffusers")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    print("t5", sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), "bytes", ids[0, :8].tolist(), ids[1, :3].tolist(), ids[2, -3:].tolist())


PARTS = dict(images=images, prompts=prompts)

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        if part not in PARTS:
            fail(f"unknown part {part}; known: {', '.join(PARTS)}")
        PARTS[part]()
