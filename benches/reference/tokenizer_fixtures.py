"""Small tokenizers of three families, and what transformers, tokenizers and sentencepiece make of texts and ids.

    python tokenizer_fixtures.py

writes controlgen-text/tests/fixtures/tokenizer/:

* byte_level/, pieces/, wordpiece/: directories as on a hub, each with `cases.json`: `encode` holds
  `{text, ids, plain}` (with and without special tokens added), `decode` `{ids, text, skipped}` (with special
  tokens kept and skipped), by transformers. In pieces/, `sentencepiece` holds `{ids, text}` by sentencepiece itself:
  byte tokens that are not UTF-8, where transformers replaces the valid characters around them too.
* gguf.json: vocabularies as GGUF metadata states them, and `{text, ids}` for each pre-tokenizer by the tokenizers
  library, put together by hand as the models' own tokenizer.json are, and by sentencepiece.
"""

import io
import json

from common import TEXT_FIXTURES, write_json
from tokenizer_strings import CODE, EMOJI, LANGUAGES, NUMBERS, WORDS, Stream, strings

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

FOLDER = TEXT_FIXTURES / "tokenizer"
CORPUS = LANGUAGES * 2 + CODE * 3 + WORDS + NUMBERS + EMOJI[:8]
# Texts with control characters and special tokens among them; one in eight of the thousand.
TEXTS = strings()[::8] + ["", " hi", "  hi", "hi ", "a<s>b</s> c", "<s> x", "x\n\ny  1\t22"]

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def random_ids(count, size, favourites, seed):
    """Lists of ids; the favourites (bytes, special tokens) come in runs."""
    stream = Stream(seed)
    lists = [[]]
    for _ in range(count):
        row = []
        while len(row) < 1 + stream.below(12):
            if stream.below(2):
                row += [stream.pick(favourites) for _ in range(1 + stream.below(4))]
            else:
                row.append(stream.below(size))
        lists.append(row)
    return lists


def save(name, tokenizer, config, favourites, more=None, keep_ids=lambda ids: True):
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    for file, content in (more or {}).items():
        write_json(folder / file, content)
    peer = AutoTokenizer.from_pretrained(folder)
    encode = [{"text": text, "ids": peer(text).input_ids, "plain": peer(text, add_special_tokens=False).input_ids}
              for text in TEXTS]
    lists = [row["ids"] for row in encode] + random_ids(100, len(peer), favourites, seed=1)
    decode = [{"ids": ids, "text": peer.decode(ids), "skipped": peer.decode(ids, skip_special_tokens=True)}
              for ids in lists if keep_ids(ids)]
    return folder, peer, {"vocab_size": len(peer), "bos": peer.bos_token_id, "pad": peer.pad_token_id,
                          "encode": encode, "decode": decode}


def write_cases(folder, cases):
    """One case a line."""
    lists = {key: value for key, value in cases.items() if isinstance(value, list)}
    plain = {key: value for key, value in cases.items() if key not in lists}
    text = json.dumps(plain)[:-1]
    for key, rows in lists.items():
        body = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        text += f',\n"{key}": [\n{body}\n]'
    (folder / "cases.json").write_text(text + "}\n", encoding="utf-8")


def byte_level():
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|pad|>"]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("｜sep｜", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)])
    # Truncation in the file: transformers does not apply it unless asked.
    tokenizer.enable_truncation(8)
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    # With `added_tokens_decoder`, transformers does not read special_tokens_map.json.
    config = {"added_tokens_decoder": {str(i): {"content": t, "special": i < 3, **flags} for i, t in
                                       [(0, "<s>"), (1, "</s>"), (2, "<|pad|>"), (tokenizer.token_to_id("<think>"), "<think>")]},
              "image_token": "<|image|>", "add_bos_token": False, "chat_template": "{{ image_token }}{{ bos_token }}",
              "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", **flags},
              "pad_token": "<|pad|>", "additional_special_tokens": ["<|tool|>"]}
    favourites = [tokenizer.token_to_id(c) for c in sorted(pre_tokenizers.ByteLevel.alphabet())] + [0, 1, 2, 700, 701]
    folder, _, cases = save("byte_level", tokenizer, config, favourites, {"special_tokens_map.json": {"pad_token": "<never read>"}})
    write_cases(folder, cases)


def sentencepiece_model():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LANGUAGES[:24] * 2 + CODE * 3 + WORDS[:40]), model_writer=file, vocab_size=640, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


def pieces_of(model):
    kind = lambda i: (2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1)
    return [(model.id_to_piece(i), model.get_score(i), kind(i)) for i in range(model.get_piece_size())]


