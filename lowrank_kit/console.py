"""What a command of ours does with signals, errors and other libraries' chatter."""

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from lowrank_kit.errors import of_the_machine


@contextmanager
def command() -> Iterator[None]:
    """Run a command: status 2 if it is wrong, 1 if its work failed, after one message and no traceback.

    An unexpected exception keeps its traceback; Ctrl-C and SIGTERM unwind the work and exit with 130 and 143.
    """
    unwind_on_sigterm()
    hush_kernels()
    try:
        yield
    except Exception as error:
        sys.exit(explained(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def explained(error: Exception) -> int:
    """Say in one message why a command's work cannot be done, and return its exit status.

    An exception that nobody expects is raised again.
    """
    known = of_the_machine(error)
    if known is None:
        raise error
    Console(stderr=True).print(Text(str(known), style="red"), soft_wrap=True)
    return known.exit_status


def hush_kernels() -> None:
    """Where torchao is installed, PEFT imports it, and it names every kernel that it has for another machine."""
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def unwind_on_sigterm() -> None:
    """Let SIGTERM raise `SystemExit`: a scheduler sends it before it kills, and unwinding records the interruption."""

    def leave(number: int, frame: FrameType | None) -> None:
        # Schedulers send it to a process and through its parent: the second must not break off the unwinding.
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def set_up_console(quiet: bool = False) -> None:
    """Our own lines on stderr, and nothing of the libraries' that is no concern of the person who waits.

    ``quiet``: errors alone, as from all but the first of several processes.
    """
    hush_kernels()
    # In a notebook, where bars would be drawn by a package that is not there.
    warnings.filterwarnings("ignore", "IProgress not found")
    warnings.filterwarnings("ignore", 'install "ipywidgets"')
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    set_up_log()
    if quiet:
        warnings.simplefilter("ignore")
        logging.getLogger("lowrank_kit").setLevel(logging.ERROR)


def set_up_log() -> None:
    """Our own lines on stderr."""
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
