#!/usr/bin/env python3
"""PPLM (Dathathri et al. 2020, section 3) in plain PyTorch, on the small models of text_fixtures.py.

    pplm_fixtures.py

Writes `pplm.json` beside them: log-probabilities of the next token after each of a text's last tokens, as PPLM leaves them. The
past is a transformers cache that gradients go through, one text at a time; of the authors' code there is not the window's decay
and the hidden state of a token expected to come.
"""

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from common import TEXT_FIXTURES, VERSIONS, fail, write_json

MODELS = ["gpt2_gelu_new", "llama_gqa_tied", "qwen3"]
TEXTS = [[5, 17, 40, 8, 33, 2], [51, 9, 24, 12, 7, 11, 30, 3], [11, 30, 4, 1]]
STEERED = 3
BAG = [4, 19, 27, 30]
SETTINGS = [
    {"step_size": 0.03, "num_iterations": 3, "gamma": 1.5, "kl_scale": 0.01, "gm_scale": 0.99, "window": 5},
    {"step_size": 0.4, "num_iterations": 2, "gamma": 1.0, "kl_scale": 0.5, "gm_scale": 0.8, "window": None},
    {"step_size": 0.2, "num_iterations": 4, "gamma": 0.5, "kl_scale": 0.0, "gm_scale": 1.0, "window": 2},
]


def cache_of(layers):
    cache = DynamicCache()
    for i, (k, v) in enumerate(layers):
        cache.update(k, v, i)
    return cache


def layers_of(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


def forward(model, token, past):
    output = model(token, past_key_values=cache_of(past), use_cache=True, output_hidden_states=True)
    return output.logits[0, -1].log_softmax(-1), output.hidden_states[-1][0], layers_of(output.past_key_values)


def steer(model, token, past, own, hidden_sum, count, loss_of, s):
    """log p after `token`, whose past is changed."""
    length = past[0][0].shape[2]
    mask = torch.ones(length)
    if s["window"] is not None and s["window"] < length:
        mask[: length - s["window"]] = 0
    mask = mask[:, None]
    deltas = [[torch.zeros_like(k), torch.zeros_like(v)] for k, v in past]

    def changed(deltas):
        return [(k + mask * dk, v + mask * dv) for (k, v), (dk, dv) in zip(past, deltas)]

    for _ in range(s["num_iterations"]):
        deltas = [[d.detach().requires_grad_(True) for d in pair] for pair in deltas]
        log_p, hidden, _ = forward(model, token, changed(deltas))
        loss = loss_of(log_p, (hidden_sum + hidden[-1]) / count)
        loss = loss + s["kl_scale"] * (log_p.exp() * (log_p - own)).sum()
        loss.backward()
        with torch.no_grad():
            stepped = []
            for pair in deltas:
                norm = torch.cat([(mask * d.grad).flatten() for d in pair]).norm() + 1e-15
                stepped.append([d - s["step_size"] * mask * d.grad / norm ** s["gamma"] for d in pair])
            deltas = stepped
    with torch.no_grad():
        log_p, _, _ = forward(model, token, changed(deltas))
    return (s["gm_scale"] * log_p + (1 - s["gm_scale"]) * own).log_softmax(-1)


def run(model, text, loss_of, s):
    ids = torch.tensor([text])
    with torch.no_grad():
        output = model(ids[:, :-STEERED], use_cache=True, output_hidden_states=True)
    past, hidden_sum = layers_of(output.past_key_values), output.hidden_states[-1][0].sum(0)
    rows, moved = [], 0.0
    for at in range(len(text) - STEERED, len(text)):
        token = ids[:, at : at + 1]
        past = [(k.detach().clone(), v.detach().clone()) for k, v in past]
        with torch.no_grad():
            own, hidden, after = forward(model, token, [(k.clone(), v.clone()) for k, v in past])
        log_p = steer(model, token, past, own, hidden_sum, at + 1, loss_of, s)
        moved = max(moved, float((log_p - own).abs().max()))
        rows.append([round(float(x), 6) for x in log_p])
        past, hidden_sum = after, hidden_sum + hidden[-1]
    return rows, moved


def main():
    cases = []
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(TEXT_FIXTURES / name, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(7)
        width = model.config.hidden_size
        weight = (torch.randn(3, width, generator=generator) * width**-0.5).mul(1e4).round() / 1e4
        bias = torch.randn(3, generator=generator).mul(1e4).round() / 1e4
        bag = lambda log_p, _: -log_p[BAG].logsumexp(-1)
        head = lambda _, mean: -(weight @ mean + bias).log_softmax(-1)[1]
        for attribute, loss_of in (("bag", bag), ("head", head)):
            for s in SETTINGS:
                found = [run(model, text, loss_of, s) for text in TEXTS]
                moved = max(moved for _, moved in found)
                if moved < 1e-3:
                    fail(f"{name}, {attribute}, {s}: log-probabilities moved by {moved} only")
                case = {"model": name, "attribute": attribute, "settings": s, "moved": round(moved, 4)}
                if attribute == "head":
                    flat = lambda t: [round(float(x), 4) for x in t.flatten()]
                    case |= {"weight": flat(weight), "bias": flat(bias), "class": 1}
                cases.append(case | {"expected": [rows for rows, _ in found]})
    print(f"{len(cases)} cases, moved by", sorted(case["moved"] for case in cases))
    value = {"versions": VERSIONS, "bag": BAG, "texts": TEXTS, "steered": STEERED, "cases": cases}
    write_json(TEXT_FIXTURES / "pplm.json", value, compact=True)


if __name__ == "__main__":
    main()
