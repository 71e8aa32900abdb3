"""GRASP's redundant blocks at GRASP's ranks, cut by the optimal activation-aware truncation instead of plain SVD.

    python experiments/grasp_smollm2/activation_aware.py --wikitext FOLDER PLAN.json [PLAN.json ...]

Each PLAN.json is that of a `grasp` run. Same calibration and test windows as the study; no gradient plays a part.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.assets import cache_dir
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Context
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.runs.provenance import in_words, parse_study
from lowrank_kit.truncations.optimal import Optimal

SOURCE = ModelSource("packaged://smollm2_135m")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN.json")
    arguments = parse_study(parser)
    print(in_words(arguments.provenance))
    calibration = windows(arguments.wikitext, "validation", 16, 512)
    test = windows(arguments.wikitext, "test", 16, 1024)
    samples = CalibrationSamples(tuple({"input_ids": ids} for ids in calibration), batch_size=1)
    method = TruncatedSVD(name="svd_llm", truncation=Optimal(), allocation=Uniform(), ratio=0.2)
    for file in arguments.plans:
        model = load_model(SOURCE, "causal").model
        context = Context(model, layout_of(model), samples, cache_dir() / "calibration")
        found = method.calibrate(context)
        plan = method.decide(layout_of(model), found.candidates, None)
        ranks = json.loads(file.read_text())["ranks"]
        method.apply(replace(plan, ranks=ranks), found, context)
        blocks = sorted({ref.block for ref in layout_of(model).linears if ref.rank is not None})
        print(f"blocks {blocks}: {perplexity(model, test).value:.2f}")


def windows(folder: Path, split: str, count: int, length: int) -> torch.Tensor:
    rows = [json.loads(line)["text"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    ids = torch.tensor(load_tokenizer(SOURCE)("\n\n".join(rows), verbose=False)["input_ids"])
    return ids[: count * length].view(count, length)


if __name__ == "__main__":
    main()
