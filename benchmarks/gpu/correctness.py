"""Whether the GPU computes what the CPU does: the tests marked `gpu`, and one model compressed on both.

Plans, weights and perplexities of the two are held against each other, within `BOUNDS`: ranks as a share of all ranks,
products of factors by their relative difference (in float32, where all ranks agree), mean losses in nats. A checkpoint
of either is read on both. In a rehearsal without a GPU both are the CPU, and everything is equal.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from part import Figures, Part

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.models.factored import factored_linears
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.pipeline import execute

ROOT = Path(__file__).parents[2]
METHODS = ("svd_llm", "hisvd", "kfac_svd", "grasp")
BOUNDS = {
    "float32": {"ranks": 0.01, "product": 1e-3, "nll": 1e-3},
    "bfloat16": {"ranks": 0.05, "product": 0.1, "nll": 0.1},
}


def main() -> None:
    part = Part(__doc__ or "")
    part.measure("tests marked gpu", tests)
    for dtype in BOUNDS:
        part.measure(f"dense, {dtype}", partial(dense, part, dtype))
        for method in part.pick(METHODS, METHODS[:1]):
            part.measure(f"{method}, {dtype}", partial(both, part, method, dtype))
    part.finish()


def tests() -> Figures:
    """Run them in a process of their own."""
    # Without the check of annotations: transformers 5.17 declares outputs of type `torch.FloatTensor`, the CPU's. And
    # without errors for warnings: another machine's libraries have others.
    options = ["addopts=--strict-markers --import-mode=importlib", "filterwarnings=default"]
    settings = [word for option in options for word in ("-o", option)]
    file = "tests/integration/test_devices.py"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *settings, "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *_, last = done.stdout.splitlines()
    if done.returncode:
        raise AssertionError(done.stdout[-6000:] + done.stderr[-2000:])
    return {"outcome": last}


def dense(part: Part, dtype: str) -> Figures:
    """The model as it is, on both devices."""
    nll = {device: judged(part, part.small / "model", device, dtype) for device in ("cpu", part.device)}
    return checked(dtype, {"nll": abs(nll["cpu"] - nll[part.device])}) | {"cpu": nll["cpu"]}


def both(part: Part, method: str, dtype: str) -> Figures:
    """Compressed on both devices; each checkpoint is read on the other device, too."""
    with part.scratch() as folder:
        runs = [compressed(part, method, dtype, device, Path(folder, str(n))) for n, device in
                enumerate(("cpu", part.device))]  # fmt: skip
        plans = [json.loads((run / "plan.json").read_text()) for run in runs]
        ranks = [plan["ranks"] for plan in plans]
        moved = sum(abs(ranks[0][name] - rank) for name, rank in ranks[1].items()) / sum(ranks[0].values())
        nll = {f"{at}, read on {device}": judged(part, run / "checkpoint", device, dtype)
               for at, run in zip(("cpu", "device"), runs, strict=True) for device in ("cpu", part.device)}  # fmt: skip
        found = {"ranks": moved, "nll": max(nll.values()) - min(nll.values())}
        if dtype == "float32" and not moved:
            found["product"] = largest_difference(*(run / "checkpoint" for run in runs))
        return checked(dtype, found) | nll


def compressed(part: Part, method: str, dtype: str, device: str, folder: Path) -> Path:
    """Run the command; return the run directory."""
    words = [
        *(f"method={method}", f"device={device}", f"dtype={dtype}", "run.stages=[calibrate,plan,apply]"),
        *(f"run.dir={folder}", "calibration.cache=false"),
    ]
    [config] = Composer().jobs(force_dotted(part.words(*words)), multirun=False)
    return execute(config)


def judged(part: Part, folder: Path, device: str, dtype: str) -> float:
    """Mean negative log-likelihood of a checkpoint on text that nobody calibrated on."""
    model = load_model(ModelSource(str(folder)), "causal", getattr(torch, dtype), device).model
    text = (part.small / "data/text/mine/test.txt").read_text("utf-8")
    ids = torch.tensor(load_tokenizer(ModelSource(str(part.small / "model")))(text, verbose=False)["input_ids"])
    count, length = part.pick((16, 256), (4, 32))
    return perplexity(model, ids[: count * length].view(count, length), device=device).nll


def largest_difference(first: Path, second: Path) -> float:
    """Of the products of all factored linears of two checkpoints, relative in the Frobenius norm."""
    models = [load_model(ModelSource(str(folder)), "causal").model for folder in (first, second)]
    differences = [
        float((a.dense_weight() - b.dense_weight()).norm() / a.dense_weight().norm())
        for (_, a), (_, b) in zip(*map(factored_linears, models), strict=True)
    ]
    return max(differences)


def checked(dtype: str, found: Figures) -> Figures:
    """Raise `AssertionError` where a figure is out of its bounds."""
    bounds = BOUNDS[dtype]
    if beyond := {name: value for name, value in found.items() if not value <= bounds[name]}:
        raise AssertionError(f"beyond {bounds}: {beyond}; all: {found}")
    return found


if __name__ == "__main__":
    main()
