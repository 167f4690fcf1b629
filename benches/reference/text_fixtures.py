"""Random small language models with the logits and greedy continuations transformers computes for them.

    python text_fixtures.py [NAME ...]

writes controlgen-text/tests/fixtures/NAME/{config.json, model.safetensors, cases.safetensors}. See README.md
beside this file for the names and shapes inside cases.safetensors.

The script refuses to write a fixture that could not catch an error: every alteration listed with it (another
rope base, no biases, norms of ones, ...) must move the logits by at least SENSITIVE, and eager f32, SDPA f32 and
eager f64 must agree within AGREE.
"""

import copy
import json
import shutil
import sys

from common import TEXT_FIXTURES, fail, randomise, save_cases, write_json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

AGREE = 2e-5
SENSITIVE = 2e-3
NEW_TOKENS = 32
GREEDY_GAP = 2e-3


def llama_like(config_class, **changes):
    base = dict(
        vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, rms_norm_eps=1e-3, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    return config_class(**{**base, **changes})


def gpt2(**changes):
    base = dict(
        vocab_size=53, n_positions=64, n_embd=24, n_layer=2, n_head=3, layer_norm_epsilon=1e-3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )
    return GPT2Config(**{**base, **changes})


# Alterations: name -> function of (config as a dict, weights), each a mistake a reader of the files could make.
def setting(**values):
    return lambda config, weights: config.update(copy.deepcopy(values))


def rope(**values):
    return lambda config, weights: config["rope_parameters"].update(values)


def weights_like(fragment, value):
    def change(config, weights):
        hit = [k for k in weights if fragment in k]
        assert hit, f"no weight is named like {fragment}"
        for k in hit:
            weights[k] = torch.full_like(weights[k], value)

    return change


LLAMA = {
    "rope base": rope(rope_theta=10000.0),
    "rms eps": setting(rms_norm_eps=1e-5),
    "norms of ones": weights_like("layernorm", 1.0),
    "final norm of ones": weights_like("model.norm", 1.0),
}
GPT2 = {
    "eps": setting(layer_norm_epsilon=1e-5),
    "no attention bias": weights_like("c_attn.bias", 0.0),
    "no mlp bias": weights_like("c_fc.bias", 0.0),
    "no norm bias": weights_like("ln_1.bias", 0.0),
    "no positions": weights_like("wpe", 0.0),
}

# name -> (configuration, storage, alterations); storage is (dtype, layout of the files)
FIXTURES = {
    "gpt2_gelu_new": (
        lambda: gpt2(), (torch.float32, "plain"),
        GPT2 | {"exact gelu": setting(activation_function="gelu"), "heads": setting(n_head=4)},
    ),
    "gpt2_relu_untied": (
        lambda: gpt2(n_head=4, n_inner=40, activation_function="relu", scale_attn_by_inverse_layer_idx=True,
                     tie_word_embeddings=False, vocab_size=59, n_layer=3),
        (torch.bfloat16, "plain"),
        GPT2 | {"layer scale": setting(scale_attn_by_inverse_layer_idx=False),
                "gelu": setting(activation_function="gelu_new")},
    ),
    "gpt2_gelu_hub": (
        lambda: gpt2(n_head=6, n_inner=36, activation_function="gelu", scale_attn_weights=False, vocab_size=61),
        (torch.float16, "gpt2 hub"),
        GPT2 | {"tanh gelu": setting(activation_function="gelu_new"),
                "attention scale": setting(scale_attn_weights=True)},
    ),
    "llama_mha_untied": (lambda: llama_like(LlamaConfig), (torch.float32, "sharded"), LLAMA),
    "llama_gqa_tied": (
        lambda: llama_like(LlamaConfig, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=59),
        (torch.bfloat16, "plain"), LLAMA,
    ),
    "llama_biased": (
        lambda: llama_like(LlamaConfig, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
        (torch.bfloat16, "plain"),
        LLAMA | {"no q bias": weights_like("q_proj.bias", 0.0), "no k bias": weights_like("k_proj.bias", 0.0),
                 "no o bias": weights_like("o_proj.bias", 0.0), "no up bias": weights_like("up_proj.bias", 0.0),
                 "no down bias": weights_like("down_proj.bias", 0.0)},
    ),
    "llama_head_dim": (
        lambda: llama_like(LlamaConfig, head_dim=10, num_key_value_heads=2, num_hidden_layers=3),
        (torch.float16, "plain"), LLAMA,
    ),
    "llama_rope_llama3": (
        lambda: llama_like(
            LlamaConfig, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=96,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
        (torch.bfloat16, "plain"),
        LLAMA | {"no scaling": setting(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
                 "linear": rope(rope_type="linear"), "factor": rope(factor=8.0),
                 "low": rope(low_freq_factor=2.0), "high": rope(high_freq_factor=8.0),
                 "original length": rope(original_max_position_embeddings=64)},
    ),
    "llama_rope_linear": (
        lambda: llama_like(LlamaConfig, num_key_value_heads=2,
                           rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}),
        (torch.bfloat16, "plain"),
        LLAMA | {"no scaling": setting(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
                 "factor": rope(factor=2.0)},
    ),
    "mistral": (
        lambda: llama_like(MistralConfig, num_key_value_heads=2, head_dim=8, sliding_window=None),
        (torch.bfloat16, "plain"), LLAMA,
    ),
    "qwen2": (
        lambda: llama_like(Qwen2Config, num_key_value_heads=2, tie_word_embeddings=True),
        (torch.bfloat16, "plain"),
        LLAMA | {"no q bias": weights_like("q_proj.bias", 0.0), "no k bias": weights_like("k_proj.bias", 0.0),
                 "no v bias": weights_like("v_proj.bias", 0.0)},
    ),
    "qwen3": (
        lambda: llama_like(Qwen3Config, num_key_value_heads=1, head_dim=12),
        (torch.bfloat16, "plain"),
        LLAMA | {"no q norm": weights_like("q_norm", 1.0), "no k norm": weights_like("k_norm", 1.0)},
    ),
}


def inputs(config, seed):
    """Four calls of the model: whole rows, left-padded, right-padded, explicit positions."""
    generator = torch.Generator().manual_seed(seed)
    context = config.max_position_embeddings
    long = 36 if context > 64 else 9

    def ids(*shape):
        return torch.randint(3, config.vocab_size, shape, generator=generator)

    lengths = torch.tensor([9, 4, 6])
    column = torch.arange(9)
    left = (column >= 9 - lengths[:, None]).long()
    right = (column < lengths[:, None]).long()
    cases = {"plain": {"input_ids": ids(3, long)}}
    for name, mask in (("left", left), ("right", right)):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        # Token 0 fills the padding: it is a real token of the vocabulary that only the mask hides.
        cases[name] = {"input_ids": ids(3, 9) * mask, "attention_mask": mask, "position_ids": positions}
    last = context - 1
    apart = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13], [0, 2, 3, 7, 11, 19, last - 9, last - 1, last]])
    # The mask of ones matters: without one, transformers takes a jump in position_ids for packed sequences.
    cases["positions"] = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long),
                          "position_ids": apart}
    return cases


