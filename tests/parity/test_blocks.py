"""Methods that take blocks away, or components inside them: ShortGPT, LaCo, GRASP, ReplaceMe, Prune&Comp."""

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch

from lowrank_kit.compressors.grasp import Grasp
from lowrank_kit.compressors.laco import LaCo
from lowrank_kit.compressors.prune_comp import PruneComp
from lowrank_kit.compressors.replace_me import ReplaceMe
from lowrank_kit.compressors.shortgpt import ShortGPT
from lowrank_kit.truncations.optimal import Optimal

BLOCKS = 6


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", initializer_range=0.2, num_hidden_layers=BLOCKS)


@torch.no_grad()
def states(model, rows):
    """Hidden states before every block and behind the last, before the final norm: [blocks + 1, rows, tokens, d]."""
    seen = []
    handles = [b.register_forward_pre_hook(lambda _m, x: seen.append(x[0].double())) for b in model.model.layers]
    handles.append(model.model.norm.register_forward_pre_hook(lambda _m, x: seen.append(x[0].double())))
    model(input_ids=rows)
    for handle in handles:
        handle.remove()
    return torch.stack(seen).numpy()


def influence(model, rows):
    """Arxiv 2403.03853, equation 1: 1 - E[cos] of what enters and leaves a block."""
    found, h = [], states(model, rows)
    for before, after in pairwise(h):
        cosines = [
            a @ b / np.sqrt((a @ a) * (b @ b))
            for a, b in zip(before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1]), strict=True)
        ]
        found.append(1 - np.mean(cosines))
    return found


def without(model, gone):
    """The model without these blocks."""
    copy = deepcopy(model)
    copy.model.layers = torch.nn.ModuleList(b for i, b in enumerate(copy.model.layers) if i not in gone)
    return copy


@torch.no_grad()
def logits(model, rows):
    return model(input_ids=rows, use_cache=False).logits


def test_shortgpt_drops_the_blocks_of_least_influence(model, rows, work):
    plan, compressed = work(model, ShortGPT(name="x", ratio=0.3))
    bi = influence(model, rows)
    gone = sorted(range(BLOCKS), key=lambda block: bi[block])[:2]
    assert set(range(BLOCKS)) - set(plan.kept_blocks) == set(gone)
    assert [plan.scores[f"block {b}"] for b in range(BLOCKS)] == pytest.approx(bi, rel=1e-4)
    torch.testing.assert_close(logits(compressed, rows), logits(without(model, gone), rows))


@pytest.mark.parametrize("differences", ["running", "original"])
def test_laco_merges_downwards_as_long_as_the_text_looks_the_same(differences, model, rows, work):
    """Arxiv 2402.11187, algorithm 1, with C = 3, I = 1, L = 0 and a threshold that rejects some merges."""
    short = rows[:4, :10]

    def merged(current, base, count):
        copy = deepcopy(current)
        target = dict(copy.model.layers[base].named_parameters())
        start = {name: value.clone() for name, value in target.items()}
        for member in current.model.layers[base + 1 : base + 1 + count]:
            for name, value in member.named_parameters():
                if differences == "original":
                    target[name].data += value.data - start[name].data
                elif value.ndim > 1:  # the released code touches matrices alone
                    target[name].data += value.data - target[name].data
        return without(copy, range(base + 1, base + 1 + count))

    def similarity(current):
        pairs = zip(states_at_the_end(model, short), states_at_the_end(current, short), strict=True)
        return np.mean([a.ravel() @ b.ravel() / np.sqrt((a**2).sum() * (b**2).sum()) for a, b in pairs])

    def collapse(threshold):
        current, base, needed, tried = model, BLOCKS - 1 - 3, 2, []
        while base >= 0 and needed:
            trial = merged(current, base, min(2, needed))
            tried.append(similarity(trial))
            if tried[-1] > threshold:
                current, needed = trial, needed - min(2, needed)
            base -= 1
        return current, needed, tried

    *_, tried = collapse(1.0)
    threshold = float(np.sort(tried)[-2] + np.sort(tried)[-1]) / 2  # only the best merge is accepted
    expected, needed, _ = collapse(threshold)
    assert needed == 0
    method = LaCo(name="x", ratio=0.3, threshold=threshold, differences=differences, sentences=4, sentence_tokens=10)
    plan, compressed = work(model, method)
    assert max(plan.scores[f"block {b}"] for b in range(BLOCKS) if f"block {b}" in plan.scores) == pytest.approx(
        max(tried), abs=1e-5
    )
    torch.testing.assert_close(logits(compressed, rows), logits(expected, rows), rtol=0, atol=1e-4)


