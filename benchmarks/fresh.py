"""What the benchmarks share: measurements in processes of their own, and peak memory."""

import argparse
import json
import os
import subprocess
import sys
import threading
from typing import Any

import psutil
from transformers import PreTrainedModel

from lowrank_kit.models.load import ModelSource, load_model

SMOLLM2 = ModelSource("packaged://smollm2_135m")

Run = dict[str, Any]


def in_fresh_process(measure: str, arguments: argparse.Namespace) -> Run:
    """Run this script again with ``--measure`` and all its other options; return the JSON that it prints last."""
    options = ["--measure", measure]
    for key, value in vars(arguments).items():
        if key in ("measure", "provenance") or value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        options += [f"--{key.replace('_', '-')}", *map(str, values)]
    # Every linear algebra library in the process has threads of its own.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads))
    done = subprocess.run(
        [sys.executable, sys.argv[0], *options], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | threads
    )
    return json.loads(done.stdout.splitlines()[-1])


def smollm2(blocks: int = 0) -> PreTrainedModel:
    """SmolLM2-135M in float32, or its first blocks, all in memory of its own."""
    model = load_model(SMOLLM2, "causal").model
    if blocks:
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
    # Checkpoints are mapped into memory, and a mapping stays whole while one tensor of it lives: weights that are
    # replaced would still count, and reading the others would count as extra.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


class PeakMemory:
    """Highest resident memory while entered, above what it was at entry, sampled every 5 ms."""

    def __enter__(self) -> "PeakMemory":
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def extra_bytes(self) -> int:
        return self._peak - self._start

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)
