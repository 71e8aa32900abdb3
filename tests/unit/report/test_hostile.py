"""Run directories that somebody else wrote: reading one runs nothing of it, never hangs, and spoils no other's row."""

import csv
import os
import subprocess
import sys
import time

import pytest
import yaml

from lowrank_kit.compare import main as compare
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import read_json, read_yaml
from lowrank_kit.report.__main__ import main
from lowrank_kit.report.find import find_runs
from lowrank_kit.retrace import command_elsewhere, overrides_of

EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from lowrank_kit.adapters.lora import LoRA
class Evil(LoRA):
    pass
"""
FIGURES = [("wikitext2", "perplexity", 20.0)]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]\n" for one, two in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def hostile(leave_run, tmp_path):
    """A run that allows its own package and names a class in it; whoever imports that leaves a mark."""
    folder, mark = leave_run("hostile", FIGURES), tmp_path / "imported"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["method"]["_target_"] = "evil_methods.Evil"
    config["run"]["method_prefixes"] = ["evil_methods"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("evil_methods", "yaml", "jinja2", "sitecustomize", "rich"):
        (folder / f"{name}.py").write_text(EVIL.format(mark=str(mark)))
    return folder, mark


def read_in(folder, *words):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_report_inside_the_folder_imports_nothing_of_it(hostile):
    folder, mark = hostile
    done = read_in(folder, "lowrank_kit.report", ".", "--output", "out")
    assert done.returncode == 0, done.stderr
    assert not mark.exists()
    assert "svd_llm" in done.stdout


@pytest.mark.parametrize("words", [("lowrank_kit.compare", ".", "."), ("lowrank_kit.run", "method=astar")])
def test_other_commands_inside_the_folder_import_nothing_of_it(hostile, words):
    folder, mark = hostile
    assert read_in(folder, *words).returncode == 2
    assert not mark.exists()


def test_export_and_retrace_import_nothing_that_a_run_names(hostile, monkeypatch):
    folder, mark = hostile
    monkeypatch.syspath_prepend(folder)
    assert command_elsewhere(folder) is None
    with pytest.raises(LowRankKitError, match="not in an allowed package"):
        overrides_of(yaml.safe_load((folder / "config.yaml").read_text()))
    assert not mark.exists()


def test_what_the_person_names_may_be_imported(hostile, monkeypatch):
    folder, mark = hostile
    monkeypatch.syspath_prepend(folder)
    find_runs([folder], ["evil_methods"])
    assert mark.exists()
    sys.modules.pop("evil_methods", None)


@pytest.mark.parametrize("text", [BOMB, "a: !!python/object/apply:os.system [x]", "[" * 10**5, "- 1", "\0", "{a: b"])
def test_yaml_that_no_run_writes_is_refused_at_once(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    started = time.monotonic()
    with pytest.raises(LowRankKitError, match=r"config\.yaml' is damaged"):
        read_yaml(file)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "[NaN]", "[1e999]", "\ufeff[]", "1" * 5000])
def test_json_that_no_run_writes_is_refused(tmp_path, text):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(LowRankKitError, match=r"results\.json' is damaged"):
        read_json(file, list)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", BOMB),
        ("config.yaml", "method: 3"),
        ("results.json", '[{"task": 1'),
        ("results.json", '[{"task": "a"}]'),
        ("results.json", "{}"),
        ("manifest.json", '{"git": "none"}'),
        ("manifest.json", '{"data": {"a": 1}}'),
        ("manifest.json", "["),
        ("status.json", ""),
        ("history.json", '[{"loss": "x", "step": []}]'),
    ],
)
def test_one_broken_run_does_not_end_the_report_of_all(leave_run, tmp_path, capsys, name, text):
    leave_run("good", FIGURES)
    (leave_run("bad", FIGURES, ["method=asvd", "model=smollm2_135m", "task=perplexity"]) / name).write_text(text)
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "svd_llm" in printed
    if name != "history.json":
        assert f"bad: damaged: '{tmp_path / 'runs/bad' / name}' is damaged" in printed


def test_a_pipe_in_place_of_a_file_does_not_hang(leave_run, tmp_path):
    folder = leave_run("pipe", FIGURES)
    leave_run("good", FIGURES, ["method=asvd", "model=smollm2_135m", "task=perplexity"])
    for name in ("config.yaml", "manifest.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    runs, left_out = find_runs([tmp_path / "runs"])
    assert [run.path.name for run in runs] == ["good"]
    assert [entry.state for entry in left_out] == ["damaged"]


def test_names_are_text_in_markdown_and_csv_and_on_the_terminal(leave_run, tmp_path, capsys):
    folder = leave_run("odd", [("[x](http://a) <b> | `c`", "perplexity", 20.0)])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["method"]["name"] = "=cmd|' /C calc'!A0"
    config["model"]["name"] = "a\x1b[31mred\n# heading ``` <script>"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text('{"command": ["x\\n```\\n<script>alert(1)</script>"]}')
    assert main([str(folder), "--output", str(tmp_path / "out")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    text = (tmp_path / "out/report.md").read_text()
    # Code apart, nothing is markup: blocks of code have fences that no text in them can end.
    outside = "".join(text.split("````")[::2]) if "````" in text else text
    assert "](http" not in outside
    assert "<script>" not in outside.replace("\\<script>", "")
    assert "\n# heading" not in text
    rows = list(csv.reader((tmp_path / "out/table.csv").open()))
    assert not any(cell.startswith(("=", "@", "+")) for row in rows for cell in row)


def test_compare_names_a_line_that_is_no_answer(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "piqa.jsonl").write_text('{"task": "piqa", "row_hash": "1"}\n{"task": \n')
    assert compare([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "piqa.jsonl' is damaged (line 2 is no JSON)" in capsys.readouterr().err
