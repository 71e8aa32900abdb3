"""A dense model on every benchmark that a study names, and a table of what was found.

    python experiments/evaluation_smollm2/run.py [--study STUDY.yaml] [--runs FOLDER] [--collect] [OVERRIDE ...]

Every run of the study is one `python -m lowrank_kit.run` with a directory of its own: a killed study continues behind
the last benchmark on disk. ``--collect`` runs nothing and takes the runs that are finished. Writes ``results.json`` and
``table.md``, named like the study and beside it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lowrank_kit.runs.provenance import origin, parse_study

Row = dict[str, Any]


def main() -> None:
    arguments = _arguments()
    study = yaml.safe_load(arguments.study.read_text())
    folders = {name: (Path(arguments.runs) / name).resolve() for name in study["runs"]}
    for name, overrides in study["runs"].items():
        if not arguments.collect:
            words = [*study["common"], *overrides, *arguments.overrides, f"run.dir={folders[name]}"]
            subprocess.run([sys.executable, "-m", "lowrank_kit.run", *words], check=True)
    finished = {name: folder for name, folder in folders.items() if (folder / "results.json").is_file()}
    rows = [row for name, folder in finished.items() for row in read(name, folder)]
    origins = {name: origin(folder) for name, folder in finished.items()}
    found = {"provenance": arguments.provenance, "runs": origins, "study": study, "rows": rows}
    arguments.study.with_suffix(".results.json").write_text(json.dumps(found, indent=1) + "\n")
    table = "\n".join(markdown(rows)) + "\n"
    arguments.study.with_suffix(".table.md").write_text(table)
    print(table)


def read(run: str, folder: Path) -> Iterator[Row]:
    """The records of a run, with the seconds that a benchmark took."""
    for record in json.loads((folder / "results.json").read_text()):
        file = folder / "benchmarks/final" / f"{record['task']}.json"
        seconds = json.loads(file.read_text())["seconds"] if file.is_file() else None
        yield {"run": run, **record, "seconds": seconds}


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """One line a benchmark and metric; a benchmark of two suites, which was asked once, stands where it came first."""
    yield "| benchmark | metric | figure ± s.e. | rows | shots | rows from | seconds | run |"
    yield "|---" * 8 + "|"
    seen = set()
    for row in rows:
        line = row["task"], row["metric"]
        if line in seen and row["task"] != "average":
            continue
        seen.add(line)
        share = row["metric"] != "perplexity"
        scale, unit = (100, "%") if share else (1, "")
        error = "" if row["stderr"] is None else f" ± {scale * row['stderr']:.1f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        source = "" if row["task"] == "average" else row["source"]
        yield (
            f"| {row['task']} | {row['metric']} | {scale * row['value']:.1f}{unit}{error} | {row['n']} "
            f"| {row['fewshot']} | {source} | {seconds} | {row['run']} |"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path(__file__).with_name("study.yaml"))
    parser.add_argument("--runs", default="runs/evaluation")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    return parse_study(parser)


if __name__ == "__main__":
    main()
