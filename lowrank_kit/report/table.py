"""Runs laid out as rows (a configuration, over its seeds) and columns (a metric of a task, on certain rows)."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from lowrank_kit.errors import ConfigError
from lowrank_kit.evaluation.records import EvalRecord
from lowrank_kit.report.find import LeftOut, Run
from lowrank_kit.report.significance import LEVEL, Measured, Verdict, verdict
from lowrank_kit.runs.caveats import caveats_of

SPEED, AVERAGE = "speed", "average"
BASELINES = {"dense": "dense model", "majority_class": "majority class"}
BEFORE_RECOVERY = "before recovery"

Budget = tuple[str, float] | None


@dataclass(frozen=True)
class Column:
    """A metric of a task. Figures from other rows, other shots or another source make another column."""

    task: str
    metric: str
    n: int
    fewshot: int
    source: str
    mark: str = field(default="", compare=False)

    @property
    def heading(self) -> str:
        """Task and metric, with a mark where another column has the same ones."""
        name = self.metric.replace("_", " ") if self.task == SPEED else f"{self.task} {self.metric}"
        return f"{name} [{self.mark}]" if self.mark else name

    @property
    def lower_is_better(self) -> bool:
        """Whether a small figure is a good one."""
        return self.metric == "perplexity" or self.metric.endswith("_bytes")

    @property
    def is_fraction(self) -> bool:
        """Whether the figure is shown in percent."""
        return self.task != SPEED and self.metric != "perplexity"


@dataclass(frozen=True)
class Cell:
    """The figures of one row and column by seed, with the run that each is from."""

    values: Mapping[int, float]
    runs: Mapping[int, Run]
    stderrs: Mapping[int, float | None]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None of a single one."""
        return stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def measured(self) -> Measured:
        """As the tests take it."""
        return Measured(dict(self.values), {seed: run.path for seed, run in self.runs.items()})


@dataclass(frozen=True)
class Row:
    """A configuration. ``kind`` is "measured", "baseline" (of the model, not of a method) or "before recovery"."""

    model: str
    method: str
    budget: Budget
    settings: str
    kind: str
    cells: Mapping[Column, Cell]

    @property
    def name(self) -> str:
        """The method with what tells the row from the method's other ones."""
        return f"{self.method} ({self.settings})" if self.settings else self.method

    @property
    def title(self) -> str:
        """The name with the budget: what tells the row from every other one of the model."""
        return self.name if self.budget is None else f"{self.name}, {self.budget[0]} {self.budget[1]:g}"

    @cached_property
    def runs(self) -> list[Run]:
        """All runs that the row is made of, by seed."""
        found = {run.path: run for cell in self.cells.values() for run in cell.runs.values()}
        return sorted(found.values(), key=lambda run: (str(run.config["task"]["name"]), run.seed))

    @cached_property
    def caveats(self) -> str:
        """What must be known of the figures, see `caveats_of`; of a baseline, nothing."""
        if self.kind == "baseline":
            return ""
        return "; ".join(dict.fromkeys(word for run in self.runs for word in caveats_of(run.path, run.config)))

    @property
    def seeds(self) -> str:
        """How many seeds the figures are of: one number, or the least and the most."""
        counts = sorted({len(cell.values) for cell in self.cells.values()})
        return "" if self.kind == "baseline" else "-".join(map(str, dict.fromkeys([counts[0], counts[-1]])))

    @property
    def parameters(self) -> int | None:
        """Parameters of the model that was measured, of an adapter those that were trained."""
        if not self.runs:
            return None
        facts = self.runs[0].manifest
        if "size" in facts:
            return int(facts["size"]["dense" if self.kind == "baseline" else "compressed"]["parameters"])
        return facts.get("trained_parameters") if self.kind == "measured" else None


