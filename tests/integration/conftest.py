import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import warm
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.config import RunConfig
from lowrank_kit.runs.status import read_status

# The vocabulary of the tiny models: 64 entries.
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
WORDS = [f"w{i}" for i in range(64 - len(SPECIAL))]
TEMPLATES = {
    "encoder": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "t5": ("$A [SEP]", "$A [SEP] $B [SEP]"),
}


def build_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """Words of a fixed list; `decoder` adds nothing, the others their family's special tokens."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if style in TEMPLATES:
        single, pair = TEMPLATES[style]
        marks = [("[CLS]", 1), ("[SEP]", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=marks)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if style == "encoder" else [])
    if style == "decoder":
        names.pop("pad_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_model) -> Callable[[str], Path]:
    """A folder as save_pretrained leaves it: a tiny random model and a word tokenizer."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            head = {"bert": "base", "roberta": "base", "t5": "seq2seq"}.get(family, "causal")
            tiny_model(family, head).save_pretrained(made[family])
            style = {"bert": "encoder", "roberta": "encoder", "t5": "t5"}.get(family, "decoder")
            build_tokenizer(style).save_pretrained(made[family])
        return made[family]

    return build


@pytest.fixture(scope="session")
def sharp_checkpoint(checkpoint, tiny_model, tmp_path_factory) -> Path:
    """A tiny model that predicts with confidence: an untouched one is nearly uniform, and so is any compression."""
    folder = tmp_path_factory.mktemp("sharp")
    tiny_model("llama", initializer_range=0.3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(folder)
    return folder


@pytest.fixture
def job(words, composed) -> Callable[..., RunConfig]:
    """The configuration of a module's own ``words``."""

    def build(*more: str, **where: object) -> RunConfig:
        return composed(words(*more, **where))

    return build


@pytest.fixture
def kill_in_training(environment) -> Callable[[list[str], Path], None]:
    """Start a command and kill it outright once its run directory holds a second checkpoint of its training."""

    def kill(words: list[str], run: Path) -> None:
        process = warm.Command(["-m", "lowrank_kit.run", *words], environment)
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/checkpoint-1?/trainer_state.json")):
            assert process.is_alive(), process.stderr
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert read_status(run).stages_done == ("calibrate", "plan", "apply")

    return kill


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_up_rows(count: int, seed: int, columns: tuple[str, ...], classes: int) -> list[dict[str, object]]:
    """Sentences of 3 to 12 words; the first word alone decides the label (a score from 0 to 5 for one class)."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        texts = []
        for _ in columns:
            length = int(torch.randint(3, 13, (), generator=draw))
            texts.append([int(i) for i in torch.randint(len(WORDS), (length,), generator=draw)])
        label = texts[0][0] % classes if classes > 1 else texts[0][0] % 11 / 2
        sentences = {c: " ".join(WORDS[i] for i in text) for c, text in zip(columns, texts, strict=True)}
        rows.append({**sentences, "label": label, "idx": index})
    return rows


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory) -> Path:
    """A local data folder with made-up rows of four GLUE tasks."""
    root = tmp_path_factory.mktemp("rows")
    two = ("sentence1", "sentence2")
    made_up_rows_of = {"rte": (two, 2), "sst2": (("sentence",), 2), "stsb": (two, 1)}
    for name, (columns, classes) in made_up_rows_of.items():
        write_rows(root / "glue" / name / "train.jsonl", made_up_rows(48, 1, columns, classes))
        write_rows(root / "glue" / name / "validation.jsonl", made_up_rows(20, 2, columns, classes))
    pair = ("premise", "hypothesis")
    write_rows(root / "glue/mnli/train.jsonl", made_up_rows(48, 1, pair, 3))
    for seed, split in enumerate(("validation_matched", "validation_mismatched"), start=2):
        write_rows(root / "glue/mnli" / f"{split}.jsonl", made_up_rows(12 + seed, seed, pair, 3))
    return root


@pytest.fixture
def arguments(checkpoint, rows_folder, tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """A command line for a tiny model and local rows; later words override earlier ones."""
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "cache"))

    def build(*words: str, family: str = "bert", task: str = "glue/rte") -> list[str]:
        return [
            *("model=minilm_l6", f"model.name={family}", f"model.path={checkpoint(family)}", "model.max_length=null"),
            *("data=local", f"data.root={rows_folder}", f"task={task}", "device=cpu", "method.rank=2"),
            *("train.max_steps=3", "train.batch_size=8", "calibration.samples=48", "train.eval_every=2"),
            *(f"run.root={tmp_path / 'runs'}", *words),
        ]

    return build


@pytest.fixture
def config(arguments, composed) -> Callable[..., RunConfig]:
    def build(*words: str, **where: str) -> RunConfig:
        return composed(arguments(*words, **where))

    return build


@pytest.fixture
def command(arguments) -> Callable[..., list[str]]:
    """The same run as Python's arguments, for a process of its own."""

    def build(*words: str, **where: str) -> list[str]:
        return ["-m", "lowrank_kit.run", *arguments(*words, **where)]

    return build


@pytest.fixture(scope="session")
def texts_folder(tmp_path_factory) -> Path:
    """A local data folder with two texts of random words, `mine` and `other`."""
    root = tmp_path_factory.mktemp("texts")
    for seed, (name, split) in enumerate((n, s) for n in ("mine", "other") for s in ("validation", "test")):
        draw = torch.Generator().manual_seed(seed)
        file = root / "text" / name / f"{split}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (600,), generator=draw)))
    return root


@pytest.fixture(scope="session")
def questions_folder(tmp_path_factory) -> Path:
    """A local data folder with a text and the questions of two benchmarks, of words that the tiny tokenizer knows."""
    root = tmp_path_factory.mktemp("questions")
    words = [WORDS[(7 * n) % len(WORDS)] for n in range(700)]
    (root / "text/mine").mkdir(parents=True)
    for split in ("validation", "test"):
        (root / "text/mine" / f"{split}.txt").write_text(" ".join(words) + "\n")
    piqa = [{"goal": words[n], "sol1": words[n + 1], "sol2": f"w{n} w3", "label": n % 2} for n in range(9)]
    write_rows(root / "piqa/validation.jsonl", piqa)
    winogrande = [
        {"sentence": f"w1 _ w{n} w{2 * n}", "option1": f"w{n}", "option2": "w9", "answer": str(1 + n % 2)}
        for n in range(8)
    ]
    write_rows(root / "winogrande/validation.jsonl", winogrande)
    return root


@pytest.fixture
def language_arguments(checkpoint, texts_folder, tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """A command line that compresses a tiny causal model, calibrated and evaluated on the local text `mine` alone."""
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "cache"))

    def build(
        *words: str, method: str = "svd_llm", family: str = "llama", path: Path | None = None, data: Path | None = None
    ) -> list[str]:
        return [
            *(f"method={method}", "task=perplexity", "model.name=tiny", f"model.path={path or checkpoint(family)}"),
            *("data=local", f"data.root={data or texts_folder}", "device=cpu", "task.window=32", "task.texts.mine={}"),
            *(f"~task.texts.{name}" for name in ("wikitext2", "ptb", "c4", "wikipedia", "openwebtext")),
            *("task.calibrate_on=mine", "calibration.samples=8", "calibration.seq_len=32", "calibration.batch_size=4"),
            *(f"run.root={tmp_path / 'runs'}", *words),
        ]

    return build


@pytest.fixture
def composed() -> Callable[[list[str]], RunConfig]:
    """The configuration of a command line."""

    def compose(words: list[str]) -> RunConfig:
        [job] = Composer().jobs(force_dotted(words), multirun=False)
        return job

    return compose


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


class Undrawn(MagicMock):
    """A figure that takes every call and leaves an empty file: drawing takes as long as the rest of a tiny run."""

    def subplots(self, *shape: int, **_: object) -> MagicMock | np.ndarray:
        panels = np.empty(shape, dtype=object)
        panels.fill(MagicMock())
        return panels if shape else MagicMock()

    def savefig(self, file: Path, **_: object) -> None:
        file.touch()


@pytest.fixture(autouse=True)
def _drawn_where_marked(request, monkeypatch):
    """Every run goes through its plots; only tests marked `draws` draw them."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr("matplotlib.figure.Figure", Undrawn)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
