"""Image files, and what diffusers' image processor makes of them.

    python image_fixtures.py

writes controlgen-diffusion/tests/fixtures/image/. See README.md.
"""

import shutil

from common import ROOT, save_cases

import numpy
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

FOLDER = ROOT / "controlgen-diffusion" / "tests" / "fixtures" / "image"
HEIGHT, WIDTH = 21, 34
# [H, W]: smaller and larger along each side, the same, and a side that stays.
SIZES = [(8, 16), (40, 24), (16, 64), (21, 34), (21, 8), (1, 1)]


def picture(generator) -> numpy.ndarray:
    """Edges, ramps and noise: where a window rings, and where rounding shows."""
    y, x = numpy.mgrid[0:HEIGHT, 0:WIDTH]
    ramps = numpy.stack([x * 255 / (WIDTH - 1), y * 255 / (HEIGHT - 1), (x + y) * 4 % 256], -1)
    ramps[5:13, 9:20] = [255, 0, 128]
    noise = torch.randint(-40, 41, ramps.shape, generator=generator).numpy()
    return numpy.clip(ramps + noise, 0, 255).astype(numpy.uint8)


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in -1 ..= 1, which came of levels, as levels."""
    found = (pixels.double() + 1) * 127.5
    assert (found - found.round()).abs().max() < 1e-3
    return found.round().to(torch.uint8)


def main():
    generator = torch.Generator().manual_seed(61)
    rgb = Image.fromarray(picture(generator))
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    # Alpha that hides nothing, and some that does.
    opaque, glass = rgb.copy(), rgb.copy()
    opaque.putalpha(255)
    glass.putalpha(Image.linear_gradient("L").resize(rgb.size))
    sixteen = numpy.asarray(rgb.convert("L")).astype(numpy.uint16) * 257
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb.save(FOLDER / "rgb.png")
    rgb.convert("L").save(FOLDER / "gray.png")
    rgb.quantize(16).save(FOLDER / "palette.png")
    Image.fromarray(sixteen).save(FOLDER / "gray16.png")
    opaque.save(FOLDER / "opaque.png")
    glass.save(FOLDER / "transparent.png")
    smooth = Image.fromarray(numpy.asarray(rgb)).resize((WIDTH, HEIGHT), box=(0, 0, 6, 4))
    smooth.save(FOLDER / "photo.jpg", quality=95, subsampling=0)
    smooth.save(FOLDER / "turned.jpg", quality=95, subsampling=0, exif=turned)

    images = VaeImageProcessor(vae_scale_factor=1)
    masks = VaeImageProcessor(vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    tensors = {}
    for name in ("rgb", "gray", "palette", "opaque"):
        image = Image.open(FOLDER / f"{name}.png").convert("RGB")
        for h, w in SIZES:
            tensors[f"{name}.{h}x{w}"] = levels(images.preprocess(image, height=h, width=w))
    for name in ("photo", "turned"):
        image = ImageOps.exif_transpose(Image.open(FOLDER / f"{name}.jpg"))
        tensors[f"{name}.jpg"] = levels(images.preprocess(image, height=image.height, width=image.width))
    for name in ("rgb", "gray"):
        # A mask is made gray before it is resized: after it, colours that cancel would round otherwise.
        image = Image.open(FOLDER / f"{name}.png").convert("L")
        for h, w in SIZES:
            tensors[f"{name}.mask.{h}x{w}"] = masks.preprocess(image, height=h, width=w).to(torch.uint8)
    # Beyond the range, and halves of levels.
    pixels = torch.randn(2, 3, 9, 7, generator=generator) * 0.8
    pixels[0, :, 0] = (torch.arange(7) * 2 + 1) / 255 - 1
    tensors["pixels"] = pixels
    tensors["levels"] = torch.from_numpy((images.postprocess(pixels, output_type="np") * 255).round().astype("uint8"))
    save_cases(FOLDER / "cases.safetensors", tensors, "diffusers 0.42, Pillow " + Image.__version__)
    for file in FOLDER.iterdir():
        file.chmod(0o644)
    print(sum(f.stat().st_size for f in FOLDER.iterdir()), "bytes")


if __name__ == "__main__":
    main()
