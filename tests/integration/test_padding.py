"""Rows of unequal length, however the tokenizer pads and whatever it adds: what each row gives alone, unpadded.

The right value is that of plain transformers, which reads one row at a time as its tokenizer encodes it.
"""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from lowrank_kit.data.instructions import Example, encode
from lowrank_kit.data.padding import RightPadded, padding_id
from lowrank_kit.errors import ConfigError
from lowrank_kit.evaluation import glue
from lowrank_kit.evaluation.answers import answer_perplexity
from lowrank_kit.pipeline import execute

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(60))]
TEMPLATES = {
    "": "$A",
    "bos": "[BOS] $A",
    "eos": "$A [EOS]",
    "both": "[BOS] $A [EOS]",
}
DECODERS, ENCODERS = ("llama", "gpt2", "opt"), ("bert", "roberta")
LENGTHS = [1, 2, 9, 3, 12, 5, 1, 7]


def tokenizer(around: str, side: str, pad: str | None) -> PreTrainedTokenizerFast:
    """``pad``: a token of its own, the end token, or None: it has no padding token."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single=TEMPLATES[around], special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"} | ({"pad_token": pad} if pad else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side=side, model_input_names=["input_ids", "attention_mask"], **names
    )


def sentences(ending: str) -> list[str]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(4, 64, (n,), generator=draw) for n in LENGTHS]
    return [
        " ".join([*(WORDS[i] for i in row), *([ending] if ending and n % 3 == 1 else [])]) for n, row in enumerate(rows)
    ]


@pytest.fixture
def written(tmp_path, tiny_model):
    """A checkpoint and local rows; ``pad_token_id`` is what the model's configuration says of padding."""

    def write(family, its_tokenizer, pad_token_id, ending=""):
        head = {"t5": "seq2seq"}.get(family, "base" if family in ENCODERS else "causal")
        folder = tmp_path / "model"
        model = tiny_model(family, head, initializer_range=0.3)
        model.config.pad_token_id = pad_token_id
        for key, value in model.config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(model.config, key, 0.0)
        model.save_pretrained(folder)
        its_tokenizer.save_pretrained(folder)
        (tmp_path / "rows/glue/sst2").mkdir(parents=True)
        rows = [{"sentence": text, "label": n % 2} for n, text in enumerate(sentences(ending))]
        for split in ("train", "validation"):
            file = tmp_path / f"rows/glue/sst2/{split}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


@pytest.fixture
def run(tmp_path, composed, monkeypatch):
    """Train an adapter for one step, all rows in one batch, at no learning rate; what was evaluated, and the loss."""
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "cache"))
    found = {}
    predict = glue.predict

    def note(model, rows, its_tokenizer, *rest):
        found.update({size: predict(model, rows, its_tokenizer, size, "cpu") for size in (1, 4, 64)}, model=model)
        return found[64]

    monkeypatch.setattr(glue, "predict", note)

    def start(folder, *more):
        words = [
            *("method=lora", "method.rank=2", "task=glue/sst2", "model=minilm_l6", "model.name=tiny", "data=local"),
            *(f"model.path={folder}", f"data.root={tmp_path / 'rows'}", "model.max_length=null", "device=cpu"),
            *("train.max_steps=1", f"train.batch_size={len(LENGTHS)}", "train.learning_rate=1e-12"),
            *("train.head_learning_rate=1e-12", "train.eval_every=null", f"run.root={tmp_path / 'runs'}", *more),
        ]
        path = execute(composed(words))
        found["loss"] = json.loads((path / "history.json").read_text())[0]["loss"]
        return found

    return start


CASES = [
    *((family, around, side, pad, None) for family in DECODERS for around, side, pad in (
        ("", "left", None), ("", "left", "[PAD]"), ("both", "left", "[PAD]"), ("eos", "left", None),
        ("bos", "right", "[EOS]"), ("both", "right", None),
    )),
    # The model names its padding token, and the tokenizer another one or none.
    ("llama", "eos", "left", "[PAD]", 2), ("llama", "both", "right", None, 0), ("gpt2", "eos", "left", "[EOS]", 2),
    *((family, "both", side, "[PAD]", 0) for family in ENCODERS for side in ("left", "right")),
    *(("t5", "eos", side, pad, 0) for side, pad in (("left", "[PAD]"), ("right", "[PAD]"), ("left", None))),
]  # fmt: skip


@pytest.mark.parametrize("ending", ["", "[PAD]", "[UNK]", "[EOS]"])
@pytest.mark.parametrize(("family", "around", "side", "pad", "named"), CASES)
def test_a_classifier_gives_every_row_what_it_gives_it_alone(written, run, family, around, side, pad, named, ending):
    if ending and (family != "llama" or "left" not in side):
        pytest.skip("one family is enough for texts that end in a special token")
    folder = written(family, tokenizer(around, side, pad), named, ending)
    found = run(folder)
    model, plain = found["model"], AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = model.get_base_model().config.pad_token_id = AutoConfig.from_pretrained(
        folder
    ).pad_token_id
    alone, losses = [], []
    with torch.no_grad():
        for number, text in enumerate(sentences(ending)):
            made = model(input_ids=torch.tensor([plain(text)["input_ids"]]), labels=torch.tensor([number % 2]))
            alone.append(made.logits[0].numpy())
            losses.append(float(made.loss))
    for size in (1, 4, 64):
        np.testing.assert_allclose(found[size], alone, rtol=1e-4, atol=1e-5)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("around", TEMPLATES)
