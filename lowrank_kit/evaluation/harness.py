"""Benchmarks by lm-eval's own task definitions, which are given our rows: prompts and scoring are lm-eval's."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from rich.progress import Progress

from lowrank_kit.config import Benchmark
from lowrank_kit.data.benchmarks import Questions, load_benchmarks
from lowrank_kit.data.sources import Source
from lowrank_kit.data.special_tokens import Opening
from lowrank_kit.errors import ConfigError, LowRankKitError, did_you_mean
from lowrank_kit.evaluation import generation
from lowrank_kit.evaluation.generation import Sample
from lowrank_kit.evaluation.glue import score, standard_error
from lowrank_kit.evaluation.language_model import BoundedLM
from lowrank_kit.evaluation.records import Checkpoint, EvalRecord
from lowrank_kit.progress import Bar

VERSION = version("lm-eval")

# Value and standard error.
Figure = tuple[float, float | None]


@dataclass(frozen=True)
class Answers:
    """What a model answered to one benchmark.

    ``figures`` are value and standard error (None for a single row) by metric; ``samples`` one JSON object a row:
    the log-likelihood of every choice or the texts that were generated, what is right, every metric, and hashes of
    row and prompt. ``seconds`` is what it took, None where that was not noted.
    """

    name: str
    figures: Mapping[str, Figure]
    samples: Sequence[Sample]
    seconds: float | None


class PreparedBenchmark:
    """One benchmark as tasks of lm-eval, which any number of models can answer.

    Raises `ConfigError` where lm-eval has no such task, or not that metric, or where programs would be run without
    ``allow_code_execution``, and `LowRankKitError` where its task cannot read the rows.
    """

    def __init__(self, questions: Questions, allow_code_execution: bool = False) -> None:
        generation.check_code_execution(questions.name, questions.benchmark, allow_code_execution)
        self.name, self.questions = questions.name, questions
        self.tasks = _tasks(questions)
        """Tasks of lm-eval by their names: one, or those of a group."""
        for task in self.tasks.values():
            if missing := sorted(set(questions.benchmark.metrics) - generation.metrics_of(task)):
                raise ConfigError(
                    f"task.benchmarks.{self.name}.metrics: lm-eval's {questions.benchmark.task} does not report "
                    f"{missing[0]}{did_you_mean(missing[0], generation.metrics_of(task))}"
                )

    @property
    def key(self) -> dict[str, Any]:
        """All that the answers depend on besides the model: two benchmarks of one key have the same prompts."""
        rows = [rows.sha256 for rows in (self.questions.rows, self.questions.examples) if rows]
        settings = self.questions.benchmark.model_dump(
            mode="json", exclude={"reason", "hub_path", "hub_name", "max_rows"}
        )
        scoring = generation.scoring_key(self.questions.benchmark)
        return {"benchmark": settings, "rows": rows, "lm_eval": VERSION, **scoring}

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.questions.rows.dataset)

    def answer(self, lm: BoundedLM) -> Answers:
        """Let a model answer. Raises `LowRankKitError` for prompts longer than it reads."""
        start, metrics = time.perf_counter(), self.questions.benchmark.metrics
        lm.cut_middle = self.questions.benchmark.cut_middle
        found = evaluate(lm, {"tasks": self.tasks}, bootstrap_iters=0, log_samples=True)["samples"]
        samples: list[Sample] = []
        for name, task in self.tasks.items():
            if _generates(task):
                samples += generation.samples_of(name, self.questions.benchmark, found[name])
            else:
                samples += [_sample(name, sample, metrics) for sample in found[name]]
        figures: dict[str, Figure] = {metric: _figure(metric, [s[metric] for s in samples]) for metric in metrics}
        return Answers(self.name, figures, samples, time.perf_counter() - start)

    def records(
        self, answers: Answers, versions: Mapping[str, str], checkpoint: Checkpoint, opening: Opening
    ) -> list[EvalRecord]:
        """The answers in the form of every other figure; ``opening`` is what the prompts began with."""
        benchmark, rows = self.questions.benchmark, self.questions.rows
        note = f", {rows.note}" if rows.note else ""
        source = f"{rows.source}, {benchmark.split}{note}, {len(self)} rows, {benchmark.task} of lm-eval {VERSION}"
        return [
            EvalRecord(
                self.name, metric, value, stderr, len(answers.samples), benchmark.shots, f"{source}, {opening}",
                {**versions, "lm_eval": VERSION}, checkpoint, bos=opening.token or "",
            )
            for metric, (value, stderr) in answers.figures.items()
        ]  # fmt: skip


def evaluate_suite(
    lm: BoundedLM,
    benchmarks: Sequence[PreparedBenchmark],
    versions: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[EvalRecord]:
    """Evaluate a causal model on benchmarks.

    Args:
        lm: the model with its tokenizer, as lm-eval asks it.
        benchmarks: of `prepare`.
        versions: put into every record.
        progress: shows one bar over all rows.

    Returns:
        Every benchmark's metrics in the order of `Benchmark.metrics`, then their average.
    """
    pairs = zip(benchmarks, answer_all(lm, benchmarks, progress), strict=True)
    records = [r for b, answers in pairs for r in b.records(answers, versions or {}, "final", lm.opening)]
    return [*records, *averages(records)]


def prepare(
    benchmarks: Mapping[str, Benchmark], source: Source, limit: int | None = None, allow_code_execution: bool = False
) -> list[PreparedBenchmark]:
    """Every benchmark, by name, whose rows the source has, with the first ``limit`` rows of each.

    ``allow_code_execution``: programs that a model writes are run, in a sandbox. Raises what `load_benchmarks` and
    `PreparedBenchmark` raise.
    """
    found = load_benchmarks(benchmarks, source, limit).values()
    return [PreparedBenchmark(questions, allow_code_execution) for questions in found]


def answer_all(
    lm: BoundedLM,
    benchmarks: Sequence[PreparedBenchmark],
    progress: Progress | None = None,
    description: str = "benchmarks",
) -> Iterator[Answers]:
    """Let a model answer one benchmark after another: the caller keeps what it is given before the next begins."""
    bar = Bar(progress, description, sum(map(len, benchmarks)))
    for benchmark in benchmarks:
        bar.update(description=f"{description}: {benchmark.name}")
        lm.advance = partial(_advance, bar, len(benchmark))
        yield benchmark.answer(lm)


def _advance(bar: Bar, rows: int, share: float) -> None:
    bar.advance(rows * share)


def averages(records: Sequence[EvalRecord]) -> list[EvalRecord]:
    """The mean of every benchmark's first metric, for one model; ``n`` counts benchmarks. None of a single one."""
    first = {record.task: record for record in reversed(records)}.values()
    if len(first) < 2:
        return []
    value = fmean(record.value for record in first)
    errors = [record.stderr for record in first]
    known = [error for error in errors if error is not None]
    stderr = math.sqrt(sum(error**2 for error in known)) / len(first) if len(known) == len(first) else None
    names = ", ".join(f"{record.task} ({record.metric})" for record in reversed(first))
    some = records[0]
    return [
        EvalRecord(
            "average", "mean", value, stderr, len(first), some.fewshot, f"of {names}", some.versions, some.checkpoint,
            bos=some.bos,
        )
    ]  # fmt: skip


