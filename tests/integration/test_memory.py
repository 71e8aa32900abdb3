"""A device that is not there, that is too small, or that is full in the middle of the work."""

import json

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.pipeline import execute
from lowrank_kit.runs.status import read_status

SMALL = ["method.ratio=0.4", "method.rank_multiple=1", "task.batch_size=4", "eval.limit=4"]


@pytest.fixture
def full_above(monkeypatch):
    """Let the device run out of memory in an MLP that reads more rows than these at once; returns the rows read."""
    read, forward = [], LlamaMLP.forward

    def full(rows):
        def narrow(self, hidden):
            read.append(len(hidden))
            if len(hidden) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return forward(self, hidden)

        monkeypatch.setattr(LlamaMLP, "forward", narrow)
        return read

    return full


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_nothing_begins(language_arguments, composed, tmp_path):
    with pytest.raises(ConfigError, match=r"device=cuda: torch .* sees 0 CUDA devices here.* use device=auto"):
        execute(composed(language_arguments("device=cuda")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "helps"),
    [
        (SMALL[:2], "runtime=streamed"),
        (["method=none"], "runtime=spread"),
        ([*SMALL[:2], "dtype=bfloat16"], "bfloat16, and"),
    ],
)
def test_weights_that_find_no_room_are_refused_before_they_are_read(
    words, helps, language_arguments, composed, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20_000, 40_000))
    with pytest.raises(ConfigError, match=r"the weights of tiny take 0.0 GiB .* are free on cuda") as refused:
        execute(composed(language_arguments("device=cuda", *words)))
    assert helps in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_finds_the_device_full_goes_on_with_fewer_rows(language_arguments, composed, full_above, tmp_path):
    words = [*SMALL, "calibration.cache=false"]
    expected = execute(composed(language_arguments(*words, f"run.dir={tmp_path / 'wide'}")))
    read = full_above(1)
    run = execute(composed(language_arguments(*words, f"run.dir={tmp_path / 'narrow'}")))
    assert {1, 2, 4} == set(read)
    assert read_status(run).state == "complete"
    plans, results = ([json.loads((each / f"{name}.json").read_text()) for each in (expected, run)]
                      for name in ("plan", "results"))  # fmt: skip
    assert plans[0]["ranks"] == plans[1]["ranks"]
    assert [r["value"] for r in results[0]] == pytest.approx([r["value"] for r in results[1]], rel=1e-4)
    warned = json.loads((run / "manifest.json").read_text())["warnings"]
    assert any("batches of 1/4 the rows" in warning["message"] for warning in warned)


def test_one_that_has_no_room_for_a_row_says_what_takes_less_and_goes_on_later(
    language_arguments, composed, full_above
):
    config = composed(language_arguments(*SMALL))
    full_above(0)
    with pytest.raises(LowRankKitError, match=r"no memory for the stage calibrate .*lower calibration.seq_len"):
        execute(config)
    full_above(8)
    assert read_status(execute(config)).state == "complete"