@torch.no_grad()
def logits(model, case):
    return model(**case, use_cache=False).logits


def blank(value, case):
    """Zero where the mask hides the position: what a model returns there has no meaning."""
    mask = case.get("attention_mask")
    return value if mask is None else value * mask[..., None].to(value.dtype)


def rebuild(config, weights, attention="eager"):
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:
        fail(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def sensitivity(config, weights, cases, truth, alterations):
    """The largest change of any logit for each alteration."""
    moved = {}
    for name, alter in alterations.items():
        changed_config, changed_weights = config.to_dict(), {k: v.clone() for k, v in weights.items()}
        alter(changed_config, changed_weights)
        model = rebuild(type(config).from_dict(changed_config), changed_weights)
        moved[name] = max((blank(logits(model, c), c) - truth[k]).abs().max().item() for k, c in cases.items())
    return moved


@torch.no_grad()
def greedy(model, case, eos=None):
    """32 greedy tokens from left-padded prompts, as generate makes them; their log-probabilities; least top-2 gap."""
    out = model.generate(
        input_ids=case["input_ids"], attention_mask=case["attention_mask"], do_sample=False, num_beams=1,
        max_new_tokens=NEW_TOKENS, eos_token_id=eos, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )
    new = out.sequences[:, case["input_ids"].shape[1]:]
    steps = torch.stack(out.logits, dim=1).log_softmax(-1)
    top = steps.topk(2, dim=-1).values
    return new, steps.gather(-1, new[..., None])[..., 0], (top[..., 0] - top[..., 1]).min().item()


def write_weights(model, folder, dtype, layout):
    """config.json and weights as `save_pretrained` writes them, or as the original GPT-2 checkpoints hold them."""
    stored = copy.deepcopy(model).to(dtype)
    if layout == "sharded":
        stored.save_pretrained(folder, max_shard_size=24_000)
        assert (folder / "model.safetensors.index.json").exists()
    else:
        stored.save_pretrained(folder)
    if layout == "gpt2 hub":
        # No "transformer." prefix, and the causal mask of each layer among the weights.
        weights = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
        context = model.config.n_positions
        for layer in range(model.config.n_layer):
            weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, context, context, dtype=dtype).tril()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").unlink(missing_ok=True)


