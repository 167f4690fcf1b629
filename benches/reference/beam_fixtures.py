"""Beam search by transformers' generate, and diverse beam search written out here, from the paper.

    python beam_fixtures.py fixtures
    python beam_fixtures.py smollm2 MODEL_DIR

The first writes controlgen-text/tests/fixtures/beams.json (small random models), the second smollm2/beams.json beside
it. `search` below is beam search as the documentation of transformers has it, one prompt at a time, without padding
or batch. Without groups it must agree with `generate` on a padded batch, or nothing is written; with groups it is
the reference. It also tells how close its decisions were.
"""

import copy
import json
import sys
from collections import Counter
from pathlib import Path

from common import TEXT_FIXTURES, VERSIONS, fail

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

# Decisions closer than this are left to chance.
CLEAR = 1e-5
MODELS = ["gpt2_gelu_new", "llama_gqa_tied", "qwen3"]
PROMPTS = [[5, 17, 40, 8], [33, 2, 51, 9, 24, 12, 7], [11, 30]]
NEVER = "never"


def controls(config):
    """transformers' processors, in its order."""
    made = []
    if "repetition_penalty" in config:
        made.append(RepetitionPenaltyLogitsProcessor(config["repetition_penalty"]))
    if "no_repeat_ngram_size" in config:
        made.append(NoRepeatNGramLogitsProcessor(config["no_repeat_ngram_size"]))
    return made


KNOWN, PROMPT = {}, {}


def log_probs(model, prompt, said):
    """Of the token after each of `said`, all of one length, after the prompt; each is run once in the life of the model."""
    new = [row for row in said if (*prompt, -1, *row) not in KNOWN]
    if new:
        with torch.no_grad():
            if tuple(prompt) not in PROMPT:
                PROMPT.clear()
                PROMPT[tuple(prompt)] = model(torch.tensor([prompt]), use_cache=True)
            rows = PROMPT[tuple(prompt)].logits[:, -1:]
            if new[0]:
                cache = copy.deepcopy(PROMPT[tuple(prompt)].past_key_values)
                cache.batch_repeat_interleave(len(new))
                rows = model(torch.tensor(new), past_key_values=cache).logits
            rows = rows[:, -1].float().log_softmax(-1)
        KNOWN.update(((*prompt, -1, *row), result.clone()) for row, result in zip(new, rows))
    return torch.stack([KNOWN[(*prompt, -1, *row)] for row in said])


class Group:
    """The beams of one group: (token ids, sum of scores) that go on, and (score, token ids) that have ended."""

    def __init__(self):
        self.running, self.ended, self.over = [([], 0.0)], [], False


def search(model, prompt, config):
    """(score, new ids) best first, and the least distance between two numbers that were compared."""
    groups = config.get("num_beam_groups", 1)
    width = config["num_beams"] // groups
    power = config.get("length_penalty", 1.0)
    early = config.get("early_stopping", False)
    strength = config.get("diversity_penalty", 0.0)
    eos, longest = config["eos_token_id"], config["max_new_tokens"]
    all_groups = [Group() for _ in range(groups)]
    gap = float("inf")

    def near(values):
        nonlocal gap
        values = sorted(v for v in values if v > -1e30)
        gap = min([gap, *(b - a for a, b in zip(values, values[1:]))])

    for step in range(1, longest + 1):
        chosen = Counter()  # by the groups before, in this step; to end is no choice that others avoid
        for group in all_groups:
            if group.over:
                continue
            ids = torch.tensor([prompt + said for said, _ in group.running])
            scores = log_probs(model, prompt, [said for said, _ in group.running])
            for control in controls(config):
                scores = control(ids, scores)
            for token, times in chosen.items():
                scores[:, token] -= strength * times
            candidates = [
                (total + float(s), said + [v])
                for (said, total), row in zip(group.running, scores)
                for v, s in enumerate(row.tolist()) if s > -1e30
            ]
            candidates.sort(key=lambda c: -c[0])
            keep = width * max(2, 1 + len(eos))
            near([score for score, _ in candidates[:keep + 1]])
            going = []
            for rank, (total, said) in enumerate(candidates[:keep]):
                if said[-1] in eos or step == longest:
                    if rank < width:
                        group.ended.append((total / step**power, said))
                        chosen.update(said[-1:] if said[-1] not in eos else [])
                elif len(going) < width:
                    going.append((said, total))
            near([score for score, _ in group.ended])
            group.ended = sorted(group.ended, key=lambda e: -e[0])[:width]
            group.running = going
            chosen.update(said[-1] for said, _ in going)
            if not going:
                group.over = True
            elif len(group.ended) == width:
                hopeful = longest if early == NEVER and power > 0 else step
                best, worst = going[0][1] / hopeful**power, group.ended[-1][0]
                near([best, worst])
                group.over = early is True or best <= worst
    found = sorted((e for group in all_groups for e in group.ended), key=lambda e: -e[0])
    return found[:config.get("num_return_sequences", 1)], gap


