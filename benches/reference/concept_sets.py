"""Sets of everyday words that go together, with their inflections: `../data/concept_sets.json`.

    python concept_sets.py EMOJILIB/dist/emoji-en-US.json WORDNET_DIRECTORY

What goes together are keywords of one emoji (npm `emojilib` 4.0.3, MIT). WordNet 3.0 (Debian `wordnet-base` 1:3.0-37,
`/usr/share/wordnet`) says which of them are everyday words (by the counts of its sense-tagged texts), what parts of
speech they have, and their irregular inflections; the regular ones follow the rules below. Nothing is drawn: the same
files give the same sets.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from common import ROOT, fail, write_json

SETS = 200
SIZES = (3, 4, 5)
# A word is in no more sets than this.
MOST = 4
# Occurrences in WordNet's tagged texts that make a word an everyday one.
EVERYDAY = 4
# The first of the emoji that are symbols, not things.
SYMBOLS = "🏧"
# What emoji share that are not alike; grammatical words; what nobody should have to say.
LEFT_OUT = set(
    """face human person people man woman men women male female boy girl sign symbol icon shape object emotion feeling
    expression gesture body activity other include like left right forward back next new old good bad big small cool
    nice fine not stop yes up down top end start one two three four five six seven eight nine ten hundred point number
    letter alphabet arrow red blue green yellow black white purple orange brown color set round square button mark
    thing stuff kind type part line dot ring general second minute hour time clock late early first last double triple
    single half full tone level place pick let get put have take make gua wip bin aid lot
    weapon kill gun sex breast drug violence death dead die blood skull hell devil evil gay race arab christian jew
    muslim hindu religion god poop crap shit butt ass fart naked damn bomb pistol knife suicide war black cult pregnancy
    japan christ bourbon whisky sake liquor probe funeral rip cop pant can out lower tip bearer then here above well amount way medium progress standard middle neutral feature admission
    arrest crime cigarette smoke alcohol drunk""".split()
)
PARTS = {"1": "n", "2": "v", "3": "a", "5": "a"}


def read_wordnet(folder: Path):
    """Lemmas by part of speech, their counts, and the irregular inflections of each."""
    lemmas = {}
    for part, name in (("n", "noun"), ("v", "verb"), ("a", "adj")):
        lines = (folder / f"data.{name}").read_text(encoding="utf-8").splitlines()
        fields = (line.split(" | ")[0].split(" ") for line in lines if not line.startswith(" "))
        # Word by word, each followed by a number; names begin with a capital.
        lemmas[part] = {word for row in fields for word in row[4 : 4 + 2 * int(row[3], 16) : 2]}
    counts = Counter()
    for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        key, _, count = line.split()
        lemma, sense = key.split("%")
        if sense[0] in PARTS:
            counts[lemma, PARTS[sense[0]]] += int(count)
    irregular = {}
    for part, name in (("n", "noun"), ("v", "verb"), ("a", "adj")):
        for line in (folder / f"{name}.exc").read_text(encoding="utf-8").splitlines():
            inflected, *of = line.split()
            for lemma in of:
                irregular.setdefault((lemma, part), []).append(inflected)
    return lemmas, counts, irregular


def sibilant(word: str) -> bool:
    return word.endswith(("s", "x", "z", "ch", "sh"))


def with_s(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if sibilant(word) or word.endswith("o") and word[-2] not in "aeiou" else "s")


def doubled(word: str) -> str:
    """The last consonant of a short stressed syllable is written twice: stop, stopping."""
    short = len(word) >= 3 and word[-1] not in "aeiouwxy" and word[-2] in "aeiou" and word[-3] not in "aeiou"
    syllables = sum(a in "aeiouy" and b not in "aeiouy" for a, b in zip(word, word[1:] + "."))
    return word + word[-1] if short and syllables == 1 else word


def with_vowel(word: str, ending: str) -> str:
    """`ending` is ed, ing, er or est."""
    if word.endswith("ie") and ending == "ing":
        return word[:-2] + "ying"
    if word.endswith("e") and not (ending == "ing" and word.endswith(("ee", "oe", "ye"))):
        return word[:-1] + ending
    if word.endswith("y") and word[-2] not in "aeiou" and ending != "ing":
        return word[:-1] + "i" + ending
    return doubled(word) + ending


def inflections(word: str, parts, irregular) -> list:
    """All forms of a word, itself first. A rule gives way to exceptions that do the same."""
    forms = [word]
    for part in parts:
        exceptions = irregular.get((word, part), [])
        if part == "n":
            forms += exceptions or [with_s(word)]
        if part == "v":
            forms += [with_s(word)]
            past = [form for form in exceptions if not form.endswith("ing")]
            ing = [form for form in exceptions if form.endswith("ing") and form != word]
            # Learnt, and learned.
            both = not past or any(form.endswith("t") and word[:3] == form[:3] and len(form) > 4 for form in past)
            forms += past + ([with_vowel(word, "ed")] if both and word[-1] in "nmlr" or not past else [])
            forms += ing or [with_vowel(word, "ing")]
        if part == "a" and len(word) <= 6:
            forms += exceptions or [with_vowel(word, "er"), with_vowel(word, "est")]
    return list(dict.fromkeys(forms))


def main() -> None:
    if len(sys.argv) != 3:
        fail("expected emoji-en-US.json and WordNet's directory")
    emoji = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lemmas, counts, irregular = read_wordnet(Path(sys.argv[2]))

    def parts_of(word: str) -> str:
        """The parts of speech that the word is used as, the commonest first."""
        used = [part for part in "nva" if word in lemmas[part] and counts[word, part] > 0]
        total = sum(counts[word, part] for part in used)
        # What it hardly ever is gives strange inflections.
        used = [part for part in used if 5 * counts[word, part] >= total]
        return "".join(sorted(used, key=lambda part: -counts[word, part]))

    def everyday(word: str) -> bool:
        letters = word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 9
        if not letters or word in LEFT_OUT:
            return False
        return sum(counts[word, part] for part in "nva") >= EVERYDAY and parts_of(word) != ""

    plain = {}
    for part in "nv":
        for lemma in sorted(lemma for lemma in lemmas[part] if len(lemma) > 2 and counts[lemma, part] >= EVERYDAY):
            for form in inflections(lemma, part, irregular)[1:]:
                plain.setdefault(form, lemma)

    def base(word: str) -> str:
        """The plain form of an inflected one, where that is the commoner word."""
        total = lambda word: sum(counts[word, part] for part in "nva")
        lemma = plain.get(word, word)
        return lemma if total(lemma) > total(word) else word

    used, seen, sets = Counter(), set(), []
    things = list(emoji)[: list(emoji).index(SYMBOLS)]
    for keywords in (emoji[one] for one in things):
        words, forms = [], set()
        for word in dict.fromkeys(base(part) for keyword in keywords for part in keyword.split("_")):
            if not everyday(word) or used[word] == MOST:
                continue
            own = set(inflections(word, parts_of(word), irregular))
            # "ski" and "skiing" say the same.
            if own & forms or any(word.startswith(other) or other.startswith(word) for other in words):
                continue
            words.append(word)
            forms |= own
        # Things first, then what is done; qualities only where there is nothing else.
        words.sort(key=lambda word: parts_of(word)[0] == "a")
        words = words[: SIZES[len(sets) % len(SIZES)]]
        key = tuple(sorted(words))
        alike = any(len(set(key) & set(other)) > 1 for other in seen)
        if len(words) < SIZES[0] or alike:
            continue
        seen.add(key)
        used.update(words)
        sets.append([inflections(word, parts_of(word), irregular) for word in words])
    print(f"{len(sets)} sets, {len(used)} words", file=sys.stderr)
    if len(sets) < SETS:
        fail(f"{len(sets)} sets, fewer than {SETS}")
    # Spread over all kinds of emoji.
    sets = [sets[i * len(sets) // SETS] for i in range(SETS)]
    about = (
        "Concept sets: for each word its forms, the plain one first. Made by benches/reference/concept_sets.py from the "
        "keywords of emojilib 4.0.3 (MIT, Mu-An Chiou and contributors) and the lexicon of WordNet 3.0 (Copyright 2006 "
        "by Princeton University, WordNet licence)."
    )
    lines = ",\n".join(json.dumps(one) for one in sets)
    text = f'{{"about": {json.dumps(about)},\n"sets": [\n{lines}\n]}}\n'
    (ROOT / "benches" / "data" / "concept_sets.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
