"""Benchmarks whose answers are texts: lm-eval's prompts and filters; mathematics and programs are scored by ours."""

import importlib.metadata
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import ModuleType, SimpleNamespace
from typing import Any

import evaluate
from lm_eval.api.task import Task

from lowrank_kit import distributed
from lowrank_kit.config import Benchmark
from lowrank_kit.data.benchmarks import check_allowed
from lowrank_kit.evaluation import words
from lowrank_kit.evaluation.mathematics import is_right
from lowrank_kit.evaluation.programs import pass_at_k, program_of, run_all
from lowrank_kit.evaluation.sandbox import LIMITS, check_sandbox

Sample = dict[str, Any]

# lm-eval reports one exact match for each of its filters.
FILTERS = {"strict_match": "strict-match", "flexible_match": "flexible-extract"}


def check_code_execution(name: str, benchmark: Benchmark, is_allowed: bool) -> None:
    """Raise what `check_allowed` does, and `LowRankKitError` where there is no sandbox for a model's programs."""
    check_allowed(name, benchmark, is_allowed)
    if benchmark.runs_code:
        check_sandbox()


@contextmanager
def prompts_alone() -> Iterator[None]:
    """Lets lm-eval define tasks whose scorers cannot be had.

    Those of HumanEval and MBPP, which are not wanted, download code that runs programs unguarded; that of MATH insists
    on antlr 4.11, which Hydra excludes. That of CoQA takes its counts from a module that transformers 5 dropped.
    """
    versions = importlib.metadata.version
    none_of_it = SimpleNamespace(compute=lambda **_: None)
    package: Any = ModuleType("transformers.data.metrics")
    package.squad_metrics = words
    dropped = {package.__name__: package, f"{package.__name__}.squad_metrics": words}

    def version(name: str) -> str:
        return "4.11" if name.startswith("antlr4") else versions(name)

    with ExitStack() as stack:
        for name, module in dropped.items():
            stack.callback(_restore, name, sys.modules.get(name))
            sys.modules[name] = module
        stack.enter_context(_replaced(evaluate, "load", lambda *_, **__: none_of_it))
        stack.enter_context(_replaced(importlib.metadata, "version", version))
        yield


def _restore(name: str, module: ModuleType | None) -> None:
    if module is None:
        del sys.modules[name]
    else:
        sys.modules[name] = module


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def overrides(benchmark: Benchmark) -> dict[str, Any]:
    """What to change in lm-eval's task so that it leaves the scoring to `samples_of`."""
    if not (benchmark.runs_code or "math_verify" in benchmark.metrics):
        return {}
    everything = {"function": "custom", "filter_fn": lambda responses, docs: responses}
    return {
        "process_results": lambda doc, results: {},
        "filter_list": [{"name": "none", "filter": [everything]}],
        "repeats": benchmark.samples,
        "unsafe_code": False,
    }


def set_generation(task: Task, benchmark: Benchmark) -> None:
    """Let the benchmark decide how long a text is, and how its tokens are drawn."""
    settings = task.config.generation_kwargs
    if benchmark.max_new_tokens is not None:
        settings["max_gen_toks"] = benchmark.max_new_tokens
    if benchmark.temperature:
        settings |= {"do_sample": True, "temperature": benchmark.temperature}


def metrics_of(task: Task) -> set[str]:
    """The metrics that a task of lm-eval has, by our names."""
    names = {metric if isinstance(metric, str) else metric.__name__ for metric in task.aggregation()}
    if "exact_match" in names:
        filters = {found.name for found in task._filters}
        names |= {ours for ours, theirs in FILTERS.items() if theirs in filters}
    if any(name.startswith("pass_at") for name in names):
        names |= {"pass@1", "pass@10", "pass@100"}
    return names


def scoring_key(benchmark: Benchmark) -> dict[str, Any]:
    """What the scores of given texts depend on."""
    if benchmark.runs_code:
        return {"limits": asdict(LIMITS)}
    return {"math_verify": importlib.metadata.version("math-verify")} if "math_verify" in benchmark.metrics else {}


def identity_of(task: str, sample: Mapping[str, Any]) -> Sample:
    """Which row and which prompt it was."""
    return {
        "task": task,
        "row": sample["doc_id"],
        "row_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "target": sample["target"],
    }


def samples_of(task: str, benchmark: Benchmark, found: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """One sample a row, of what lm-eval noted of each row and filter: the texts, with every metric.

    Raises `LowRankKitError` where programs cannot be kept apart from the machine.
    """
    rows: dict[int, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for sample in found:
        rows[sample["doc_id"]][sample["filter"]] = sample
    first = [next(iter(by_filter.values())) for by_filter in rows.values()]
    texts = [list(sample["resps"][0]) for sample in first]
    scores = _scores(benchmark, list(rows.values()), [sample["doc"] for sample in first], texts)
    return [
        {**identity_of(task, sample), "answers": its_texts, **score}
        for sample, its_texts, score in zip(first, texts, scores, strict=True)
    ]


def _scores(
    benchmark: Benchmark,
    filtered: Sequence[Mapping[str, Mapping[str, Any]]],
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[Sequence[str]],
) -> list[Sample]:
    if benchmark.runs_code:
        return _programs(benchmark, rows, texts)
    if "math_verify" in benchmark.metrics:
        pairs = zip(rows, texts, strict=True)
        return [{"math_verify": float(is_right(text, row["solution"]))} for row, [text] in pairs]
    return [{m: _of_lm_eval(m, by_filter) for m in benchmark.metrics} for by_filter in filtered]


def _of_lm_eval(metric: str, by_filter: Mapping[str, Mapping[str, Any]]) -> float:
    if metric in FILTERS:
        return float(by_filter[FILTERS[metric]]["exact_match"])
    [sample] = by_filter.values()
    return float(sample[metric])


def _programs(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]], texts: Sequence[Sequence[str]]) -> list[Sample]:
    programs = [program_of(row, text) for row, its in zip(rows, texts, strict=True) for text in its]
    outcomes, n = distributed.on_main(lambda: run_all(programs)), benchmark.samples
    scores = []
    for start in range(0, len(outcomes), n):
        of_row = outcomes[start : start + n]
        passed = sum(outcome.status == "passed" for outcome in of_row)
        figures: Sample = {m: pass_at_k(n, passed, int(m.removeprefix("pass@"))) for m in benchmark.metrics}
        scores.append(figures | {"outcomes": [asdict(outcome) for outcome in of_row]})
    return scores
