"""What a LoRA extracted from a full fine-tune loses, by rank: a small encoder on SST-2, judged on the rows held out.

    python benchmarks/extract.py --folder DIR [--ranks 1 2 4 8 16 32 64] [--energies 0.5 0.9 0.99] [--budgets 41472 ...]

An ordinary run of `method=full_ft` first, then `export --format lora` at every rank, energy and budget of parameters,
by weights and by the outputs on the training sentences. The budgets are those of ranks 1, 4 and 16. Loss and accuracy
are of the model that PEFT makes of the base and the adapter.
"""

import argparse
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.data.sources import DatasetRef, PackagedSource
from lowrank_kit.export import main as export
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.pipeline import execute
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.training.adapter_files import load_adapter

BASE = ModelSource("packaged://minilm_l6")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--energies", type=float, nargs="*", default=[0.5, 0.9, 0.99])
    parser.add_argument("--budgets", type=int, nargs="*", default=[41472, 165888, 663552])
    options = parse_study(parser)
    print(in_words(options.provenance))
    # The rate of BERT's own fine-tuning; the default is for adapters.
    words = ["method=full_ft", "task=glue/sst2", "train.learning_rate=5e-5", f"run.root={options.folder / 'runs'}"]
    run = execute(Composer().jobs(force_dotted(words), multirun=False)[0])
    rows = PackagedSource().load(DatasetRef("glue/sst2"), "validation").dataset
    sentences = PackagedSource().load(DatasetRef("glue/sst2"), "train").dataset["sentence"]
    text = options.folder / "sentences.txt"
    text.write_text("\n".join(sentences))
    base = load_model(BASE, "classification", num_labels=2).model
    print("| extracted | parameters | loss | accuracy |\n|---|---|---|---|")
    tuned = load_model(ModelSource(str(run / "checkpoint")), "classification", num_labels=2).model
    row("all that was learnt", tuned.num_parameters(), tuned, rows)
    for name, wanted in list(choices(options)):
        for by, more in (("weights", []), ("outputs", ["--text", str(text)])):
            folder = options.folder / f"{name}-{by}".replace(" ", "-")
            with contextlib.redirect_stdout(io.StringIO()):
                assert export([str(run), "--format", "lora", "--output", str(folder), *wanted, *more]) == 0
            adapted = load_adapter(load_model(BASE, "classification", num_labels=2).model, folder)
            added = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
            row(f"{name}, by {by}", added, adapted, rows)
    row("the base and the tuned head", 0, with_head(base, tuned), rows)


def choices(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    for rank in options.ranks:
        yield f"rank {rank}", ["--rank", str(rank)]
    for energy in options.energies:
        yield f"energy {energy}", ["--energy", str(energy)]
    for budget in options.budgets:
        yield f"budget {budget}", ["--parameters", str(budget)]


def with_head(base: PreTrainedModel, tuned: PreTrainedModel) -> PreTrainedModel:
    base.classifier.load_state_dict(tuned.classifier.state_dict())
    return base


@torch.no_grad()
def row(name: str, parameters: int, model: PreTrainedModel, rows) -> None:
    tokenizer, losses, right = load_tokenizer(BASE), [], 0
    for start in range(0, len(rows), 32):
        batch = rows.select(range(start, min(start + 32, len(rows))))
        logits = model.eval()(**tokenizer(list(batch["sentence"]), padding=True, return_tensors="pt")).logits
        labels = torch.tensor(batch["label"])
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
    print(f"| {name} | {parameters:,} | {float(sum(losses)) / len(rows):.4f} | {right / len(rows):.1%} |", flush=True)


if __name__ == "__main__":
    main()
