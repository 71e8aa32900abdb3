"""`python -m lowrank_kit.run`: compose a configuration, check it, run the pipeline."""

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.config import load, schema_for
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.help import help_text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own).

    Exits with status 2 if the command is wrong and 1 if the work failed, after one message and no traceback.
    An unexpected exception keeps its traceback; Ctrl-C and SIGTERM unwind the run and exit with 130 and 143.
    The last line printed by a run is `run: DIR`.
    """
    # What a scheduler sends before it kills: unwinding records the interruption.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _main(list(sys.argv[1:] if argv is None else argv))
    except LowRankKitError as error:
        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _main(argv: list[str]) -> None:
    args = get_args_parser().parse_intermixed_args(argv)
    flags = [word for word in argv if word not in args.overrides]
    overrides = force_dotted(args.overrides)
    composer = _composer(args)
    if args.help:
        plain: Any = OmegaConf.to_container(composer.compose(overrides), resolve=True)
        print(help_text(schema_for(plain), plain, composer.options))
        return
    if not (args.hydra_help or args.shell_completion):
        composer.jobs(overrides, args.multirun)
    _hydra([*flags, *overrides], composer)


def _composer(args: argparse.Namespace) -> Composer:
    folder = Path(args.config_path) if args.config_path else None
    extra = Path(args.config_dir) if args.config_dir else None
    return Composer(args.config_name or "config", folder, extra)


def _hydra(argv: list[str], composer: Composer) -> None:
    """Hand over to Hydra: it shows the configuration, or calls the job once or once for each combination."""
    failed: list[LowRankKitError] = []

    def job(cfg: DictConfig) -> None:
        # A job of a sweep may run in another process: there, only an exception carries the news.
        try:
            _job(cfg)
        except LowRankKitError as error:
            if _is_sweep():
                raise
            failed.append(error)

    # Hydra prints and exits by itself unless told to let exceptions through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    saved, sys.argv = sys.argv, [sys.argv[0], *argv]
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

    set_up_console()
    print(f"run: {execute(config)}", flush=True)


def set_up_console() -> None:
    """Our own lines on stderr, and nothing of the libraries' that is no concern of the person who waits."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    logger, console = logging.getLogger("lowrank_kit"), Console(stderr=True)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s", "%H:%M:%S"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.handlers = [handler]


if __name__ == "__main__":
    main()