def generate(model, prompts, config, **others):
    """transformers' own, on one padded batch: for each prompt, (score, new ids) best first."""
    longest = max(map(len, prompts))
    # Padded with a token that the prompt has anyhow: transformers' processors take padding for text.
    ids = torch.tensor([[p[0]] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    fields = {**config, "eos_token_id": config["eos_token_id"] or None, "pad_token_id": 0}
    out = model.generate(
        ids, attention_mask=mask, generation_config=GenerationConfig(**fields), return_dict_in_generate=True,
        output_scores=True, **others)
    n = config.get("num_return_sequences", 1)
    lengths = (out.beam_indices >= 0).sum(-1).tolist()
    rows = [
        (score, row[longest:longest + length])
        for score, row, length in zip(out.sequences_scores.tolist(), out.sequences.tolist(), lengths)
    ]
    return [rows[i:i + n] for i in range(0, len(rows), n)]


def case(model, prompts, config):
    """The expected completions of each prompt, checked both ways where both can."""
    ours, gaps = zip(*(search(model, prompt, config) for prompt in prompts))
    truth = ours
    if "num_beam_groups" not in config:
        truth = generate(model, prompts, config)
        for mine, theirs, gap in zip(ours, truth, gaps):
            same = [ids for _, ids in mine] == [ids for _, ids in theirs]
            if gap > 1e-4 and not (same and all(abs(a - b) < 2e-4 for (a, _), (b, _) in zip(mine, theirs))):
                fail(f"{config}: generate and search disagree, {gap = }\n{mine}\n{theirs}")
    return {
        "config": config, "gaps": [round(gap, 7) for gap in gaps],
        "expected": [[{"ids": ids, "score": round(score, 6)} for score, ids in rows] for rows in truth],
    }


def write(path, value):
    """One case a line."""
    head = {k: v for k, v in value.items() if k != "cases"}
    lines = ",\n".join(json.dumps(c, separators=(",", ":"), ensure_ascii=False) for c in value["cases"])
    path.write_text(json.dumps(head, ensure_ascii=False)[:-1] + f', "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{path.name}: {len(value['cases'])} cases, {path.stat().st_size} bytes")


def grid(base):
    """The configurations of the small models."""
    for early in (False, True, NEVER):
        for power in (1.0, 0.0, 2.5, -0.7):
            yield {**base, "early_stopping": early, "length_penalty": power}
        yield {**base, "early_stopping": early, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
        yield {**base, "early_stopping": early, "num_beam_groups": 2, "diversity_penalty": 0.5}
    yield {**base, "no_repeat_ngram_size": 1}
    yield {**base, "repetition_penalty": 0.8, "length_penalty": 0.6}
    yield {**base, "eos_token_id": []}
    yield {**base, "eos_token_id": [base["eos_token_id"][0]], "num_return_sequences": 1}
    yield {**base, "num_beams": 2, "num_return_sequences": 2}
    yield {**base, "num_beams": 7, "num_return_sequences": 3, "max_new_tokens": 6}
    yield {**base, "num_beams": 9, "num_return_sequences": 9, "max_new_tokens": 4, "length_penalty": 0.3}
    yield {**base, "num_beam_groups": 4, "diversity_penalty": 1.5, "length_penalty": 0.0}
    yield {**base, "num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.3, "num_return_sequences": 6,
           "repetition_penalty": 1.2}
    yield {**base, "num_beam_groups": 2, "diversity_penalty": 100.0, "eos_token_id": []}


def load(folder):
    KNOWN.clear()
    PROMPT.clear()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()
    return model


def frequent(model, count):
    """Tokens that the model likes to say, so that hypotheses end at different lengths."""
    config = {"num_beams": 8, "num_return_sequences": 8, "max_new_tokens": 10, "eos_token_id": []}
    rows = [ids for rows in generate(model, PROMPTS, config) for _, ids in rows]
    said = Counter(token for ids in rows for token in set(ids[1:]))
    return [token for token, _ in sorted(said.items(), key=lambda item: (-item[1], item[0]))[2:2 + count]]


def fixtures():
    cases, gaps, lengths = [], [], Counter()
    for name in MODELS:
        model = load(TEXT_FIXTURES / name)
        base = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 12, "eos_token_id": frequent(model, 3)}
        for config in grid(base):
            made = case(model, PROMPTS, config)
            gaps += made["gaps"]
            if min(made["gaps"]) < CLEAR:
                fail(f"{name}, {config}: decisions only {min(made['gaps']):.1e} apart; take other prompts")
            lengths.update(len(row["ids"]) for rows in made["expected"] for row in rows)
            cases.append({"model": name, **made})
    print(f"least gap {min(gaps):.1e}; lengths {dict(sorted(lengths.items()))}")
    write(TEXT_FIXTURES / "beams.json", {"versions": VERSIONS, "prompts": PROMPTS, "cases": cases})


def smollm2(folder):
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "Once upon a time, in a small village by the sea,", "def fibonacci(n):\n    "]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    stops = [2, *(tokenizer(text, add_special_tokens=False).input_ids[0] for text in (".", "\n"))]
    base = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 12, "eos_token_id": stops}
    configs = [
        {**base, "eos_token_id": [2]},
        base,
        {**base, "early_stopping": True, "length_penalty": 0.0},
        {**base, "early_stopping": NEVER, "length_penalty": 1.5},
        {**base, "length_penalty": -0.5},
        {**base, "repetition_penalty": 1.2},
        {**base, "no_repeat_ngram_size": 2, "early_stopping": NEVER, "eos_token_id": [2]},
        {**base, "num_beam_groups": 2, "diversity_penalty": 0.6},
        {**base, "num_beam_groups": 4, "diversity_penalty": 0.3, "repetition_penalty": 1.1},
    ]
    cases = []
    for config in configs:
        cases.append(case(model, prompts, config))
        print(config, cases[-1]["gaps"], flush=True)
    # Stop strings, which `search` does not know: generate alone.
    config = {**base, "eos_token_id": [2], "stop_strings": [" the", "return"]}
    rows = generate(model, prompts, config, tokenizer=tokenizer)
    cases.append({"config": config, "expected": [
        [{"ids": ids, "score": round(score, 6)} for score, ids in found] for found in rows]})
    write(TEXT_FIXTURES / "smollm2" / "beams.json", {"versions": VERSIONS, "prompts": prompts, "cases": cases})


def main():
    match sys.argv[1:]:
        case ["fixtures"]:
            fixtures()
        case ["smollm2", folder] if Path(folder).is_dir():
            smollm2(folder)
        case _:
            fail("usage: beam_fixtures.py fixtures | smollm2 MODEL_DIR")


if __name__ == "__main__":
    main()