def pieces(model):
    vocabulary = pieces_of(model)
    ids = {piece: i for i, (piece, _, _) in enumerate(vocabulary)}
    known = {piece for piece, _, kind in vocabulary if kind == 1}
    merges = [(-score, ids[p[:at]], ids[p[at:]], p[:at], p[at:]) for p, score, kind in vocabulary if kind == 1
              for at in range(1, len(p)) if p[:at] in known and p[at:] in known]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[m[3:] for m in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    # transformers ignores `add_…_token` beside a tokenizer.json, and special_tokens_map.json overrides.
    config = {"add_bos_token": False, "add_eos_token": True, "unk_token": "<overridden>", "legacy": False}
    more = {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}, "unk_token": "<unk>"},
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}}
    byte_ids = [i for i, (_, _, kind) in enumerate(vocabulary) if kind == 6]

    def valid(ids):
        """Whether every run of byte tokens is UTF-8, so that transformers' decoding loses nothing."""
        run = b""
        for i in [*ids, 0]:
            if i in byte_ids:
                run += bytes([byte_ids.index(i)])
                continue
            try:
                run.decode()
            except UnicodeDecodeError:
                return False
            run = b""
        return True

    favourites = byte_ids[:0x80] + [1, 2]
    folder, peer, cases = save("pieces", tokenizer, config, favourites, more, valid)
    lists = [row for row in random_ids(120, len(vocabulary), byte_ids, seed=2) if not {0, 1, 2} & set(row)
             # A text that begins with the byte token of a space: transformers strips it, sentencepiece does not.
             and row[:1] != [byte_ids[0x20]]]
    cases["sentencepiece"] = [{"ids": ids, "text": model.decode(ids)} for ids in lists]
    write_cases(folder, cases)


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(LANGUAGES[:12] + CODE[:12] + WORDS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    folder, _, cases = save("wordpiece", tokenizer, config, [2, 3])
    write_cases(folder, cases)


def gguf(model):
    """The vocabularies as GGUF metadata states them."""
    bpe = Tokenizer(models.BPE())
    # Merges learned across digits and spaces, so that every pre-tokenizer gives other ids.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=760, special_tokens=["<|begin|>", "<|end|>", "<|turn|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=8)
    numbers = [f"{a}{b}{c}" for a in ("", " ", "  ", "\n\n") for b in ("1", "20", "345", "²") for c in ("", "6", "789", " x")]
    bpe.train_from_iterator([text for text in CORPUS if len(text) < 40] + numbers * 8, trainer)
    model_json = json.loads(bpe.to_str())["model"]
    tokens = sorted(model_json["vocab"], key=model_json["vocab"].get)
    kinds = [3 if i < 3 else 1 for i in range(len(tokens))] + [4]
    tokens.append("<think>")

    def built(pre):
        ignore = pre == "llama-bpe"
        tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m) for m in model_json["merges"]], ignore_merges=ignore))
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        split = lambda regex: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), plain])
        tokenizer.pre_tokenizer = {"gpt-2": gpt2, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), gpt2]),
                                   "llama-bpe": split(LLAMA3), "qwen2": split(QWEN2)}[pre]
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens[:3]])
        tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
        return tokenizer

    texts = strings()[::12] + ["a <think> b<|turn|>c", "x  12", "Å ﬁ e\u0301", "\n\n345", "I'LL we'll"]
    cases = {pre: [{"text": t, "ids": built(pre).encode(t, add_special_tokens=False).ids} for t in texts]
             for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")}
    for a, b in [(a, b) for a in cases for b in cases if a < b]:
        assert sum(x != y for x, y in zip(cases[a], cases[b])) >= 3, (a, b)
    vocabulary = pieces_of(model)
    # sentencepiece reads no special tokens in text.
    plain = [t for t in TEXTS if "<" not in t and "\u2581" not in t and "\0" not in t]
    value = {
        "byte_level": {"tokens": tokens, "token_type": kinds, "merges": [" ".join(m) for m in model_json["merges"]], "cases": cases},
        "pieces": {"tokens": [v[0] for v in vocabulary], "scores": [v[1] for v in vocabulary], "token_type": [v[2] for v in vocabulary],
                   "cases": [{"text": t, "ids": model.encode(t)} for t in plain]},
    }
    write_json(FOLDER / "gguf.json", value, compact=True)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    byte_level()
    trained = sentencepiece_model()
    pieces(trained)
    wordpiece()
    gguf(trained)
