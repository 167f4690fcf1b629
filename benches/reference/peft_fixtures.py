"""Small random adapters as peft writes them, with the logits peft computes under them.

    python peft_fixtures.py [NAME ...]

writes controlgen-peft/tests/fixtures/NAME/{adapter_config.json, adapter_model.safetensors, cases.safetensors}, for the
random models of text_fixtures.py. The metadata of cases.safetensors names the model. The script refuses to write an
adapter that could not catch an error: every alteration listed with it must move the logits by at least SENSITIVE.

    python peft_fixtures.py --read DIRECTORY ...

reads adapter directories that controlgen-peft wrote (the binary `peft-directories`), each with the logits it computed,
and says how far peft's are from them: more than AGREE is a failure.
"""

import copy
import json
import shutil
import sys

from common import ROOT, TEXT_FIXTURES, fail, write_json

import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft import __version__ as PEFT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

FIXTURES_AT = ROOT / "controlgen-peft" / "tests" / "fixtures"
AGREE = 1e-4
SENSITIVE = 5e-3


def base(name):
    return AutoModelForCausalLM.from_pretrained(
        TEXT_FIXTURES / name, dtype=torch.float32, attn_implementation="eager").eval()


def lora(**changes):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, **changes})


# name -> (model, configuration, alterations: changes of adapter_config.json that the logits must notice)
FIXTURES = {
    "lora_gpt2": (
        "gpt2_gelu_new",
        lora(target_modules=["c_attn", "c_proj", "mlp.c_fc"], fan_in_fan_out=True),
        [{"lora_alpha": 6}, {"use_rslora": True}],
    ),
    "lora_llama": (
        "llama_gqa_tied",
        lora(target_modules="all-linear", use_rslora=True, rank_pattern={"k_proj": 2, "1.mlp.up_proj": 4},
             alpha_pattern={"layers.0.self_attn.*": 9, "o_proj": 2}),
        [{"use_rslora": False}, {"alpha_pattern": {}}, {"alpha_pattern": {"o_proj": 2, "layers.0.self_attn.*": 9}}],
    ),
    "lora_pattern": (
        "llama_biased", lora(target_modules=r".*layers\.\d+\.(self_attn\.[qv]|mlp\.down)_proj"), [{"lora_alpha": 6}],
    ),
    "lora_layers": (
        "llama_head_dim", lora(target_modules=["q_proj", "gate_proj", "model.layers.1.self_attn.o_proj"],
                               layers_to_transform=[0, 2]),
        [{"lora_alpha": 6}],
    ),
    "ia3_gpt2": (
        "gpt2_gelu_hub",
        IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"],
                  fan_in_fan_out=True),
        [],
    ),
    "ia3_llama": (
        "llama_biased",
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj", "up_proj"],
                  feedforward_modules=["down_proj"]),
        [],
    ),
    "prefix_gpt2": ("gpt2_gelu_new", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), []),
    "prefix_llama": ("llama_gqa_tied", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), []),
    "prefix_projected": (
        "qwen3", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True,
                                    encoder_hidden_size=7), [],
    ),
}


def randomise(model, seed):
    """Values that matter, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            elif "lora_B" in name:
                parameter.copy_(0.5 * noise)
            elif "ia3_l" in name:
                parameter.copy_(1 + 0.4 * noise)
            elif "prompt_encoder" in name:
                parameter.copy_(noise if "embedding" in name else 0.5 * noise)


def inputs(vocab, seed):
    """One row of seven tokens; two rows of which one is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    return {
        "plain": {"input_ids": torch.randint(3, vocab, (1, 7), generator=generator)},
        "left": {"input_ids": torch.randint(3, vocab, (2, 6), generator=generator), "attention_mask": mask},
    }


@torch.no_grad()
def logits(model, case):
    """peft's logits at the tokens, zeros at padding."""
    mask = case.get("attention_mask")
    arguments = dict(case)
    if mask is None:
        arguments["attention_mask"] = torch.ones_like(case["input_ids"])
    else:
        # transformers counts positions without padding in `generate` only; a prefix comes before all.
        config = getattr(model, "active_peft_config", None)
        prefix = getattr(config, "num_virtual_tokens", None) or 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        if prefix:
            return prefixed(model, case["input_ids"], mask, positions + prefix)
        arguments["position_ids"] = positions
    out = model(**arguments).logits
    return out if mask is None else out * mask[..., None]


