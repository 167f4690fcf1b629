"""Random small models of unCLIP (Karlo), and what diffusers computes of them and of the whole pipeline.

    python unclip_fixtures.py [models | pipeline]

writes controlgen-diffusion/tests/fixtures/{prior*, unclip_text_proj, unclip}/. See README.md.
"""

import copy
import json
import shutil
import sys

from vision_weights import FIXTURES, check, randomise, sensitive, write

import torch
from common import fail, save_cases
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel, UnCLIPScheduler
from diffusers.pipelines.deprecated.unclip import UnCLIPPipeline, UnCLIPTextProjModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

PRIORS = {
    # Karlo's form.
    "prior": dict(num_attention_heads=2, attention_head_dim=6, num_layers=2, embedding_dim=10, num_embeddings=7, additional_embeddings=4),
    "prior_norms": dict(num_attention_heads=3, attention_head_dim=4, num_layers=1, embedding_dim=10, num_embeddings=5,
                        additional_embeddings=3, added_emb_type=None, norm_in_type="layer", embedding_proj_norm_type="layer",
                        embedding_proj_dim=8, time_embed_act_fn="gelu"),
}


@torch.no_grad()
def prior(name):
    fields = PRIORS[name]
    model = PriorTransformer(**fields).eval()
    randomise(model, 81 + list(PRIORS).index(name), gain=1.2)
    generator = torch.Generator().manual_seed(901)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    n, p = fields["num_embeddings"], fields["embedding_dim"]
    given = dict(
        hidden_states=normal(3, p), timestep=torch.tensor([999, 13, 500]),
        proj_embedding=normal(3, fields.get("embedding_proj_dim", p)), encoder_hidden_states=normal(3, n, p),
    )
    mask = torch.arange(n)[None] < torch.tensor([n, 2, 4])[:, None]
    cases = {}
    for case, masks in {"masked": dict(attention_mask=mask), "plain": {}}.items():
        def run(m):
            kind = next(m.parameters()).dtype
            cast = {k: v.to(kind) if v.is_floating_point() else v for k, v in given.items()}
            return m(**cast, **masks).predicted_image_embedding.reshape(3, p)
        y = run(model)
        check(f"{name}.{case}", run(copy.deepcopy(model).double()).float(), y)
        if case == "masked":
            moved = (run(model) - model(**given).predicted_image_embedding.reshape(3, p)).abs().max()
            if moved < 1e-2:
                fail(f"{name}: the mask does not show")
            clip = {id(model.clip_mean), id(model.clip_std)}
            others = copy.deepcopy(model)
            # What is applied after the run is tried by itself.
            del clip
            named = dict(others.named_parameters())
            for parameter in ("clip_mean", "clip_std"):
                named[parameter].requires_grad_(False)
            sensitive(name, Without(others, ("clip_mean", "clip_std")), lambda m: run(m.model), y)
        cases |= {f"{case}.{k}": v for k, v in (given | masks | dict(predicted_image_embedding=y)).items()}
    cases["post_processed"] = model.post_process_latents(given["hidden_states"])
    write(model, FIXTURES / name, cases)


class Without:
    """A model without some of its parameters, for `sensitive`."""

    def __init__(self, model, names):
        self.model, self.names = model, names

    def named_parameters(self):
        return [(k, v) for k, v in self.model.named_parameters() if k not in self.names]


@torch.no_grad()
def text_proj():
    model = UnCLIPTextProjModel(clip_extra_context_tokens=3, clip_embeddings_dim=10, time_embed_dim=14, cross_attention_dim=8).eval()
    randomise(model, 91)
    generator = torch.Generator().manual_seed(911)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    image, text, states = normal(2, 10), normal(4, 10), normal(4, 5, 10)
    hidden, labels = model(image_embeddings=image, prompt_embeds=text, text_encoder_hidden_states=states, do_classifier_free_guidance=True)
    cases = dict(image_embeddings=image, prompt_embeds=text, text_encoder_hidden_states=states, hidden=hidden, labels=labels)
    write(model, FIXTURES / "unclip_text_proj", cases)


def models():
    for name in PRIORS:
        prior(name)
    text_proj()


