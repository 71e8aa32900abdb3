import json
import os
import subprocess
import sys
import time

import pytest
import torch

from lowrank_kit.cache.__main__ import main
from lowrank_kit.cache.entry import entries, limit_bytes, make_room
from lowrank_kit.cache.figures import append_checked_line, read_checked_lines, shared_figures
from lowrank_kit.cache.key import StatisticsKey, maker_of
from lowrank_kit.calibration.store import CalibrationStore
from lowrank_kit.errors import ConfigError, LowRankKitError


def key(text="some text", **more) -> StatisticsKey:
    facts = {"model": "m", "reads": "loss", "architecture": "a.Llama", "config": {}, "dtype": "float32"}
    how = {"device": "cpu", "attention": "sdpa", "batch_size": 1, "request": {"quantity": "gram"}, "maker": "x"}
    return StatisticsKey(**(facts | how | {"text": text} | more))


def filled(root, text, blocks=3) -> CalibrationStore:
    store = CalibrationStore(root, key(text))
    for block in range(blocks):
        store.save(block, {"q": {"gram": torch.full((20, 20), float(block)), "half": torch.ones(3).bfloat16()}})
    return store


def reopened(store) -> CalibrationStore:
    return CalibrationStore(store.root, store.key)


DAMAGES = {
    "a flipped bit at the end": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    "zeros in the middle": lambda whole: whole[:900] + bytes(64) + whole[964:],
    "cut short": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "another type in the header": lambda whole: whole.replace(b'"F32"', b'"I32"'),
    "a renamed tensor": lambda whole: whole.replace(b"q|gram", b"k|gram"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_noticed_and_made_again(tmp_path, damage, caplog):
    store = filled(tmp_path, "text")
    file = store.folder / "block-0001.safetensors"
    damaged = DAMAGES[damage](file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    with pytest.raises(LowRankKitError, match=r"block-0001\.safetensors are damaged"):
        reopened(store).load(1)
    again = reopened(store)
    with again.missing(range(3)) as missing:
        assert missing == {1}
        again.save(1, {"q": {"gram": torch.ones(2)}})
    assert "block-0001.safetensors are damaged" in caplog.text
    assert torch.equal(reopened(store).load(1)["q"]["gram"], torch.ones(2))


def test_a_file_of_another_block_or_key_is_not_taken_for_this_one(tmp_path):
    first, second = filled(tmp_path, "one"), filled(tmp_path, "two")
    zero, one = (first.folder / f"block-000{block}.safetensors" for block in (0, 1))
    two = second.folder / "block-0002.safetensors"
    held = zero.read_bytes()
    zero.write_bytes(one.read_bytes())
    one.write_bytes(held)
    two.write_bytes((first.folder / two.name).read_bytes())
    with reopened(first).missing(range(3)) as missing:
        assert missing == {0, 1}
    with reopened(second).missing(range(3)) as missing:
        assert missing == {2}


def test_a_filled_cache_on_a_read_only_disk_is_read(tmp_path):
    store = filled(tmp_path, "text")
    before = {path: path.stat().st_mtime_ns for path in store.folder.iterdir() if path.name != "key.json"}
    names = sorted(path.name for path in store.folder.iterdir())
    store.folder.chmod(0o555)
    try:
        again = reopened(store)
        with again.missing(range(3)) as missing:
            assert missing == set()
        assert again.load(2)["q"]["gram"][0, 0] == 2
    finally:
        store.folder.chmod(0o755)
    assert sorted(path.name for path in store.folder.iterdir()) == names
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())


def unused_for(store, hours) -> None:
    moment = time.time() - 3600 * hours
    os.utime(store.folder / "key.json", (moment, moment))


def test_the_least_recently_used_entries_leave_when_the_limit_is_reached(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    stores = {hours: filled(tmp_path, str(hours)) for hours in (5, 4, 3, 0)}
    for hours, store in stores.items():
        unused_for(store, hours)
    size = entries(tmp_path)[0].size
    monkeypatch.setenv("LOWRANK_KIT_CACHE_GB", str(2.5 * size / 1e9))
    make_room(tmp_path)
    assert [entry.folder for entry in entries(tmp_path)] == [stores[3].folder, stores[0].folder]
    assert "the least recently used" in caplog.text
    monkeypatch.setenv("LOWRANK_KIT_CACHE_GB", str(0.1 * size / 1e9))
    make_room(tmp_path)
    # Another process may be reading what was used within the hour.
    assert [entry.folder for entry in entries(tmp_path)] == [stores[0].folder]


def test_an_entry_that_is_being_computed_is_spared_however_long_it_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_KIT_CACHE_GB", "1e-9")
    at_work = CalibrationStore(tmp_path, key("long"))
    with at_work.missing(range(2)) as missing:
        assert missing == {0, 1}
        # Begun hours ago; the lock's heartbeat is all that was heard of since.
        unused_for(at_work, 5)
        make_room(tmp_path)
        assert at_work.folder.is_dir()
        for block in range(2):
            unused_for(at_work, 5)
            at_work.save(block, {"q": {"gram": torch.ones(2)}})
    # What was computed with so much work is not the first to go.
    assert reopened(at_work).finished_blocks() == {0, 1}
    make_room(tmp_path)
    assert at_work.folder.is_dir()


def test_figures_that_took_hours_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_KIT_CACHE_GB", "1e-9")

    def measure():
        moment = time.time() - 5 * 3600
        os.utime(tmp_path / key().digest / "key.json", (moment, moment))
        return 3

    assert shared_figures(tmp_path, key(), "perplexity", measure) == 3
    assert shared_figures(tmp_path, key(), "perplexity", lambda: 4) == 3


def test_a_block_that_another_process_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    store = reopened(filled(tmp_path, "text"))
    file, read = store.folder / "block-0001.safetensors", CalibrationStore._read

    def gone(self, block):
        if block == 1 and file.is_file():
            file.unlink()
        return read(self, block)

    monkeypatch.setattr(CalibrationStore, "_read", gone)
    with store.missing(range(3)) as missing:
        assert missing == {1}


def test_an_unreadable_key_is_written_again(tmp_path):
    store = filled(tmp_path, "text")
    file = store.folder / "key.json"
    whole = file.read_bytes()
    for damaged in (b"", b"{", b"\xff", whole[:40]):
        file.write_bytes(damaged)
        assert reopened(store).finished_blocks() == {0, 1, 2}
        assert file.read_bytes() == whole


def test_calibration_that_fills_the_cache_makes_room(tmp_path, monkeypatch):
    old = filled(tmp_path, "old")
    unused_for(old, 30)
    monkeypatch.setenv("LOWRANK_KIT_CACHE_GB", str(1.5 * entries(tmp_path)[0].size / 1e9))
    new = CalibrationStore(tmp_path, key("new"))
    with new.missing(range(3)) as missing:
        assert missing == {0, 1, 2}
        filled(tmp_path, "new")
    assert [entry.folder for entry in entries(tmp_path)] == [new.folder]


@pytest.mark.parametrize("value", ["lots", "-1", "0", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("LOWRANK_KIT_CACHE_GB", value)
    with pytest.raises(ConfigError, match=f"LOWRANK_KIT_CACHE_GB='{value}' is not a number of gigabytes above 0"):
        limit_bytes()


def test_figures_are_measured_once_and_again_when_damaged(tmp_path):
    measured = []

    def measure():
        measured.append(1)
        return {"value": 20.5}

    for _ in range(2):
        assert shared_figures(tmp_path, key(), "perplexity", measure) == {"value": 20.5}
    assert len(measured) == 1
    file = tmp_path / key().digest / "figures.json"
    for damaged in (file.read_text().replace("20.5", "20.4"), file.read_text()[:20], "[]", "", "{}"):
        file.write_text(damaged)
        assert shared_figures(tmp_path, key(), "perplexity", measure) == {"value": 20.5}
    assert len(measured) == 6


def test_damaged_lines_are_left_out(tmp_path):
    file = tmp_path / "losses.jsonl"
    assert read_checked_lines(file) == []
    for content in (["a", 0.25], ["b", 0.5], ["c", 0.75]):
        append_checked_line(file, content)
    whole = file.read_text()
    file.write_text(whole.replace("0.5", "0.6"))
    assert read_checked_lines(file) == [["a", 0.25], ["c", 0.75]]
    file.write_text(whole[:-5])
    assert read_checked_lines(file) == [["a", 0.25], ["b", 0.5]]
    file.write_text("7\n[]\nnull\n" + whole)
    assert len(read_checked_lines(file)) == 3


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    stores = [filled(tmp_path / "calibration", text) for text in ("one", "two")]
    shared_figures(tmp_path / "perplexity", key(request={"quantity": "perplexity"}), "perplexity", lambda: 3)
    return stores


def test_the_command_lists_what_there_is(cache, capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(store.folder.name[:12] in said for store in cache)
    assert '{"quantity": "perplexity"}' in said
    assert "at most 50.00 GB" in said
    (cache[0].folder / "key.json").write_text("{")
    assert main([]) == 0
    assert "its key is damaged" in capsys.readouterr().out


def test_the_command_clears_what_it_is_told_to(cache, capsys, tmp_path):
    first, second = (store.folder for store in cache)
    assert main(["--clear", first.name[:10]]) == 0
    assert not first.exists()
    assert second.exists()
    assert main(["--clear", "nothing"]) == 2
    assert "no entry of the cache begins with 'nothing'" in capsys.readouterr().err
    assert second.exists()
    assert main(["--clear"]) == 0
    assert not list(tmp_path.glob("*/*/key.json"))


def test_a_class_without_source_is_known_to_its_own_process_alone():
    program = "class Mine: ...\nfrom lowrank_kit.cache.key import maker_of\nprint(maker_of(Mine), maker_of(Mine))"
    said = [subprocess.check_output([sys.executable, "-c", program], text=True).split() for _ in range(2)]
    assert all(first == second for _, first, _, second in said)
    assert said[0][1] != said[1][1]


def test_makers_of_this_package_have_one_digest_and_their_own_names():
    names, digests = zip(*(maker_of(maker).split() for maker in (CalibrationStore, StatisticsKey)), strict=True)
    assert names == ("lowrank_kit.calibration.store.CalibrationStore", "lowrank_kit.cache.key.StatisticsKey")
    assert len(set(digests)) == 1


def test_every_part_of_a_key_tells_entries_apart():
    changed = {
        "model": "n", "reads": "blocks", "architecture": "b", "config": {"rope_theta": 1}, "dtype": "bfloat16",
        "device": "cuda", "attention": "eager", "text": "other", "batch_size": 2, "request": {}, "maker": "y",
        "linears": ("q",), "tokenizer": "t", "versions": {"torch": "1"},
    }  # fmt: skip
    assert set(changed) == set(json.loads(key().description))
    assert len({key().digest, *(key(**{name: value}).digest for name, value in changed.items())}) == 1 + len(changed)
