"""Perplexity on held-out windows of a model, of its quantised base and of that with corrections.

    python -m lowrank_kit.eora OUTPUT --rank 32 --rank 128 task=perplexity/wikipedia calibration.samples=8
    python benchmarks/eora.py OUTPUT task=perplexity/wikipedia calibration.samples=8 eval.held_out=4 task.window=512

The overrides are the command's, with `eval.held_out` and `task.window` of the windows to measure on, which lie behind
those that were calibrated on.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.data.sources import open_source
from lowrank_kit.data.task_texts import TaskTexts
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.load import load_model
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.stages.models import Models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parse_study(parser)
    print(in_words(arguments.provenance))
    [config] = Composer().jobs(force_dotted(["method=none", *arguments.overrides]), multirun=False)
    models = Models(config.model, getattr(torch, config.dtype), "cpu", config.seed)
    source = open_source(config.data.source, config.data.root, config.data.revision)
    [task] = config.task.parts
    texts = TaskTexts(task, source, config.eval, config.calibration)
    windows = texts.held_out(config.eval.held_out, models.reader, task.window)
    print("| model | perplexity | s.e. | / dense |\n|---|---|---|---|")
    dense = None
    for name, model in opened(models, arguments.output):
        found = perplexity(model, windows)
        dense = dense or found.value
        print(f"| {name} | {found.value:.2f} | {found.stderr:.2f} | {found.value / dense:.4f} |", flush=True)


def opened(models: Models, folder: Path) -> Iterator[tuple[str, PreTrainedModel]]:
    """The original, the quantised base, and the base with every correction, by rank."""
    yield "dense", load_model(models.source, "causal", models.dtype).model
    yield "quantised", AutoModelForCausalLM.from_pretrained(folder / "base")
    for adapter in sorted(folder.glob("rank-*"), key=lambda path: int(path.name.partition("-")[2])):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        yield f"quantised + {adapter.name.replace('-', ' ')}", PeftModel.from_pretrained(base, adapter).base_model.model


if __name__ == "__main__":
    main()
