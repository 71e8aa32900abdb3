"""What stands below a table: how to read it, where its figures come from, what is missing."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowrank_kit.files import plain
from lowrank_kit.report.command import command_of
from lowrank_kit.report.find import Run
from lowrank_kit.report.table import SPEED, Report, Row


@dataclass(frozen=True)
class Made:
    """The command that made one row's figures of one task."""

    row: str
    task: str
    command: str


def notes(report: Report) -> list[str]:
    """How to read the table: what ± and bold mean, which tests were made and what they could not tell."""
    lines = ["Mean ± sample standard deviation over the seeds; a figure without ± is of one seed."]
    if any(column.is_fraction for column in report.columns):
        lines.append("Accuracies, correlations and the like in percent.")
    verdicts = report.verdicts
    tests = Counter(v.test for v in verdicts if v.p is not None or v.significant or v.test == "paired bootstrap")
    names = ", ".join(f"{test} ({count})" for test, count in tests.items())
    level = f"{100 * report.level:g} %"
    lines.append(
        "Bold: the best of its column among the rows of the same model and budget, only where it differs from the "
        f"second significantly at the level of {level}, two-sided, not corrected for the number of comparisons. "
        f"Comparisons by test: {names or 'none'}."
    )
    untested = Counter(v.test for v in verdicts if v.test not in tests)
    lines += [f"Not compared, so not bold: {count} of {len(verdicts)}: {why}." for why, count in untested.items()]
    if any(column.task == SPEED for column in report.columns):
        lines.append("Speed is one machine's, and is never compared by a test.")
    if any(row.kind == "baseline" for block in report.blocks for row in block.rows):
        lines.append("Baselines are of the model, not of a method, and do not compete.")
    measured = [row for block in report.blocks for row in block.rows if row.kind == "measured"]
    if mixed := [row.title for row in measured if len({_software(run) for run in row.runs}) > 1]:
        lines.append(f"Figures from several states of the software stand in one row (below): {'; '.join(mixed)}.")
    return list(map(plain, lines))


def commands(report: Report) -> Iterator[Made]:
    """The command of every row and task, all seeds in one."""
    for block in report.blocks:
        for row in block.rows:
            if row.kind == "measured":
                yield from _of_row(row)


def _of_row(row: Row) -> Iterator[Made]:
    by_task: dict[str, list[Run]] = {}
    for run in row.runs:
        by_task.setdefault(str(run.config["task"]["name"]), []).append(run)
    for task, runs in by_task.items():
        yield Made(plain(row.title), plain(task), command_of(runs[0], [run.seed for run in runs]))


def sources(report: Report) -> list[str]:
    """Rows, model and software behind the figures, each once."""
    lines = [f"{column.heading}: {column.source} (n = {column.n})" for column in report.columns]
    for run in report.runs:
        facts = run.manifest
        model = run.config["model"]
        revision = f" at {model['revision']}" if model["revision"] else ""
        fingerprint = facts.get("model", {}).get("fingerprint")
        lines.append(
            f"model {run.model}: {model['path']}{revision}" + (f", weights {fingerprint}" if fingerprint else "")
        )
        for split, fact in facts.get("data", {}).items():
            note = f", {fact['note']}" if fact["note"] else ""
            lines.append(f"data {split}: {fact['source']}, {fact['rows']} rows, sha256 {fact['sha256'][:12]}{note}")
        hardware = facts.get("device", {}).get("hardware", "hardware not recorded")
        lines.append(f"{_software(run)}; {hardware}")
    return list(dict.fromkeys(map(plain, lines)))


def _software(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.manifest.get("versions", {}).items())
    git = run.manifest.get("git")
    commit = f" at {git['revision'][:12]}{' with changes' if git['dirty'] else ''}" if git else ""
    return f"software{commit}: {versions}"


def missing(report: Report) -> Sequence[str]:
    """What was found and is in no table."""
    return [plain(f"{run.path}: {run.state}: {run.reason}") for run in report.left_out]
