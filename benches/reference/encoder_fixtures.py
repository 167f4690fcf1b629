"""Random small encoders and encoder-decoders with what transformers computes for them.

    python encoder_fixtures.py [NAME ...]

writes controlgen-text/tests/fixtures/NAME/{config.json, model.safetensors, cases.safetensors}. See README.md
beside this file for the names and shapes inside cases.safetensors.

As text_fixtures.py does, the script refuses to write a fixture that could not catch an error: every alteration listed
with it must move the outputs by at least SENSITIVE, and eager f32, SDPA f32 and eager f64 must agree within AGREE.
"""

import copy
import shutil
import sys

from common import TEXT_FIXTURES, fail, randomise, save_cases
from text_fixtures import AGREE, setting, weights_like

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, RobertaConfig, RobertaForMaskedLM,
    RobertaForSequenceClassification, T5Config, T5ForConditionalGeneration,
)

SENSITIVE = 1e-3
GREEDY_GAP = 5e-4
NEW_TOKENS = 20


def bert_like(config_class, **changes):
    base = dict(
        vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, type_vocab_size=3, layer_norm_eps=1e-3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return config_class(**{**base, **changes})


def roberta(**changes):
    return bert_like(RobertaConfig, **{**dict(type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2), **changes})


def t5(**changes):
    base = dict(
        vocab_size=53, d_model=24, d_kv=5, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, layer_norm_epsilon=1e-3,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )
    return T5Config(**{**base, **changes})


def no_output_bias(config, weights):
    """Of a masked language model, under both of its names."""
    hit = [k for k in weights if k.endswith(("predictions.bias", "lm_head.bias", "decoder.bias"))]
    assert hit, "no output bias"
    for k in hit:
        weights[k] = torch.zeros_like(weights[k])


LABELS = {0: "bad", 1: "so so", 2: "good"}
BERT = {
    "eps": setting(layer_norm_eps=1e-5),
    "tanh gelu": setting(hidden_act="gelu_new"),
    "heads": setting(num_attention_heads=3),
    "no positions": weights_like("position_embeddings", 0.0),
    "no types": weights_like("token_type_embeddings", 0.0),
    "no q bias": weights_like("query.bias", 0.0),
    "no v bias": weights_like("value.bias", 0.0),
    "norms of ones": weights_like("output.LayerNorm.weight", 1.0),
}
T5 = {
    "eps": setting(layer_norm_epsilon=1e-5),
    "buckets": setting(relative_attention_num_buckets=8, relative_attention_max_distance=9),
    "no encoder bias": weights_like("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", 0.0),
    "no decoder bias": weights_like("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", 0.0),
    "final norm of ones": weights_like("final_layer_norm", 1.0),
}

# name -> (configuration, class, storage, alterations)
FIXTURES = {
    "bert": (lambda: bert_like(BertConfig), BertModel, "plain", BERT),
    "bert_masked_lm": (lambda: bert_like(BertConfig, num_attention_heads=6, hidden_act="relu"), BertForMaskedLM, "plain",
                       BERT | {"heads": setting(num_attention_heads=4), "tanh gelu": setting(hidden_act="gelu"),
                               "no output bias": no_output_bias,
                               "no transform bias": weights_like("transform.dense.bias", 0.0)}),
    "bert_classifier": (lambda: bert_like(BertConfig, hidden_act="silu", id2label=LABELS, label2id={v: k for k, v in LABELS.items()}),
                        BertForSequenceClassification, "bert hub",
                        BERT | {"no pooler bias": weights_like("pooler.dense.bias", 0.0),
                                "no output bias": weights_like("classifier.bias", 0.0)}),
    "roberta_masked_lm": (lambda: roberta(tie_word_embeddings=False), RobertaForMaskedLM, "plain",
                          BERT | {"padding": setting(pad_token_id=0),
                                  "no output bias": no_output_bias}),
    "roberta_classifier": (lambda: roberta(hidden_act="gelu_new", pad_token_id=2, id2label=LABELS, label2id={v: k for k, v in LABELS.items()}),
                           RobertaForSequenceClassification, "plain",
                           BERT | {"padding": setting(pad_token_id=0), "tanh gelu": setting(hidden_act="relu"),
                                   "no dense bias": weights_like("classifier.dense.bias", 0.0)}),
    "t5_v1_0": (lambda: t5(), T5ForConditionalGeneration, "plain",
                T5 | {"no scale": setting(scale_decoder_outputs=False), "gelu": setting(feed_forward_proj="gelu")}),
    "t5_v1_1": (lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=None, d_kv=8),
                T5ForConditionalGeneration, "untied",
                T5 | {"scale": setting(scale_decoder_outputs=True),
                      "exact gelu": setting(dense_act_fn="gelu")}),
}


