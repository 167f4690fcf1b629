"""Random small autoencoders, and what diffusers encodes and decodes with them, whole and in tiles.

    python vae_fixtures.py [NAME ...]
    python vae_fixtures.py sd1 DIRECTORY

writes controlgen-diffusion/tests/fixtures/NAME/, or a random autoencoder of Stable Diffusion 1's size for `vae-tiles`. See
README.md.
"""

import copy
import sys

from vision_weights import FIXTURES, check, randomise, sensitive, write

import torch
from diffusers import AutoencoderKL

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(name):
    for new, old in OLD.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


# What the first directories did not say.
RECENT = ["force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "shift_factor",
          "latents_mean", "latents_std", "scaling_factor"]
# name -> (seed, configuration, names of weights, fields of config.json)
MODELS = {
    "vae": (81, dict(down_block_types=[DOWN] * 3, up_block_types=[UP] * 3, block_out_channels=[4, 4, 8],
                     layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=32), old_names,
            lambda config: {k: v for k, v in config.items() if k not in RECENT}),
    "vae_flux": (82, dict(down_block_types=[DOWN, "AttnDownEncoderBlock2D"], up_block_types=["AttnUpDecoderBlock2D", UP],
                          block_out_channels=[4, 8], layers_per_block=2, norm_num_groups=2, latent_channels=3,
                          act_fn="relu", use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
                          scaling_factor=0.3611, shift_factor=0.1159, sample_size=32), lambda name: name,
                 lambda config: config),
}
# Tile and overlap in latents, for latents of a shape: whole tiles, a short last one, one that lies inside another.
TILES = {"tiled": (4, 1, 8, 6), "odd": (4, 2, 8, 5), "apart": (3, 0, 6, 7)}


def tiled(model, tile, overlap):
    made = copy.deepcopy(model)
    made.enable_tiling()
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    made.tile_latent_min_size, made.tile_sample_min_size = tile, tile * factor
    made.tile_overlap_factor = overlap / tile
    return made


@torch.no_grad()
def make(name):
    seed, fields, rename, config = MODELS[name]
    torch.manual_seed(seed)
    model = AutoencoderKL(**fields).eval()
    randomise(model, seed, gain=1.1)
    generator = torch.Generator().manual_seed(seed + 1000)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    factor, channels = 2 ** (len(fields["block_out_channels"]) - 1), fields["latent_channels"]
    decode = lambda m, z: m.decode(z).sample
    encode = lambda m, x: m.encode(x).latent_dist
    latents, images = normal(2, channels, 5, 7), normal(2, 3, 6 * factor, 4 * factor).clamp(-1, 1)
    sample, posterior = decode(model, latents), encode(model, images)
    exact = copy.deepcopy(model).double()
    check(f"{name} decodes", decode(exact, latents.double()).float(), sample)
    check(f"{name} encodes", encode(exact, images.double()).mean.float(), posterior.mean)
    both = lambda m: torch.cat([decode(m, latents).flatten(), encode(m, images).parameters.flatten()])
    sensitive(name, model, both, both(model))
    cases = {"latents": latents, "sample": sample, "images": images, "latent_mean": posterior.mean,
             "latent_logvar": posterior.logvar}
    for case, (tile, overlap, h, w) in TILES.items():
        cut = tiled(model, tile, overlap)
        z, x = normal(1, channels, h, w), normal(1, 3, h * factor, w * factor).clamp(-1, 1)
        made = decode(cut, z)
        if (made - decode(model, z)).abs().max() < 1e-2:
            raise AssertionError(f"{name}.{case}: tiles make no difference")
        cases |= {f"{case}.sizes": torch.tensor([tile, overlap]), f"{case}.latents": z, f"{case}.sample": made,
                  f"{case}.images": x, f"{case}.latent_mean": encode(cut, x).mean}
    write(model, FIXTURES / name, cases, rename, config)
    print(name, sum(f.stat().st_size for f in (FIXTURES / name).iterdir()), "bytes; deviations",
          sample.std().item(), posterior.mean.std().item())


def sd1(directory):
    model = AutoencoderKL(down_block_types=[DOWN] * 4, up_block_types=[UP] * 4, block_out_channels=[128, 256, 512, 512],
                          layers_per_block=2, norm_num_groups=32, latent_channels=4, sample_size=512)
    randomise(model, 83)
    model.save_pretrained(directory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["sd1"]:
        sd1(sys.argv[2])
        raise SystemExit
    for name in sys.argv[1:] or MODELS:
        make(name)
