"""Draw what happens to one matrix of SmolLM2-135M: its shapes to scale, and the error of every rank.

python experiments/one_matrix.py PICTURE.png

The matrix is the up projection of block 0, calibrated on 16 windows of 512 tokens of the packaged Wikipedia text, as
`method=svd_llm calibration=small task=perplexity/wikipedia` calibrates it. The picture belongs to docs/one_matrix.md.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.patches import Rectangle

from lowrank_kit.calibration.collect import Reduction, calibrate
from lowrank_kit.calibration.statistics import StatisticsRequest
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.data.sources import DatasetRef, PackagedSource
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.load import ModelSource, load_model, load_tokenizer
from lowrank_kit.plots.figure import Axes, new_figure, save
from lowrank_kit.runs.provenance import parse_study
from lowrank_kit.spectral.eigenpairs import output_eigenvalues

RANK = 328
POINTS = 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    options = parse_study(parser)
    source = ModelSource("packaged://smollm2_135m")
    model, tokenizer = load_model(source, "causal").model, load_tokenizer(source)
    rows = PackagedSource().load(DatasetRef("text/wikipedia"), "validation").dataset["text"]
    ids = torch.tensor(tokenizer("\n\n".join(rows), verbose=False)["input_ids"][: 16 * 512]).view(16, 512)
    samples = CalibrationSamples(tuple({"input_ids": row} for row in ids), batch_size=4)
    [ref] = [ref for ref in layout_of(model).linears if ref.block == 0 and ref.role == "up"]
    weight = weight_of(model.get_submodule(ref.name)).detach()
    reduction = Reduction(
        StatisticsRequest(moments="input"), lambda layer: {"values": output_eigenvalues(weight, layer.moments)}
    )
    values = calibrate(model, samples, [ref], reduction)[ref.name]["values"]
    error = 1 - values.cumsum(0) / values.sum()
    figure = new_figure(6.4, 6.4)
    shapes, curve = figure.subplots(2, height_ratios=(1, 1.15))
    draw_shapes(shapes, ref.out_features, ref.in_features)
    break_even = ref.parameters // (ref.out_features + ref.in_features)
    curve.semilogy(range(1, len(error)), error[:-1], "C0", linewidth=2)
    for rank, name, colour in ((RANK, f"kept: {RANK}", "C3"), (break_even, f"break-even: {break_even}", "black")):
        curve.axvline(rank, color=colour, linestyle="--", linewidth=1.2)
        curve.text(rank + 8, 0.6, name, color=colour, va="top", fontsize=POINTS)
    curve.plot(RANK, error[RANK - 1], "o", color="C3", markersize=8)
    curve.annotate(
        f"{100 * error[RANK - 1]:.1f} %",
        (RANK, error[RANK - 1]),
        (-12, -16),
        ha="right",
        textcoords="offset points",
        fontsize=POINTS,
    )
    curve.set_xlabel("rank k", fontsize=POINTS)
    curve.set_ylabel("share of the output energy lost", fontsize=POINTS)
    curve.tick_params(labelsize=POINTS)
    curve.set_ylim(1e-3, 1)
    curve.grid(alpha=0.25)
    save(figure, options.picture)


def draw_shapes(panel: Axes, outputs: int, inputs: int) -> None:
    """The weight and its two factors, to scale."""
    gap, height = 520, outputs
    parts = [("W", 0, outputs, inputs, "C0"), ("up", inputs + gap, outputs, RANK, "C3")]
    parts.append(("down", inputs + gap + RANK + gap // 2, RANK, inputs, "C3"))
    for name, left, rows, columns, colour in parts:
        panel.add_patch(Rectangle((left, height - rows), columns, rows, facecolor=colour, alpha=0.3, edgecolor=colour))
        words = f"{name}\n[{rows}, {columns}]\n{rows * columns:,}"
        panel.text(left + columns / 2, height - rows - 40, words, ha="center", va="top", fontsize=POINTS)
    panel.text(inputs + gap / 2, height / 2, "≈", ha="center", va="center", fontsize=28)
    panel.text(inputs + gap + RANK + gap / 4, height - RANK / 2, "·", ha="center", va="center", fontsize=28)
    panel.set(xlim=(-20, 2 * inputs + RANK + 1.5 * gap + 20), ylim=(-0.45 * height, height + 20), aspect="equal")
    panel.axis("off")


if __name__ == "__main__":
    main()