def is_t5(config):
    return config.model_type == "t5"


def inputs(config, seed):
    """Calls of the model: whole rows, right-padded, left-padded; token types; positions that are given."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape):
        return torch.randint(3, config.vocab_size, shape, generator=generator)

    length = 17 if is_t5(config) else 9
    lengths = torch.tensor([length, 4, 6])
    column = torch.arange(length)
    left = (column >= length - lengths[:, None]).long()
    right = (column < lengths[:, None]).long()

    def padded(mask):
        tokens = ids(3, length)
        return {"input_ids": tokens * mask + config.pad_token_id * (1 - mask), "attention_mask": mask}

    cases = {"plain": {"input_ids": ids(3, length)}, "right": padded(right), "left": padded(left)}
    if is_t5(config):
        decoder = torch.cat([torch.zeros(3, 1, dtype=torch.long), ids(3, 14)], 1)
        for case in cases.values():
            case["decoder_input_ids"] = decoder
        # Padding among the decoder's tokens, which only the mask hides.
        mask = torch.ones(3, 15, dtype=torch.long)
        mask[1, 9:] = 0
        mask[2, 4:] = 0
        cases["decoder"] = {**padded(right), "decoder_input_ids": decoder, "decoder_attention_mask": mask}
        return cases
    # Only the mask hides these: none is the padding token.
    cases["masked"] = {"input_ids": ids(3, length), "attention_mask": left}
    if config.type_vocab_size > 1:
        types = torch.randint(0, config.type_vocab_size, (3, length), generator=generator)
        cases["types"] = {**padded(right), "token_type_ids": types}
    last = config.max_position_embeddings - 1
    apart = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13], [0, 2, 3, 7, 11, 19, last - 9, last - 1, last]])
    cases["positions"] = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long), "position_ids": apart}
    return cases


@torch.no_grad()
def outputs(model, case):
    """The fields that are compared, those of padding set to 0."""
    mask = case.get("attention_mask", torch.ones_like(case["input_ids"]))[..., None]
    decoder_mask = case.get("decoder_attention_mask", torch.tensor(1))
    if is_t5(model.config):
        out = model(**case, use_cache=False)
        decoder_mask = decoder_mask[..., None] if decoder_mask.ndim else decoder_mask
        return {"encoder_last_hidden_state": out.encoder_last_hidden_state * mask, "logits": out.logits * decoder_mask}
    body = model.base_model(**case)
    found = {"last_hidden_state": body.last_hidden_state * mask}
    if body.pooler_output is not None:
        found["pooler_output"] = body.pooler_output
    if model.base_model is not model:
        logits = model(**case).logits
        found["logits"] = logits * mask if logits.ndim == 3 else logits
    return found


def rebuild(kind, config, weights, attention="eager"):
    model = kind._from_config(config, attn_implementation=attention)
    if untied(weights):
        model.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"].clone())
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        fail(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()


def untied(weights):
    return "shared.weight" in weights and not weights["shared.weight"].equal(weights["lm_head.weight"])


def distance(found, truth):
    return max((found[k] - truth[k]).abs().max().item() for k in truth)


def furthest(model, cases, truth):
    return max(distance(outputs(model, case), truth[name]) for name, case in cases.items())


def sensitivity(kind, config, weights, cases, truth, alterations):
    """The largest change of any output for each alteration."""
    moved = {}
    for name, alter in alterations.items():
        changed_config, changed_weights = config.to_dict(), {k: v.clone() for k, v in weights.items()}
        alter(changed_config, changed_weights)
        rebuilt = type(config).from_dict(changed_config)
        for field in ("scale_decoder_outputs", "dense_act_fn"):
            if field in changed_config:
                setattr(rebuilt, field, changed_config[field])
        if "feed_forward_proj" in changed_config and changed_config["feed_forward_proj"] != config.feed_forward_proj:
            rebuilt.dense_act_fn = changed_config["feed_forward_proj"]
        moved[name] = furthest(rebuild(kind, rebuilt, changed_weights), cases, truth)
    return moved


@torch.no_grad()
def continuations(model, case):
    """What generate makes of the encoder's input: greedy, beams, and greedy under processors that look back."""
    common = dict(input_ids=case["input_ids"], attention_mask=case["attention_mask"], do_sample=False,
                  max_new_tokens=NEW_TOKENS, pad_token_id=0, return_dict_in_generate=True, use_cache=False)
    greedy = model.generate(**common, num_beams=1, eos_token_id=None, output_logits=True)
    steps = torch.stack(greedy.logits, dim=1).log_softmax(-1)
    top = steps.topk(2, dim=-1).values
    gap = (top[..., 0] - top[..., 1]).min().item()
    new = greedy.sequences[:, 1:]
    # The end token of the beams: the one that the liveliest row comes to last.
    rows = [list(dict.fromkeys(row.tolist())) for row in new]
    eos = max(rows, key=len)[-1]
    beams = model.generate(**common, num_beams=4, num_return_sequences=3, length_penalty=0.7, eos_token_id=eos,
                           output_scores=True)
    looking_back = model.generate(**common, num_beams=1, eos_token_id=None, repetition_penalty=1.7, no_repeat_ngram_size=2)
    tensors = {
        "greedy.new_ids": new, "greedy.logprobs": steps.gather(-1, new[..., None])[..., 0],
        "stop.eos_token_id": torch.tensor([eos]),
        "beams.new_ids": beams.sequences[:, 1:], "beams.scores": beams.sequences_scores,
        "processed.new_ids": looking_back.sequences[:, 1:],
    }
    lively = sum(map(len, rows)) >= 10
    scores = beams.sequences_scores.view(3, 3)
    apart = (scores[:, :-1] - scores[:, 1:]).min().item()
    return tensors, gap, lively and apart >= 1e-3


