"""The smoke suite by lowrank_kit against the plain command of lm-eval: time of the whole process, and equal answers.

    python benchmarks/suite.py [--rows 40] [--repeats 3] [--batch-size 8]

Both judge the packaged SmolLM2-135M, in float32, on the same rows of the same folder. lm-eval is run as a user runs it:
`python -m lm_eval run --model hf`, with task files that include its own and replace the rows. Ours is
`python -m lowrank_kit.run method=none task=smoke` in a new run directory, with an empty cache, and does what it always
does besides: hashes of rows and weights, the run directory (samples of every row are written by both). They take turns,
so that a drift of the machine's speed hits both. Wall and CPU seconds are those of the process from its start to its
end; a ratio is of one turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lowrank_kit.assets import require
from lowrank_kit.compose import Composer
from lowrank_kit.config import Benchmark, CausalTask
from lowrank_kit.data.sources import DatasetRef, PackagedSource
from lowrank_kit.evaluation.harness import definitions
from lowrank_kit.runs.provenance import in_words, parse_study


def main() -> None:
    arguments = _arguments()
    print(in_words(arguments.provenance), end="\n\n")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        benchmarks = _smoke()
        for task, benchmark in benchmarks.items():
            _prepare(task, benchmark, arguments.rows, root)
        turns = [
            {who: ask(root, benchmarks, arguments.batch_size) for who, ask in (("ours", ours), ("lm_eval", lm_evals))}
            for _ in range(arguments.repeats)
        ]
    print(f"`python benchmarks/suite.py {' '.join(sys.argv[1:])}`\n")
    print("\n".join(_table(turns)))


def ours(root: Path, benchmarks: dict[str, Benchmark], batch_size: int) -> dict[str, Any]:
    """Figures and seconds of one run of our command line."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *("method=none", f"model.path={require('smollm2_135m')}", "dtype=float32", "task=smoke", "data=local"),
            *(f"data.root={root}", f"eval.batch_size={batch_size}", f"run.dir={folder}/run"),
        ]
        spent = _timed([sys.executable, "-m", "lowrank_kit.run", *words], LOWRANK_KIT_CACHE=f"{folder}/cache")
        records = json.loads((Path(folder) / "run/results.json").read_text())
    return {"figures": {(r["task"], r["metric"]): r["value"] for r in records if r["task"] in benchmarks}, **spent}


def lm_evals(root: Path, benchmarks: dict[str, Benchmark], batch_size: int) -> dict[str, Any]:
    """Figures and seconds of one run of lm-eval's command line."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = ",".join(f"same_{name}" for name in benchmarks)
        words = [
            *("run", "--model", "hf", "--model_args", f"pretrained={require('smollm2_135m')},dtype=float32"),
            *("--tasks", tasks, "--include_path", str(root / "tasks"), "--batch_size", str(batch_size)),
            *("--device", "cpu", "--output_path", folder, "--log_samples"),
        ]
        spent = _timed([sys.executable, "-m", "lm_eval", *words], HF_DATASETS_CACHE=f"{folder}/cache")
        [file] = Path(folder).rglob("results_*.json")
        found = json.loads(file.read_text())["results"]
    return {
        "figures": {(n, m): found[f"same_{n}"][f"{m},none"] for n, b in benchmarks.items() for m in b.metrics},
        **spent,
    }


def _smoke() -> dict[str, Benchmark]:
    [config] = Composer().jobs(["method=none", "task=smoke"], multirun=False)
    assert isinstance(config.task, CausalTask)
    return config.task.benchmarks


def _prepare(name: str, benchmark: Benchmark, rows: int, root: Path) -> None:
    file = root / benchmark.dataset / f"{benchmark.split}.jsonl"
    file.parent.mkdir(parents=True)
    chosen = PackagedSource().load(DatasetRef(benchmark.dataset, max_rows=rows), benchmark.split).dataset
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    # lm-eval reads the other splits that its task names, too.
    splits = dict.fromkeys(("train", "validation", "test"), str(file))
    own = {"include": str(definitions()[benchmark.task]), "task": f"same_{name}", "dataset_path": "json"}
    (root / "tasks").mkdir(exist_ok=True)
    text = yaml.safe_dump({**own, "dataset_name": None, "tag": None, "dataset_kwargs": {"data_files": splits}})
    (root / "tasks" / f"{name}.yaml").write_text(text)


def _timed(command: Sequence[str], **environment: str) -> dict[str, float]:
    start = time.perf_counter()
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env={**os.environ, **offline, **environment}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return {"wall": time.perf_counter() - start, "cpu": used.ru_utime + used.ru_stime}


def _table(turns: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    first = turns[0]
    same = all(turn["ours"]["figures"] == turn["lm_eval"]["figures"] == first["ours"]["figures"] for turn in turns)
    lines = [
        f"{len(turns)} turns; equal figures: {same}",
        "",
        "| | ours | lm-eval | ours / lm-eval |",
        "|---|---|---|---|",
    ]
    for measure in ("wall", "cpu"):
        seconds = {who: [turn[who][measure] for turn in turns] for who in ("ours", "lm_eval")}
        ratios = [turn["ours"][measure] / turn["lm_eval"][measure] for turn in turns]
        shown = [f"{statistics.median(found):.1f} s" for found in seconds.values()]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {measure}, median | {' | '.join(shown)} | {spread} |")
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    return parse_study(parser)


if __name__ == "__main__":
    main()
