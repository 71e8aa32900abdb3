"""Files that somebody else wrote, damaged or meant to harm: refused by name, soon, and without effect."""

# ruff: noqa: E501 (cases, a line each)

import csv
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lowrank_kit.commands import main as verbs

# Of a clock on the wall, for a pipe takes no CPU time: far more than is needed on a busy machine.
SECONDS = 120
Change = Callable[[Path], None]


class Payload:
    """What leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(os.environ["MARK"]),)


def text(name: str, content: str) -> Change:
    return lambda folder: put(folder / name).write_text(content)  # type: ignore[func-returns-value]


def raw(name: str, content: Callable[[bytes], bytes]) -> Change:
    def change(folder: Path) -> None:
        file = folder / name
        put(file).write_bytes(content(file.read_bytes() if file.is_file() else b""))

    return change


def put(file: Path) -> Path:
    """The place of a new file; what was there is gone, were it a link."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = file.read_bytes() if file.is_file() else None
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)
    return file


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def settings(name: str, **changes: Any) -> Change:
    return lambda folder: text(name, json.dumps(json.loads((folder / name).read_text()) | changes))(folder)


def pickled(name: str, instead_of: str) -> Change:
    def change(folder: Path) -> None:
        (folder / instead_of).unlink()
        (folder / name).write_bytes(pickle.dumps({"x": Payload()}))

    return change


