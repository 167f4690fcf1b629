"""What transformers' logits processors make of one random matrix of logits.

    python processor_fixtures.py

writes controlgen-text/tests/fixtures/processors/{processors.safetensors, processors.json}. See README.md.
"""

import math

from common import TEXT_FIXTURES, VERSIONS, fail, save_cases, write_json

import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as hf

ROWS, VOCABULARY, HISTORY = 4, 97, 14
EOS = [5, 60]


def inputs():
    generator = torch.Generator().manual_seed(20)
    logits = 2.5 * torch.randn(ROWS, VOCABULARY, generator=generator)
    history = torch.randint(0, VOCABULARY, (ROWS, HISTORY), generator=generator)
    # Repeated n-grams whose continuation must be banned: a 3-gram and a 2-gram in row 0, a run of one token in
    # row 1, overlapping 2-grams in row 2; row 3 repeats nothing.
    history[0] = torch.tensor([7, 8, 9, 11, 8, 9, 12, 7, 8, 13, 9, 40, 7, 8])
    history[1] = torch.tensor([3, 20, 20, 20, 20, 61, 62, 63, 20, 20, 4, 70, 20, 20])
    history[2] = torch.tensor([31, 32, 31, 32, 33, 31, 32, 31, 50, 51, 52, 33, 31, 32])
    history[3] = torch.arange(80, 80 + HISTORY)
    # Ties at the cut of top-k, and tokens that something earlier has banned.
    ties = logits.clone()
    top = ties.topk(6, dim=-1)
    ties.scatter_(1, top.indices[:, 2:6], top.values[:, 2:3].expand(-1, 4).contiguous())
    banned = logits.clone()
    banned[:, 1::3] = -math.inf
    banned[1, 1:] = -math.inf
    return {"logits": logits, "logits_ties": ties, "logits_banned": banned, "input_ids": history}


def simple(kind, argument, values, build):
    """One case a value of one argument."""
    return [(f"{kind}_{v}".replace(".", "_"), kind, {argument: v}, build(v)) for v in values]


def cases():
    eos = torch.tensor(EOS)
    # The last token of each is banned or biased where the tokens before it end the history.
    bad_words = [[10], [8, 14], [20, 20, 21], [31, 32, 34], [40, 7, 8, 15], [1, 2, 3], [93, 94]]
    biases = [[[11], 2.5], [[12], -1.5], [[8, 14], 4.0], [[20, 20, 21], -3.0], [[31, 32], 1.0], [[7, 8, 14], 0.5]]
    out = simple("temperature", "temperature", [0.25, 0.7, 1.9], lambda v: hf.TemperatureLogitsWarper(v))
    out += simple("top_k", "top_k", [1, 4, 20, 500], lambda v: hf.TopKLogitsWarper(v))
    out += simple("top_p", "top_p", [0.05, 0.5, 0.9, 0.999], lambda v: hf.TopPLogitsWarper(v))
    out += simple("min_p", "min_p", [0.02, 0.2, 0.9], lambda v: hf.MinPLogitsWarper(v))
    out += simple("typical_p", "typical_p", [0.05, 0.5, 0.95], lambda v: hf.TypicalLogitsWarper(v))
    out += simple("epsilon_cutoff", "epsilon_cutoff", [3e-3, 0.05], lambda v: hf.EpsilonLogitsWarper(v))
    out += simple("eta_cutoff", "eta_cutoff", [3e-3, 0.05], lambda v: hf.EtaLogitsWarper(v))
    out += simple("repetition_penalty", "repetition_penalty", [0.8, 1.3],
                  lambda v: hf.RepetitionPenaltyLogitsProcessor(v))
    out += simple("no_repeat_ngram_size", "no_repeat_ngram_size", [1, 2, 3, 4],
                  lambda v: hf.NoRepeatNGramLogitsProcessor(v))
    out += [
        ("bad_words", "bad_words_ids", {"bad_words_ids": bad_words}, hf.NoBadWordsLogitsProcessor(bad_words)),
        ("sequence_bias", "sequence_bias", {"sequence_bias": biases}, hf.SequenceBiasLogitsProcessor(biases)),
        ("min_length_short", "min_length", {"min_length": HISTORY + 1, "eos_token_id": EOS},
         hf.MinLengthLogitsProcessor(HISTORY + 1, eos)),
        ("min_length_reached", "min_length", {"min_length": HISTORY, "eos_token_id": EOS},
         hf.MinLengthLogitsProcessor(HISTORY, eos)),
        ("min_new_tokens_short", "min_new_tokens", {"min_new_tokens": 5, "eos_token_id": EOS, "prompt_length": 10},
         hf.MinNewTokensLengthLogitsProcessor(10, 5, eos)),
        ("min_new_tokens_reached", "min_new_tokens", {"min_new_tokens": 4, "eos_token_id": EOS, "prompt_length": 10},
         hf.MinNewTokensLengthLogitsProcessor(10, 4, eos)),
    ]
    return out


