from copy import deepcopy

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from lowrank_kit.config import RecoveryConfig, TrainConfig
from lowrank_kit.data.padding import RightPadded
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.factored import share_down
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of
from lowrank_kit.spectral.factors import LowRankFactors
from lowrank_kit.storages.pivot import Pivot
from lowrank_kit.storages.two_factors import Factors
from lowrank_kit.training.fit import Examples, Session
from lowrank_kit.training.recover import distillation_loss, learner, recover, replaced_linears

BLOCK, OTHER = "model.layers.1.", "model.layers.2."


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


@pytest.fixture
def compressed(tiny_model):
    """A model of three blocks; of the second one everything but `o` and `down` is factored."""
    model = deepcopy(tiny_model("llama"))
    for ref in layout_of(model).linears:
        if ref.block == 1 and ref.role not in ("o", "down"):
            u, s, v = torch.linalg.svd(weight_of(model.get_submodule(ref.name)).detach(), full_matrices=False)
            storage = Factors() if ref.kind == "attention" else Pivot()
            storage.put(model, [ref.name], LowRankFactors(u[:, :6] * s[:6], v[:6]))
    return model


def rows(count=8, length=12):
    ids = torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.fixture
def train(tokenizer, tmp_path):
    def run(model, teacher=None, **settings):
        schedule = {"max_steps": 8, "batch_size": 4, "learning_rate": 1e-2, "scheduler": "constant"}
        recovery = {name: settings.pop(name) for name in ("what", "rank") if name in settings}
        return recover(
            model,
            Examples(rows(), RightPadded(tokenizer.pad_token_id)),
            RecoveryConfig(**recovery),
            TrainConfig(**{**schedule, **settings}),
            Session(tmp_path / "checkpoints", "cpu", 0),
            teacher=teacher,
        )

    return run


def changed(before, after):
    after = after.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not before[name].equal(after[name])}


def copies(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


FACTORS = {f"{part}.{half}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
           "mlp.gate_proj", "mlp.up_proj") for half in ("up", "down")}  # fmt: skip
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
DENSE = {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_factors_and_norms_of_the_replaced_block_change_and_nothing_else(compressed, train):
    before = copies(compressed)
    done = train(compressed, what="factors")
    assert changed(before, done.merged()) == {BLOCK + name for name in FACTORS | NORMS}
    assert done.trained_parameters == sum(before[BLOCK + name].numel() for name in FACTORS | NORMS)


def test_lora_changes_the_linears_of_the_replaced_block_by_its_rank_and_nothing_else(compressed, train):
    before = copies(compressed)
    model = train(compressed, what="lora", rank=2).merged()
    assert changed(before, model) == {BLOCK + name for name in FACTORS | DENSE}
    for name in FACTORS | DENSE:
        difference = (model.state_dict()[BLOCK + name] - before[BLOCK + name]).double()
        s = torch.linalg.svdvals(difference)
        assert s[1] > 1e-4
        assert s[2] < 1e-4 * s[0]


def test_a_basis_that_several_linears_share_is_trained_once_by_factors_and_not_by_lora(compressed, train):
    first, second = BLOCK + "mlp.gate_proj", BLOCK + "mlp.up_proj"
    share_down(compressed, second, first)
    before = copies(compressed)
    lora = train(deepcopy(compressed), what="lora").merged()
    moved = changed(before, lora)
    assert {f"{first}.up.weight", f"{second}.up.weight"} <= moved
    assert not {f"{first}.down.weight", f"{second}.down.weight"} & moved
    factors = train(compressed, what="factors").merged()
    ours, theirs = (factors.get_submodule(name).down.weight for name in (first, second))
    assert ours is theirs
    assert not ours.equal(before[f"{first}.down.weight"])


def test_of_a_model_without_factors_lora_takes_every_block_and_factors_are_refused(tiny_model):
    layout = layout_of(tiny_model("gpt2"))
    assert replaced_linears(layout) == list(layout.linears)
    with pytest.raises(LowRankKitError, match=r"no linear .* is factored.*recovery=lora"):
        learner(deepcopy(tiny_model("gpt2")), RecoveryConfig(what="factors"))


def test_the_distillation_loss_is_the_divergence_over_the_predicted_tokens():
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 5, 7, generator=draw) for _ in range(2))
    labels = torch.tensor([[-100, -100, 1, 2, -100], [4, 5, 6, 1, 2]])
    # Position t predicts token t + 1.
    predicted = [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    terms = [float((p[i] * (p[i] / q[i]).log()).sum()) for i in predicted]
    assert float(distillation_loss(ours, theirs, labels)) == pytest.approx(sum(terms), rel=1e-5)


def test_the_gradient_of_distillation_is_that_of_cross_entropy_with_soft_labels(tiny_model, compressed):
    ids = torch.tensor(rows()["input_ids"])
    with torch.no_grad():
        theirs = tiny_model("llama")(input_ids=ids).logits
    ours = compressed(input_ids=ids).logits
    weight = compressed.get_submodule(BLOCK + "mlp.gate_proj").up.weight
    flat = (ours[:, :-1].reshape(-1, 64), theirs[:, :-1].reshape(-1, 64).softmax(-1))
    [expected] = torch.autograd.grad(F.cross_entropy(*flat, reduction="sum"), weight, retain_graph=True)
    [found] = torch.autograd.grad(distillation_loss(ours, theirs, ids), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["factors", "lora"])
def test_gradient_checkpointing_and_accumulation_reach_the_same_weights(compressed, train, what, tmp_path):
    plain = train(deepcopy(compressed), what=what, max_steps=2).merged().state_dict()
    other = (
        train(compressed, what=what, max_steps=2, batch_size=2, gradient_accumulation=2, gradient_checkpointing=True)
        .merged()
        .state_dict()
    )
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-3, atol=2e-5)


def test_the_first_logged_loss_of_a_distillation_is_the_divergence_itself(tiny_model, compressed, train):
    whole = torch.tensor(rows()["input_ids"])
    with torch.no_grad():
        logits = [model(input_ids=whole).logits for model in (compressed, tiny_model("llama"))]
    expected = float(distillation_loss(*logits, whole)) / whole[:, 1:].numel()
    done = train(compressed, tiny_model("llama"), what="factors", batch_size=8, learning_rate=1e-3)
    losses = [entry["loss"] for entry in done.history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-3)