@dataclass(frozen=True)
class Block:
    """The rows that compete: the same model and budget. ``best`` holds a verdict for every contested column."""

    model: str
    budget: Budget
    rows: Sequence[Row]
    best: Mapping[Column, tuple[Row, Verdict]]

    def is_bold(self, row: Row, column: Column) -> bool:
        """Whether the row is significantly the best of its column."""
        best, verdict = self.best.get(column, (None, None))
        return best is row and verdict is not None and verdict.significant


@dataclass(frozen=True)
class Report:
    """Everything that is written, whatever the format."""

    columns: Sequence[Column]
    blocks: Sequence[Block]
    runs: Sequence[Run]
    left_out: Sequence[LeftOut]
    level: float = LEVEL

    @property
    def verdicts(self) -> list[Verdict]:
        """Of every comparison of a best row with the second."""
        return [verdict for block in self.blocks for _, verdict in block.best.values()]


def build(runs: Sequence[Run], left_out: Sequence[LeftOut], level: float = LEVEL) -> Report:
    """Lay out the runs.

    Raises `ConfigError` where a cell would hold two runs of one seed, which ignored settings can lead to.
    """
    columns = _columns(runs)
    rows = [*_baselines(runs, columns), *_measured(runs, columns)]
    blocks: dict[tuple[str, Budget], list[Row]] = defaultdict(list)
    for row in rows:
        blocks[row.model, row.budget].append(row)
    order = sorted(blocks, key=lambda key: (key[0], key[1] is not None, key[1] or ()))
    found = [
        Block(model, budget, blocks[model, budget], _best(blocks[model, budget], columns.values(), level))
        for model, budget in order
    ]
    return Report(list(dict.fromkeys(columns.values())), found, runs, left_out, level)


def _key(record: EvalRecord, run: Run) -> tuple[str, str, int, int, str]:
    source = record.source
    if record.task == AVERAGE:
        # An average does not say of which rows: those of its benchmarks do.
        answered = {r.source for r in run.records if r.task not in (AVERAGE, SPEED) and r.metric != "perplexity"}
        source = f"{source}: {'; '.join(sorted(answered))}"
    return record.task, record.metric, record.n, record.fewshot, source


def _columns(runs: Sequence[Run]) -> dict[tuple[str, str, int, int, str], Column]:
    """Columns by what makes them; perplexities first, averages and speed last."""
    keys = list(dict.fromkeys(_key(r, run) for run in runs for r in run.records if r.checkpoint == "final"))
    alike: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for key in keys:
        alike[key[:2]].append(key)
    marks = {key: chr(ord("a") + place) for same in alike.values() if len(same) > 1 for place, key in enumerate(same)}
    keys.sort(key=lambda key: (key[1] != "perplexity", key[0] == AVERAGE, key[0] == SPEED))
    return {key: Column(*key, mark=marks.get(key, "")) for key in keys}


def _measured(runs: Sequence[Run], columns: Mapping[Any, Column]) -> list[Row]:
    groups = list(_configurations(runs))
    labels = _labels([group[0] for group in groups])
    rows = []
    for group, label in zip(groups, labels, strict=True):
        some = group[0]
        for state, kind in (("compressed", BEFORE_RECOVERY), ("final", "measured")):
            if cells := _cells(group, columns, state):
                settings = " ".join(filter(None, [label, BEFORE_RECOVERY if kind == BEFORE_RECOVERY else ""]))
                rows.append(Row(some.model, some.method, some.budget, settings, kind, cells))
    return sorted(rows, key=lambda row: (row.method, row.settings))


