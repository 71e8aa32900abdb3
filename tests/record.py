"""A record of what every method computes, to hold against a change of the house: bit for bit, or by how much.

    python tests/record.py OUT.json [--against OLD.json] [--models tiny|smollm2|all] [--only METHOD ...]

Every method runs by the ordinary command on tiny random models of several families and, with a short calibration, on
SmolLM2-135M. Noted are the tensors in the calibration cache (statistics and spectra), the plan, the weights of the
checkpoint or adapter and the results. A tensor is noted as a digest of its bytes and its norm, so that a difference in
the last digits can be told from another number. A command that is refused is noted with its message.
With `--against` the differences are listed, and the exit status is 1 if there are any.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).with_name("support")))

from conftest import build_tiny_model
from integration.conftest import WORDS, build_tokenizer, made_up_rows, write_rows

from lowrank_kit.assets import require
from lowrank_kit.compose import Composer, force_dotted
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.pipeline import execute

METHODS = sorted(file.stem for file in Path(__file__).parents[1].glob("conf/method/*.yaml") if file.stem != "none")
CAUSAL, LABELLED = ("llama", "gemma2", "opt"), ("bert", "t5", "llama")
# A choice of the SVD family beside its named pairs.
CHOICES = {
    "svd_llm sequential": ["method=svd_llm", "method.correction=sequential"],
    "kfac_svd residual": ["method=kfac_svd", "method.correction=residual"],
    "hisvd role keep": ["method=hisvd", "method.scope=role", "method.allocation.keep={blocks: [0], at: dense}"],
    "svd_llm influence": ["method=svd_llm", "method.allocation.keep.influence=0.5"],
    "grasp propagate": ["method=grasp", "method.propagate=true"],
    "grasp iterative": ["method=grasp", "method.propagate=true", "method.iterative=true"],
    "shortgpt contiguous": ["method=shortgpt", "method.choice=contiguous", "method.distance=angular"],
    "prune_comp at once": ["method=prune_comp", "method.iterative=false"],
    "replace_me cosine": ["method=replace_me", "method.objective=cosine"],
    "laco original": ["method=laco", "method.differences=original"],
    "llm_pruner magnitude": ["method=llm_pruner", "method.importance=magnitude"],
    "astra untouched": ["method=astra", "method.base=untouched"],
}
PROBE = ["method.allocation.probe_windows=2", "method.allocation.probe_seq_len=16"]
# What a method needs to fit three blocks of width 32.
SMALL = {
    "grasp": ["method.removed_share=0.6"],
    "grasp_activation": ["method.removed_share=0.6"],
    "laco": ["method.merged=2"],
    "slicegpt": ["method.multiple=1"],
    "astra_released": ["method.rank=4"],
    **dict.fromkeys(("asvd", "loss_svd", "swift"), PROBE),
    "llm_pruner": ["method.protect_first=1", "method.protect_last=0"],
}


def main() -> int:
    """Write the record; compare it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--models", choices=("tiny", "smollm2", "all"), default="tiny")
    parser.add_argument("--only", nargs="*", help="names of methods")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Figure.savefig = lambda figure, file, **settings: Path(file).touch()
    assets = {name: require(name) for name in (("smollm2_135m",) if options.models != "tiny" else ())}
    found = {}
    with TemporaryDirectory(prefix="record-") as folder:
        for name, words in jobs(Path(folder), options.models, assets):
            if not options.only or {*name.split()} & {*options.only}:
                print(name, flush=True)
                found[name] = record(words, Path(folder, re.sub(r"\W+", "-", name)))
    options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if options.against is None:
        return 0
    old = json.loads(options.against.read_text())
    differing = list(differences({name: old[name] for name in found if name in old}, found))
    print("\n".join(differing) or f"equal: {len(found)} runs")
    return int(bool(differing))


