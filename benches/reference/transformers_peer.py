"""transformers' generate behind the command line of `conformance generate`; also a server that loads once.

    python transformers_peer.py MODEL_DIR --prompt TEXT | --input-ids 1,2,3
        [--max-new-tokens 64] [--rows 1] [--repeat 1] [--dtype f32|bf16] [--threads 2]
    python transformers_peer.py MODEL_DIR --serve [--dtype f32|bf16] [--threads 2]

One JSON line a run. The server reads one JSON object a line: {"input_ids": [...], "max_new_tokens": n, "rows": r}, or
{"bandwidth": true} for the speed in bytes a second at which this process reads memory.
"""

import argparse
import json
import sys
import time

from common import fail

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList


class FirstToken(LogitsProcessor):
    """Notes when the logits of the first new token are there."""

    def __init__(self):
        self.at = None

    def __call__(self, input_ids, scores):
        if self.at is None:
            self.at = time.perf_counter()
        return scores


def generate(model, ids, new_tokens, rows):
    """Greedy; several rows as samples of one prompt, with top-k of 1, which is what num_return_sequences allows."""
    prompt = torch.tensor([ids])
    first = FirstToken()
    several = dict(do_sample=True, top_k=1, num_return_sequences=rows) if rows > 1 else dict(do_sample=False)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            logits_processor=LogitsProcessorList([first]), **several)
    end = time.perf_counter()
    new = out[:, len(ids):].tolist()
    return {
        "sequences": [{"ids": row} for row in new], "prompt_tokens": len(ids), "prefill_seconds": first.at - start,
        "decode_seconds": end - first.at, "tokens_per_second": rows * new_tokens / (end - start),
    }


def bandwidth():
    """Best of ten: the sum of 512 MB."""
    data = torch.ones(128 * 2**20)
    best = min(timed(data.sum) for _ in range(10))
    return {"bytes_per_second": data.numel() * 4 / best}


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--prompt")
    parser.add_argument("--input-ids")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype).eval()
    if a.serve:
        for line in sys.stdin:
            request = json.loads(line)
            if request.get("bandwidth"):
                answer = bandwidth()
            else:
                answer = generate(model, request["input_ids"], request["max_new_tokens"], request["rows"])
            print(json.dumps(answer), flush=True)
        return
    if (a.prompt is None) == (a.input_ids is None):
        fail("give either --prompt or --input-ids")
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    ids = [int(i) for i in a.input_ids.split(",")] if a.input_ids else tokenizer(a.prompt).input_ids
    for _ in range(a.repeat):
        answer = generate(model, ids, a.max_new_tokens, a.rows)
        for row in answer["sequences"]:
            row["text"] = tokenizer.decode(row["ids"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