def stacks():
    """Whole configurations, in the order in which generate applies their parts."""
    return {
        "stack_sampling": dict(do_sample=True, temperature=0.7, top_k=30, top_p=0.9),
        "stack_min_p": dict(do_sample=True, temperature=1.4, top_k=0, min_p=0.05, repetition_penalty=1.2),
        "stack_all": dict(
            do_sample=True, temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, typical_p=0.9,
            repetition_penalty=1.15, no_repeat_ngram_size=3, bad_words_ids=[[10], [20, 20, 21]],
            sequence_bias=[[[11], 2.5], [[12], -1.5]], min_new_tokens=5, eos_token_id=EOS),
        "stack_greedy": dict(do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=5,
                             eos_token_id=EOS),
    }


def stacked(values, data):
    """The processors of a GenerationConfig, built by transformers itself for a prompt of 10 tokens."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=8, n_layer=1, n_head=1,
                                       bos_token_id=None, eos_token_id=None))
    config = GenerationConfig(**values)
    prepared, _ = model._prepare_generation_config(config)
    model._prepare_special_tokens(prepared, True, device="cpu")
    processors = model._get_logits_processor(generation_config=prepared, input_ids_seq_length=10, device="cpu")
    names = [type(p).__name__ for p in processors]
    return processors(data["input_ids"], data["logits"].clone()), names


def firm(name, processor, ids, logits, scores):
    """No token may hang on rounding: double precision must ban the same ones."""
    try:
        exact = processor(ids, logits.double())
    except RuntimeError:  # a few processors hold f32 biases; they ban nothing by value
        return
    if not torch.equal(exact.isinf(), scores.isinf()):
        fail(f"{name}: f32 and f64 keep different tokens")


def main():
    torch.set_num_threads(1)
    data = inputs()
    tensors, index = dict(data), []

    def add(name, kind, parameters, scores, source, **more):
        if torch.isnan(scores).any() or scores.isinf().all(dim=-1).any():
            fail(f"{name} gives NaN or bans all tokens of a row")
        tensors[f"{name}.scores"] = scores
        index.append({"name": name, "kind": kind, "parameters": parameters, "input": source,
                      "output": f"{name}.scores", **more})

    for name, kind, parameters, processor in cases():
        # Eta sampling refuses tokens that are banned already.
        for source in ("logits",) if kind == "eta_cutoff" else ("logits", "logits_banned", "logits_ties"):
            scores = processor(data["input_ids"], data[source].clone())
            firm(f"{name} on {source}", processor, data["input_ids"], data[source], scores)
        add(name, kind, parameters, processor(data["input_ids"], data["logits"].clone()), "logits")
        if kind in ("top_k", "top_p", "min_p", "typical_p", "temperature", "repetition_penalty"):
            add(f"{name}_banned", kind, parameters, processor(data["input_ids"], data["logits_banned"].clone()),
                "logits_banned")
        if kind == "top_k":
            # Every token tied with the k-th is kept.
            add(f"{name}_ties", kind, parameters, processor(data["input_ids"], data["logits_ties"].clone()),
                "logits_ties")
    # The normalised form of the penalty acts on log-probabilities.
    for penalty in (0.8, 1.3):
        scores = hf.RepetitionPenaltyLogitsProcessor(penalty)(data["input_ids"], data["logits"].log_softmax(-1))
        add(f"repetition_penalty_normalised_{penalty}".replace(".", "_"), "repetition_penalty_normalised",
            {"repetition_penalty": penalty}, scores, "logits")
    for name, values in stacks().items():
        scores, order = stacked(values, data)
        add(name, "generation_config", {**values, "prompt_length": 10}, scores, "logits", order=order)

    unchanged = [c["name"] for c in index if torch.equal(tensors[c["output"]], tensors[c["input"]])]
    expected = {"top_k_500", "top_k_500_banned", "top_k_500_ties", "min_length_reached", "min_new_tokens_reached"}
    if set(unchanged) != expected:
        fail(f"these cases change nothing: {sorted(set(unchanged) - expected)}; "
             f"these should not: {sorted(expected - set(unchanged))}")
    folder = TEXT_FIXTURES / "processors"
    folder.mkdir(parents=True, exist_ok=True)
    save_cases(folder / "processors.safetensors", tensors, "float32")
    (folder / "processors.safetensors").chmod(0o644)
    write_json(folder / "processors.json", {"versions": VERSIONS, "cases": index})
    print(f"{len(index)} cases")
    for case in index:
        if case["kind"] == "generation_config":
            print(case["name"], case["order"])


if __name__ == "__main__":
    main()
