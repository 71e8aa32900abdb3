"""Runs that are killed at random moments, again and again, and then finish: with what an undisturbed run leaves."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from trial import Machine, left, litter

from lowrank_kit.runs.status import read_status

# How many kills before a run may finish, and how many runs of a kind: with the report, 108 kills of twelve kinds.
KILLS, RUNS = 3, 3
COMPRESSION = {
    "one block at a time": ("svd_llm", "runtime=streamed"),
    "gradients": ("kfac_svd",),
    "refinement": ("svd_llm", "correction=refine", "method.correction.passes=2"),
    "residual": ("svd_llm", "correction=residual", "storage=pivot"),
    "blocks": ("shortgpt",),
    "merged blocks": ("laco", "method.merged=2"),
    "recovery": ("svd_llm", "recovery=lora", "recovery.data=text", "train.max_steps=8", "train.save_every=2"),
    "evaluation": ("none",),
}
TRAINING = {
    "adapter": ("method=lora", "train.max_steps=12", "train.save_every=3"),
    "all weights": ("method=full_ft", "train.max_steps=8", "train.save_every=2"),
}
SWEEP = "sweep"
# Elsewhere figures are left empty: drawing takes as long as the rest of a tiny run.
DRAWN = ("one block at a time", "adapter")
KINDS = [*COMPRESSION, *TRAINING, SWEEP]


@pytest.fixture(autouse=True)
def _in_a_campaign(full) -> None:
    if not full:
        pytest.skip("in `make campaign`; the suite kills a run in test_resume, test_streamed and test_sweep")


@pytest.fixture
def command(language_arguments, arguments) -> Callable[[str, Path], list[str]]:
    """The words of a kind of run, in a folder of its own."""

    def build(kind: str, root: Path) -> list[str]:
        if kind in TRAINING:
            words = [word for word in arguments(*TRAINING[kind]) if word != "method.rank=2"]
            return ["run", *words, f"run.root={root}"]
        method, *more = COMPRESSION.get(kind, ("svd",))
        if method not in ("none", "shortgpt", "laco"):
            more.append("method.rank_multiple=1")
        more += ["-m", "method.ratio=0.3,0.4"] if kind == SWEEP else []
        # One block of three goes.
        more += ["method.ratio=0.3"] if kind in ("blocks", "merged blocks") else []
        return ["run", *language_arguments(*more, method=method), f"run.root={root}"]

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_an_undisturbed_one(kind, command, trials, tmp_path):
    draw, machine = random.Random(f"0 {kind}"), Machine(draws=kind in DRAWN)
    started = time.monotonic()
    assert trials.run(command(kind, tmp_path / "whole"), tmp_path / "whole cache", machine) == 0, trials.said
    seconds, expected = time.monotonic() - started, left(tmp_path / "whole")
    assert expected
    for number in range(RUNS):
        root, cache = tmp_path / f"{number}", tmp_path / f"cache {number}"
        for _ in range(KILLS):
            process = trials.start(command(kind, root), cache, machine)
            process.join(draw.uniform(0.02, seconds))
            process.kill()
            process.join()
            for status in map(read_status, {f.parent for f in root.rglob("status.json")}):
                assert status.state in ("interrupted", "complete")
        assert trials.run(command(kind, root), cache, machine) == 0, trials.said
        assert left(root) == expected
        assert litter(root) + litter(cache) == []
        assert {read_status(f.parent).state for f in root.rglob("status.json")} == {"complete"}


def test_a_killed_report_ends_as_an_undisturbed_one(command, trials, tmp_path):
    draw, cache, drawn = random.Random("0 report"), tmp_path / "cache", Machine(draws=True)
    for kind in ("evaluation", "gradients", "adapter"):
        assert trials.run(command(kind, tmp_path / "runs"), cache, drawn) == 0, trials.said
    words = ["report", str(tmp_path / "runs"), "--output"]
    started = time.monotonic()
    assert trials.run([*words, str(tmp_path / "whole")], cache, drawn) == 0, trials.said
    seconds, expected = time.monotonic() - started, contents(tmp_path / "whole")
    assert expected
    for number in range(RUNS):
        output = tmp_path / f"{number}"
        for _ in range(KILLS):
            process = trials.start([*words, str(output)], cache, drawn)
            process.join(draw.uniform(0.02, seconds))
            process.kill()
            process.join()
            # What is there is whole.
            whole = {name: content for name, content in contents(output).items() if not name.startswith(".")}
            assert whole.items() <= expected.items()
        assert trials.run([*words, str(output)], cache, drawn) == 0, trials.said
        assert contents(output) == expected


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else {}


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_says_so(sign, command, trials, tmp_path):
    draw = random.Random(int(sign))
    for kind in KINDS[:-1]:
        root, cache = tmp_path / kind, tmp_path / f"{kind} cache"
        process = trials.start(command(kind, root), cache)
        while not list(root.rglob("status.json")) and process.is_alive():
            time.sleep(0.005)
        process.join(draw.uniform(0, 0.3))
        # It may have been done already.
        with suppress(ProcessLookupError):
            os.kill(process.pid, sign)
        process.join()
        [status] = {read_status(f.parent).state for f in root.rglob("status.json")}
        assert (status, process.exitcode) in (("interrupted", 128 + sign), ("complete", 0)), (kind, trials.said)
        assert "Traceback" not in trials.said
        assert trials.run(command(kind, root), cache) == 0, trials.said
        assert litter(root) + litter(cache) == []
