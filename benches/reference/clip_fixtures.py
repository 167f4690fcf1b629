"""Random small CLIP encoders and prompt encoders with what transformers and diffusers compute for them.

    python clip_fixtures.py [tokenizers | encoders | prompts]

writes controlgen-diffusion/tests/fixtures/clip/: `tokenizer_*` directories with `cases.json`, encoders as transformers
writes them with `cases.safetensors`, and `prompts.safetensors`. See README.md.
"""

import collections
import copy
import json
import shutil
import sys
from pathlib import Path

from common import ROOT, fail, randomise, save_cases, write_json

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionConfig,
    CLIPVisionModel, CLIPVisionModelWithProjection,
)

FIXTURES = ROOT / "controlgen-diffusion" / "tests" / "fixtures" / "clip"
MERGES = 220
CORPUS = """
a photo of an astronaut riding a horse on the moon, in the style of van gogh, highly detailed, digital art, trending
a painting of a cat sitting on a red chair by the window, soft light, oil on canvas, the cat's eyes are green
portrait of an old fisherman, dramatic lighting, 35mm photograph, sharp focus, the man's beard is grey
a castle on the hill at sunset with mountains in the distance, concept art, matte painting, artstation, 4k
photo of a dog and a cat playing in the garden with flowers, they're happy, we've seen them, I'll say, don't
low quality, blurry, bad anatomy, extra fingers, watermark, text, ugly, deformed
""".lower()


