"""The sentence embeddings of 200 texts by all-MiniLM-L6-v2: `../data/sentence_embeddings.safetensors`.

    python sentence_truth.py MODEL_DIR

MODEL_DIR is what `cargo xtask setup --models` puts into .controlgen/models/all-minilm-l6-v2. transformers runs the
model and its tokenizer; what sentence-transformers does around them (cutting to max_seq_length, the mean over the
tokens, the length of 1) is written out here, from its configuration files. The vectors are stored in f16.

`cargo run -p benches --bin sentence-parity` holds ours to them. The texts are made of `../data/concept_sets.json`, by the
same rule in both: text i lists the sets i, i + 1, …, 1 + (7 i mod 60) of them; some are longer than the model reads.
"""

import json
import sys
from pathlib import Path

from common import ROOT, fail, save_cases

import torch
from transformers import AutoModel, AutoTokenizer

DATA = ROOT / "benches" / "data"


def texts():
    sets = json.loads((DATA / "concept_sets.json").read_text())["sets"]
    listed = [", ".join(forms[0] for forms in concepts) for concepts in sets]
    return [". ".join(listed[(i + j) % len(listed)] for j in range(1 + 7 * i % 60)) for i in range(len(listed))]


@torch.no_grad()
def main():
    if len(sys.argv) != 2:
        fail("expected MODEL_DIR")
    folder = Path(sys.argv[1])
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    modules = [module["type"].rsplit(".", 1)[1] for module in json.loads((folder / "modules.json").read_text())]
    if modules != ["Transformer", "Pooling", "Normalize"] or not pooling["pooling_mode_mean_tokens"]:
        fail(f"expected a mean and a norm, found {modules}, {pooling}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows, cut = [], 0
    for text in texts():
        cut += len(tokenizer(text, truncation=False, padding=False)["input_ids"]) > longest
        inputs = tokenizer(text, truncation=True, max_length=longest, padding=False, return_tensors="pt")
        mean = model(**inputs).last_hidden_state[0].mean(0)
        rows.append(torch.nn.functional.normalize(mean, dim=0))
    embeddings = torch.stack(rows).half()
    file = DATA / "sentence_embeddings.safetensors"
    save_cases(file, {"embeddings": embeddings}, "all-MiniLM-L6-v2, f32, stored in f16")
    file.chmod(0o644)
    print(f"{tuple(embeddings.shape)}; {cut} texts were cut")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
