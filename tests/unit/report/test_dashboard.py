import pytest

from lowrank_kit.report.dashboard import compose, main


def test_the_report_has_a_panel_for_every_final_figure():
    pytest.importorskip("wandb_workspaces")
    report = compose("team", "mine", "title", ["piqa/acc/final", "piqa/acc/dense", "wikitext2/perplexity/final"])
    grids = [block for block in report.blocks if type(block).__name__ == "PanelGrid"]
    titles = [panel.title for panel in grids[0].panels]
    assert [title for title in titles if "over" not in title] == ["piqa/acc/final", "wikitext2/perplexity/final"]
    assert {runset.project for grid in grids for runset in grid.runsets} == {"mine"}


def test_a_project_without_its_owner_is_refused(tmp_path, capsys):
    assert main(["mine", str(tmp_path)]) == 2
    assert "is not ENTITY/PROJECT" in capsys.readouterr().err
