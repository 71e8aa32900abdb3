import pytest
import yaml

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.evaluation.records import EvalRecord
from lowrank_kit.runs.published import FILE, Published, published_for
from lowrank_kit.runs.summary import print_results


def record(task: str, metric: str, value: float, checkpoint: str = "final", stderr: float | None = None) -> EvalRecord:
    return EvalRecord(task, metric, value, stderr, 16, 0, "here", {}, checkpoint)


def cells(text: str, heading: str) -> list[str]:
    line = next(line for line in text.splitlines() if heading in line)
    return [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]


def test_perplexity_stands_beside_that_of_the_dense_model(capsys):
    records = [
        record("wikitext2", "perplexity", 19.87, "dense"),
        record("wikitext2", "perplexity", 1234.5, "final", 12.34),
        record("ptb", "perplexity", 30.0),
    ]
    print_results(records, "svd on smollm2", ["ptb: here"])
    shown = capsys.readouterr().out
    assert cells(shown, "perplexity of") == ["perplexity of", "dense", "final", "± s.e.", "final / dense", "windows"]
    assert cells(shown, "wikitext2") == ["wikitext2", "19.87", "1,234", "12.34", "62.13", "16"]
    assert cells(shown, "│ ptb") == ["ptb", "-", "30.00", "-", "-", "16"]
    assert "majority" not in shown
    assert "ptb: here" in shown


def test_speed_has_a_table_of_its_own(capsys):
    records = [
        record("speed", "prefill_tokens_per_second", 2000.0, "dense"),
        record("speed", "prefill_tokens_per_second", 3000.0),
        record("speed", "prefill_speedup", 1.5),
        record("glue/rte", "accuracy", 0.625, "final", 0.01),
    ]
    print_results(records, "svd")
    shown = capsys.readouterr().out
    assert cells(shown, "tokens per second") == ["prefill tokens per second", "2,000", "3,000", "1.50"]
    assert cells(shown, "prefill speedup") == ["prefill speedup", "-", "1.50", "-"]
    assert cells(shown, "glue/rte") == ["glue/rte", "accuracy", "-", "-", "-", "62.5 ± 1.0", "16"]


def test_benchmarks_stand_beside_the_dense_model_in_percent(capsys):
    answered = {"lm_eval": "1"}
    records = [
        EvalRecord("piqa", "acc", 0.7, 0.02, 100, 0, "here", answered, "dense"),
        EvalRecord("piqa", "acc", 0.625, 0.03, 100, 0, "here", answered),
        record("wikitext2", "perplexity", 20.0),
    ]
    print_results(records, "svd")
    shown = capsys.readouterr().out
    assert cells(shown, "benchmark") == ["benchmark", "metric", "dense", "final", "± s.e.", "final - dense", "rows"]
    assert cells(shown, "piqa") == ["piqa", "acc", "70.0", "62.5", "3.0", "-7.5", "100"]
    assert "majority" not in shown


def test_a_papers_figures_stand_beside_ones_own_where_it_has_them(capsys):
    records = [record("wikitext2", "perplexity", 8.0), record("wikitext2", "perplexity", 5.7, "dense")]
    papers = Published({("wikitext2", "perplexity"): 5.68}, {("wikitext2", "perplexity"): 7.94}, "a paper")
    print_results([*records, record("ptb", "perplexity", 9.0)], "svd_llm", published=papers)
    shown = capsys.readouterr().out
    assert cells(shown, "perplexity of")[-3:] == ["windows", "paper, dense", "paper"]
    assert cells(shown, "wikitext2")[-2:] == ["5.68", "7.94"]
    assert cells(shown, "│ ptb")[-2:] == ["-", "-"]
    assert "paper: a paper" in shown
    print_results([record("ptb", "perplexity", 9.0)], "svd_llm", published=papers)
    assert "paper" not in capsys.readouterr().out


def words(method, *more):
    return [f"method={method}", "task=perplexity/wikitext2", *more]


@pytest.mark.parametrize(
    ("overrides", "dense", "final"),
    [
        (words("svd_llm", "model.path=huggyllama/llama-7b"), 5.68, 7.94),
        (words("svd_llm", "model.path=/weights/LLaMA-7B", "method.ratio=0.4"), 5.68, 13.11),
        (words("svd_llm", "model.path=huggyllama/llama-7b", "method.ratio=0.3"), 5.68, None),
        (words("svd_llm", "model=llama2_7b"), None, None),
        (words("svd_llm", "model.path=huggyllama/llama-7b", "recovery=lora"), None, None),
        (words("none", "model.path=huggyllama/llama-7b"), 5.68, 5.68),
    ],
)
def test_a_papers_figures_are_those_of_the_same_model_method_and_ratio(overrides, dense, final):
    [config] = Composer().jobs(force_dotted(overrides), multirun=False)
    found, line = published_for(config), ("wikitext2", "perplexity")
    assert (found.dense.get(line), found.final.get(line)) == (dense, final)


def test_a_papers_average_is_that_of_the_same_benchmarks():
    overrides = ["method=grasp", "method.ratio=0.2", "model.path=meta-llama/Llama-3.1-8B-Instruct"]
    [same] = Composer().jobs(force_dotted([*overrides, "task=commonsense7"]), multirun=False)
    [other] = Composer().jobs(force_dotted([*overrides, "task=commonsense"]), multirun=False)
    assert published_for(same).final == {("average", "mean"): 0.471}
    assert published_for(other) == Published()


def test_every_published_figure_names_a_method_and_a_task_that_there_are():
    options = Composer().options
    for group in yaml.safe_load(FILE.read_text()):
        assert group.get("average_of", "commonsense7") in options["task"]
        for figure in group["figures"]:
            assert figure["method"] in options["method"]
            assert figure["task"] == "average" or f"perplexity/{figure['task']}" in options["task"]