def old_style(folder):
    """The same config.json with the names of transformers 4: rope_theta, rope_scaling, torch_dtype."""
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    if kind == "default":
        config["rope_scaling"] = None
    elif kind == "linear":
        config["rope_scaling"] = {"type": "linear", **parameters}
    else:
        config["rope_scaling"] = {"rope_type": kind, **parameters}
    write_json(folder / "config_old.json", config)


def make(name, seed):
    build, (dtype, layout), alterations = FIXTURES[name]
    torch.manual_seed(seed)
    config = build()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    cases = inputs(config, seed + 1)
    truth = {k: blank(logits(model, c), c) for k, c in cases.items()}

    sdpa = rebuild(config, weights, "sdpa")
    double = copy.deepcopy(model).double()
    spread = {
        "sdpa": max((blank(logits(sdpa, c), c) - truth[k]).abs().max().item() for k, c in cases.items()),
        "f64": max((blank(logits(double, c), c) - truth[k]).abs().max().item() for k, c in cases.items()),
    }
    if max(spread.values()) > AGREE:
        fail(f"{name}: eager f32 differs from {spread}, more than {AGREE}")
    moved = sensitivity(config, weights, cases, truth, alterations)
    dull = {k: v for k, v in moved.items() if v < SENSITIVE}
    if dull:
        fail(f"{name}: these alterations would not be noticed (less than {SENSITIVE}): {dull}")

    for attempt in range(200):
        prompts = inputs(config, seed + 2 + attempt)["left"]
        new, logprobs, gap = greedy(model, prompts)
        if gap >= GREEDY_GAP and all(len(set(row.tolist())) >= 5 for row in new):
            break
    else:
        fail(f"{name}: no prompts whose greedy tokens lead by {GREEDY_GAP} everywhere")
    # A token that one row meets early serves as the end token of a second run; other rows go on longer.
    eos = new[0, 4].item()
    stopped, _, _ = greedy(model, prompts, eos)

    folder = TEXT_FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_weights(model, folder, dtype, layout)
    if name in ("llama_gqa_tied", "llama_rope_llama3", "llama_rope_linear"):
        old_style(folder)
    tensors = {f"{k}.{argument}": v for k, c in cases.items() for argument, v in c.items()}
    tensors |= {f"{k}.logits": v for k, v in truth.items()}
    tensors |= {f"greedy.{k}": prompts[k] for k in ("input_ids", "attention_mask")}
    tensors |= {"greedy.new_ids": new, "greedy.logprobs": logprobs}
    tensors |= {"stop.eos_token_id": torch.tensor([eos]), "stop.new_ids": stopped}
    save_cases(folder / "cases.safetensors", tensors, "eager attention, float32")
    for file in folder.iterdir():
        file.chmod(0o644)
    check(folder, cases, truth)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {size} bytes; logits up to {max(t.abs().max().item() for t in truth.values()):.1f}; "
          f"sdpa {spread['sdpa']:.1e}, f64 {spread['f64']:.1e}; least noticed: "
          f"{min(moved, key=moved.get)} {min(moved.values()):.1e}; greedy gap {gap:.1e}; stop at {stopped.shape[1]}")


def check(folder, cases, truth):
    """What was written, read back by transformers (under the old config too), gives the same logits."""
    configs = [folder / "config.json"]
    if (folder / "config_old.json").exists():
        configs.append(folder / "config_old.json")
    for path in configs:
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager").eval()
        for k, c in cases.items():
            difference = (blank(logits(model, c), c) - truth[k]).abs().max().item()
            if difference > 1e-6:
                fail(f"{path}: {k} read back differs by {difference}")


def main():
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(FIXTURES)
    for name in names:
        if name not in FIXTURES:
            fail(f"unknown fixture {name}; known: {', '.join(FIXTURES)}")
        make(name, 1000 + 100 * list(FIXTURES).index(name))


if __name__ == "__main__":
    main()
