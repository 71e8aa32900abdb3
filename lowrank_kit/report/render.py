"""One table in every form: terminal, Markdown, LaTeX, CSV, and a page that needs no network."""

import csv
import io
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowrank_kit.markdown import fenced, in_markdown
from lowrank_kit.report.facts import Made, missing, notes, sources
from lowrank_kit.report.gallery import Gallery
from lowrank_kit.report.grid import WIDEST_NAME, Grid, grid, parts
from lowrank_kit.report.table import Report

# LaTeX's special characters, and those of ours that its standard fonts lack.
LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    }
)
# What a terminal or an editor would obey, but for ends of lines: control characters, and marks of direction.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Characters a line: on a page of paper, in a small font.
PAGE = 100


def print_report(report: Report, console: Console) -> None:
    """Print the table, how to read it, and what is missing from it."""
    for part in parts(grid(report), console.width - 1):
        console.print(_rich(part))
    for note in notes(report):
        console.print(note, markup=False, highlight=False)
    if gaps := missing(report):
        console.print(f"Left out, {len(gaps)}:", style="yellow")
        for gap in gaps:
            console.print(f"  {gap}", markup=False, highlight=False, soft_wrap=True)


def _rich(shown: Grid) -> Table:
    table = Table()
    for heading in shown.headings:
        justify: Literal["left", "right"] = "right" if heading.number else "left"
        table.add_column(
            escape(heading.text),
            justify=justify,
            overflow="fold",
            max_width=None if heading.number else WIDEST_NAME,
        )
    for block in shown.blocks:
        for line in block:
            table.add_row(*(f"[bold]{escape(c.text)}[/]" if c.bold else escape(c.text) for c in line))
        table.add_section()
    return table


def markdown(report: Report, made: Sequence[Made], plots: Sequence[Path]) -> str:
    """The table with everything that stands below it."""
    return _render("report.md.j2", report, made, plots)


def latex(report: Report) -> str:
    """A table environment; needs the packages booktabs and graphicx."""
    return _render("table.tex.j2", report)


def html(report: Report, made: Sequence[Made], plots: Sequence[Path], gallery: Gallery) -> str:
    """One page with everything inside: no other file, no address."""
    return _render("report.html.j2", report, made, plots, gallery)


def tidy(report: Report, made: Sequence[Made]) -> str:
    """CSV of one figure a line, in full precision, with its test and its command."""
    words = {(one.row, one.task): one.command for one in made}
    file = io.StringIO()
    head = "model method budget amount settings kind task metric n fewshot mean deviation seeds stderr parameters"
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*head.split(), "best", "significant", "p", "test", "source", "command", "caveats"])
    for block in report.blocks:
        for row in block.rows:
            for column, cell in row.cells.items():
                some = next(iter(cell.runs.values()))
                best, verdict = block.best.get(column, (None, None))
                [error] = cell.stderrs.values() if len(cell.stderrs) == 1 else [None]
                is_best = best is row and verdict is not None
                test = (verdict.significant, verdict.p, verdict.test) if is_best and verdict else ("", "", "")
                writer.writerow(
                    _inert(value)
                    for value in [
                        *(row.model, row.method, *(row.budget or ("", "")), row.settings, row.kind),
                        *(column.task, column.metric, column.n, column.fewshot),
                        *(cell.mean, cell.deviation, len(cell.values), error, row.parameters),
                        *(is_best, test[0], test[1], test[2], column.source),
                        words.get((row.title, str(some.config["task"]["name"])), ""),
                        row.caveats,
                    ]
                )
    return _visible(file.getvalue())


def _inert(value: Any) -> Any:
    # A spreadsheet takes a text that begins like this for a formula.
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _render(
    template: str,
    report: Report,
    made: Sequence[Made] = (),
    plots: Sequence[Path] = (),
    gallery: Gallery | None = None,
) -> str:
    environment = Environment(
        loader=PackageLoader("lowrank_kit.report"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"latex": lambda text: text.translate(LATEX), "markdown": in_markdown, "fenced": fenced}
    environment.filters["base64"] = lambda data: b64encode(data).decode()
    text = environment.get_template(template).render(
        grid=grid(report),
        parts=parts(grid(report), PAGE),
        notes=notes(report),
        sources=sources(report),
        missing=missing(report),
        made=made,
        images={file.name: file.read_bytes() for file in plots},
        gallery=gallery,
        runs=report.runs,
    )
    return _visible(text)


def _visible(text: str) -> str:
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
