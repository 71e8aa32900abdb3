"""How the jobs of a sweep are started, and how a search chooses its points: Hydra's groups launcher and sweeper."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from lowrank_kit.config.explain import explain
from lowrank_kit.config.section import Section
from lowrank_kit.errors import ConfigError, did_you_mean


class InProcess(Section):
    """One job after another, in this process."""


class Joblib(Section):
    """Several jobs side by side on this machine, a process each."""

    n_jobs: int = Field(default=2, ge=1)
    """How many at a time."""
    threads: int | None = Field(default=1, ge=1)
    """OMP_NUM_THREADS of each; null: what the environment says."""


class Submitit(Section):
    """Jobs of a queue, by submitit; every field but the first three is sbatch's own."""

    cluster: Literal["slurm", "local"]
    """`slurm`, or `local`: submitit's processes on this machine, to try things out."""
    poll_seconds: float = Field(default=15.0, gt=0)
    """How often the queue is asked."""
    max_num_timeout: int = Field(default=20, ge=0)
    """How often a job that reached its time limit goes back to the queue; being preempted does not count."""
    array_parallelism: int = Field(default=100, ge=1)
    """How many elements of the array run at a time."""
    signal_delay_s: int = Field(default=120, ge=1)
    """Seconds between the warning and the time limit: the job is put back to the queue then."""
    timeout_min: int = Field(default=240, ge=1)
    """Time limit in minutes."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of an element."""
    tasks_per_node: int = Field(default=1, ge=1)
    """Processes on a node; each works a configuration of its own."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """CPUs of a process."""
    gpus_per_node: int | None = Field(default=None, ge=0)
    """GPUs of a node; where a node has one process."""
    gpus_per_task: int | None = Field(default=None, ge=0)
    """GPUs of a process; where a node has several."""
    mem_gb: float | None = Field(default=None, gt=0)
    """Memory of a node in GB."""
    exclusive: bool | None = None
    """Share the node with nobody."""
    partition: str | None = None
    """Partition; null: the site's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that a node must have."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job: modules, environment variables."""
    additional_parameters: dict[str, str | int | bool] = Field(default_factory=dict)
    """Any other option of sbatch, without its dashes."""


class Optuna(Section):
    """A search: Optuna proposes points, and a study in SQLite remembers them."""

    study: str
    """Name of the study; the same name continues it."""
    trials: int = Field(default=20, ge=1)
    """Finished trials, failed ones among them, at which the study is complete."""
    at_once: int = Field(default=1, ge=1)
    """Trials proposed at a time: each batch is a sweep of the launcher."""
    task: str | None = None
    """Which record of results.json is the objective: its task; null: the only one with this metric."""
    metric: str = "perplexity"
    """And its metric."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Whether less or more of it is better."""
    sampler: Literal["tpe", "random", "gp", "cmaes", "qmc"] = "tpe"
    """How points are proposed."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler."""


Launcher = InProcess | Joblib | Submitit
LAUNCHERS: dict[str, type[Section]] = {"joblib": Joblib, "submitit": Submitit}


def load_launcher(plain: Mapping[str, Any]) -> Launcher:
    """Check `hydra.launcher`; Hydra's basic launcher is `InProcess`. Raises `ConfigError`."""
    if "_target_" in plain:
        found: Any = _load(
            InProcess, {key: value for key, value in plain.items() if key != "_target_"}, "hydra.launcher"
        )
        return found
    kind = str(plain.get("kind"))
    if kind not in LAUNCHERS:
        raise ConfigError(f"hydra.launcher.kind={kind!r} is not legal{did_you_mean(kind, LAUNCHERS)}")
    found = _load(LAUNCHERS[kind], plain, "hydra.launcher")
    return found


def load_search(plain: Mapping[str, Any]) -> Optuna:
    """Check `hydra.sweeper` of a search. Raises `ConfigError`."""
    if plain.get("study") is None:
        raise ConfigError("hydra.sweeper.study is missing: name the search; the same name continues it")
    found: Any = _load(Optuna, plain, "hydra.sweeper")
    return found


def _load(schema: type[Section], plain: Mapping[str, Any], where: str) -> Section:
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in plain.items() if key not in ("kind", "params")}
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [f"  {where}.{explain(schema, problem)}" for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(["The configuration is not valid:", *lines])) from None
