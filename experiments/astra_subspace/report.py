"""The study's figures: means with intervals, paired tests over seeds, learning curves."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from scipy.stats import t, ttest_rel

Row = dict[str, Any]
LEVEL = 0.05


@dataclass(frozen=True)
class Quantity:
    """Something measured in every run. ``scale`` is what a table multiplies it by."""

    name: str
    values: Mapping[str, Sequence[float]]
    """Of every arm, in the order of the seeds."""
    scale: float = 1.0


def write(study: Path, settings: Mapping[str, Any], tuned: Sequence[Row], rows: Sequence[Row], provenance: Row) -> None:
    """All files of the study: ``.results.json``, ``.table.md`` and both plots, beside it."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {task: quantities(task, settings, rows) for task in tasks}
    tests = [test for task in tasks for q in found[task] for test in compare(task, q, list(settings["arms"]))]
    out = {"provenance": provenance, "study": settings, "tuning": tuned, "tests": tests, "results": rows}
    study.with_suffix(".results.json").write_text(json.dumps(out, indent=1) + "\n")
    table = "\n".join(line for task in tasks for line in markdown(task, settings, rows, found[task], tests))
    study.with_suffix(".table.md").write_text(table + "\n")
    plot_means({task: found[task][0] for task in tasks}, references(rows), study.with_suffix(".means.png"))
    plot_curves({task: curves(task, settings, rows) for task in tasks}, study.with_suffix(".curves.png"))


def value(figures: Sequence[Row], wanted: Mapping[str, str], checkpoint: str = "final") -> float | None:
    """One figure of a run; None where it was not measured."""
    wanted = {**wanted, "checkpoint": checkpoint}
    return next((figure["value"] for figure in figures if wanted.items() <= figure.items()), None)


def quantities(task: str, settings: Mapping[str, Any], rows: Sequence[Row]) -> list[Quantity]:
    """What was measured in the runs of a task, the figure that it is judged by first."""
    figure = settings["tasks"][task]["figure"]
    measures: dict[str, tuple[float, Any]] = {
        figure["metric"]: (100.0, lambda row: value(row["figures"], figure)),
        "answer loss": (1.0, lambda row: row["answer_loss"]),
        "training loss, mean over steps": (1.0, lambda row: area(row["loss"])),
        "forgetting, nats": (1.0, lambda row: forgotten(row["figures"])),
    }
    found = []
    for name, (scale, measure) in measures.items():
        values = {arm: [measure(r) for r in rows if (r["task"], r["arm"]) == (task, arm)] for arm in settings["arms"]}
        if all(v is not None for of_arm in values.values() for v in of_arm):
            found.append(Quantity(name, values, scale))
    return found


def area(loss: Sequence[Sequence[float]]) -> float:
    """Area under the curve of the training loss over its length: an entry is the mean since the one before it."""
    steps, values = np.array(loss).T
    return float(np.average(values, weights=np.diff(steps, prepend=0)))


def forgotten(figures: Sequence[Row]) -> float | None:
    """Log perplexity of general text after training, less that before; None for a task without text."""
    text = {"task": "wikipedia", "metric": "perplexity"}
    before, after = (value(figures, text, checkpoint) for checkpoint in ("dense", "final"))
    return None if before is None or after is None else float(np.log(after / before))


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean, by Student's t; NaN for a single value."""
    n = len(values)
    return float(t.ppf(1 - LEVEL / 2, n - 1)) * stdev(values) / n**0.5 if n > 1 else float("nan")


def compare(task: str, quantity: Quantity, arms: Sequence[str]) -> list[Row]:
    """Two families of paired t-tests over seeds: the first arm with every other one, and `down` with its `both`."""
    families = {
        f"{arms[0]} and another": [(arms[0], arm) for arm in arms[1:]],
        "down and both": [(arm.removesuffix(", down"), arm) for arm in arms if arm.endswith(", down")],
    }
    tests: list[Row] = []
    for family, pairs in families.items():
        found = [(np.array(quantity.values[first]), np.array(quantity.values[second])) for first, second in pairs]
        if len(found[0][0]) < 2:
            continue
        # Seeds that change nothing are no evidence.
        ps = [float(ttest_rel(b, a).pvalue) if np.ptp(b - a) > 0 else 1.0 for a, b in found]
        for (first, second), (a, b), p, corrected in zip(pairs, found, ps, holm(ps), strict=True):
            tests.append(
                {
                    "task": task, "quantity": quantity.name, "family": family, "first": first, "second": second,
                    "difference": float((b - a).mean()), "interval": interval(list(b - a)), "n": len(a),
                    "p": p, "p_holm": corrected,
                }
            )  # fmt: skip
    return tests


