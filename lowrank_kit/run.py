"""`python -m lowrank_kit.run`: compose a configuration, check it, run the pipeline."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from lowrank_kit.compose import Composer, Sweep, name_model
from lowrank_kit.config import load, schema_for
from lowrank_kit.config.plugins import let_here
from lowrank_kit.console import command, set_up_console
from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.help import help_text
from lowrank_kit.launcher import is_main


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own).

    Exits with status 2 if the command is wrong and 1 if the work failed, after one message and no traceback.
    An unexpected exception keeps its traceback; Ctrl-C and SIGTERM unwind the run and exit with 130 and 143.
    The last line printed by a run is `run: DIR`; by a sweep, `sweep: DIR`; by a search, `search: DIR`.
    """
    with command():
        _main(list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> None:
    args = get_args_parser().parse_intermixed_args(argv)
    flags = [word for word in argv if word not in args.overrides]
    let_here(_named_packages(args.overrides))
    composer = _composer(args)
    overrides = composer.read(args.overrides)
    if args.help:
        plain: Any = OmegaConf.to_container(composer.compose(overrides), resolve=True)
        print(help_text(schema_for(plain), plain, composer.options, composer.presets))
        return
    if args.hydra_help or args.shell_completion:
        _hydra([*flags, *overrides], composer)
        return
    planned = composer.planned(overrides, args.multirun)
    if args.cfg and not args.multirun:
        # Hydra composes it once more, for show.
        overrides = [*overrides, f"++model.name={json.dumps(composer.compose(overrides).model.name)}"]
    if isinstance(planned, list) or args.cfg or args.info:
        _hydra([*flags, *overrides], composer)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a sweep or search starts its runs itself, but several processes were started for one run")
    # Imported only now: most commands are single runs.
    from lowrank_kit.sweep.run_sweep import run_sweep
    from lowrank_kit.sweep.search import run_search

    again = [word for word in flags if word not in ("-m", "--multirun")]
    if isinstance(planned, Sweep):
        print(f"sweep: {run_sweep(planned, again)}", flush=True)
    else:
        print(f"search: {run_search(planned, composer, again)}", flush=True)


def _named_packages(overrides: Sequence[str]) -> list[str]:
    """The packages in `run.method_prefixes` of a command line: a person allows them, and they may lie here."""
    given = dict(word.lstrip("+").split("=", 1) for word in overrides if "=" in word)
    return re.findall(r"[\w.]+", given.get("run.method_prefixes", ""))


def _composer(args: argparse.Namespace) -> Composer:
    folder = Path(args.config_path) if args.config_path else None
    extra = Path(args.config_dir) if args.config_dir else None
    return Composer(args.config_name or "config", folder, extra)


def _hydra(argv: list[str], composer: Composer) -> None:
    """Hand over to Hydra: it shows the configuration, or calls the job once or once for each combination."""
    failed: list[LowRankKitError] = []

    def job(cfg: DictConfig) -> None:
        # A job of a sweep may run in another process: there, only an exception carries the news.
        # Composed by Hydra, which does not know what a model is called.
        name_model(cfg, hydra.core.hydra_config.HydraConfig.get().overrides.task)
        try:
            _job(cfg)
        except LowRankKitError as error:
            if _is_sweep():
                raise
            failed.append(error)

    # Hydra prints and exits by itself unless told to let exceptions through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    places = [f"hydra.searchpath=[{','.join(composer.plugged_in)}]"] if composer.plugged_in else []
    saved, sys.argv = sys.argv, [sys.argv[0], *argv, *places]
    try:
        hydra.main(version_base="1.3", config_path=str(composer.folder), config_name=composer.name)(job)()
    finally:
        sys.argv = saved
    if failed:
        raise failed[0]


def _is_sweep() -> bool:
    return hydra.core.hydra_config.HydraConfig.get().mode is hydra.types.RunMode.MULTIRUN


def _job(cfg: DictConfig) -> None:
    config = load(cfg)
    # Imported only now: a wrong command is answered before torch and transformers are loaded.
    from lowrank_kit.pipeline import execute

    set_up_console(quiet=not is_main())
    path = execute(config)
    if is_main():
        print(f"run: {path}", flush=True)


if __name__ == "__main__":
    main()
