"""Hyper-parameter search by Optuna: a study in SQLite that only this process writes, trials by any launcher."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override
from rich.console import Console
from rich.table import Table

from lowrank_kit.compose import Composer, Search
from lowrank_kit.config.sweeps import Optuna
from lowrank_kit.console import set_up_log
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.runs.directory import run_path, write_atomically
from lowrank_kit.sweep.report import JobReport
from lowrank_kit.sweep.run_sweep import run_jobs

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)


def run_search(search: Search, composer: Composer, flags: Sequence[str] = ()) -> Path:
    """Propose, run and tell until the study has its trials; print the best; return the study's folder.

    The study lies in ROOT/searches/NAME: `study.db`, and a sweep's folder for each batch. A trial that an earlier
    process left unfinished is proposed again, and its run resumes. Raises `ConfigError` where optuna is missing or
    the study was begun with another space, and `LowRankKitError` if no trial gave the objective.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("a search needs Optuna: pip install 'lowrank_kit[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    set_up_log()
    settings, space = search.settings, {o.get_key_element(): _distribution(o) for o in search.space}
    start = composer.point(search, [f"{key}={_first(d)}" for key, d in space.items()])
    folder = Path(start.config.run.root) / "searches" / settings.study
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name=settings.study,
        direction=settings.direction,
        sampler=_sampler(settings),
        load_if_exists=True,
    )
    _check_same_search(study, search)
    _propose_again(study)
    while (left := settings.trials - len(_finished(study))) > 0:
        trials = [study.ask(space) for _ in range(min(left, settings.at_once))]
        jobs = [composer.point(search, [f"{key}={trial.params[key]}" for key in space]) for trial in trials]
        # Of a few choices the same may be proposed twice at a time: one run answers both.
        different = {run_path(job.config): job for job in jobs}
        batch = folder / f"trials-{trials[0].number:04d}"
        reports = run_jobs(list(different.values()), batch, search.launcher, flags)
        answers = dict(zip(different, reports, strict=True))
        for trial, job in zip(trials, jobs, strict=True):
            _tell(study, trial, answers[run_path(job.config)], settings)
    _conclude(study, folder)
    return folder


def _distribution(dimension: Override) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = dimension.value()
    log_scale = "log" in (value.tags or ())
    if dimension.is_interval_sweep():
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind = IntDistribution if whole else FloatDistribution
        return kind(value.start, value.end, log=log_scale)
    if dimension.is_range_sweep() and not value.shuffle and not log_scale:
        steps = list(value.range())
        kind = IntDistribution if all(isinstance(step, int) for step in steps) else FloatDistribution
        return kind(steps[0], steps[-1], step=value.step)
    return CategoricalDistribution(list(dimension.sweep_string_iterator()))


def _first(distribution: Any) -> Any:
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


def _sampler(settings: Optuna) -> Any:
    from optuna import samplers

    kinds = {
        "tpe": samplers.TPESampler,
        "random": samplers.RandomSampler,
        "gp": samplers.GPSampler,
        "cmaes": samplers.CmaEsSampler,
        "qmc": samplers.QMCSampler,
    }
    return kinds[settings.sampler](seed=settings.seed)


def _check_same_search(study: "Study", search: Search) -> None:
    present = {
        "fixed": sorted(word for word in search.fixed if not word.lstrip("+").startswith(("run.", "tracker"))),
        "space": sorted(o.input_line or "" for o in search.space),
        "objective": [search.settings.task, search.settings.metric],
    }
    earlier: Mapping[str, Any] = study.user_attrs
    if changed := [key for key, value in present.items() if earlier.get(key, value) != value]:
        lines = [f"{key}: {earlier[key]} there, {present[key]} now" for key in changed]
        heading = (
            f"study {study.study_name} was begun as another search; choose another hydra.sweeper.study. Different:"
        )
        raise ConfigError("\n  ".join([heading, *lines]))
    for key, value in present.items():
        study.set_user_attr(key, value)


def _propose_again(study: "Study") -> None:
    from optuna.trial import TrialState

    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)


def _finished(study: "Study") -> list[Any]:
    """Trials that ended, less those that an earlier process left and that were proposed again."""
    from optuna.trial import TrialState

    ended = study.get_trials(states=[TrialState.COMPLETE, TrialState.FAIL])
    return [trial for trial in ended if "run_dir" in trial.user_attrs]


def _tell(study: "Study", trial: "Trial", report: JobReport, settings: Optuna) -> None:
    from optuna.trial import TrialState

    trial.set_user_attr("run_dir", report.run_dir)
    trial.set_user_attr("command", report.command)
    try:
        value = _objective(report, settings)
    except LowRankKitError as error:
        log.error("trial %d (%s): %s", trial.number, " ".join(report.overrides), error)
        study.tell(trial, state=TrialState.FAIL)
        return
    study.tell(trial, value)
    log.info("trial %d (%s): %s %.6g", trial.number, " ".join(report.overrides), settings.metric, value)


def _objective(report: JobReport, settings: Optuna) -> float:
    if report.state != "complete":
        raise LowRankKitError(f"{report.state}: {report.error}")
    found = [r for r in report.results if r["metric"] == settings.metric and settings.task in (None, r["task"])]
    if len(found) != 1:
        there = ", ".join(f"{r['task']} {r['metric']}" for r in report.results)
        wanted = f"{settings.task or 'any task'} {settings.metric}"
        raise LowRankKitError(
            f"{len(found)} records of results.json are {wanted}: set hydra.sweeper.task and metric to one of {there}"
        )
    return float(found[0]["value"])


def _conclude(study: "Study", folder: Path) -> None:
    """Print and write every trial, the best first; `LowRankKitError` if any failed."""
    ended = _finished(study)
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    ranked = sorted(ended, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0)))
    rows = [
        {"trial": trial.number, "state": trial.state.name.lower(), "value": trial.value, "params": trial.params}
        | {key: trial.user_attrs[key] for key in ("run_dir", "command")}
        for trial in ranked
    ]
    write_atomically(folder / "search.json", json.dumps({"study": study.study_name, "trials": rows}, indent=2) + "\n")
    table = Table("trial", "value", "point", title=f"search {study.study_name}", title_justify="left")
    for row in rows:
        value = "failed" if row["value"] is None else f"{row['value']:.6g}"
        table.add_row(str(row["trial"]), value, " ".join(f"{key.lstrip('+')}={v}" for key, v in row["params"].items()))
    console = Console(width=max(120, Console().width))
    console.print(table, markup=False)
    failed = sum(row["value"] is None for row in rows)
    if failed < len(rows):
        console.print(f"best: {rows[0]['command']}", soft_wrap=True, markup=False, highlight=False)
    if failed:
        raise LowRankKitError(f"{failed} of {len(rows)} trials failed; the reasons are in {folder}/trials-*/sweep.json")
