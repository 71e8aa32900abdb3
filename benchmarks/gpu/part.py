"""What the parts of the GPU benchmarks share: sizes, a file of figures written as they come, time and memory."""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fresh import PeakMemory
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.runs.provenance import software

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
NARROW = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 1100}

Figures = dict[str, Any]


class Part:
    """A part's command line, and the figures that it has so far.

    ``--rehearse`` takes tiny sizes, on whatever device there is. ``--small`` is the folder that ``small_model.py make``
    left. Of a file that is there already, figures that were measured are not measured again; those that failed are.
    """

    def __init__(self, description: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
        parser.add_argument("--small", type=Path, required=True, help="folder of the small model and its text")
        parser.add_argument("--revision", help="of the code, where there is no repository")
        parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU too")
        options = parser.parse_args()
        self.out, self.small, self.rehearses = options.out, options.small, options.rehearse
        if not self.rehearses and not torch.cuda.is_available():
            parser.error("torch sees no CUDA device here: add --rehearse for tiny sizes on a CPU")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        earlier = json.loads(self.out.read_text()) if self.out.is_file() else {"figures": {}}
        figures = {name: found for name, found in earlier["figures"].items() if "error" not in found}
        self._found = {**self._facts(options.revision), "state": "running", "figures": figures}
        self._write()

    def pick(self, size: Any, rehearsed: Any) -> Any:
        """The size at work, or the tiny one of a rehearsal."""
        return rehearsed if self.rehearses else size

    def measure(self, name: str, work: Callable[[], Figures]) -> None:
        """Note what ``work`` returns with its seconds and peak memory, or how it failed; go on in either case."""
        figures = self._found["figures"]
        if name in figures:
            return
        self._found["at"] = name
        self._write()
        # PEFT's models hold themselves in circles.
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with PeakMemory() as memory:
            try:
                found = work()
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            self.synchronise()
        found |= {"seconds": time.perf_counter() - started, "extra_rss_gib": memory.extra_bytes / 2**30}
        if self.device == "cuda":
            found["peak_cuda_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures[name] = found
        self._write()
        shown = {key: value for key, value in found.items() if key != "traceback"}
        print(f"{self.out.stem}, {name}: {json.dumps(_rounded(shown))}", flush=True)

    def finish(self) -> None:
        """Say that all was tried, and whether all of it worked."""
        self._found.pop("at", None)
        self._found["state"] = "failed" if self.failed else "done"
        self._write()
        sys.exit(bool(self.failed))

    @property
    def failed(self) -> list[str]:
        """Names of the figures that failed."""
        return [name for name, found in self._found["figures"].items() if "error" in found]

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def llama(self, blocks: int, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
        """A random model of Llama-2-7B's widths, made on the device."""
        sizes = self.pick(LLAMA_2_7B, NARROW)
        config = LlamaConfig(**sizes, num_hidden_layers=blocks, max_position_embeddings=4096)
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def windows(self, count: int, length: int) -> torch.Tensor:
        """Random tokens ``[count, length]``, on the CPU."""
        draw = torch.Generator().manual_seed(0)
        return torch.randint(self.pick(LLAMA_2_7B, NARROW)["vocab_size"], (count, length), generator=draw)

    def samples(self, windows: torch.Tensor, batch_size: int = 8) -> CalibrationSamples:
        """Windows to calibrate on."""
        return CalibrationSamples(tuple({"input_ids": ids} for ids in windows), batch_size=batch_size)

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A folder that goes when it is left."""
        return tempfile.TemporaryDirectory(prefix="lowrank_kit-gpu-")

    def words(self, *words: str) -> list[str]:
        """A command on the small model and its text."""
        length, count = self.pick((256, 32), (32, 4))
        others = ("wikitext2", "ptb", "c4", "wikipedia", "openwebtext")
        return [
            *(f"model.path={self.small / 'model'}", "data=local", f"data.root={self.small / 'data'}"),
            *("task=perplexity", "task.texts.mine={}", "task.calibrate_on=mine", f"task.window={length}"),
            *(f"~task.texts.{name}" for name in others),
            *(f"calibration.samples={count}", f"calibration.seq_len={length}", *words),
        ]

    def _facts(self, revision: str | None) -> Figures:
        """Where the figures come from."""
        made_by = software()
        return {
            "part": self.out.stem,
            "rehearsed": self.rehearses,
            "device": self.device,
            "card": torch.cuda.get_device_name() if self.device == "cuda" else platform.processor(),
            "driver": _driver() if self.device == "cuda" else None,
            "cuda": torch.version.cuda,
            "cores": os.cpu_count(),
            "versions": made_by["versions"],
            "revision": revision or (made_by["git"] or {}).get("revision"),
            "command": made_by["command"],
        }

    def _write(self) -> None:
        file = self.out.with_suffix(".writing")
        file.write_text(json.dumps(self._found, indent=1))
        file.replace(self.out)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
