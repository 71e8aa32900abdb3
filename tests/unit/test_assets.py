import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import threading
import time
import zipfile

import pytest
from rich.console import Console

from lowrank_kit import assets
from lowrank_kit.assets.__main__ import main
from lowrank_kit.errors import ConfigError, LowRankKitError


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("toy_data/rows.txt", "one\ntwo\n")
        wheel.writestr("toy_data/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("toy_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n")
        wheel.writestr("toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
    return buffer.getvalue()


@pytest.fixture
def toy(monkeypatch, tmp_path):
    index = tmp_path / "index"
    index.mkdir()
    content = wheel_bytes()
    (index / "toy_data-1.0-py3-none-any.whl").write_bytes(content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "cache"))
    asset = assets.Asset(
        name="toy",
        kind="rows",
        package="toy-data",
        version="1.0",
        sha256=hashlib.sha256(content).hexdigest(),
        megabytes=1,
        licence="MIT",
        note="a toy",
        convert=lambda wheel, folder: (folder / "rows.txt").write_bytes(wheel.read("toy_data/rows.txt")),
    )
    monkeypatch.setitem(assets.CATALOGUE, "toy", asset)
    return asset


def test_fetch_converts_once_and_then_needs_nothing(toy, monkeypatch):
    output = io.StringIO()
    assets.fetch(["toy"], Console(file=output, width=200))
    folder = assets.require("toy")
    assert folder == assets.cache_dir() / "assets" / "toy"
    assert (folder / "rows.txt").read_text() == "one\ntwo\n"
    marker = json.loads((folder / "asset.json").read_text())
    assert marker == {
        "package": "toy-data",
        "version": "1.0",
        "sha256": toy.sha256,
        "licence": "MIT",
        "note": "a toy",
    }
    assert all(fact in output.getvalue() for fact in ("toy-data 1.0", "1 MB", "MIT"))
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]
    monkeypatch.setattr("subprocess.run", None)
    assets.fetch(["toy"])


def test_two_fetches_at_once_download_once_and_the_asset_never_goes_away(toy, monkeypatch):
    downloads, run = [], subprocess.run

    def counted(*arguments, **options):
        downloads.append(1)
        return run(*arguments, **options)

    monkeypatch.setattr("subprocess.run", counted)
    threads = [threading.Thread(target=assets.fetch, args=(["toy"], Console(file=io.StringIO()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not assets.is_present("toy"):
        time.sleep(0.01)
    while any(thread.is_alive() for thread in threads):
        assert assets.is_present("toy")
        time.sleep(0.01)
    assert len(downloads) == 1


def test_new_pin_makes_the_old_asset_absent_and_fetch_replaces_it(toy, monkeypatch):
    assets.fetch(["toy"])
    (assets.require("toy") / "stale").touch()
    marker = assets.require("toy") / "asset.json"
    marker.write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(LowRankKitError, match="is not in"):
        assets.require("toy")
    assets.fetch(["toy"])
    assert not (assets.require("toy") / "stale").exists()


def test_absent_asset_says_what_to_run(toy):
    with pytest.raises(LowRankKitError, match=r"`python -m lowrank_kit\.assets toy` \(1 MB by pip, MIT\)"):
        assets.require("toy")


def test_other_file_under_the_same_version_is_refused(toy, monkeypatch):
    monkeypatch.setitem(assets.CATALOGUE, "toy", dataclasses.replace(toy, sha256="0" * 64))
    with pytest.raises(LowRankKitError, match="does not have the pinned sha256 000"):
        assets.fetch(["toy"])
    assert not assets.is_present("toy")


def test_pip_failure_shows_its_last_lines_and_leaves_nothing(toy, monkeypatch):
    monkeypatch.setitem(assets.CATALOGUE, "toy", dataclasses.replace(toy, version="9.9"))
    with pytest.raises(LowRankKitError, match=r"(?s)toy-data 9\.9.*No matching distribution.*Check the network"):
        assets.fetch(["toy"])
    assert list((assets.cache_dir() / "assets").iterdir()) == []


def test_failed_conversion_leaves_nothing(toy, monkeypatch):
    def fail(wheel, folder):
        (folder / "half").touch()
        raise RuntimeError("disk full")

    monkeypatch.setitem(assets.CATALOGUE, "toy", dataclasses.replace(toy, convert=fail))
    with pytest.raises(RuntimeError, match="disk full"):
        assets.fetch(["toy"])
    assert list((assets.cache_dir() / "assets").iterdir()) == []


def test_unknown_name_is_a_configuration_error():
    with pytest.raises(ConfigError, match="did you mean 'minilm_l6'"):
        assets.require("minilm_l12")


def test_command_line_lists_fetches_and_reports_errors(toy, tmp_path, capsys):
    other = tmp_path / "other"
    assert main(["--cache", str(other), "toy"]) == 0
    assert (other / "assets" / "toy" / "rows.txt").is_file()
    assert main(["--list"]) == 0
    assert "toy-data" in capsys.readouterr().out
    assert main(["minilm_l12"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_asking_for_an_asset_does_not_import_torch():
    code = "import sys, lowrank_kit.assets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
