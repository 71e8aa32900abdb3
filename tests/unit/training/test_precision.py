"""In half precision too, small steps move the weights that learn."""

import datasets
import pytest
import torch

from lowrank_kit.adapters.full_ft import FullFineTuning
from lowrank_kit.adapters.lora import Lora
from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.config import TrainConfig
from lowrank_kit.models.layout import layout_of
from lowrank_kit.training.adapters import load_adapted
from lowrank_kit.training.fit import Examples, Session, fit
from lowrank_kit.training.initialise import adapt, adapted

HALVES = [torch.bfloat16, torch.float16]


def train(ready, folder, labels, steps=4):
    """The parameters that learn, before and after a few steps of 1e-5."""
    ids = torch.randint(3, 64, (8, 10), generator=torch.Generator().manual_seed(0)).tolist()
    # T5's classifiers read the state at the last token of id 2.
    ids = [[*row, 2] for row in ids]
    rows = [{"input_ids": row, "labels": row if labels is None else i % labels} for i, row in enumerate(ids)]
    before = {n: p.detach().clone() for n, p in ready.model.named_parameters() if p.requires_grad}
    history = fit(
        ready.model,
        Examples(
            datasets.Dataset.from_list(rows),
            lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]},
        ),
        TrainConfig(max_steps=steps, batch_size=4, learning_rate=1e-5, warmup_ratio=0.0, scheduler="constant"),
        Session(folder, "cpu", 0),
        optimizer=ready.optimizer,
    )
    after = {n: p.detach().clone() for n, p in ready.model.named_parameters() if p.requires_grad}
    return before, after, history[0]["loss"]


def share_moved(before, after):
    """The share of the weights that have a gradient's direction to go in and went."""
    moved = sum(int((before[n] != after[n]).sum()) for n in before)
    return moved / sum(p.numel() for p in before.values())


def full(model, task_type, roles=None):
    method = FullFineTuning(name="full_ft", roles=roles)
    plan = method.plan(layout_of(model), {})
    return adapted(method, model, plan, {}, None, new_modules=[], task_type=task_type)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("roles", [None, ("q", "down")])
def test_full_fine_tuning_moves_as_many_weights_as_in_float32(dtype, roles, tiny_model, tmp_path):
    shares, losses = [], []
    for chosen in (torch.float32, dtype):
        ready = full(tiny_model("llama").to(chosen), "CAUSAL_LM", roles)
        before, after, loss = train(ready, tmp_path / str(chosen), None)
        shares.append(share_moved(before, after))
        losses.append(loss)
    # Rows of the embedding that no token reads stay.
    assert shares[1] == pytest.approx(shares[0], abs=0.01)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_was_trained_is_saved_in_the_dtype_it_came_in_with_its_steps(dtype, tiny_model, tmp_path):
    ready = full(tiny_model("llama").to(dtype), "CAUSAL_LM")
    _, after, _ = train(ready, tmp_path / "checkpoints", None, steps=30)
    ready.export(tmp_path / "saved", "base")
    saved = load_adapted(FullFineTuning(name="full_ft"), tiny_model("llama").to(dtype), tmp_path / "saved")
    assert saved.dtype == dtype
    assert saved.config.dtype == dtype
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, after[name].to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("family", "new"),
    [("bert", ["classifier"]), ("bert", ["bert.pooler", "classifier"]), ("roberta", ["classifier"]),
     ("llama", ["score"]), ("gpt2", []), ("t5", ["classification_head"])],
)  # fmt: skip
def test_the_head_beside_an_adapter_learns_in_float32(dtype, family, new, tiny_model, tmp_path):
    torch.manual_seed(0)
    model = tiny_model(family, "classification").to(dtype)
    head = layout_of(model).head
    samples = CalibrationSamples(())
    ready = adapt(model, Lora(name="lora", rank=2), samples, new_modules=new, task_type="SEQ_CLS")
    assert {p.dtype for p in ready.model.parameters() if p.requires_grad} == {torch.float32}
    before, after, _ = train(ready, tmp_path / "checkpoints", 2)
    heads = {n: p for n, p in before.items() if any(f".{part}." in n for part in {head, *new})}
    assert heads
    assert share_moved(heads, after) > 0.97
    ready.export(tmp_path / "adapter", "base")
    again = load_adapted(
        Lora(name="lora", rank=2), tiny_model(family, "classification").to(dtype), tmp_path / "adapter"
    )
    stored = again.state_dict()
    for name in heads:
        assert torch.equal(stored[name], after[name].to(dtype))


def test_a_trained_head_learns_at_the_rate_of_the_rest_and_a_new_one_at_its_own(tiny_model):
    settings = TrainConfig(learning_rate=1e-3, head_learning_rate=1e-1)
    for new, rate in (([], 1e-3), (["classifier"], 1e-1)):
        ready = adapt(
            tiny_model("bert", "classification"), Lora(name="lora", rank=2), CalibrationSamples(()), new_modules=new,
            task_type="SEQ_CLS",
        )  # fmt: skip
        rates = {id(p): group["lr"] for group in ready.optimizer(settings).param_groups for p in group["params"]}
        learning = {n: p for n, p in ready.model.named_parameters() if p.requires_grad}
        heads = {n for n in learning if ".classifier." in n}
        assert len(heads) == 2
        assert {rates[id(learning[n])] for n in heads} == {rate}
        assert {rates[id(p)] for n, p in learning.items() if n not in heads} == {1e-3}
