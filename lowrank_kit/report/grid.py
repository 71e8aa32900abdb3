"""The table as lines of text, the same for every form; where it is too wide, in parts below one another."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_kit.files import plain
from lowrank_kit.report.table import Block, Cell, Column, Report, Row

# Between two columns.
GAP = 3
# A name that is longer is folded.
WIDEST_NAME = 40


@dataclass(frozen=True)
class Text:
    """A cell as it is shown; ``number`` marks what is aligned to the right."""

    text: str
    bold: bool = False
    number: bool = True


@dataclass(frozen=True)
class Grid:
    """Headings, and the table's lines block by block."""

    headings: Sequence[Text]
    blocks: Sequence[Sequence[Sequence[Text]]]


def grid(report: Report) -> Grid:
    """Lay out what every form shows; a column that says the same in every line, or nothing, is left out."""
    lines = [[_line(report, block, row) for row in block.rows] for block in report.blocks]
    headings = [Text(h, number=False) for h in ("model", "budget", "method", "caveats")]
    headings += [Text(h) for h in ("seeds", "parameters (M)", *(plain(column.heading) for column in report.columns))]
    cells = [line for block in lines for line in block]
    several_models = len({line[0].text for line in cells}) > 1
    kept = [
        place
        for place, heading in enumerate(headings)
        if (heading.text != "model" or several_models) and any(line[place].text for line in cells)
    ]
    return Grid(
        [headings[place] for place in kept],
        [[[line[place] for place in kept] for line in block] for block in lines],
    )


def parts(whole: Grid, width: int) -> list[Grid]:
    """Split what is wider than ``width`` characters; every part has the columns that name its lines.

    A heading may stand on several lines, a word on each.
    """
    lines = [line for block in whole.blocks for line in block]
    names = [place for place, heading in enumerate(whole.headings) if not heading.number]

    def taken(place: int) -> int:
        widest = max(map(len, [*whole.headings[place].text.split(), *(line[place].text for line in lines)]))
        return GAP + (min(widest, WIDEST_NAME) if place in names else widest)

    room = left = width - sum(map(taken, names))
    groups: list[list[int]] = [[]]
    for place in (place for place, heading in enumerate(whole.headings) if heading.number):
        if groups[-1] and taken(place) > left:
            groups.append([])
            left = room
        groups[-1].append(place)
        left -= taken(place)
    return [
        Grid(
            [whole.headings[place] for place in (*names, *group)],
            [[[line[place] for place in (*names, *group)] for line in block] for block in whole.blocks],
        )
        for group in groups
    ]


def _line(report: Report, block: Block, row: Row) -> list[Text]:
    budget = "" if row.budget is None else f"{row.budget[0]} {row.budget[1]:g}"
    parameters = "" if row.parameters is None else f"{row.parameters / 1e6:.2f}"
    figures = [
        Text(_figure(row.cells.get(column), column), bold=block.is_bold(row, column)) for column in report.columns
    ]
    names = [Text(plain(name), number=False) for name in (row.model, budget, row.name, row.caveats)]
    return [*names, Text(row.seeds), Text(parameters), *figures]


def _figure(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return ""
    scale, digits = (100, 1) if column.is_fraction else (1, 2)
    mean = scale * cell.mean
    if abs(mean) >= 1e6:
        return f"{mean:.2e}"
    if abs(mean) >= 1000:
        digits = 0
    deviation = "" if cell.deviation is None else f" ± {scale * cell.deviation:,.{digits}f}"
    return f"{mean:,.{digits}f}{deviation}"
