"""A study of compressors under one protocol: perplexity, zero-shot accuracy, size, seconds, memory of every arm.

    python experiments/compression_study.py STUDY.yaml --wikitext FOLDER [--workers 2] [--runs FOLDER]
        [--only ARM ...] [OVERRIDE ...]

A study is a YAML file: `common` overrides, `ratios`, `at` (further overrides of a ratio, if any), `benchmarks`
(packaged sets and their splits, if any), and `arms`, each a name and its own overrides (`method=NAME` is understood
where they name no method). FOLDER holds WikiText-2 as validation.jsonl and test.jsonl, an article a row (key `text`);
the second text, which nothing is calibrated on, is the packaged Wikipedia text. An arm's ratios run one after another
in a process of its own. Every run has a directory of its own, found again by its configuration: a killed study
continues where it was. After every arm it writes `results.json`, `table.md` and a picture, named like the study and
beside it, of all runs there are.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from lowrank_kit.runs.provenance import in_words, origin, parse_study

Row = dict[str, Any]
TEXTS = {"wikitext2": "WikiText-2 (± s.e.)", "wikipedia": "Wikipedia (not calibrated on)"}


def main() -> None:
    arguments = _arguments()
    study = yaml.safe_load(arguments.study.read_text())
    if unknown := set(arguments.only or ()) - set(study["arms"]):
        raise SystemExit(
            f"--only: the study has no arm {', '.join(sorted(unknown))}; it has {', '.join(study['arms'])}"
        )
    data = prepare(arguments.wikitext, study.get("benchmarks", {}), Path(arguments.runs) / "data")
    extra = [*arguments.overrides, f"run.root={arguments.runs}", f"data.root={data}"]
    at = study.get("at", {})
    jobs = [
        (
            arm,
            [
                [*study["common"], *at.get(ratio, []), *_method(arm, own), f"method.ratio={ratio}", *extra]
                for ratio in study["ratios"]
            ],
        )
        for arm, own in study["arms"].items()
        if arm in (arguments.only or study["arms"])
    ]
    # A process for each: peak memory is the process's.
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), _single_threaded, max_tasks_per_child=1) as pool:
        started = {pool.submit(run, arm, ratios): arm for arm, ratios in jobs}
        failed = []
        for done in as_completed(started):
            # The others go on: their rows are worth hours.
            if error := done.exception():
                failed.append(f"{started[done]}: {error}")
                print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
            else:
                write(arguments.study, study, done.result(), arguments.provenance)
    if failed:
        raise SystemExit("\n".join(["not all arms have rows; the same command again goes on:", *failed]))


def write(path: Path, study: dict[str, Any], rows: list[Row], provenance: dict[str, Any]) -> None:
    """Put an arm's rows among those of earlier runs, and make the table and the picture anew."""
    file = path.with_suffix(".results.json")
    known = json.loads(file.read_text())["rows"] if file.is_file() else []
    done = {(row["arm"], row["asked"]) for row in rows}
    order = {arm: place for place, arm in enumerate(study["arms"])}
    rows = rows + [row for row in known if (row["arm"], row["asked"]) not in done]
    rows.sort(key=lambda row: (row["asked"], order[row["arm"]]))
    file.write_text(json.dumps({"provenance": provenance, "study": study, "rows": rows}, indent=1) + "\n")
    table = "\n".join(
        [*markdown(rows), "", *calibrations(rows), *revisions(rows), f"Written with {in_words(provenance)}."]
    )
    path.with_suffix(".table.md").write_text(table + "\n")
    plot(rows, path.with_suffix(".png"))
    print(table, flush=True)


def prepare(wikitext: Path, benchmarks: dict[str, list[str]], root: Path) -> Path:
    """A folder of both texts and the benchmarks, in the form that `data=local` reads."""
    from lowrank_kit.data.sources import DatasetRef, PackagedSource

    for split in ("validation", "test"):
        target = root / "text" / "wikitext2" / f"{split}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wikitext / f"{split}.jsonl", target)
    other = root / "text" / "wikipedia" / "test.jsonl"
    other.parent.mkdir(parents=True, exist_ok=True)
    rows = PackagedSource().load(DatasetRef("text/wikipedia"), "test").dataset
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows["text"]))
    for name, splits in benchmarks.items():
        (root / name).mkdir(exist_ok=True)
        for split in splits:
            PackagedSource().load(DatasetRef(name), split).dataset.to_json(root / name / f"{split}.jsonl")
    return root.resolve()


def run(arm: str, ratios: Sequence[list[str]]) -> list[Row]:
    """An arm's runs in this worker process."""
    from lowrank_kit.compose import Composer, force_dotted
    from lowrank_kit.pipeline import execute
    from lowrank_kit.run import set_up_console

    set_up_console()
    rows = []
    for overrides in ratios:
        [config] = Composer().jobs(force_dotted(overrides), multirun=False)
        rows.append(_row(arm, execute(config)))
    return rows


def _method(arm: str, own: Sequence[str]) -> list[str]:
    return [*own] if any(o.startswith("method=") for o in own) else [f"method={arm}", *own]


