"""Methods that take rows and columns away: SliceGPT (arXiv 2401.15024) and LLM-Pruner (arXiv 2305.11627)."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from lowrank_kit.calibration.texts import CalibrationSamples
from lowrank_kit.compressors.llm_pruner import LLMPruner
from lowrank_kit.compressors.slicegpt import SliceGPT, slice_model

HIDDEN = 32


@torch.no_grad()
def logits(model, rows):
    return model(input_ids=rows, use_cache=False).logits


@pytest.fixture
def normed(model):
    """Norms with weights of their own, which a rotation has to move into the matrices."""
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=draw)
    return model


def principal(states, width):
    """Projector on the principal directions of the RMS-normalised states, and the energy's share left out."""
    x = states.double().reshape(-1, states.shape[-1]).numpy()
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    values, vectors = np.linalg.eigh(x.T @ x)
    basis = vectors[:, -width:]
    return torch.tensor(basis @ basis.T, dtype=torch.float32), values[:-width].sum() / values.sum()


@torch.no_grad()
def projected_logits(model, rows, width):
    """Section 3.4 in the ORIGINAL coordinates: what is deleted of the residual stream is projected out of it."""
    inner = model.model
    h = inner.embed_tokens(rows)
    positions = torch.arange(rows.shape[1])[None]
    rotary = inner.rotary_emb(h, positions)
    mask = torch.full((rows.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    kept, _ = principal(h, width)
    for block in inner.layers:
        h = h @ kept
        h = h + block.self_attn(block.input_layernorm(h), position_embeddings=rotary, attention_mask=mask)[0]
        kept, _ = principal(h, width)
        h = h @ kept
        h = h + block.mlp(block.post_attention_layernorm(h))
        kept, _ = principal(h, width)
    return model.lm_head(inner.norm(h @ kept))


@pytest.mark.parametrize("width", [HIDDEN, 24, 16])
def test_slicegpt_computes_what_projections_of_the_stream_do(width, normed, rows):
    sliced = deepcopy(normed)
    samples = CalibrationSamples(tuple({"input_ids": row} for row in rows), batch_size=3)
    slice_model(sliced, samples, width)
    assert sliced.model.layers[0].self_attn.q_proj.in_features == width
    expected = projected_logits(normed, rows, width)
    torch.testing.assert_close(logits(sliced, rows), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    if width == HIDDEN:
        # Section 3.1, computational invariance: a rotation alone changes nothing.
        torch.testing.assert_close(logits(sliced, rows), logits(normed, rows), rtol=0, atol=1e-3)


def test_slicegpt_deletes_the_directions_of_least_energy(normed, rows):
    """Section 3.3: no basis of this width keeps more of the normalised embeddings' energy."""
    sliced, width = deepcopy(normed), 16
    samples = CalibrationSamples(tuple({"input_ids": row} for row in rows), batch_size=3)
    slice_model(sliced, samples, width)
    embeddings, narrow = (m.model.embed_tokens.weight.detach().double().numpy() for m in (normed, sliced))
    # The sliced embedding is the original one in the basis, times sqrt(width / d).
    basis = np.linalg.lstsq(embeddings, narrow / np.sqrt(width / HIDDEN), rcond=None)[0]
    assert np.abs(basis.T @ basis - np.eye(width)).max() <= 1e-4
    x = normed.model.embed_tokens.weight.detach().double()[rows].reshape(-1, HIDDEN).numpy()
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    left_out = ((x - x @ basis @ basis.T) ** 2).sum() / (x**2).sum()
    _, least = principal(normed.model.embed_tokens.weight.detach()[rows], width)
    assert left_out == pytest.approx(least, rel=1e-3)
    draw = np.random.default_rng(0)
    others = [np.linalg.qr(basis + 0.1 * draw.normal(size=basis.shape))[0] for _ in range(20)]
    assert all(((x - x @ q @ q.T) ** 2).sum() / (x**2).sum() > left_out for q in others)


def test_slicegpt_counts_its_shortcuts(normed, work):
    """Two matrices [width, width] a block lead from basis to basis: the budget holds with them."""
    plan, sliced = work(normed, SliceGPT(name="x", ratio=0.3, multiple=1))
    width = sliced.config.hidden_size

    def size(width):
        sides = {"q": 48, "k": 24, "v": 24, "o": 48, "gate": 48, "up": 48, "down": 48}
        return 3 * (sum(sides.values()) * width + 2 * width**2)

    total = 3 * HIDDEN * (48 + 24 + 24 + 48 + 48 + 48 + 48)
    assert size(width) == plan.parameters_after <= 0.7 * total < size(width + 1)


def test_llm_pruner_takes_out_the_groups_of_least_first_order_effect(model, rows, work, seen):
    """Section 3.2, element-wise first order: sum of |w dL/dw| over all that leaves with a head or a channel."""
    method = LLMPruner(name="x", ratio=0.4, protect_first=1, protect_last=0)
    plan, pruned = work(model, method)
    layers, zeroed = seen(model), deepcopy(model)
    for block in (1, 2):
        effect = {}
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
            layer = layers[f"model.layers.{block}.{part}_proj"]
            effect[part.split(".")[1]] = np.abs(layer.weight * layer.mean_gradient)
        heads, channels = [], []
        for head in range(2):  # a key-value head of 12 dimensions and its two query heads
            q = slice(24 * head, 24 * head + 24)
            kv = slice(12 * head, 12 * head + 12)
            heads.append(effect["q"][q].sum() + effect["k"][kv].sum() + effect["v"][kv].sum() + effect["o"][:, q].sum())
        for c in range(48):
            channels.append(effect["gate"][c].sum() + effect["up"][c].sum() + effect["down"][:, c].sum())
        for kind, scores in (("heads", heads), ("channels", channels)):
            kept = plan.kept[f"block {block} {kind}"]
            assert kept == sorted(np.argsort(scores)[::-1][: len(kept)].tolist()), (block, kind)
        # A unit whose outputs are read by nothing is gone.
        attention, mlp = zeroed.model.layers[block].self_attn, zeroed.model.layers[block].mlp
        for head in set(range(2)) - set(plan.kept[f"block {block} heads"]):
            attention.o_proj.weight.data[:, 24 * head : 24 * head + 24] = 0
        for c in set(range(48)) - set(plan.kept[f"block {block} channels"]):
            mlp.down_proj.weight.data[:, c] = 0
    assert all(len(plan.kept[f"block {b} heads"]) == 1 for b in (1, 2))
    assert all(0 < len(plan.kept[f"block {b} channels"]) < 48 for b in (1, 2))
    torch.testing.assert_close(logits(pruned, rows), logits(zeroed, rows), rtol=0, atol=1e-4)
