"""No study without a revision, no figure without its caveats."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_kit.runs.caveats import caveats_of
from lowrank_kit.runs.provenance import git_revision, in_words, origin, parse_study

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/**/*.py")], key=lambda file: file.as_posix())


@pytest.mark.parametrize("git", [None, {"revision": "c0ffee" * 7, "dirty": True}])
def test_a_study_refuses_an_unknown_or_dirty_revision_unless_it_is_tried_out(monkeypatch, capsys, git):
    monkeypatch.setattr("lowrank_kit.runs.provenance.git_revision", lambda _: git)
    with pytest.raises(SystemExit) as caught:
        parse_study(argparse.ArgumentParser(), [])
    assert caught.value.code == 2
    assert "--try-out" in capsys.readouterr().err
    found = parse_study(argparse.ArgumentParser(), ["--try-out"]).provenance
    assert found["tried_out"] is True
    assert "tried out, no result" in in_words(found)


def test_a_clean_revision_is_recorded_with_versions_and_command(monkeypatch):
    monkeypatch.setattr("lowrank_kit.runs.provenance.git_revision", lambda _: {"revision": "ab" * 20, "dirty": False})
    found = parse_study(argparse.ArgumentParser(), []).provenance
    assert "tried_out" not in found
    assert {"lowrank_kit", "python", "torch", "transformers"} <= set(found["versions"])
    assert found["command"][0] == Path(sys.argv[0]).name
    assert in_words(found).startswith("revision abababababab;")


def test_overrides_may_stand_behind_the_options(monkeypatch):
    monkeypatch.setattr("lowrank_kit.runs.provenance.git_revision", lambda _: {"revision": "ab" * 20, "dirty": False})
    parser = argparse.ArgumentParser()
    parser.add_argument("study")
    parser.add_argument("--workers", type=int)
    parser.add_argument("overrides", nargs="*")
    found = parse_study(parser, ["a.yaml", "--workers", "1", "model.path=folder"])
    assert (found.study, found.workers, found.overrides) == ("a.yaml", 1, ["model.path=folder"])


def test_what_a_study_writes_does_not_make_its_revision_dirty(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("a")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "experiments").mkdir()
    for name in ("study.results.json", "study.table.md", "study.png"):
        (tmp_path / "experiments" / name).touch()
    assert not git_revision(tmp_path.resolve())["dirty"]
    (tmp_path / "experiments" / "study.yaml").touch()
    assert git_revision(tmp_path.resolve())["dirty"]


# A script that only converts weights leaves no figures.
@pytest.mark.parametrize(
    "file", [f for f in SCRIPTS if "__main__" in f.read_text() and f.stem != "checkpoint"], ids=lambda f: f.stem
)
def test_every_study_and_benchmark_asks_for_its_revision(file):
    assert "parse_study(" in file.read_text()
    assert ".parse_args()" not in file.read_text()


def test_a_row_has_the_hashes_of_its_runs_data(tmp_path):
    manifest = {"git": None, "versions": {"torch": "2"}, "data": {"a:test": {"sha256": "1", "rows": 3}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert origin(tmp_path)["data"] == {"a:test": "1"}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("svd_llm", []),
        ("kfac_svd", ["needs a backward pass"]),
        ("grasp", ["needs a backward pass"]),
        ("loss_svd", ["not test-blind", "needs a backward pass"]),
        ("structured_svd", ["not test-blind", "needs a backward pass"]),
    ],
)
def test_caveats_follow_from_the_settings(tmp_path, word, expected):
    from lowrank_kit.compose import Composer

    [config] = Composer().jobs([f"method={word}", "task=perplexity", "model=smollm2_135m"], multirun=False)
    assert caveats_of(tmp_path, config.resolved()) == expected


def test_matrices_left_dense_are_counted(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"ranks": {"a": 1, "b": 2, "c": 3}}))
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text(json.dumps({"lowrank": {"ranks": {"a": 1}}}))
    assert caveats_of(tmp_path, {"method": {"name": "hisvd"}}) == ["a reconstruction", "2 of 3 dense"]


def test_a_run_records_every_state_of_the_code_that_worked_on_it():
    from lowrank_kit.runs.manifest import Manifest

    first = Manifest(0, "cpu").as_dict()
    again = Manifest(0, "cpu", {**first, "processes": [{"git": None, "command": ["other"]}]}).as_dict()
    assert len(first["processes"]) == 1
    assert again["processes"] == [{"git": None, "command": ["other"]}, *first["processes"]]
