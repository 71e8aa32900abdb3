"""Which eigenvectors should Astra use, and does confining the update to them matter?

    python experiments/astra_subspace/run.py STUDY.yaml --data FOLDER [--workers 1] [--runs FOLDER] [OVERRIDE ...]

Every arm trains as many parameters as the others, at a learning rate chosen for it on held-out training rows. FOLDER
holds glue/{sst2,stsb}/{train,validation}.jsonl in the hub's columns, for the tasks with `data=local`. Every run has a
directory of its own, found again by its configuration: a killed study continues where it was. After every seed that all
arms of a task have finished, `STUDY.results.json`, `STUDY.table.md` and the plots beside the study are written anew.
"""

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import isfinite
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from report import value, write

from lowrank_kit.runs.provenance import origin, parse_study

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study file, and what the command line adds to every run."""

    settings: Mapping[str, Any]
    folder: str | None
    extra: Sequence[str]

    def overrides(self, task: str, arm: str, rate: float, seed: int, tuning: bool) -> list[str]:
        """The command line of one run."""
        its, own = self.settings["tasks"][task], self.settings["arms"][arm]
        rows = its["tuning"] if tuning else its.get("judging", ())
        mine = [*self.settings["common"], *flat(its["settings"]), *flat(own), *rows]
        root = [f"data.root={self.folder}"] if "data=local" in mine and self.folder else []
        return [*mine, *root, f"train.learning_rate={rate}", f"seed={seed}", *self.extra]

    def tuned_by(self, task: str) -> tuple[dict[str, str], float]:
        """The figure that chooses the learning rate, and its sign: more is better, but for a perplexity."""
        figure = self.settings["tasks"][task].get("tuned_by", self.settings["tasks"][task]["figure"])
        return figure, -1.0 if figure["metric"] == "perplexity" else 1.0


def main() -> None:
    arguments = _arguments()
    settings = yaml.safe_load(arguments.study.read_text())
    study = Study(settings, arguments.data, [*arguments.overrides, f"run.root={arguments.runs}"])
    tuned: list[Row] = []
    rows: list[Row] = []
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), _single_threaded) as pool:
        for task in settings["tasks"]:
            scores = tune(study, task, partial(pool.map, run_or_lose))
            _, sign = study.tuned_by(task)
            chosen = {arm: best(found, sign) for arm, found in scores.items()}
            tuned += [
                {
                    "task": task, "arm": arm, "learning_rate": rate, "chosen": rate == chosen[arm],
                    "score": score if isfinite(score) else None,
                }
                for arm, found in scores.items()
                for rate, score in sorted(found.items())
            ]  # fmt: skip
            for seed in settings["seeds"]:
                jobs = [study.overrides(task, arm, rate, seed, False) for arm, rate in chosen.items()]
                for (arm, rate), found in zip(chosen.items(), pool.map(run, jobs), strict=True):
                    rows.append({"task": task, "arm": arm, "seed": seed, "learning_rate": rate, **found})
                write(arguments.study, settings, tuned, rows, arguments.provenance)
    print(arguments.study.with_suffix(".table.md").read_text())


def tune(study: Study, task: str, runs: Any) -> dict[str, dict[float, float]]:
    """Every arm's score by learning rate; where the best is an edge, of the next rate beyond it too."""
    figure, sign = study.tuned_by(task)
    grid, seed = [float(rate) for rate in study.settings["learning_rates"]], study.settings["tuning_seed"]
    arms = study.settings["arms"]

    def measure(cells: Sequence[tuple[str, float]]) -> Iterable[tuple[str, float, float]]:
        found = runs([study.overrides(task, arm, rate, seed, True) for arm, rate in cells])
        for (arm, rate), row in zip(cells, found, strict=True):
            yield arm, rate, value(row["figures"], figure) if row else -sign * float("inf")

    scores: dict[str, dict[float, float]] = {arm: {} for arm in arms}
    for arm, rate, score in measure([(arm, rate) for arm in arms for rate in grid]):
        scores[arm][rate] = score
    step = grid[1] / grid[0]
    beyond = {grid[0]: grid[0] / step, grid[-1]: grid[-1] * step}
    edges = [(arm, beyond[rate]) for arm in arms if (rate := best(scores[arm], sign)) in beyond]
    for arm, rate, score in measure(edges):
        scores[arm][rate] = score
    return scores


def best(scores: Mapping[float, float], sign: float) -> float:
    """The best learning rate, of equals the lowest."""
    return max(sorted(scores), key=lambda rate: sign * scores[rate])


def run(overrides: list[str]) -> Row:
    """One run in this worker process, or what an earlier one left."""
    from lowrank_kit.compose import Composer, force_dotted
    from lowrank_kit.pipeline import execute
    from lowrank_kit.run import set_up_console
    from lowrank_kit.runs.directory import run_path
    from lowrank_kit.runs.status import read_status

    set_up_console()
    [config] = Composer().jobs(force_dotted(overrides), multirun=False)
    folder = run_path(config)
    status = read_status(folder)
    if status is None or "evaluate" not in status.stages_done:
        execute(config)
    return _row(folder)


def run_or_lose(overrides: list[str]) -> Row | None:
    """As `run`; None where a learning rate is so high that the loss is lost: worse than any other."""
    from lowrank_kit.errors import LowRankKitError

    try:
        return run(overrides)
    except LowRankKitError as error:
        if "training lost its way" not in str(error):
            raise
        return None


def _row(folder: Path) -> Row:
    results, manifest, plan, history = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("results", "manifest", "plan", "history")
    )
    kept = ("task", "metric", "checkpoint", "value", "stderr", "n")
    answered = [json.loads(line) for file in folder.glob("samples/final/*.jsonl") for line in file.open()]
    return {
        **origin(folder),
        "figures": [{name: record[name] for name in kept} for record in results],
        # Of the right choice, given the question: what the training made smaller, on other rows.
        "answer_loss": -fmean(s["log_likelihoods"][int(s["target"])] for s in answered) if answered else None,
        "trained_parameters": plan["trained_parameters"],
        "rank": max(plan["ranks"].values()),
        "loss": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "seconds": {name: stage["seconds"] for name, stage in manifest["stages"].items()},
    }


def flat(overrides: Sequence[Any]) -> list[str]:
    """A list of overrides, of which some may be lists themselves."""
    return [one for item in overrides for one in (flat(item) if isinstance(item, list) else [item])]


def _single_threaded() -> None:
    # Small models: one thread a worker beats several workers that share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", help="folder of `data=local`")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--runs", default="runs/astra_subspace")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    return parse_study(parser)


if __name__ == "__main__":
    main()