def components() -> dict:
    d = 12
    text = CLIPTextConfig(
        vocab_size=734, hidden_size=d, intermediate_size=16, projection_dim=d, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, eos_token_id=733, bos_token_id=732,
    )
    unet = dict(layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=4, resnet_time_scale_shift="scale_shift")
    decoder = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, cross_attention_dim=10, class_embed_type="identity",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), **unet,
    )
    upscaler = lambda: UNet2DModel(
        sample_size=16, in_channels=6, out_channels=3, add_attention=False,
        down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2, **unet,
    )
    made = dict(
        prior=PriorTransformer(num_attention_heads=2, attention_head_dim=6, num_layers=2, embedding_dim=d),
        decoder=decoder,
        text_encoder=CLIPTextModelWithProjection(text),
        text_proj=UnCLIPTextProjModel(clip_embeddings_dim=d, time_embed_dim=16, cross_attention_dim=10),
        super_res_first=upscaler(),
        super_res_last=upscaler(),
    )
    for i, model in enumerate(made.values()):
        randomise(model.eval(), 700 + i, gain=1.0)
    # As Karlo's files say.
    steps = dict(clip_sample=True, num_train_timesteps=1000)
    return made | dict(
        tokenizer=CLIPTokenizer.from_pretrained(FIXTURES / "clip" / "tokenizer_sd1"),
        prior_scheduler=UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0, variance_type="fixed_small_log", **steps),
        decoder_scheduler=UnCLIPScheduler(prediction_type="epsilon", clip_sample_range=1.0, variance_type="learned_range", **steps),
        super_res_scheduler=UnCLIPScheduler(prediction_type="epsilon", clip_sample_range=1.0, variance_type="fixed_small_log", **steps),
    )


@torch.no_grad()
def pipeline():
    pipe = UnCLIPPipeline(**components())
    pipe.set_progress_bar_config(disable=True)
    networks = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    folder = FIXTURES / "unclip"
    shutil.rmtree(folder, ignore_errors=True)
    for model in networks:
        model.bfloat16()
    pipe.save_pretrained(folder)
    for model in networks:
        model.float()
    cases = {}
    for prefix in ["", "exact."]:
        if prefix:
            # diffusers' tables are f32, in which 1 - alphas_cumprod[0] is off by a thousandth, and with it the last step.
            for name in ("prior", "decoder", "super_res"):
                exact(getattr(pipe, f"{name}_scheduler"))
        found = images(pipe)
        image = found["images"]
        clamped = ((image - 0.5).abs() > 0.49).float().mean()
        if image.std() < 0.02 or clamped > 0.7:
            fail(f"images of nothing: {image.std()}, {clamped}")
        cases |= {prefix + k: v for k, v in found.items()}
    save_cases(folder / "cases.safetensors", cases, "UnCLIPPipeline by diffusers")
    off = {k: (cases[k] - cases["exact." + k]).abs().max().item() for k in cases if not k.startswith("exact.")}
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    print("unclip", sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()), "bytes; by f32 tables off by", off)


def exact(scheduler: UnCLIPScheduler) -> None:
    """The same tables in f64."""
    u = (torch.arange(scheduler.config.num_train_timesteps + 1, dtype=torch.float64) / scheduler.config.num_train_timesteps + 0.008) / 1.008
    f = torch.cos(u * torch.pi / 2) ** 2
    betas = torch.clamp(1 - f[1:] / f[:-1], max=0.999)
    if (betas - scheduler.betas).abs().max() > 1e-6:
        fail("betas in f64 are not those of diffusers")
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod, scheduler.one = torch.cumprod(1 - betas, 0), torch.tensor(1.0, dtype=torch.float64)


@torch.no_grad()
def images(pipe) -> dict:
    caught, process = {}, type(pipe.prior).post_process_latents
    pipe.prior.post_process_latents = lambda x: caught.setdefault("image_embeddings", process(pipe.prior, x))
    image = pipe(
        ["a painting of a cat", "a castle on the hill at sunset"], num_images_per_prompt=2, prior_num_inference_steps=5,
        decoder_num_inference_steps=4, super_res_num_inference_steps=3, generator=torch.Generator().manual_seed(33),
        output_type="np",
    ).images
    return dict(images=torch.from_numpy(image).permute(0, 3, 1, 2), **caught)


PARTS = dict(models=models, pipeline=pipeline)

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
