"""Runs share a stored number exactly when all that it was read from is equal: pairs that differ in one thing."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.calibration.influence import block_influence
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Compression, Context
from lowrank_kit.compressors.grasp import Grasp
from lowrank_kit.compressors.llm_pruner import LLMPruner
from lowrank_kit.compressors.probe import LossProbe
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.models.layout import layout_of
from lowrank_kit.pipeline import execute
from lowrank_kit.truncations.optimal import Optimal
from lowrank_kit.truncations.two_sided import TwoSided

WINDOWS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Setting:
    """What calibration is given."""

    model: PreTrainedModel
    rows: tuple[torch.Tensor, ...]
    batch_size: int = 3

    @property
    def samples(self) -> CalibrationSamples:
        return CalibrationSamples(tuple({"input_ids": row} for row in self.rows), batch_size=self.batch_size)


def original(tiny_model, **config) -> Setting:
    ids = torch.randint(3, 64, (6, 30), generator=torch.Generator().manual_seed(0))
    return Setting(tiny_model("llama", initializer_range=0.2, **config), tuple(ids))


def svd(truncation) -> TruncatedSVD:
    return TruncatedSVD(name="svd", ratio=0.4, rank_multiple=1, truncation=truncation, allocation=Uniform())


def decomposed(setting: Setting, cache: Path, truncation) -> dict[str, torch.Tensor]:
    found = svd(truncation).calibrate(Context(setting.model, layout_of(setting.model), setting.samples, cache))
    return {candidate.name: candidate.tail for candidate in found.candidates}


def compressed(setting: Setting, cache: Path, method) -> dict[str, torch.Tensor]:
    layout = layout_of(setting.model)
    work = Compression(method, Context(setting.model, layout, setting.samples, cache))
    work.calibrate()
    return {name: torch.tensor(kept) for name, kept in work.plan().kept.items()}


def probed(setting: Setting, cache: Path) -> dict[str, torch.Tensor]:
    samples, method = setting.samples, svd(Optimal())
    found = method.calibrate(Context(setting.model, layout_of(setting.model), samples, cache))
    change = LossProbe(setting.model, found.decomposition, WINDOWS).loss_change({found.candidates[3].name: 2})
    return {"change": torch.tensor(change, dtype=torch.float64)}


def influence(setting: Setting, cache: Path) -> dict[str, torch.Tensor]:
    return {"influence": block_influence(setting.model, setting.samples, cache=cache)}


KINDS: dict[str, Callable[[Setting, Path], dict[str, torch.Tensor]]] = {
    "moments": lambda setting, cache: decomposed(setting, cache, Optimal()),
    "gradients": lambda setting, cache: decomposed(setting, cache, TwoSided()),
    "influence": influence,
    "GRASP's scores": lambda setting, cache: compressed(setting, cache, Grasp(name="grasp", ratio=0.3, blocks=(1, 2))),
    "LLM-Pruner's scores": lambda setting, cache: compressed(
        setting, cache, LLMPruner(name="llm_pruner", ratio=0.1, protect_first=1, protect_last=0)
    ),
    "probe losses": probed,
}


def other_head(setting: Setting, tiny_model) -> Setting:
    model = original(tiny_model).model
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(64, 32, generator=torch.Generator().manual_seed(9)))
    return replace(setting, model=model)


def configured(**config) -> Callable[[Setting, object], Setting]:
    return lambda setting, tiny_model: replace(setting, model=original(tiny_model, **config).model)


def other_token(setting: Setting, _) -> Setting:
    first = setting.rows[0].clone()
    first[7] = 3 + (first[7] - 2) % 60
    return replace(setting, rows=(first, *setting.rows[1:]))


def with_bos(setting: Setting, _) -> Setting:
    return replace(setting, rows=tuple(torch.cat([torch.tensor([1]), row[:-1]]) for row in setting.rows))


def eager(setting: Setting, tiny_model) -> Setting:
    model = original(tiny_model).model
    model.set_attn_implementation("eager")
    return replace(setting, model=model)


def other_weight(setting: Setting, tiny_model) -> Setting:
    model = original(tiny_model).model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    return replace(setting, model=model)


CHANGES: dict[str, Callable[[Setting, object], Setting]] = {
    "head": other_head,
    "one weight": other_weight,
    "rope_theta": configured(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    "rms_norm_eps": configured(rms_norm_eps=1e-2),
    "attention implementation": eager,
    "dtype": lambda setting, _: replace(setting, model=setting.model.bfloat16()),
    "one token": other_token,
    "BOS": with_bos,
    "order of rows": lambda setting, _: replace(setting, rows=setting.rows[::-1]),
    "number of rows": lambda setting, _: replace(setting, rows=setting.rows[:-1]),
    "length": lambda setting, _: replace(setting, rows=tuple(row[:-1] for row in setting.rows)),
    "batch size": lambda setting, _: replace(setting, batch_size=2),
}
OF_THE_BLOCKS = ("moments", "influence")


def stored(cache: Path) -> dict[Path, bytes]:
    """Every file with numbers below a cache."""
    return {
        path: path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and path.name != "key.json" and not path.name.startswith((".", "lock"))
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


PAIRS = [(kind, change) for kind in KINDS for change in CHANGES if not (kind in OF_THE_BLOCKS and change == "head")]


@pytest.mark.parametrize(("kind", "change"), PAIRS)
def test_numbers_read_from_something_else_are_never_shared(tiny_model, tmp_path, kind, change):
    measure, setting = KINDS[kind], original(tiny_model)
    measure(setting, tmp_path / "shared")
    before = stored(tmp_path / "shared")
    other = CHANGES[change](setting, tiny_model)
    found = measure(other, tmp_path / "shared")
    after = stored(tmp_path / "shared")
    # Nothing of the first was added to, and the second left of its own what it leaves alone.
    assert {path: after[path] for path in before} == before
    alone = measure(other, tmp_path / "alone")
    new_here = set(after) - set(before)
    if change == "head":
        # What is of the blocks alone, on which the others stand, is shared.
        assert new_here
    else:
        assert len(new_here) == len(stored(tmp_path / "alone"))
    assert equal(found, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_is_shared_with_another_process(tiny_model, tmp_path, kind):
    first = KINDS[kind](original(tiny_model), tmp_path)
    before = stored(tmp_path)
    assert equal(KINDS[kind](original(tiny_model), tmp_path), first)
    assert stored(tmp_path) == before


@pytest.mark.parametrize("kind", OF_THE_BLOCKS)
def test_models_that_differ_in_their_heads_share_what_is_read_from_the_blocks(tiny_model, tmp_path, kind):
    setting = original(tiny_model)
    first = KINDS[kind](setting, tmp_path)
    before = stored(tmp_path)
    assert equal(KINDS[kind](other_head(setting, tiny_model), tmp_path), first)
    assert stored(tmp_path) == before


MODULE = """
from typing import Literal
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.truncations.optimal import Optimal

