"""A budget in bytes: ranks and bits in one knapsack, the bytes of the file, and what transformers loads."""

import copy
import itertools
import json

import pytest
import torch
import warm
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lowrank_kit.allocations.allocation import Budget
from lowrank_kit.allocations.forms import choose_forms
from lowrank_kit.allocations.lagrangian import Lagrangian
from lowrank_kit.allocations.uniform import Uniform
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.compressor import Context
from lowrank_kit.compressors.svd import TruncatedSVD
from lowrank_kit.corrections.none import Uncorrected
from lowrank_kit.corrections.refine import Refine
from lowrank_kit.corrections.residual import Residual
from lowrank_kit.errors import ConfigError
from lowrank_kit.models.checkpoint import save_compressed, save_dense
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.rounded import roundings_of
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.structures.channels import Channels
from lowrank_kit.truncations.optimal import Optimal
from lowrank_kit.truncations.plain import Plain
from lowrank_kit.truncations.two_sided import TwoSided

FAMILIES = ["llama", "gemma2", "opt", "gpt2"]
IDS = torch.arange(3, 27).reshape(2, 12)

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "lowrank_kit" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.arange(3, 27).reshape(2, 12)).logits, out)
"""


@pytest.fixture
def samples():
    ids = torch.randint(3, 64, (6, 30), generator=torch.Generator().manual_seed(0))
    return CalibrationSamples(tuple({"input_ids": row} for row in ids), batch_size=2)


def method(**settings):
    parts = {"truncation": TwoSided(), "allocation": Lagrangian(), "storage": Factors(bits=(8, 4), group=16)}
    usual = {"name": "any", "ratio": 0.7, "rank_multiple": 2, "dense": True}
    return TruncatedSVD(**(usual | parts | settings))


def compressed(model, settings, samples):
    context = Context(copy.deepcopy(model), layout_of(model), samples)
    found = settings.calibrate(context)
    plan = settings.plan(found, context)
    return settings.apply(plan, found, context), plan, found


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def bytes_of_weights(folder, names):
    """By the safetensors header: of every tensor of these linears but biases, and of all others."""
    ours = others = 0
    [file] = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118
            tensor = opened.get_tensor(key)
            size = tensor.numel() * tensor.element_size()
            if any(key.startswith(f"{name}.") for name in names) and not key.endswith("bias"):
                ours += size
            else:
                others += size
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size == header + ours + others
    return ours


@pytest.mark.parametrize("correction", [Uncorrected(), Residual()], ids=lambda correction: correction.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_on_disk_are_the_budgets(family, dtype, correction, tiny_model, samples, tmp_path):
    model = tiny_model(family).to(dtype)
    settings, layout = method(correction=correction), layout_of(model)
    found, plan, _ = compressed(model, settings, samples)
    save_compressed(found, tmp_path / "checkpoint")
    names = [ref.name for ref in layout.linears]
    assert bytes_of_weights(tmp_path / "checkpoint", names) == plan.bytes_after
    assert plan.bytes_before == layout.parameters * dtype.itemsize
    # At most what the steps between two options leave: two ranks of the largest matrix, unrounded.
    most = settings.budget(layout)
    assert most - 2 * (32 + 128) * dtype.itemsize < plan.bytes_after <= most == int(0.3 * plan.bytes_before + 1e-6)
    # More than one form stands, or the knapsack would have had nothing to choose.
    assert len({plan.bits.get(name) for name in names}) > 1
    halves = {ref.name: [".down", ".up"] if plan.ranks[ref.name] < ref.full_rank else [""] for ref in layout.linears}
    assert set(roundings_of(found)) == {f"{name}{half}" for name in plan.bits for half in halves[name]}
    json.dumps(plan.as_json())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_loads_it(family, tiny_model, samples, tmp_path):
    found, _, _ = compressed(tiny_model(family), method(), samples)
    save_compressed(found, tmp_path / "checkpoint")
    out = tmp_path / "logits.pt"
    warm.run(["-c", FRESH, str(tmp_path / "checkpoint"), str(out)], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(out), logits(found))
    save_dense(found, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.config.model_type == found.config.model_type
    torch.testing.assert_close(logits(dense), logits(found), rtol=1e-3, atol=1e-4)


def test_the_choice_loses_least_of_all(tiny_model, samples):
    """Three matrices, every combination of form and rank: none that fits loses less, but for what no hull has."""
    model = tiny_model("llama")
    context = Context(model, layout_of(model), samples)
    settings = method(rank_multiple=8)
    found = settings.calibrate(context)
    price, *others = settings.storage.prices(4)
    candidates = [c for c in found.candidates if c.role in ("q", "k", "down") and c.block == 0]
    forms = [[type(c)(**{**vars(c), "price": p}) for p in (price, *others)] for c in candidates]
    for share in (0.2, 0.3, 0.5):
        budget = Budget(int(share * sum(f[0].dense_cost for f in forms)), 8)
        chosen = choose_forms(forms, budget)
        options = [
            [(form.cost(r), form.loss(r)) for form in of for r in (*range(8, form.break_even + 1, 8), form.full_rank)]
            for of in forms
        ]
        best = min(
            sum(loss for _, loss in pick)
            for pick in itertools.product(*options)
            if sum(cost for cost, _ in pick) <= budget.parameters
        )
        assert sum(form.cost(rank) for form, rank in chosen.values()) <= budget.parameters
        lost = sum(form.loss(rank) for form, rank in chosen.values())
        assert best <= lost * (1 + 1e-9)
        assert lost <= 1.3 * best, share


def test_bits_are_worth_their_bytes(tiny_model, samples):
    """At equal bytes, the forms together are predicted to lose no more than each alone."""
    model = tiny_model("llama")
    lost = {}
    for bits in ((), (8,), (4,), (8, 4)):
        storage = Factors(bits=bits, group=16)
        _, plan, _ = compressed(model, method(storage=storage, ratio=0.7), samples)
        lost[bits] = sum(plan.scores.values())
    assert lost[8, 4] <= min(lost.values())
    assert lost[8, 4] < 0.5 * lost[()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allocation": Uniform()}, "the allocation uniform decides ranks alone: use allocation=lagrangian"),
        ({"truncation": Plain()}, "the truncation plain does not say what rounding loses"),
        ({"structure": Channels()}, "method.structure=channels has no price in bytes"),
        ({"correction": Refine()}, "method.correction=refine trains weights"),
        ({"ratio": 0.99}, r"a budget of \d+ bytes for 21 matrices is too small"),
    ],
)
def test_what_does_not_go_with_bits_is_refused_from_shapes_alone(settings, message, tiny_model):
    with pytest.raises(ConfigError, match=message):
        method(**settings).check(layout_of(tiny_model("llama")))


def test_experts_are_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"this mixtral has experts: leave method\.storage\.bits empty"):
        method(roles=("expert_gate",)).check(layout_of(tiny_model("mixtral")))


def test_the_optimal_truncation_goes_without_gradients(tiny_model, samples):
    settings = method(truncation=Optimal())
    assert settings.request(layout_of(tiny_model("llama"))).needs().gradient is None
    _, plan, _ = compressed(tiny_model("llama"), settings, samples)
    assert plan.bits
