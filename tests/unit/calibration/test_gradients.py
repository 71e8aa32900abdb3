import pytest
import torch
from torch.nn.functional import cross_entropy

from lowrank_kit.calibration import gradients
from lowrank_kit.calibration.gradients import stream_gradients
from lowrank_kit.errors import LowRankKitError
from lowrank_kit.models.layout import layout_of
from lowrank_kit.models.linear import weight_of

FAMILIES = ["llama", "gemma2", "phi3", "opt", "gpt2"]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    mask[2, 10:] = 0
    return [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]


def by_autograd(model, layout, batches):
    """Every quantity from retained gradients of one ordinary backward pass, in float64."""
    seen, handles = {}, []
    for ref in layout.linears:

        def hook(_module, inputs, output, name=ref.name):
            output.retain_grad()
            seen[name] = (inputs[0].detach(), output)

        handles.append(model.get_submodule(ref.name).register_forward_hook(hook))
    model = model.double()
    ids, mask = (torch.cat([b[k] for b in batches]) for k in ("input_ids", "attention_mask"))
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    found = {}
    for ref in layout.linears:
        # OPT flattens the tokens itself.
        x, g = seen[ref.name][0].flatten(0, -2), seen[ref.name][1].grad.flatten(0, -2)
        weight = weight_of(model.get_submodule(ref.name))
        side = g if ref.out_features <= ref.in_features else g @ weight
        found[ref.name] = {
            "gram": side.T @ side,
            "energy": g.square().sum(),
            "rows": (g.square() * x.square().sum(1, keepdim=True)).sum(0),
            "mean": g.T @ x / mask.sum(),
        }
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_autograd(family, tiny_model, batches):
    model = tiny_model(family)
    layout = layout_of(model)
    found = {}
    for _, statistics in stream_gradients(model, layout, batches, layout.linears, with_mean=True):
        found |= statistics
    reference = by_autograd(model, layout, batches)
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        assert found[name].tokens == 65
        for quantity, value in expected.items():
            actual = torch.as_tensor(getattr(found[name], quantity)).double()
            assert (actual - value).norm() <= 1e-5 * value.norm(), (name, quantity)


def test_several_passes_give_what_one_does_and_leave_the_model_alone(tiny_model, batches, monkeypatch):
    model = tiny_model("llama")
    layout = layout_of(model)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    once = dict(stream_gradients(model, layout, batches, layout.linears, with_mean=True))
    monkeypatch.setattr(gradients, "STATISTICS_BYTES", 1)
    several = dict(stream_gradients(model, layout, batches, layout.linears, with_mean=True))
    assert list(once) == list(several) == [2, 1, 0]
    for block, statistics in once.items():
        for name, expected in statistics.items():
            torch.testing.assert_close(several[block][name].gram, expected.gram)
            torch.testing.assert_close(several[block][name].mean, expected.mean)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_known_blocks_are_not_visited_again(tiny_model, batches):
    model = tiny_model("llama")
    layout = layout_of(model)
    found = dict(stream_gradients(model, layout, batches, layout.linears, with_mean=False, skip={0, 2}))
    assert list(found) == [1]
    assert all(statistics.mean is None for statistics in found[1].values())


def test_a_model_without_head_is_refused(tiny_model, batches):
    model = tiny_model("llama", "base")
    layout = layout_of(model)
    with pytest.raises(LowRankKitError, match="causal"):
        next(stream_gradients(model, layout, batches, layout.linears, with_mean=False))