class Mine(Optimal):
    def project(self, layers):
        from dataclasses import replace
        found = super().project(layers)
        return replace(found, values=found.values * {factor})

class MineSVD(TruncatedSVD):
    truncation: Mine = Mine()
"""


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """Write a package with a truncation of its own, import it, and decompose with it."""
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    setting: list[Setting] = []

    def build(name: str, factor: int, tiny_model, cache: Path) -> torch.Tensor:
        setting[:] = setting or [original(tiny_model)]
        folder = tmp_path / "packages" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / "mine.py").write_text(MODULE.replace("{factor}", str(factor)))
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]
        importlib.invalidate_caches()
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        made = importlib.import_module(f"{name}.mine").MineSVD
        method = made(name="mine", ratio=0.4, rank_multiple=1, allocation=Uniform())
        found = method.calibrate(Context(setting[0].model, layout_of(setting[0].model), setting[0].samples, cache))
        return found.candidates[0].tail

    return build


def test_a_truncation_that_was_edited_or_is_of_another_package_shares_nothing(tiny_model, tmp_path, third_party):
    first = third_party("package_a", 1, tiny_model, tmp_path / "cache")
    assert torch.equal(third_party("package_a", 1, tiny_model, tmp_path / "cache"), first)
    assert torch.equal(third_party("package_b", 3, tiny_model, tmp_path / "cache"), 3 * first)
    assert torch.equal(third_party("package_a", 2, tiny_model, tmp_path / "cache"), 2 * first)


# Whole runs: dense perplexities and answers to benchmarks.


@pytest.fixture
def judged(language_arguments, composed, checkpoint, questions_folder, tmp_path):
    """Judge a model as it is on a text and benchmarks; which of the cache's figures are new, and all figures."""
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(checkpoint("llama"), model)
    shutil.copytree(questions_folder, data)

    def judge(*words: str) -> tuple[set[str], dict[tuple[str, str], float]]:
        before = set(stored(tmp_path / "cache"))
        job = composed(
            language_arguments(
                *("task=smoke", "task.calibrate_on=null", "task.perplexity=true", "task.window=32"),
                *("run.resume=false", *words),
                method="none", path=model, data=data,
            )
        )  # fmt: skip
        run = execute(job)
        new = {path.relative_to(tmp_path / "cache").parts[0] for path in set(stored(tmp_path / "cache")) - before}
        values = {(r["task"], r["metric"]): r["value"] for r in json.loads((run / "results.json").read_text())}
        return new, values

    judge.model, judge.data = model, data
    return judge


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def new_head(judged) -> None:
    model = LlamaForCausalLM.from_pretrained(judged.model)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(64, 32, generator=torch.Generator().manual_seed(9)))
    model.save_pretrained(judged.model)