@pytest.mark.parametrize("pad", ["[PAD]", "[EOS]", None])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_instructions_are_the_same_examples_and_losses_in_every_batch(tiny_model, family, around, side, pad):
    model, its = tiny_model(family, initializer_range=0.3), tokenizer(around, side, pad)
    texts = [(text, " ".join(text.split()[:3])) for text in sentences("[EOS]")]
    rows = encode([Example(prompt, answer) for prompt, answer in texts], its, 40, of="mine", key="k")
    sums, count = [], 0
    for (prompt, answer), row in zip(texts, rows, strict=True):
        before, after = ([WORDS.index(word) for word in text.split()] for text in (prompt, answer))
        before, after = [1] * (around in ("bos", "both")) + before, after if after[-1] == 2 else [*after, 2]
        assert row == {"input_ids": before + after, "labels": [-100] * len(before) + after}
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0].double()
        sums.append(-sum(float(logits[len(before) + n - 1].log_softmax(0)[token]) for n, token in enumerate(after)))
        count += len(after)
    collate = RightPadded(padding_id(its, model.config))
    for size in (1, 4, 64):
        found = answer_perplexity(model, rows, collate, size, "cpu")
        assert (found.nll, found.tokens) == (pytest.approx(sum(sums) / count, rel=1e-5), count)
    with torch.no_grad():
        loss = model(**collate(list(rows))).loss
    assert float(loss) == pytest.approx(sum(sums) / count, rel=1e-5)
    assert math.isfinite(float(loss))


def test_a_padding_token_beyond_the_embedding_is_one_message_before_training(written, run):
    its = tokenizer("", "left", None)
    its.add_special_tokens({"pad_token": "[FILL]"})
    with pytest.raises(
        ConfigError,
        match=r"padding token '\[FILL\]' has the id 64, .* 64 rows .*pad_token in .*resize_token_embeddings",
    ):
        run(written("llama", its, None))


def test_it_is_one_message_for_instructions_and_recovery_too(written, tiny_model):
    its = tokenizer("", "left", None)
    its.add_special_tokens({"pad_token": "[FILL]"})
    with pytest.raises(ConfigError, match="has the id 64"):
        padding_id(its, tiny_model("llama").config)


@pytest.mark.parametrize(
    ("family", "row", "message"),
    [
        (
            "llama",
            {"sentence": "", "label": 0},
            r"validation\.jsonl, line 3: glue/sst2: no token is left .* leave the row out",
        ),
        (
            "llama",
            {"sentence": "w1", "label": True},
            r"validation\.jsonl, line 3: column 'label' holds true, and before",
        ),
        (
            "t5",
            {"sentence": "w1 [EOS] w2", "label": 0},
            r"validation\.jsonl, line 3: .* end token \[EOS\] .* take it out",
        ),
        (
            "llama",
            {"sentence": 3.5, "label": 0},
            r"validation\.jsonl, line 3: column 'sentence' holds 3\.5, and before it",
        ),
        (
            "llama",
            {"sentence": None, "label": 0},
            r"validation\.jsonl, line 3: .* holds None, which is no text: write a",
        ),
        ("llama", {"sentence": "w1", "label": 7}, r"validation\.jsonl, line 3: .* labels 7 .* not classes 0 to 1"),
    ],
)
def test_a_row_that_cannot_be_read_is_answered_with_its_line_before_the_model_is_loaded(
    written, run, tmp_path, monkeypatch, family, row, message
):
    folder = written(family, tokenizer("eos" if family == "t5" else "", "left", "[PAD]"), 0)
    good = {"sentence": "w1 w2", "label": 1}
    file = tmp_path / "rows/glue/sst2/validation.jsonl"
    file.write_text("".join(json.dumps(found) + "\n" for found in (good, good, row, good)))
    monkeypatch.setattr("lowrank_kit.stages.models.load_model", None)
    with pytest.raises(Exception, match=message):
        run(folder)


def test_boolean_labels_are_no_classes(written, run, tmp_path):
    folder = written("llama", tokenizer("", "left", "[PAD]"), 0)
    (tmp_path / "rows/glue/sst2/train.jsonl").write_text('{"sentence": "w1", "label": true}\n')
    with pytest.raises(ConfigError, match=r"train\.jsonl, line 1: .* labels True .* write 0 for false and 1 for true"):
        run(folder)


def test_labelled_text_has_no_choice_of_bos(written, run):
    with pytest.raises(ConfigError, match=r"eval\.bos=never is for texts.*use eval\.bos=auto"):
        run(written("llama", tokenizer("bos", "left", None), None), "eval.bos=never")
