"""How long a streamed compression takes beside that of the same model in memory, and whether the tensors are equal.

    python benchmarks/streamed_resident.py [--method kfac_svd --samples 8 --seq-len 128 --repeats 2 --blocks 30]

SmolLM2-135M, or its first blocks, in float32: the ordinary command compresses it in this process, resident and
streamed in turn, each time without the cache. The ratio is of CPU seconds, which other work does not change much.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.assets import require
from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.pipeline import execute
from lowrank_kit.runs.provenance import in_words, parse_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="kfac_svd")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=30)
    options = parse_study(parser)
    print(in_words(options.provenance))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cut(folder / "model", options.blocks)
        found: dict[str, list[float]] = {"resident": [], "streamed": []}
        for turn in range(options.repeats):
            for weights, seconds in found.items():
                started = time.process_time()
                run = compress(options, folder, weights, turn)
                seconds.append(round(time.process_time() - started, 1))
                print(weights, seconds[-1], flush=True)
                if weights == "resident":
                    expected = tensors(run)
                else:
                    equal = {name: torch.equal(tensor, expected[name]) for name, tensor in tensors(run).items()}
                    print("equal tensors:", sum(equal.values()), "of", len(expected))
    middle = {weights: statistics.median(seconds) for weights, seconds in found.items()}
    print(json.dumps(found), f"streamed / resident: {middle['streamed'] / middle['resident']:.2f}")


def cut(folder: Path, blocks: int) -> None:
    """Write the first blocks of the model."""
    source = require("smollm2_135m")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    del model.model.layers[blocks:]
    model.config.num_hidden_layers = blocks
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def compress(options: argparse.Namespace, folder: Path, weights: str, turn: int) -> Path:
    """Run the command; return the run directory."""
    words = [
        *(f"method={options.method}", f"method.ratio={options.ratio}", f"runtime.weights={weights}", "device=cpu"),
        *(f"model.path={folder / 'model'}", "task=perplexity", "task.calibrate_on=wikipedia"),
        *(f"calibration.samples={options.samples}", f"calibration.seq_len={options.seq_len}"),
        *(f"run.dir={folder / f'run-{weights}-{turn}'}", "run.stages=[calibrate,plan,apply]"),
        "calibration.cache=false",
    ]
    [config] = Composer().jobs(force_dotted(words), multirun=False)
    return execute(config)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """The weights of its checkpoint."""
    return {n: t for file in (run / "checkpoint").glob("*.safetensors") for n, t in load_file(file).items()}


if __name__ == "__main__":
    main()
