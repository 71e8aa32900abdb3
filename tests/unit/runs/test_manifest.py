import json
import logging
import subprocess
import sys
import time
import warnings
from importlib.metadata import version

import pytest

from lowrank_kit.runs.manifest import Manifest, peak_rss_bytes
from lowrank_kit.runs.provenance import git_revision


def test_manifest_is_json_and_names_versions_and_device():
    manifest = Manifest(seed=3, device="cpu")
    manifest.record("data", {"source": "local"})
    plain = json.loads(json.dumps(manifest.as_dict()))
    assert plain["versions"]["torch"] == version("torch")
    assert plain["seed"] == 3
    assert plain["device"]["name"] == "cpu"
    assert plain["data"] == {"source": "local"}


def test_stage_measures_time_and_memory():
    manifest = Manifest(seed=0, device="cpu")
    before = peak_rss_bytes()
    started = time.perf_counter()
    with manifest.stage("train"):
        ballast = bytearray(before + 64 * 2**20)
        ballast[::4096] = b"x" * len(ballast[::4096])
        time.sleep(0.05)
    elapsed = time.perf_counter() - started
    measured = manifest.as_dict()["stages"]["train"]
    assert 0.05 <= measured["seconds"] <= elapsed
    assert measured["peak_rss_bytes"] >= before + 64 * 2**20 * 0.9


def test_a_failed_stage_is_measured_too():
    manifest = Manifest(seed=0, device="cpu")
    with pytest.raises(ZeroDivisionError), manifest.stage("train"):
        _ = 1 / 0
    assert "train" in manifest.as_dict()["stages"]


def test_an_interrupted_run_keeps_its_stages_and_warnings():
    first = Manifest(seed=0, device="cpu")
    with pytest.warns(UserWarning, match="rank cut"), first.stage("calibrate"), first.watching():
        warnings.warn("rank cut", UserWarning, stacklevel=1)
    assert first.as_dict()["warnings"] == [{"message": "UserWarning: rank cut", "count": 1}]
    second = Manifest(seed=0, device="cpu", earlier=json.loads(json.dumps(first.as_dict())))
    with second.stage("train"):
        pass
    assert list(second.as_dict()["stages"]) == ["calibrate", "train"]
    assert second.as_dict()["warnings"] == first.as_dict()["warnings"]


def test_every_warning_is_kept_with_its_count_and_still_shown(capsys):
    manifest = Manifest(seed=0, device="cpu")
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: shown.append(str(message))
        with manifest.watching():
            for _ in range(2):
                warnings.warn("spectrum truncated", RuntimeWarning, stacklevel=1)
            logging.getLogger("lowrank_kit.models").warning("layer %s skipped", "q")
            logging.getLogger("lowrank_kit.models").info("nothing")
            logging.getLogger("elsewhere").warning("not ours")
        warnings.warn("too late", RuntimeWarning, stacklevel=1)
    assert manifest.as_dict()["warnings"] == [
        {"message": "RuntimeWarning: spectrum truncated", "count": 2},
        {"message": "lowrank_kit.models: layer q skipped", "count": 1},
    ]
    assert shown == ["spectrum truncated", "spectrum truncated", "too late"]


def test_git_revision_of_a_checkout_and_of_nothing(tmp_path):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert git_revision(tmp_path) is None
    git("init")
    assert git_revision(tmp_path) is None
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    clean = git_revision(tmp_path.resolve())
    assert not clean["dirty"]
    assert len(clean["revision"]) == 40
    (tmp_path / "file").write_text("b")
    assert git_revision(tmp_path.resolve())["dirty"]
    (tmp_path / "site-packages").mkdir()
    assert git_revision(tmp_path.resolve() / "site-packages") is None


def test_reading_runs_does_not_load_torch():
    code = "import sys, lowrank_kit.runs.directory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
