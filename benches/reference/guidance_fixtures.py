#!/usr/bin/env python3
"""Greedy generation under transformers' classifier-free guidance, on the small models of text_fixtures.py.

    guidance_fixtures.py

Writes `guidance.json` beside them: for each case the configuration, the new tokens, and the scores of those tokens as the
processors leave them (log-softmax over the vocabulary). A text is marked unclear where the best token was closer than `CLEAR` to
the second at some step: a rounding may tip it.
"""

import torch
from transformers import AutoModelForCausalLM

from common import TEXT_FIXTURES, VERSIONS, fail, write_json

CLEAR = 1e-4
MODELS = ["gpt2_gelu_new", "llama_rope_llama3", "qwen3", "mistral"]
PROMPTS = [[5, 17, 40, 8], [33, 2, 51, 9, 24, 12, 7], [11, 30]]
NEGATIVES = [[7, 12, 3], [20, 31, 2, 5, 9, 44, 18, 26]]
NEW = 16


def generate(model, prompt, config):
    """The new tokens, their scores, and whether every choice was clear."""
    config = dict(config)
    negative = config.pop("negative_prompt_ids", None)
    if negative is not None:
        config["negative_prompt_ids"] = torch.tensor([negative])
    with torch.no_grad():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **config,
        )
    ids = output.sequences[0, len(prompt):].tolist()
    scores, clear = [], True
    for token, step in zip(ids, output.scores):
        log_p = step[0].double().log_softmax(-1)
        best = log_p.topk(2).values
        clear &= bool(best[0] - best[1] >= CLEAR)
        scores.append(round(float(log_p[token]), 6))
    return {"ids": ids, "scores": scores, "clear": clear}


def main():
    cases = []
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(TEXT_FIXTURES / name, dtype=torch.float32).eval()
        # Nothing ends a text here: an end inside would only shorten what is compared.
        model.generation_config.eos_token_id = None
        for more in (
            {"guidance_scale": 1.5},
            {"guidance_scale": 3.0},
            {"guidance_scale": 0.4},
            {"guidance_scale": 1.5, "negative_prompt_ids": NEGATIVES[0]},
            {"guidance_scale": 2.5, "negative_prompt_ids": NEGATIVES[1]},
            {"guidance_scale": 0.0, "negative_prompt_ids": NEGATIVES[0]},
            {"guidance_scale": -0.5, "negative_prompt_ids": NEGATIVES[1]},
            {"guidance_scale": 2.0, "negative_prompt_ids": NEGATIVES[0], "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        ):
            config = {"max_new_tokens": NEW, **more}
            cases.append({"model": name, "config": config, "expected": [generate(model, p, config) for p in PROMPTS]})
    unclear = sum(not e["clear"] for case in cases for e in case["expected"])
    if unclear > 5:
        fail(f"{unclear} of {3 * len(cases)} texts had a choice closer than {CLEAR}")
    print(f"{len(cases)} cases, {unclear} texts unclear")
    write_json(TEXT_FIXTURES / "guidance.json", {"versions": VERSIONS, "prompts": PROMPTS, "cases": cases}, compact=True)


if __name__ == "__main__":
    main()
