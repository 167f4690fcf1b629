"""SmolLM2-135M-Instruct from its GGUF file, by way of transformers, and the tokenizer as it was published.

    python smollm2_model.py GGUF DIRECTORY

writes a bfloat16 Hugging Face directory. The truth scripts import the two loaders.
"""

import json
import sys
from pathlib import Path

from common import fail

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)


def published_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Vocabulary, merges, special tokens and chat template of the file; pre-tokenizer of the published tokenizer.json.

    The file says `tokenizer.ggml.pre = smollm`, that is: digits one by one, then GPT-2's byte-level split.
    transformers 5.23 does not know that value and falls back to GPT-2's split alone when it reads a GGUF file
    (`gguf_tokenizer` below), which moves white space before digits into other tokens.
    """
    fields = GGUFReader(gguf).fields
    value = {k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}
    if (value["tokenizer.ggml.model"], value["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        fail(f"{gguf}: expected a gpt2 tokenizer with pre-tokenizer smollm")
    tokens = value["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in value["tokenizer.ggml.merges"]]
    # No unknown token: the vocabulary lacks 21 of the 256 bytes, and text that needs one of them loses it.
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, value["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {k: tokens[value[f"tokenizer.ggml.{v}_token_id"]] for k, v in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=value["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False, **special)


def gguf_tokenizer(gguf: Path):
    """The tokenizer that transformers itself makes of the file."""
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


# What describes the file rather than the model.
IGNORED = ("quantization_config", "unk_token_id", "_model_name_or_path")


def load_model(gguf: Path, round_to_bf16: bool):
    """The de-quantised model in f32; `round_to_bf16` first rounds every weight to bfloat16."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A plain model with the same weights: the one read counts as quantised and refuses to be saved.
    config = {k: v for k, v in read.config.to_diff_dict().items() if k not in IGNORED}
    # The file holds this number in f32; the published configuration says 1e-5.
    config["rms_norm_eps"] = round(config["rms_norm_eps"], 9)
    model = LlamaForCausalLM(LlamaConfig(**config))
    weights = read.state_dict()
    if round_to_bf16:
        weights = {k: w.bfloat16().float() for k, w in weights.items()}
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(bos_token_id=config["bos_token_id"],
                                               eos_token_id=config["eos_token_id"],
                                               pad_token_id=config["pad_token_id"])
    return model.eval()


def main():
    if len(sys.argv) != 3:
        fail("usage: smollm2_model.py GGUF DIRECTORY")
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if not gguf.is_file():
        fail(f"{gguf}: no such file")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = published_tokenizer(gguf)
    tokenizer.save_pretrained(folder)
    # The class whose loader takes tokenizer.json as it stands: transformers 5 rebuilds a GPT2Tokenizer from the
    # vocabulary and drops the digit splitting.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    model = load_model(gguf, False).to(torch.bfloat16)
    model.save_pretrained(folder)
    print(f"wrote {folder}: {', '.join(sorted(f.name for f in folder.iterdir()))}")


if __name__ == "__main__":
    main()