def permuted_vocabulary(judged) -> None:
    file = judged.model / "tokenizer.json"
    whole = json.loads(file.read_text())
    vocabulary = whole["model"]["vocab"]
    vocabulary["w3"], vocabulary["w5"] = vocabulary["w5"], vocabulary["w3"]
    file.write_text(json.dumps(whole))


def chat_template(judged) -> None:
    tokenizer = AutoTokenizer.from_pretrained(judged.model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(judged.model)


def swapped_rows(judged) -> None:
    file = judged.data / "piqa/validation.jsonl"
    rows = file.read_text().splitlines()
    file.write_text("\n".join([rows[1], rows[0], *rows[2:]]) + "\n")


def other_row(judged) -> None:
    file = judged.data / "piqa/validation.jsonl"
    file.write_text(file.read_text().replace('"label": 1', '"label": 0', 1))


def other_text(judged) -> None:
    file = judged.data / "text/mine/test.txt"
    file.write_text(file.read_text().replace("w7", "w8", 1))


def other_rope(judged) -> None:
    edit_json(judged.model / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 100.0})


BOTH = {"perplexity", "benchmarks"}
RUNS: dict[str, tuple[Callable[[object], None] | None, tuple[str, ...], set[str]]] = {
    "nothing": (None, (), set()),
    "head": (new_head, (), BOTH),
    "rope_theta": (other_rope, (), BOTH),
    "dtype": (None, ("dtype=bfloat16",), BOTH),
    "vocabulary": (permuted_vocabulary, (), BOTH),
    "template": (chat_template, (), {"benchmarks"}),
    "batch size": (None, ("eval.batch_size=3", "task.batch_size=3"), BOTH),
    "text": (other_text, (), {"perplexity"}),
    "window": (None, ("task.window=16",), {"perplexity"}),
    "a row": (other_row, (), {"benchmarks"}),
    "order of rows": (swapped_rows, (), {"benchmarks"}),
    "number of rows": (None, ("task.benchmarks.piqa.max_rows=5",), {"benchmarks"}),
}


@pytest.mark.parametrize("change", RUNS)
def test_figures_of_dense_models_are_shared_by_runs_that_would_measure_the_same(judged, monkeypatch, tmp_path, change):
    edit, words, expected = RUNS[change]
    new, _ = judged()
    assert new == BOTH
    if edit is not None:
        edit(judged)
    new, found = judged(*words)
    assert new == expected
    monkeypatch.setenv("LOWRANK_KIT_CACHE", str(tmp_path / "cache/alone"))
    assert judged(*words)[1] == found
