"""Hydra composition with errors in our own words: one message, the nearest legal spelling."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lowrank_kit.config import RunConfig, load
from lowrank_kit.errors import ConfigError, did_you_mean

PARTS_OF_METHODS = ("truncation", "allocation")
"""Config groups that some methods consist of, and others know nothing of."""


def conf_folder() -> Path:
    """Return the folder of YAMLs: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def options(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Return every config group of these folders with its options, for example `task: [glue, glue/rte]`."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            group, *name = file.relative_to(folder).with_suffix("").parts
            found[group].add("/".join(name))
    return {group: sorted(names) for group, names in sorted(found.items())}


class Composer:
    """Composes configurations from one folder of YAMLs and, as `--config-dir` does, a second one."""

    def __init__(self, name: str = "config", folder: Path | None = None, extra: Path | None = None) -> None:
        self.name = name
        self.folder = (folder or conf_folder()).resolve()
        self.extra = extra.resolve() if extra else None
        self.options = options([self.folder, *([self.extra] if self.extra else [])])

    def compose(self, overrides: Sequence[str] = ()) -> DictConfig:
        """Compose one configuration, not yet checked against the schema; `ConfigError` if it cannot be."""
        return self._compose(overrides, return_hydra_config=False)

    def jobs(self, overrides: Sequence[str], multirun: bool) -> list[RunConfig]:
        """Check and return every configuration that this command line stands for.

        A sweep (`multirun`, or `hydra.mode: MULTIRUN` in an experiment) is expanded as by Hydra's sweeper.
        Raises one `ConfigError` for everything that is wrong in any combination.
        """
        with self._readable_errors():
            parsed = OverridesParser.create().parse_overrides(list(overrides))
        fixed = [o.input_line for o in parsed if not o.is_sweep_override()]
        hydra = self._compose(fixed if multirun else overrides, return_hydra_config=True).hydra
        if not multirun and hydra.mode != RunMode.MULTIRUN:
            return [load(self.compose(overrides))]
        if not hydra.sweeper._target_.endswith(".BasicSweeper"):
            # Another sweeper chooses its points while it runs; what does not vary can still be checked.
            return [load(self.compose(fixed))]
        swept = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
        return self._check_all(OverridesParser.create().parse_overrides([*swept, *overrides]))

    def _check_all(self, parsed: list[Override]) -> list[RunConfig]:
        [combinations] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        good: list[RunConfig] = []
        bad: dict[str, list[str]] = defaultdict(list)
        for overrides in combinations:
            try:
                good.append(load(self.compose(overrides)))
            except ConfigError as error:
                bad[str(error)].append(_as_typed(" ".join(overrides)))
        if bad:
            lines = [
                f"{message}\n  in {len(jobs)} of {len(combinations)} jobs, the first: {jobs[0]}"
                for message, jobs in bad.items()
            ]
            raise ConfigError("\n".join(lines))
        return good

    def _compose(self, overrides: Sequence[str], return_hydra_config: bool) -> DictConfig:
        search = [f"hydra.searchpath=[file://{self.extra}]"] if self.extra else []
        with (
            self._readable_errors(),
            initialize_config_dir(version_base="1.3", config_dir=str(self.folder)),
        ):
            composed = hydra_compose(self.name, [*overrides, *search], return_hydra_config)
        for part in PARTS_OF_METHODS:
            if any(override.startswith(f"{part}=") for override in overrides):
                self._check_part(part, overrides)
        return composed

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except MissingConfigException as error:
            group, _, name = (error.missing_cfg_file or self.name).partition("/")
            legal = self.options.get(group, error.options or ())
            raise ConfigError(f"{group}={name} is not an option{did_you_mean(name, legal)}") from error
        except OverrideParseException as error:
            raise ConfigError(
                f"'{_as_typed(error.override)}' cannot be read: {error.message.splitlines()[0]}; "
                "write key=value, with quotes around special characters"
            ) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            message = _as_typed(str(error))
            if unknown := re.match(r"Could not override '((?!hydra)[^']+)'", message):
                legal = {*self.options, *RunConfig.model_fields}
                raise ConfigError(f"{unknown[1]} is not a key{did_you_mean(unknown[1], legal)}") from error
            if several := re.match(r"Ambiguous value for argument '(.+)'", message):
                raise ConfigError(
                    f"'{several[1]}' is several values: add -m to run each, or write key=[a,b] for a list"
                ) from error
            raise ConfigError(f"The configuration cannot be composed: {message}") from error

    def _check_part(self, part: str, overrides: Sequence[str]) -> None:
        """Raise `ConfigError` for a part that the chosen method does not have; merged in, it would mean nothing."""
        folders = [self.folder, *([self.extra] if self.extra else [])]
        files = [file for folder in folders for file in sorted(folder.glob("method/*.yaml"))]
        having = [file.stem for file in files if f"- override /{part}@" in file.read_text()]
        chosen = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("method=")), None)
        if chosen not in having:
            raise ConfigError(f"{part}= is a part of some methods only: add one of method={', '.join(having)}")


def force_dotted(overrides: Sequence[str]) -> list[str]:
    """Write `a.b=c` as `++a.b=c`, so that Hydra lets every key through and the schema alone judges them all.

    The schema then lists a misspelt key together with every other problem, and open dictionaries such as
    `method.rank_pattern` take new keys without a plus sign.
    """
    plain = re.compile(r"(?!hydra\.)[A-Za-z_]\w*\.[^=@]+=")
    return [f"++{override}" if plain.match(override) else override for override in overrides]


def _as_typed(text: str) -> str:
    return re.sub(r"(?<!\S)(')?\+\+", r"\1", text)
