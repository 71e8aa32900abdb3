"""Make the W&B report of a project: results, curves and rank maps of its runs, side by side (needs a network).

`python -m lowrank_kit.report.dashboard ENTITY/PROJECT [RUNS]`; with run directories it draws what they measured.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_kit.errors import ConfigError, LowRankKitError
from lowrank_kit.report.find import find_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser("python -m lowrank_kit.report.dashboard", description=__doc__)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="W&B project that the runs were sent to")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS", help="their run directories, or folders of them")
    parser.add_argument("--title", default="lowrank_kit", help="title of the report (default: lowrank_kit)")
    options = parser.parse_args(arguments)
    try:
        entity, slash, project = options.project.partition("/")
        if not (entity and slash and project):
            raise ConfigError(f"'{options.project}' is not ENTITY/PROJECT, for example my-team/lowrank_kit")
        runs, _ = find_runs(options.runs)
        metrics = sorted({f"{r.task}/{r.metric}/{r.checkpoint}" for run in runs for r in run.records})
        plots = sorted({file.stem for run in runs for file in (run.path / "plots").glob("*.png")})
        report = compose(entity, project, options.title, metrics, plots)
        try:
            report.save()
        # Its client raises what its own clients raise.
        except Exception as error:
            raise LowRankKitError(f"W&B did not take the report: {type(error).__name__}: {error}") from error
    except LowRankKitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"report: {report.url}")
    return 0


def compose(entity: str, project: str, title: str, metrics: Sequence[str], plots: Sequence[str]) -> Any:
    """The report, not yet saved; ``metrics`` are keys of the runs' summaries, TASK/METRIC/CHECKPOINT.

    ``plots`` are the names of what lies in the runs' ``plots/``.

    Raises `ConfigError` where wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise ConfigError("the W&B report needs `pip install 'lowrank_kit[dashboard]'`") from error
    final = [metric for metric in metrics if metric.endswith("/final")]
    ratio = wr.Config("method.ratio")
    panels = [wr.BarPlot(metrics=[wr.SummaryMetric(m)], title=m, groupby="config.method.name") for m in final]
    panels += [wr.ScatterPlot(x=ratio, y=wr.SummaryMetric(m), title=f"{m} over the ratio") for m in final]
    curves = [wr.LinePlot(x="Step", y=["train/loss", "eval/loss"], title="loss")]
    maps = [wr.MediaBrowser(media_keys=[f"plots/{name}" for name in plots])]

    def runs(groupby: Sequence[str] = ()) -> Any:
        return wr.Runset(entity=entity, project=project, groupby=list(groupby))

    return wr.Report(
        project=project,
        entity=entity,
        title=title,
        description="Results, curves and rank maps; made by python -m lowrank_kit.report.dashboard",
        blocks=[
            wr.H1("Results"),
            wr.PanelGrid(runsets=[runs(["config.method.name"])], panels=panels),
            wr.H1("Training"),
            wr.PanelGrid(runsets=[runs()], panels=curves),
            wr.H1("What was kept"),
            wr.PanelGrid(runsets=[runs()], panels=maps),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
