"""What a calibration is said to take: the line comes before it, and changes nothing of what is calibrated."""

import logging
import re

import psutil
import pytest
import torch

from lowrank_kit.calibration import estimate
from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compose import Composer
from lowrank_kit.compressors.compressor import Context
from lowrank_kit.config import load
from lowrank_kit.models.layout import layout_of


@pytest.fixture
def calibrated(tiny_model, tmp_path):
    def calibrate(method, rows):
        model = tiny_model("llama")
        ids = torch.randint(3, 64, (rows, 24), generator=torch.Generator().manual_seed(1))
        samples = CalibrationSamples(tuple({"input_ids": row} for row in ids), batch_size=4)
        compressor = load(Composer().compose([f"method={method}", "task=perplexity"])).method
        return compressor.calibrate(Context(model, layout_of(model), samples, tmp_path / f"{method} {rows}"))

    return calibrate


@pytest.mark.parametrize("method", ["svd_llm", "kfac_svd", "fwsvd", "basis_sharing"])
def test_a_long_calibration_is_announced_and_is_the_same(method, calibrated, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        before = calibrated(method, 16).decomposition.values
        assert "about" not in caplog.text
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
        monkeypatch.setattr(estimate, "WORTH_SAYING", 0.0)
        after = calibrated(method, 16).decomposition.values
        assert len(re.findall(r"calibration on 16 rows: about \d+:\d\d and \d+\.\d GB of memory", caplog.text)) == 1
        assert all(torch.equal(before[name], after[name]) for name in before)
        caplog.clear()
        calibrated(method, 16)
        calibrated(method, 15)
        assert "about" not in caplog.text


def test_twice_the_rows_are_said_to_take_twice_as_long(tiny_model, monkeypatch):
    model = tiny_model("llama")
    layout, clock = layout_of(model), iter(range(100))
    monkeypatch.setattr(estimate, "_now", lambda model: float(next(clock)))
    work = estimate.Work(layout.linears, StatisticsRequest(moments="input"), lambda layers: {}, [[0], [1], [2]])
    found = []
    for rows in (16, 32):
        ids = torch.ones(rows, 24, dtype=torch.long)
        samples = CalibrationSamples(tuple({"input_ids": row} for row in ids), batch_size=4)
        found.append(estimate.estimate(model, layout, samples.batches(4, 0), work))
    # A second for a row's passes, and one for each of the three spans.
    assert [one.seconds for one in found] == [16 + 3, 32 + 3]
    assert all(one.peak_bytes > psutil.Process().memory_info().rss for one in found)
