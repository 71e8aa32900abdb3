"""Two models' answers to the same rows: what is the difference, and is it more than chance."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from lowrank_kit.config import BenchmarkMetric
from lowrank_kit.errors import ConfigError
from lowrank_kit.evaluation.glue import score
from lowrank_kit.files import read_lines

RESAMPLES = 10_000
# Of metrics that have to be computed anew for every draw.
RESAMPLES_OF_ALL_ROWS = 1_000

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """One metric of one benchmark; the interval holds ``second - first`` with 95 % confidence.

    ``p`` is McNemar's; None for a metric that is not right or wrong for each row.
    """

    benchmark: str
    metric: str
    n: int
    first: float
    second: float
    low: float
    high: float
    p: float | None


def compare(first: Path, second: Path, seed: int = 0) -> list[Difference]:
    """Compare the benchmarks that both folders of samples hold, ``NAME.jsonl`` of one row a line.

    Raises `ConfigError` where they have none in common, or were asked different rows or prompts.
    """
    names = [{file.stem for file in folder.glob("*.jsonl")} for folder in (first, second)]
    common = sorted(names[0] & names[1])
    if not common:
        raise ConfigError(f"no benchmark in common: '{first}' has {_listed(names[0])}, '{second}' {_listed(names[1])}")
    differences = []
    for name in common:
        pairs = _paired(name, *(_read(folder / f"{name}.jsonl") for folder in (first, second)))
        for metric in get_args(BenchmarkMetric):
            if all(metric in sample for pair in pairs for sample in pair):
                differences.append(_difference(name, metric, pairs, seed))
    return differences


def mcnemar(first: NDArray, second: NDArray) -> float:
    """Exact two-sided p of as many or more uneven rows, were either model as likely to be the right one of two.

    McNemar (1947): a binomial test of the rows that one model alone has right.
    """
    only_first, only_second = int(np.sum(first > second)), int(np.sum(first < second))
    uneven = only_first + only_second
    return float(binomtest(only_first, uneven).pvalue) if uneven else 1.0


def bootstrap_interval(differences: NDArray, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of 95 % for the mean of the rows' differences, rows being drawn with replacement."""
    values, counts = np.unique(differences, return_counts=True)
    n = len(differences)
    # How often each value is drawn is all that a mean depends on.
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    return _middle(draws @ values / n)


def _difference(name: str, metric: str, pairs: Sequence[tuple[Sample, Sample]], seed: int) -> Difference:
    first, second = (np.array([pair[side][metric] for pair in pairs]) for side in (0, 1))
    if first.ndim == 2:
        figures = _score(metric, first), _score(metric, second)
        rng, n = np.random.default_rng(seed), len(pairs)
        rows = (rng.integers(n, size=n) for _ in range(RESAMPLES_OF_ALL_ROWS))
        interval = _middle(np.array([_score(metric, second[drawn]) - _score(metric, first[drawn]) for drawn in rows]))
        return Difference(name, metric, n, *figures, *interval, None)
    is_binary = bool(np.isin([first, second], (0, 1)).all())
    return Difference(
        name, metric, len(pairs), float(first.mean()), float(second.mean()), *bootstrap_interval(second - first, seed),
        mcnemar(first, second) if is_binary else None,
    )  # fmt: skip


def _middle(draws: NDArray) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _score(metric: str, right_and_chosen: NDArray) -> float:
    right, chosen = right_and_chosen.T
    name: Any = {"mcc": "matthews"}.get(metric, metric)
    return score(name, right, chosen)


def _read(file: Path) -> dict[tuple[str, str, int], Sample]:
    """Samples by task, row and, for rows that occur more than once, which of them it is."""
    seen: Counter[tuple[str, str]] = Counter()
    samples: dict[tuple[str, str, int], Sample] = {}
    for sample in read_lines(file):
        row = (str(sample.get("task")), str(sample.get("row_hash")))
        samples[*row, seen[row]] = sample
        seen[row] += 1
    return samples


def _paired(
    name: str, first: Mapping[tuple[str, str, int], Sample], second: Mapping[tuple[str, str, int], Sample]
) -> list[tuple[Sample, Sample]]:
    if first.keys() != second.keys():
        common = len(first.keys() & second.keys())
        raise ConfigError(
            f"{name}: the runs were evaluated on different rows ({len(first)} and {len(second)}, {common} in common): "
            f"evaluate both with the same data and eval.limit"
        )
    pairs = [(sample, second[row]) for row, sample in first.items()]
    if other := sum(one.get("prompt_hash") != two.get("prompt_hash") for one, two in pairs):
        raise ConfigError(
            f"{name}: {other} of {len(pairs)} rows were asked with different prompts: "
            f"evaluate both with the same task, shots and version of lm-eval"
        )
    return pairs


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
