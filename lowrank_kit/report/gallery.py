"""What single runs left to look at, for the page: as many runs as keep it a page that opens at once."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lowrank_kit.errors import LowRankKitError
from lowrank_kit.files import read_as
from lowrank_kit.plots.training import plot_loss
from lowrank_kit.report.find import Run
from lowrank_kit.report.table import Report

log = logging.getLogger(__name__)

MOST_BYTES = 12_000_000
MOST_RUNS = 60


@dataclass(frozen=True)
class Exhibit:
    """One run's plots, PNG by name; ``title`` is its row of the table."""

    title: str
    run: Run
    plots: Mapping[str, bytes]


@dataclass(frozen=True)
class Gallery:
    """The runs that are shown, in the table's order, and how many have plots that are not."""

    exhibits: Sequence[Exhibit]
    left_out: int


def gather(report: Report, most_bytes: int = MOST_BYTES, most_runs: int = MOST_RUNS) -> Gallery:
    """Read the plots of the report's runs and draw their losses, lower seeds first, up to either bound."""
    measured = [row for block in report.blocks for row in block.rows if row.kind == "measured"]
    titles = {run.path: row.title for row in measured for run in row.runs}
    drawable = [run for run in report.runs if run.path in titles and (_files(run) or _losses(run))]
    shown: dict[Path, Exhibit] = {}
    for run in sorted(drawable, key=lambda run: run.seed)[:most_runs]:
        plots = dict(_plots(run))
        most_bytes -= sum(map(len, plots.values()))
        if most_bytes < 0:
            break
        shown[run.path] = Exhibit(titles[run.path], run, plots)
    return Gallery([shown[path] for path in titles if path in shown], len(drawable) - len(shown))


def _plots(run: Run) -> Iterator[tuple[str, bytes]]:
    if losses := _losses(run):
        with TemporaryDirectory() as folder:
            file = Path(folder, "loss.png")
            plot_loss(losses["loss"], losses["eval_loss"], file)
            yield "loss", file.read_bytes()
    for file in _files(run):
        yield file.stem.replace("_", " "), file.read_bytes()


def _files(run: Run) -> list[Path]:
    # A link could show any file of this machine.
    return sorted(file for file in (run.path / "plots").glob("*.png") if file.is_file() and not file.is_symlink())


def _losses(run: Run) -> dict[str, list[tuple[int, float]]] | None:
    """Steps and losses of the Trainer's log; None where there is no curve to draw."""
    try:
        lines = read_as(run.path / "history.json", list[dict[str, Any]]) or []
        found = {name: _curve(lines, name) for name in ("loss", "eval_loss")}
    except (LowRankKitError, TypeError, ValueError, KeyError) as error:
        log.warning("%s: no loss is drawn: %s", run.path, error)
        return None
    return found if len(found["loss"]) > 1 else None


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line[name])) for line in lines if name in line]
