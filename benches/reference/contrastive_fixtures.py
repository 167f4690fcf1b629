#!/usr/bin/env python3
"""Contrastive search (Su et al. 2022, equation 5) in plain Python on transformers' models.

    contrastive_fixtures.py

Writes `contrastive.json` beside the small models of text_fixtures.py. transformers took contrastive search out of its core
after 4.56, so it is written out: one text at a time, without a cache, every candidate read from the beginning, hidden
states as transformers gives them (`hidden_states[-1]`, which the output product reads; that is checked). Of controls it has
transformers' own processors. A case is refused where a decision was closer than `CLEAR`.
"""

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from common import TEXT_FIXTURES, VERSIONS, fail, write_json

CLEAR = 1e-5
MODELS = ["gpt2_gelu_new", "llama_gqa_tied", "qwen3"]
PROMPTS = [[5, 17, 40, 8], [33, 2, 51, 9, 24, 12, 7], [11, 30]]


def controls(config):
    made = []
    if "repetition_penalty" in config:
        made.append(RepetitionPenaltyLogitsProcessor(config["repetition_penalty"]))
    if "no_repeat_ngram_size" in config:
        made.append(NoRepeatNGramLogitsProcessor(config["no_repeat_ngram_size"]))
    return made


def read(model, rows):
    """Logits and last hidden states of texts of one length."""
    with torch.no_grad():
        output = model(torch.tensor(rows), output_hidden_states=True, use_cache=False)
    hidden = output.hidden_states[-1]
    if not torch.allclose(model.get_output_embeddings()(hidden), output.logits, atol=1e-5):
        fail("the last hidden state is not what the output product reads")
    return output.logits.float(), hidden.float()


def search(model, prompt, config):
    """The new ids, with the one that ended them, and the least distance between two values that were compared."""
    alpha, k = config["penalty_alpha"], config["top_k"]
    text, gap = list(prompt), float("inf")
    for _ in range(config["max_new_tokens"]):
        logits, _ = read(model, [text])
        scores = logits[:, -1]
        for control in controls(config):
            scores = control(torch.tensor([text]), scores)
        p = scores.softmax(-1)[0]
        order = p.sort(descending=True)
        gap = min(gap, float(order.values[k - 1] - order.values[k]))
        candidates = [int(v) for v in order.indices[:k] if p[v] > 0]
        _, hidden = read(model, [text + [v] for v in candidates])
        hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        values = []
        for v, states in zip(candidates, hidden):
            similarity = (states[:-1] @ states[-1]).max()
            values.append((float((1 - alpha) * p[v] - alpha * similarity), v))
        values.sort(reverse=True)
        if len(values) > 1:
            gap = min(gap, values[0][0] - values[1][0])
        text.append(values[0][1])
        if text[-1] in config["eos_token_id"]:
            break
    return text[len(prompt):], gap


def main():
    cases = []
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(TEXT_FIXTURES / name, dtype=torch.float32).eval()
        base = {"max_new_tokens": 14, "eos_token_id": []}
        free = [search(model, prompt, {**base, "penalty_alpha": 0.6, "top_k": 4})[0] for prompt in PROMPTS]
        stops = [free[0][9], free[1][5]]
        for more in (
            {"penalty_alpha": 0.6, "top_k": 4},
            {"penalty_alpha": 0.6, "top_k": 4, "eos_token_id": stops},
            {"penalty_alpha": 0.0, "top_k": 3},
            {"penalty_alpha": 0.25, "top_k": 8},
            {"penalty_alpha": 0.9, "top_k": 6},
            {"penalty_alpha": 1.0, "top_k": 5},
            {"penalty_alpha": 0.5, "top_k": 1},
            {"penalty_alpha": 0.5, "top_k": 5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 1},
        ):
            config = {**base, **more}
            found, gaps = zip(*(search(model, prompt, config) for prompt in PROMPTS))
            cases.append({"model": name, "config": config, "gaps": [round(gap, 7) for gap in gaps], "expected": found})
            kept = [gap >= CLEAR for gap in gaps]
            cases[-1]["clear"] = kept
    unclear = sum(not clear for case in cases for clear in case["clear"])
    if unclear > 18:
        fail(f"{unclear} of {3 * len(cases)} texts had a decision closer than {CLEAR}")
    print(f"{len(cases)} cases, {unclear} texts unclear")
    write_json(TEXT_FIXTURES / "contrastive.json", {"versions": VERSIONS, "prompts": PROMPTS, "cases": cases}, compact=True)


if __name__ == "__main__":
    main()
