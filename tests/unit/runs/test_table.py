from lowrank_kit.evaluation.records import EvalRecord
from lowrank_kit.runs.table import print_results


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
