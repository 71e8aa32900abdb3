"""Rows of the benchmarks that a causal model is evaluated on, in the columns that lm-eval's own tasks read."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowrank_kit.config import Benchmark
from lowrank_kit.data.sources import DatasetRef, Rows, Source, content_hash, has
from lowrank_kit.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
    """One benchmark's rows to evaluate on, and those that solved examples are drawn from (None without examples)."""

    name: str
    benchmark: Benchmark
    rows: Rows
    examples: Rows | None

    def facts(self) -> dict[str, Any]:
        """Source, note, content hash and size of every split by ``name:split``, for the manifest."""
        facts = {f"{self.name}:{self.benchmark.split}": self.rows.facts()}
        return facts | ({f"{self.name}:{self.benchmark.shots_split}": self.examples.facts()} if self.examples else {})


def load_benchmarks(
    benchmarks: Mapping[str, Benchmark], source: Source, limit: int | None = None
) -> dict[str, Questions]:
    """Load the first rows of every benchmark that the source has; the others are named in a warning.

    Their number is a benchmark's `max_rows`, or else ``limit``. Of a benchmark in parts the rows are taken from all
    parts in turn. Raises `ConfigError` where the source has none of them.
    """
    there = {name: b for name, b in benchmarks.items() if has(source, _ref(b), _splits(b))}
    absent = [name for name in benchmarks if name not in there]
    if absent and not there:
        first = benchmarks[absent[0]]
        for split in _splits(first):
            # The source's own message says where it looked.
            source.load(_ref(first), split)
    if absent:
        log.warning("the data source has the benchmarks %s and not %s", ", ".join(there), ", ".join(absent))
    return {name: _load(name, benchmark, source, benchmark.max_rows or limit) for name, benchmark in there.items()}


def check_allowed(name: str, benchmark: Benchmark, is_allowed: bool) -> None:
    """Raise `ConfigError` for a benchmark that runs programs which a model wrote, unless that was allowed."""
    if benchmark.runs_code and not is_allowed:
        raise ConfigError(
            f"the benchmark {name} runs programs that the model wrote: allow it with eval.allow_code_execution=true "
            f"(they run in a sandbox), or leave it out with ~task.benchmarks.{name}"
        )


def _ref(benchmark: Benchmark, max_rows: int | None = None) -> DatasetRef:
    return DatasetRef(benchmark.dataset, benchmark.hub_path, benchmark.hub_name, max_rows=max_rows)


def _splits(benchmark: Benchmark) -> list[str]:
    return [benchmark.split, *([benchmark.shots_split] if benchmark.shots and benchmark.shots_split else [])]


def _load(name: str, benchmark: Benchmark, source: Source, limit: int | None) -> Questions:
    parts = benchmark.part_column
    evaluated, *shots = _splits(benchmark)
    rows = source.load(_ref(benchmark, None if parts else limit), evaluated)
    if not len(rows.dataset):
        raise ConfigError(f"'{evaluated}' of '{benchmark.dataset}' has no rows")
    if parts and parts not in rows.dataset.column_names:
        raise ConfigError(f"the rows of '{benchmark.dataset}' have no column '{parts}' (part_column of {name})")
    if parts and limit is not None:
        rows = _in_turn(rows, parts, limit)
    examples = in_lm_evals_columns(source.load(_ref(benchmark), shots[0]), benchmark) if shots else None
    return Questions(name, benchmark, in_lm_evals_columns(rows, benchmark), examples)


def _in_turn(rows: Rows, column: str, limit: int) -> Rows:
    """The first row of every part, then the second of every part, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for part in rows.dataset[column]:
        turns.append(seen[part])
        seen[part] += 1
    chosen = rows.dataset.select(sorted(range(len(turns)), key=turns.__getitem__)[:limit])
    return replace(rows, dataset=chosen, sha256=content_hash(chosen), file=None)


def in_lm_evals_columns(rows: Rows, benchmark: Benchmark) -> Rows:
    """Rename the columns that the rows call otherwise than lm-eval does (`Benchmark.columns`)."""
    have = rows.dataset.column_names
    other = {mine: wanted for wanted, mine in benchmark.columns.items() if wanted not in have and mine in have}
    return replace(rows, dataset=rows.dataset.rename_columns(other)) if other else rows