def _row(arm: str, folder: Path) -> Row:
    from omegaconf import OmegaConf

    from lowrank_kit.runs.caveats import caveats_of

    plan, manifest, results, checkpoint = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("plan", "manifest", "results", "checkpoint/config")
    )
    config, stages, size = OmegaConf.load(folder / "config.yaml"), manifest["stages"], manifest["size"]
    figures: dict[str, dict[str, list[float]]] = {}
    for record in results:
        found = figures.setdefault(f"{record['task']} {record['metric']}", {})
        found[record["checkpoint"]] = [record["value"], record["stderr"]]
    return {
        "arm": arm,
        "asked": config.method.ratio,
        "settings": OmegaConf.to_container(config.method),
        "removed": 1 - plan["parameters_after"] / plan["parameters_before"],
        "removed_of_model": 1 - size["compressed"]["parameters"] / size["dense"]["parameters"],
        "bytes": sum(file.stat().st_size for file in (folder / "checkpoint").glob("*.safetensors")),
        "figures": figures,
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "peak_rss_bytes": max(stages[name]["peak_rss_bytes"] for name in ("calibrate", "plan", "apply", "train")),
        "factored": len(checkpoint.get("lowrank", {}).get("ranks", {})),
        "matrices": len(plan["ranks"]),
        "calibration": manifest["calibration"],
        **origin(folder),
        "caveats": caveats_of(folder, OmegaConf.to_container(config)),
    }


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """One table, a ratio after the other, best perplexity first; accuracies in percent."""
    figures = dict.fromkeys(name for row in rows for name in row["figures"])
    answered = [n for n in figures if not n.endswith(" perplexity") and not n.startswith("speed ")]
    recovered = any("compressed" in found for row in rows for found in row["figures"].values())
    yield (
        f"| removed | arm | caveats | {' | '.join(_texts(rows).values())} |{' before recovery |' * recovered}"
        f"{''.join(f' {name} |' for name in answered)} removed, linears | removed, model | MB | not factored "
        f"| calibrate s | plan + apply{' + train' * recovered} s | peak GB |"
    )
    yield "|---" * (10 + len(_texts(rows)) + recovered + len(answered)) + "|"
    yield f"| 0 | dense | |{_cells(rows[0], 'dense', answered, recovered)} 0 | 0 | | | | | |"
    for row in sorted(rows, key=lambda r: (r["asked"], _perplexity(r, "wikitext2", "final")[0])):
        seconds = row["seconds"]
        yield (
            f"| {row['asked']} | {row['arm']} | {_caveats(row)} |{_cells(row, 'final', answered, recovered)} "
            f"{row['removed']:.4f} "
            f"| {row['removed_of_model']:.3f} | {row['bytes'] / 1e6:.0f} | {row['matrices'] - row['factored']} "
            f"| {seconds['calibrate']:.0f} | {sum(seconds[name] for name in ('plan', 'apply', 'train')):.0f} "
            f"| {row['peak_rss_bytes'] / 1e9:.2f} |"
        )


def calibrations(rows: Sequence[Row]) -> Iterator[str]:
    """What the rows were calibrated on, and how much of it."""
    # Rows of studies from before it was recorded have none.
    sizes = [row["calibration"] for row in rows if "calibration" in row]
    for text in sorted({f"{s['samples']} windows, {s['tokens']} tokens, of {s['text']}" for s in sizes}):
        yield f"Calibrated on {text}."
        yield ""


def revisions(rows: Sequence[Row]) -> Iterator[str]:
    """Which states of the code the rows are of: more than one, or an unknown one, is said."""
    states = [row["git"] for row in rows]
    names = sorted({s["revision"][:12] + " with changes" * s["dirty"] if s else "unknown" for s in states})
    yield f"Rows measured at revision {', '.join(names)}" + ("." if len(names) == 1 else ": NOT one state of the code.")
    yield ""


def _cells(row: Row, state: str, answered: Sequence[str], recovered: bool) -> str:
    cells = [_shown(*_perplexity(row, text, state)) for text in _texts([row])]
    if recovered:
        found = row["figures"]["wikitext2 perplexity"].get("compressed")
        cells.append("" if found is None or state == "dense" else _shown(*found))
    for name in answered:
        found = row["figures"].get(name, {}).get(state)
        cells.append("" if found is None else f"{100 * found[0]:.1f} ± {100 * found[1]:.1f}")
    return "".join(f" {cell} |" for cell in cells)


def _caveats(row: Row) -> str:
    # Rows of studies from before they were recorded have none.
    return "; ".join(row.get("caveats", ["not recorded"]))


def _texts(rows: Sequence[Row]) -> dict[str, str]:
    return {text: name for text, name in TEXTS.items() if f"{text} perplexity" in rows[0]["figures"]}


def _perplexity(row: Row, text: str, state: str) -> list[float]:
    return row["figures"][f"{text} perplexity"][state]


def _shown(value: float, stderr: float) -> str:
    return f"{value:.1f} ± {stderr:.1f}" if value < 1e4 else f"{value:.1e}"


def plot(rows: Sequence[Row], file: Path) -> None:
    """Perplexity against ratio, a panel a text."""
    from lowrank_kit.plots.ratio import plot_loss_against_ratio

    points: dict[str, dict[str, list[tuple[float, float]]]] = {text: {} for text in _texts(rows)}
    for row in rows:
        for text in points:
            points[text].setdefault(row["arm"], []).append((row["removed"], _perplexity(row, text, "final")[0]))
    dense = {text: _perplexity(rows[0], text, "dense")[0] for text in points}
    plot_loss_against_ratio(points, file, dense)


def _single_threaded() -> None:
    # Two processes of one thread do more than two that wait for each other's threads.
    os.environ["OMP_NUM_THREADS"] = "1"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", default="runs/study")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    return parse_study(parser)


if __name__ == "__main__":
    main()