@torch.no_grad()
def states_at_the_end(model, rows):
    return model.model(input_ids=rows, use_cache=False).last_hidden_state.double().numpy()


MLP, ATTENTION = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("propagate", [False, True])
def test_grasp_keeps_the_components_on_which_the_loss_depends(propagate, model, rows, work, seen, replaced, same_model):
    """Arxiv 2501.00339, algorithm 1: |sigma dL/dsigma| = |sigma u^T G v| in the blocks of least influence."""
    method = Grasp(name="x", ratio=0.2, selection="removed", removed_share=0.7, propagate=propagate)
    plan, compressed = work(model, method)
    bi = influence(model, rows)
    redundant = sorted(sorted(range(BLOCKS), key=lambda block: bi[block])[:2], reverse=True)
    assert {int(name.split(".")[2]) for name in plan.kept} == set(redundant)
    expected, original = {}, seen(model)
    for block in redundant:
        for part in (MLP, ATTENTION):
            # As published, what comes later in the model is compressed already when a block is scored.
            layers = seen(replaced(model, expected)) if propagate else original
            for name in (n for n in layers if f"layers.{block}." in n and n.endswith(part)):
                weight, gradient = layers[name].weight, layers[name].mean_gradient
                u, s, vh = np.linalg.svd(weight, full_matrices=False)
                score = [abs(s[k] * (u[:, k] @ gradient @ vh[k])) for k in range(len(s))]
                rows_, columns = weight.shape
                rank = int(rows_ * columns * 0.3 / (rows_ + columns))
                kept = sorted(np.argsort(score)[::-1][:rank].tolist())
                assert plan.kept[name] == kept, name
                expected[name] = sum(s[k] * np.outer(u[:, k], vh[k]) for k in kept)
    same_model(compressed, model, expected)


@torch.no_grad()
def mlp_outputs(model, rows, block):
    """What the MLP of a block writes, in float64: [rows, tokens, d]."""
    seen = []
    handle = model.model.layers[block].mlp.register_forward_hook(lambda _m, _x, y: seen.append(y.double()))
    model(input_ids=rows)
    handle.remove()
    return seen[0].numpy()


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_replace_me_maps_the_mlp_outputs_to_what_the_run_gives(ridge, model, rows, work):
    """Arxiv 2505.02819: T* = (M^T M + alpha I)^-1 M^T (L_i+n - Y_i) for the run across which states turn least."""
    plan, compressed = work(model, ReplaceMe(name="x", ratio=0.3, ridge=ridge))
    h = states(model, rows).reshape(BLOCKS + 1, -1, 32)
    norms = np.linalg.norm(h, axis=-1)
    across = {i: 1 - np.mean(np.sum(h[i] * h[i + 2], -1) / (norms[i] * norms[i + 2])) for i in range(1, BLOCKS - 1)}
    first = min(across, key=across.get)
    assert plan.kept_blocks == tuple(b for b in range(BLOCKS) if b not in (first, first + 1))
    assert [plan.scores[f"blocks {i}-{i + 1}"] for i in across] == pytest.approx(list(across.values()), rel=1e-4)
    m = mlp_outputs(model, rows, first - 1).reshape(-1, 32)
    y = h[first] - m
    alpha = ridge * np.trace(m.T @ m) / 32
    # Rows of the paper are tokens: its T is the transpose of ours.
    transform = np.linalg.solve(m.T @ m + alpha * np.eye(32), m.T @ (h[first + 2] - y))
    expected = without(model, (first, first + 1))
    down = expected.model.layers[first - 1].mlp.down_proj.weight
    down.data = torch.as_tensor(transform.T @ down.data.double().numpy()).float()
    torch.testing.assert_close(logits(compressed, rows), logits(expected, rows), rtol=0, atol=1e-3)


