"""Is the best row of a column better than the second, by more than chance?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.evaluation.paired import Difference, compare

LEVEL = 0.05
# Two differences say next to nothing about their own spread.
SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    """The outcome of one comparison. ``test`` names the test, or says why there is none (then not significant).

    ``p`` is None where there is no test or it gives an interval only.
    """

    significant: bool
    test: str
    p: float | None


@dataclass(frozen=True)
class Measured:
    """One row's figures of one column: the value and the run directory of every seed."""

    values: dict[int, float]
    folders: dict[int, Path]


def verdict(first: Measured, second: Measured, task: str, metric: str, level: float = LEVEL) -> Verdict:
    """Compare two rows by the seeds that both have, paired; with fewer than three, by the rows of the benchmark.

    Seeds: a paired t-test of the differences. Rows: what both answered with the lowest common seed, by McNemar's
    exact test where an answer is right or wrong, by a paired bootstrap interval otherwise (`evaluation.paired`).
    Seeds that change nothing, all differences being equal, are no evidence and are not tested.
    """
    common = sorted(first.values.keys() & second.values.keys())
    if len(common) >= SEEDS:
        return _by_seeds([(first.values[seed], second.values[seed]) for seed in common], level)
    if common:
        folders = [measured.folders[common[0]] / "samples/final" for measured in (first, second)]
        for found in _by_rows(*folders):
            if (found.benchmark, found.metric) == (task, metric):
                if found.p is not None:
                    return Verdict(found.p < level, "McNemar", found.p)
                return Verdict(found.low > 0 or found.high < 0, "paired bootstrap", None)
    return Verdict(False, f"fewer than {SEEDS} seeds in common, and no answers to the same rows", None)


def _by_seeds(pairs: Sequence[tuple[float, float]], level: float) -> Verdict:
    first, second = np.array(pairs).T
    if np.ptp(first - second) <= 1e-9 * np.abs(pairs).max():
        return Verdict(False, "the seeds change nothing", None)
    p = float(ttest_rel(first, second).pvalue)
    return Verdict(p < level, "paired t-test over seeds", p)


@cache
def _by_rows(first: Path, second: Path) -> list[Difference]:
    if not (any(first.glob("*.jsonl")) and any(second.glob("*.jsonl"))):
        return []
    try:
        return compare(first, second)
    except LowRankKitError:
        # Nothing in common, other rows, or answers that cannot be read: there is nothing to pair.
        return []
