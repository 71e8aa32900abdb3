"""Read offline runs of Weights & Biases back and draw what a dashboard would show: the picture in docs/tracking.md.

python experiments/wandb_picture.py PICTURE.png --runs FOLDER

FOLDER holds the run directories of

    lowrank-kit run -m method=lora,astra task=glue/sst2 train.max_steps=40 train.eval_every=10 calibration=small \
        eval.effects.enabled=false tracker=wandb tracker.mode=offline run.root=FOLDER
"""

import argparse
from pathlib import Path

from lowrank_kit.plots.figure import integer_ticks, new_figure, save
from lowrank_kit.runs.offline import offline_runs
from lowrank_kit.runs.provenance import parse_study

CURVES = ("train/loss", "eval/loss", "eval/accuracy")
POINTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    options = parse_study(parser)
    runs = offline_runs(options.runs)
    if not runs:
        raise SystemExit(f"no offline run of W&B lies below '{options.runs}'")
    figure = new_figure(8, 5)
    panels = figure.subplots(2, 2).flat
    for quantity, panel in zip(CURVES, panels, strict=False):
        for run in runs:
            points = [(row["_step"], row[quantity]) for row in run["history"] if quantity in row]
            panel.plot(*zip(*points, strict=True), marker=".", label=run["job_type"])
        panel.set_title(quantity, fontsize=POINTS)
        panel.set_xlabel("step", fontsize=POINTS)
        integer_ticks(panel)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=POINTS)
    summary = "glue/sst2/accuracy/final"
    last = figure.axes[-1]
    last.barh([run["job_type"] for run in runs], [run["summary"][summary] for run in runs], color=["C0", "C1"])
    last.set_title(f"summary: {summary}", fontsize=POINTS)
    last.set_xlim(0, 1)
    figure.suptitle(f"project {runs[0]['project']}, group {runs[0]['group']}, {len(runs)} runs", fontsize=POINTS + 1)
    save(figure, options.picture)


if __name__ == "__main__":
    main()
