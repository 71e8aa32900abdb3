"""Every method against PEFT used by hand, on a tiny model of a real architecture."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import EvaConfig, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch.nn.functional import cross_entropy

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
from lowrank_kit.config import TrainConfig
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.training.fit import Examples, Session, fit
from lowrank_kit.training.initialise import adapt, adapted

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, RATE = 4, 6.0, 1e-2
METHODS = {
    "lora": (Lora, {}),
    "rslora": (Lora, {"rslora": True}),
    "lora_up": (Lora, {"train": "up"}),
    "dora": (Dora, {}),
    "pissa": (Pissa, {}),
    "pissa_16": (Pissa, {"iterations": 16}),
    "milora": (Milora, {}),
    "corda": (Corda, {}),
    "corda_kpm": (Corda, {"mode": "kpm"}),
    "eva": (Eva, {}),
    "eva_even": (Eva, {"rho": 1.0}),
    "olora": (Olora, {}),
    "lora_ga": (LoraGA, {}),
    "lora_ga_gd": (LoraGA, {"direction": "ArBr", "scale": "gd_scale"}),
    "mica": (Mica, {}),
    "lora_plus": (LoraPlus, {"ratio": 8.0}),
}
PEFT_OPTIONS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_16": {"init_lora_weights": "pissa_niter_16"},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "eva_even": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
    "olora": {"init_lora_weights": "olora"},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "lora_ga_gd": {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": LoraGAConfig(direction="ArBr", scale="gd_scale"),
    },
    "mica": {"init_lora_weights": "mica"},
}


def token_ids(rows=8, length=16, seed=1):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def samples():
    return CalibrationSamples(tuple({"input_ids": row} for row in token_ids(seed=2)), batch_size=4)


def by_hand(name, model):
    """What somebody with PEFT's documentation at hand would write."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM", **PEFT_OPTIONS.get(name, {})
    )
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in token_ids(seed=2).split(4)
    ]  # fmt: skip

    def step():
        for batch in batches:
            # transformers' own loss would round logits to float32.
            predictions = model(**batch).logits[:, :-1].flatten(0, 1)
            cross_entropy(predictions, batch["input_ids"][:, 1:].flatten()).backward()

    original = deepcopy(model)
    torch.manual_seed(0)
    if name.startswith("lora_ga"):
        preprocess_loraga(model, config, step)
    adapted_by_hand = get_peft_model(model, config)
    if name.startswith("eva"):
        initialize_lora_eva_weights(adapted_by_hand, batches, show_progress_bar=False)
    for path, parameter in adapted_by_hand.named_parameters():
        if name == "lora_up" and "lora_A" in path:
            parameter.requires_grad = False
    if name == "milora":
        minor_components(adapted_by_hand)
    if name.startswith("corda"):
        kept = slice(-RANK, None) if name == "corda_kpm" else slice(RANK)
        weighted_components(adapted_by_hand, original, kept)
    return adapted_by_hand


@torch.no_grad()
def weighted_components(wrapped, original, kept):
    """CorDA in float64 from the paper's equations: PEFT computes it in float32 throughout."""
    inputs = {}
    for path, module in original.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            note = partial(lambda path, _, given: inputs.setdefault(path, []).append(given[0][0].double()), path)
            module.register_forward_pre_hook(note)
    for ids in token_ids(seed=2):
        original(input_ids=ids[None])
    for path, samples_of in inputs.items():
        scaled = [sample / sample.max().abs() for sample in samples_of]
        second = sum(sample.T @ sample for sample in scaled) / len(scaled)
        second += 0.01 * second.diagonal().mean() * torch.eye(len(second))
        weight = original.get_submodule(path).weight.double()
        left, values, right = torch.linalg.svd(weight @ second, full_matrices=False)
        up, values, down = left[:, kept], values[kept], (right @ torch.linalg.inv(second))[kept]
        # A pair of vectors is as good with both signs turned.
        signs, root = up[up.abs().argmax(0), range(RANK)].sign(), (values / (ALPHA / RANK)).sqrt()
        layer = wrapped.get_base_model().get_submodule(path)
        layer.lora_B["default"].weight.copy_(up * signs * root)
        layer.lora_A["default"].weight.copy_((signs * root)[:, None] * down)
        layer.base_layer.weight.copy_(weight - up * values @ down)


