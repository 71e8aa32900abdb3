"""The starts of Astra and CorDA on our primitives against PEFT's CorDA: time and memory as ratios.

    python benchmarks/astra_init.py [--repeats 3] [--samples 64] [--tokens 512] [--ranks 32 128]
                                    [--threads 2]

All calibrate SmolLM2-135M (float32) on the same token sequences and end with a PEFT model ready to train, all
seven linears of a block adapted. Every measurement is a fresh process that loads the model first; what is measured
begins after that: wall and CPU seconds, and peak resident memory above what the loaded model took. They alternate, so
that a drift of the machine's speed hits all. `--blocks` cuts the model, to see what depth costs.
"""

import argparse
import json
import statistics
import time

import torch
from fresh import SMOLLM2, PeakMemory, in_fresh_process, smollm2

from lowrank_kit.adapters.astra import Astra
from lowrank_kit.adapters.corda import Corda
from lowrank_kit.assets import require
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.data.sources import DatasetRef, PackagedSource
from lowrank_kit.models.load import load_tokenizer
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.training.initialise import adapt


def main() -> None:
    arguments = _arguments()
    if not arguments.measure:
        print(in_words(arguments.provenance), end="\n\n")
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.ranks[0], arguments)))
        return
    methods = list(STARTS)
    print(f"{arguments.samples} samples x {arguments.tokens} tokens, {arguments.threads} threads")
    for rank in arguments.ranks:
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
        for _ in range(arguments.repeats):
            for method in methods:
                runs[method].append(
                    in_fresh_process(method, argparse.Namespace(**{**vars(arguments), "ranks": [rank]}))
                )
        for method in methods:
            seconds, cpu, extra = (
                [run[figure] for run in runs[method]] for figure in ("seconds", "cpu_seconds", "extra_mib")
            )
            print(
                f"rank {rank:4d}  {method:10s} {statistics.median(seconds):7.1f} s "
                f"(min {min(seconds):.1f}, max {max(seconds):.1f})  CPU {statistics.median(cpu):7.1f} s "
                f"extra memory {statistics.median(extra):7.0f} MiB"
            )
        for figure in ("seconds", "cpu_seconds", "extra_mib"):
            for method in methods[:-1]:
                pairs = [p[figure] / o[figure] for o, p in zip(runs[method], runs["peft_corda"], strict=True)]
                print(f"rank {rank:4d}  peft_corda / {method}, {figure}: {statistics.median(pairs):.2f} "
                      f"(min {min(pairs):.2f}, max {max(pairs):.2f})")  # fmt: skip


def measure(method: str, rank: int, arguments: argparse.Namespace) -> dict[str, float]:
    model = smollm2(arguments.blocks)
    sequences = _sequences(arguments.samples, arguments.tokens)
    with PeakMemory() as memory:
        started, cpu = time.perf_counter(), time.process_time()
        STARTS[method](model, sequences, rank)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_mib": memory.extra_bytes / 2**20}


def initialise_astra(model: torch.nn.Module, sequences: list[torch.Tensor], rank: int) -> None:
    adapt(model, Astra(name="astra", rank=rank), _samples(sequences), task_type="CAUSAL_LM")


def initialise_corda(model: torch.nn.Module, sequences: list[torch.Tensor], rank: int) -> None:
    adapt(model, Corda(name="corda", rank=rank, mode="kpm"), _samples(sequences), task_type="CAUSAL_LM")


def initialise_peft_corda(model: torch.nn.Module, sequences: list[torch.Tensor], rank: int) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        init_lora_weights="corda",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        corda_config=CordaConfig(corda_method="kpm"),
        task_type="CAUSAL_LM",
    )

    @torch.no_grad()
    def run_model() -> None:
        # One sequence a call: CorDA's hook reads the first row of a batch only.
        for ids in sequences:
            model(input_ids=ids[None], use_cache=False)

    preprocess_corda(model, config, run_model=run_model)
    get_peft_model(model, config)


STARTS = {"astra": initialise_astra, "corda": initialise_corda, "peft_corda": initialise_peft_corda}


def _samples(sequences: list[torch.Tensor]) -> CalibrationSamples:
    return CalibrationSamples(tuple({"input_ids": ids} for ids in sequences), batch_size=4)


def _sequences(samples: int, tokens: int) -> list[torch.Tensor]:
    rows = PackagedSource().load(DatasetRef("text/wikipedia"), "validation").dataset
    ids = load_tokenizer(SMOLLM2)("\n\n".join(rows["text"]), return_tensors="pt")["input_ids"][0]
    return list(ids[: samples * tokens].split(tokens))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", type=int, default=0, help="use the first so many blocks; 0: all")
    parser.add_argument("--measure", choices=list(STARTS), help=argparse.SUPPRESS)
    require("smollm2_135m")
    return parse_study(parser)


if __name__ == "__main__":
    main()
