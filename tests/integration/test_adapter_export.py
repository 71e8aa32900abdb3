"""What is exported is loaded by transformers and PEFT alone, in a process of their own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank_kit.calibration.collect import calibrate
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.methods.astra import Astra
from lowrank_kit.methods.base import InitialisedAdapter
from lowrank_kit.methods.lora import Lora
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.load import ModelSource, load_model
from lowrank_kit.training.adapters import attach

RANK = 4
# Every case in one process, which is slow to start.
LOADER = """
import json, sys, torch, transformers
from peft import PeftModel
from safetensors.torch import save_file
for case in json.load(open(sys.argv[1])):
    auto = getattr(transformers, case["auto"])
    base = auto.from_pretrained(case["base"], dtype=getattr(torch, case["dtype"]), **case["options"])
    model = PeftModel.from_pretrained(base, case["adapter"]).eval()
    ids = torch.tensor(case["ids"])
    with torch.no_grad():
        loaded = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    save_file({"loaded": loaded, "merged": merged}, case["adapter"] + "/logits.safetensors")
assert not any(name.startswith("lowrank_kit") for name in sys.modules)
"""


@dataclass(frozen=True)
class Case:
    family: str
    head: str = "causal"
    method: type = Astra
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def __str__(self):
        settings = "-".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.family}-{self.method.__name__}-{self.dtype}-{settings}"


PATTERN = {"rslora": True, "alpha": 3.0, "rank_pattern": {"o": 2, "up": 6}}
CASES = [
    *(
        Case("llama", settings={"base": b, "train": t})
        for b in ("residual", "untouched")
        for t in ("both", "down", "up")
    ),
    Case("llama", settings=PATTERN),
    Case("llama", settings={"base": "untouched", "roles": ("q", "v"), "alpha": 9.0}),
    Case("llama", settings={"allocation": "effective_rank", "subspace": "top"}),
    Case("llama", method=Lora, settings=PATTERN),
    Case("llama", dtype="bfloat16"),
    Case("llama", dtype="bfloat16", settings={"base": "untouched"}),
    Case("gpt2"),
    Case("gpt2", settings={"base": "untouched", "train": "down"}),
    Case("bert", "classification"),
    Case("bert", "classification", Lora),
    Case("t5", "classification", settings={"base": "untouched"}),
    Case("roberta", "classification", settings={"train": "down"}),
]
PACKAGED = [
    Case("minilm", "classification"),
    Case("minilm", "classification", settings={"base": "untouched", "train": "down"}),
]


def token_ids():
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = 2
    return ids


def trained(base, case):
    """Load, calibrate, attach, train a little: in process, by our own code."""
    torch.manual_seed(0)
    labels = 3 if case.head == "classification" else None
    loaded = load_model(ModelSource(str(base)), case.head, getattr(torch, case.dtype), num_labels=labels)
    model, layout, ids = loaded.model, layout_of(loaded.model), token_ids()
    method = case.method(name="test", rank=RANK, **case.settings)
    kept, factors = {}, {}
    if isinstance(method, InitialisedAdapter):

        def reduce(statistics):
            module = model.get_submodule(statistics.ref.name)
            return method.reduce(weight_of(module), module.bias, statistics)

        samples = CalibrationSamples(tuple({"input_ids": row} for row in ids))
        kept = calibrate(model, layout, samples, method.targets(layout), method.needs(), reduce, batch_size=2)
    plan = method.plan(layout, kept)
    for name, quantities in kept.items():
        factors[name] = method.initialise(weight_of(model.get_submodule(name)), quantities, plan.ranks[name])
    task_type = "SEQ_CLS" if labels else "CAUSAL_LM"
    adapted = attach(model, method, plan, factors, loaded.new_modules, task_type)
    adapted.model.train()
    optimizer = torch.optim.AdamW([p for p in adapted.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.model(input_ids=ids, labels=torch.arange(4) % 3 if labels else ids).loss.backward()
        optimizer.step()
    adapted.model.eval()
    return adapted


def exported(cases, bases, folder):
    """``{case: (in-process logits, folder of the exported adapter)}`` after a fresh process loaded every one."""
    results, manifest = {}, []
    for index, case in enumerate(cases):
        adapted = trained(bases[case.family], case)
        target = folder / str(index)
        adapted.export(target, str(bases[case.family]))
        with torch.no_grad():
            expected = adapted.model(input_ids=token_ids()).logits
        results[str(case)] = (expected, target, adapted)
        classification = case.head == "classification"
        manifest.append(
            {
                "auto": "AutoModelForSequenceClassification" if classification else "AutoModelForCausalLM",
                "base": str(bases[case.family]),
                "adapter": str(target),
                "dtype": case.dtype,
                "ids": token_ids().tolist(),
                "options": {"num_labels": 3} if classification else {},
            }
        )
    (folder / "cases.json").write_text(json.dumps(manifest))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOADER, str(folder / "cases.json")]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return results


@pytest.fixture(scope="module")
def tiny_exports(tiny_model, tmp_path_factory):
    folder, bases = tmp_path_factory.mktemp("exports"), {}
    for case in CASES:
        if case.family not in bases:
            bases[case.family] = folder / f"base-{case.family}"
            # A checkpoint without a classifier: the trained one must travel with the adapter.
            head = "base" if case.head == "classification" else case.head
            tiny_model(case.family, head).save_pretrained(bases[case.family])
    return exported(CASES, bases, folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_process_without_us_gives_the_same_logits(tiny_exports, case):
    assert_same(tiny_exports[str(case)], case)


@pytest.mark.parametrize("case", [case for case in CASES if "allocation" not in case.settings], ids=str)
def test_exported_ranks(tiny_exports, case):
    _, target, adapted = tiny_exports[str(case)]
    both = case.method is Astra and case.settings.get("train", "both") == "both"
    tensors = load_file(target / "adapter_model.safetensors")
    for name, rank in adapted.plan.ranks.items():
        expected = 2 * rank if both else rank
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == expected
        assert tensors[f"base_model.model.{name}.lora_B.weight"].shape[1] == expected


@pytest.fixture(scope="module")
def packaged_exports(minilm_path, tmp_path_factory):
    return exported(PACKAGED, {"minilm": minilm_path}, tmp_path_factory.mktemp("packaged"))


@pytest.mark.assets
@pytest.mark.parametrize("case", PACKAGED, ids=str)
def test_a_packaged_model_travels_too(packaged_exports, case):
    assert_same(packaged_exports[str(case)], case)


def assert_same(result, case):
    expected, target, adapted = result
    found = load_file(target / "logits.safetensors")
    scale = expected.abs().max()
    # In bfloat16 the stored residual, and each sum with an adapter's output, is rounded to 8 bits.
    bound = 1e-5 if case.dtype == "float32" else 2e-2
    assert (found["loaded"] - expected).abs().max() <= bound * scale
    assert (found["merged"] - expected).abs().max() <= 2 * bound * scale
    with torch.no_grad(), adapted.model.disable_adapter():
        without = adapted.model(input_ids=token_ids()).logits
    assert (without - expected).abs().max() > max(1e-3, 2 * bound) * scale
    assert json.loads((target / "adapter_config.json").read_text())["peft_type"] == "LORA"
