"""Hydra composition with errors in our own words: one message, the nearest legal spelling."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lowrank_kit.compressors.compressor import Compressor
from lowrank_kit.config import Choice, RunConfig, load, method_class
from lowrank_kit.config.groups import conf_folder, options, presets
from lowrank_kit.config.plugins import conf_folders
from lowrank_kit.config.sweeps import Launcher, Optuna, load_launcher, load_search
from lowrank_kit.errors import ConfigError, did_you_mean

PARTS_OF_METHODS = ("truncation", "allocation", "correction", "storage", "structure")
"""Config groups that some methods consist of, and others know nothing of."""


@dataclass(frozen=True)
class Job:
    """One configuration of a sweep."""

    overrides: tuple[str, ...]
    """All of them but Hydra's own, as typed."""
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """Every combination of a grid, and how to start them."""

    jobs: list[Job]
    launcher: Launcher


@dataclass(frozen=True)
class Search:
    """A search: what does not vary, what does, and how to start the points that it proposes."""

    fixed: list[str]
    space: list[Override]
    settings: Optuna
    launcher: Launcher


class Composer:
    """Composes configurations from one folder of YAMLs and, as `--config-dir` does, a second one."""

    def __init__(self, name: str = "config", folder: Path | None = None, extra: Path | None = None) -> None:
        self.name = name
        self.folder = (folder or conf_folder()).resolve()
        self.extra = extra.resolve() if extra else None
        for option, given in (("--config-path", folder), ("--config-dir", extra)):
            if given is not None and not given.is_dir():
                raise ConfigError(f"{option} '{given}' is not a folder")
        plugins = conf_folders()
        self.plugged_in = [f"file://{folder}" for folder in plugins]
        self.more = [*plugins, *([self.extra] if self.extra else [])]
        self.options = options([self.folder, *self.more])
        self.presets = presets([self.folder, *self.more])
        _forget_namesakes(self.options)

    def compose(self, overrides: Sequence[str] = ()) -> DictConfig:
        """Compose one configuration, not yet checked against the schema; `ConfigError` if it cannot be."""
        return self._compose(self.read(overrides), return_hydra_config=False)

    def read(self, overrides: Sequence[str]) -> list[str]:
        """Write overrides as Hydra takes them: `force_dotted`, and `method.truncation=NAME` as `truncation=NAME`.

        The second where the method has such a part; Astra's `method.allocation` is a key like any other.
        """
        dotted = force_dotted(overrides)
        part = re.compile(rf"\+*method\.({'|'.join(PARTS_OF_METHODS)})=(?=[\w,]+$)")
        if not any(map(part.match, dotted)):
            return dotted
        choice = [word for word in dotted if re.match(r"(method|experiment)=[\w/]+$", word)]
        parts = _parts_of(self._compose(choice, return_hydra_config=False))
        return [part.sub(r"\1=", word) if (m := part.match(word)) and m[1] in parts else word for word in dotted]

    def jobs(self, overrides: Sequence[str], multirun: bool) -> list[RunConfig]:
        """Check and return every configuration that this command line stands for; of a search, where it begins.

        Raises one `ConfigError` for everything that is wrong in any combination.
        """
        planned = self.planned(overrides, multirun)
        if isinstance(planned, Search):
            return [self.point(planned, [f"{o.get_key_element()}={ends(o)[0]}" for o in planned.space]).config]
        return [job.config for job in planned.jobs] if isinstance(planned, Sweep) else planned

    def planned(self, overrides: Sequence[str], multirun: bool) -> Sweep | Search | list[RunConfig]:
        """What this command line asks for, checked as by `jobs`.

        A sweep (`multirun`, or `hydra.mode: MULTIRUN` in an experiment) is expanded as by Hydra's sweeper. A list:
        one run, or what a launcher or sweeper that is not ours makes its jobs of.
        """
        overrides = self.read(overrides)
        with self._readable_errors():
            parsed = OverridesParser.create().parse_overrides(overrides)
        fixed = [o.input_line for o in parsed if not o.is_sweep_override()]
        composed = self._compose(fixed if multirun else overrides, return_hydra_config=True)
        hydra = composed.hydra
        if not multirun and hydra.mode != RunMode.MULTIRUN:
            if meant := [word for word in overrides if re.match(r"\+*hydra[./](launcher|sweeper)\b", word)]:
                raise ConfigError(f"{_as_typed(meant[0])} is for sweeps and searches: add -m")
            with open_dict(composed):
                del composed.hydra
            return [load(composed)]
        with self._readable_errors():
            sweeper: Any = OmegaConf.to_container(hydra.sweeper, resolve=True, throw_on_missing=True)
            launcher: Any = OmegaConf.to_container(hydra.launcher, resolve=True, throw_on_missing=True)
        swept = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides(self.read([*swept, *overrides]))
        ours = "kind" in launcher or launcher["_target_"].endswith(".BasicLauncher")
        if sweeper.get("kind") == "optuna" and ours:
            search = Search(
                _without_hydra(fixed),
                [o for o in parsed if o.is_sweep_override()],
                load_search(sweeper),
                load_launcher(launcher),
            )
            self._check_search(search)
            return search
        if not str(sweeper.get("_target_")).endswith(".BasicSweeper"):
            # Another sweeper chooses its points while it runs; what does not vary can still be checked.
            return [load(self.compose(fixed))]
        if unknown := sorted(sweeper.keys() - {"_target_", "max_batch_size", "params"}):
            raise ConfigError(f"hydra.sweeper.{unknown[0]} is a key of searches: add hydra/sweeper=optuna")
        jobs = self._check_all(parsed)
        return Sweep(jobs, load_launcher(launcher)) if ours else [job.config for job in jobs]

    def point(self, search: Search, chosen: Sequence[str]) -> Job:
        """The configuration at one point of a search."""
        overrides = [*search.fixed, *chosen]
        return Job(_as_typed_all(overrides), load(self.compose(overrides)))

    def _check_search(self, search: Search) -> None:
        """Raise `ConfigError` where either end of any dimension cannot be, or a test split would be searched on."""
        if not search.space:
            raise ConfigError("a search needs something to vary, for example 'method.ratio=interval(0.2,0.5)'")
        names = [o.get_key_element() for o in search.space]
        first = [f"{name}={ends(o)[0]}" for name, o in zip(names, search.space, strict=True)]
        for index, dimension in enumerate(search.space):
            for value in ends(dimension):
                config = self.point(search, [*first[:index], f"{names[index]}={value}", *first[index + 1 :]]).config
                if config.eval.held_out is None:
                    raise ConfigError(
                        "a search that reads the evaluation split chooses on the rows it is evaluated on: "
                        "add eval.held_out=N to choose on N training rows (or windows) that training does not see"
                    )

    def _check_all(self, parsed: list[Override]) -> list[Job]:
        try:
            [combinations] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        except HydraException as error:
            given = " ".join(_as_typed(o.input_line) for o in parsed if o.is_sweep_override())
            raise ConfigError(
                f"a sweep takes lists and ranges of values, not all of {given}; intervals are for a search "
                "(hydra/sweeper=optuna)"
            ) from error
        good: list[Job] = []
        bad: dict[str, list[str]] = defaultdict(list)
        for overrides in map(_without_hydra, combinations):
            try:
                good.append(Job(_as_typed_all(overrides), load(self.compose(overrides))))
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
        places = [*self.plugged_in, *([f"file://{self.extra}"] if self.extra else [])]
        search = [f"hydra.searchpath=[{','.join(places)}]"] if places else []
        self._check_options(overrides)
        with (
            self._readable_errors(),
            initialize_config_dir(version_base="1.3", config_dir=str(self.folder)),
        ):
            composed = hydra_compose(self.name, [*overrides, *search], return_hydra_config=True)
        self._check_preset(composed)
        if not return_hydra_config:
            with open_dict(composed):
                del composed.hydra
        for part in PARTS_OF_METHODS:
            if any(override.startswith(f"{part}=") for override in overrides):
                self._check_part(part, composed)
        name_model(composed, overrides)
        return composed

    def _check_options(self, overrides: Sequence[str]) -> None:
        """Raise `ConfigError` for a group that is given anything but a name, and for `method` that is left out."""
        with self._readable_errors():
            parsed = OverridesParser.create().parse_overrides(list(overrides))
        for override in parsed:
            group, value = override.key_or_group, override._value
            if group == "method" and override.is_delete():
                raise ConfigError("method is missing: choose one, for example method=none for the model as it is")
            is_name = isinstance(value, (str, QuotedString)) or override.is_sweep_override()
            if group in self.options and not is_name and not override.is_delete():
                raise ConfigError(
                    f"{_as_typed(override.input_line)} is not an option; legal: {', '.join(self.options[group])}"
                )

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except MissingConfigException as error:
            missing = error.missing_cfg_file or self.name
            if missing == self.name:
                names = [file.stem for file in self.folder.glob("*.yaml")]
                raise ConfigError(
                    f"--config-name {missing} is not in {self.folder}{did_you_mean(missing, names)}"
                ) from error
            group, _, name = missing.rpartition("/") if missing.startswith("hydra/") else missing.partition("/")
            legal = self.options.get(group, error.options or ())
            key = "method.preset" if group == "preset" else group
            raise ConfigError(f"{key}={name} is not an option{did_you_mean(name, legal)}") from error
        except OverrideParseException as error:
            raise ConfigError(
                f"'{_as_typed(error.override)}' cannot be read: write key=value, with quotes around special characters"
            ) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            message = _as_typed(str(error))
            if unknown := re.match(r"Could not (?:override|delete from config\.) '([^'.]+|hydra[^']+)'", message):
                legal = () if "." in unknown[1] else {*self.options, *RunConfig.model_fields}
                raise ConfigError(f"{unknown[1]} is not a key{did_you_mean(unknown[1], legal)}") from error
            if several := re.match(r"Ambiguous value for argument '(.+)'", message):
                raise ConfigError(
                    f"'{several[1]}' is several values: add -m to run each, or write key=[a,b] for a list"
                ) from error
            raise ConfigError(f"The configuration cannot be composed: {message}") from error

    def _check_preset(self, composed: DictConfig) -> None:
        """Raise `ConfigError` for a preset that the chosen method does not have, or that is named but not merged in."""
        choices = composed.hydra.runtime.choices
        preset, method = choices.get("preset", "default"), choices.get("method")
        if preset != "default" and method not in self.presets.get(preset, ()):
            having = ", ".join(self.presets.get(preset, ()))
            raise ConfigError(
                f"method={method} has no preset '{preset}', leave method.preset out; those that have it: {having}"
            )
        for key, merged in (("method", preset), ("recovery.method", "default")):
            named = OmegaConf.select(composed, f"{key}.preset", default="default")
            if named != merged:
                raise ConfigError(
                    f"{key}.preset={named} would set nothing here: write method.preset={named} on the command line, or "
                    f"'- override /preset: {named}' in the defaults of an experiment; a recovery's adapter has none"
                )

    def _check_part(self, part: str, composed: DictConfig) -> None:
        """Raise `ConfigError` for a part that the chosen method does not have; merged in, it would mean nothing."""
        if part in _parts_of(composed):
            return
        run = composed.run
        having = [
            name
            for name in self.options["method"]
            if part in _parts_of(OmegaConf.create({"method": {"_target_": self._target(name)}, "run": run}))
        ]
        raise ConfigError(f"{part}= is a part of some methods only: add one of method={', '.join(having)}")

    def _target(self, method: str) -> str:
        """The class that a method's YAML names, or that of the one it builds on: to compose each would take seconds."""
        files = (folder / "method" / f"{method}.yaml" for folder in (self.folder, *self.more))
        found = OmegaConf.load(next(file for file in files if file.is_file()))
        assert isinstance(found, DictConfig)
        if "_target_" in found:
            return str(found._target_)
        return self._target(next(base for base in found.defaults if isinstance(base, str) and base != "_self_"))


