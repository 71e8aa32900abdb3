"""What a method computes on the CPU and on another device, in a process that knows the other one.

    python tests/integration/devices_at_work.py elsewhere|cuda CASE ...

Prints a line for each case: its name, and how the two differ or what went wrong; `equal` where they agree. `elsewhere`
is the CPU by another name (`tests/another_device.py`), `cuda` a GPU.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import build_tiny_model

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.compressors.compressor import Compression, Compressor, Context
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.experts import list_experts
from lowrank_kit.models.layout import layout_of
from lowrank_kit.training.initialise import adapt

RANKS = ("method.rank_multiple=1",)
CASES = {
    "svd_llm": ("llama", "method=svd_llm", *RANKS),
    "hisvd, sequential": ("llama", "method=hisvd", *RANKS, "correction=sequential"),
    "kfac_svd of experts": ("qwen3_moe", "method=kfac_svd", *RANKS),
    "svd_llm, pivots": ("llama", "method=svd_llm", *RANKS, "storage=pivot"),
    "kfac_svd, bytes": ("llama", "method=kfac_svd", *RANKS, "storage=bytes"),
    "kfac_svd, channels": ("llama", "method=kfac_svd", *RANKS, "structure=channels"),
    "fwsvd": ("gpt2", "method=fwsvd", *RANKS),
    "aa_svd": ("llama", "method=aa_svd", *RANKS),
    "grasp": ("llama", "method=grasp", "method.removed_share=0.6"),
    "llm_pruner": ("llama", "method=llm_pruner", "method.protect_first=1", "method.protect_last=0"),
    "slicegpt": ("llama", "method=slicegpt", "method.multiple=1"),
    "laco": ("llama", "method=laco", "method.merged=2"),
    "replace_me": ("llama", "method=replace_me"),
    "prune_comp": ("llama", "method=prune_comp"),
    "astra": ("llama", "method=astra", "method.rank=4"),
    "corda": ("llama", "method=corda", "method.rank=4"),
    "lora_ga": ("llama", "method=lora_ga", "method.rank=4"),
    "olora": ("llama", "method=olora", "method.rank=4"),
}


def main(device: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        other, entered = torch.device("cuda:0"), nullcontext()
    else:
        from another_device import DEVICE, another_device

        other, entered = DEVICE, another_device()
    with entered:
        for name in cases:
            try:
                family, *words = CASES[name]
                here, there = (computed(family, words, place) for place in (torch.device("cpu"), other))
                outcome = compared(here, there, other)
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name}: {outcome}", flush=True)


def computed(family: str, words: list[str], device: torch.device) -> tuple[dict[str, int], float, set[torch.device]]:
    """Ranks, mean loss, and the devices of the weights, of a method's outcome."""
    # Its first tokens are special: one has an embedding of zeros.
    ids = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(0))
    model = build_tiny_model(family, initializer_range=0.3).to(device)
    [config] = Composer().jobs(force_dotted([*words, "task=perplexity"]), multirun=False)
    # Rows of two lengths: some are padded.
    sequences = [{"input_ids": row[: 32 - 4 * (number % 2)]} for number, row in enumerate(ids)]
    if isinstance(config.method, Compressor):
        samples = CalibrationSamples(tuple({"input_ids": row} for row in ids), batch_size=4)
        if config.method.factorises:
            list_experts(model)
        work = Compression(config.method, Context(model, layout_of(model), samples))
        plan = work.plan()
        model, ranks = work.apply(plan), dict(plan.ranks)
    else:
        ready = adapt(model, config.method, CalibrationSamples(tuple(sequences), batch_size=4), task_type="CAUSAL_LM")
        model, ranks = ready.model, dict(ready.plan.ranks)
        model(input_ids=ids[:2].to(device), labels=ids[:2].to(device)).loss.backward()
    nll = perplexity(model, ids, batch_size=4, device=device).nll
    return ranks, nll, {parameter.device for parameter in model.parameters()}


def compared(here: tuple, there: tuple, device: torch.device) -> str:
    """`equal`, or what is not."""
    if there[2] != {device}:
        return f"weights on {there[2]}"
    if here[0] != there[0]:
        return f"ranks {here[0]} and {there[0]}"
    return "equal" if abs(here[1] - there[1]) < 1e-3 else f"losses {here[1]} and {there[1]}"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(CASES))