def holm(ps: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979)."""
    order = np.argsort(ps)
    factors = len(ps) - np.arange(len(ps))
    corrected = np.minimum(np.maximum.accumulate(np.array(ps)[order] * factors), 1.0)
    return [float(p) for p in corrected[np.argsort(order)]]


def references(rows: Sequence[Row]) -> dict[str, float]:
    """What is reached without training, by task: the majority class, or the model as it came."""
    found = {}
    for row in rows:
        untrained = [f for f in row["figures"] if f["checkpoint"] in ("majority_class", "dense")]
        found[row["task"]] = next(f["value"] for f in untrained if f["metric"] != "perplexity")
    return found


def curves(task: str, settings: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and training loss of every arm, the mean over seeds."""
    found = {}
    for arm in settings["arms"]:
        entries = np.array([row["loss"] for row in rows if (row["task"], row["arm"]) == (task, arm)])
        steps, losses = entries.mean(0).T
        found[arm] = (list(steps), list(losses))
    return found


def markdown(
    task: str, settings: Mapping[str, Any], rows: Sequence[Row], found: Sequence[Quantity], tests: Sequence[Row]
) -> Iterator[str]:
    """One task's table: means ± half a confidence interval, and how the first arm compares to each."""
    mine = [row for row in rows if row["task"] == task]
    seeds = len({row["seed"] for row in mine})
    judged = next(f for f in mine[0]["figures"] if settings["tasks"][task]["figure"].items() <= f.items())
    first = next(iter(settings["arms"]))
    size = f"{judged['n']} rows, {seeds} of {len(settings['seeds'])} seeds"
    yield f"**{task}** ({judged['metric']}, {size}; untrained {100 * references(mine)[task]:.1f}; p against {first})\n"
    yield f"| arm | trained | rank | rate | {' | '.join(f'{q.name} | p' for q in found)} |"
    yield "|---" * (4 + 2 * len(found)) + "|"
    corrected = {
        (x["quantity"], x["second"]): x["p_holm"]
        for x in tests
        if (x["task"], x["first"]) == (task, first) and x["family"].startswith(first)
    }
    for arm in settings["arms"]:
        row = next(row for row in mine if row["arm"] == arm)
        cells = []
        for q in found:
            values = [q.scale * v for v in q.values[arm]]
            p = corrected.get((q.name, arm))
            digits = 1 if q.scale == 100 else 3
            cells += [f"{fmean(values):.{digits}f} ± {interval(values):.{digits}f}", "" if p is None else f"{p:.2g}"]
        its = [arm, f"{row['trained_parameters']:,}", str(row["rank"]), f"{row['learning_rate']:g}"]
        yield f"| {' | '.join([*its, *cells])} |"
    yield ""
    if down := [x for x in tests if x["task"] == task and x["family"] == "down and both"]:
        yield "| confined to the subspace (down) less both | difference | p, by Holm |"
        yield "|---|---|---|"
        for x in down:
            yield (
                f"| {x['quantity']}: {x['first']} | {x['difference']:+.4f} ± {x['interval']:.4f} | {x['p_holm']:.2g} |"
            )
        yield ""


def plot_means(found: Mapping[str, Quantity], untrained: Mapping[str, float], file: Path) -> None:
    """The arms' means of the figure that each task is judged by, with 95 % intervals and every seed; a panel a task."""
    from lowrank_kit.plots.figure import panels, save

    figure, axes = panels(len(found))
    for (task, quantity), panel in zip(found.items(), axes, strict=True):
        arms = list(quantity.values)
        for place, values in enumerate(quantity.values.values()):
            panel.plot(values, [place] * len(values), ".", color="grey", markersize=3)
            panel.errorbar(fmean(values), place, xerr=interval(values), fmt="o", color="C0", markersize=4, capsize=2)
        panel.axvline(untrained[task], color="black", linestyle="--", linewidth=0.8)
        panel.set_yticks(range(len(arms)), arms, fontsize=6)
        panel.set(title=task, xlabel=quantity.name)
        panel.invert_yaxis()
    save(figure, file)


def plot_curves(found: Mapping[str, Mapping[str, tuple[list[float], list[float]]]], file: Path) -> None:
    """Training loss by step, the mean over seeds; a panel a task."""
    from lowrank_kit.plots.figure import panels, save

    figure, axes = panels(len(found))
    for (task, arms), panel in zip(found.items(), axes, strict=True):
        colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(arm.removesuffix(", down") for arm in arms))}
        for arm, (steps, losses) in arms.items():
            style = "--" if arm.endswith(", down") else "-"
            panel.plot(steps, losses, style, label=arm, linewidth=1, color=colours[arm.removesuffix(", down")])
        panel.set(title=task, xlabel="step", ylabel="training loss, mean over seeds")
        panel.legend(fontsize=5, ncols=2)
    save(figure, file)