def prefixed(model, ids, mask, positions):
    """The base model with peft's prefix as its cache: PeftModel drops positions that it is given."""
    cache = model.get_prompt(len(ids))
    n = cache.get_seq_length()
    whole = torch.cat([torch.ones(len(ids), n, dtype=torch.long), mask], 1)
    out = model.base_model(input_ids=ids, attention_mask=whole, position_ids=positions, past_key_values=cache)
    return out.logits * mask[..., None]


def differ(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


def reread(model_name, folder):
    return PeftModel.from_pretrained(base(model_name), folder).eval()


def make(name, seed):
    model_name, config, alterations = FIXTURES[name]
    torch.manual_seed(seed)
    plain = base(model_name)
    cases = inputs(plain.config.vocab_size, seed)
    before = {k: logits(plain, c) for k, c in cases.items()}
    model = get_peft_model(plain, copy.deepcopy(config)).eval()
    randomise(model, seed)
    truth = {k: logits(model, c) for k, c in cases.items()}
    folder = FIXTURES_AT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    # No paths of a machine, and lists that came from sets in one order.
    written["base_model_name_or_path"] = model_name
    if isinstance(written.get("target_modules"), list):
        written["target_modules"].sort()
    write_json(path, written)

    moved = {"the adapter": differ(truth, before)}
    for change in alterations:
        write_json(path, written | change)
        altered = reread(model_name, folder)
        moved[str(change)] = differ(truth, {k: logits(altered, c) for k, c in cases.items()})
    write_json(path, written)
    dull = {k: v for k, v in moved.items() if v < SENSITIVE}
    if dull:
        fail(f"{name}: these would not be noticed (less than {SENSITIVE}): {dull}")
    again = reread(model_name, folder)
    if not written.get("prefix_projection"):
        difference = differ(truth, {k: logits(again, c) for k, c in cases.items()})
        if difference > 1e-6:
            fail(f"{name}: read back differs by {difference}")
    tensors = {f"{k}.{a}": v.contiguous() for k, c in cases.items() for a, v in c.items()}
    tensors |= {f"{k}.logits": v.contiguous() for k, v in truth.items()}
    about = f"peft {PEFT}, torch {torch.__version__.split('+')[0]}, eager attention, float32"
    save_file(tensors, folder / "cases.safetensors", metadata={"model": f"{model_name}; {about}"})
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {size} bytes; least noticed: {min(moved, key=moved.get)} {min(moved.values()):.1e}")


def read(folder):
    """peft's logits under a directory of ours against ours."""
    tensors = load_file(folder / "cases.safetensors")
    with safe_open(folder / "cases.safetensors", "pt") as file:
        model_name = file.metadata()["model"].split(";")[0]
    model = reread(model_name, folder)
    difference = 0.0
    for case in ("plain", "left"):
        given = {k.removeprefix(f"{case}."): v for k, v in tensors.items() if k.startswith(f"{case}.")}
        ours = given.pop("logits")
        theirs = logits(model, given)
        if "attention_mask" in given:
            ours = ours * given["attention_mask"][..., None]
        difference = max(difference, (theirs - ours).abs().max().item())
    print(f"{folder.name}: peft differs by {difference:.1e}")
    return difference


def main():
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    if arguments[:1] == ["--read"]:
        from pathlib import Path
        worst = max(read(Path(folder)) for folder in arguments[1:])
        print(f"largest difference of {len(arguments) - 1} directories: {worst:.1e}")
        if not worst <= AGREE:
            fail(f"{worst} is more than {AGREE}")
        return
    for name in arguments or list(FIXTURES):
        if name not in FIXTURES:
            fail(f"unknown fixture {name}; known: {', '.join(FIXTURES)}")
        make(name, 5000 + 10 * list(FIXTURES).index(name))


if __name__ == "__main__":
    main()