def weights(name: str, of: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def change(folder: Path) -> None:
        found = of(load_file(folder / name))
        put(folder / name)
        save_file(found, folder / name, {"format": "pt"})

    return change


def evil_code(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        code = "import os, pathlib\npathlib.Path(os.environ['MARK']).touch()\nclass Evil: pass\n"
        (folder / "evil.py").write_text(code)
        (folder / "modeling_lowrank.py").write_text(code)
        auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
        settings("config.json", auto_map=auto, **changes)(folder)
        settings("tokenizer_config.json", auto_map=auto)(folder)

    return change


MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKPOINTS: dict[str, Change] = {
    "a pickle": pickled("pytorch_model.bin", MODEL),
    "a header without end": raw(MODEL, lambda b: (2**62).to_bytes(8, "little") + b[8:]),
    "a header that is no JSON": raw(MODEL, lambda b: b[:8] + b"x" * (len(b) - 8)),
    "a header cut short": raw(MODEL, lambda b: b[:200]),
    "weights cut short": raw(MODEL, lambda b: b[: len(b) // 2]),
    "no weights": raw(MODEL, lambda b: b""),
    "offsets beyond the end": raw(MODEL, lambda b: b.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)),
    "a pipe for weights": pipe(MODEL),
    "weights without end": link(MODEL, "/dev/zero"),
    "a pipe for a configuration": pipe("config.json"),
    "a configuration without end": link("config.json", "/dev/zero"),
    "a nested configuration": text("config.json", "[" * 10**5),
    "a configuration that is a list": text("config.json", "[]"),
    "a huge configuration": text("config.json", '{"model_type": "llama", "x": "' + "x" * 2**28 + '"}'),
    "an index outside": lambda f: (shutil.move(f / MODEL, f.parent / "outside.safetensors"), text(INDEX, '{"weight_map": {"x": "../outside.safetensors"}}')(f))[1],
    "an absolute index": lambda f: ((f / MODEL).unlink(), text(INDEX, '{"weight_map": {"x": "/etc/hostname"}}')(f))[1],
    "an index that is a number": lambda f: ((f / MODEL).unlink(), text(INDEX, "7")(f))[1],
    "code of a type of its own": evil_code(model_type="evil"),
    "a tokenizer that is none": text("tokenizer.json", "{}"),
    "a tokenizer cut short": raw("tokenizer.json", lambda b: b[:100]),
    "a negative size": settings("config.json", hidden_size=-32),
    "a size that is text": settings("config.json", hidden_size="32"),
    "a size beyond any": settings("config.json", hidden_size=10**12),
    "a million blocks": settings("config.json", num_hidden_layers=10**6),
    "a vocabulary beyond any": settings("config.json", vocab_size=10**12),
    "heads that do not divide": settings("config.json", num_attention_heads=5, head_dim=None),
    "no blocks": settings("config.json", num_hidden_layers=0),
    "numbers that are none": weights(MODEL, lambda w: {n: torch.full_like(t, torch.nan) for n, t in w.items()}),
    "another shape": weights(MODEL, lambda w: {n: t[:3].clone() for n, t in w.items()}),
    "no embedding": weights(MODEL, lambda w: {n: t for n, t in w.items() if "embed" not in n}),
    "ranks that are paths": settings("config.json", model_type="lowrank_llama", lowrank={"format": 2, "ranks": {"../x": 3}}),
    "ranks beyond any": settings("config.json", model_type="lowrank_llama", lowrank={"format": 2, "ranks": {"layers.0.self_attn.q_proj": 10**12}}),
    "ranks that are a list": settings("config.json", model_type="lowrank_llama", lowrank=[1, 2]),
}  # fmt: skip
# Files that transformers does not need: the run goes its way, and nothing of them is run or waited for.
HARMLESS: dict[str, Change] = {
    "code of a known type": evil_code(),
    "a pipe beside the weights": pipe("notes.txt"),
    "no end beside the weights": link("notes.bin", "/dev/zero"),
    "a pipe for code": pipe("modeling_mine.py"),
}
TEXT = "text/mine/test.txt"
ROWS: dict[str, Change] = {
    "a pipe": pipe(TEXT),
    "no end": link(TEXT, "/dev/zero"),
    "UTF-16": raw(TEXT, lambda b: "ü".encode("utf-16") * 99),
    "bytes": raw(TEXT, lambda b: bytes(range(256)) * 9),
    "nothing": raw(TEXT, lambda b: b""),
    "nested rows": lambda f: ((f / TEXT).unlink(), text("text/mine/test.jsonl", '{"text": ' + "[" * 10**5)(f))[1],
    "a giant line": lambda f: ((f / TEXT).unlink(), text("text/mine/test.jsonl", '{"x": [' + "1," * 10**7)(f))[1],
    "rows that are no objects": lambda f: ((f / TEXT).unlink(), text("text/mine/test.jsonl", '"a"\n')(f))[1],
    "a link to itself": link(TEXT, "test.txt"),
}
ADAPTER = "adapter_model.safetensors"
ADAPTERS: dict[str, Change] = {
    "a pickle": pickled("adapter_model.bin", ADAPTER),
    "cut short": raw(ADAPTER, lambda b: b[:-9]),
    "numbers that are none": weights(ADAPTER, lambda w: {n: t * torch.nan for n, t in w.items()}),
    "half of the factors": weights(ADAPTER, lambda w: {n: t for n, t in w.items() if "lora_A" in n}),
    "another rank": settings("adapter_config.json", r=3),
    "a method that is none": settings("adapter_config.json", peft_type="EVIL"),
    "targets that are a number": settings("adapter_config.json", target_modules=7),
    "a pipe for a configuration": pipe("adapter_config.json"),
    "a pipe for weights": pipe(ADAPTER),
    "no configuration": text("adapter_config.json", ""),
}
BOMB = "a: &a [x]\n" + "".join(f"b{i}: &b{i} [{'*' + ('a' if i == 0 else f'b{i - 1}')}, *a]\n" for i in range(99))
RUNS: dict[str, Change] = {
    **{f"a pipe for {name}": pipe(name) for name in ("config.yaml", "status.json", "results.json", "manifest.json")},
    **{f"no end of {name}": link(name, "/dev/zero") for name in ("config.yaml", "status.json", "results.json")},
    "aliases": text("config.yaml", BOMB),
    "a tag": text("config.yaml", "method: !!python/object/apply:os.system [x]"),
    "a status that names a file outside": settings(
        "status.json", files={"plan": {"../../outside": {"sha256": "0", "size": 1, "mtime_ns": 1}}}
    ),
    "results that are a number": text("results.json", "7"),
    "results cut short": raw("results.json", lambda b: b[:40]),
    "a huge result": text("results.json", '["' + "x" * 2**28 + '"]'),
}


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """What a command says and its status; whatever it reads leaves no mark, and is not waited for for ever."""
    mark = tmp_path / "mark"
    monkeypatch.setenv("MARK", str(mark))
    monkeypatch.setenv("COLUMNS", "300")

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"read for more than {SECONDS} s")

    def command(*words: str) -> tuple[int, str]:
        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            status = verbs(words)
        except SystemExit as left:
            status = int(left.code or 0)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        found = capsys.readouterr()
        assert not mark.exists()
        assert "Traceback" not in found.err
        return status, found.out + found.err

    return command


@pytest.fixture
def copy(tmp_path) -> Callable[[Path, Change], Path]:
    """A changed copy of a folder."""

    def build(folder: Path, change: Change) -> Path:
        made = tmp_path / "copy"
        # A pipe is no file that rmtree or copytree would open.
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(folder, made)
        change(made)
        return made

    return build


def test_checkpoints_are_refused(ask, some, copy, checkpoint, language_arguments, tmp_path):
    for what in some(list(CHECKPOINTS), full=len(CHECKPOINTS), short=3):
        folder = copy(checkpoint("llama"), CHECKPOINTS[what])
        status, said = ask("run", *language_arguments(path=folder, method="none"))
        assert status in (1, 2), what
        assert str(folder) in said, (what, said)
        assert len(said.splitlines()) < 20, (what, said)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        for verb in ("inspect", "export"):
            more = ("--format", "dense", "--output", str(tmp_path / "out")) if verb == "export" else ()
            status, _ = ask(verb, str(folder), *more)
            # Inspecting reads shapes alone.
            assert verb == "inspect" or status in (1, 2), what
            assert (tmp_path / "out").exists() == (status == 0 and verb == "export"), what
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_what_lies_beside_a_checkpoint_is_not_read_or_run(ask, some, copy, checkpoint, language_arguments, tmp_path):
    for what in some(list(HARMLESS), full=len(HARMLESS), short=1):
        folder = copy(checkpoint("llama"), HARMLESS[what])
        status, said = ask("run", *language_arguments(path=folder, method="none"))
        assert status == 0, (what, said)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def test_rows_are_refused(ask, some, copy, texts_folder, language_arguments, tmp_path):
    for what in some(list(ROWS), full=len(ROWS), short=3):
        folder = copy(texts_folder, ROWS[what])
        status, said = ask("run", *language_arguments(data=folder, method="none"))
        assert status in (1, 2), (what, said)
        assert "test" in said, (what, said)
        assert not (tmp_path / "runs").exists(), what


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    return folder


def test_adapters_are_read_before_they_are_called_good(ask, some, copy, adapter, tmp_path):
    for what in some(list(ADAPTERS), full=len(ADAPTERS), short=4):
        folder, output = copy(adapter, ADAPTERS[what]), tmp_path / "out"
        status, said = ask("export", str(folder), "--format", "lora", "--output", str(output))
        assert status in (1, 2), (what, said)
        assert str(folder) in said, (what, said)
        assert not output.exists(), what


def test_an_adapter_is_exported_without_what_links_lead_to(ask, copy, adapter, tmp_path):
    (tmp_path / "secret").write_text("mine")

    def change(folder: Path) -> None:
        link("notes.txt", str(tmp_path / "secret"))(folder)
        link("folder", str(tmp_path))(folder)
        pipe("waits")(folder)
        # As in the hub's cache.
        (folder / ADAPTER).rename(tmp_path / "blob")
        link(ADAPTER, str(tmp_path / "blob"))(folder)
        text("more/tokenizer.json", "{}")(folder)

    status, said = ask("export", str(copy(adapter, change)), "--format", "lora", "--output", str(tmp_path / "good"))
    assert status == 0, said
    assert "left out, for they are no regular files: folder, notes.txt, waits" in said
    found = {str(file.relative_to(tmp_path / "good")) for file in (tmp_path / "good").rglob("*")}
    assert found == {"README.md", "adapter_config.json", ADAPTER, "more", "more/tokenizer.json"}
    assert not any(file.is_symlink() for file in (tmp_path / "good").rglob("*"))


@pytest.fixture
def finished(ask, language_arguments, tmp_path) -> Path:
    status, said = ask("run", *language_arguments("method.rank_multiple=1", f"run.dir={tmp_path / 'all/good'}"))
    assert status == 0, said
    return tmp_path / "all/good"


@pytest.mark.draws
def test_one_bad_run_spoils_no_other(ask, some, finished, language_arguments):
    bad = finished.with_name("bad")
    for what in some(list(RUNS), full=len(RUNS), short=1):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(finished, bad)
        RUNS[what](bad)
        status, said = ask("report", str(finished.parent), "--output", str(finished.parent.parent / "report"))
        assert status == 0, (what, said)
        assert "svd_llm" in said, (what, said)
        # Going on with it, exporting it and comparing it.
        words = language_arguments("method.rank_multiple=1", f"run.dir={bad}")
        for more in (("run", *words), ("diff", str(finished), str(bad)), ("inspect", str(bad))):
            status, said = ask(*more)
            assert status in (0, 1, 2), (what, said)
            assert status == 0 or str(bad) in said, (what, said)


HOSTILE = "<script>alert(1)</script> $x_1$ \\input{/etc/passwd} | `c` & % # {} =1+1 \x1b[31m \x07 \u202e"


@pytest.mark.draws
def test_names_are_text_in_every_format(ask, finished, tmp_path):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    for part in ("method", "model"):
        config[part]["name"] = f"={HOSTILE}"
    (finished / "config.yaml").write_text(yaml.safe_dump(config))
    status = json.loads((finished / "status.json").read_text())
    for sums in status["files"].values():
        sums.pop("config.yaml", None)
    (finished / "status.json").write_text(json.dumps(status))
    status, said = ask("report", str(finished), "--output", str(tmp_path / "report"))
    assert status == 0, said
    written = {file.suffix: file.read_text() for file in (tmp_path / "report").iterdir() if file.is_file()}
    assert {".html", ".md", ".csv", ".tex"} <= written.keys()
    assert "alert(1)" in written[".html"]
    assert "<script>alert" not in written[".html"]
    assert "\\input{" not in written[".tex"]
    for shown in (said, *written.values()):
        assert not {"\x1b", "\u202e", "\x07"} & set(shown)
    assert "\\x1b[31m" in written[".html"]
    assert not any(cell.startswith("=") for row in csv.reader(written[".csv"].splitlines()) for cell in row)
