"""What is written, read by the programs that will read it."""

import csv
import json
import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from lowrank_kit.report.__main__ import main
from lowrank_kit.report.find import find_runs
from lowrank_kit.report.gallery import gather
from lowrank_kit.report.table import build

TASK = ("model=smollm2_135m", "task=perplexity/wikitext2")
FRAME = r"""\documentclass{article}
\usepackage{booktabs,graphicx}
\begin{document}
\input{table.tex}
\end{document}
"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def written(leave_run, tmp_path, capsys):
    """The folder that a report of two methods, three seeds, an unfinished run and a strange name was written to."""
    for seed in range(3):
        for method, worse in (("svd_llm", 0.0), ("asvd", 4.0)):
            figures = [("wiki_2 & 50%#", "perplexity", 20 + seed + worse + 0.1 * seed * worse), ("piqa", "acc", 0.5)]
            line = [f"method={method}", *TASK, f"seed={seed}"]
            leave_run(f"{method}{seed}", figures, line, parameters=10**8 + int(worse), dense=figures[:1])
    for seed in range(3):
        plot = Figure()
        plot.subplots().plot([0, 1])
        (tmp_path / f"runs/asvd{seed}/plots").mkdir()
        plot.savefig(tmp_path / f"runs/asvd{seed}/plots/rank_map.png")
    log = [{"loss": 2.0, "step": 1}, {"eval_loss": 1.8, "step": 2}, {"loss": 1.5, "step": 2}]
    (tmp_path / "runs/svd_llm1/history.json").write_text(json.dumps(log))
    leave_run("broken", None, ["method=asvd", *TASK, "seed=9"], "failed", error="ValueError: <b>&_{~^\\")
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "broken: failed: ValueError: <b>&_{~^\\" in printed
    assert "21.00 ± 1.00" in printed
    return tmp_path / "out"


def compile_table(folder):
    (folder / "paper.tex").write_text(FRAME)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.bold: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "b":
            self.bold.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.bold and not self.bold[-1]:
            self.bold[-1] = data


def test_the_page_needs_nothing_but_itself(written):
    text = (written / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert len(page.links) > 1
    assert all(link.startswith("data:") for link in page.links)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert page.bold == ["21.00 ± 1.00"]
    # What an error said is text, never a tag of the page.
    assert "ValueError: <b>&_{~^\\" in page.text


def test_the_page_holds_the_plots_of_every_run(written, tmp_path):
    text = (written / "report.html").read_text()
    embedded = [b64decode(found) for found in re.findall(r"image/png;base64,([^\"]*)", text)]
    left = [(tmp_path / f"runs/asvd{seed}/plots/rank_map.png").read_bytes() for seed in range(3)]
    assert [data for data in embedded if data in left] == left
    [drawn] = [data for data in embedded if data not in left]
    assert drawn.startswith(b"\x89PNG")
    assert text.count("<details><summary>asvd, ratio 0.2, seed ") == 3
    assert "svd_llm, ratio 0.2, seed 1 <small>svd_llm1</small>" in text
    assert "more runs" not in text


def test_a_page_that_grows_too_large_shows_the_low_seeds_and_counts_the_others(written, tmp_path):
    report = build(*find_runs([tmp_path / "runs"]))
    size = (tmp_path / "runs/asvd0/plots/rank_map.png").stat().st_size
    small = gather(report, most_bytes=2 * size - 1)
    assert [(one.title, one.run.seed) for one in small.exhibits] == [("asvd, ratio 0.2", 0)]
    assert small.left_out == 3
    assert gather(report, most_runs=3).left_out == 1


def test_many_benchmarks_are_laid_out_below_one_another_in_every_form(leave_run, tmp_path, capsys):
    figures = [(f"benchmark_{i}", "acc_norm", 0.25 + i / 100) for i in range(20)]
    for method in ("svd_llm", "asvd"):
        leave_run(method, figures, [f"method={method}", *TASK])
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 200
    rows = [line for line in printed if "svd_llm" in line]
    assert len(rows) > 1
    for _, _, value in figures:
        assert sum(f" {100 * value:.1f} " in line for line in rows) == 1
    lines = [line for line in (tmp_path / "out/report.md").read_text().splitlines() if line.startswith("| ")]
    assert max(map(len, (line for line in lines if "svd_llm" in line))) < 120
    assert sum(line.count("acc_norm") for line in lines) == 20
    if shutil.which("pdflatex"):
        compile_table(tmp_path / "out")


def test_every_figure_has_its_command_in_the_csv(written):
    rows = list(csv.DictReader((written / "table.csv").open()))
    measured = [row for row in rows if row["kind"] == "measured"]
    assert len(measured) == 4
    for row in measured:
        assert row["command"].startswith(f"python -m lowrank_kit.run -m method={row['method']} ")
        assert row["command"].endswith("seed=0,1,2")
    [best] = [row for row in measured if row["significant"] == "True"]
    assert (best["method"], best["test"], float(best["mean"])) == ("svd_llm", "paired t-test over seeds", 21.0)


def test_markdown_has_one_width(written):
    lines = [line for line in (written / "report.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert sum("**21.00 ± 1.00**" in line for line in lines) == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="compiling the LaTeX table needs pdflatex")
def test_the_latex_table_compiles(written):
    compile_table(written)
    assert r"\textbf{21.00 $\pm$ 1.00}" in (written / "table.tex").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="opening the page needs Chromium")
def test_a_browser_opens_the_page_without_an_error(written, tmp_path):
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--enable-logging=stderr"]
    where = [f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={tmp_path / 'page.png'}"]
    done = subprocess.run(
        [*command, *where, (written / "report.html").resolve().as_uri()], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_wrong_commands_say_what_to_do(tmp_path, capsys):
    assert main([str(tmp_path / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main([str(tmp_path), "--level", "5"]) == 2
    assert "--level 5.0 is not between 0 and 1" in capsys.readouterr().err