def write_weights(model, folder, layout):
    """config.json and weights as `save_pretrained` writes them, or as the original checkpoints hold them."""
    stored = copy.deepcopy(model)
    stored.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    if layout == "bert hub":
        # γ and β, as the checkpoints converted from TensorFlow name them, and the positions counted out.
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            weights = {k.replace(new, old): v for k, v in weights.items()}
        weights["bert.embeddings.position_ids"] = torch.arange(model.config.max_position_embeddings)[None]
    if layout == "untied":
        if "lm_head.weight" not in weights:
            fail("the untied output was not written")
    # Every value is a bfloat16; half of the size.
    weights = {k: v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    (folder / "generation_config.json").unlink(missing_ok=True)


def make(name, seed):
    build, kind, layout, alterations = FIXTURES[name]
    torch.manual_seed(seed)
    config = build()
    model = kind._from_config(config, attn_implementation="eager").eval()
    if layout == "untied":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model))
    # With small matrices, a tied output says the token again that was read.
    randomise(model, seed, **({"table_std": 0.4, "gain": 1.6} if name == "t5_v1_0" else {"gain": 1.2} if is_t5(config) else {}))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    cases = inputs(config, seed + 1)
    truth = {k: outputs(model, c) for k, c in cases.items()}

    spread = {"f64": furthest(copy.deepcopy(model).double(), cases, truth)}
    spread["sdpa"] = furthest(rebuild(kind, config, weights, "sdpa"), cases, truth)
    if max(spread.values()) > AGREE:
        fail(f"{name}: eager f32 differs from {spread}, more than {AGREE}")
    moved = sensitivity(kind, config, weights, cases, truth, alterations)
    dull = {k: v for k, v in moved.items() if v < SENSITIVE}
    if dull:
        fail(f"{name}: these alterations would not be noticed (less than {SENSITIVE}): {dull}")

    tensors = {f"{k}.{argument}": v for k, c in cases.items() for argument, v in c.items()}
    tensors |= {f"{k}.{field}": v for k, fields in truth.items() for field, v in fields.items()}
    gap = None
    if is_t5(config):
        for attempt in range(400):
            prompts = inputs(config, seed + 2 + attempt)["right"]
            found, gap, good = continuations(model, prompts)
            if gap >= GREEDY_GAP and good:
                break
        else:
            fail(f"{name}: no prompts whose tokens lead by {GREEDY_GAP} everywhere")
        tensors |= found | {f"greedy.{k}": prompts[k] for k in ("input_ids", "attention_mask")}

    folder = TEXT_FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_weights(model, folder, layout)
    save_cases(folder / "cases.safetensors", tensors, "eager attention, float32")
    for file in folder.iterdir():
        file.chmod(0o644)
    check(kind, folder, cases, truth)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {size} bytes; {', '.join(f'{k} {v:.1e}' for k, v in spread.items())}; least noticed: "
          f"{min(moved, key=moved.get)} {min(moved.values()):.1e}; greedy gap {gap}")


def check(kind, folder, cases, truth):
    """What was written, read back by transformers, gives the same outputs."""
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    difference = furthest(model, cases, truth)
    if difference > 1e-6:
        fail(f"{folder}: read back differs by {difference}")


def main():
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(FIXTURES)
    for name in names:
        if name not in FIXTURES:
            fail(f"unknown fixture {name}; known: {', '.join(FIXTURES)}")
        make(name, 3000 + 100 * list(FIXTURES).index(name))


if __name__ == "__main__":
    main()