def jobs(folder: Path, models: str, assets: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Every run as its name and its command line."""
    texts(folder / "data")
    compressing, training = split()
    if models != "smollm2":
        for family in CAUSAL:
            model(folder / f"causal-{family}", family, "causal")
            words = [f"model.path={folder / f'causal-{family}'}", *language(folder / "data", 16)]
            for name, own in compressing:
                yield f"{family} {name}", [*own, *words, "method.ratio=0.3"]
        for family in LABELLED:
            model(folder / f"labelled-{family}", family, {"bert": "base", "t5": "seq2seq"}.get(family, "causal"))
            words = [f"model.path={folder / f'labelled-{family}'}", *classification(folder / "data")]
            for name, own in training:
                yield f"{family} labelled {name}", [*own, *words]
    if models != "tiny":
        words = [
            "model=smollm2_135m",
            f"model.path={assets['smollm2_135m']}",
            *language(folder / "data", 128, real=True),
        ]
        for name, own in compressing:
            yield f"smollm2 {name}", [*own, *words, "method.ratio=0.3"]


def split() -> tuple[list[tuple[str, list[str]]], list[tuple[str, list[str]]]]:
    """The commands that compress, which have a ratio, and those that train."""
    composer, compressing, training = Composer(), [], []
    for name, own in commands():
        module, _, target = composer.compose([own[0]]).method._target_.rpartition(".")
        settings = getattr(import_module(module), target).model_fields
        if "rank_multiple" in settings:
            own = [*own, "method.rank_multiple=1"]
        (training if "rank" in settings or name == "full_ft" else compressing).append((name, own))
    return compressing, training


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every method's name and words, and those of the choices."""
    for name, own in {**{name: [f"method={name}"] for name in METHODS}, **CHOICES}.items():
        yield name, [*own, *SMALL.get(own[0].removeprefix("method="), ())]


def language(data: Path, tokens: int, real: bool = False) -> list[str]:
    """A command line's words for texts."""
    task = ["~task.texts.wikitext2", "~task.texts.ptb", "~task.texts.c4", "~task.texts.openwebtext"]
    text = "real" if real else "mine"
    return [
        *(
            "task=perplexity",
            *task,
            "~task.texts.wikipedia",
            f"task.texts.{text}={{}}",
            "data=local",
            f"data.root={data}",
        ),
        *(f"calibration.samples={8 if real else 12}", f"calibration.seq_len={tokens}", "calibration.batch_size=4"),
        *(f"task.window={tokens}", "task.max_windows=4", "device=cpu"),
    ]


def classification(data: Path) -> list[str]:
    """A command line's words for labelled rows."""
    return [
        *("model=minilm_l6", "model.max_length=null", "task=glue/rte", "data=local", f"data.root={data}", "device=cpu"),
        *("train.max_steps=3", "train.batch_size=8", "calibration.samples=48", "calibration.batch_size=16"),
    ]


def texts(root: Path) -> None:
    """Made-up words for the tiny models, and a few thousand words of our own documentation."""
    for seed, split in enumerate(("validation", "test")):
        draw = torch.Generator().manual_seed(seed)
        for name in ("mine", "real"):
            file = root / "text" / name / f"{split}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            mine = " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (2000,), generator=draw))
            file.write_text(mine if name == "mine" else prose()[split])
    columns = ("sentence1", "sentence2")
    for seed, (split, count) in enumerate((("train", 48), ("validation", 20)), start=1):
        write_rows(root / "glue/rte" / f"{split}.jsonl", made_up_rows(count, seed, columns, 2))


def prose() -> dict[str, str]:
    """English that does not change with the repository: the licence."""
    words = (Path(__file__).parents[1] / "LICENSE").read_text().split()
    return {"validation": " ".join(words[:1200]), "test": " ".join(words[1200:])}


def model(folder: Path, family: str, head: str) -> None:
    """Write a tiny model that predicts with confidence, and its tokenizer."""
    name = "init_std" if family == "opt" else "initializer_factor" if family == "t5" else "initializer_range"
    build_tiny_model(family, head, **{name: 1.0 if family == "t5" else 0.3}).save_pretrained(folder)
    build_tokenizer({"bert": "encoder", "t5": "t5"}.get(family, "decoder")).save_pretrained(folder)


def record(words: list[str], folder: Path) -> dict[str, Any]:
    """Run a command line in a folder and note what it left."""
    os.environ["LOWRANK_KIT_CACHE"] = str(folder / "cache")
    torch.manual_seed(0)
    try:
        [config] = Composer().jobs(force_dotted([*words, f"run.dir={folder / 'run'}"]), multirun=False)
        run = execute(config)
    except LowRankKitError as error:
        return {"refused": str(error).replace(str(folder.parent), "FOLDER")}
    results = json.loads((run / "results.json").read_text())
    weights = {
        str(file.relative_to(run)): tensors(file)
        for part in ("checkpoint", "adapter")
        for file in sorted((run / part).glob("*.safetensors"))
    }
    statistics = sorted(
        [name, *value] for file in (folder / "cache").rglob("*.safetensors") for name, value in tensors(file).items()
    )
    plan = json.loads((run / "plan.json").read_text()) if (run / "plan.json").is_file() else None
    figures = {f"{r['task']} {r['metric']} {r['checkpoint']} {r['step']}": r["value"] for r in results}
    return {"statistics": statistics, "plan": plan, "weights": weights, "results": figures}


def tensors(file: Path) -> dict[str, list[Any]]:
    """Shape, digest and norm of every tensor in a file."""
    return {
        name: [list(tensor.shape), digest(tensor), float(tensor.double().norm())]
        for name, tensor in load_file(file).items()
    }


def digest(tensor: torch.Tensor) -> str:
    """Of the bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Lines that say what differs, and where."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if key not in old or key not in new:
                yield f"{where}/{key}: only in the {'new' if key in new else 'old'} record"
            else:
                yield from differences(old[key], new[key], f"{where}/{key}")
    elif old != new:
        is_list = isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 3
        if is_list:
            for index, pair in enumerate(zip(old, new, strict=True)):
                yield from differences(*pair, f"{where}[{index}]")
        else:
            yield f"{where}: {str(old)[:160]} -> {str(new)[:160]}"


if __name__ == "__main__":
    sys.exit(main())
