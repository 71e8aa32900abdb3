"""Methods that take blocks away, or components inside them: ShortGPT, LaCo, GRASP."""

from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch

from lowrank_kit.compressors.grasp import Grasp
from lowrank_kit.compressors.laco import LaCo
from lowrank_kit.compressors.shortgpt import ShortGPT

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
