"""Self-BLEU by nltk, for `controlgen-text/tests/fixtures/evaluation.json`.

    python -m venv nltk-env && nltk-env/bin/pip install nltk==3.10.4
    nltk-env/bin/python evaluation_fixtures.py
"""

import json
import random
import re
from pathlib import Path

import nltk
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

assert nltk.__version__ == "3.10.4", nltk.__version__
FIXTURES = Path(__file__).resolve().parents[2] / "controlgen-text" / "tests" / "fixtures"
SUBJECTS = ["The old dog", "A child", "My friend's cat", "Nobody", "The dog"]
VERBS = ["runs to", "looks at", "has never seen", "runs after"]
OBJECTS = ["the sea.", "a red ball!", "the old dog", "the sea, the sea, the sea", "a child in the park"]


def main() -> None:
    draw = random.Random(7)
    texts = [" ".join(draw.choice(part) for part in (SUBJECTS, VERBS, OBJECTS)) for _ in range(14)]
    # As short as can be, and unlike all others.
    texts += ["Sea.", "Unheard-of things happen", "the dog the dog the dog the dog"]
    words = [re.findall(r"[a-z0-9]+", text.lower()) for text in texts]
    smooth = SmoothingFunction().method1
    cases = {}
    for most in range(1, 6):
        weights = [1 / most] * most
        each = [
            sentence_bleu(words[:i] + words[i + 1 :], one, weights, smoothing_function=smooth)
            for i, one in enumerate(words)
        ]
        cases[str(most)] = sum(map(float, each)) / len(each)
    value = {"nltk": nltk.__version__, "texts": texts, "self_bleu": cases}
    (FIXTURES / "evaluation.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
