"""What is exported is loaded by transformers and PEFT alone, in a process of their own."""

import json
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
import warm
from peft import PeftModel
from safetensors.torch import load_file

from lowrank_kit.adapters.adapter import InitialisedAdapter
from lowrank_kit.adapters.astra import Astra
from lowrank_kit.adapters.corda import Corda
from lowrank_kit.adapters.dora import Dora
from lowrank_kit.adapters.eva import Eva
from lowrank_kit.adapters.full_ft import FullFineTuning
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.adapters.lora_ga import LoraGA
from lowrank_kit.adapters.lora_plus import LoraPlus
from lowrank_kit.adapters.mica import Mica
from lowrank_kit.adapters.milora import Milora
from lowrank_kit.adapters.olora import Olora
from lowrank_kit.adapters.pissa import Pissa
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.checkpoint import save_compressed
from lowrank_kit.models.factored import replace_linear
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.models.load import ModelSource, load_model
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.training.adapters import load_adapted
from lowrank_kit.training.initialise import adapt, adapted

RANK = 4
# Every case in one process, which is slow to start.
LOADER = """
import json, sys
sys.modules["lowrank_kit"] = None
import torch, transformers
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
    *(Case("llama", method=kind) for kind in (Dora, LoraPlus, Pissa, Milora, Corda, Eva, Olora, LoraGA, Mica)),
    *(Case("llama", method=kind, settings=PATTERN) for kind in (Dora, Corda, LoraGA)),
    Case("llama", method=Corda, settings={"mode": "kpm", "train": "down"}),
    Case("llama", method=Pissa, settings={"train": "up"}),
    Case("llama", method=Eva, settings={"rho": 1.0, "alpha": 9.0}),
    Case("llama", method=Pissa, dtype="bfloat16"),
    Case("llama", method=LoraGA, dtype="bfloat16"),
    *(Case("gpt2", method=kind) for kind in (Dora, Corda, LoraGA)),
    *(Case("bert", "classification", kind) for kind in (Dora, LoraGA, Eva)),
]
PACKAGED = [
    Case("minilm", "classification"),
    Case("minilm", "classification", settings={"base": "untouched", "train": "down"}),
]


FACTORED = [
    Case("factored", method=kind, settings=settings)
    for kind, settings in (
        (Lora, {}), (Dora, {}), (Astra, {}), (Astra, {"base": "untouched", "roles": ("q", "down")}), (Pissa, {}),
    )
]  # fmt: skip


def token_ids():
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = 2
    return ids


def trained(base, case):
    """Load, calibrate, attach, train a little: in process, by our own code."""
    torch.manual_seed(0)
    labels = 3 if case.head == "classification" else None
    loaded = load_model(ModelSource(str(base)), case.head, getattr(torch, case.dtype), num_labels=labels)
    ids, classes = token_ids(), torch.arange(4) % 3
    method = case.method(name="test", rank=RANK, **case.settings)
    rows = [{"input_ids": row} | ({"labels": label} if labels else {}) for row, label in zip(ids, classes, strict=True)]
    task_type = "SEQ_CLS" if labels else "CAUSAL_LM"
    ready = adapt(
        loaded.model,
        method,
        CalibrationSamples(tuple(rows), batch_size=2),
        new_modules=loaded.new_modules,
        task_type=task_type,
    )
    ready.model.train()
    optimizer = torch.optim.AdamW([p for p in ready.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        ready.model(input_ids=ids, labels=classes if labels else ids).loss.backward()
        optimizer.step()
    ready.model.eval()
    return ready


def exported(cases, bases, folder):
    """``{case: (in-process logits, folder of the exported adapter)}`` after a fresh process loaded every one."""
    results, manifest = {}, []
    for index, case in enumerate(cases):
        ready = trained(bases[case.family], case)
        target = folder / str(index)
        ready.export(target, str(bases[case.family]))
        with torch.no_grad():
            expected = ready.model(input_ids=token_ids()).logits
        results[str(case)] = (expected, target, ready)
        classification = case.head == "classification"
        manifest.append(
            {
                "auto": "AutoModelForSequenceClassification" if classification else "AutoModelForCausalLM",
                "base": str(bases[case.family]),
                "adapter": str(target),
                "dtype": case.dtype,
                "ids": token_ids().tolist(),
                "options": {"num_labels": 3} if classification else {"trust_remote_code": True},
            }
        )
    (folder / "cases.json").write_text(json.dumps(manifest))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    warm.run(["-c", LOADER, str(folder / "cases.json")], environment, folder, check=True)
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
    _, target, ready = tiny_exports[str(case)]
    starts = ready.method.takes_from_base or isinstance(ready.method, InitialisedAdapter)
    both = starts and ready.method.train == "both"
    tensors = load_file(target / "adapter_model.safetensors")
    for name, rank in ready.plan.ranks.items():
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
    expected, target, ready = result
    found = load_file(target / "logits.safetensors")
    scale = expected.abs().max()
    # In bfloat16 the stored residual, and each sum with an adapter's output, is rounded to 8 bits.
    bound = 1e-5 if case.dtype == "float32" else 2e-2
    assert (found["loaded"] - expected).abs().max() <= bound * scale
    assert (found["merged"] - expected).abs().max() <= 2 * bound * scale
    with torch.no_grad(), ready.model.disable_adapter():
        without = ready.model(input_ids=token_ids()).logits
    assert (without - expected).abs().max() > max(1e-3, 2 * bound) * scale
    assert json.loads((target / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.fixture(scope="module")
def factored_exports(tiny_model, tmp_path_factory):
    """On a compressed checkpoint: half of its linears are factored."""
    folder = tmp_path_factory.mktemp("factored")
    model = tiny_model("llama")
    for ref in layout_of(model).linears:
        if ref.role in ("q", "o", "up", "down"):
            u, s, vh = torch.linalg.svd(weight_of(model.get_submodule(ref.name)).detach(), full_matrices=False)
            replace_linear(model, ref.name, LowRankFactors(u[:, :12] * s[:12], vh[:12]))
    save_compressed(model, folder / "base")
    return exported(FACTORED, {"factored": folder / "base"}, folder)


@pytest.mark.parametrize("case", FACTORED, ids=str)
def test_an_adapter_on_a_compressed_checkpoint_travels_too(factored_exports, case):
    assert_same(factored_exports[str(case)], case)
    _, _, ready = factored_exports[str(case)]
    assert {name.rpartition(".")[2] for name in ready.plan.ranks} >= {"up", "down"}
    assert ready.trained_parameters == ready.plan.trained_parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_adapters_share_one_base(tiny_model, tiny_exports, dtype):
    """Starts that were taken out of the base among them: what they took is inside the adapter."""
    cases = [case for case in CASES if (case.family, case.dtype) == ("llama", dtype) and not case.settings.get("train")]
    bound = 1e-5 if dtype == "float32" else 2e-2
    base = tiny_model("llama").to(getattr(torch, dtype))
    names = [str(number) for number in range(len(cases))]
    model = PeftModel.from_pretrained(base, tiny_exports[str(cases[0])][1], adapter_name="0").eval()
    for name, case in list(zip(names, cases, strict=True))[1:]:
        model.load_adapter(tiny_exports[str(case)][1], adapter_name=name)
    for name, case in [*zip(names, cases, strict=True)][::-1]:
        model.set_adapter(name)
        expected = tiny_exports[str(case)][0]
        with torch.no_grad():
            assert (model(input_ids=token_ids()).logits - expected).abs().max() <= bound * expected.abs().max(), case


def test_an_adapter_does_not_go_onto_another_base(tiny_model, tiny_exports):
    expected, target, ready = tiny_exports[str(Case("llama", method=Pissa))]
    again = load_adapted(ready.method, tiny_model("llama"), target).eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=token_ids()).logits, expected, atol=1e-5)
    with pytest.raises(LowRankKitError, match=r"belongs to another base: it was trained on '.*base-llama'"):
        load_adapted(ready.method, tiny_model("llama", seed=1), target)


def test_full_fine_tuning_leaves_a_checkpoint_of_transformers(tiny_model, tmp_path):
    model, method = tiny_model("bert", "classification"), FullFineTuning(name="full_ft")
    plan = method.plan(layout_of(model), {})
    ready = adapted(method, model, plan, {}, None, new_modules=("classifier",), task_type="SEQ_CLS")
    model(input_ids=token_ids(), labels=torch.arange(4) % 2).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ready.export(tmp_path / "full", "base")
    with torch.no_grad():
        expected = model(input_ids=token_ids()).logits
        stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "full")
        again = load_adapted(method, tiny_model("bert", "classification"), tmp_path / "full")
        assert torch.equal(stock(input_ids=token_ids()).logits, expected)
        assert torch.equal(again(input_ids=token_ids()).logits, expected)