def by_ratio(ratio: float, values: Mapping[int | float, Any]) -> Any:
    """Of values by ratio, that of the largest ratio which is not above this one."""
    return values[max(known for known in values if known <= ratio)]


def _by_ratio_of_method(values: Mapping[int | float, Any], *, _root_: DictConfig) -> Any:
    ratio = OmegaConf.select(_root_, "method.ratio", default=Compressor.model_fields["ratio"].default)
    return by_ratio(ratio, values)


# For YAMLs: published settings that change with the ratio. `${by_ratio:{0: a, 0.6: b}}` is a at method.ratio=0.5.
OmegaConf.register_new_resolver("by_ratio", _by_ratio_of_method, replace=True)


def force_dotted(overrides: Sequence[str]) -> list[str]:
    """Write `a.b=c` as `++a.b=c`, so that Hydra lets every key through and the schema alone checks them all.

    The schema then lists a misspelt key together with every other problem, and open dictionaries such as
    `method.rank_pattern` take new keys without a plus sign. `recovery.method=NAME` chooses a method, as `method=NAME`;
    `method.preset=NAME` chooses published settings, which all other overrides win over.
    """
    plain = re.compile(r"(?!hydra\.(?!launcher\.|sweeper\.))[A-Za-z_]\w*\.[^=@]+=")
    named = (re.sub(r"^recovery\.method=(?=\w+$)", "method@recovery.method=", override) for override in overrides)
    named = (re.sub(r"^\+*method\.preset=", "preset=", override) for override in named)
    return [f"++{override}" if plain.match(override) else override for override in named]


