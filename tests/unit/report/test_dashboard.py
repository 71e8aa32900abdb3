import json

import pytest
from matplotlib.figure import Figure

from lowrank_kit.config import TrackerConfig
from lowrank_kit.report.dashboard import compose as compose_report
from lowrank_kit.report.dashboard import main
from lowrank_kit.runs.tracking import open_tracker

pytest.importorskip("wandb_workspaces")
METRICS = ["piqa/acc/final", "piqa/acc/dense", "wikitext2/perplexity/final"]


def panels(report):
    return [panel for block in report.blocks if type(block).__name__ == "PanelGrid" for panel in block.panels]


def test_the_report_has_a_panel_for_every_final_figure():
    report = compose_report("team", "mine", "title", METRICS, [])
    titles = [panel.title for panel in panels(report) if type(panel).__name__ == "BarPlot"]
    assert titles == ["piqa/acc/final", "wikitext2/perplexity/final"]
    grids = [block for block in report.blocks if type(block).__name__ == "PanelGrid"]
    assert {runset.project for grid in grids for runset in grid.runsets} == {"mine"}


def test_what_the_panels_ask_for_is_what_a_run_sends(compose, tmp_path, wandb_records):
    run = tmp_path / "runs/one"
    (run / "plots").mkdir(parents=True)
    figure = Figure()
    figure.subplots()
    figure.savefig(run / "plots/energy.png")
    config = compose(
        "method=svd_llm", "model=smollm2_135m", "task=perplexity/wikitext2", "tracker=wandb", "tracker.mode=offline"
    )
    assert isinstance(config.tracker, TrackerConfig)
    tracker = open_tracker(config.tracker, run, config.resolved())
    tracker.log({"train/loss": 1.0, "eval/loss": 2.0}, step=1)
    tracker.summary(dict.fromkeys(METRICS, 0.5))
    tracker.finish(0)
    [sent] = wandb_records(tmp_path)
    summary = {key.removesuffix("._type") for key in sent["summary"]}
    # As W&B's own client writes the panels: SECTION.value.KEY of the configuration.
    report = compose_report("team", "mine", "title", METRICS, ["energy"])
    asked = json.dumps([panel._to_model().model_dump(mode="json") for panel in panels(report)])
    assert "config:method.value.ratio" in asked
    assert '"method.value.name"' in asked
    assert sent["config"]["method"].keys() >= {"name", "ratio"}
    for key in ("train/loss", "eval/loss", "plots/energy", "piqa/acc/final", "wikitext2/perplexity/final"):
        assert key in asked
        assert key in summary


def test_a_project_without_its_owner_is_refused(tmp_path, capsys):
    assert main(["mine", str(tmp_path)]) == 2
    assert "is not ENTITY/PROJECT" in capsys.readouterr().err
