"""GRASP as lowrank_kit does it against a direct implementation of the published loop: time, memory, perplexity.

    python benchmarks/grasp.py [--samples 32] [--seq-len 512] [--redundant 7] [--repeats 1] [--threads 2]
                               [--full-backward] [--data-root DIR]

All compress SmolLM2-135M (float32), the same redundant blocks to the same ranks, a tenth of a matrix's parameters, on
the same calibration windows, and measure block influence first. The published loop (arXiv 2501.00339, algorithm 1, and
its released code) goes from the last redundant block to the first; for the MLP and then for the attention it puts
layers ``U diag(S) V^T``, multiplied out in every forward pass, in the place of the linears, runs every batch forward
and backward through the model, scores by ``|S dL/dS|`` and truncates: 2 x blocks x batches backward passes. As in the
released code everything but S is frozen, so that a backward pass ends at the block at work; ``--full-backward`` leaves
every parameter trainable, as code does that does not think of it. Two faults of the released code are left out: the
bias stays, and labels are shifted once. Ours is measured with ``propagate=true``, the same order, and with
``propagate=false``, one backward pass.

Every measurement is a fresh process that loads the model first; what is measured begins after that: wall seconds until
the factors are in the model, and peak resident memory above what the loaded model took. They take turns, so that a
drift of the machine's speed hits all. Perplexity is that of windows of 1024 tokens of text that nobody calibrated on.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from fresh import SMOLLM2, PeakMemory, Run, in_fresh_process, smollm2
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, linear
from transformers import PreTrainedModel

from lowrank_kit.assets import require
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.grasp import Grasp
from lowrank_kit.data.sources import DatasetRef, LocalSource, PackagedSource
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.factored import ranks_of, replace_linear
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import load_tokenizer
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.spectral.factors import LowRankFactors

PERPLEXITY_WINDOW = 1024
REMOVED_SHARE = 0.9
SUBLAYERS = (("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), tuple(f"self_attn.{x}_proj" for x in "qkvo"))
NAMES = {"published": "published loop", "propagate": "ours, propagate=true", "one_pass": "ours, propagate=false"}


def main() -> None:
    arguments = _arguments()
    if not arguments.measure:
        print(in_words(arguments.provenance), end="\n\n")
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Run all as often as asked and print a markdown report."""
    runs: dict[str, list[Run]] = {name: [] for name in NAMES}
    for _ in range(arguments.repeats):
        for name, found in runs.items():
            found.append(in_fresh_process(name, arguments))
    text = "packaged Wikipedia text" if arguments.data_root is None else "WikiText-2"
    dense = _judged(smollm2(), arguments)
    print(
        f"{arguments.samples} x {arguments.seq_len} tokens of {text}, batches of {arguments.batch_size}, "
        f"{arguments.threads} threads, redundant blocks {runs['published'][0]['blocks']}, {arguments.repeats} runs "
        f"each, medians; perplexity of {arguments.perplexity_windows} windows, dense: {dense:.3f}\n"
    )
    print("|  | seconds | published / it | CPU seconds | published / it | extra MiB | perplexity | to published |")
    print("|---" * 8 + "|")
    reference = runs["published"][0]["perplexity"]
    for name, found in runs.items():
        columns = []
        for clock in ("seconds", "cpu_seconds"):
            pairs = zip(runs["published"], found, strict=True)
            faster = statistics.median(theirs[clock] / ours[clock] for theirs, ours in pairs)
            columns += [f"{statistics.median(run[clock] for run in found):.1f}", f"{faster:.2f}"]
        extra = statistics.median(run["extra_bytes"] for run in found) / 2**20
        judged = found[0]["perplexity"]
        print(
            f"| {NAMES[name]} | {' | '.join(columns)} | {extra:.0f} | {judged:.3f} | "
            f"{100 * (judged / reference - 1):+.2f} % |"
        )
    blocks = {tuple(run["blocks"]) for found in runs.values() for run in found}
    ranks = {json.dumps(run["ranks"], sort_keys=True) for found in runs.values() for run in found}
    print(f"\nequal blocks: {len(blocks) == 1}; equal ranks: {len(ranks) == 1}")


def measure(name: str, arguments: argparse.Namespace) -> Run:
    calibration, model = _windows("validation", arguments.samples, arguments.seq_len, arguments), smollm2()
    with PeakMemory() as memory:
        started, cpu_started = time.perf_counter(), time.process_time()
        if name == "published":
            blocks = compress_as_published(model, calibration, arguments)
        else:
            blocks = compress(model, calibration, arguments, propagate=name == "propagate")
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "extra_bytes": memory.extra_bytes,
        "blocks": sorted(blocks),
        "ranks": ranks_of(model),
        "perplexity": _judged(model, arguments),
    }