@cache
def definitions() -> dict[str, Path]:
    """Where lm-eval defines its tasks and groups: file by name. `TaskManager` would parse all 14,000 files for that."""
    line = re.compile(r"""^["']?(?:task|group)["']?: *["']?([^\s"']+)["']?\s*$""", re.MULTILINE)
    folder = Path(lm_eval.tasks.__file__).parent
    files = sorted(folder.rglob("*.yaml"), reverse=True)
    return {name: file for file in files for name in line.findall(file.read_text("utf-8"))}


@cache
def _manager(topic: str) -> TaskManager:
    folder = Path(lm_eval.tasks.__file__).parent / topic
    return TaskManager(include_defaults=False, include_path=folder)


def _tasks(questions: Questions) -> dict[str, Task]:
    benchmark = questions.benchmark
    file = definitions().get(benchmark.task)
    if file is None:
        raise ConfigError(
            f"task.benchmarks.{questions.name}.task: lm-eval {VERSION} has no task '{benchmark.task}'"
            f"{did_you_mean(benchmark.task, definitions())}"
        )
    manager = _manager(file.relative_to(Path(lm_eval.tasks.__file__).parent).parts[0])
    try:
        parts = set(questions.rows.dataset[benchmark.part_column][:]) if benchmark.part_column else None
        specs = [
            {"task": name, **_redirected(questions, part), **generation.overrides(benchmark)}
            for name, part in _leaves(manager, benchmark.task)
            if parts is None or part in parts
        ]
        # Inside a group, or lm-eval takes what overrides a task for the whole of a new one.
        with generation.prompts_alone():
            tasks = manager.load([{"group": f"our_{questions.name}", "task": specs}])["tasks"]
    except ImportError as error:
        raise ConfigError(
            f"lm-eval's task '{benchmark.task}' needs packages that are not here; those of LongBench come with "
            f"`pip install 'lowrank-kit[longbench]'`: {error}"
        ) from error
    except Exception as error:
        columns = ", ".join(questions.rows.dataset.column_names)
        raise LowRankKitError(
            f"lm-eval's task '{benchmark.task}' cannot read the rows of '{benchmark.dataset}' "
            f"({questions.rows.source}), which have the columns {columns}: {type(error).__name__}: {error}"
        ) from error
    for task in tasks.values():
        if benchmark.shots and not (benchmark.shots_split or task.fewshot_cfg.samples):
            raise ConfigError(
                f"task.benchmarks.{questions.name}.shots_split: lm-eval's {benchmark.task} has no solved examples of "
                f"its own, so shots={benchmark.shots} needs a split to draw them from"
            )
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        if _generates(task):
            generation.set_generation(task, benchmark)
    return tasks


