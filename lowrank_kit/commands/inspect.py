"""`lowrank-kit inspect RUN_OR_CHECKPOINT`: what a run came to, and what is left of every matrix of a checkpoint."""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_kit.console import command
from lowrank_kit.errors import ConfigError

if TYPE_CHECKING:
    from lowrank_kit.models.layout import LinearRef

SHADES = " .:-=+*#%@"
"""From a matrix of which nothing is left to a whole one."""


@dataclass(frozen=True)
class Matrix:
    """A linear of a checkpoint: its block and role, its parameters, those of the dense one, and its rank."""

    block: int
    role: str
    parameters: int
    dense: int
    rank: int | None
    """None: no product of two."""


def command_line() -> argparse.ArgumentParser:
    """The words that this command takes."""
    parser = argparse.ArgumentParser("lowrank-kit inspect", description=__doc__)
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="run directory or checkpoint folder")
    parser.add_argument(
        "--spectra", type=Path, metavar="PICTURE",
        help="draw the singular values of every matrix (png, svg or pdf), and list effective ranks; reads the weights",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = command_line().parse_args(arguments)
    with command():
        if options.spectra and options.spectra.suffix not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"--spectra '{options.spectra}' should end in .png, .svg or .pdf")
        _show(options.path, options.spectra, Console(width=max(100, Console().width)))
    return 0


def _show(path: Path, picture: Path | None, console: Console) -> None:
    from lowrank_kit.runs.directory import CONFIG_FILE

    if (path / CONFIG_FILE).is_file():
        _show_run(path, console)
        folders = [folder for name in ("recovered", "checkpoint") if (folder := path / name).is_dir()]
        path = next(iter(folders), path)
        if not folders:
            return
    if not (path / "config.json").is_file():
        raise ConfigError(f"'{path}' is neither a run directory (config.yaml) nor a checkpoint folder (config.json)")
    matrices = matrices_of(path)
    if not matrices:
        raise ConfigError(f"'{path}' has no block with a linear in it")
    console.print(_roles(matrices, path))
    console.print(_map(matrices))
    if picture is not None:
        from lowrank_kit.plots.singular_values import plot_spectra

        refs, values = spectra_of(path)
        console.print(_effective_ranks(refs, values))
        plot_spectra(refs, values, picture)
        console.print(Text(f"singular values: {picture}"))


def _show_run(run: Path, console: Console) -> None:
    from lowrank_kit.evaluation.records import read_records
    from lowrank_kit.files import read_json, read_yaml
    from lowrank_kit.runs.directory import CONFIG_FILE
    from lowrank_kit.runs.status import read_status

    config, status = read_yaml(run / CONFIG_FILE), read_status(run)
    names = " ".join(f"{section}={config[section]['name']}" for section in ("method", "model", "task"))
    manifest = read_json(run / "manifest.json", dict) or {}
    seconds = {name: stage["seconds"] for name, stage in manifest.get("stages", {}).items()}
    console.print(Text(f"{run}: {status.state if status else 'not begun'}; {names} seed={config['seed']}"))
    console.print(Text("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())))
    if (run / "results.json").is_file():
        table = Table("task", "metric", "model", "value", "± s.e.", "n")
        for r in read_records(run / "results.json"):
            error = "" if r.stderr is None else f"{r.stderr:.4g}"
            table.add_row(r.task, r.metric, r.checkpoint, f"{r.value:.4g}", error, str(r.n))
        console.print(table)


def matrices_of(folder: Path) -> list[Matrix]:
    """The linears in the blocks of a checkpoint, in the order of its layout. No weight is read."""
    from transformers import CONFIG_MAPPING

    from lowrank_kit.models.architectures import base_type
    from lowrank_kit.models.layout import layout_of
    from lowrank_kit.models.load import ModelSource, load_config, skeleton

    config = load_config(ModelSource(str(folder)))
    stock = CONFIG_MAPPING[base_type(config.model_type)]
    settings = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "lowrank")}
    # Whatever the head is: encoders and classifiers have blocks, too.
    whole = {ref.name: ref.parameters for ref in layout_of(skeleton(stock.from_dict(settings), "base")).linears}
    found = []
    for ref in layout_of(skeleton(config, "base")).linears:
        left = sum(part.parameters for part in ref.parts)
        found.append(Matrix(ref.block, ref.role, left, whole[ref.name], ref.rank))
    return found


def spectra_of(folder: Path) -> "tuple[list[LinearRef], dict[str, list[float]]]":
    """The linears of a checkpoint that are modules, and their singular values by name, whatever they are stored as."""
    import torch
    from transformers import AutoModel

    from lowrank_kit.models.layout import layout_of

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    refs = [ref for ref in layout_of(model).linears if ref.name in modules]
    values: dict[str, list[float]] = {}
    with torch.no_grad():
        for ref in refs:
            nothing = modules[ref.name](torch.zeros(1, ref.in_features))
            product = modules[ref.name](torch.eye(ref.in_features)) - nothing
            values[ref.name] = torch.linalg.svdvals(product.double()).tolist()
    return refs, values


def _effective_ranks(refs: "Sequence[LinearRef]", values: Mapping[str, Sequence[float]]) -> Table:
    import torch

    from lowrank_kit.spectral.metrics import effective_rank

    table = Table("role", "effective rank, least to most (median)", "of", title="of the squared singular values")
    found: dict[str, list[float]] = defaultdict(list)
    for ref in refs:
        found[ref.role].append(effective_rank(torch.tensor(values[ref.name], dtype=torch.float64).square()))
    full = {ref.role: min(ref.out_features, ref.in_features) for ref in refs}
    for role, ranks in found.items():
        table.add_row(role, f"{min(ranks):.0f} to {max(ranks):.0f} ({median(ranks):.0f})", str(full[role]))
    return table


def _roles(matrices: Sequence[Matrix], folder: Path) -> Table:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    table = Table("role", "matrices", "factored", "rank, least to most (median)", "parameters", "of dense")
    table.title = f"{folder}: {size / 1e6:.1f} MB of weights"
    roles: dict[str, list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        roles[matrix.role].append(matrix)
    for role, members in [*roles.items(), ("all", list(matrices))]:
        ranks = [m.rank for m in members if m.rank is not None]
        spread = f"{min(ranks)} to {max(ranks)} ({median(ranks):g})" if ranks else ""
        left, dense = sum(m.parameters for m in members), sum(m.dense for m in members)
        table.add_row(role, str(len(members)), str(len(ranks)), spread, f"{left:,}", f"{left / dense:.3f}")
    return table


def _map(matrices: Sequence[Matrix]) -> Text:
    """The share of every matrix that is left: a row a role, a column a block."""
    shares: dict[str, dict[int, Matrix]] = defaultdict(dict)
    for matrix in matrices:
        shares[matrix.role].setdefault(matrix.block, matrix)
    last = max(m.block for m in matrices)
    width = max(map(len, shares))
    lines = [f"{role:>{width}} |{''.join(_shade(row, b) for b in range(last + 1))}|" for role, row in shares.items()]
    return Text("\n".join([*lines, f"{'':>{width}}  block 0 to {last}; {SHADES[1]} a tenth left, {SHADES[-1]} whole"]))


def _shade(row: Mapping[int, Any], block: int) -> str:
    if block not in row:
        return SHADES[0]
    share = row[block].parameters / row[block].dense
    return SHADES[max(1, min(len(SHADES) - 1, round(share * (len(SHADES) - 1))))]
