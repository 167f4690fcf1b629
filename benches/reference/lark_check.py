"""Parses texts with Python's lark: the grammars of `structured-output --kind lark --texts FILE`.

    python lark_check.py FILE          (pip install lark==1.3.1)

The file is JSON lines with `kind`, `source` and `text`. Terminals that the grammar writes within rules are kept.
"""

import json
import sys

from lark import Lark
from lark.exceptions import LarkError


def main(path):
    parsers, valid, total = {}, 0, 0
    for line in open(path, encoding="utf-8"):
        case = json.loads(line)
        if case["kind"] != "lark":
            continue
        source = case["source"]
        if source not in parsers:
            parsers[source] = Lark(source, parser="earley", keep_all_tokens=True)
        total += 1
        try:
            parsers[source].parse(case["text"])
            valid += 1
        except LarkError as error:
            print(f"{case['text']!r}: {error}")
    print(f"{valid} of {total} texts parsed by lark, {len(parsers)} grammars")
    return valid == total and total > 0


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1]))