def byte_characters() -> list[str]:
    """The characters that stand for bytes (GPT-2's table), in CLIP's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(others))]


def learned_merges() -> list[tuple[str, str]]:
    """Byte-pair merges of the corpus, the most frequent pair first, ties in order of spelling."""
    words = collections.Counter()
    for word in CORPUS.replace(",", " , ").replace("'", " '").split():
        words[tuple(word[:-1]) + (word[-1] + "</w>",)] += 1
    merges = []
    while len(merges) < MERGES:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        joined = collections.Counter()
        for word, n in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    out.append(word[i] + word[i + 1])
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            joined[tuple(out)] += n
        words = joined
    return merges


BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> tuple[dict, list]:
    characters, merges = byte_characters(), learned_merges()
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def added(content: str, normalized: bool = True) -> dict:
    return dict(__type="AddedToken", content=content, lstrip=False, normalized=normalized, rstrip=False, single_word=False)


def plain(content: str, normalized: bool = True) -> dict:
    return dict(content=content, lstrip=False, normalized=normalized, rstrip=False, single_word=False)


# As the tokenizers of Stable Diffusion 1 and 2 (and of XL's second encoder) are written.
TOKENIZERS = {
    "tokenizer_sd1": (
        dict(add_prefix_space=False, bos_token=added(BOS), do_lower_case=True, eos_token=added(EOS), errors="replace",
             model_max_length=77, pad_token=EOS, tokenizer_class="CLIPTokenizer", unk_token=added(EOS)),
        dict(bos_token=plain(BOS), eos_token=plain(EOS), pad_token=EOS, unk_token=plain(EOS)),
    ),
    "tokenizer_sd2": (
        dict(add_prefix_space=False, added_tokens_decoder={"0": {**plain("!", False), "special": True}},
             bos_token=BOS, clean_up_tokenization_spaces=True, do_lower_case=True, eos_token=EOS, errors="replace",
             model_max_length=77, pad_token="!", tokenizer_class="CLIPTokenizer", unk_token=EOS),
        dict(bos_token=plain(BOS, False), eos_token=plain(EOS), pad_token="!", unk_token=plain(EOS)),
    ),
}
STRINGS = [
    "", " ", "a photo of a cat", "A PHOTO of a Cat!", "cat", "cats'", "it's they're we've I'm I'll I'd don't",
    "IT'S", "x'sy", "35mm photograph, 4k", "2024-01-02", "a,b;c", "!!!", "hello!", "!", "wow!!! so?!", "  two   spaces \t\n tab",
    "naïve café", "cafe\u0301", "Ångström ÅNGSTRÖM", "ÜBER straße STRASSE ß", "İstanbul ISTANBUL ı", "日本語のテキスト",
    "emoji 🐈‍⬛ 👩🏽‍🚀 cat", "Привет, мир", "مرحبا", "हिन्दी", "ﬁancé ﬀ", "x² + y³ = ½", "Ⅷ ① 十", "a_b_c", "__init__",
    "<|startoftext|>", "a <|endoftext|> b", "<|EndOfText|>", "a<|endoftext|>b", "<|endoftext", "(a cat:1.3)", "[dog]", "((red))",
    "\\(not weighted\\)", "tab\there", "new\nline", "nul\u0000byte", "nbsp\u00a0here", "em\u2003space", "zero\u200bwidth",
    "\ufeffbom", "soft\u00adhyphen", "control\u0085next", "quotes “curly” ‘single’ don’t", "dash – — −", "ellipsis…",
    "http://example.com/a?b=c&d=e#f", "C:\\path\\file.txt", "email@example.org", "100%", "$5.00 €5 £5 ¥5", "#hashtag @user",
    "mixed123numbers456", "ALLCAPS123", "camelCaseWord", "a" * 40, "of the van gogh style", "\u0130", "ΑΣ ΣΑΣ", "ǅ ǆ", "𝒜𝒷𝒸", "한국어",
    "ﷺ", "\u1e9e", "e\u0301\u0301", "\u00c5\u212b", "'s", "''s 'S", "'", "''", "l'homme", "rock'n'roll", " leading", "trailing ",
]


def tokenizers():
    vocab, merges = vocabulary()
    for name, (config, special) in TOKENIZERS.items():
        folder = FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / "vocab.json", vocab, compact=True)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", special)
        check(folder)
    # The same as transformers 5 writes it.
    folder = FIXTURES / "tokenizer_json"
    shutil.rmtree(folder, ignore_errors=True)
    CLIPTokenizer.from_pretrained(FIXTURES / "tokenizer_sd2").save_pretrained(folder)
    check(folder)


def check(folder: Path):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    long = "a photo of a cat, " * 30
    cases = [dict(text=text, ids=tokenizer(text, add_special_tokens=False).input_ids) for text in STRINGS]
    padded = []
    for text in ["a photo of a cat", "", long]:
        found = tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        whole = tokenizer(text, padding="longest", return_tensors="pt").input_ids
        # As diffusers reports what it leaves out.
        rest = tokenizer.batch_decode(whole[:, tokenizer.model_max_length - 1 : -1])[0]
        padded.append(dict(text=text, ids=found.input_ids, keep=found.attention_mask, truncated=rest))
    write_json(folder / "cases.json", dict(pad=tokenizer.pad_token_id, encode=cases, padded=padded), compact=True)
    sizes = {len(case["ids"]) for case in cases}
    assert len(sizes) > 10



AGREE, SENSITIVE = 2e-5, 2e-3


def text_config(**changes) -> CLIPTextConfig:
    base = dict(
        vocab_size=734, hidden_size=16, intermediate_size=24, projection_dim=12, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-3, eos_token_id=733, bos_token_id=732,
    )
    return CLIPTextConfig(**{**base, **changes})


def vision_config(**changes) -> CLIPVisionConfig:
    base = dict(
        hidden_size=24, intermediate_size=40, projection_dim=20, num_hidden_layers=2, num_attention_heads=3, image_size=13,
        patch_size=4, hidden_act="quick_gelu", layer_norm_eps=1e-3,
    )
    return CLIPVisionConfig(**{**base, **changes})


def old_names(weights: dict) -> dict:
    """As transformers 4 wrote a model without a projection."""
    tower = "vision_model" if any("patch_embedding" in k for k in weights) else "text_model"
    renamed = {k if k.startswith((tower, "text_proj", "visual_proj")) else f"{tower}.{k}": v for k, v in weights.items()}
    n = renamed[f"{tower}.embeddings.position_embedding.weight"].shape[0]
    return {**renamed, f"{tower}.embeddings.position_ids": torch.arange(n)[None]}


# Class, configuration, whether the file has the old names, changes of the configuration that must show.
ENCODERS = {
    "text_legacy": (CLIPTextModel, text_config(eos_token_id=2), True, [dict(hidden_act="gelu"), dict(layer_norm_eps=1e-5)]),
    "text": (CLIPTextModel, text_config(hidden_act="gelu", num_hidden_layers=2), False, [dict(hidden_act="quick_gelu")]),
    "text_projection": (
        CLIPTextModelWithProjection,
        text_config(hidden_size=14, num_attention_heads=2, hidden_act="gelu", projection_dim=10),
        False,
        [dict(hidden_act="quick_gelu"), dict(num_hidden_layers=2)],
    ),
    "vision": (CLIPVisionModel, vision_config(hidden_act="gelu"), True, [dict(hidden_act="quick_gelu")]),
    "vision_projection": (CLIPVisionModelWithProjection, vision_config(), False, [dict(hidden_act="gelu")]),
}


@torch.no_grad()
def whole() -> None:
    """Both towers in one file."""
    text, vision = text_config(vocab_size=60, eos_token_id=2, max_position_embeddings=12), vision_config()
    text.num_hidden_layers = 1
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=9)
    model = CLIPModel(config).float().eval()
    randomise(model, 7050)
    generator = torch.Generator().manual_seed(7051)
    kernel = model.vision_model.embeddings.patch_embedding.weight
    kernel.copy_((torch.randn(kernel.shape, generator=generator) * 0.2).bfloat16())
    ids, size = torch.randint(3, 60, (2, 7), generator=generator), vision.image_size
    pixels = torch.randn(2, 3, size, size, generator=generator)
    folder = FIXTURES / "whole"
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float()
    found = dict(
        input_ids=ids, pixel_values=pixels, text_embeds=model.get_text_features(ids).pooler_output,
        image_embeds=model.get_image_features(pixels).pooler_output,
    )
    save_cases(folder / "cases.safetensors", found, "a whole CLIP by transformers")


def outputs(found) -> dict:
    names = ["last_hidden_state", "pooler_output", "text_embeds", "image_embeds"]
    kept = {name: getattr(found, name) for name in names if getattr(found, name, None) is not None}
    if found.hidden_states is not None:
        kept.update({f"hidden_states.{i}": found.hidden_states[-1 - i] for i in range(3)})
    return kept


def text_inputs(generator: torch.Generator) -> dict:
    """A framed batch padded with the end, as Stable Diffusion has it, and two with a mask: padded on the right, the left."""
    ids = torch.randint(3, 732, (3, 11), generator=generator)
    ids[:, 0] = 732
    for row, end in enumerate([10, 4, 7]):
        ids[row, end:] = 733
    masked = torch.randint(3, 732, (3, 9), generator=generator)
    masked[:, 0] = 732
    mask = torch.ones_like(masked)
    for row, end in enumerate([8, 3, 5]):
        masked[row, end] = 733
        masked[row, end + 1 :] = 0
        mask[row, end + 1 :] = 0
    left = torch.randint(3, 732, (3, 8), generator=generator)
    left[:, -1] = 733
    before = (torch.arange(8)[None] >= torch.tensor([[0], [3], [5]])).long()
    left = torch.where(before == 1, left, 0)
    given = {"left": dict(input_ids=left, attention_mask=before)}
    return given | {"plain": dict(input_ids=ids), "masked": dict(input_ids=masked, attention_mask=mask)}


def encoders():
    whole()
    for number, (name, (model_class, config, old, changes)) in enumerate(ENCODERS.items()):
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        randomise(model, 7000 + number)
        text = isinstance(config, CLIPTextConfig)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("patch_embedding.weight"):
                    parameter.copy_((torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2).bfloat16())
        generator = torch.Generator().manual_seed(7100 + number)
        if text:
            inputs = text_inputs(generator)
        else:
            c = config
            inputs = {"plain": dict(pixel_values=torch.randn(2, 3, c.image_size, c.image_size, generator=generator))}
        folder = FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        model.to(torch.bfloat16).save_pretrained(folder)
        model.float()
        if old:
            file = folder / "model.safetensors"
            save_file(old_names(load_file(file)), file, metadata={"format": "pt"})
        cases = {}
        with torch.no_grad():
            for case, given in inputs.items():
                run = lambda m, kind: outputs(m(output_hidden_states=True, **{
                    k: v.to(kind) if v.is_floating_point() else v for k, v in given.items()}))
                found = run(model, torch.float32)
                exact = run(copy.deepcopy(model).double(), torch.float64)
                for key, value in found.items():
                    if given.get("attention_mask") is not None and value.ndim == 3:
                        value = found[key] = value * given["attention_mask"][..., None]
                        exact[key] = exact[key] * given["attention_mask"][..., None]
                    if (value - exact[key]).abs().max() > AGREE:
                        fail(f"{name}: {key} in f32 is not that in f64")
                for change in changes:
                    other = model_class(type(config)(**{**config.to_dict(), **change})).float().eval()
                    other.load_state_dict(model.state_dict(), strict=False)
                    other.config._attn_implementation = "eager"
                    moved = outputs(other(output_hidden_states=True, **given))
                    if (moved["last_hidden_state"] - found["last_hidden_state"]).abs().max() < SENSITIVE:
                        fail(f"{name}: {change} does not show")
                cases.update({f"{case}.{k}": v for k, v in {**given, **found}.items()})
        save_cases(folder / "cases.safetensors", cases, f"{name} by transformers")


def prompts():
    """Prompts as the pipelines of Stable Diffusion 1 and XL encode them."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()

    one = CLIPTextModel.from_pretrained(FIXTURES / "text_legacy", dtype=torch.float32).eval()
    two = CLIPTextModelWithProjection.from_pretrained(FIXTURES / "text_projection", dtype=torch.float32).eval()
    # diffusers 0.42 looks for the final norm where transformers 4 had it.
    object.__setattr__(one, "text_model", one)
    first = CLIPTokenizer.from_pretrained(FIXTURES / "tokenizer_sd1")
    second = CLIPTokenizer.from_pretrained(FIXTURES / "tokenizer_sd2")
    texts = ["a photo of a cat, riding a horse!", "a castle on the hill at sunset, " * 20]
    sd = StableDiffusionPipeline(
        vae=None, text_encoder=one, tokenizer=first, unet=None, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )
    xl = StableDiffusionXLPipeline(
        vae=None, text_encoder=one, text_encoder_2=two, tokenizer=first, tokenizer_2=second, unet=None, scheduler=None,
    )
    cases = {}
    with torch.no_grad():
        for skip in [None, 1]:
            key = "skip" if skip else "plain"
            found, empty = sd.encode_prompt(texts, "cpu", 1, True, negative_prompt=["", ""], clip_skip=skip)
            cases[f"sd.{key}"], cases[f"sd.{key}.empty"] = found, empty
            found, empty, pooled, empty_pooled = xl.encode_prompt(
                texts, None, "cpu", 1, True, negative_prompt=["", ""], clip_skip=skip
            )
            cases.update({
                f"xl.{key}": found, f"xl.{key}.pooled": pooled, f"xl.{key}.empty.pooled": empty_pooled,
                f"xl.{key}.empty": empty,
            })
    # Of negative prompts diffusers skips nothing.
    cases = {k: v for k, v in cases.items() if "skip.empty" not in k}
    # Every seventh position is enough.
    cases = {k: v[:, ::7] if v.ndim == 3 else v for k, v in cases.items()}
    save_cases(FIXTURES / "prompts.safetensors", cases, "prompts by diffusers")
    write_json(FIXTURES / "prompts.json", texts)


PARTS = dict(tokenizers=tokenizers, encoders=encoders, prompts=prompts)

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        if part not in PARTS:
            fail(f"unknown part {part}; known: {', '.join(PARTS)}")
        PARTS[part]()
