import json

import pytest

from lowrank_kit.runs.directory import RunDirectory
from lowrank_kit.runs.manifest import Manifest
from lowrank_kit.runs.status import read_status
from lowrank_kit.stages.ledger import Ledger


@pytest.fixture
def book(tmp_path):
    def build(run, *todo):
        return Ledger("t", run, Manifest(0, "cpu"), todo, lambda: {"x:test": {"rows": 3}})

    with RunDirectory(tmp_path / "run") as run:
        yield lambda *todo: build(run, *todo)


def test_a_stage_that_is_not_to_be_done_is_not_done(book, tmp_path):
    ledger = book("plan")
    assert ledger.do("calibrate", lambda: pytest.fail("was done")) is None
    assert ledger.do("plan", lambda: "a plan") == "a plan"
    assert read_status(tmp_path / "run").stages_done == ("plan",)
    assert list(json.loads((tmp_path / "run/manifest.json").read_text())["stages"]) == ["plan"]


def test_a_stage_that_fails_is_named_and_its_seconds_and_data_are_kept(book, tmp_path):
    with pytest.raises(ZeroDivisionError):
        book("calibrate").do("calibrate", lambda: 1 // 0)
    status, manifest = read_status(tmp_path / "run"), json.loads((tmp_path / "run/manifest.json").read_text())
    assert (status.stage, status.stages_done) == ("calibrate", ())
    assert manifest["stages"]["calibrate"]["seconds"] >= 0
    assert manifest["data"] == {"x:test": {"rows": 3}}
