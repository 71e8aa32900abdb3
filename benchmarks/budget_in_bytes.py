"""Ranks and bits in one knapsack against plain matrices of 8 and 4 bits, at equal bytes.

    python benchmarks/budget_in_bytes.py task=perplexity/wikipedia eval.held_out=8 task.window=512

The bytes are those that the weights of the block linears take in a checkpoint of a 16-bit model; the arithmetic is in
the model's own format (`dtype`). Budgets are the bytes of all matrices in 8 bits and in 4, and shares of the latter
(`--share`). One calibration and one decomposition serve every row. The held-out windows lie behind those calibrated on.
Log ratios of the perplexity are to the plain row of the same budget (or of 4 bits), paired by window.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from lowrank_kit.allocations.lagrangian import Lagrangian
from lowrank_kit.assets import cache_dir
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.compressors.compressor import Context
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.data.sources import open_source
from lowrank_kit.data.task_texts import TaskTexts
from lowrank_kit.evaluation.perplexity import Perplexity, perplexity
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import load_model
from lowrank_kit.models.rounded import round_linear
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.stages.models import Models
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.truncations.two_sided import TwoSided

FORMS: dict[str, tuple[int, ...]] = {"ranks and 8 or 4 bits": (8, 4), "ranks and 8 bits": (8,), "ranks alone": ()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, action="append", default=[], help="of the bytes of 4 bits")
    parser.add_argument("overrides", nargs="*")
    arguments = parse_study(parser)
    print(in_words(arguments.provenance), end="\n\n")
    [config] = Composer().jobs(force_dotted(["method=none", *arguments.overrides]), multirun=False)
    models = Models(config.model, getattr(torch, config.dtype), "cpu", config.seed)
    source = open_source(config.data.source, config.data.root, config.data.revision)
    [task] = config.task.parts
    texts = TaskTexts(task, source, config.eval, config.calibration)
    rows, opening = texts.calibration(models.reader), texts.opening("calibration", models.reader)
    samples = CalibrationSamples(tuple({"input_ids": row} for row in rows), len(opening), config.calibration.batch_size)
    windows = texts.held_out(config.eval.held_out, models.reader, task.window)
    model = load_model(models.source, "causal", models.dtype).model
    report(model, samples, windows, arguments.share)


def report(model: PreTrainedModel, samples: CalibrationSamples, windows, shares: Sequence[float]) -> None:
    """Print a row for the dense model, the plain ones, and every choice of forms at every budget."""
    layout = replace(layout_of(model), itemsize=2)
    context = Context(model, layout, samples, cache_dir())
    methods = {
        name: TruncatedSVD(
            name="bytes", truncation=TwoSided(), allocation=Lagrangian(), storage=Factors(bits=bits), dense=True
        )
        for name, bits in FORMS.items()
    }
    widest = methods["ranks and 8 or 4 bits"]
    found = widest.calibrate(context)
    whole = 2 * layout.parameters
    print("| bytes / 16 bits | forms | perplexity | s.e. | / dense | log ratio | 16, 8, 4 bits | factored |")
    print("|---|---|---|---|---|---|---|---|")
    dense = perplexity(model, windows)
    _row(1, "dense", dense, dense, None)
    budgets: list[tuple[float, Perplexity]] = []
    for bits in (8, 4):
        rounding, rounded = widest.storage.roundings[bits], copy.deepcopy(model)
        for ref in layout.linears:
            round_linear(rounded, ref.name, rounding)
        size = sum(rounding.size(ref.out_features, ref.in_features, 2) for ref in layout.linears)
        budgets.append((size / whole, perplexity(rounded, windows)))
        _row(size / whole, f"all {bits} bits", budgets[-1][1], dense, None)
    budgets += [(share * budgets[1][0], budgets[1][1]) for share in shares]
    for kept, plain in budgets:
        for name, method in methods.items():
            # A byte more is no byte more: ratios are rounded down to whole ones.
            method = method.model_copy(update={"ratio": 1 - kept})
            plan = method.plan(found, context)
            work = replace(context, model=copy.deepcopy(model))
            measured = perplexity(method.apply(plan, found, work), windows)
            bits = [plan.bits.get(ref.name, 16) for ref in layout.linears]
            cut = sum(plan.ranks[ref.name] < ref.full_rank for ref in layout.linears)
            counts = f"{', '.join(str(bits.count(b)) for b in (16, 8, 4))} | {cut}"
            _row(kept, name, measured, dense, plain, counts)


def _row(
    kept: float, name: str, found: Perplexity, dense: Perplexity, plain: Perplexity | None, counts: str = "| "
) -> None:
    against = ""
    if plain is not None:
        differences = [a - b for a, b in zip(found.per_window, plain.per_window, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        against = f"{statistics.fmean(differences):+.4f} ± {error:.4f}"
    print(
        f"| {kept:.4f} | {name} | {found.value:.2f} | {found.stderr:.2f} | {found.value / dense.value:.4f} "
        f"| {against} | {counts} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
