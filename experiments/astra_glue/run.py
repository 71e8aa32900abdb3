"""LoRA against Astra's four subspaces on GLUE, the learning rate chosen per arm on held-out training rows.

    python experiments/astra_glue/run.py [--study STUDY.yaml] [--workers 2] [--runs FOLDER] [OVERRIDE ...]

Every run has a directory of its own, found again by its configuration: a killed study continues where it was, and
runs that are there already cost nothing. Extra overrides reach every run (`data.root=FOLDER`, `device=cuda`).
Writes `<study>.results.json` and `<study>.table.md` beside the study.
"""

import argparse
import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from scipy.stats import ttest_rel

from lowrank_kit.runs.provenance import origin, parse_study

HERE = Path(__file__).parent
Records = list[dict[str, Any]]


def main() -> None:
    arguments = _arguments()
    study = yaml.safe_load(arguments.study.read_text())
    extra = [*arguments.overrides, f"run.root={arguments.runs}"]
    arms, tasks = list(study["arms"]), list(study["tasks"])

    def job(task: str, arm: str, rate: Any, seed: int, *more: str) -> list[str]:
        settings = [*study["common"], f"task={task}", *study["tasks"][task], *study["arms"][arm]]
        return [*settings, f"train.learning_rate={rate}", f"seed={seed}", *more, *extra]

    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), _single_threaded) as pool:
        rates = study["learning_rates"]
        grid = [(t, a, rate) for t, a in product(tasks, arms) for rate in rates[t]]
        held_out = f"eval.held_out={study['held_out']}"
        tuning = pool.map(run, [job(t, a, rate, study["tuning_seed"], held_out) for t, a, rate in grid])
        scores = {key: _headline(records)["value"] for key, records in zip(grid, tuning, strict=True)}
        chosen = {(t, a): max(rates[t], key=lambda rate: scores[t, a, rate]) for t, a in product(tasks, arms)}
        # Seeds outermost, so that a study cut short still compares all arms.
        cells = list(product(study["seeds"], tasks, arms))
        final = pool.map(run, [job(t, a, chosen[t, a], seed) for seed, t, a in cells])
        results = [
            {"task": t, "arm": a, "seed": s, "learning_rate": float(chosen[t, a]), "records": records}
            for (s, t, a), records in zip(cells, final, strict=True)
        ]
    tuned = [{"task": t, "arm": a, "learning_rate": float(r), "score": v} for (t, a, r), v in scores.items()]
    out = {"provenance": arguments.provenance, "study": study, "tuning": tuned, "results": results}
    (HERE / f"{arguments.study.stem}.results.json").write_text(json.dumps(out, indent=1) + "\n")
    table = "\n".join(markdown(study, results))
    (HERE / f"{arguments.study.stem}.table.md").write_text(table + "\n")
    print(table)


def run(overrides: list[str]) -> Records:
    """One run in this worker process; its records."""
    from lowrank_kit.compose import Composer
    from lowrank_kit.pipeline import execute
    from lowrank_kit.run import set_up_console

    set_up_console()
    [config] = Composer().jobs(overrides, multirun=False)
    folder = execute(config)
    # Beside every figure, what it was made with.
    return [{**record, **origin(folder)} for record in json.loads((folder / "results.json").read_text())]


def markdown(study: dict[str, Any], results: list[dict[str, Any]]) -> Iterable[str]:
    """Mean ± standard deviation over seeds in percent; p of a paired t-test against the first arm."""
    arms, reference = list(study["arms"]), next(iter(study["arms"]))
    yield f"| task (metric, rows) | majority | {' | '.join(arms)} |"
    yield "|---" * (len(arms) + 2) + "|"
    for task in study["tasks"]:
        values = {
            arm: [_headline(r["records"])["value"] for r in results if (r["task"], r["arm"]) == (task, arm)]
            for arm in arms
        }
        rates = {arm: next(r["learning_rate"] for r in results if (r["task"], r["arm"]) == (task, arm)) for arm in arms}
        example = next(r["records"] for r in results if r["task"] == task)
        head, majority = _headline(example), _headline(example, "majority_class")
        cells = []
        for arm in arms:
            cell = f"{100 * mean(values[arm]):.1f} ± {100 * stdev(values[arm]):.1f} (lr {rates[arm]:g}"
            if arm != reference and values[arm] != values[reference]:
                cell += f", p={ttest_rel(values[arm], values[reference]).pvalue:.2f}"
            cells.append(cell + ")")
        name = f"{task} ({head['metric']}, {head['n']})"
        yield f"| {name} | {100 * majority['value']:.1f} | {' | '.join(cells)} |"


def _headline(records: Records, checkpoint: str = "final") -> dict[str, Any]:
    """The task's first metric."""
    return next(record for record in records if record["checkpoint"] == checkpoint)


def _single_threaded() -> None:
    # Small models: one thread a worker beats several workers that share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", default="runs/astra_glue")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    return parse_study(parser)


if __name__ == "__main__":
    main()
