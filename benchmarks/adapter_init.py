"""How long every adapter takes to start, and how much memory: calibration, decomposition and PEFT's own work.

    python benchmarks/adapter_init.py [--samples 64] [--tokens 512] [--rank 32] [--repeats 1] [--threads 1]
                                      [--methods astra corda ...] [--blocks 10]

All adapt every linear in the blocks of SmolLM2-135M (float32) and read, where they read any, the same token sequences.
Every measurement is a fresh process that loads the model first; what is measured begins after that and ends with a
PEFT model ready to train: wall seconds, and peak resident memory above what the loaded model took. The methods take
turns, so that a drift of the machine's speed hits all, and each one's row is printed as soon as it is measured (medians
so far go to stderr until the last turn). LoRA, which computes nothing, is what PEFT itself costs.
`--blocks` cuts the model.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from fresh import SMOLLM2, PeakMemory, Run, in_fresh_process, smollm2

from lowrank_kit.adapters.adapter import Adapter
from lowrank_kit.adapters.astra import Astra
from lowrank_kit.adapters.corda import Corda
from lowrank_kit.adapters.dora import Dora
from lowrank_kit.adapters.eva import Eva
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.adapters.lora_ga import LoraGA
from lowrank_kit.adapters.mica import Mica
from lowrank_kit.adapters.milora import Milora
from lowrank_kit.adapters.olora import Olora
from lowrank_kit.adapters.pissa import Pissa
from lowrank_kit.assets import require
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.data.sources import DatasetRef, PackagedSource
from lowrank_kit.models.load import load_tokenizer
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.training.initialise import adapt

METHODS: dict[str, tuple[type[Adapter], dict[str, object]]] = {
    "lora": (Lora, {}),
    "dora": (Dora, {}),
    "astra": (Astra, {}),
    "milora": (Milora, {}),
    "mica": (Mica, {}),
    "olora": (Olora, {}),
    "pissa": (Pissa, {}),
    "pissa, 16 iterations": (Pissa, {"iterations": 16}),
    "corda": (Corda, {}),
    "corda_kpm": (Corda, {"mode": "kpm"}),
    "eva": (Eva, {}),
    "lora_ga": (LoraGA, {}),
}


def main() -> None:
    arguments = _arguments()
    if not arguments.measure:
        print(in_words(arguments.provenance), end="\n\n")
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments)))
        return
    print(
        f"{arguments.samples} x {arguments.tokens} tokens of packaged Wikipedia text, rank {arguments.rank}, "
        f"{arguments.blocks or 'all'} blocks, {arguments.threads} threads, {arguments.repeats} runs each, medians\n"
    )
    print("| method | seconds | CPU seconds | extra memory, MiB | parameters that learn |")
    print("|---" * 5 + "|", flush=True)
    runs: dict[str, list[Run]] = {name: [] for name in arguments.methods}
    for last in [*[False] * (arguments.repeats - 1), True]:
        for name, found in runs.items():
            found.append(in_fresh_process(name, arguments))
            print(_row(name, found), flush=True, file=sys.stdout if last else sys.stderr)


def _row(name: str, found: list[Run]) -> str:
    seconds, cpu, extra = (
        statistics.median(run[key] for run in found) for key in ("seconds", "cpu_seconds", "extra_bytes")
    )
    return f"| {name} | {seconds:.1f} | {cpu:.1f} | {extra / 2**20:.0f} | {found[0]['trained']:,} |"


def measure(name: str, arguments: argparse.Namespace) -> Run:
    samples, model = _samples(arguments), smollm2(arguments.blocks)
    kind, settings = METHODS[name]
    method = kind(name="measured", rank=arguments.rank, **settings)
    with PeakMemory() as memory:
        started, cpu_started = time.perf_counter(), time.process_time()
        ready = adapt(model, method, samples, task_type="CAUSAL_LM")
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "extra_bytes": memory.extra_bytes,
        "trained": ready.trained_parameters,
    }


def _samples(arguments: argparse.Namespace) -> CalibrationSamples:
    rows = PackagedSource().load(DatasetRef("text/wikipedia"), "validation").dataset
    ids = load_tokenizer(SMOLLM2)("\n\n".join(rows["text"]), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = ids[: arguments.samples * arguments.tokens].split(arguments.tokens)
    return CalibrationSamples(tuple({"input_ids": window} for window in windows), batch_size=arguments.batch_size)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4, help="calibration sequences a batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--blocks", type=int, default=0, help="use the first so many blocks; 0: all")
    parser.add_argument("--measure", choices=list(METHODS), help=argparse.SUPPRESS)
    require("smollm2_135m")
    return parse_study(parser)


if __name__ == "__main__":
    main()