@torch.no_grad()
def minor_components(model):
    """MiLoRA is not in PEFT: the residual keeps all but the r smallest components, whatever the scaling."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            weight, scaling = module.base_layer.weight, ALPHA / RANK
            values, right = torch.linalg.eigh(weight.double().T @ weight.double())
            # Ascending, and the null space of a wide matrix comes first.
            skipped = max(weight.shape[1] - weight.shape[0], 0)
            right = right[:, skipped : skipped + RANK].flip(1).T
            root = values[skipped : skipped + RANK].flip(0).sqrt()
            left = weight.double() @ right.T / root
            sign = torch.sign(left[left.abs().argmax(0), range(RANK)])
            module.lora_B["default"].weight.copy_(sign * left * (root / scaling).sqrt())
            module.lora_A["default"].weight.copy_((sign * (root / scaling).sqrt())[:, None] * right)
            weight -= (left * root @ right).float()


def step_by_hand(name, model):
    ids = token_ids()
    if name == "lora_plus":
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=8.0)
    else:
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.0)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def step_of_ours(ready, folder):
    rows = datasets.Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in token_ids()])
    settings = TrainConfig(
        max_steps=1, batch_size=len(rows), learning_rate=RATE, warmup_ratio=0.0, scheduler="constant", max_grad_norm=1e9
    )
    fit(
        ready.model,
        Examples(rows, lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}),
        settings,
        Session(folder, "cpu", 0),
        optimizer=ready.optimizer,
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids(seed=5)).logits


def ours(name, model):
    kind, settings = METHODS[name]
    torch.manual_seed(0)
    method = kind(name=name, rank=RANK, alpha=ALPHA, **settings)
    return adapt(model, method, samples(), task_type="CAUSAL_LM")


def exact_svd(matrix, q, niter):
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :q], values[:q], right[:q].T


def assert_equal_where_it_matters(found, expected):
    for path, parameter in expected.items():
        # The sign of a gradient next to zero is rounding's, and Adam's first step is the rate times that sign.
        sure = parameter.grad.abs() >= 1e-3 * parameter.grad.abs().max()
        assert sure.sum() > 0.9 * sure.numel() or "lora_" not in path, path
        error = (found[path] - parameter)[sure].abs().max()
        assert error <= 1e-5 * parameter.abs().max(), path


@pytest.mark.parametrize("name", METHODS)
def test_one_step_is_that_of_peft_used_by_hand(tiny_model, tmp_path, monkeypatch, name):
    original = tiny_model("llama")
    if name == "corda_kpm":
        # The smallest components magnify the rounding of activations.
        original = original.double()
    if name.startswith("lora_ga"):
        # PEFT sums the gradient batch by batch, we row by row; a randomised SVD in float32 would magnify the rounding.
        original = original.double()
        monkeypatch.setattr(torch, "svd_lowrank", exact_svd)
    ready, reference = ours(name, deepcopy(original)), by_hand(name, deepcopy(original))
    before = logits(reference)
    assert (logits(original) - before).abs().max() <= 1e-5 * before.abs().max()
    assert torch.allclose(logits(ready.model), before, atol=1e-5)
    learning = {path: p for path, p in ready.model.named_parameters() if p.requires_grad}
    expected = {path: p for path, p in reference.named_parameters() if p.requires_grad}
    assert learning.keys() == expected.keys()
    assert ready.plan.trained_parameters == ready.trained_parameters == sum(p.numel() for p in learning.values())
    step_by_hand(name, reference)
    step_of_ours(ready, tmp_path)
    after = logits(reference)
    assert (after - before).abs().max() > 1e-2 * before.abs().max()
    assert torch.allclose(logits(ready.model), after, atol=2e-5 * float(after.abs().max()))
    assert_equal_where_it_matters(learning, expected)


@pytest.mark.parametrize("name", ["corda", "corda_kpm"])
def test_corda_is_that_of_peft_up_to_its_single_precision(tiny_model, name):
    model = tiny_model("llama")
    mode = METHODS[name][1].get("mode", "ipm")
    options = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method=mode)}
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    ready = ours(name, deepcopy(model))

    @torch.no_grad()
    def run():
        for ids in token_ids(seed=2):
            model(input_ids=ids[None])

    preprocess_corda(model, config, run_model=run)
    reference = get_peft_model(model, config).get_base_model()
    for path in ready.plan.ranks:
        layer, found = reference.get_submodule(path), ready.factors(path)
        expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert (found.up @ found.down - expected).norm() <= 1e-3 * expected.norm(), path


def test_a_step_of_full_fine_tuning_is_that_of_a_plain_loop(tiny_model, tmp_path):
    original = tiny_model("llama")
    method, layout = FullFineTuning(name="full_ft"), layout_of(original)
    options = {"new_modules": (), "task_type": None}
    ready = adapted(method, deepcopy(original), method.plan(layout, {}), {}, None, **options)
    assert ready.trained_parameters == sum(p.numel() for p in original.parameters())
    step_by_hand("full_ft", original)
    step_of_ours(ready, tmp_path)
    expected = logits(original)
    assert torch.allclose(logits(ready.model), expected, atol=2e-5 * float(expected.abs().max()))
    assert_equal_where_it_matters(dict(ready.model.named_parameters()), dict(original.named_parameters()))


def test_full_fine_tuning_of_some_roles_leaves_the_rest_alone(tiny_model):
    model = tiny_model("bert", "classification")
    method, layout = FullFineTuning(name="full_ft", roles=("q", "v")), layout_of(model)
    plan = method.plan(layout, {})
    ready = adapted(method, model, plan, {}, None, new_modules=("classifier",), task_type="SEQ_CLS")
    learning = {path for path, p in model.named_parameters() if p.requires_grad}
    assert {path.rpartition(".")[0].rpartition(".")[2] for path in learning} == {"query", "value", "classifier"}
    assert plan.trained_parameters == 3 * 2 * 32 * 32
    assert ready.trained_parameters == plan.trained_parameters + 3 * 2 * 32 + 2 * 32 + 2


@pytest.mark.parametrize(("family", "head"), [("gpt2", "causal"), ("bert", "classification"), ("t5_gated", "seq2seq")])
@pytest.mark.parametrize("name", ["dora", "pissa", "milora", "corda", "eva", "olora", "lora_ga", "mica"])
def test_every_family_starts_as_the_original(tiny_model, name, family, head):
    original = tiny_model(family, head)
    data = samples()
    if head == "classification":
        data = CalibrationSamples(tuple({**s, "labels": torch.tensor(i % 2)} for i, s in enumerate(data.sequences)))
    kind, settings = METHODS[name]
    method = kind(name=name, rank=RANK, alpha=ALPHA, **settings)
    if (name, family) == ("olora", "gpt2"):
        with pytest.raises(LowRankKitError, match="Conv1D layers of a gpt2"):
            adapt(deepcopy(original), method, data)
        return
    ready = adapt(deepcopy(original), method, replace(data, batch_size=3))
    inputs = {"input_ids": token_ids()} | ({"decoder_input_ids": token_ids(seed=3)} if head == "seq2seq" else {})
    with torch.no_grad():
        expected, found = original(**inputs).logits, ready.model.eval()(**inputs).logits
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_eva_says_where_its_directions_do_not_settle(tiny_model, monkeypatch):
    monkeypatch.setattr("lowrank_kit.adapters.eva.MOST_ROUNDS", 2)
    with pytest.raises(LowRankKitError, match="not settled after 2 rounds of 2 calibration batches: raise"):
        adapt(tiny_model("llama"), Eva(name="eva", rank=4, tau=1.0), samples())


def test_ranks_of_eva_move_at_equal_sum_and_follow_the_patterns(tiny_model):
    model = tiny_model("llama")
    ready = adapt(model, Eva(name="eva", rank=4, alpha=4.0), samples())
    ranks = ready.plan.ranks
    assert sum(ranks.values()) == 4 * len(layout_of(tiny_model("llama")).linears)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    assert all(ready.layer(name).scaling["default"] == 1.0 for name in ranks)


def test_eva_with_fewer_tokens_than_directions_says_so(tiny_model):
    few = CalibrationSamples(({"input_ids": torch.tensor([4, 5, 6])},))
    with pytest.raises(LowRankKitError, match=r"8 directions .* 3 tokens"):
        adapt(tiny_model("llama"), Eva(name="eva", rank=4), few)


@pytest.mark.parametrize("name", ["corda", "eva", "lora_ga"])
def test_an_empty_calibration_set_is_refused(tiny_model, name):
    kind, settings = METHODS[name]
    with pytest.raises(LowRankKitError, match="calibration set is empty"):
        adapt(tiny_model("llama"), kind(name=name, **settings), CalibrationSamples(()))


def test_lora_ga_of_a_classifier_without_labels_says_so(tiny_model):
    with pytest.raises(LowRankKitError, match="samples have none"):
        adapt(tiny_model("bert", "classification"), LoraGA(name="lora_ga"), samples())


def test_lora_ga_starts_from_the_loss_of_the_labels_where_there_are_some(tiny_model):
    def start(labels):
        rows = tuple({"input_ids": row, **labels(row)} for row in token_ids(seed=2))
        torch.manual_seed(0)
        return adapt(tiny_model("llama"), LoraGA(name="lora_ga", rank=2), CalibrationSamples(rows, batch_size=4))

    every, same = start(lambda row: {}), start(lambda row: {"labels": row})
    last = start(lambda row: {"labels": torch.where(torch.arange(len(row)) < 12, -100, row)})
    name = next(iter(every.plan.ranks))
    assert torch.equal(every.factors(name).down, same.factors(name).down)
    assert not torch.allclose(every.factors(name).down, last.factors(name).down, atol=1e-3)