def compress(model: PreTrainedModel, windows: Tensor, arguments: argparse.Namespace, propagate: bool) -> set[int]:
    """Compress a model in place as a run of the pipeline does, without a cache; return the redundant blocks."""
    layout = layout_of(model)
    # The share that makes so many blocks redundant; what is removed of them is the same for all.
    ratio = REMOVED_SHARE * arguments.redundant / len(layout.blocks)
    method = Grasp(
        name="grasp", ratio=ratio, selection="removed", removed_share=REMOVED_SHARE, propagate=propagate
    )  # fmt: skip
    samples = CalibrationSamples(tuple({"input_ids": ids} for ids in windows), batch_size=arguments.batch_size)
    work = Compression(method, Context(model, layout, samples))
    work.calibrate()
    plan = work.plan()
    work.apply(plan)
    return {ref.block for ref in layout.linears if ref.name in plan.kept}


class ExplicitSVD(nn.Module):
    """``U diag(S) V^T`` with S as a parameter, multiplied out in every forward pass."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
        self.u, self.s, self.vh = u, nn.Parameter(s), vh
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.u @ (torch.diag(self.s) @ self.vh), self.bias)


def compress_as_published(model: PreTrainedModel, windows: Tensor, arguments: argparse.Namespace) -> set[int]:
    """Compress a model in place; return the redundant blocks."""
    batches = windows.split(arguments.batch_size)
    influence = _influence(model, batches)
    blocks = sorted(range(len(influence)), key=influence.__getitem__)[: arguments.redundant]
    model.requires_grad_(arguments.full_backward)
    for block in sorted(blocks, reverse=True):
        for paths in SUBLAYERS:
            names = [f"model.layers.{block}.{path}" for path in paths]
            dense = {name: model.get_submodule(name) for name in names}
            layers = {name: ExplicitSVD(dense[name]) for name in names}
            for name, layer in layers.items():
                model.set_submodule(name, layer)
            model.zero_grad()
            for ids in batches:
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            for name, layer in layers.items():
                out_features, in_features = dense[name].weight.shape
                rank = int(out_features * in_features * (1 - REMOVED_SHARE) / (out_features + in_features) + 1e-9)
                kept = (layer.s * layer.s.grad).abs().topk(rank).indices
                root = layer.s.detach()[kept].sqrt()
                model.set_submodule(name, dense[name])
                replace_linear(model, name, LowRankFactors(layer.u[:, kept] * root, root[:, None] * layer.vh[kept]))
    return set(blocks)


@torch.no_grad()
def _influence(model: PreTrainedModel, batches: Sequence[Tensor]) -> list[float]:
    sums = torch.zeros(len(model.model.layers), device=model.device)
    last = []
    # What the model returns last is behind the final norm.
    handle = model.model.norm.register_forward_pre_hook(lambda _module, inputs: last.append(inputs[0]))
    for ids in batches:
        states = model.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        states = [*states[:-1], last.pop()]
        for block, (before, after) in enumerate(pairwise(states)):
            sums[block] += (1 - cosine_similarity(before, after, dim=-1)).sum()
    handle.remove()
    return sums.tolist()


def _windows(split: str, count: int, length: int, arguments: argparse.Namespace) -> Tensor:
    source = PackagedSource() if arguments.data_root is None else LocalSource(arguments.data_root)
    text = DatasetRef("text/wikipedia" if arguments.data_root is None else "text/wikitext2")
    rows = source.load(text, split).dataset["text"]
    ids = torch.tensor(load_tokenizer(SMOLLM2)("\n\n".join(rows), verbose=False)["input_ids"])
    if len(ids) < count * length:
        sys.exit(f"'{split}' has {len(ids)} tokens, fewer than {count} x {length}")
    return ids[: count * length].view(count, length)


def _judged(model: PreTrainedModel, arguments: argparse.Namespace) -> float:
    return perplexity(model, _windows("test", arguments.perplexity_windows, PERPLEXITY_WINDOW, arguments)).value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4, help="calibration windows a batch")
    parser.add_argument("--redundant", type=int, default=7, help="how many blocks are redundant")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--perplexity-windows", type=int, default=8)
    parser.add_argument("--full-backward", action="store_true", help="nothing is frozen in the published loop")
    parser.add_argument("--data-root", type=Path, help="folder with text/wikitext2, as for data=local")
    parser.add_argument("--measure", choices=list(NAMES), help=argparse.SUPPRESS)
    require("smollm2_135m")
    return parse_study(parser)


if __name__ == "__main__":
    main()