def _configurations(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Runs of one configuration. How much was evaluated tells columns apart, not rows, unless figures disagree."""
    for group in _alike(runs, "eval."):
        found: dict[tuple[Any, ...], float] = {}
        agree = all(
            math.isclose(
                found.setdefault((run.seed, record.checkpoint, *_key(record, run)), record.value), record.value
            )
            for run in group
            for record in run.records
            if record.task != SPEED
        )
        yield from [group] if agree else _alike(group)


def _alike(runs: Iterable[Run], apart_from: str | None = None) -> list[list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        settings = [
            (key, value)
            for key, value in run.settings.items()
            if key == "eval.held_out" or apart_from is None or not key.startswith(apart_from)
        ]
        groups[repr(sorted(settings, key=lambda item: item[0]))].append(run)
    return list(groups.values())


def _baselines(runs: Sequence[Run], columns: Mapping[Any, Column]) -> list[Row]:
    rows = []
    for model in dict.fromkeys(run.model for run in runs):
        dtypes = dict.fromkeys(str(run.config["dtype"]) for run in runs if run.model == model)
        for dtype in dtypes:
            group = [run for run in runs if (run.model, run.config["dtype"]) == (model, dtype)]
            for state, name in BASELINES.items():
                # The same in every run that asked the same: one of them is enough.
                if cells := _cells(group, columns, state, one=True):
                    rows.append(Row(model, name, None, dtype if len(dtypes) > 1 else "", "baseline", cells))
    return rows


def _cells(runs: Iterable[Run], columns: Mapping[Any, Column], state: str, one: bool = False) -> dict[Column, Cell]:
    values: dict[Column, dict[int, tuple[EvalRecord, Run]]] = defaultdict(dict)
    for run in runs:
        for record in run.records:
            column = columns.get(_key(record, run))
            if record.checkpoint != state or column is None or (one and column in values):
                continue
            earlier, other = values[column].get(run.seed, (record, run))
            if not math.isclose(earlier.value, record.value) and record.task != SPEED:
                raise ConfigError(
                    f"{other.path} and {run.path} both give {column.heading} of {run.method} with seed {run.seed}, "
                    "from configurations that differ in what --ignore leaves out: ignore less"
                )
            values[column].setdefault(run.seed, (record, run))
    return {
        column: Cell(
            {seed: record.value for seed, (record, _) in found.items()},
            {seed: run for seed, (_, run) in found.items()},
            {seed: record.stderr for seed, (record, _) in found.items()},
        )
        for column, found in values.items()
    }


def _labels(runs: Sequence[Run]) -> list[str]:
    """For each configuration the fewest settings that tell it from its rivals: same method, model and budget."""
    labels = []
    for run in runs:
        rivals = [other for other in runs if (other.method, other.model) == (run.method, run.model)]
        # What is switched off goes without saying.
        found = ((key, run.settings.get(key)) for key in _telling(rivals))
        given = {key: value for key, value in found if value not in (None, False, "none")}
        labels.append(" ".join(f"{key.removeprefix('method.')}={_shown(value)}" for key, value in given.items()))
    return labels


def _telling(runs: Sequence[Run]) -> list[str]:
    """Keys, each the one that tells most of the runs of equal budget apart that the ones before it leave alike."""
    # Of two that do equally well, what the method is before how it was trained.
    keys = dict.fromkeys(sorted((key for run in runs for key in run.settings), key=_section))
    chosen: list[str] = []

    def classes(more: Sequence[str]) -> int:
        return len({(run.budget, *(repr(run.settings.get(key)) for key in (*chosen, *more))) for run in runs})

    while keys and classes(()) < len(runs):
        best = max(keys, key=lambda key: classes((key,)))
        chosen.append(best)
        del keys[best]
    return sorted(chosen)


def _section(key: str) -> bool:
    return not key.startswith(("method.", "recovery."))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _best(rows: Sequence[Row], columns: Iterable[Column], level: float) -> dict[Column, tuple[Row, Verdict]]:
    """The best row of every column that at least two rows contest, and whether it beats the second."""
    found = {}
    for column in columns:
        there = [row for row in rows if row.kind == "measured" and column in row.cells]
        there.sort(key=lambda row: row.cells[column].mean, reverse=not column.lower_is_better)
        if len(there) > 1 and column.task != SPEED:
            first, second = (row.cells[column].measured for row in there[:2])
            found[column] = there[0], verdict(first, second, column.task, column.metric, level)
    return found
