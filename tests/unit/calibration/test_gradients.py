import pytest
import torch
from torch.nn.functional import cross_entropy

from lowrank_kit.calibration import gradients
from lowrank_kit.calibration.gradients import stream_gradients
from lowrank_kit.calibration.statistics import GradientRequest
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


def by_autograd(model, layout, batches, share=None):
    """Every quantity in float64, one unpadded row at a time, from one ordinary backward pass each.

    ``share`` (g [tokens, out] of one row) -> what of it the gram sums, and over how many predicted tokens.
    """
    model = model.double()
    seen, handles = {}, []
    for ref in layout.linears:
        module = model.get_submodule(ref.name)
        module.weight.requires_grad_(True)

        def hook(_module, inputs, output, name=ref.name):
            output.retain_grad()
            seen[name] = output

        handles.append(module.register_forward_hook(hook))
    share = share or (lambda g: (g, len(g) - 1))
    sums = {ref.name: {"gram": 0, "energy": 0, "fisher": 0, "mean": 0} for ref in layout.linears}
    predicted = positions = 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask.bool()]
            model.zero_grad()
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            (-logits.log_softmax(-1)[range(len(row) - 1), row[1:]]).sum().backward()
            predicted += len(row) - 1
            for ref in layout.linears:
                # OPT flattens the tokens itself.
                g, of_row = share(seen[ref.name].grad.flatten(0, -2))
                weight = weight_of(model.get_submodule(ref.name)).detach()
                gradient = model.get_submodule(ref.name).weight.grad
                # GPT-2 stores its weights transposed.
                gradient = gradient.T if model.config.model_type == "gpt2" else gradient
                side = g if ref.out_features <= ref.in_features else g @ weight
                part = {"gram": side.T @ side, "energy": g.square().sum()}
                part |= {"fisher": gradient.square().sum(0), "mean": gradient}
                sums[ref.name] = {quantity: sums[ref.name][quantity] + part[quantity].clone() for quantity in part}
            positions += of_row
    for handle in handles:
        handle.remove()
    counts = {"gram": positions, "energy": positions, "fisher": predicted, "mean": predicted}
    return {name: {q: value / counts[q] for q, value in parts.items()} for name, parts in sums.items()}


ALL = GradientRequest(moments=True, fisher=True, mean=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_autograd_row_by_row(family, tiny_model, batches):
    model = tiny_model(family)
    layout = layout_of(model)
    found = {}
    for _, statistics in stream_gradients(model, layout, batches, layout.linears, ALL):
        found |= statistics
    reference = by_autograd(model, layout, batches)
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        for quantity, value in expected.items():
            actual = torch.as_tensor(getattr(found[name], quantity)).double()
            assert actual.shape == value.shape
            assert (actual - value).norm() <= 1e-5 * value.norm(), (name, quantity)


def test_in_bfloat16_nothing_is_lost_in_the_sums(tiny_model):
    """Against float64 sums of the very same bfloat16 inputs and gradients, over many batches."""
    model = tiny_model("llama", initializer_range=0.2).bfloat16().requires_grad_(True)
    layout = layout_of(model)
    ids = torch.randint(3, 64, (128, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids.split(1)]
    exact = {ref.name: torch.zeros(ref.out_features, ref.in_features, dtype=torch.float64) for ref in layout.linears}
    inputs, handles = {}, []
    for ref in layout.linears:

        def read(_module, args, name=ref.name):
            inputs[name] = args[0].detach()[0].double()

        def returned(_module, _towards, at_output, name=ref.name):
            exact[name] += at_output[0][0].double().T @ inputs[name]

        module = model.get_submodule(ref.name)
        handles += [module.register_forward_pre_hook(read), module.register_full_backward_hook(returned)]
    for rows in ids:
        logits = model(input_ids=rows[None], use_cache=False).logits[0, :-1].float()
        cross_entropy(logits, rows[1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    for _, statistics in stream_gradients(model, layout, batches, layout.linears, GradientRequest(mean=True)):
        for name, found in statistics.items():
            assert found.mean.dtype == torch.float32
            expected = exact[name] / (128 * 11)
            assert (found.mean.double() - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize(
    ("clipping", "margin"), [((0.5, 1.5), 0.0), (None, 0.125), ((0.1, 10.0), 0.125), ((0.0, 1.0), 0.3)]
)
def test_clipped_gradients_and_windows_without_their_ends(clipping, margin, tiny_model, batches):
    model = tiny_model("llama", initializer_range=0.3)
    layout = layout_of(model)

    def share(g):
        ends = int(margin * len(g))
        middle = g[ends : len(g) - ends].clone()
        if clipping is not None:
            norms = [float(token.norm()) for token in middle]
            mean = sum(norms) / sum(norm > 1e-9 for norm in norms)
            for token, norm in zip(middle, norms, strict=True):
                if norm > 1e-9:
                    token *= min(max(norm, clipping[0] * mean), clipping[1] * mean) / norm
        return middle, len(middle) - (ends == 0)

    request = GradientRequest(moments=True, clipping=clipping, margin=margin)
    found = {}
    for _, statistics in stream_gradients(model, layout, batches, layout.linears, request):
        found |= statistics
    plain = by_autograd(model, layout, batches)
    for name, expected in by_autograd(model, layout, batches, share).items():
        for quantity in ("gram", "energy"):
            actual = torch.as_tensor(getattr(found[name], quantity)).double()
            assert (actual - expected[quantity]).norm() <= 1e-5 * expected[quantity].norm(), (name, quantity)
        assert (expected["gram"] - plain[name]["gram"]).norm() > 1e-3 * plain[name]["gram"].norm()


def test_several_passes_give_what_one_does_and_leave_the_model_alone(tiny_model, batches, monkeypatch):
    model = tiny_model("llama")
    layout = layout_of(model)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    once = dict(stream_gradients(model, layout, batches, layout.linears, ALL))
    monkeypatch.setattr(gradients, "STATISTICS_BYTES", 1)
    several = dict(stream_gradients(model, layout, batches, layout.linears, ALL))
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
    found = dict(stream_gradients(model, layout, batches, layout.linears, GradientRequest(moments=True), skip={0, 2}))
    assert list(found) == [1]
    assert all(statistics.mean is None and statistics.fisher is None for statistics in found[1].values())


def test_a_model_without_head_is_refused(tiny_model, batches):
    model = tiny_model("llama", "base")
    layout = layout_of(model)
    with pytest.raises(LowRankKitError, match="causal"):
        next(stream_gradients(model, layout, batches, layout.linears, GradientRequest(moments=True)))