def name_model(composed: DictConfig, overrides: Sequence[str]) -> None:
    """Give a model that is named by ``model.path`` alone its folder's or repository's name."""
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    if "model.path" in given and not given & {"model", "model.name"}:
        composed.model.name = _name_of(str(composed.model.path))


def _parts_of(composed: DictConfig) -> set[str]:
    """The fields of the method that a `Choice` of several classes fills."""
    fields = method_class(composed).model_fields.items()
    return {
        name for name, field in fields if isinstance(field.annotation, type) and issubclass(field.annotation, Choice)
    }


def _forget_namesakes(ours: Mapping[str, Sequence[str]]) -> None:
    """Let our launchers and sweepers be found where a plug-in of Hydra's registers one of the same name."""
    Plugins.instance()
    groups: Any = ConfigStore.instance().repo["hydra"]
    for group in ("launcher", "sweeper"):
        for name in ours.get(f"hydra/{group}", ()):
            groups[group].pop(f"{name}.yaml", None)


def ends(dimension: Override) -> list[str]:
    """Return the values at which a dimension of a search is checked: every choice, or both ends."""
    value: Any = dimension.value()
    if dimension.is_interval_sweep():
        return [str(value.start), str(value.end)]
    if dimension.is_discrete_sweep():
        return list(dimension.sweep_string_iterator())
    raise ConfigError(f"{dimension.get_key_element()}: a dimension of a search is a list of values, range or interval")


def _name_of(path: str) -> str:
    """What a model is called that is given by its path alone: as its folder or repository, one of a run as the run."""
    parts = [part for part in PurePath(path).parts if part not in ("checkpoint", "recovered")]
    return parts[-1].removesuffix(".gguf") if parts else path


def _without_hydra(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if not re.match(r"[+~]*hydra[./]", override)]


def _as_typed_all(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(_as_typed(override) for override in overrides)


def _as_typed(text: str) -> str:
    return re.sub(r"(?<!\S)preset=", "method.preset=", re.sub(r"(?<!\S)(')?\+\+", r"\1", text))
