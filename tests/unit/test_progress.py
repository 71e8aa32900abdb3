import io
import logging
import time
from types import SimpleNamespace

from rich.console import Console

from lowrank_kit import progress as module
from lowrank_kit.progress import StageProgress


def test_a_terminal_sees_how_far_it_is_and_the_time_left():
    shown = io.StringIO()
    with StageProgress(Console(file=shown, force_terminal=True, width=100)) as bars:
        task = bars.add_task("calibrate", total=30)
        for _ in range(3):
            time.sleep(0.01)
            bars.advance(task)
        bars.refresh()
    text = shown.getvalue()
    assert all(part in text for part in ("calibrate", "3/30", "left", "0:00:0"))


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, caplog):
    shown, now = io.StringIO(), [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with caplog.at_level(logging.INFO), StageProgress(Console(file=shown)) as bars:
        bars.get_time = lambda: now[0]
        task = bars.add_task("calibrate", total=30)
        for now[0] in (10.0, 20.0, 30.0, 40.0, 50.0, 60.0):
            bars.advance(task)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == ["calibrate: 3 of 30", "calibrate: 6 of 30"]
    assert lines[1] == "calibrate: 6 of 30, 4:00 left"
    assert shown.getvalue() == ""
