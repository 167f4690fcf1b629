"""Random small UNets of diffusers, and what they predict.

    python unet_fixtures.py [NAME ...]

writes controlgen-diffusion/tests/fixtures/NAME/{config.json, diffusion_pytorch_model.safetensors, cases.safetensors};
and, by the name of lora_unet, controlgen-peft/tests/fixtures/lora_unet, an adapter that peft wrote for one of them and
what is predicted under it. See README.md beside this file.

The script refuses to write a fixture in which the model computed in f32 is further than AGREE from the same in f64, or
in which an input makes no difference of SENSITIVE.
"""

import shutil
import sys

from common import ROOT, fail, save_cases

import diffusers
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

AGREE, SENSITIVE = 2e-5, 1e-3
FIXTURES = ROOT / "controlgen-diffusion" / "tests" / "fixtures"

# What configurations have in common: tiny, four groups.
# Also for samples of 7 by 11.
ODD = ("unet_sd1", "unet_sdxl")
SMALL = dict(sample_size=8, norm_num_groups=4, layers_per_block=1)
TEXT = dict(encoder_hidden_states=(5, 32))

# name: (class, configuration, inputs beside `sample` and `timestep` as shapes of a row, or as numbers in a list)
MODELS = {
    "unet_ddpm": (UNet2DModel, dict(
        SMALL, block_out_channels=(8, 12), flip_sin_to_cos=False, freq_shift=1, downsample_padding=0,
        attention_head_dim=None, norm_eps=1e-6, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ), {}),
    "unet_adm": (UNet2DModel, dict(
        SMALL, block_out_channels=(8, 12), out_channels=6, attention_head_dim=4, num_class_embeds=7,
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
        attn_norm_num_groups=4, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ), dict(class_labels=[3, 6])),
    # Attention before the last level, so that its way down and up end in residual blocks.
    "unet_adm_resize": (UNet2DModel, dict(
        SMALL, block_out_channels=(8, 12), attention_head_dim=4, class_embed_type="timestep",
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
        mid_block_scale_factor=1.3, center_input_sample=True, down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    ), dict(class_labels=[3.5, 60.0])),
    "unet_karlo_sr": (UNet2DModel, dict(
        SMALL, in_channels=6, block_out_channels=(8, 12), resnet_time_scale_shift="scale_shift", add_attention=False,
        down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
    ), {}),
    "unet_sd1": (UNet2DConditionModel, dict(
        SMALL, block_out_channels=(8, 12), cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ), TEXT),
    "unet_sd2": (UNet2DConditionModel, dict(
        SMALL, block_out_channels=(8, 12), cross_attention_dim=32, attention_head_dim=[2, 4],
        use_linear_projection=True, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ), TEXT),
    # Stable Diffusion's upscaler: a level of noise by a table, the image beside the sample, text in both attentions.
    "unet_sd_upscaler": (UNet2DConditionModel, dict(
        SMALL, in_channels=7, block_out_channels=(8, 12), cross_attention_dim=32, attention_head_dim=4,
        num_class_embeds=50, only_cross_attention=[True, False], use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ), dict(TEXT, class_labels=[20, 49])),
    "unet_sdxl": (UNet2DConditionModel, dict(
        SMALL, block_out_channels=(8, 12), cross_attention_dim=32, attention_head_dim=[2, 4],
        transformer_layers_per_block=[1, 2], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=30,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ), dict(TEXT, text_embeds=(6,), time_ids=[[64, 48, 0, 3, 64, 32], [8, 96, 5, 0, 16, 48]])),
    "unet_if1": (UNet2DConditionModel, dict(
        SMALL, in_channels=3, out_channels=6, block_out_channels=(8, 12), cross_attention_dim=32, attention_head_dim=4,
        act_fn="gelu", encoder_hid_dim=24, addition_embed_type="text", addition_embed_type_num_heads=4,
        cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift", time_embedding_act_fn="gelu",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ), dict(encoder_hidden_states=(5, 24))),
    "unet_if2": (UNet2DConditionModel, dict(
        SMALL, in_channels=6, out_channels=6, block_out_channels=(8, 12), cross_attention_dim=32, attention_head_dim=6,
        act_fn="gelu", encoder_hid_dim=24, encoder_hid_dim_type="text_proj", addition_embed_type="text",
        addition_embed_type_num_heads=4, cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
        time_embedding_act_fn="gelu", resnet_skip_time_act=True, resnet_out_scale_factor=1.41421356,
        class_embed_type="timestep", mid_block_type="UNetMidBlock2DSimpleCrossAttn", only_cross_attention=True,
        mid_block_scale_factor=1.41421356,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ), dict(encoder_hidden_states=(5, 24), class_labels=[250.0, 40.0])),
    "unet_karlo_decoder": (UNet2DConditionModel, dict(
        SMALL, in_channels=3, out_channels=6, block_out_channels=(8, 12), cross_attention_dim=24, attention_head_dim=4,
        class_embed_type="identity", resnet_time_scale_shift="scale_shift",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ), dict(encoder_hidden_states=(6, 24), attention_mask=[[1, 1, 1, 1, 0, 0], [1] * 6], class_labels=(32,))),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Overwrites every parameter from one seed: weights normal with deviation 1 / sqrt(inputs), tables 0.5, gains of
    norms 1 + 0.2 n, biases 0.2 n; so that activations stay near one, and every parameter matters. Rounded to bf16, which
    the files hold."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in tables or name.endswith("positional_embedding"):
                value = 0.5 * noise
            elif parameter.ndim > 1:
                value = noise * parameter[0].numel() ** -0.5
            elif name.endswith("bias"):
                value = 0.2 * noise
            else:
                value = 1.0 + 0.2 * noise
            parameter.copy_(value.bfloat16().float())


def predict(model, inputs):
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    rest = {name: value for name, value in inputs.items() if name not in added}
    if isinstance(model, UNet2DConditionModel):
        rest["added_cond_kwargs"] = added
    with torch.no_grad():
        return model(**rest).sample


def inputs_of(model, wanted, generator):
    config = model.config
    inputs = {
        "sample": torch.randn(2, config.in_channels, 8, 12, generator=generator),
        "timestep": torch.tensor([7.0, 803.0]),
    }
    for name, value in wanted.items():
        if isinstance(value, tuple):
            inputs[name] = torch.randn(2, *value, generator=generator)
        else:
            inputs[name] = torch.tensor(value)
    return inputs


def as_double(inputs):
    return {k: v.double() if v.is_floating_point() and k != "timestep" else v for k, v in inputs.items()}


def make(name: str) -> None:
    made, config, wanted = MODELS[name]
    model = made(**config).eval()
    seed = 7000 + list(MODELS).index(name)
    randomise(model, seed)
    inputs = inputs_of(model, wanted, torch.Generator().manual_seed(seed + 100))
    output = predict(model, inputs)
    model.double()
    # diffusers gives the sinusoid of a level in f32 to layers in f64.
    hook = model.time_proj.register_forward_hook(lambda module, args, made: made.to(model.dtype))
    distance = (predict(model, as_double(inputs)).float() - output).abs().max().item()
    hook.remove()
    model.float()
    scale = output.abs().max().item()
    if distance > AGREE or not 0.3 < scale < 10:
        fail(f"{name}: f32 is {distance} from f64, the greatest output {scale}")
    for key, value in inputs.items():
        other = dict(inputs)
        other[key] = value.flip(0) if key != "attention_mask" else torch.ones_like(value)
        moved = (predict(model, other) - output).abs().max().item()
        if moved < SENSITIVE:
            fail(f"{name}: `{key}` moves the output by {moved} only")
    folder = FIXTURES / name
    if folder.exists():
        shutil.rmtree(folder)
    odd = None
    if name in ODD:
        # Sizes that are halved upwards, and enlarged to what is put beside them.
        odd = {**inputs, "sample": inputs["sample"][:, :, :7, :11].contiguous()}
        odd = {"sample": odd["sample"], "output": predict(model, odd)}
    model.bfloat16().save_pretrained(folder)
    if odd:
        save_cases(folder / "odd.safetensors", odd, f"diffusers {diffusers.__version__}")
    save_cases(folder / "cases.safetensors", {**inputs, "output": output}, f"diffusers {diffusers.__version__}")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, {size >> 10} kB, f64 − f32 {distance:.1e}")


def make_lora(name: str) -> None:
    base = FIXTURES / "unet_sd1"
    model = UNet2DConditionModel.from_pretrained(base, torch_dtype=torch.float32)
    cases = load_file(base / "cases.safetensors")
    output = cases.pop("output")
    adapted = get_peft_model(model, LoraConfig(
        r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    ))
    generator = torch.Generator().manual_seed(7900)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        found = adapted(**cases).sample
    if (found - output).abs().max() < 0.1:
        fail(f"{name}: the adapter makes no difference")
    folder = ROOT / "controlgen-peft" / "tests" / "fixtures" / name
    if folder.exists():
        shutil.rmtree(folder)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    save_cases(folder / "cases.safetensors", {"output": found}, f"unet_sd1; diffusers {diffusers.__version__}")


MAKERS = {**{name: make for name in MODELS}, "lora_unet": make_lora}
for chosen in sys.argv[1:] or MAKERS:
    if chosen not in MAKERS:
        fail(f"{chosen}: expected one of {', '.join(MAKERS)}")
    MAKERS[chosen](chosen)