def _generates(task: Task) -> bool:
    return task.OUTPUT_TYPE == "generate_until"


def _leaves(manager: TaskManager, name: str) -> Iterator[tuple[str, str | None]]:
    """Names of a task, or of those of a group, with their hub configurations."""
    entry = manager.task_index[name]
    children = sorted(entry.tags) if entry.cfg is None else entry.cfg["task"]
    if isinstance(children, str):
        yield name, entry.cfg.get("dataset_name")
    else:
        for child in children:
            yield from _leaves(manager, child)


def _redirected(questions: Questions, part: str | None) -> dict[str, Any]:
    benchmark = questions.benchmark
    splits = {benchmark.split: _part(questions.rows.dataset, benchmark, part)}
    if questions.examples and benchmark.shots_split:
        splits[benchmark.shots_split] = _part(questions.examples.dataset, benchmark, part)
    no_examples: dict[str, Any] = {} if benchmark.shots else {"fewshot_config": {"samples": []}}
    return {
        "custom_dataset": _constant(splits),
        "training_split": None,
        "validation_split": None,
        "test_split": benchmark.split,
        "fewshot_split": benchmark.shots_split if benchmark.shots else None,
        "num_fewshot": benchmark.shots,
        **no_examples,
    }


def _constant(value: dict[str, datasets.Dataset]) -> Callable[..., dict[str, datasets.Dataset]]:
    # lm-eval hands over the task's metadata.
    return lambda **_: value


def _part(rows: datasets.Dataset, benchmark: Benchmark, part: str | None) -> datasets.Dataset:
    column = benchmark.part_column
    if column is None:
        return rows
    return rows.select([index for index, value in enumerate(rows[column][:]) if value == part])


def _sample(task: str, sample: Mapping[str, Any], metrics: Sequence[str]) -> Sample:
    return {
        **generation.identity_of(task, sample),
        "log_likelihoods": [likelihood for likelihood, _ in sample["filtered_resps"]],
        **{metric: _plain(sample[metric]) for metric in metrics},
    }


def _plain(value: Any) -> float | list[int]:
    """Right and chosen class, for metrics that are no mean over rows."""
    return [int(number) for number in value] if isinstance(value, tuple) else float(value)


def _figure(metric: str, values: Sequence[Any]) -> Figure:
    # Elsewhere, f1 is of the words of one answer.
    if isinstance(values[0], list):
        right, chosen = np.array(values).T
        name: Any = {"mcc": "matthews"}.get(metric, metric)
        return score(name, right, chosen), standard_error(name, right, chosen) if len(values) > 1 else None
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
