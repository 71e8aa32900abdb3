import json

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from lowrank_kit.errors import ConfigError
from lowrank_kit.report.facts import notes
from lowrank_kit.report.find import find_runs, without
from lowrank_kit.report.pareto import front
from lowrank_kit.report.table import build

TASK = ("model=smollm2_135m", "task=perplexity/wikitext2")


def words(method="svd_llm", seed=0, *more):
    return [f"method={method}", *TASK, f"seed={seed}", *more]


def report_of(tmp_path, ignored=()):
    runs, left_out = find_runs([tmp_path / "runs"])
    return build(without(runs, ignored), left_out)


def rows_of(report):
    return {row.name: row for block in report.blocks for row in block.rows}


def test_mean_and_deviation_are_over_seeds(leave_run, tmp_path):
    values = [20.0, 21.5, 24.0]
    for seed, value in enumerate(values):
        leave_run(f"a{seed}", [("wikitext2", "perplexity", value)], words(seed=seed), parameters=90)
    report = report_of(tmp_path)
    [row] = rows_of(report).values()
    [cell] = row.cells.values()
    assert (cell.mean, cell.deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (row.seeds, row.parameters, row.budget) == ("3", 90, ("ratio", 0.2))


def test_bold_needs_a_significant_difference_over_paired_seeds(leave_run, tmp_path):
    first, second = [20.0, 22.0, 24.0], [20.5, 22.4, 24.6]
    for seed in range(3):
        leave_run(f"a{seed}", [("wikitext2", "perplexity", first[seed])], words("svd_llm", seed))
        leave_run(f"b{seed}", [("wikitext2", "perplexity", second[seed])], words("asvd", seed))
    report = report_of(tmp_path)
    rows, [column] = rows_of(report), report.columns
    [block] = report.blocks
    # Unpaired the spread of the seeds would hide it.
    assert block.is_bold(rows["svd_llm"], column)
    assert not block.is_bold(rows["asvd"], column)
    best, verdict = block.best[column]
    assert (best.method, verdict.p) == ("svd_llm", pytest.approx(ttest_rel(first, second).pvalue))
    assert not build(report.runs, [], level=1e-6).blocks[0].is_bold(rows["svd_llm"], column)


def test_seeds_that_change_nothing_are_no_evidence(leave_run, tmp_path):
    for seed in range(3):
        leave_run(f"a{seed}", [("wikitext2", "perplexity", 20.0)], words("svd_llm", seed))
        leave_run(f"b{seed}", [("wikitext2", "perplexity", 30.0)], words("asvd", seed))
    [(_, verdict)] = report_of(tmp_path).blocks[0].best.values()
    assert not verdict.significant
    assert verdict.test == "the seeds change nothing"


@pytest.mark.parametrize(("only_first", "only_second"), [(9, 0), (5, 2)])
def test_one_seed_is_judged_by_the_rows_that_both_answered(leave_run, tmp_path, only_first, only_second):
    first = [1.0] * only_first + [0.0] * only_second + [1.0] * 5
    second = [0.0] * only_first + [1.0] * only_second + [1.0] * 5
    for method, right in (("svd_llm", first), ("asvd", second)):
        figures = [("piqa", "acc", float(np.mean(right))), ("wikitext2", "perplexity", 20.0 + right[0])]
        leave_run(method, figures, words(method), samples={"piqa": right})
    block = report_of(tmp_path).blocks[0]
    verdicts = {column.task: verdict for column, (_, verdict) in block.best.items()}
    expected = binomtest(only_first, only_first + only_second).pvalue
    assert verdicts["piqa"].p == pytest.approx(expected)
    assert verdicts["piqa"].significant == (expected < 0.05)
    # Windows have no samples: nothing can be said.
    assert not verdicts["wikitext2"].significant
    assert verdicts["wikitext2"].p is None


def test_figures_of_other_rows_stand_in_another_column(leave_run, tmp_path):
    leave_run("a", [("piqa", "acc", 0.5), ("average", "mean", 0.5)], words("svd_llm"), n=50)
    leave_run("b", [("piqa", "acc", 0.9), ("average", "mean", 0.9)], words("asvd"), n=100)
    report = report_of(tmp_path)
    assert {column.heading for column in report.columns if column.task == "piqa"} == {"piqa acc [a]", "piqa acc [b]"}
    assert report.verdicts == []


def test_rows_show_the_fewest_settings_that_tell_them_apart(leave_run, tmp_path):
    figure = [("wikitext2", "perplexity", 20.0)]
    leave_run("a", figure, words())
    leave_run("b", figure, words("svd_llm", 0, "calibration.samples=9", "train.max_steps=5"))
    leave_run("c", figure, words("asvd"))
    leave_run("d", figure, words("svd_llm", 0, "method.ratio=0.4"))
    report = report_of(tmp_path)
    assert len(report.blocks) == 2
    settings = {row.settings for block in report.blocks for row in block.rows if row.method == "svd_llm"}
    # Two settings differ; one of them is enough.
    assert {setting.partition("=")[0] for setting in settings} == {"calibration.samples"}
    assert len(settings) == 2
    assert rows_of(report)["asvd"].settings == ""


def test_ignoring_what_changes_a_figure_is_refused(leave_run, tmp_path):
    leave_run("a", [("wikitext2", "perplexity", 20.0)], words())
    leave_run("b", [("wikitext2", "perplexity", 21.0)], words("svd_llm", 0, "train.max_steps=5"))
    with pytest.raises(ConfigError, match=r"runs/a and .*runs/b both give wikitext2 perplexity of svd_llm"):
        report_of(tmp_path, ignored=["train"])


def test_tasks_of_one_configuration_share_a_row_and_the_dense_model_has_its_own(leave_run, tmp_path):
    dense = [("wikitext2", "perplexity", 15.0)]
    leave_run("a", [("wikitext2", "perplexity", 20.0)], words(), dense=dense)
    leave_run("b", [("ptb", "perplexity", 30.0)], ["method=svd_llm", TASK[0], "task=perplexity/ptb"])
    rows = rows_of(report_of(tmp_path))
    assert {column.task for column in rows["svd_llm"].cells} == {"wikitext2", "ptb"}
    assert (rows["dense model"].parameters, rows["dense model"].kind) == (200, "baseline")


def test_a_row_of_several_states_of_the_software_is_named(leave_run, tmp_path):
    for method in ("svd_llm", "asvd"):
        runs = [leave_run(f"{method}{seed}", [("piqa", "acc", 0.5)], words(method, seed)) for seed in range(2)]
    # Of asvd's alone.
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    manifest["git"]["revision"] = "facade" * 7
    (runs[1] / "manifest.json").write_text(json.dumps(manifest))
    [told] = [note for note in notes(report_of(tmp_path)) if "several states" in note]
    assert told.endswith("in one row (below): asvd, ratio 0.2.")


def test_the_front_is_what_nothing_dominates():
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0), (0.5, 9.0)]
    assert front(points, small_x=True, small_y=True) == [(0.5, 9.0), (1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert front(points, small_x=True, small_y=False) == [(0.5, 9.0)]
    assert front(points, small_x=False, small_y=False) == [(0.5, 9.0), (1.0, 5.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0)]
