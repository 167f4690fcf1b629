"""Random small diffusion transformers, and what diffusers computes of them.

    python dit_fixtures.py [NAME ...]

writes controlgen-diffusion/tests/fixtures/NAME/. See README.md.
"""

import copy
import sys

from vision_weights import FIXTURES, check, randomise, sensitive, write

import torch
from diffusers import DiTTransformer2DModel, Transformer2DModel

COMMON = dict(norm_type="ada_norm_zero")
# name -> (class in config.json, seed, configuration)
MODELS = {
    "dit": (DiTTransformer2DModel, 71, dict(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6,
                                            num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=5)),
    # As old directories write it: another class, and fields of all kinds of transformers.
    "dit_old": (Transformer2DModel, 72, dict(num_attention_heads=3, attention_head_dim=4, in_channels=2, out_channels=2,
                                             num_layers=1, sample_size=9, patch_size=3, num_embeds_ada_norm=4,
                                             activation_fn="gelu", attention_bias=False, norm_elementwise_affine=True,
                                             norm_eps=1e-3)),
}
# name -> (rows of the grid, columns of it, class labels): the size of the training, others, another shape.
CASES = {"own": (None, None, [1, 3]), "none": (None, None, [0, -1]), "larger": (6, 6, [2, 0]), "wide": (2, 5, [3, 1])}


def forward(model, x, t, labels):
    """The model on any shape: diffusers folds patches to squares only."""
    caught = {}
    hook = model.proj_out_2.register_forward_hook(lambda _m, _i, output: caught.update(y=output))
    square = x.shape[-1] == x.shape[-2]
    try:
        out = model(x, timestep=t, class_labels=labels, return_dict=False)[0]
    except RuntimeError:
        if square:
            raise
    hook.remove()
    p, c = model.config.patch_size, model.config.out_channels or model.config.in_channels
    rows, columns = x.shape[-2] // p, x.shape[-1] // p
    y = caught["y"].reshape(-1, rows, columns, p, p, c)
    y = torch.einsum("nhwpqc->nchpwq", y).reshape(-1, c, rows * p, columns * p)
    if square and not y.equal(out):
        raise AssertionError("patches are folded otherwise")
    return y


@torch.no_grad()
def make(name):
    kind, seed, fields = MODELS[name]
    torch.manual_seed(seed)
    model = kind(**COMMON, **fields).eval()
    randomise(model, seed, gain=1.1)
    generator = torch.Generator().manual_seed(seed + 1000)
    grid = fields["sample_size"] // fields["patch_size"]
    cases, run = {}, None
    for case, (rows, columns, labels) in CASES.items():
        h, w = (rows or grid) * fields["patch_size"], (columns or grid) * fields["patch_size"]
        x = torch.randn(2, fields["in_channels"], h, w, generator=generator)
        t = torch.tensor([999.0, 13.25])
        # The last row of the tables stands for no class.
        labels = torch.tensor([fields["num_embeds_ada_norm"] if k < 0 else k for k in labels])
        y = forward(model, x, t, labels)
        check(f"{name}.{case}", forward(copy.deepcopy(model).double(), x.double(), t, labels).float(), y)
        run = run or (lambda m, x=x, t=t, labels=labels: forward(m, x, t, labels), y)
        cases |= {f"{case}.sample": x, f"{case}.timestep": t, f"{case}.class_labels": labels, f"{case}.output": y}
    sensitive(name, model, *run)
    write(model, FIXTURES / name, cases)
    print(name, sum(f.stat().st_size for f in (FIXTURES / name).iterdir()), "bytes, output of", y.std().item())


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        make(name)
