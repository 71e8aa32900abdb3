import json
from itertools import product
from math import comb

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import matthews_corrcoef

from lowrank_kit.compare import main, samples_in
from lowrank_kit.errors import ConfigError
from lowrank_kit.evaluation.paired import bootstrap_interval, compare, mcnemar


@pytest.fixture
def run(tmp_path):
    """A run directory with one benchmark's samples."""

    def write(name, values, metric="acc", benchmark="piqa", prompt="p", rows=None):
        file = tmp_path / name / "samples/final" / f"{benchmark}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = rows or [f"row{n}" for n in range(len(values))]
        samples = [
            {"task": benchmark, "row_hash": row, "prompt_hash": f"{prompt}{row}", metric: value}
            for row, value in zip(rows, values, strict=True)
        ]
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        return tmp_path / name

    return write


@pytest.fixture
def answers():
    rng = np.random.default_rng(1)
    first = (rng.random(80) < 0.7).astype(float)
    return first, np.where(rng.random(80) < 0.25, 1 - first, first)


def test_mcnemar_is_the_sum_over_all_ways_the_uneven_rows_could_have_fallen(answers):
    first, second = answers
    only_first, only_second = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
    uneven, extreme = only_first + only_second, max(only_first, only_second)
    tail = sum(comb(uneven, k) for k in range(extreme, uneven + 1)) / 2**uneven
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(first, first) == 1.0
    assert mcnemar(np.zeros(6), np.ones(6)) == pytest.approx(2 / 2**6)


def test_the_interval_is_that_of_scipys_paired_bootstrap(answers):
    first, second = answers
    theirs = bootstrap(
        (second, first), lambda a, b, axis: np.mean(a - b, axis=axis), paired=True, method="percentile",
        n_resamples=20_000, rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    # Means of 80 rows lie 1/80 apart.
    assert bootstrap_interval(second - first) == pytest.approx((theirs.low, theirs.high), abs=0.0126)


def test_the_interval_is_that_of_all_samples_with_replacement():
    differences = np.array([1.0, -1.0, 0.0, 1.0, 0.5])
    means = [np.mean(drawn) for drawn in product(differences, repeat=5)]
    assert bootstrap_interval(differences) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.1001)
    assert bootstrap_interval(differences) == bootstrap_interval(differences)
    assert bootstrap_interval(np.zeros(9)) == (0.0, 0.0)


def test_rows_are_matched_whatever_their_order(run, answers):
    first, second = (list(side) for side in answers)
    a, b = run("a", first), run("b", second[::-1], rows=[f"row{n}" for n in range(80)][::-1])
    [found] = compare(samples_in(a), samples_in(b))
    assert (found.benchmark, found.metric, found.n) == ("piqa", "acc", 80)
    assert (found.first, found.second) == (pytest.approx(np.mean(first)), pytest.approx(np.mean(second)))
    assert found.p == mcnemar(*answers)
    assert (found.low, found.high) == bootstrap_interval(answers[1] - answers[0])
    assert found.low <= found.second - found.first <= found.high


def test_rows_that_occur_twice_are_matched_in_their_order(run):
    rows = ["same", "same", "other"]
    [found] = compare(samples_in(run("a", [0, 1, 1], rows=rows)), samples_in(run("b", [1, 0, 1], rows=rows)))
    assert (found.n, found.p) == (3, 1.0)


def test_a_correlation_is_computed_anew_for_every_draw(run, answers):
    right = [n % 2 for n in range(80)]
    first, second = ([[r, r if hit else 1 - r] for r, hit in zip(right, side, strict=True)] for side in answers)
    [found] = compare(samples_in(run("a", first, "mcc", "cola")), samples_in(run("b", second, "mcc", "cola")))
    assert found.first == pytest.approx(matthews_corrcoef(*np.array(first).T))
    assert found.low < found.second - found.first < found.high
    assert found.p is None


def test_shares_have_no_mcnemar(run):
    [found] = compare(samples_in(run("a", [0.3, 1.0], "pass@1")), samples_in(run("b", [0.5, 1.0], "pass@1")))
    assert found.p is None
    assert found.second - found.first == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"values": [1, 0], "rows": ["row0", "row7"]}, r"piqa: .*different rows \(2 and 2, 1 in common\).*eval\.limit"),
        ({"values": [1, 0, 1]}, r"different rows \(2 and 3, 2 in common\)"),
        ({"values": [1, 0], "prompt": "q"}, "piqa: 2 of 2 rows were asked with different prompts"),
        ({"values": [1, 0], "benchmark": "boolq"}, "no benchmark in common: .* has piqa, .* boolq"),
    ],
)
def test_what_cannot_be_compared_is_said(run, other, message):
    a, b = run("a", [1, 0]), run("b", **other)
    with pytest.raises(ConfigError, match=message):
        compare(samples_in(a), samples_in(b))


def test_the_command_prints_a_line_for_each_metric(run, answers, capsys):
    a, b = run("a", list(answers[0])), run("b", list(answers[1]))
    assert main([str(a), str(b / "samples/final")]) == 0
    out = capsys.readouterr().out
    assert f"{np.mean(answers[1]) - np.mean(answers[0]):+.4f}" in out
    assert "piqa" in out
    for folder, message in ((a / "nowhere", "there is no folder"), (a / "samples", "has no samples/final/NAME.jsonl")):
        assert main([str(a), str(folder)]) == 2
        assert message in capsys.readouterr().err