def test_replace_me_by_angle_is_the_authors_descent(model, rows, work):
    """ReplaceMe/utils.py, adam_method: 10 passes of Adam from I at 1e-4; fewer than 1024 tokens are one step a pass."""
    plan, compressed = work(model, ReplaceMe(name="x", ratio=0.3, objective="cosine"))
    first = min(set(range(BLOCKS)) - set(plan.kept_blocks))
    h = states(model, rows).reshape(BLOCKS + 1, -1, 32)
    m = mlp_outputs(model, rows, first - 1).reshape(-1, 32)
    target = h[first + 2] - (h[first] - m)
    target /= np.linalg.norm(target, axis=1, keepdims=True)
    t, mean, square = np.eye(32), np.zeros((32, 32)), np.zeros((32, 32))
    for step in range(1, 11):
        x = m @ t
        length = np.linalg.norm(x, axis=1, keepdims=True)
        unit = x / length
        gradient = m.T @ (((unit * target).sum(1, keepdims=True) * unit - target) / length) / len(m)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        t -= 1e-4 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    expected = without(model, (first, first + 1))
    down = expected.model.layers[first - 1].mlp.down_proj.weight
    down.data = torch.as_tensor(t.T @ down.data.double().numpy()).float()
    found = compressed.model.layers[first - 1].mlp.down_proj.weight
    torch.testing.assert_close(found, down, rtol=0, atol=1e-5)


@pytest.mark.parametrize("iterative", [True, False])
def test_prune_comp_gives_the_stream_the_magnitude_behind_the_block(iterative, model, rows, work):
    """Arxiv 2507.18212, as magcomp.py has it: embedding and earlier outputs times the mean ratio of magnitudes."""
    with torch.no_grad():
        # Later blocks turn the stream more: those that go have others behind them.
        for block in model.model.layers[3:]:
            block.self_attn.o_proj.weight *= 4
            block.mlp.down_proj.weight *= 4
    plan, compressed = work(model, PruneComp(name="x", ratio=0.3, iterative=iterative))
    current, present, gone = deepcopy(model), list(range(BLOCKS)), []
    original, first = influence(model, rows), None
    while len(gone) < 2:
        bi = influence(current, rows) if iterative else [original[block] for block in present]
        place = int(np.argmin(bi))
        h = states(current if iterative else model, rows)
        where = place if iterative else present[place]
        scale = (np.abs(h[where + 1]).mean(1) / np.abs(h[where]).mean(1)).mean()
        first = first or scale
        current = without(current, {place})
        current.model.embed_tokens.weight.data *= scale
        for block in current.model.layers[:place]:
            block.self_attn.o_proj.weight.data *= scale
            block.mlp.down_proj.weight.data *= scale
        gone.append(present.pop(place))
    assert plan.kept_blocks == tuple(present)
    assert [plan.scores[f"block {b}"] for b in range(BLOCKS)] == pytest.approx(original, rel=1e-4)
    assert plan.scores[f"scale {gone[0]}"] == pytest.approx(first, rel=1e-5)
    expected = logits(current, rows)
    assert (logits(without(model, gone), rows) - expected).abs().max() > 0.1
    torch.testing.assert_close(logits(compressed, rows), expected, rtol=0, atol=2e-3)


def test_grasp_activation_cuts_the_redundant_blocks_by_the_optimal_truncation(model, rows, work, seen, same_model):
    """GRASP's blocks and ranks; ``U_k U_k^T W`` with U_k the first left singular vectors of ``W X^T``."""
    usual = {"ratio": 0.2, "selection": "removed", "removed_share": 0.7}
    plan, compressed = work(model, Grasp(name="x", truncation=Optimal(), metric="magnitude", **usual))
    bi, layers, expected = influence(model, rows), seen(model), {}
    redundant = sorted(range(BLOCKS), key=lambda block: bi[block])[:2]
    assert {int(name.split(".")[2]) for name in plan.kept} == set(redundant)
    for name, layer in layers.items():
        if int(name.split(".")[2]) in redundant:
            out, columns = layer.weight.shape
            u = np.linalg.svd(layer.weight @ layer.x.T, full_matrices=False)[0][
                :, : int(out * columns * 0.3 / (out + columns))
            ]
            expected[name] = u @ u.T @ layer.weight
    same_model(compressed, model, expected)
