import math

import numpy as np
import pytest

from lowrank_kit.models.layout import layout_of
from lowrank_kit.plots.block_scores import influence_table
from lowrank_kit.plots.ranks import plot_kept_ranks, plot_rank_map
from lowrank_kit.plots.ratio import plot_loss_against_ratio
from lowrank_kit.plots.singular_values import plot_spectra
from lowrank_kit.storages.two_factors import Factors


@pytest.fixture(scope="module")
def refs(tiny_model):
    return layout_of(tiny_model("llama")).linears


@pytest.fixture
def ranks(refs):
    return {ref.name: 4 if ref.role != "down" else min(ref.in_features, ref.out_features) for ref in refs}


def test_spectra_have_a_panel_a_role_and_a_line_a_block_that_starts_at_one(refs, tmp_path):
    values = {ref.name: [8.0 / 2**i for i in range(6)] + [0.0] for ref in refs}
    figure = plot_spectra(refs, values, tmp_path / "spectra.png", "eigenvalue")
    *panels, colours = figure.axes
    assert [panel.get_title() for panel in panels] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert {len(panel.lines) for panel in panels} == {3}
    assert list(panels[0].lines[0].get_ydata()) == [1 / 2**i for i in range(6)]
    assert (panels[0].get_xscale(), panels[0].get_yscale()) == ("log", "log")
    assert panels[0].get_ylabel() == "eigenvalue / largest"
    assert colours.get_ylabel() == "block"
    assert len({line.get_color().tobytes() for line in panels[0].lines}) == 3


def test_only_linears_with_a_spectrum_are_drawn(refs, tmp_path):
    [panel, _] = plot_spectra(refs, {refs[0].name: [1.0]}, tmp_path / "one.png").axes
    assert (panel.get_title(), len(panel.lines)) == ("q", 1)


def test_rank_map_holds_the_kept_fraction_of_every_linear_and_marks_the_dense(refs, ranks, tmp_path):
    panel, _ = plot_rank_map(refs, ranks, Factors(), tmp_path / "map.png").axes
    cells = np.ma.getdata(panel.images[0].get_array())
    assert cells.shape == (7, 3)
    # gate: 48 x 32 at rank 4.
    assert cells[4] == pytest.approx(4 * (48 + 32) / (48 * 32))
    assert cells[6].tolist() == [1, 1, 1]
    assert [(*mark.get_position(), mark.get_text()) for mark in panel.texts] == [(b, 6, "D") for b in range(3)]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["q", "k", "v", "o", "gate", "up", "down"]


def test_cells_without_a_linear_stay_empty(refs, ranks, tmp_path):
    panel, _ = plot_rank_map(refs[1:], ranks, Factors(), tmp_path / "map.png").axes
    cells = panel.images[0].get_array()
    assert np.argwhere(np.ma.getmaskarray(np.ma.masked_invalid(cells))).tolist() == [[6, 0]]


def test_kept_ranks_are_drawn_over_the_blocks(refs, ranks, tmp_path):
    panels = plot_kept_ranks(refs, ranks, tmp_path / "kept.png").axes
    assert len(panels) == 7
    assert panels[0].lines[0].get_xydata().tolist() == [[0, 4], [1, 4], [2, 4]]
    assert panels[6].lines[1].get_markerfacecolor() == "white"
    assert panels[0].lines[1].get_markerfacecolor() != "white"


def test_loss_against_ratio_is_sorted_and_has_the_dense_line(tmp_path):
    points = {"wikitext2": {"svd": [(0.4, 90.0), (0.2, 30.0)]}, "ptb": {"svd": [(0.2, 40.0)]}}
    first, second = plot_loss_against_ratio(points, tmp_path / "r.png", {"wikitext2": 19.9, "ptb": 30.0}).axes
    assert first.lines[0].get_xydata().tolist() == [[0.2, 30], [0.4, 90]]
    assert list(first.lines[1].get_ydata()) == [19.9, 19.9]
    assert [text.get_text() for text in first.texts] == ["dense", "svd"]
    assert list(second.lines[1].get_ydata()) == [30, 30]
    assert first.get_yscale() == "log"


def test_names_of_many_lines_stand_apart_in_the_order_of_their_ends(tmp_path):
    ends = {f"m{n}": 20.0 + n / 10 for n in range(12)} | {"lost": 1e8}
    [panel] = plot_loss_against_ratio(
        {"t": {n: [(0.2, v)] for n, v in ends.items()}}, tmp_path / "r.png", {"t": 20.0}
    ).axes
    heights = {text.get_text(): text.get_position()[1] for text in panel.texts}
    assert [*heights] == ["m0", "dense", *(f"m{n}" for n in range(1, 12)), "lost (1e+08)"]
    gaps = np.diff([*heights.values()])
    assert gaps.min() > 0.06
    assert 0 < min(heights.values()) < max(heights.values()) <= 1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_equal_data_gives_an_equal_file(refs, ranks, tmp_path, suffix):
    files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for file in files:
        plot_rank_map(refs, ranks, Factors(), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size > 1000


def test_the_table_ranks_what_was_measured():
    table = influence_table([0.5, 0.25, math.nan], {1})
    assert [list(column.cells) for column in table.columns] == [
        ["0", "1", "2"],
        ["0.5000", "0.2500", "-"],
        ["2", "1", "-"],
        ["", "removed", ""],
    ]
