"""One table in every form: terminal, Markdown, LaTeX, CSV, and a page that needs no network."""

import csv
import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowrank_kit.report.facts import Made, missing, notes, sources
from lowrank_kit.report.table import Block, Cell, Column, Report, Row

# LaTeX's special characters, and those of ours that its standard fonts lack.
LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    }
)
# In the terminal, before it is folded.
WIDEST_NAME = 24


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
    headings = [Text(h, number=False) for h in ("model", "budget", "method")]
    headings += [Text(h) for h in ("seeds", "parameters (M)", *(column.heading for column in report.columns))]
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


def print_report(report: Report, console: Console) -> None:
    """Print the table, how to read it, and what is missing from it."""
    shown = grid(report)
    table = Table()
    for heading in shown.headings:
        justify: Literal["left", "right"] = "right" if heading.number else "left"
        table.add_column(
            escape(heading.text),
            justify=justify,
            overflow="fold",
            min_width=WIDEST_NAME if heading.text == "method" else None,
        )
    for block in shown.blocks:
        for line in block:
            table.add_row(*(f"[bold]{escape(c.text)}[/]" if c.bold else escape(c.text) for c in line))
        table.add_section()
    console.print(table)
    for note in notes(report):
        console.print(note, markup=False, highlight=False)
    if gaps := missing(report):
        console.print(f"Left out, {len(gaps)}:", style="yellow")
        for gap in gaps:
            console.print(f"  {gap}", markup=False, highlight=False, soft_wrap=True)


def markdown(report: Report, made: Sequence[Made], plots: Sequence[Path]) -> str:
    """The table with everything that stands below it."""
    return _render("report.md.j2", report, made, plots)


def latex(report: Report) -> str:
    """A table environment; needs the packages booktabs and graphicx."""
    return _render("table.tex.j2", report)


def html(report: Report, made: Sequence[Made], plots: Sequence[Path]) -> str:
    """One page with everything inside: no other file, no address."""
    return _render("report.html.j2", report, made, plots)


def tidy(report: Report, made: Sequence[Made]) -> str:
    """CSV of one figure a line, in full precision, with its test and its command."""
    words = {(one.row, one.task): one.command for one in made}
    file = io.StringIO()
    head = "model method budget amount settings kind task metric n fewshot mean deviation seeds stderr parameters"
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*head.split(), "best", "significant", "p", "test", "source", "command"])
    for block in report.blocks:
        for row in block.rows:
            for column, cell in row.cells.items():
                some = next(iter(cell.runs.values()))
                label = row.name if row.budget is None else f"{row.name}, {row.budget[0]} {row.budget[1]:g}"
                best, verdict = block.best.get(column, (None, None))
                [error] = cell.stderrs.values() if len(cell.stderrs) == 1 else [None]
                is_best = best is row and verdict is not None
                test = (verdict.significant, verdict.p, verdict.test) if is_best and verdict else ("", "", "")
                writer.writerow(
                    [
                        *(row.model, row.method, *(row.budget or ("", "")), row.settings, row.kind),
                        *(column.task, column.metric, column.n, column.fewshot),
                        *(cell.mean, cell.deviation, len(cell.values), error, row.parameters),
                        *(is_best, test[0], test[1], test[2], column.source),
                        words.get((label, str(some.config["task"]["name"])), ""),
                    ]
                )
    return file.getvalue()


def _render(template: str, report: Report, made: Sequence[Made] = (), plots: Sequence[Path] = ()) -> str:
    environment = Environment(
        loader=PackageLoader("lowrank_kit.report"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"latex": lambda text: text.translate(LATEX), "pipes": lambda text: text.replace("|", r"\|")}
    images = {file.name: b64encode(file.read_bytes()).decode() for file in plots}
    return environment.get_template(template).render(
        grid=grid(report),
        notes=notes(report),
        sources=sources(report),
        missing=missing(report),
        made=made,
        images=images,
        runs=report.runs,
    )


def _line(report: Report, block: Block, row: Row) -> list[Text]:
    budget = "" if row.budget is None else f"{row.budget[0]} {row.budget[1]:g}"
    parameters = "" if row.parameters is None else f"{row.parameters / 1e6:.2f}"
    figures = [
        Text(_figure(row.cells.get(column), column), bold=block.is_bold(row, column)) for column in report.columns
    ]
    names = [Text(name, number=False) for name in (row.model, budget, row.name)]
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
